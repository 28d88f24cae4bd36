"""Draw learning curves, or what training has changed. It needs matplotlib.

    python experiments/plot.py RUN [RUN ...] [--out FILE]    # without it, curves.png beside RUN
    python experiments/plot.py --states RUN [--out FILE]     # without it, RUN/states.png

Learning curves: runs that differ in the seed and nothing else are thin lines of one colour, and a
thick line is their mean. Each point is the mean of the episodes that a run has played after an
update (16 by default). It stands at the number of decisions that were made until then.

--states follows the trained policy's most probable actions, and shows how probable each action was
on the way, untrained and trained.
"""

import csv
import json
import re
import sys
import textwrap
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import baselines, exact  # noqa: E402
from twosome import UserError, require  # noqa: E402

# The colours of Okabe and Ito, which colour-blind readers can tell apart. The line styles tell the
# lines apart in grey as well.
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#000000", ":"),
    ("#CC79A7", (0, (5, 1))),
    ("#E69F00", (0, (3, 1, 1, 1))),
    ("#56B4E9", (0, (1, 1))),
]


def pyplot():
    """matplotlib, or one line that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py: figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")  # It writes files and opens no window.
    matplotlib.rcParams |= {
        "font.size": 9,
        "figure.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.dpi": 150,
    }
    from matplotlib import pyplot as plt

    return plt


# === Learning curves ==============================================================================
def draw_line(axis, curves, metric, style):
    """Draw a thin line for each seed and a thick one, their mean. Returns the height of its end. A
    seed whose first reward comes late is untrained until then, and one that ends early stays."""
    color, dashes = style
    lines = []
    for curve in curves:
        x = np.array([float(row["decisions"]) for row in curve])
        y = np.array([float(row[metric]) for row in curve])
        axis.plot(x, y, color=color, linewidth=0.6, alpha=0.6)
        lines.append((x, y))
    decisions = np.unique(np.concatenate([x for x, _ in lines]))
    mean = np.mean([np.interp(decisions, x, y) for x, y in lines], axis=0)
    axis.plot(decisions, mean, color=color, linestyle=dashes, linewidth=1.8)
    return mean[-1]


def label_ends(axis, ends, styles):
    """Write each label beside the end of its line, and push apart those that would overlap."""
    low, high = axis.get_ylim()
    lowest_free = -1.0
    for label, end in sorted(ends.items(), key=lambda pair: pair[1]):
        height = max((end - low) / (high - low), lowest_free)  # a part of the axis
        lowest_free = height + 0.09
        color, _ = styles[label]
        axis.text(1.02, height, label, transform=axis.transAxes, color=color, va="center")


@cache
def references(task):
    """Success and return of what a curve is to be compared with: random choice, and the best."""
    name = next(name for name, env in twosome.ENVS.items() if task in env.TASKS)
    settings = twosome.make_settings(env=name, task=task)
    random_choice = exact.exact(baselines.RandomAgent(settings), settings)
    best_return = getattr(twosome.ENVS[name], "OPTIMUM", {}).get(task)
    return random_choice, (1.0, best_return)


def draw_references(axis, heights):
    """Curves lie between the two, so there is room for the names below the one and above the
    other."""
    random_choice, best = heights
    _, right = axis.get_xlim()
    style = {"color": "0.4", "fontsize": 7, "ha": "right"}
    axis.axhline(random_choice, color="0.4", linestyle=":", linewidth=1)
    axis.annotate("random choice", (right, random_choice), va="top", **style)
    if best is not None:
        axis.axhline(best, color="0.4", linestyle=":", linewidth=1)
        axis.annotate("best possible", (right, best), va="bottom", **style)


def learning_curves(panels, path, title="Thin lines are single runs, thick lines are their means."):
    """Draw panels: task -> label -> one curve for each seed, which is a list of rows of a log. Each
    task has a row of two panels, success and discounted return."""
    plt = pyplot()
    size = 8, 0.5 + 2.6 * len(panels)
    figure, axes = plt.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title)
    styles = {}
    for row, (task, lines) in zip(axes, panels.items(), strict=True):
        heights = zip(*references(task), strict=True)
        for axis, metric, pair in zip(row, ("success", "return"), heights, strict=True):
            ends = {}
            for label, curves in lines.items():
                style = styles.setdefault(label, STYLES[len(styles) % len(STYLES)])
                ends[label] = draw_line(axis, curves, metric, style)
            draw_references(axis, pair)
            axis.set_title(f"{task}: {metric.replace('return', 'discounted return')}", loc="left")
            axis.set_xlabel("decisions")
            axis.locator_params(axis="x", nbins=5)
        row[0].set_ylim(-0.07, 1.07)
        label_ends(row[1], ends, styles)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def read_curve(run):
    """The rows of a run's log, with the untrained LM as the first one where the run has ended."""
    try:
        with open(run / "metrics.csv", newline="") as file:
            curve = list(csv.DictReader(file))
        if (run / "summary.json").exists():
            untrained = json.loads((run / "summary.json").read_text())["before"]
            curve.insert(0, {"decisions": 0} | untrained)
    except (OSError, ValueError) as error:
        raise UserError(f"{run} has no readable log: {error}") from error
    require(curve, f"{run} has no row in its log")
    return curve


