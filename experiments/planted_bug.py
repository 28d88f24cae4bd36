"""An exercise: one of these three functions is wrong, and nothing crashes.

    python experiments/planted_bug.py    # food-preparation, into runs/planted-bug

Somebody found twosome.py too slow to read and wrote three of its functions anew. Training runs, the
losses look like losses, and yet something is wrong. Find out which function it is: first from its
log beside that of a sound run, then by a test of your own on numbers that you can compute by hand.
It is mended when the two logs are the same, the time columns aside (bash; no output: the same):

    python twosome.py --env virtualhome --out runs/sound
    cmp <(cut -d, -f1-11 runs/sound/metrics.csv) <(cut -d, -f1-11 runs/planted-bug/metrics.csv)
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402


def normalize(log_probs, n_tokens, n_words, norm):
    """log P(a | s), divided by the number of words or tokens, or not at all."""
    divisors = {"word": n_words, "token": n_tokens, "none": [torch.ones(1)] * len(log_probs)}
    return [log_prob / n.to(log_prob.device) for log_prob, n in zip(log_probs, divisors[norm])]


def gae(reward, discount, value, next_value, done, gae_lambda):
    """A_t = delta_t + gamma^k_t lambda A_{t+1}, all of shape (T, N)."""
    following_value = torch.cat([value[1:], next_value[-1:]])
    delta = reward + discount * following_value - value
    advantage = delta.clone()
    for t in reversed(range(len(reward) - 1)):
        advantage[t] += discount[t] * gae_lambda * (1 - done[t]) * advantage[t + 1]
    return advantage


def minibatches(states, args, rng):
    """Each epoch: 0 ... n-1 in a random order, cut into nearly equal parts."""
    for _ in range(args.epochs):
        parts = [[] for _ in range(args.minibatches)]
        for part, i in zip(itertools.cycle(parts), rng.sample(range(len(states)), len(states))):
            part.append(i)
        yield from parts


if __name__ == "__main__":
    twosome.normalize, twosome.gae, twosome.minibatches = normalize, gae, minibatches
    twosome.main(["--env", "virtualhome", "--out", "runs/planted-bug", *sys.argv[1:]])
