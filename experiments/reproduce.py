"""Remake every result of this repository.

    python experiments/reproduce.py quick            # at most 15 minutes on two cores: one seed
    python experiments/reproduce.py full             # at most 4 hours on two cores: five seeds
    python experiments/reproduce.py real             # the same questions to a real LLM: real.py
    python experiments/reproduce.py full --only E4   # only the jobs of one experiment
    python experiments/reproduce.py full --only tomato-salad-word-seed21    # one row of runs.csv
    python experiments/reproduce.py full --report    # only tables and figures, from what is there

A job is one run of twosome.py with one seed, and what is measured on the agent that it leaves. Each
ends as one row of experiments/results/<mode>/runs.csv, with its learning curve in curves.csv. Jobs
that have a row are skipped, so an interrupted call goes on where it stopped, also on another
machine; a job that was cut goes on from its last checkpoint under runs/reproduce/. A job computes
with one thread, so its numbers do not depend on how many run side by side. Success and return are
measured twice: on 100 sampled episodes, and exactly (exact.py).

E1 sample efficiency   four tasks; TWOSOME with three normalisations, PPO, SayCan, zero-shot, random
E2 unseen tasks        the agents of two household tasks on the seven others
E3 language            perplexity, and the true ending among four, before and after E1's runs
E4 prompt principles   each of the four switched off
E5 three decisions     the offered actions; the time limit as an end; the eps of advantages
E6 another LM          tiny1m, which nobody here made
"""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket_lm"), str(ROOT / "experiments")]
RESULTS = ROOT / "experiments" / "results"
SCRATCH = ROOT / "runs" / "reproduce"

TASKS = ["tomato-salad", "tomato-lettuce-salad", "food-preparation", "entertainment"]
UNSEEN = ["cheese", "hamburger", "apple-pie", "pizza", "washing-plate", "laundry"]
HOUSEHOLD = ["food-preparation", "entertainment", *UNSEEN]
NORMS = ["word", "token", "none"]
SEEDS = {"quick": [21], "full": [21, 22, 23, 24, 25]}  # nothing was chosen by looking at them
COST = {"tomato-salad": 20, "tomato-lettuce-salad": 190, "food-preparation": 20,
        "entertainment": 100}  # seconds of a TWOSOME run on one core, for the time that is left
BASELINE_STEPS = {"tomato-salad": 15_360, "tomato-lettuce-salad": 25_600,
                  "food-preparation": 10_240, "entertainment": 61_440}  # until PPO has learned

COLUMNS = ["name", "experiment", "task", "label", "seed", "env_steps", "seconds", "before_success",
           "before_return", "success", "return", "length", "exact_success", "exact_return",
           "steps_to_90", "perplexity_before", "perplexity", "cloze_before", "cloze",
           *(f"on_{task}" for task in HOUSEHOLD)]
CURVE = ["name", "env_steps", "success", "return"]  # each row: 32 sampled episodes


# --- the jobs -------------------------------------------------------------------------------------

def a_job(experiment, task, label, seed, scratch, cost, change=None, **given) -> dict:
    env = "overcooked" if task.endswith("salad") else "virtualhome"
    name = f"{task}-{label}-seed{seed}"
    return {"name": name, "experiment": experiment, "task": task, "label": label, "seed": seed,
            "change": change, "run": str(scratch / name), "cost": cost,
            "given": {"env": env, "task": task, "seed": seed, "device": "cpu"} | given}


