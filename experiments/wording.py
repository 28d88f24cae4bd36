"""Which words should join observation, goal and action? Chosen by untrained success alone.

    python experiments/wording.py MODEL [MODEL ...] --out experiments/results/wording.csv

For each wording the untrained LM plays the four tasks. Nothing is sampled: exact.py computes the
success. A row of the file is one LM, wording and task, with one column for each normalisation.

The rule, written down before any wording was measured with this script:
- A wording's score is the geometric mean, over the four tasks, of its success divided by that of
  uniformly random choice, with SmolLM2-135M-Instruct and normalisation by words, the default.
- Wordings within 10% of the best score are equal. Among them, the best score with tiny1m decides.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import exact  # noqa: E402

import twosome  # noqa: E402

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


class Worded(twosome.Episode):
    """An episode whose prompts are joined by other words."""

    wording = WORDINGS[0]

    def state(self):
        phrases = tuple(self.info["actions"].values())
        return f"{self.obs} {self.wording.format(goal=self.env.goal)}", phrases
