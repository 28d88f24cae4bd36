"""Other agents: PPO without a language model, a language model without PPO, and random choice.

    python experiments/baselines.py --method ppo --env overcooked
    python experiments/baselines.py --method saycan --env virtualhome
    python experiments/baselines.py --method random --task tomato-lettuce-salad

A baseline is an agent of another kind, and it may see the environment in another way. All else is
twosome.py: the flags, the training loop, the folder of a run. --resume and --evaluate need no
--method, as the folder names it.
"""

import json
import signal
import sys
from argparse import ArgumentParser
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import lamp  # noqa: E402, F401 -- it adds the environment "lamp"
from twosome import Agent, TextEnv, UserError, require  # noqa: E402

# Where a method's settings differ from TWOSOME's. Those of PPO were searched in the same way.
DEFAULTS = {
    "ppo": {
        "epochs": 10,
        "policy_lr": 1e-3,
        "target_kl": 0.05,
        "rehearsal_coef": 0.0,
        "max_prompts": 1024,
    },
    "saycan": {"rehearsal_coef": 0.0},
    "random": {"steps": 0, "rehearsal_coef": 0.0},
}


class Baseline(Agent):
    """An agent without LoRA: `model` acts, and `critic` is what is learned beside it."""

    def __init__(self, model, critic, settings):
        nn.Module.__init__(self)  # Agent's would ask for an LM.
        self.model = model
        self.critic = critic
        self.settings = settings
        self.actor_optimizer = twosome.make_optimizer(model)
        self.critic_optimizer = twosome.make_optimizer(critic)
        self.extra_loss = None
        self.policy_cache, self.feature_cache = {}, {}


def make_mlp(n_inputs, n_outputs, gain):
    """Two hidden layers of 64 units with orthogonal weights, as PPO usually has them."""
    layers = []
    for n_in, n_out, g in ((n_inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, n_outputs, gain)):
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, g)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# === PPO from scratch =============================================================================
def vector(info):
    """The symbolic observation, as a tuple."""
    require("vector" in info, "this environment has no symbolic observation, info['vector']")
    return tuple(map(float, info["vector"]))


class SymbolicEnv(TextEnv):
    """Shows numbers: the symbolic observation, and the indices of the offered actions."""

    def state(self):
        return vector(self.info), tuple(self.info["actions"])


class SymbolicAgent(Baseline):
    """Actor and critic are small networks on the symbolic observation."""

    wrapper = SymbolicEnv

    def __init__(self, settings, n_inputs, n_actions):
        # Nearly uniform at first, and V = 0 at first, as for TWOSOME.
        actor = make_mlp(n_inputs, n_actions, gain=0.01)
        critic = make_mlp(n_inputs, 1, gain=0.0)
        super().__init__(actor, critic, settings)

    def log_policy(self, states):
        logits = self.model(self.features(states))  # (B, all actions)
        policies = []
        for row, (_, offered) in zip(logits, states, strict=True):
            policies.append(F.log_softmax(row[list(offered)], dim=-1))
        return policies

    def features(self, states):
        return torch.tensor([numbers for numbers, _ in states])


# === SayCan =======================================================================================
class SkillEnv(TextEnv):
    """Shows words and numbers. An action earns 1 when it succeeds, and nothing after it counts. It
    succeeds when it changes the state, whether that serves the goal or not."""

    def state(self):
        prompt, _ = super().state()
        return (prompt, vector(self.info)), tuple(self.info["actions"].items())

    def world(self):
        """The state without what changes by itself."""
        clock = "steps", "over", "running"
        return {name: x for name, x in self.env.get_state().items() if name not in clock}

    def step(self, choice):
        before = self.world()
        super().step(choice)
        return float(self.world() != before), 0.0