def jobs(mode: str, lm: str) -> list[dict]:
    """All jobs of a mode, seed by seed, so that a cut call leaves whole seeds behind.

    label says how an agent was made; change names a function of this file that alters the prompts
    or the offered actions while the job runs."""
    import twosome
    result = []

    def add(experiment, task, label, seed, cost=None, **given):
        result.append(a_job(experiment, task, label, seed, SCRATCH, cost or COST[task], **given))

    for seed in SEEDS[mode]:
        for task in TASKS if mode == "full" else ["tomato-salad", "food-preparation"]:
            add("E1", task, "random", seed, cost=5, method="random")
            add("E1", task, "zero-shot", seed, cost=5, steps=0)
            for method in ("ppo", "saycan"):
                add("E1", task, method, seed, cost=15, method=method, steps=BASELINE_STEPS[task])
            for norm in NORMS:
                add("E1", task, norm, seed, norm=norm)
        for task in UNSEEN:
            add("E2", task, "random", seed, cost=5, method="random")
            add("E2", task, "zero-shot", seed, cost=5, steps=0)
        for task in ("tomato-salad", "food-preparation"):
            for principle in PRINCIPLES:
                if (task, principle) != ("food-preparation", "one-wording"):  # it has only one
                    add("E4", task, principle, seed, change=principle)
        add("E5", "food-preparation", "all-actions", seed, change="all-actions")
        add("E5", "tomato-salad", "time-limit-ends", seed, bootstrap_time_limit=False)
        add("E5", "tomato-salad", "eps-1e-8", seed, advantage_eps=1e-8)
        if seed in SEEDS[mode][:3]:
            for env, task in (("overcooked", "tomato-salad"), ("virtualhome", "food-preparation")):
                ours = twosome.Args(env=env, task=task)  # as for pocket_lm
                add("E6", task, "tiny1m", seed, cost=60, model=lm, **{x: getattr(ours, x) for x in (
                    "steps", "policy_lr", "standardize", "epochs", "max_prompts")})
    for seed in SEEDS["full"] if mode == "full" else ():  # the longest ones last
        add("E5", "entertainment", "eps-1e-8", seed, advantage_eps=1e-8)
        add("E5", "entertainment", "all-actions", seed, change="all-actions")
        add("E5", "entertainment", "time-limit-ends", seed, bootstrap_time_limit=False)
    return result


# E4: each principle switched off, by rewriting what the agent is shown. (prompt, phrases) -> both.

def not_cohesive(prompt, phrases):
    """The sentence ends before the action, which stands alone."""
    return prompt.replace(", your next step is to", "."), phrases


def no_articles(prompt, phrases):
    bare = functools.partial(re.sub, r"\b([Aa]n?|[Tt]he) ", "")
    return bare(prompt), tuple(map(bare, phrases))


def other_words(prompt, phrases):
    """The actions name the things by other words than the observation does."""
    for word, other in (("bowl", "dish"), ("cutting board", "wooden block"),
                        ("pancake", "flat cake"), ("microwave", "oven")):
        phrases = tuple(phrase.replace(word, other) for phrase in phrases)
    return prompt, phrases


def one_wording(prompt, phrases):
    """Every action keeps the wording that it has at the start of tomato-salad."""
    return prompt, ("pick up the tomato", "pick up the bowl", "walk to the cutting board",
                    "walk to the serving counter", "chop the tomato")


PRINCIPLES = {"not-cohesive": not_cohesive, "no-articles": no_articles,
              "other-words": other_words, "one-wording": one_wording}


def changed(change: str | None):
    """The context in which a job runs."""
    import real
    import twosome
    from virtualhome_text import VirtualHomeText
    if change is None:
        return contextlib.nullcontext()
    if change == "all-actions":
        return patch.object(VirtualHomeText, "_offered", lambda self, verb, noun: True)
    shown, rewrite = twosome.Episode.state, (PRINCIPLES | real.WORDINGS)[change]
    return patch.object(twosome.Episode, "state", lambda self: rewrite(*shown(self)))


# --- one job --------------------------------------------------------------------------------------

@functools.cache
def language_before(model_name: str) -> tuple[float, float]:
    import twosome
    from language import language
    return language(*twosome.load_lm(model_name, "cpu", "float32"))


def steps_to_90(curve: list[dict]) -> int | str:
    """Environment steps of the first row at which the mean success of the latest three, 96
    episodes, is at least 0.9."""
    for latest in zip(curve, curve[1:], curve[2:]):
        if sum(float(row["success"]) for row in latest) >= 3 * 0.9:
            return int(latest[-1]["env_steps"])
    return ""


