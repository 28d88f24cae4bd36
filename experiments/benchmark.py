"""How fast is twosome.py beside the plain way, in which the paper's code computes?

    python experiments/benchmark.py                               # pocket_lm and all four tasks
    python experiments/benchmark.py --model FOLDER --repeats 1    # an LM, for which it takes long

The plain way caches nothing. Every decision is tokenised anew and has passes of its own, one for
its value and one with a row for each action, whenever it is played or learned from. Both ways start
with the same weights and random numbers. They must take the same decisions and end with the same
policy, else the script fails.

Measured are seconds, without loading and without the episodes that are only for the log:

first update   the first update of a run with the default settings, and the texts that rehearsal has
               the LM write once in a run; the same call writes them in both ways
later update   our second update, when some states are known, beside the plain way's first
iteration      the paper's own: 4 environments, 32 decisions in each, one epoch of 4 minibatches and
               no rehearsal; nothing is known before

No update ends early by its KL divergence. All numbers, also where the time goes, are written to
experiments/results/NAME/benchmark.json, and a number there is the median of the repetitions.
"""

import json
import os
import platform
import random
import re
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402
from twosome import Agent, Rehearsal, encode, require  # noqa: E402

TASKS = {
    "tomato-salad": "overcooked",
    "tomato-lettuce-salad": "overcooked",
    "food-preparation": "virtualhome",
    "entertainment": "virtualhome",
}
ITERATION = {
    "n_envs": 4,
    "rollout_steps": 32,
    "epochs": 1,
    "minibatches": 4,
    "value_epochs": 1,
    "rehearsal_coef": 0.0,
}
WATCHED = "log_policy", "features", "extra_loss"
COMPARED = "first update", "later update", "iteration"


# === The plain way ================================================================================
class PlainAgent(Agent):
    """The same networks with the plain scorer. No two decisions share anything."""

    learning = False

    def log_policy(self, states):
        encode.cache_clear()
        return super().log_policy([state[:2] for state in states])

    @torch.no_grad()
    def cached_log_policy(self, states):
        """A moment of the rollout. Its values are asked for at the end and kept until then."""
        for state in states:
            self.feature_cache.pop(state[0], None)
            self.features([state])
        return self.log_policy(states)

    def features(self, states):
        if not self.learning:
            return super().features(states)
        rows = []
        for state in states:
            self.feature_cache.clear()
            rows.append(super().features([state[:2]]))
        return torch.cat(rows)

    def learn(self, rollout, remaining, rng):
        """A number makes each state another one, so that the update does not merge decisions."""
        self.learning = True
        states = [(*state, i) for i, state in enumerate(rollout.states)]
        return super().learn(replace(rollout, states=states), remaining, rng)


def make_agent(settings, way):
    """An agent as at the start of a run, without rehearsal."""
    torch.manual_seed(settings.seed)
    encode.cache_clear()
    model, tokenizer = twosome.load_lm(settings.model, settings.device, settings.dtype)
    model = twosome.add_lora(model)
    if way == "plain":
        agent = PlainAgent(model, tokenizer, settings)
    else:
        agent = Agent(model, tokenizer, settings, twosome.choose_scorer(model))
    return agent


# === Measuring ====================================================================================
def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(seconds, name, function, *args):
    """Call the function, and add the seconds that it takes."""
    synchronize()
    start = time.perf_counter()
    result = function(*args)
    synchronize()
    seconds[name] += time.perf_counter() - start
    return result


def run_updates(settings, way, n):
    """The first n updates of a run. Returns the seconds of each, and the agent and all states and
    choices after them."""
    agent = make_agent(settings, way)
    seconds = Counter()
    coef = settings.rehearsal_coef
    if coef:
        vocab_size = agent.tokenizer.vocab_size
        agent.extra_loss = timed(seconds, "texts", Rehearsal, agent.model, vocab_size, coef)
    texts = seconds["texts"]
    for name in WATCHED:
        method = getattr(agent, name)
        if method:
            setattr(agent, name, partial(timed, seconds, name, method))
    envs = [twosome.make_env(agent, settings) for _ in range(settings.n_envs)]
    rng = random.Random(settings.seed)
    updates, decisions = [], []
    for _ in range(n):
        seconds.clear()
        rollout = timed(seconds, "all", twosome.collect, agent, envs, rng)
        playing = dict(seconds)
        seconds.clear()
        timed(seconds, "all", agent.learn, rollout, 1.0, rng)
        learning = dict(seconds)
        total = playing["all"] + learning["all"]
        updates.append({"texts": texts, "all": total, "playing": playing, "learning": learning})
        decisions.append((rollout.states, rollout.choice.tolist()))
    return updates, agent, decisions


