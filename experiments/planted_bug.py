"""An exercise: one of these three methods is wrong, and nothing crashes.

    python experiments/planted_bug.py    # food-preparation, into runs/planted-bug

Somebody found twosome.py too slow to read and wrote three of its methods anew. Training runs, the
losses look like losses, success rises, and yet something is wrong. Find out which method it is:
first from its log beside that of a sound run, then by a test of your own, on numbers that you can
compute by hand. It is mended when the two logs are the same but for the last column, the seconds
(bash; no output means the same):

    python twosome.py --env virtualhome --out runs/sound
    cmp <(cut -d, -f1-9 runs/sound/metrics.csv) <(cut -d, -f1-9 runs/planted-bug/metrics.csv)
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import twosome  # noqa: E402


class ShortEnv(twosome.TextEnv):
    """Wraps an environment, so that the agent sees a prompt and phrases."""

    def step(self, choice):
        """Take one of the offered actions. Returns its reward, and the discount of what follows."""
        action = list(self.info["actions"])[choice]
        self.obs, reward, *ends, self.info = self.env.step(action)
        self.discounted_return += self.gamma**self.length * reward
        self.length += self.info["primitive_steps"]
        self.done = any(ends)
        discount = self.gamma ** self.info["primitive_steps"] * (1 - all(ends))
        return reward, discount


class ShortAgent(twosome.Agent):
    """An agent with two short methods."""

    wrapper = ShortEnv

    def log_policy(self, states):
        """log pi(. | s) for B states: B tensors (K,), with gradients."""
        encoded = [twosome.encode(self.tokenizer, *state) for state in states]
        policies = []
        for state, joint in zip(states, self.score(self.model, encoded), strict=True):
            _, action_ids = twosome.encode(self.tokenizer, *state)
            words = [phrase.split() for phrase in state[1]]
            ends = {"word": words, "token": action_ids, "none": [[0]] * len(words)}
            n = torch.tensor([len(end) for end in ends[self.settings.norm]])
            policies.append((joint.cpu() / n).log_softmax(-1))
        return policies

    def value(self, states):
        """V(s) for B states: (B,), with gradients for the critic only."""
        values = self.critic(self.features(states))
        return values[:, 0]


if __name__ == "__main__":
    twosome.main(
        sys.argv[1:],
        defaults={"env": "virtualhome", "out": "runs/planted-bug"},
        make_agent=partial(twosome.make_agent, kind=ShortAgent),
        program=sys.argv[0],
    )
