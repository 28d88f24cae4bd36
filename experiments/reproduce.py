"""Remake the results: experiments/results/NAME/ with runs.csv, curves.csv, RESULTS.md and figures.

    python experiments/reproduce.py quick --out mine    # two tasks and one seed, about ten minutes
    python experiments/reproduce.py full                # all of it with pocket_lm
    python experiments/reproduce.py full --model models/SmolLM2-135M-Instruct \\
        --wikitext FILE --blimp FOLDER_OR_ZIP           # with a real LM; language.py has the links
    python experiments/reproduce.py full --only E1 E5   # some of the experiments
    python experiments/reproduce.py full --report       # only RESULTS.md and the figures

A job trains one agent and measures it. It is a label, a task and a seed, and it ends as one row of
runs.csv. What is there is not made again, so an interrupted call goes on where it stopped, within a
job at its last update. Success and return at the end are exact (exact.py), those along the way are
means of 16 sampled episodes. If there is a file text.md, it stands at the top of RESULTS.md.

E1 sample efficiency   TWOSOME with three normalisations, PPO, SayCan, untrained, random choice
E2 unseen tasks        six chores, along the way of the training on another one
E3 language            before and after, with and without rehearsal
E4 prompts             each of the four principles off, and other joining words
E5 departures          each of our departures from the paper's code put back, alone
"""

import csv
import multiprocessing
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial, partialmethod
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402
from experiments import baselines, language, plot  # noqa: E402
from experiments.exact import exact  # noqa: E402
from twosome import Agent, TextEnv, UserError  # noqa: E402

SHORT = ["tomato-salad", "food-preparation"]
LONG = ["entertainment", "tomato-lettuce-salad"]
TASKS = [*SHORT, *LONG]
TRAINED = "food-preparation"  # E2 trains on it and asks for these:
UNSEEN = ["cheese", "hamburger", "apple-pie", "pizza", "washing-plate", "laundry"]
MOMENTS = ["untrained", "at 90%", "half-way", "at the end"]
UNSEEN_COLUMNS = [*UNSEEN, "all six", f"return on {TRAINED}"]
NORMS = ["word", "token", "none"]
EXPERIMENTS = ["E1", "E2", "E3", "E4", "E5"]
SEEDS = [41, 42, 43, 44, 45]  # Nothing was chosen by looking at them.
PPO_STEPS = {
    "tomato-salad": 15_360,
    "food-preparation": 10_240,
    "entertainment": 61_440,
    "tomato-lettuce-salad": 25_600,
}  # decisions until PPO has learned
COST = {"tomato-lettuce-salad": 4}  # of a decision beside those of other tasks, to guess the time


# === E4. Prompts: each takes the place of TextEnv.state. ==========================================
def joined_by(env, words):
    _, phrases = TextEnv.state(env)
    return f"{env.obs} {words.format(goal=env.env.goal)}", phrases


def no_articles(env):
    prompt, phrases = TextEnv.state(env)
    without = partial(re.sub, r"\b([Aa]n?|[Tt]he) ", "")
    return without(prompt), tuple(map(without, phrases))


def other_words(env):
    """The actions name things by other words than the observation does."""
    prompt, phrases = TextEnv.state(env)
    others = {
        "bowl": "dish",
        "cutting board": "wooden block",
        "pancake": "flat cake",
        "microwave": "oven",
    }
    for word, other in others.items():
        phrases = tuple(phrase.replace(word, other) for phrase in phrases)
    return prompt, phrases


def one_wording(env):
    """Every action keeps the wording that it has in the first state."""
    prompt, _ = TextEnv.state(env)
    _, info = type(env.env)(env.env.task).reset()
    now = env.info["actions"].items()
    return prompt, tuple(info["actions"].get(i, phrase) for i, phrase in now)


