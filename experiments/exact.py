"""How good is an agent exactly? python experiments/exact.py RUN [RUN ...]

The environments are small and nothing in them is random, so success and discounted return follow
from the probabilities of the actions alone: all states that can be reached are listed, the agent is
asked once in each, and from its answers the expected outcome is computed backwards in time. Printed
beside it: the mean of the 100 sampled episodes that the run itself ended with.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import baselines  # noqa: E402
import overcooked_text  # noqa: E402
import twosome  # noqa: E402
import virtualhome_text  # noqa: E402

# Primitive steps after which an episode is cut.
LIMIT = {"overcooked": overcooked_text.MAX_STEPS, "virtualhome": virtualhome_text.MAX_STEPS}


def reachable(episode) -> tuple[list, dict[str, np.ndarray]]:
    """All states that can be reached, breadth first, the clock aside. Returns what the agent is
    shown in each of S states, and an array (E,) for each property of the E pairs of a state and an
    action that is offered there: "before" and "after", the numbers of the states (an end is -1);
    "reward", discounted within the action; "steps", primitive ones; "success"."""
    queue = [episode.env.get_state()]  # grows while it is read
    number = {None: -1, json.dumps(queue[0], sort_keys=True): 0}
    shown, edges = [], []
    for before, state in enumerate(queue):
        episode.obs, episode.info = episode.env.set_state(state)
        shown.append(episode.state())
        for chosen in range(len(episode.info["actions"])):
            episode.obs, episode.info = episode.env.set_state(state)
            episode.ret, episode.length = 0.0, 0
            _, _, terminated, _ = episode.act(chosen)
            following = episode.env.get_state() | {"steps": 0}
            key = None if terminated else json.dumps(following, sort_keys=True)
            if key not in number:
                number[key] = len(queue)
                queue.append(following)
            edges.append((before, number[key], episode.ret, episode.length,
                          episode.info["success"]))
    columns = "before", "after", "reward", "steps", "success"
    return shown, dict(zip(columns, map(np.array, zip(*edges))))


def exact(agent, args, plays=twosome.Episode) -> tuple[float, float]:
    """The expected success and discounted return of an episode.

        V(s, n) = sum_a pi(a | s) (r + gamma^k V(s', n - k)),   0 at an end and for n <= 0

    n: primitive steps until the limit, which an action of k steps may run over. Success: the same
    with 1 for a reward that ends in success, and without gamma.
    """
    shown, edge = reachable(twosome.make_episode(args, plays))
    states = list(dict.fromkeys(shown))  # the agent does not see everything
    policy = dict(zip(states, agent.remembered_log_policy(states)))
    probability = np.concatenate([policy[state].exp().double().numpy() for state in shown])
    outcome = []
    for reward, gamma in ((edge["success"], 1.0), (edge["reward"], args.gamma)):
        # V(s, n) at [n, s]; the last column, which "after" calls -1, is that of an end.
        value = np.zeros((LIMIT[args.env] + 1, len(shown) + 1))
        for n in range(1, len(value)):
            later = value[np.maximum(n - edge["steps"], 0), edge["after"]]
            following = reward + gamma ** edge["steps"] * later
            value[n, :-1] = np.bincount(edge["before"], probability * following)
        outcome.append(value[-1, 0].item())
    return tuple(outcome)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    for run in parser.parse_args().runs:
        try:
            args, agent = baselines.load_run(run)
        except (ValueError, OSError) as error:
            raise SystemExit(f"exact.py: {error}") from None
        success, ret = exact(agent, args, baselines.PLAYS[args.method])
        print(f"{run}: success {success:.4f}, discounted return {ret:.4f}")
        if (run / "summary.json").exists():
            summary = json.loads((run / "summary.json").read_text())
            print("  sampled: " + twosome.describe(summary["after"] or summary["before"]))


if __name__ == "__main__":
    main()
