"""See an agent decide, step by step: on Enter, or every --pace seconds.

    python experiments/watch.py runs/tomato-salad-word-seed1
    python experiments/watch.py --env virtualhome --tokens    # no RUN: the untrained LM
    python experiments/watch.py --method random

It writes plain text, which reads the same in a pipe or a notebook. There it does not wait.
"""

import random
import shutil
import signal
import sys
import textwrap
import time
from argparse import ArgumentParser
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import twosome  # noqa: E402
from experiments import baselines  # noqa: E402
from twosome import TextEnv, UserError, encode, plain_log_probs, require  # noqa: E402


def policies_to_show(agent):
    """Name -> a context in which the agent has the policy of that name."""
    lora_b = [p for name, p in agent.named_parameters() if "lora_B" in name]
    if any(p.any() for p in lora_b):  # They are 0 until the first gradient step.
        return {"untrained": agent.model.disable_adapter, "now": nullcontext}
    return {"": nullcontext}


def token_log_probs(agent, prompt, phrase):
    """The tokens of an action, and the log-probability of each after those before it. That is the
    difference between two joint ones, with the token and without it."""
    prompt_ids, (ids,) = encode(agent.tokenizer, prompt, (phrase,))
    beginnings = [ids[: n + 1] for n in range(len(ids))]
    (joint,) = plain_log_probs(agent.model, [(prompt_ids, beginnings)])
    own = joint.cpu().diff(prepend=torch.zeros(1))
    tokens = [agent.tokenizer.decode([i]).strip() or "_" for i in ids]
    return tokens, own.tolist()


def show_tokens(agent, prompt, phrases, show):
    """Print each action's tokens, and what each normalisation makes of the sum of their log P."""
    print("\nlog-probability of each token:")
    for phrase in phrases:
        show(phrase)
        for name, policy in policies_to_show(agent).items():
            with policy():
                tokens, own = token_log_probs(agent, prompt, phrase)
            log_p, n_tokens, n_words = sum(own), len(own), len(phrase.split())
            parts = [f"{token}({x:.2f})" for token, x in zip(tokens, own, strict=True)]
            label = f"log P {name}".strip()
            show(f"    {label}: {' '.join(parts)}")
            by_token = f"/ {n_tokens} tokens = {log_p / n_tokens:.2f}"
            by_word = f"/ {n_words} words = {log_p / n_words:.2f}"
            show(f"        sum {log_p:.2f};  {by_token};  {by_word}")


def show_policies(agent, state, phrases, choice, width):
    """Print a bar for the probability of each action. The one that was drawn has a mark."""
    size = (width - 44) // 2 - 6  # of a bar, so that a phrase has at least 38 columns
    columns = []
    for name, policy in policies_to_show(agent).items():
        with policy():
            (log_pi,) = agent.log_policy([state])
        bars = [f"{p:.2f} {'#' * round(p * size):<{size}}" for p in log_pi.exp().tolist()]
        columns.append([f"{f'P {name}'[: size + 5]:<{size + 5}}", *bars])
    header, *rows = map(" ".join, zip(*columns, strict=True))
    print(f"\n  {header.rstrip()}")
    for place, (row, phrase) in enumerate(zip(rows, phrases, strict=True)):
        mark = ">" if place == choice else " "
        indent = " " * (len(row) + 5)
        print(textwrap.fill(f"{mark} {row} {phrase}", width, subsequent_indent=indent))


@torch.no_grad()
def watch(agent, settings, tokens, pace):
    """Play an episode in the terminal."""
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 120))
    show = partial(textwrap.fill, width=width, initial_indent="  ", subsequent_indent=" " * 14)
    rng = random.Random(f"watch, seed {settings.seed}")
    env = twosome.make_env(agent, settings)
    number = 0
    while not env.done:
        number += 1
        state = env.state()
        choice = twosome.sample(agent.cached_log_policy([state])[0], rng)
        prompt, phrases = TextEnv.state(env)  # in words, where a baseline sees numbers
        print(f"\n{f' decision {number} ':-^{width}}\n{env.env.render()}\n")
        print(textwrap.fill(f"{prompt} ...", width))
        show_policies(agent, state, phrases, choice, width)
        if tokens:
            show_tokens(agent, prompt, phrases, lambda line: print(show(line)))
        value = agent.value([state]).item()
        if value:  # It is 0 where no critic has learned anything.
            print(f"\nvalue of this state {value:.3f}")
        env.step(choice)
        print(
            f"\ndiscounted return so far {env.discounted_return:.3f}, primitive steps {env.length}"
        )
        if pace is not None:
            time.sleep(pace)
        elif sys.stdin.isatty() and input("Enter: next decision, q: quit ").strip() == "q":
            return
    end = "reached the goal" if env.info["success"] else "ran out of time"
    print(f"\n{env.env.render()}\n\nThe agent {end} after {env.length} primitive steps.")
    best = getattr(env.env, "OPTIMUM", {}).get(settings.task)
    best_possible = f" (the best possible: {best:.3f})" if best else ""
    print(f"Discounted return {env.discounted_return:.3f}{best_possible}.")


def parse(argv):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", metavar="RUN", type=Path)
    parser.add_argument("--env", choices=twosome.ENVS)
    parser.add_argument("--task")
    parser.add_argument("--norm", choices=("word", "token", "none"))
    parser.add_argument("--model")
    parser.add_argument("--method", choices=("random",), help="without RUN: not the LM")
    parser.add_argument("--seed", type=int, help="another episode")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--tokens", action="store_true", help="the tokens of each action")
    parser.add_argument("--pace", type=float, help="seconds for each decision, instead of Enter")
    given = vars(parser.parse_args(argv))
    return {name: x for name, x in given.items() if x is not None}


def main(argv=()):
    given = parse(argv)
    run, method = given.pop("run", None), given.pop("method", "twosome")
    tokens, pace = given.pop("tokens"), given.pop("pace", None)
    try:
        if run:
            settings, agent = baselines.load_run(run, **given)
        else:
            settings = twosome.make_settings(**given, rehearsal_coef=0.0)
            agent = baselines.make_agent(settings, method)
        has_tokens = hasattr(agent, "tokenizer")
        require(has_tokens or not tokens, "--tokens: this agent has none to show")
        watch(agent, settings, tokens, pace)
    except (UserError, OSError) as error:
        sys.exit(f"watch.py: {error}")
    except (KeyboardInterrupt, EOFError):  # as good as q
        sys.exit(130)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early.
    main(sys.argv[1:])