def measure(job: dict, row: dict, agent, args, plays):
    """What is asked of an agent besides success and return."""
    from exact import exact
    from language import language
    if job["experiment"] != "E1" or job["label"] not in ("word", "token", "none", "ppo"):
        return
    if args.env == "virtualhome":  # E2: every other task with the same agent
        for task in HOUSEHOLD:
            if job["label"] != "ppo" or "entertainment" not in (task, job["task"]):
                row[f"on_{task}"], _ = exact(agent, replace(args, task=task), plays)
    if args.method == "twosome":  # E3
        row["perplexity_before"], row["cloze_before"] = language_before(args.model)
        row["perplexity"], row["cloze"] = language(agent.model, agent.tokenizer)


def run_job(job: dict, measure=measure):
    """Train and measure; return the job, its row of runs.csv and its rows of curves.csv; or the
    job, the reason why it cannot run, and None."""
    import baselines
    import torch
    import twosome
    from exact import exact

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Path(job["run"])
    run.parent.mkdir(parents=True, exist_ok=True)
    row = {name: job[name] for name in ("name", "experiment", "task", "label", "seed")}
    args = twosome.Args(**baselines.OWN.get(job["given"].get("method"), {}) | job["given"])
    plays = baselines.PLAYS[args.method]
    with open(f"{run}.log", "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log), changed(job["change"]):
        torch.manual_seed(args.seed)
        try:
            agent = baselines.make_agent(args)
            config = run / "config.json"
            if config.exists() and json.loads(config.read_text()) != vars(args):
                shutil.rmtree(run)  # an older version's: it cannot be gone on with
            if not (run / "summary.json").exists():
                twosome.train(args, agent, run, plays)
            elif args.steps:
                twosome.load_checkpoint(run, agent)
        except (ValueError, OSError) as error:
            return job, str(error), None
        summary = json.loads((run / "summary.json").read_text())
        before, after = summary["before"], summary["after"] or summary["before"]
        row |= {"env_steps": summary["env_steps"], "seconds": round(summary["seconds"], 1),
                "before_success": before["success"], "before_return": before["return"],
                "success": after["success"], "return": after["return"], "length": after["length"]}
        row["exact_success"], row["exact_return"] = exact(agent, args, plays)
        curve = [{"name": job["name"]} | {x: r[x] for x in CURVE[1:]}
                 for r in read_csv(run / "metrics.csv")]
        row["steps_to_90"] = steps_to_90(curve)
        measure(job, row, agent, args, plays)
    row = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()}
    return job, row, curve


# --- all jobs -------------------------------------------------------------------------------------

def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, columns: list[str], rows: list[dict]):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run_all(todo: list[dict], folder: Path, workers: int, measure=measure, columns=COLUMNS):
    """Run the jobs side by side; write each one's rows when it ends."""
    # A curve without its row is what an interruption left between the two: it comes anew.
    done = {row["name"] for row in read_csv(folder / "runs.csv")}
    curves = [row for row in read_csv(folder / "curves.csv") if row["name"] in done]
    (folder / "curves.csv").unlink(missing_ok=True)
    append_csv(folder / "curves.csv", CURVE, curves)
    bar = tqdm(total=sum(job["cost"] for job in todo), unit="work", smoothing=0, dynamic_ncols=True,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} left"
                          "{postfix}")
    with bar, multiprocessing.get_context("spawn").Pool(workers) as pool:  # ends with its block
        run = functools.partial(run_job, measure=measure)
        for job, row, curve in pool.imap_unordered(run, todo):
            if curve is None:
                tqdm.write(f"{job['name']} could not run: {row}")
                continue
            append_csv(folder / "curves.csv", CURVE, curve)
            append_csv(folder / "runs.csv", columns, [row])
            shutil.rmtree(job["run"])
            bar.set_postfix_str(f"{job['experiment']} {job['name']}")
            bar.update(job["cost"])


# --- RESULTS.md -----------------------------------------------------------------------------------

def numbers(rows: list[dict], measure: str) -> list[float]:
    return [float(row[measure]) for row in rows if row.get(measure)]