PROMPTS = {
    "as it is": TextEnv.state,
    "not cohesive": partialmethod(joined_by, "Your task is to {goal}."),
    "no articles": no_articles,
    "other words in the actions": other_words,
    "one wording of an action": one_wording,
}
for words in (
    "To {goal}, your next step is to",
    "The next step to {goal} is to",
    "To {goal}, you should first",
    "To {goal}, first",
):
    PROMPTS[words.format(goal="G")] = partialmethod(joined_by, words)


# === E5. Departures: what the paper's code does, each alone. ======================================
class ConstantBonus(Agent):
    """The entropy bonus does not fall to 0."""

    def learn(self, rollout, remaining, rng):
        given = self.settings
        self.settings = replace(given, ent_coef=given.ent_coef / remaining)
        metrics = super().learn(rollout, remaining, rng)
        self.settings = given
        return metrics


class LimitEnds(TextEnv):
    """The time limit is an end, after which nothing is earned."""

    def step(self, choice):
        reward, discount = super().step(choice)
        return reward, discount * (1 - self.done)


class AlwaysEarns(TextEnv):
    """A reward of 1e-30 changes no number, but the training loop then finds a rollout earning."""

    def step(self, choice):
        reward, discount = super().step(choice)
        return reward + 1e-30, discount


def paper_lora(model):
    """Rank 8 and all blocks. peft adapts queries and values unless told otherwise."""
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


class OnePass(Agent):
    """The critic makes one pass of four minibatches, and the change of V is clipped."""

    def learn(self, rollout, remaining, rng):
        given = self.settings
        lr = remaining * given.value_lr
        old = rollout.returns - rollout.advantage
        for batch in twosome.minibatches(len(rollout.states), 1, 4, rng):
            value = self.value([rollout.states[i] for i in batch])
            change = (value - old[batch]).clamp(-given.clip_coef, given.clip_coef)
            errors = torch.stack([value, old[batch] + change]) - rollout.returns[batch]
            self.critic_optimizer.zero_grad()
            (0.5 * errors.square().amax(0).mean()).backward()
            twosome.take_step(self.critic_optimizer, lr, given.max_grad_norm)
        self.settings = replace(given, value_epochs=0)
        metrics = super().learn(rollout, remaining, rng)
        self.settings = given
        return metrics


@dataclass
class Variant:
    """How an agent differs from the default."""

    settings: dict = field(default_factory=dict)
    kind: type = Agent
    wrapper: type = TextEnv
    lora: object = twosome.add_lora


DEPARTURES = {
    "the time limit is an end": Variant(wrapper=LimitEnds),
    "LoRA of rank 8 in all blocks": Variant(lora=paper_lora),
    "a rollout without reward is learned from": Variant(wrapper=AlwaysEarns),
    "no rehearsal": Variant({"rehearsal_coef": 0.0}),
    "one epoch": Variant({"epochs": 1}),
    "one pass of the critic, V clipped": Variant(kind=OnePass),
    "a constant entropy bonus": Variant(kind=ConstantBonus),
}
VARIANTS = DEPARTURES | {norm: Variant({"norm": norm}) for norm in NORMS}
for name, reword in PROMPTS.items():
    variant = Variant(wrapper=type("Reworded", (TextEnv,), {"state": reword}))
    VARIANTS[name] = VARIANTS[f"untrained, {name}"] = variant


# === The jobs =====================================================================================
@dataclass(frozen=True)
class Job:
    experiments: str
    label: str
    task: str
    seed: int
    steps: int | None
    model: str

    def name(self):
        return f"{self.label}, {self.task}, seed {self.seed}"

    def row(self):
        return {"name": self.name(), "label": self.label, "task": self.task, "seed": self.seed}

    def cost(self):
        learns_lm = self.label not in baselines.DEFAULTS
        return 1000 + learns_lm * COST.get(self.task, 1) * self.steps


def get_settings(job):
    env = "overcooked" if job.task in twosome.OvercookedText.TASKS else "virtualhome"
    values = {"env": env, "task": job.task, "seed": job.seed, "steps": job.steps}
    values |= {"model": job.model, "device": "cpu"} | baselines.DEFAULTS.get(job.label, {})
    return twosome.make_settings(**values | VARIANTS.get(job.label, Variant()).settings)


