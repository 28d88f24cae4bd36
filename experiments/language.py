"""Has an agent's LLM kept its language? python experiments/language.py RUN [RUN ...]

Prints, for the LLM before training (adapter off) and after (adapter on): the perplexity on texts of
make_pocket_lm.py that pocket_lm was not trained on, and how often it prefers the true ending of a
text among four. It says something about pocket_lm; for another LLM these are just short English
texts, and lm-evaluation-harness says more (README).
"""

import argparse
import functools
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket_lm")]

import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

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
        rows = [torch.tensor(ids) for ids in tokenizer(held_out()[i:i + 32])["input_ids"]]
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)  # -100: not counted
        predicted = (labels[:, 1:] != -100).sum().item()
        # No mask is needed: the padding comes after the text.
        nats += model(input_ids=labels.clamp(min=0), labels=labels).loss.item() * predicted
        n += predicted
    for i in range(0, len(prompts), 4):
        scores = twosome.normalize(*twosome.action_log_probs(
            model, tokenizer, prompts[i:i + 4], endings[i:i + 4]), None, "token")
        right += sum(int(score.argmax()) == 0 for score in scores)
    return math.exp(nats / n), right / len(prompts)


def load(run: Path) -> twosome.Agent:
    """The agent of a run, on the CPU. What it was trained on plays no part here."""
    config = json.loads((run / "config.json").read_text())
    if config["method"] != "twosome":
        raise ValueError(f"{config['method']} trains no LLM")
    agent = twosome.make_agent(SimpleNamespace(**config | {"device": "cpu"}))
    twosome.load_checkpoint(run, agent)
    return agent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    runs = parser.parse_args().runs
    print("run, perplexity before -> after (change), true ending of four before -> after")
    for run in runs:
        try:
            agent = load(run)
            with agent.model.disable_adapter():
                before = language(agent.model, agent.tokenizer)
            after = language(agent.model, agent.tokenizer)
        except (ValueError, OSError) as error:
            raise SystemExit(f"language.py: {run}: {error}") from None
        print(f"{run}, {before[0]:.3f} -> {after[0]:.3f} ({after[0] / before[0] - 1:+.1%}), "
              f"{before[1]:.3f} -> {after[1]:.3f}")


if __name__ == "__main__":
    main()
