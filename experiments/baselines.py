"""The same PPO without a language model, a language model without PPO, and random choice.

    python experiments/baselines.py --method ppo --env overcooked
    python experiments/baselines.py --method saycan --env virtualhome
    python experiments/baselines.py --method random --task tomato-lettuce-salad

Flags, folder and log are those of twosome.py, and so are rollout, advantages and updates: a
baseline is an agent of another kind (what learns) and, where needed, an episode of another kind
(what it is shown, and what it is rewarded for).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from twosome import Agent, Episode, minibatches  # noqa: E402

# PPO's settings were searched as TWOSOME's were, on the same seeds (results/search.csv).
BOTH = {"epochs": 10, "minibatches": 4, "adam_eps": 1e-5, "whole_states": False,
        "rehearsal_coef": 0.0}
OWN = {"ppo": BOTH | {"policy_lr": 1e-3, "ent_coef": 0.01, "target_kl": 0.05,
                      "advantage_eps": 0.1},
       "saycan": BOTH,
       "random": {"steps": 0}}


def tanh_mlp(n_inputs: int, n_outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal initialisation: what PPO is usually run with."""
    layers = []
    for n_in, n_out, g in ((n_inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, n_outputs, gain)):
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, g)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Baseline(Agent):
    """An agent without LoRA: `model` is what acts, `critic` what is learned beside it."""

    def __init__(self, model: nn.Module, critic: nn.Module, eps=1e-5):
        nn.Module.__init__(self)  # not Agent's: there is no LLM to wrap
        self.model, self.critic, self.max_prompts = model, critic, 1024
        self.policy_memory, self.scale = {}, None
        self.optimizers = {
            name: torch.optim.Adam(weights, eps=eps) for name, part in (
                ("policy", model), ("value", critic))
            if (weights := [p for p in part.parameters() if p.requires_grad])}


# --- PPO from scratch -----------------------------------------------------------------------------

class SymbolicEpisode(Episode):
    """Shown in numbers: the symbolic observation, and the indices of the offered actions."""

    def state(self):
        return tuple(self.info["vector"].tolist()), tuple(self.info["actions"])


class SymbolicAgent(Baseline):
    """Actor and critic are small networks of the symbolic observation; the rest is TWOSOME's."""

    def __init__(self, n_inputs: int, n_actions: int, eps: float):
        # Nearly uniform at first; V = 0 at first, as for TWOSOME.
        super().__init__(tanh_mlp(n_inputs, n_actions, gain=0.01),
                         tanh_mlp(n_inputs, 1, gain=0.0), eps)

    def log_policy(self, states):
        vectors, offered = zip(*states)
        logits = self.model(torch.tensor(vectors))  # (B, all actions); a softmax over the offered
        return [F.log_softmax(row[list(indices)], -1) for row, indices in zip(logits, offered)]

    def features(self, states):
        return torch.tensor([vector for vector, _ in states])


# --- SayCan ---------------------------------------------------------------------------------------

class SkillEpisode(Episode):
    """Shown in words and in numbers; an action earns 1 when it succeeds, and nothing after it
    counts. "Succeeds": it changes the state, whether that serves the goal or not."""

    def state(self):
        prompt, _ = super().state()
        return (prompt, tuple(self.info["vector"].tolist())), tuple(self.info["actions"].items())

    def act(self, chosen: int):
        _, _, terminated, truncated = super().act(chosen)
        return float(self.info["changed"]), 0.0, terminated, truncated