# Experiments, labels, tasks, with how many seeds, and decisions where they are not the task's.
UNTRAINED = [f"untrained, {name}" for name in PROMPTS]
PLAN = [
    ("E1 E2 E3 E4 E5", ["word"], SHORT, 5, {}),
    ("E1 E2 E3", ["token", "none"], SHORT, 5, {}),
    ("E1", ["ppo", "saycan"], TASKS, 5, PPO_STEPS),
    ("E1", ["word, PPO's decisions"], SHORT, 3, PPO_STEPS),
    ("E1 E4", [*UNTRAINED, "random"], TASKS, 1, dict.fromkeys(TASKS, 0)),
    ("E3 E5", list(DEPARTURES), SHORT, 3, {}),
    ("E4", list(PROMPTS)[1:], SHORT, 3, {}),
    ("E1 E3", ["word"], LONG, 5, {}),
    ("E1 E3", ["token", "none"], LONG, 3, {}),
]


def make_jobs(given):
    jobs = []
    quick = given.mode == "quick"
    seeds = given.seeds or SEEDS[: 1 if quick else 5]
    # The two long tasks take a real LM hours.
    n_long = 0 if quick else 5 if given.model == "pocket_lm" else 3
    for i, seed in enumerate(seeds):
        for experiments, labels, tasks, n_seeds, steps in PLAN:
            for task, label in product(tasks, labels):
                wanted = i < n_seeds and (task in SHORT or i < n_long)
                if wanted and set(given.only) & set(experiments.split()):
                    job = Job(experiments, label, task, seed, steps.get(task), given.model)
                    decisions = min(get_settings(job).steps, given.steps)
                    jobs.append(replace(job, steps=decisions))
    return jobs


# === One job ======================================================================================
def make_agent(job, settings):
    if job.label in baselines.DEFAULTS:
        return baselines.make_agent(settings, job.label)
    variant = VARIANTS.get(job.label, Variant())
    agent = twosome.make_agent(settings, variant.kind, variant.lora)
    agent.wrapper = variant.wrapper
    return agent


def get_curve(run):
    """Decisions, success and return: untrained, and in each row of the log."""
    before = run.before | {"decisions": 0}
    return [(row["decisions"], row["success"], row["return"]) for row in [before, *run.rows]]


def decisions_to_90(curve):
    """The number of decisions at which success reaches 0.9, or None. A point is the mean of two
    consecutive rows, 32 episodes. Between points we interpolate."""
    x, y, _ = np.array(curve).T
    x[1:], y[1:] = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
    if y.max() < 0.9:
        return None
    i = np.argmax(y >= 0.9)  # the first one
    last_two = slice(max(i - 1, 0), i + 1)
    return np.interp(0.9, y[last_two], x[last_two])


def ask_unseen(agent, moment):
    """Exact success on the unseen tasks, and return on the task itself."""
    values = [exact(agent, replace(agent.settings, task=task))[0] for task in UNSEEN]
    values += [mean(values), exact(agent, agent.settings)[1]]
    names = [f"{name}, {moment}" for name in UNSEEN_COLUMNS]
    return dict(zip(names, values, strict=True))


class WatchedRun(twosome.Run):
    """Asks its agent for the unseen tasks along the way, and keeps that in the checkpoints."""

    def save(self, agent, envs):
        settings = agent.settings
        played = len(self.rows) * settings.n_envs * settings.rollout_steps
        begun = time.perf_counter()
        to_90 = decisions_to_90(get_curve(self))
        came = True, to_90 is not None, 2 * played >= settings.steps
        unseen = self.before.setdefault("unseen", {})
        for moment, has_come in zip(MOMENTS, came, strict=False):
            if has_come and f"all six, {moment}" not in unseen:
                unseen |= ask_unseen(agent, moment)
        self.started += time.perf_counter() - begun
        super().save(agent, envs)


