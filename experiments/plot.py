"""Draw learning curves, or what training changed.

    python experiments/plot.py RUN [RUN ...] [--out curves.png]
    python experiments/plot.py --states RUN [--out states.png]    # a TWOSOME run of tomato-salad

A RUN is a folder that twosome.py left. Runs whose names differ only in the seed become one line,
the mean, with a band from the lowest to the highest. Dotted lines: the best possible, and uniformly
random choice among the offered actions. Needs matplotlib, which requirements.txt leaves out.

--states shows the six decisions that the shortest way to a tomato salad takes, and how probable
each action is there before training (adapter off) and after.

reproduce.py draws its figures with the functions of this file.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import twosome  # noqa: E402
from twosome import OPTIMUM  # noqa: E402

# Exact values of uniformly random choice, by dynamic programming over all states.
RANDOM = {"tomato-salad": (0.442, -0.096), "tomato-lettuce-salad": (0.0102, -0.228),
          "food-preparation": (0.0193, 0.0038), "entertainment": (0.00264, 0.0004)}
RANDOM |= {task: RANDOM["food-preparation"] for task in OPTIMUM if task not in RANDOM}

# Okabe and Ito's colours, told apart by colour-blind readers, in an order of falling lightness
# steps; line styles tell them apart in grey as well.
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#000000", ":"),
          ("#CC79A7", (0, (5, 1))), ("#E69F00", (0, (3, 1, 1, 1))), ("#56B4E9", (0, (1, 1)))]


def pyplot():
    """matplotlib, or one line that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plot.py: figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # files only, no window
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 150})
    return plt