def read_runs(runs):
    """Return task -> label -> the curves of runs that differ only in the seed."""
    panels, labels = {}, {}
    for run in runs:
        config = twosome.read_config(run)
        lines = panels.setdefault(config["task"], {})
        method = baselines.read_method(run)
        key = json.dumps(config | {"seed": 0, "out": "", "method": method}, sort_keys=True)
        if key not in labels:
            name = re.sub(r"-?seed-?\d+", "", run.resolve().name)
            labels[key] = str(run) if name in lines else name
        lines.setdefault(labels[key], []).append(read_curve(run))
    return panels


# === What training has changed ====================================================================
@torch.no_grad()
def most_probable_episode(run):
    """Follow the trained policy's most probable actions to the end or a repetition, or for twelve.
    Returns the task, and for each decision what is new in the observation, the phrases, the choice,
    and both policies."""
    settings, agent = baselines.load_run(run, device="cpu")
    require(hasattr(agent, "tokenizer"), f"{run} has trained no LM")
    env = twosome.make_env(agent, settings)
    decisions, states, known = [], [], []
    while not env.done and len(decisions) < 12 and env.state() not in states:
        state = env.state()
        states.append(state)
        (trained,) = agent.log_policy([state])
        with agent.model.disable_adapter():
            (untrained,) = agent.log_policy([state])
        choice = trained.argmax().item()
        sentences = re.split(r"(?<=\.) ", env.obs)
        news = " ".join(sentence for sentence in sentences if sentence not in known)
        policies = {"untrained": untrained.exp().numpy(), "trained": trained.exp().numpy()}
        decisions.append((news, state[1], choice, policies))
        known = sentences
        env.step(choice)
    return settings.task, decisions


def draw_states(run, path):
    plt = pyplot()
    task, decisions = most_probable_episode(run)
    n_rows = (len(decisions) + 1) // 2
    size = 10, 0.8 + 1.9 * n_rows
    figure, axes = plt.subplots(n_rows, 2, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(f"{task}: what training has changed. In bold: what the trained policy does")
    for axis in axes.flat[len(decisions) :]:
        axis.set_visible(False)
    for i, (axis, decision) in enumerate(zip(axes.flat, decisions, strict=False)):
        news, phrases, choice, policies = decision
        rows = np.arange(len(phrases))
        axis.barh(rows - 0.2, policies["untrained"], 0.38, color="#E69F00", label="untrained")
        axis.barh(rows + 0.2, policies["trained"], 0.38, color="#0072B2", label="trained")
        axis.set_yticks(rows, phrases, fontsize=7)
        axis.get_yticklabels()[choice].set_fontweight("bold")
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.set_title(textwrap.shorten(f"{i + 1}. {news}", 80), fontsize=8, loc="right")
        axis.set_xlabel("probability" if i >= len(decisions) - 2 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


# === Bars, for reproduce.py =======================================================================
def bars(groups, path, ylabel, title, line=None):
    """Draw groups: place on the x axis -> label -> one value for each seed. A bar is the mean of
    the dots, which are the seeds. `line` is a pair: a height, and what it means."""
    plt = pyplot()
    labels = list(next(iter(groups.values())))
    size = max(4.0, 1.2 + 0.35 * len(groups) * (len(labels) + 1)), 3
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        color, _ = STYLES[i % len(STYLES)]
        shift = (i - (len(labels) - 1) / 2) * width
        means = []
        for j, values in enumerate(groups.values()):
            seeds = values[label]
            means.append(np.mean(seeds) if seeds else 0.0)
            axis.plot([j + shift] * len(seeds), seeds, "k.", markersize=3)
        places = np.arange(len(groups)) + shift
        axis.bar(places, means, width, color=color, edgecolor="white", label=label)
    if line:
        height, meaning = line
        axis.axhline(height, color="0.4", linestyle=":", linewidth=1)
        axis.annotate(meaning, (axis.get_xlim()[1], height), color="0.4", fontsize=7)
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axis.set_ylabel(ylabel)
    axis.set_title(title, loc="left")
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(argv=()):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path)
    parser.add_argument("--states", metavar="RUN", type=Path, help="draw what training has changed")
    parser.add_argument("--out", type=Path, help="the picture, in any format of matplotlib")
    given = parser.parse_args(argv)
    if not (given.runs or given.states):
        parser.error("name at least one run's folder")
    if given.states:
        out = given.out or given.states / "states.png"
    else:
        out = given.out or given.runs[0].parent / "curves.png"
    formats = pyplot().figure().canvas.get_supported_filetypes()
    try:
        require(out.suffix[1:] in formats, f"--out {out} must end in one of {', '.join(formats)}")
        if given.states:
            draw_states(given.states, out)
        else:
            learning_curves(read_runs(given.runs), out)
    except (UserError, OSError) as error:
        sys.exit(f"plot.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
