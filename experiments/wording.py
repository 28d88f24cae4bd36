"""Which words should join observation, goal and action? Chosen by untrained success alone.

    python experiments/wording.py MODEL [MODEL ...] --out experiments/results/wording.csv

For each wording the untrained LM plays the four tasks. Nothing is sampled: exact.py computes the
success. A row of the file is one LM, wording and task, with one column for each normalisation. The
cells are empty where a state is too long for the LM.

The rule, written down before any wording was measured with this script:
- A wording's score is the geometric mean, over the four tasks, of its success divided by that of
  uniformly random choice, with SmolLM2-135M-Instruct and normalisation by words, the default.
- Wordings within 10% of the best score are equal. Among them, the best score with tiny1m decides.
"""

import csv
import math
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import exact  # noqa: E402

TASKS = {
    "tomato-salad": "overcooked",
    "food-preparation": "virtualhome",
    "entertainment": "virtualhome",
    "tomato-lettuce-salad": "overcooked",
}
NORMS = "word", "token", "none"
WORDINGS = [
    "To {goal}, your next step is to",
    "To {goal}, you should first",
    "To {goal}, first",
    "To {goal}, simply",
    "To {goal}, the first step is to",
    "The first step to {goal} is to",
    "The next step to {goal} is to",
    "To {goal}, the first thing to do is to",
    "The first thing to do to {goal} is to",
    "In order to {goal}, first",
    "To {goal}, you first need to",
    "To {goal}, you must first",
    "To {goal}, your first step is to",
    "Your first step to {goal} is to",
    "The best first step to {goal} is to",
    "The first step now to {goal} is to",
    "You want to {goal}. First,",
    "You want to {goal}. The first step is to",
    "If you want to {goal}, first",
    "Your task is to {goal}. Your first step is to",
]


class Unworded(twosome.TextEnv):
    """Shows the observation without the words that make a prompt of it."""

    def state(self):
        return self.obs, tuple(self.info["actions"].values())


class World:
    """A task: all its states, and the success of a policy in them."""

    def __init__(self, task):
        settings = twosome.make_settings(env=TASKS[task], task=task)
        env = Unworded(twosome.ENVS[settings.env](task, settings.gamma), settings.gamma)
        self.goal = env.env.goal
        self.limit = exact.time_limit(settings)
        self.seen, self.edges = exact.reachable(env)
        self.states = sorted(set(self.seen))
        self.random = self.success({state: torch.zeros(len(state[1])) for state in self.states})

    def success(self, scores):
        """The exact success of the softmax of each state's scores."""
        policies = [scores[state].double().softmax(0) for state in self.seen]
        reward = self.edges["success"]
        return exact.expected(self.edges, torch.cat(policies), reward, 1.0, self.limit)


@torch.no_grad()
def untrained_success(lm, world, wording):
    """The success with each normalisation, or None for each where a state is too long."""
    model, tokenizer, score = lm
    words = wording.format(goal=world.goal)
    scores = {norm: {} for norm in NORMS}
    for states in twosome.chunks(world.states, 8):
        try:
            encoded = [twosome.encode(tokenizer, f"{obs} {words}", p) for obs, p in states]
        except twosome.UserError as error:
            print(f"{wording}: {error}", file=sys.stderr)
            return [None] * len(NORMS)
        # The joint log-probabilities serve all three normalisations.
        for state, pair, joint in zip(states, encoded, score(model, encoded), strict=True):
            for norm in NORMS:
                scores[norm][state] = twosome.normalize(joint, pair[1], state[1], norm)
    return [world.success(scores[norm]) for norm in NORMS]


def geometric_mean(numbers):
    """Of None, too, there is none."""
    return None if None in numbers else math.prod(numbers) ** (1 / len(numbers))


def load(name):
    model, tokenizer = twosome.load_lm(name)
    return model, tokenizer, twosome.choose_scorer(model)


def measure(name, lm, worlds, write_row):
    """Measure an LM, and print each wording's score."""
    scores = {}
    for wording in tqdm(WORDINGS, unit="wording", disable=None):
        ratios = []
        for task, world in worlds.items():
            cells = untrained_success(lm, world, wording)
            write_row([Path(name).name, wording, task, *cells])
            by_word = cells[0]
            ratios.append(None if by_word is None else by_word / world.random)
        scores[wording] = geometric_mean(ratios)
    print(f"{name}: success over random choice, geometric mean of {len(worlds)} tasks")
    for wording, score in sorted(scores.items(), key=lambda pair: -(pair[1] or 0)):
        print(f"  {'none' if score is None else f'{score:.3f}':>6}  {wording}")


def main(argv=()):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new csv file")
    given = parser.parse_args(argv)
    try:
        lms = {name: load(name) for name in given.models}
        with open(given.out, "x", newline="", buffering=1) as file:  # A row is written at once.
            writer = csv.writer(file)
            writer.writerow(["LM", "wording", "task", *NORMS])
            worlds = {task: World(task) for task in TASKS}
            for name, lm in lms.items():
                measure(name, lm, worlds, writer.writerow)
    except (twosome.UserError, OSError) as error:
        sys.exit(f"wording.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
