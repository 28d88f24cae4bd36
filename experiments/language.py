"""Has an agent's LLM kept its language? python experiments/language.py RUN [RUN ...]

Prints, for the LLM before training (adapter off) and after (adapter on): the perplexity on texts of
make_pocket_lm.py that pocket_lm was not trained on, and how often it prefers the true ending of a
text among four. It says something about pocket_lm; for another LLM these are just short English
texts, and lm-evaluation-harness says more (README).
"""

import argparse
import functools
import math
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket_lm")]

import torch  # noqa: E402

import make_pocket_lm  # noqa: E402
import twosome  # noqa: E402


@functools.cache
def held_out() -> list[str]:
    """What make_pocket_lm.py kept from pocket_lm, without texts that happen to be in both parts."""
    texts = make_pocket_lm.write_corpus()
    read = set(texts[:-1000])
    return [text for text in texts[-1000:] if text not in read]


@functools.cache
def cloze() -> tuple[list[str], list[list[str]]]:
    """200 times a text whose last sentence is cut in the middle, and four endings, the true one
    first; the others are endings of other texts that begin with the same word. Chance is right in
    one of four."""
    rng, halves = random.Random(0), []
    for text in held_out():
        *_, last = re.split(r"(?<=[.!?]) ", text)
        n = len(last.split()) // 2
        words = text.split(" ")
        if n >= 2:
            halves.append((" ".join(words[:-n]), " ".join(words[-n:])))
    endings = sorted({ending for _, ending in halves})
    alike = {true: [x for x in endings if x != true and x.split()[0] == true.split()[0]]
             for true in endings}
    halves = rng.sample([(text, true) for text, true in halves if len(alike[true]) >= 3], 200)
    return ([beginning for beginning, _ in halves],
            [[true, *rng.sample(alike[true], 3)] for _, true in halves])


@torch.no_grad()
def language(model, tokenizer) -> tuple[float, float]:
    """(perplexity, accuracy of the true ending by log-probability per token)."""
    nats = n = right = 0
    prompts, endings = cloze()
    for i in range(0, len(held_out()), 32):
        batch = tokenizer(held_out()[i:i + 32], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        predicted = (labels[:, 1:] != -100).sum().item()
        nats += model(**batch, labels=labels).loss.item() * predicted
        n += predicted
    for i in range(0, len(prompts), 25):
        scores = twosome.normalize(*twosome.action_log_probs(
            model, tokenizer, prompts[i:i + 25], endings[i:i + 25]), None, "token")
        right += sum(int(score.argmax()) == 0 for score in scores)
    return math.exp(nats / n), right / len(prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    print("run, perplexity before -> after (change), true ending of four before -> after")
    for run in parser.parse_args().runs:
        try:
            args, agent = twosome.load_run(run, {"device": "cpu"})
        except twosome.UserError as error:
            raise SystemExit(f"language.py: {error}") from None
        if args.method != "twosome":
            raise SystemExit(f"language.py: {run} trained no LLM")
        with agent.model.disable_adapter():
            before = language(agent.model, agent.tokenizer)
        after = language(agent.model, agent.tokenizer)
        print(f"{run}, {before[0]:.3f} -> {after[0]:.3f} ({after[0] / before[0] - 1:+.1%}), "
              f"{before[1]:.3f} -> {after[1]:.3f}")


if __name__ == "__main__":
    main()