def outcome(rows: list[dict], measure: str) -> list[float]:
    """Success or return at the end: exact, or sampled where a file is older than exact.py."""
    return numbers(rows, f"exact_{measure}") or numbers(rows, measure)


def perplexity_change(rows: list[dict]) -> list[float]:  # in per cent
    return [100 * (after / before - 1) for after, before in zip(
        numbers(rows, "perplexity"), numbers(rows, "perplexity_before"))]


def spread(values: list[float], digits: int = 2) -> str:
    """mean [lowest, highest]; of one value, the value"""
    texts = [f"{f(values):,.{digits}f}" for f in (mean, min, max)] if values else ["-"]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(values) > 1 else texts[0]


def table(header: list[str], lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |"
                     for line in (header, ["---"] * len(header), *lines)) + "\n"


def never(rows: list[dict]) -> str:
    """Steps until 90%: the mean of the seeds that got there, and how many did."""
    reached = numbers(rows, "steps_to_90")
    if not rows or rows[0]["label"] in ("zero-shot", "random"):
        return "-"
    return f"{spread(reached, 0) if reached else 'never'} ({len(reached)} of {len(rows)})"


def mean_steps(rows: list[dict]) -> float:
    """Until 90%; a seed that never got there counts with all its steps."""
    return mean(float(row["steps_to_90"] or row["env_steps"]) for row in rows)


def verdicts(pick) -> list[str]:
    """What was aimed at, and whether it was reached; each line from runs.csv alone."""
    lines = []

    def say(reached: bool, text: str):
        lines.append(f"- {'reached' if reached else '**NOT reached**'}: {text}")

    for task in TASKS:
        ours, ppo = pick(task, "word"), pick(task, "ppo")
        if not ours or not ppo:
            continue
        mine, its = mean_steps(ours), mean_steps(ppo)
        say(len(numbers(ours, "steps_to_90")) == len(ours) and mine <= its / 3,
            f"{task}: 90% success in at most a third of PPO's steps: TWOSOME {never(ours)}, PPO "
            f"{never(ppo)}, ratio {mine / its:.2f}"
            + " (a seed that never got there counts with all its steps)"
            * (len(numbers(ppo, "steps_to_90")) < len(ppo)))
        final, *others = (outcome(pick(task, label), "success")
                          for label in ("word", "saycan", "zero-shot"))
        say(min(final) >= 0.95 and all(mean(final) > mean(x) for x in others if x),
            f"{task}: ends at 0.95 or more ({spread(final)}), above SayCan ({spread(others[0])}) "
            f"and zero-shot ({spread(others[1])})")
    for trained, task in itertools.product(("food-preparation", "entertainment"), UNSEEN):
        ours = numbers(pick(trained, "word"), f"on_{task}")
        base = outcome(pick(task, "zero-shot"), "success")
        if ours and base and (trained == "food-preparation" or mean(ours) < 0.8):
            say(mean(ours) >= 0.8 and mean(ours) > mean(base),
                f"{task} unseen, after {trained}: at least 0.8 and above the untrained LLM: "
                f"{spread(ours)} against {spread(base)}")
    for task in TASKS:
        if percent := perplexity_change(pick(task, "word")):
            say(max(percent) <= 2,
                f"{task}: perplexity within 2% of before: {spread(percent, 1)}%")
    return lines


