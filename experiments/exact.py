"""How good is an agent exactly? python experiments/exact.py RUN [RUN ...]

The environments are small, and nothing in them is random. So success and discounted return follow
from the probabilities of the actions alone: all states that can be reached are listed, the agent is
asked once in each, and its answers give the expected outcome, computed backwards in time. Beside it
stands the mean of the 100 sampled episodes with which the run itself ended.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import baselines  # noqa: E402


def time_limit(settings):
    """The primitive steps after which an episode is cut: MAX_STEPS beside the environment."""
    name = twosome.ENVS[settings.env].__module__
    limit = getattr(sys.modules[name], "MAX_STEPS", None)
    twosome.require(limit, f"{name}.py has no MAX_STEPS, the time limit")
    return limit


def set_state(env, state):
    """Put a wrapped environment into a state, as if an episode began there."""
    env.reset()
    env.obs, env.info = env.env.set_state(state)


def reachable(env):
    """All states that can be reached, breadth first, without their clock ("steps").

    Returns what the agent sees in each of S states, and a dict of tensors (E,) about the E pairs of
    a state and an action that is offered there: "before" and "after" are numbers of states, where
    an end is -1; "reward" is discounted within the action; "steps" are its primitive steps."""
    states = [env.env.get_state()]  # It grows while it is read.
    numbers = {json.dumps(states[0], sort_keys=True): 0}
    seen, edges = [], []
    for before, state in enumerate(states):
        set_state(env, state)
        seen.append(env.state())
        for choice in range(len(env.info["actions"])):
            set_state(env, state)
            env.step(choice)
            after = -1
            if not env.done:  # At the start of an episode the goal alone can end it.
                following = env.env.get_state() | {"steps": 0}
                key = json.dumps(following, sort_keys=True)
                after = numbers.setdefault(key, len(states))  # a known number, or a new one
                if after == len(states):
                    states.append(following)
            success = float(env.info["success"])
            edges.append((before, after, env.discounted_return, env.length, success))
    names = "before", "after", "reward", "steps", "success"
    columns = map(torch.tensor, zip(*edges, strict=True))
    return seen, dict(zip(names, columns, strict=True))


def expected(edges, probability, reward, gamma, limit):
    """The expected sum of discounted rewards of an episode.

        V(s, n) = sum_a pi(a | s) (r + gamma^k V(s', n - k)),   0 at an end and for n <= 0

    n is the number of primitive steps until the limit. An action of k steps may run over it."""
    discount = gamma ** edges["steps"].double()
    n_states = int(edges["before"].max()) + 1
    # V(s, n) stands at [n, s]. The last column, which "after" calls -1, is that of an end.
    value = torch.zeros(limit + 1, n_states + 1, dtype=torch.double)
    for n in range(1, limit + 1):
        later = value[(n - edges["steps"]).clamp(min=0), edges["after"]]
        outcome = probability * (reward + discount * later)
        value[n].index_add_(0, edges["before"], outcome)
    return value[limit, 0].item()


def exact(agent, settings):
    """The expected success and discounted return of an episode."""
    seen, edges = reachable(twosome.make_env(agent, settings))
    distinct = list(set(seen))  # Different states may look alike.
    policies = dict(zip(distinct, agent.cached_log_policy(distinct), strict=True))
    probability = torch.cat([policies[state] for state in seen]).double().exp()
    limit = time_limit(settings)
    success = expected(edges, probability, edges["success"], 1.0, limit)
    return success, expected(edges, probability, edges["reward"], settings.gamma, limit)


def report(run):
    settings, agent = baselines.load_run(run)
    success, discounted = exact(agent, settings)
    print(f"{run}: success {success:.4f}, discounted return {discounted:.4f}")
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        print(f"  sampled: {twosome.describe(summary['after'])}")


def main(argv=()):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    try:
        for run in parser.parse_args(argv).runs:
            report(run)
    except (twosome.UserError, OSError) as error:
        sys.exit(f"exact.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