def measure_language(lm, tokenizer, model, data):
    """Perplexity, and the part of choices between texts that are right."""
    if model == "pocket_lm":
        return language.language(lm, tokenizer)
    return language.real_language(lm, tokenizer, *data)


@cache
def untrained_language(model, data):
    return measure_language(*twosome.load_lm(model), model, data)


def compare_language(agent, model, data):
    perplexity_0, right_0 = untrained_language(model, data)
    perplexity, right = measure_language(agent.model, agent.tokenizer, model, data)
    return {
        "perplexity": perplexity,
        "perplexity_change": 100 * (perplexity / perplexity_0 - 1),  # in percent
        "right": right,
        "right_change": 100 * (right - right_0),  # in points of a hundred
    }


def measure(job, agent, run, data):
    """Everything about a trained agent, by column."""
    curve = get_curve(run)
    x, y, _ = np.array(curve).T
    equal = np.linspace(0, twosome.ENVS[agent.settings.env].STEPS[job.task], 1000)
    to_90 = decisions_to_90(curve)
    seconds = run.rows[-1]["seconds"] if run.rows else 0.0
    row = {"decisions": run.decisions, "seconds": seconds, "to_90": to_90}
    row["to_90_or_all"] = run.decisions if to_90 is None else to_90
    row["area"] = np.interp(equal, x, y).mean()
    row["success"], row["return"] = exact(agent, agent.settings)
    row["part_of_best"] = row["return"] / OPTIMUM[job.task]
    if isinstance(run, WatchedRun):
        row |= run.before["unseen"] | ask_unseen(agent, MOMENTS[-1])
    if "E3" in job.experiments:
        row |= compare_language(agent, job.model, data)
    return row


def run_job(job, out, data, commit):
    """Train and measure. Returns the row of runs.csv and those of curves.csv."""
    settings = get_settings(job)
    path = ROOT / "runs" / "reproduce" / f"{out.name}, {job.name()}, {job.steps}, {commit}"
    path.mkdir(parents=True, exist_ok=True)
    row = job.row() | {"experiments": job.experiments, "commit": commit}
    with open(path / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        torch.manual_seed(settings.seed)
        agent = make_agent(job, settings)
        kind = WatchedRun if job.label in NORMS and job.task == TRAINED else twosome.Run
        run = kind(path, settings, job.label)
        try:
            twosome.train(agent, partial(twosome.make_env, agent, settings), run)
        except UserError as error:
            row["note"] = error
        row |= measure(job, agent, run, data)
    shutil.rmtree(path)
    names = "decisions", "success", "return"
    curve = [job.row() | dict(zip(names, point, strict=True)) for point in get_curve(run)]
    return row, curve


# === All jobs =====================================================================================
def read_csv(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path, rows):
    """Write the file anew, aside, so that after a kill there is the old one or the new one."""
    rows = read_csv(path) + rows
    columns = {}
    for row in rows:
        columns |= row
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            texts = {name: f"{x:.5g}" for name, x in row.items() if isinstance(x, float)}
            writer.writerow(row | texts)
    os.replace(unfinished, path)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker():
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.set_lock(threading.RLock())  # Its own would outlive a killed process.
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_all(jobs, out, data):
    """Run the jobs side by side, and write each one's rows when it ends."""
    out.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_worker)
    # The workers begin with Ctrl-C ignored and keep it so. This process ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commit = current_commit()
    left = {pool.submit(run_job, job, out, data, commit): job for job in jobs}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    bar = tqdm(total=sum(job.cost() for job in jobs), unit_scale=True, smoothing=0)
    while left:
        done, _ = wait(left, timeout=10, return_when=FIRST_COMPLETED)
        for future in done:
            row, curve = future.result()
            append_csv(out / "curves.csv", curve)
            append_csv(out / "runs.csv", [row])
            job = left.pop(future)
            bar.update(job.cost())
        bar.refresh()
    bar.close()