def report(folder: Path, mode: str, plan: list[dict]):
    """Write RESULTS.md and the figures from runs.csv and curves.csv."""
    import plot
    from language import held_out

    rows = read_csv(folder / "runs.csv")
    curves = {name: list(curve) for name, curve in itertools.groupby(
        read_csv(folder / "curves.csv"), key=lambda row: row["name"])}
    seeds = sorted({int(row["seed"]) for row in rows})

    def pick(task, label):
        return [row for row in rows if (row["task"], row["label"]) == (task, label)]

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    command = f"python experiments/reproduce.py {mode} --only"
    out = [f"# Results ({mode})\n",
           f"Made by `python experiments/reproduce.py {mode}`: {len(rows)} of {len(plan)} jobs, "
           f"seeds {', '.join(map(str, seeds))}. Numbers are the mean over seeds with the lowest "
           "and the highest in brackets. Success and return are exact (exact.py), or, where it "
           "says so, of 100 sampled episodes. "
           f"Any row of runs.csv can be made again by `{command} NAME` with its name.\n"]
    if len(rows) < len(plan):
        out.append(f"**Not complete**: {len(plan) - len(rows)} jobs have not run yet; the same "
                   "command goes on with them.\n")
    causes = folder / "causes.md"  # written by a person, after looking
    out += ["## What was aimed at\n", "\n".join(verdicts(pick)) + "\n",
            causes.read_text() if causes.exists() else ""]

    out.append(f"## E1 sample efficiency\n\n`{command} E1`\n")
    for task in tasks:
        out += [f"### {task}\n", table(
            ["agent", "seeds", "steps until 90% success", "success", "success, sampled",
             "discounted return", "return, sampled", "seconds"],
            [[label, len(r), never(r), spread(outcome(r, "success")),
              spread(numbers(r, "success")), spread(outcome(r, "return"), 3),
              spread(numbers(r, "return"), 3), spread(numbers(r, "seconds"), 0)]
             for label in (*NORMS, "ppo", "saycan", "zero-shot", "random")
             if (r := pick(task, label))])]
    out.append("`word`, `token` and `none` are TWOSOME with that normalisation. Steps until 90%: "
               "at the first row of the log where 0.9 of the latest 96 sampled episodes (32 for "
               "each of three rows) succeeded; the mean is over the seeds that got there.\n")

    household = [task for task in ("food-preparation", "entertainment") if pick(task, "word")]
    agents = [(task, label) for task in household for label in (*NORMS, "ppo") if pick(task, label)]
    out += [
        f"## E2 unseen tasks\n\n`{command} food-preparation-word-seed{seeds[0]}` and so on: the "
        "unseen tasks are measured with the agents of E1.\n",
        table(["task", *(f"{label} trained on {task}" for task, label in agents), "zero-shot",
               "random"],
              [[task, *(spread(numbers(pick(t, label), f"on_{task}")) for t, label in agents),
                *(spread(outcome(pick(task, x), "success")) for x in ("zero-shot", "random"))]
               for task in HOUSEHOLD]),
        "PPO reads numbers, not words. Heating a pancake, heating a pizza and washing a plate are "
        "the same numbers, so what looks like generalisation is the same task again; washing "
        "clothes happens in another room; and with entertainment it shares not even the length of "
        "the observation (-).\n",
        f"## E3 language\n\n`{command} E1`\n",
        table(["after training on", "agent", "perplexity before", "after", "change in %",
               "true ending of four before", "after"],
              [[task, label,
                *(spread(numbers(r, x), 3) for x in ("perplexity_before", "perplexity")),
                spread(perplexity_change(r), 1),
                *(spread(numbers(r, x), 3) for x in ("cloze_before", "cloze"))]
               for task in tasks for label in NORMS if (r := pick(task, label))]),
        f"{len(held_out())} texts of make_pocket_lm.py that pocket_lm was not trained on; 200 of "
        "them cut in the middle of the last sentence for the choice of the ending (by "
        "log-probability per token; chance is 0.25).\n"]

    variants = (
        ("E4", "principles", "prompt principles, each switched off", list(PRINCIPLES)),
        ("E5", "decisions", "offered actions, the time limit as an end, the eps of advantages",
         ["all-actions", "time-limit-ends", "eps-1e-8"]),
        ("E6", "tiny1m", "a pretrained LM that nobody here made", ["tiny1m"]))
    for number, _, title, labels in variants:
        out += [f"## {number} {title}\n\n`{command} {number}`\n", table(
            ["task", "agent", "seeds", "success before, sampled", "steps until 90% success",
             "success after", "discounted return after"],
            [[task, "as it is" if label == "word" else label, len(r),
              spread(numbers(r, "before_success")), never(r), spread(outcome(r, "success")),
              spread(outcome(r, "return"), 3)]
             for task in tasks if any(pick(task, x) for x in labels)
             for label in ("word", *labels) if (r := pick(task, label))])]
    (folder / "RESULTS.md").write_text("\n".join(out))
    print(f"wrote {folder}/RESULTS.md")

    def panels(labels, tasks):
        """task -> the label's name in the figure -> the curves of all seeds"""
        return {task: {name: lines for label, name in labels.items() if (
            lines := [curves[row["name"]] for row in pick(task, label) if row["name"] in curves])}
            for task in tasks if any(pick(task, label) for label in labels if label != "word")}

    if drawn := panels({
            "word": "TWOSOME, per word", "token": "TWOSOME, per token",
            "none": "TWOSOME, undivided", "saycan": "SayCan", "ppo": "PPO"}, tasks):
        plot.learning_curves(drawn, folder / "e1_curves.png")
    if household:
        plot.bars({task: {f"trained on {t}": numbers(pick(t, "word"), f"on_{task}")
                          for t in household} |
                   {"untrained LLM": outcome(pick(task, "zero-shot"), "success")}
                   for task in UNSEEN}, folder / "e2_unseen.png", "success", line=0.8)
    if drawn := {task: {label: perplexity_change(pick(task, label)) for label in NORMS}
                 for task in tasks if pick(task, "word")}:
        plot.bars(drawn, folder / "e3_perplexity.png", "perplexity, change in %", line=2)
    for number, picture, _, labels in variants:
        if drawn := panels({"word": "as it is"} | {label: label for label in labels}, tasks):
            plot.learning_curves(drawn, folder / f"{number.lower()}_{picture}.png")