def smooth(curve: list[dict], metric: str, episodes: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(env_steps, metric): the mean over the latest `episodes` or more training episodes."""
    rows = [row for row in curve if int(row["episodes"])]
    counts = np.array([int(row["episodes"]) for row in rows])
    values = np.array([float(row[metric]) for row in rows])
    result = []
    for end in range(1, len(rows) + 1):
        start = end - 1
        while start > 0 and counts[start:end].sum() < episodes:
            start -= 1
        result.append(np.average(values[start:end], weights=counts[start:end]))
    return np.array([int(row["env_steps"]) for row in rows]), np.array(result)


def band(axis, label: str, curves: list[list[dict]], metric: str, style):
    """Mean over seeds, and a band from the lowest to the highest."""
    smoothed = [smooth(curve, metric) for curve in curves]
    first, last = max(x[0] for x, _ in smoothed), min(x[-1] for x, _ in smoothed)
    steps = np.linspace(first, last, 200)
    lines = np.array([np.interp(steps, x, y) for x, y in smoothed])
    color, dashes = style
    axis.plot(steps, lines.mean(0), color=color, linestyle=dashes, label=label, linewidth=1.6)
    if len(lines) > 1:
        axis.fill_between(steps, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)


def learning_curves(panels: dict[str, dict[str, list]], path: Path):
    """panels: task -> label -> one curve (rows of metrics.csv) for each seed. Writes a picture with
    success above and discounted return below."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(panels), figsize=(3.1 * len(panels) + 0.6, 5.2),
                                squeeze=False, sharex="col", layout="constrained")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    styles = {label: STYLES[i % len(STYLES)] for i, label in enumerate(labels)}
    for column, (task, lines) in zip(axes.T, panels.items()):
        for axis, metric, best, at_random in zip(
                column, ("success", "return"), (1, OPTIMUM[task]), RANDOM[task]):
            for label, curves in lines.items():
                band(axis, label, curves, metric, styles[label])
            axis.locator_params(axis="x", nbins=5)
            axis.axhline(best, color="0.4", linestyle=":", linewidth=1)
            axis.axhline(at_random, color="0.4", linestyle=":", linewidth=1)
            axis.annotate("best", (1, best), xycoords=("axes fraction", "data"), fontsize=7,
                          ha="right", va="bottom", color="0.4")
            axis.annotate("random", (1, at_random), xycoords=("axes fraction", "data"), fontsize=7,
                          ha="right", va="bottom", color="0.4")
        column[0].set_title(task)
        column[1].set_xlabel("environment steps (decisions)")
    axes[0, 0].set_ylabel("success")
    axes[1, 0].set_ylabel("discounted return")
    handles = {label: handle for axis in axes[0] for handle, label in
               zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center",
                  ncols=min(len(handles), 2 * len(panels)), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def bars(groups: dict[str, dict[str, list[float]]], path: Path, ylabel: str, line=None):
    """groups: place on the x axis -> label -> one value for each seed. Bars are means, whiskers go
    from the lowest seed to the highest."""
    plt = pyplot()
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    figure, axis = plt.subplots(figsize=(max(4.0, 1.2 + 0.35 * len(groups) * (len(labels) + 1)), 3),
                                layout="constrained")
    for i, label in enumerate(labels):
        for j, values in enumerate(groups.values()):
            if not values.get(label):
                continue
            mean, low, high = (f(values[label]) for f in (np.mean, min, max))
            axis.bar(j + (i - (len(labels) - 1) / 2) * 0.8 / len(labels), mean,
                     0.8 / len(labels), yerr=[[mean - low], [high - mean]], capsize=2,
                     color=STYLES[i][0], hatch=("", "//", "..", "xx", "\\\\")[i % 5],
                     edgecolor="white", error_kw={"linewidth": 1},
                     label=label if label not in axis.get_legend_handles_labels()[1] else None)
    if line is not None:
        axis.axhline(line, color="0.3", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axis.set_ylabel(ylabel)
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path)
    plt.close(figure)


TOMATO_SALAD = [0, 2, 4, 0, 1, 3]  # fetch the tomato, to the board, chop, take, to the bowl, serve


@torch.no_grad()
def decisive_states(run: Path, path: Path):
    """The policy in the six states of the shortest way, adapter off and on."""
    args, agent = twosome.load_run(run, {"device": "cpu"})
    if (args.task, args.method) != ("tomato-salad", "twosome"):
        raise twosome.UserError(f"{run} is no TWOSOME run of tomato-salad")
    plt = pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(9, 6), layout="constrained", sharex=True)
    episode = twosome.make_episode(args)
    for number, (axis, best) in enumerate(zip(axes.flat, TOMATO_SALAD), start=1):
        prompt, phrases = episode.state
        (after,) = agent.log_policy([(prompt, phrases)])
        with agent.model.disable_adapter():
            (before,) = agent.log_policy([(prompt, phrases)])
        rows = np.arange(len(phrases))
        axis.barh(rows - 0.2, before.exp().numpy(), 0.38, color="#E69F00", label="before training",
                  hatch="///", edgecolor="white")
        axis.barh(rows + 0.2, after.exp().numpy(), 0.38, color="#0072B2", label="after training")
        axis.set_yticks(rows, phrases, fontsize=7)
        axis.get_yticklabels()[best].set_fontweight("bold")
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.set_title(f"{number}. {episode.obs.partition('. ')[0]}.", fontsize=8, loc="left")
        episode.act(best)
    for axis in axes[-1]:
        axis.set_xlabel("probability")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path)
    parser.add_argument("--states", metavar="RUN", type=Path, help="draw what training changed")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png, states.png)")
    given = parser.parse_args()
    given.out = given.out or Path("states.png" if given.states else "curves.png")
    pyplot()  # first of all: without matplotlib there is nothing to do
    if given.states:
        try:
            decisive_states(given.states, given.out)
        except twosome.UserError as error:
            raise SystemExit(f"plot.py: {error}") from None
        return print(f"wrote {given.out}")
    if not given.runs:
        parser.error("name at least one run's folder")
    panels = {}
    for run in given.runs:
        try:
            config = json.loads((run / "config.json").read_text())
            with open(run / "metrics.csv", newline="") as file:
                curve = list(csv.DictReader(file))
        except (OSError, ValueError) as error:
            raise SystemExit(f"plot.py: {run} is not a run's folder ({error})") from None
        if not any(int(row["episodes"]) for row in curve):
            raise SystemExit(f"plot.py: no episode ended in {run} yet")
        label = re.sub(r"-?seed\d+", "", run.name).removeprefix(config["task"]).strip("-")
        panels.setdefault(config["task"], {}).setdefault(label or run.name, []).append(curve)
    learning_curves(panels, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
