"""Remake every result of this repository.

    python experiments/reproduce.py quick            # at most 15 minutes on two cores: one seed
    python experiments/reproduce.py full             # at most 4 hours on two cores: five seeds
    python experiments/reproduce.py full --only E4   # only the jobs of one experiment
    python experiments/reproduce.py full --only tomato-salad-word-seed21    # one row of runs.csv
    python experiments/reproduce.py full --report    # only tables and figures, from what is there

A job is one run of twosome.py with one seed, and what is measured on the agent that it leaves. Each
ends as one row of experiments/results/<mode>/runs.csv, with its learning curve in curves.csv. Jobs
that have a row are skipped, so an interrupted call goes on where it stopped, also on another
machine; a job that was cut goes on from its last checkpoint under runs/reproduce/. A job computes
with one thread, so its numbers do not depend on how many run side by side.

E1 sample efficiency   four tasks; TWOSOME with three normalisations, PPO, SayCan, zero-shot, random
E2 unseen tasks        the agents of two household tasks on the seven others
E3 language            perplexity, and the true ending among four, before and after E1's runs
E4 prompt principles   each of the four switched off
E5 three decisions     VirtualHome's offered actions; the time limit as an end; advantages divided
                       by their standard deviation alone
E6 another LM          tiny1m, which nobody here made
"""

import argparse
import contextlib
import csv
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket_lm"), str(ROOT / "experiments")]
RESULTS = ROOT / "experiments" / "results"
SCRATCH = ROOT / "runs" / "reproduce"

TASKS = ["tomato-salad", "tomato-lettuce-salad", "food-preparation", "entertainment"]
UNSEEN = ["cheese", "hamburger", "apple-pie", "pizza", "washing-plate", "laundry"]
HOUSEHOLD = ["food-preparation", "entertainment", *UNSEEN]
SEEDS = {"quick": [21], "full": [21, 22, 23, 24, 25]}  # nothing was chosen by looking at them
COST = {"tomato-salad": 15, "tomato-lettuce-salad": 170, "food-preparation": 20,
        "entertainment": 300}  # seconds of a TWOSOME run on one core, for the time that is left

MEASURES = ["before_success", "before_return", "success", "return", "length", "steps_to_90",
            "perplexity_before", "perplexity", "cloze_before", "cloze",
            *(f"on_{task}" for task in HOUSEHOLD)]
COLUMNS = ["name", "experiment", "task", "label", "seed", "env_steps", "seconds", *MEASURES]
CURVE = ["name", "env_steps", "episodes", "success", "return"]


# --- the jobs -------------------------------------------------------------------------------------

def jobs(mode: str, lm: str) -> list[dict]:
    """All jobs of a mode, seed by seed, so that a cut call leaves whole seeds behind.

    label says how an agent was made; change names a function of this file that alters the prompts
    or the offered actions while the job runs."""
    from twosome import TASK_STEPS
    result = []

    def add(experiment, task, label, seed, change=None, cost=None, **given):
        env = "overcooked" if task.endswith("salad") else "virtualhome"
        result.append({"name": f"{task}-{label}-seed{seed}", "experiment": experiment, "task": task,
                       "label": label, "seed": seed, "change": change,
                       "run": str(SCRATCH / f"{task}-{label}-seed{seed}"),
                       "cost": COST[task] if cost is None else cost,
                       "given": {"env": env, "task": task, "seed": seed, "device": "cpu"} | given})

    for seed in SEEDS[mode]:
        for task in TASKS if mode == "full" else ["tomato-salad", "food-preparation"]:
            add("E1", task, "random", seed, cost=5, method="random")
            add("E1", task, "zero-shot", seed, cost=5, method="zero-shot")
            twice = 2 * TASK_STEPS[task]  # what the baselines get, to see when PPO gets there
            add("E1", task, "ppo", seed, cost=15, method="ppo", steps=twice)
            add("E1", task, "saycan", seed, cost=15, method="saycan", steps=twice)
            for norm in ("word", "token", "none"):
                add("E1", task, norm, seed, norm=norm)
        for task in UNSEEN:
            add("E2", task, "random", seed, cost=5, method="random")
            add("E2", task, "zero-shot", seed, cost=5, method="zero-shot")
        for task in ("tomato-salad", "food-preparation"):
            for principle in PRINCIPLES:
                if (task, principle) != ("food-preparation", "one-wording"):  # it has only one
                    add("E4", task, principle, seed, change=principle)
        add("E5", "food-preparation", "all-actions", seed, change="all-actions")
        add("E5", "tomato-salad", "time-limit-ends", seed, bootstrap_time_limit=False)
        add("E5", "tomato-salad", "eps-1e-8", seed, advantage_eps=1e-8)
        if seed in SEEDS[mode][:3]:
            for task in ("tomato-salad", "food-preparation"):
                add("E6", task, "tiny1m", seed, cost=60, model=lm)
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
    import twosome
    from virtualhome_text import VirtualHomeText

    if change is None:
        return contextlib.nullcontext()
    if change == "all-actions":
        class AllOffered(VirtualHomeText):
            def __init__(self, task):
                super().__init__(task, offer_all=True)

        return patch.dict(twosome.ENVS, virtualhome=AllOffered)
    shown, rewrite = twosome.Episode.state.fget, PRINCIPLES[change]
    return patch.object(twosome.Episode, "state", property(lambda self: rewrite(*shown(self))))