def main():
    import real
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mode", choices=("quick", "full", "real"))
    parser.add_argument("--only", metavar="NAME", help="one experiment (E1) or one job")
    parser.add_argument("--report", action="store_true", help="run nothing, write RESULTS.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs side by side")
    shared = ROOT.parent / "shared" / "lm" / "tiny1m"
    parser.add_argument("--lm", default=str(shared) if shared.exists() else "shibatch/tiny1m",
                        help="folder or Hub id of E6's LM")
    real.arguments(parser)
    given = parser.parse_args()
    folder = RESULTS / given.mode
    folder.mkdir(parents=True, exist_ok=True)
    if given.mode == "real":
        plan, ask, columns, write = real.jobs(given), real.measure, real.COLUMNS, real.report
    else:
        plan, ask, columns = jobs(given.mode, given.lm), measure, COLUMNS
        write = functools.partial(report, mode=given.mode)
    chosen = [job for job in plan if given.only in (job["experiment"], job["name"])
              or (given.only is None and job["experiment"] != "R6")]  # R6: real.py says why
    if not chosen:
        raise SystemExit(f"reproduce.py: --only {given.only}: no such experiment or job; "
                         f"experiments are {', '.join(sorted({job['experiment'] for job in plan}))}"
                         " (others are measured in the first one's jobs), jobs are named in "
                         "runs.csv")
    done = {row["name"]: row for row in read_csv(folder / "runs.csv")}
    if given.only in done:  # one row again, to compare
        shutil.rmtree(chosen[0]["run"], ignore_errors=True)
        _, new, curve = run_job(chosen[0], ask)
        if curve is None:
            raise SystemExit(f"reproduce.py: {given.only} could not run: {new}")
        for column in columns:
            print(f"{column:20} {done[given.only].get(column, ''):>12} {new.get(column, ''):>12}")
        return shutil.rmtree(chosen[0]["run"])
    todo = [job for job in chosen if job["name"] not in done]
    print(f"{len(chosen)} jobs, {len(chosen) - len(todo)} of them done before")
    if given.report and not done:
        raise SystemExit("reproduce.py: nothing to report yet; run without --report first")
    if todo and not given.report:
        try:
            run_all(todo, folder, given.workers, ask, columns)
        except KeyboardInterrupt:
            raise SystemExit("reproduce.py: stopped; the same command goes on from here") from None
    write(folder, plan=plan)


if __name__ == "__main__":
    for variable, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ[variable] = value  # for the workers, which import torch after this
    main()
