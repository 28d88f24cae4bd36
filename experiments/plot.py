"""Draw learning curves, or what training changed.

    python experiments/plot.py RUN [RUN ...] [--out FILE]    # without it, runs/curves.png
    python experiments/plot.py --states RUN [--out FILE]     # a run of tomato-salad; RUN/states.png

A RUN is a folder that twosome.py left. Runs whose config.json differs in the seed and nothing else
become one line, the mean, with a band from the lowest to the highest. Each point is the mean of the
latest two rows of metrics.csv. Dotted lines, for the tasks that come with twosome.py: the best
possible, and uniformly random choice among the offered actions. Needs matplotlib, which
requirements.txt leaves out.

--states shows the six decisions that the shortest way to a tomato salad takes, and how probable
each action is there before training (adapter off) and after.

reproduce.py draws its figures with the functions of this file.
"""

import argparse
import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import baselines  # noqa: E402
import torch  # noqa: E402

import twosome  # noqa: E402

OPTIMUM = twosome.OvercookedText.OPTIMUM | twosome.VirtualHomeText.OPTIMUM
# Success and discounted return of uniformly random choice, as exact.py computes them.
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


def smooth(curve: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(env_steps, metric): the mean of each row and the one before it."""
    rows = [row for row in curve if row[metric] != ""]
    values = np.array([float(row[metric]) for row in rows])
    return (np.array([int(row["env_steps"]) for row in rows]),
            (values + np.concatenate([values[:1], values[:-1]])) / 2)


def band(axis, label: str, curves: list[list[dict]], metric: str, style):
    """Mean over seeds, and a band from the lowest to the highest. A seed whose first reward comes
    late is untrained until then; one that ends early stays as it is."""
    smoothed = [smooth(curve, metric) for curve in curves]
    first, last = min(x[0] for x, _ in smoothed), max(x[-1] for x, _ in smoothed)
    steps = np.linspace(first, last, 200)
    lines = np.array([np.interp(steps, x, y) for x, y in smoothed])
    color, dashes = style
    how = {"color": color, "linestyle": dashes, "label": label, "linewidth": 1.6}
    if first == last:  # a single row: nothing was ever earned, nothing learned
        axis.axhline(lines.mean(), **how)
        return
    axis.plot(steps, lines.mean(0), **how)
    if len(lines) > 1:
        axis.fill_between(steps, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)


def learning_curves(panels: dict[str, dict[str, list]], path: Path):
    """panels: task -> label -> one curve (rows of metrics.csv) for each seed. Writes a picture with
    success above and discounted return below."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(panels), figsize=(3.1 * len(panels) + 0.6, 5.2),
                                squeeze=False, sharex="col", layout="constrained")
    most_first = sorted(panels.values(), key=len, reverse=True)  # so any two figures agree
    labels = list(dict.fromkeys(label for lines in most_first for label in lines))
    styles = {label: STYLES[i % len(STYLES)] for i, label in enumerate(labels)}
    for column, (task, lines) in zip(axes.T, panels.items()):
        marks = {"best": (1, OPTIMUM[task]), "random": RANDOM[task]} if task in OPTIMUM else {}
        for i, metric in enumerate(("success", "return")):
            for label, curves in lines.items():
                band(column[i], label, curves, metric, styles[label])
            column[i].locator_params(axis="x", nbins=5)
            for name, values in marks.items():
                column[i].axhline(values[i], color="0.4", linestyle=":", linewidth=1)
                column[i].annotate(name, (1, values[i]), xycoords=("axes fraction", "data"),
                                   fontsize=7, ha="right", va="bottom", color="0.4")
        column[0].set_title(task)
        column[1].set_xlabel("environment steps (decisions);\neach value: the latest "
                             f"{2 * twosome.EPISODES_PER_ROW} episodes")
    axes[0, 0].set_ylabel("success")
    axes[1, 0].set_ylabel("discounted return")
    handles = {label: handle for axis in axes[0] for handle, label in
               zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center",
                  ncols=min(len(handles), 2 * len(panels)), frameon=False)
    figure.savefig(path, bbox_inches="tight")
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
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


TOMATO_SALAD = [0, 2, 4, 0, 1, 3]  # fetch the tomato, to the board, chop, take, to the bowl, serve


@torch.no_grad()
def decisive_states(run: Path, path: Path):
    """The policy in the six states of the shortest way, adapter off and on."""
    args, agent = baselines.load_run(run, device="cpu")
    if (args.task, args.method) != ("tomato-salad", "twosome"):
        raise ValueError(f"{run} is no TWOSOME run of tomato-salad")
    plt = pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(9, 6), layout="constrained", sharex=True)
    episode = twosome.make_episode(args)
    for number, (axis, best) in enumerate(zip(axes.flat, TOMATO_SALAD), start=1):
        prompt, phrases = episode.state()
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
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def read_runs(runs: list[Path]) -> dict[str, dict[str, list]]:
    """task -> the first of the runs that differ only in the seed -> the curves of all of them."""
    alike = {}  # (settings, group) -> seed -> run, task, curve
    for run in runs:
        try:
            config = json.loads((run / "config.json").read_text())
            with open(run / "metrics.csv", newline="") as file:
                curve = [row for row in csv.DictReader(file) if row["success"]]
        except (OSError, ValueError) as error:
            raise ValueError(f"{run} is not a run's folder, or has not trained ({error})") from None
        if not curve:
            raise ValueError(f"{run} has no row with a success (--log-success no), or no row yet")
        seed, settings = config["seed"], json.dumps(config | {"seed": 0, "out": ""}, sort_keys=True)
        # A run with a seed that is there already is another agent (say, of altered code).
        group = next(i for i in itertools.count() if seed not in alike.get((settings, i), ()))
        alike.setdefault((settings, group), {})[seed] = run, config["task"], curve
    panels = {}
    for group in alike.values():
        runs, tasks, curves = zip(*group.values())
        label = str(runs[0]) + f" and {len(runs) - 1} more" * (len(runs) > 1)
        panels.setdefault(tasks[0], {})[label] = list(curves)
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path)
    parser.add_argument("--states", metavar="RUN", type=Path, help="draw what training changed")
    parser.add_argument("--out", type=Path, help="the picture that is written, in any format that "
                        "matplotlib knows (default: curves.png beside the first run; with --states "
                        "RUN/states.png)")
    given = parser.parse_args()
    if not (given.runs or given.states):
        parser.error("name at least one run's folder")
    given.out = given.out or (given.states / "states.png" if given.states
                              else given.runs[0].parent / "curves.png")
    pyplot()  # first of all: without matplotlib there is nothing to do
    try:
        if given.states:
            decisive_states(given.states, given.out)
        else:
            learning_curves(read_runs(given.runs), given.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"plot.py: {error}") from None
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
