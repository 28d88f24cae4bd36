"""See an agent decide, step by step: on Enter, or every --pace seconds.

    python experiments/watch.py runs/tomato-salad-word-seed1
    python experiments/watch.py --env virtualhome --tokens    # no RUN: the untrained LLM
    python experiments/watch.py --method random

Plain characters only and no control codes, so it reads the same in a pipe or a notebook, where it
does not wait.
"""

import argparse
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import baselines  # noqa: E402
import twosome  # noqa: E402
from twosome import Agent, Episode, encode, plain_log_probs  # noqa: E402


@torch.no_grad()
def token_log_probs(agent: Agent, prompt: str, phrase: str) -> tuple[list[str], list[float]]:
    """The tokens of an action and the log-probability of each, given those before it: the
    difference between two joint ones, with it and without it."""
    prompt_ids, (ids,) = encode(agent.tokenizer, prompt, (phrase,))
    beginnings = [ids[:n] for n in range(1, len(ids) + 1)]
    (joint,) = plain_log_probs(agent.model, [(prompt_ids, beginnings)])
    own = torch.cat([joint[:1], joint.diff()]).tolist()
    return [agent.tokenizer.decode([i]).strip() or "_" for i in ids], own


def token_lines(agent: Agent, prompt: str, phrases, trained: bool):
    """For each action its tokens and what normalisation makes of their sum: if the agent was
    trained, before that (the adapter off) and after."""
    for phrase in phrases:
        yield phrase
        passes = {"after" if trained else "log P": token_log_probs(agent, prompt, phrase)}
        if trained:
            with agent.model.disable_adapter():
                passes = {"before": token_log_probs(agent, prompt, phrase)} | passes
        for when, (tokens, own) in passes.items():
            total, n_words = sum(own), len(phrase.split())
            yield f"    {when + ':':8}" + " ".join(f"{t} {x:.2f}" for t, x in zip(tokens, own))
            yield (f"            sum {total:.2f};  / {len(own)} tokens = {total / len(own):.2f};  "
                   f"/ {n_words} words = {total / n_words:.2f}")


def watch(agent: Agent, args, plays, tokens: bool = False, pace: float | None = None):
    """Play an episode in the terminal."""
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 120))
    decisions = twosome.play(agent, args, plays)
    # One of LoRA's two factors is 0 until the first update.
    trained = any("lora_B" in name and p.any() for name, p in agent.named_parameters())
    for number, (episode, before, after, action) in enumerate(decisions, start=1):
        prompt, phrases = Episode.state(episode)  # in words, also where a baseline sees numbers
        print(f"\n{f' decision {number} ':-^{width}}\n{episode.env.render()}\n")
        print(textwrap.fill(f"{prompt} ...", width))
        before = before if trained else None
        policies = [after.exp()] if before is None else [before.exp(), after.exp()]
        size = (width - 44) // 2 - 6  # of a bar; the phrase has at least 38 columns
        names = ["probability"] if before is None else ["before training", "after training"]
        print("\n  " + "".join(f"{name[:size + 5]:<{size + 6}}" for name in names).rstrip())
        for k, phrase in enumerate(phrases):
            bars = "".join(f"{p[k]:.2f} {'#' * round(p[k].item() * size):<{size}} "
                           for p in policies)
            mark = ">" if k == action else " "
            print(textwrap.fill(phrase, width, initial_indent=f"{mark} {bars}",
                                subsequent_indent=" " * (len(bars) + 4)))
        if tokens:
            print("\nlog-probability of each token:")
            for line in token_lines(agent, prompt, phrases, trained):
                print(textwrap.fill(line, width, initial_indent="  ",
                                    subsequent_indent=" " * 14))
        value = (f"value {agent.value([episode.state()]).item():.3f}, "
                 if trained or args.method == "ppo" else "")  # other critics know nothing yet
        print(f"\n{value}discounted return so far {episode.ret:.3f}, step {episode.length}")
        if pace is not None:
            time.sleep(pace)
        elif sys.stdin.isatty() and input("Enter: next decision, q: quit ").strip() == "q":
            return
    end = "reached the goal" if episode.info["success"] else "ran out of time"
    print(f"\n{episode.env.render()}\n\nThe agent {end} after {episode.length} primitive steps.\n"
          f"Discounted return {episode.ret:.3f} (best: {episode.env.OPTIMUM[args.task]:.3f}).")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", metavar="RUN", type=Path)
    parser.add_argument("--env", choices=tuple(twosome.ENVS))
    parser.add_argument("--task")
    parser.add_argument("--norm", choices=("word", "token", "none"))
    parser.add_argument("--model")
    parser.add_argument("--method", choices=("random",), help="without RUN: not the LLM")
    parser.add_argument("--seed", type=int, help="another episode")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--tokens", action="store_true", help="the tokens of each action")
    parser.add_argument("--pace", type=float, help="seconds for each decision, instead of Enter")
    given = vars(parser.parse_args(argv))
    run, tokens, pace = given.pop("run"), given.pop("tokens"), given.pop("pace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" may leave early
    try:
        given = {name: x for name, x in given.items() if x is not None}
        if run:
            args, agent = baselines.load_run(run, **given)
        else:
            args = twosome.Args(**given)
            agent = baselines.make_agent(args)
        if tokens and args.method != "twosome":
            raise ValueError(f"--tokens: {args.method} has no tokens to show")
        watch(agent, args, baselines.PLAYS[args.method], tokens, pace)
    except (ValueError, OSError) as error:
        raise SystemExit(f"watch.py: {error}") from None
    except (KeyboardInterrupt, EOFError):  # as good as q
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