# === RESULTS.md ===================================================================================
COMPARED = [*NORMS, "ppo", "saycan", UNTRAINED[0], "random"]
OPTIMUM = twosome.OvercookedText.OPTIMUM | twosome.VirtualHomeText.OPTIMUM


def spread(values, digits=2):
    """The mean, and the lowest and highest in brackets."""
    if not values:
        return "-"
    average, low, high = (f"{f(values):,.{digits}f}" for f in (mean, min, max))
    return f"{average} [{low}, {high}]" if len(values) > 1 else average


def table(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Results:
    """The rows of runs.csv and curves.csv, by label and task."""

    def __init__(self, folder):
        self.rows, self.curves = defaultdict(list), defaultdict(dict)
        for row in read_csv(folder / "runs.csv"):
            self.rows[row["label"], row["task"]].append(row)
        for row in read_csv(folder / "curves.csv"):
            curves = self.curves[row["label"], row["task"]]
            # A job that was interrupted between its two files left a curve that comes again.
            curves.setdefault(row["seed"], {})[int(row["decisions"])] = row

    def numbers(self, label, task, column):
        return [float(row[column]) for row in self.rows[label, task] if row.get(column)]

    def cells(self, label, column, digits=2, tasks=TASKS):
        cells = []
        for task in tasks:
            values, n = self.numbers(label, task, column), len(self.rows[label, task])
            cell = spread(values, digits)
            if 0 < len(values) < n:
                cell += f", {len(values)} of {n}"
            cells.append("never" if column == "to_90" and n and not values else cell)
        return cells

    def equal_returns(self, label, task):
        """The returns along the way, after as many decisions as `word` takes."""
        decisions = self.numbers("word", task, "decisions")
        returns = []
        for curve in self.curves[label, task].values():
            y = [float(row["return"]) for row in curve.values()]
            returns.append(np.interp(mean(decisions), list(curve), y))
        return returns


# What was aimed at: each function returns a number, which a target limits, and what is shown.
def ask(column, which, digits, results, task):
    values = results.numbers("word", task, column)
    return which(values), spread(values, digits)


def share_of_ppo(results, task):
    ours = results.numbers("word", task, "to_90_or_all")
    ppo = mean(results.numbers("ppo", task, "to_90_or_all"))
    all_reached = len(results.numbers("word", task, "to_90")) == len(ours)
    cell = f"{mean(ours):,.0f} of {ppo:,.0f}"
    return mean(ours) / ppo if all_reached else np.inf, cell


def above_ppo(results, task):
    ours = mean(results.numbers("word", task, "return"))
    ppo = mean(results.equal_returns("ppo", task))
    return ours - ppo, f"{ours:.3f}, PPO {ppo:.3f}"


def behind_norms(results, task):
    """How far the best seed of `word` is behind the worst seed of another normalisation."""
    ours, *others = [results.numbers(norm, task, "to_90_or_all") for norm in NORMS]
    behind = max(min(ours) - max(other) for other in others)
    return behind, ", ".join(f"{mean(values):,.0f}" for values in (ours, *others))


def least_unseen(results, task):
    means = {}
    for unseen in UNSEEN:
        means[unseen] = mean(results.numbers("word", task, f"{unseen}, at the end"))
    least = min(means, key=means.get)
    return means[least], f"{least} {means[least]:.2f}"


HALF = "decisions until 90% success: at most half of PPO's"
# A target, its measure and its limit. It is to hold on all tasks, if it does not say: on two.
AIMS_OF_POCKET_LM = [
    (HALF, share_of_ppo, operator.le, 0.5),
    ("each unseen task at 0.9 or more", least_unseen, operator.ge, 0.9),
]
AIMS_OF_A_REAL_LM = [
    ("decisions until 90% success: fewer than PPO's", share_of_ppo, operator.lt, 1),
    (f"{HALF}, on two tasks", share_of_ppo, operator.le, 0.5),
    ("a higher return than PPO's after as many decisions", above_ppo, operator.gt, 0),
    (
        "`word` not behind `token` and `none` by more than the spread",
        behind_norms,
        operator.le,
        0,
    ),
    ("each unseen task at 0.8 or more", least_unseen, operator.ge, 0.8),
]
AIMS = [
    ("perplexity +2% at most", partial(ask, "perplexity_change", max, 1), operator.le, 2),
    ("right choices -1 point at most", partial(ask, "right_change", min, 1), operator.ge, -1),
    ("success of 0.98 or more", partial(ask, "success", mean, 3), operator.ge, 0.98),
    ("95% of the best return", partial(ask, "part_of_best", mean, 3), operator.ge, 0.95),
]


def targets_table(results, model):
    """A line for each target. A task that misses it is bold."""
    lines = []
    own = AIMS_OF_POCKET_LM if model == "pocket_lm" else AIMS_OF_A_REAL_LM
    for aim, measured, holds, limit in own + AIMS:
        cells, met = [], []
        for task in TASKS:
            try:
                number, cell = measured(results, task)
            except ValueError:  # the mean of nothing: this was not measured
                cells.append("-")
                continue
            met.append(holds(number, limit))
            cells.append(cell if met[-1] else f"**{cell}**")
        needed = 2 if aim.endswith("on two tasks") else len(met)
        verdict = "met" if sum(met) >= needed else "**missed**"
        lines.append([aim, *cells, verdict if met else "-"])
    return table(["target", *TASKS, ""], lines)


def decisions_table(results):
    lines = []
    for label in COMPARED:
        seconds = [f"{mean(results.numbers(label, task, 'seconds') or [0]):,.0f}" for task in TASKS]
        lines.append([label, *results.cells(label, "to_90", 0), ", ".join(seconds)])
    return table(["decisions until 90% success", *TASKS, "seconds"], lines)


def returns_table(results):
    lines = []
    for label in [*COMPARED, "word, PPO's decisions"]:
        lines.append([label, *results.cells(label, "return", 3)])
    equal = [spread(results.equal_returns("ppo", task), 3) for task in TASKS]
    lines.append(["ppo, after as many decisions as word", *equal])
    lines.append(["best possible", *(f"{OPTIMUM[task]:.3f}" for task in TASKS)])
    return table(["discounted return", *TASKS], lines)


def unseen_table(results):
    lines = []
    for label, name in product(NORMS, UNSEEN_COLUMNS):
        if label == "word" or name == "all six":
            cells = []
            for moment in MOMENTS:
                cells += results.cells(label, f"{name}, {moment}", tasks=[TRAINED])
            lines.append([f"{label}, {name}", *cells])
    return table(["success", *MOMENTS], lines)


def prompts_table(results):
    lines = []
    for name, untrained in zip([*PROMPTS, "random"], [*UNTRAINED, "random"], strict=True):
        label = "word" if name == "as it is" else name
        trained = "<br>".join(results.cells(label, "to_90", 0, SHORT))
        lines.append([name, *results.cells(untrained, "success", 3), trained])
    return table(["untrained success", *TASKS, "decisions until 90%"], lines)


def departures_table(results):
    columns = {"to_90": 0, "success": 2, "return": 3, "perplexity_change": 1, "seconds": 0}
    lines = []
    for label in "word", *DEPARTURES:
        line = [label]
        for column, digits in columns.items():
            line.append("<br>".join(results.cells(label, column, digits, SHORT)))
        lines.append(line)
    header = "put back", "decisions until 90%", "success", "return", "perplexity, %", "seconds"
    return table(header, lines)


def draw_bars(path, ylabel, title, groups, labels, numbers):
    values = {}
    for group, label in product(groups, labels):
        values.setdefault(group, {})[label] = numbers(group, label)
    plot.bars(values, path, ylabel, title)


def draw(results, out):
    """The four figures."""
    panels = {}
    for (label, task), curves in results.curves.items():
        if curves and label in COMPARED[:5]:
            lines = [list(curve.values()) for curve in curves.values()]
            panels.setdefault(task, {})[label] = lines
    plot.learning_curves(panels, out / "e1_curves.png")
    ask = results.numbers
    draw_bars(
        out / "e2_unseen.png",
        "success",
        f"along the way of the training on {TRAINED}",
        UNSEEN,
        MOMENTS,
        lambda task, moment: ask("word", TRAINED, f"{task}, {moment}"),
    )
    draw_bars(
        out / "e3_language.png",
        "%",
        "change of perplexity",
        TASKS,
        [*NORMS, "no rehearsal"],
        lambda task, label: ask(label, task, "perplexity_change"),
    )
    draw_bars(
        out / "e4_prompts.png",
        "success",
        "untrained, by prompt",
        PROMPTS,
        SHORT,
        lambda name, task: ask(f"untrained, {name}", task, "success"),
    )


def report(out, model, n_left):
    results = Results(out)
    rows = sum(results.rows.values(), [])
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    text = out / "text.md"
    sections = [
        f"# Results with {Path(model).name}",
        f"{len(rows)} jobs of reproduce.py, with the code of {commits}; {n_left} jobs are left.",
        text.read_text().strip() if text.exists() else "",
        "## What was aimed at",
        targets_table(results, model),
        "## E1 sample efficiency",
        decisions_table(results),
        returns_table(results),
        "![learning curves](e1_curves.png)",
        "## E2 unseen tasks",
        unseen_table(results),
        "![unseen tasks](e2_unseen.png)",
        "## E3 language",
        "![language](e3_language.png)",
        "## E4 prompts",
        prompts_table(results),
        "![prompts](e4_prompts.png)",
        "## E5 departures from the paper's code",
        departures_table(results),
    ]
    (out / "RESULTS.md").write_text("\n\n".join(filter(None, sections)) + "\n")
    draw(results, out)
    print(f"wrote {out / 'RESULTS.md'}")


# === The command line =============================================================================
def git(*args):
    """What git says about the code."""
    command = ["git", *args, "--", "*.py", "pocket_lm"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def current_commit():
    """The last commit of the code, and a + if the code has changed since."""
    return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain"))


def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("mode", choices=("quick", "full"))
    add("--model", default="pocket_lm", help="pocket_lm, a folder or a Hub id")
    add("--only", nargs="+", default=EXPERIMENTS, choices=EXPERIMENTS)
    add("--seeds", nargs="+", type=int, help="in place of 41 to 45")
    add("--steps", type=int, default=10**9, help="decisions of each training, for a trial")
    add("--out", type=Path, help="the folder of the results")
    add("--report", action="store_true")
    add("--wikitext", type=Path, help="WikiText-2's test text, for a real LM")
    add("--blimp", type=Path, help="BLiMP's files, a folder or a zip, for a real LM")
    given = parser.parse_args(argv)
    given.model = twosome.make_settings(model=given.model).model
    name = Path(given.model).name.split("-")[0].lower()
    given.out = (given.out or ROOT / "experiments" / "results" / name).resolve()
    return given


def main(argv):
    given = parse(argv)
    jobs = make_jobs(given)
    there = {row["name"] for row in read_csv(given.out / "runs.csv")}
    left = [job for job in jobs if job.name() not in there]
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them done before")
    if left and not given.report:
        data = given.wikitext, given.blimp
        has_data = given.model == "pocket_lm" or all(data)
        twosome.require(has_data, "a real LM needs --wikitext and --blimp")
        run_all(left, given.out, data)
        left = []
    report(given.out, given.model, len(left))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError, KeyboardInterrupt, BrokenExecutor) as error:
        reason = " ".join(str(error).split()) or "stopped; the same command goes on"
        sys.exit(f"\nreproduce.py: {reason}")
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