class SayCan(Baseline):
    """SayCan (Ahn et al., 2022): what is sensible, in the eyes of a frozen LLM, times what works.

        pi(a | s) ~ P_LLM(a | s) * P(a succeeds | s)

    The second factor, the affordance, is learned from the agent's own exploration.
    """

    def __init__(self, llm: Agent, n_inputs: int, n_actions: int, eps: float):
        # The LLM is never trained, so what it says is remembered for good: in its policy_memory.
        super().__init__(llm.requires_grad_(False), tanh_mlp(n_inputs, n_actions, gain=0.01), eps)

    def affordance(self, seen, offered) -> list[torch.Tensor]:
        """Logits that the offered actions succeed, near 0 at first: B tensors (K_b,)."""
        logits = self.critic(torch.tensor([vector for _, vector in seen]))  # (B, all actions)
        return [row[[index for index, _ in actions]] for row, actions in zip(logits, offered)]

    def log_policy(self, states):
        seen, offered = zip(*states)
        says = self.model.remembered_log_policy([
            (prompt, tuple(phrase for _, phrase in actions))
            for (prompt, _), actions in zip(seen, offered)])
        can = self.affordance(seen, offered)
        return [F.log_softmax(say + F.logsigmoid(c), -1) for say, c in zip(says, can)]

    def value(self, states):
        return torch.zeros(len(states))

    def learn(self, rollout, args, rng) -> dict:
        """Cross-entropy of the predicted success of each action taken.

            L = -mean [ y log p + (1 - y) log(1 - p) ],  y = 1 if the action changed the state
        """
        self.policy_memory, losses = {}, []
        for batch in minibatches(rollout.states, args, rng):
            logits = self.affordance(*zip(*(rollout.states[i] for i in batch)))
            chosen = torch.stack([row[rollout.chosen[i]] for row, i in zip(logits, batch)])
            # With V = 0 and discount 0 the return is the skill's own reward.
            loss = F.binary_cross_entropy_with_logits(chosen, rollout.returns[batch])
            self.optimizers["value"].zero_grad()
            loss.backward()
            self.optimizers["value"].step()
            losses.append(loss.item())
        return {"value_loss": sum(losses) / len(losses)}


# --- Random choice --------------------------------------------------------------------------------

class RandomAgent(Baseline):
    """Uniformly random choice among the offered actions, for scale."""

    def __init__(self):
        super().__init__(nn.Identity(), nn.Identity())  # nothing to train

    def log_policy(self, states):
        return [torch.zeros(len(offered)).log_softmax(-1) for _, offered in states]

    def value(self, states):
        return torch.zeros(len(states))

    def learn(self, rollout, args, rng) -> dict:
        return {}


PLAYS = {"ppo": SymbolicEpisode, "saycan": SkillEpisode, "random": Episode, "twosome": Episode}


def make_agent(args) -> Agent:
    if args.method == "twosome":
        return twosome.make_agent(args)
    if args.method == "random":
        return RandomAgent()
    episode = twosome.make_episode(args)
    n_inputs, n_actions = len(episode.info["vector"]), episode.env.n_actions
    if args.method == "ppo":
        return SymbolicAgent(n_inputs, n_actions, args.adam_eps)
    return SayCan(twosome.make_agent(args), n_inputs, n_actions, args.adam_eps)


def load_run(run: Path, **changes):
    """Return (arguments, agent) of a run of any method; of one that was not trained, as it is."""
    try:
        args = twosome.Args(**(json.loads((run / "config.json").read_text()) | changes))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot take {run} for a run: {error}") from None
    agent = make_agent(args)
    if args.steps:
        twosome.load_checkpoint(run, agent)
    return args, agent


def main(argv=None):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=tuple(OWN))
    for mode in ("--resume", "--evaluate"):
        parser.add_argument(mode, type=Path)
    given, _ = parser.parse_known_args(argv)
    run, method = given.resume or given.evaluate, given.method
    if run and (run / "config.json").exists():
        method = json.loads((run / "config.json").read_text()).get("method")
    if method not in PLAYS:
        parser.error(f"choose a --method: {', '.join(OWN)}")
    rest = sys.argv[1:] if argv is None else list(argv)
    if given.method:  # the rest is for twosome.py
        i = next(i for i, word in enumerate(rest) if word.startswith("--method"))
        del rest[i:i + (1 if "=" in rest[i] else 2)]
    twosome.main(rest, {"method": method} | OWN.get(method, {}), make_agent, PLAYS[method])


if __name__ == "__main__":
    main()