class SayCan(Baseline):
    """SayCan (Ahn et al., 2022): what is sensible, in the eyes of a frozen LM, times what works.

        pi(a | s) ~ P_LM(a | s) * P(a succeeds | s)

    The second factor, the affordance, is learned from the agent's own exploration."""

    wrapper = SkillEnv

    def __init__(self, settings, n_inputs, n_actions):
        lm = twosome.make_agent(settings).requires_grad_(False)
        super().__init__(lm, make_mlp(n_inputs, n_actions, gain=0.01), settings)

    def affordance(self, states):
        """Logits of the offered actions' success, near 0 at first: B tensors (K,)."""
        logits = self.critic(torch.tensor([numbers for (_, numbers), _ in states]))
        offered = [list(dict(actions)) for _, actions in states]  # their indices
        return [row[indices] for row, indices in zip(logits, offered, strict=True)]

    def log_policy(self, states):
        # The LM never changes, so its policy is cached for good.
        texts = []
        for (prompt, _), actions in states:
            texts.append((prompt, tuple(dict(actions).values())))
        says = self.model.cached_log_policy(texts)
        can = self.affordance(states)
        scores = [say + F.logsigmoid(c) for say, c in zip(says, can, strict=True)]
        return [F.log_softmax(score, dim=-1) for score in scores]

    def value(self, states):
        return torch.zeros(len(states))

    def learn(self, rollout, remaining, rng):
        """Cross-entropy of the predicted success of each action taken.

        L = -mean [ y log p + (1 - y) log(1 - p) ],  y = 1 if the action changed the state
        """
        losses = []
        settings = self.settings
        lr = remaining * settings.value_lr
        epochs, parts = settings.value_epochs, settings.minibatches
        for batch in twosome.minibatches(len(rollout.states), epochs, parts, rng):
            logits = self.affordance([rollout.states[i] for i in batch])
            chosen = [row[rollout.choice[i]] for row, i in zip(logits, batch, strict=True)]
            # With V = 0 and a discount of 0 the return is the action's own reward.
            y = rollout.returns[batch]
            loss = F.binary_cross_entropy_with_logits(torch.stack(chosen), y)
            self.critic_optimizer.zero_grad()
            loss.backward()
            twosome.take_step(self.critic_optimizer, lr, settings.max_grad_norm)
            losses.append(loss.item())
        self.policy_cache.clear()
        return {"value_loss": sum(losses) / len(losses)}


# === Random choice ================================================================================
class RandomAgent(Baseline):
    """Chooses uniformly among the offered actions, and learns nothing."""

    def __init__(self, settings):
        super().__init__(nn.Identity(), nn.Identity(), settings)

    def log_policy(self, states):
        return [torch.zeros(len(offered)).log_softmax(-1) for _, offered in states]

    def value(self, states):
        return torch.zeros(len(states))

    def learn(self, rollout, remaining, rng):
        return {}


# === The command line =============================================================================
def make_agent(settings, method):
    if method == "twosome":
        return twosome.make_agent(settings)
    if method == "random":
        return RandomAgent(settings)
    env = twosome.ENVS[settings.env](settings.task, settings.gamma)
    _, info = env.reset()
    kind = SymbolicAgent if method == "ppo" else SayCan
    return kind(settings, len(vector(info)), env.n_actions)


def read_method(folder):
    """The method of a run."""
    twosome.read_config(folder)  # It says what is wrong with another folder.
    return json.loads(Path(folder, "config.json").read_text())["method"]


def load_run(folder, **changes):
    """Return (settings, agent) of a run of any method. `changes` are to the settings. The agent is
    there to be looked at, and so it does not write the texts that training rehearses."""
    settings = twosome.make_settings(**twosome.read_config(folder, **changes))
    method = read_method(folder)
    agent = make_agent(replace(settings, rehearsal_coef=0.0), method)
    twosome.Run(folder, settings, method).load(agent)
    return settings, agent


def main(argv=(), program="experiments/baselines.py"):
    parser = ArgumentParser(
        usage="%(prog)s --method METHOD [--FLAG VALUE ...]",
        epilog="The other flags are those of twosome.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--method", choices=DEFAULTS, help="what acts and learns")
    given, rest = parser.parse_known_args(argv)
    modes = ArgumentParser(add_help=False, allow_abbrev=False)
    modes.add_argument("--resume", "--evaluate", dest="run")
    run = modes.parse_known_args(rest)[0].run
    try:
        method = read_method(run) if run else given.method
        require(method, f"choose a --method: {', '.join(DEFAULTS)}")
        require(given.method in (None, method), f"{run} is a run of the method {method}")
    except UserError as error:
        sys.exit(f"{program}: {error}")
    return twosome.main(
        rest,
        method=method,
        defaults=DEFAULTS.get(method),
        make_agent=partial(make_agent, method=method),
        program=program,
    )


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early.
    main(sys.argv[1:], program=sys.argv[0])