# --- one job --------------------------------------------------------------------------------------

@functools.cache
def language_before(model_name: str) -> tuple[float, float]:
    import twosome
    from language import language
    return language(*twosome.load_lm(model_name, "cpu", "float32"))


def steps_to_90(curve: list[dict]) -> int | str:
    """Environment steps when 0.9 of the latest 100 or more training episodes succeeded."""
    for end in range(len(curve)):
        n = successes = 0
        for row in reversed(curve[:end + 1]):
            if int(row["episodes"]):
                n += int(row["episodes"])
                successes += int(row["episodes"]) * float(row["success"])
            if n >= 100:
                if successes >= 0.9 * n:
                    return int(curve[end]["env_steps"])
                break
    return ""


def run_job(job: dict):
    """Train and measure; return the job, its row of runs.csv and its rows of curves.csv; or the
    job, the reason why it cannot run, and None."""
    import torch
    import twosome
    from language import language

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Path(job["run"])
    run.parent.mkdir(parents=True, exist_ok=True)
    args = twosome.finish(job["given"])
    row = {name: job[name] for name in ("name", "experiment", "task", "label", "seed")}
    with open(f"{run}.log", "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log), changed(job["change"]):
        if not (run / "summary.json").exists():
            try:
                twosome.train(args, run)
            except twosome.UserError as error:
                return job, str(error), None
        summary = json.loads((run / "summary.json").read_text())
        before, after = summary["before"], summary["after"] or summary["before"]
        row |= {"env_steps": summary["env_steps"], "seconds": round(summary["seconds"], 1),
                "before_success": before["success"], "before_return": before["return"],
                "success": after["success"], "return": after["return"], "length": after["length"]}
        curve = []
        if (run / "metrics.csv").exists():
            with open(run / "metrics.csv", newline="") as file:
                curve = [{"name": job["name"]} | {x: r[x] for x in CURVE[1:]}
                         for r in csv.DictReader(file)]
            row["steps_to_90"] = steps_to_90(curve)
        trained = job["experiment"] == "E1" and job["label"] in ("word", "token", "none", "ppo")
        if trained and args.env == "virtualhome":  # E2: every other task with the same agent
            for task in HOUSEHOLD:
                if job["label"] != "ppo" or "entertainment" not in (task, job["task"]):
                    other, agent = twosome.load_run(run, {"task": task})
                    row[f"on_{task}"] = twosome.evaluate(agent, other, 100, "unseen")["success"]
        if trained and args.method == "twosome":  # E3
            _, agent = twosome.load_run(run, {})
            row["perplexity_before"], row["cloze_before"] = language_before(args.model)
            row["perplexity"], row["cloze"] = language(agent.model, agent.tokenizer)
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
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run_all(todo: list[dict], folder: Path, workers: int):
    """Run the jobs side by side; write each one's rows when it ends."""
    from tqdm import tqdm

    # A curve without its row is what an interruption left between the two: it comes anew.
    done = {row["name"] for row in read_csv(folder / "runs.csv")}
    curves = [row for row in read_csv(folder / "curves.csv") if row["name"] in done]
    (folder / "curves.csv").unlink(missing_ok=True)
    append_csv(folder / "curves.csv", CURVE, curves)
    bar = tqdm(total=sum(job["cost"] for job in todo), unit="work", smoothing=0, dynamic_ncols=True,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} left"
                          "{postfix}")
    with bar, multiprocessing.get_context("spawn").Pool(workers) as pool:  # ends with its block
        for job, row, curve in pool.imap_unordered(run_job, todo):
            if curve is None:
                tqdm.write(f"{job['name']} could not run: {row}")
                continue
            append_csv(folder / "curves.csv", CURVE, curve)
            append_csv(folder / "runs.csv", COLUMNS, [row])
            shutil.rmtree(job["run"])
            bar.set_postfix_str(f"{job['experiment']} {job['name']}")
            bar.update(job["cost"])