@torch.no_grad()
def difference(agents, states):
    """The largest difference between two agents' probabilities of an action."""
    largest = 0.0
    for state in set(states):
        a, b = [agent.log_policy([state])[0].exp() for agent in agents]
        largest = max(largest, (a - b).abs().max().item())
    return largest


def compare(settings):
    """Run both ways once. Returns the seconds of the plain way's update and of our updates."""
    (plain,), plain_agent, (decisions,) = run_updates(settings, "plain", 1)
    _, agent, _ = run_updates(settings, "ours", 1)
    largest = difference((plain_agent, agent), decisions[0])
    ours, _, our_decisions = run_updates(settings, "ours", 2)
    require(our_decisions[0] == decisions, "the two ways took different decisions")
    if settings.dtype == "float32":
        require(largest < 1e-3, f"after an update the two ways differ by {largest:.0e}")
    return plain, ours, largest


def measure(settings):
    """One repetition: for each comparison the seconds of the plain way and ours."""
    plain, (first, later), largest = compare(settings)
    reference_plain, (reference, _), other = compare(replace(settings, **ITERATION))
    once = plain["texts"], first["texts"]
    return {
        "first update": [once[0] + plain["all"], once[1] + first["all"]],
        "later update": [plain["all"], later["all"]],
        "iteration": [reference_plain["all"], reference["all"]],
        "parts": {"plain": plain, "first": first, "later": later},
        "difference": max(largest, other),
    }


# === The report ===================================================================================
def medians(things):
    """The median of each number in dictionaries and lists that are built alike."""
    if isinstance(things[0], dict):
        columns = zip(*map(dict.values, things), strict=True)
        return dict(zip(things[0], map(medians, columns), strict=True))
    if isinstance(things[0], list):
        return [medians(values) for values in zip(*things, strict=True)]
    return float(f"{median(things):.4g}")


def machine():
    """What the seconds belong to."""
    path = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return {
        "processor": processor[1] if processor else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_task(task, result):
    print(f"\n{task:24}{'plain, s':>12}{'ours, s':>12}{'plain/ours':>12}")
    for name in COMPARED:
        plain, ours = result[name]
        print(f"  {name:22}{plain:12.4g}{ours:12.4g}{plain / ours:12.3g}")
    for name, parts in result["parts"].items():
        for phase in "playing", "learning":
            seconds = dict(parts[phase])
            total = seconds.pop("all")
            seconds["the rest"] = total - sum(seconds.values())
            shares = [f"{part} {x / parts['all']:.0%}" for part, x in seconds.items()]
            print(f"  {name} update, {phase}: {', '.join(shares)}")
    print(f"  largest difference of a probability after the update: {result['difference']:.0e}")


def main(argv):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="pocket_lm", help="pocket_lm, a folder or a Hub id")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rollout_steps", type=int, default=twosome.Settings.rollout_steps)
    parser.add_argument("--out", type=Path, help="the file that is written")
    given = parser.parse_args(argv)
    name = Path(given.model).name.split("-")[0].lower()
    out = given.out or ROOT / "experiments" / "results" / name / "benchmark.json"
    shared = {"model": given.model, "device": given.device, "dtype": given.dtype}
    shared |= {"rollout_steps": given.rollout_steps, "target_kl": 1e9}
    results = {"settings": shared, "repeats": given.repeats, "machine": machine(), "tasks": {}}
    for number, task in enumerate(given.tasks):
        settings = twosome.make_settings(env=TASKS[task], task=task, **shared)
        if number == 0:
            run_updates(replace(settings, rollout_steps=1), "ours", 1)  # a warm-up
        result = medians([measure(settings) for _ in range(given.repeats)])
        results["tasks"][task] = result
        print_task(task, result)
    means = {}
    for compared in COMPARED:
        seconds = [result[compared] for result in results["tasks"].values()]
        means[compared] = geometric_mean(plain / ours for plain, ours in seconds)
        print(f"\ngeometric mean of plain/ours, {compared}: {means[compared]:.3g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results | {"geometric mean of plain/ours": means}, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"benchmark.py: {str(error) or 'interrupted'}")