# --- RESULTS.md -----------------------------------------------------------------------------------

def numbers(rows: list[dict], measure: str) -> list[float]:
    return [float(row[measure]) for row in rows if row[measure] != ""]


def spread(values: list[float], digits: int = 2) -> str:
    """mean [lowest, highest]"""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(header: list[str], lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |"
                     for line in (header, ["---"] * len(header), *lines)) + "\n"


def never(rows: list[dict]) -> str:
    """Steps until 90%: the mean of the seeds that got there, and how many did."""
    reached = numbers(rows, "steps_to_90")
    if not rows or rows[0]["label"] in ("zero-shot", "random"):
        return "-"
    if not reached:
        return f"never (0 of {len(rows)})"
    return (f"{sum(reached) / len(reached):,.0f} [{min(reached):,.0f}, {max(reached):,.0f}]"
            f" ({len(reached)} of {len(rows)})")


def verdicts(pick, n_seeds: int) -> list[str]:
    """What was aimed at, and whether it was reached; each line from runs.csv alone."""
    lines = []

    def say(reached: bool, text: str):
        lines.append(f"- {'reached' if reached else '**NOT reached**'}: {text}")

    for task in TASKS:
        ours, ppo = pick(task, "word"), pick(task, "ppo")
        if not ours or not ppo:
            continue
        mine, its = numbers(ours, "steps_to_90"), numbers(ppo, "steps_to_90")
        # A run that never gets there counts with all its steps; PPO has twice as many.
        mean_mine, mean_its = (sum(float(r["steps_to_90"] or r["env_steps"]) for r in rows)
                               / len(rows) for rows in (ours, ppo))
        fast = len(mine) == len(ours) and (not its or mean_mine <= mean_its / 3)
        say(fast, f"{task}: 90% success in at most a third of PPO's steps: TWOSOME {never(ours)}, "
                  f"PPO {never(ppo)}, ratio {mean_mine / mean_its:.2f}"
                  + " (a seed that never got there counts with all its steps)"
                  * (len(its) < len(ppo)))
        final = numbers(ours, "success")
        others = {label: numbers(pick(task, label), "success") for label in ("saycan", "zero-shot")}
        say(min(final) >= 0.95 and all(sum(final) > sum(x) for x in others.values()),
            f"{task}: ends at 0.95 or more ({spread(final)}), above SayCan "
            f"({spread(others['saycan'])}) and zero-shot ({spread(others['zero-shot'])})")
    for trained in ("food-preparation", "entertainment"):
        rows = pick(trained, "word")
        for task in UNSEEN if rows else ():
            ours, base = numbers(rows, f"on_{task}"), numbers(pick(task, "zero-shot"), "success")
            mean = sum(ours) / len(ours)
            if trained == "food-preparation" or mean < 0.8:
                say(mean >= 0.8 and mean > sum(base) / len(base),
                    f"{task} unseen, after {trained}: at least 0.8 and above the untrained LLM: "
                    f"{spread(ours)} against {spread(base)}")
    for task in TASKS:
        rows = pick(task, "word")
        change = [float(r["perplexity"]) / float(r["perplexity_before"]) - 1 for r in rows]
        if change:
            say(max(change) <= 0.02, f"{task}: perplexity within 2% of before: "
                                     f"{spread([100 * c for c in change], 1)}%")
    return lines


def report(folder: Path, mode: str, plan: list[dict], causes: str):
    """Write RESULTS.md and the figures from runs.csv and curves.csv."""
    rows = read_csv(folder / "runs.csv")
    curves = {}
    for row in read_csv(folder / "curves.csv"):
        curves.setdefault(row["name"], []).append(row)
    seeds = sorted({int(row["seed"]) for row in rows})

    def pick(task, label):
        return [row for row in rows if (row["task"], row["label"]) == (task, label)]

    missing = [job["name"] for job in plan if job["name"] not in {row["name"] for row in rows}]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    labels = ["word", "token", "none", "ppo", "saycan", "zero-shot", "random"]
    command = f"python experiments/reproduce.py {mode} --only"
    out = [f"# Results ({mode})\n",
           f"Made by `python experiments/reproduce.py {mode}`: {len(rows)} of {len(plan)} jobs, "
           f"seeds {', '.join(map(str, seeds))}. Numbers are the mean over seeds with the lowest "
           "and the highest in brackets; success and return are those of 100 sampled episodes. "
           f"Any row of runs.csv can be made again by `{command} NAME` with its name.\n"]
    if missing:
        out.append(f"**Not complete**: {len(missing)} jobs have not run yet; the same command goes "
                   "on with them.\n")
    out += ["## What was aimed at\n", "\n".join(verdicts(pick, len(seeds))) + "\n", causes]

    out.append(f"## E1 sample efficiency\n\n`{command} E1`\n")
    for task in tasks:
        out.append(f"### {task}\n")
        out.append(table(
            ["agent", "seeds", "steps until 90% success", "success", "discounted return",
             "seconds"],
            [[label, len(r), never(r), spread(numbers(r, "success")),
              spread(numbers(r, "return"), 3), spread(numbers(r, "seconds"), 0)]
             for label in labels if (r := pick(task, label))]))
    out.append("`word`, `token` and `none` are TWOSOME with that normalisation. Steps until 90%: "
               "when 0.9 of the latest 100 or more training episodes succeeded (training samples "
               "its actions); the mean is over the seeds that got there. The first points of a "
               "curve flatter: only short episodes have ended by then, those that succeeded. "
               "Seconds: one thread, beside another job, and sometimes beside tests.\n")

    household = [task for task in ("food-preparation", "entertainment") if pick(task, "word")]
    agents = [(task, label) for task in household for label in ("word", "token", "none", "ppo")
              if pick(task, label)]
    out.append(f"## E2 unseen tasks\n\n`{command} food-preparation-word-seed{seeds[0]}` and so on: "
               "the unseen tasks are measured with the agents of E1.\n")
    out.append(table(
        ["task", *(f"{label} trained on {task}" for task, label in agents), "zero-shot", "random"],
        [[task, *(spread(numbers(pick(t, label), f"on_{task}")) for t, label in agents),
          spread(numbers(pick(task, "zero-shot"), "success")),
          spread(numbers(pick(task, "random"), "success"))] for task in HOUSEHOLD]))
    out.append("PPO reads numbers, not words. Heating a pancake, heating a pizza and washing a "
               "plate are the same numbers, so what looks like generalisation is the same task "
               "again; washing clothes happens in another room; and with entertainment it shares "
               "not even the length of the observation (-).\n")

    trained = [(task, label) for task in tasks for label in ("word", "token", "none")]
    out.append(f"## E3 language\n\n`{command} E1`\n")
    out.append(table(
        ["after training on", "agent", "perplexity before", "after", "change in %",
         "true ending of four before", "after"],
        [[task, label, spread(numbers(r, "perplexity_before"), 3),
          spread(numbers(r, "perplexity"), 3),
          spread([100 * (float(x["perplexity"]) / float(x["perplexity_before"]) - 1) for x in r],
                 1),
          spread(numbers(r, "cloze_before"), 3), spread(numbers(r, "cloze"), 3)]
         for task, label in trained if (r := pick(task, label))]))
    from language import held_out
    out.append(f"{len(held_out())} texts of make_pocket_lm.py that pocket_lm was not trained on; "
               "200 of them cut in the middle of the last sentence for the choice of the ending "
               "(by log-probability per token; chance is 0.25).\n")

    for number, title, which in (
            ("E4", "prompt principles, each switched off", ["word", *PRINCIPLES]),
            ("E5", "offered actions, the time limit as an end, the eps of advantages",
             ["word", "all-actions", "time-limit-ends", "eps-1e-8"]),
            ("E6", "a pretrained LM that nobody here made", ["word", "tiny1m"])):
        out.append(f"## {number} {title}\n\n`{command} {number}`\n")
        out.append(table(
            ["task", "agent", "seeds", "success before", "steps until 90% success",
             "success after", "discounted return after"],
            [[task, "as it is" if label == "word" else label, len(r),
              spread(numbers(r, "before_success")), never(r), spread(numbers(r, "success")),
              spread(numbers(r, "return"), 3)]
             for task in tasks if any(pick(task, x) for x in which[1:])
             for label in which if (r := pick(task, label))]))
    (folder / "RESULTS.md").write_text("\n".join(out))

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("tables written; the figures need matplotlib: pip install matplotlib")
        return
    import plot

    def panels(labels, tasks):
        """task -> the label's name in the figure -> the curves of all seeds"""
        return {task: {name: lines for label, name in labels.items() if (
            lines := [curves[row["name"]] for row in pick(task, label) if row["name"] in curves])}
            for task in tasks if any(pick(task, label) for label in labels if label != "word")}

    def values(tasks, chosen):
        return {task: {name: numbers(pick(*where(task)), measure(task))
                       for name, (where, measure) in chosen.items()} for task in tasks}

    if drawn := panels({
            "word": "TWOSOME, per word", "token": "TWOSOME, per token",
            "none": "TWOSOME, undivided", "saycan": "SayCan", "ppo": "PPO"}, tasks):
        plot.learning_curves(drawn, folder / "e1_curves.png")
    if household:
        plot.bars(values(UNSEEN, {
            f"trained on {t}": (lambda _, t=t: (t, "word"), lambda task: f"on_{task}")
            for t in household} | {"untrained LLM": (lambda task: (task, "zero-shot"),
                                                     lambda _: "success")}),
            folder / "e2_unseen.png", "success", line=0.8)
    change = {task: {label: [100 * (float(x["perplexity"]) / float(x["perplexity_before"]) - 1)
                             for x in pick(task, label)] for label in ("word", "token", "none")}
              for task in tasks if pick(task, "word")}
    if change:
        plot.bars(change, folder / "e3_perplexity.png", "perplexity, change in %", line=2)
    for number, which in (("e4_principles", PRINCIPLES),
                          ("e5_decisions", ["all-actions", "time-limit-ends", "eps-1e-8"]),
                          ("e6_tiny1m", ["tiny1m"])):
        if drawn := panels({"word": "as it is"} | {label: label for label in which}, tasks):
            plot.learning_curves(drawn, folder / f"{number}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mode", choices=("quick", "full"))
    parser.add_argument("--only", metavar="NAME", help="one experiment (E1) or one job")
    parser.add_argument("--report", action="store_true", help="run nothing, write RESULTS.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs side by side")
    shared = ROOT.parent / "shared" / "lm" / "tiny1m"
    parser.add_argument("--lm", default=str(shared) if shared.exists() else "shibatch/tiny1m",
                        help="folder or Hub id of E6's LM")
    given = parser.parse_args()
    folder = RESULTS / given.mode
    folder.mkdir(parents=True, exist_ok=True)
    plan = jobs(given.mode, given.lm)
    chosen = [job for job in plan if given.only in (None, job["experiment"], job["name"])]
    if not chosen:
        raise SystemExit(f"reproduce.py: --only {given.only}: no such experiment or job; "
                         "experiments are E1, E2, E4, E5 and E6 (E2's trained agents and E3 are "
                         "measured in E1's jobs), jobs are named in runs.csv")
    done = {row["name"] for row in read_csv(folder / "runs.csv")}
    if given.only in done:  # one row again, to compare
        (old,) = (row for row in read_csv(folder / "runs.csv") if row["name"] == given.only)
        shutil.rmtree(chosen[0]["run"], ignore_errors=True)
        _, new, curve = run_job(chosen[0])
        if curve is None:
            raise SystemExit(f"reproduce.py: {given.only} could not run: {new}")
        for column in COLUMNS:
            print(f"{column:20} {old[column]:>12} {new.get(column, ''):>12}")
        return shutil.rmtree(chosen[0]["run"])
    todo = [job for job in chosen if job["name"] not in done]
    print(f"{len(chosen)} jobs, {len(chosen) - len(todo)} of them done before")
    if given.report and not done:
        raise SystemExit("reproduce.py: nothing to report yet; run without --report first")
    if todo and not given.report:
        try:
            run_all(todo, folder, given.workers)
        except KeyboardInterrupt:
            raise SystemExit("reproduce.py: stopped; the same command goes on from here") from None
    causes = folder / "causes.md"  # written by a person, after looking
    report(folder, given.mode, plan, causes.read_text() if causes.exists() else "")
    print(f"wrote {folder}/RESULTS.md")


if __name__ == "__main__":
    for variable, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ[variable] = value  # for the workers, which import torch after this
    main()
