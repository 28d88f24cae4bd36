"""Has an agent's LLM kept its language?

    python experiments/language.py RUN [RUN ...]                                 # for pocket_lm
    python experiments/language.py RUN --wikitext FILE --blimp FOLDER_OR_ZIP     # for a real LLM

Prints two numbers for the LLM before training (adapter off) and after (adapter on): a perplexity,
and how often it prefers the right one of several texts.

pocket_lm: on texts of make_pocket_lm.py that it was not trained on; the true ending of a text among
four. A real LLM: on the first 40 windows of 512 tokens of WikiText-2 (test, a text file); on the
first 20 minimal pairs of each of the 67 files of BLiMP (Warstadt et al., 2020; .jsonl, in a folder
or a zip), a right and a wrong sentence. The data are not in this repository:
github.com/pytorch/examples (word_language_model/data/wikitext-2/test.txt, CC BY-SA) and
github.com/alexwarstadt/blimp (data/*.jsonl, CC BY). lm-evaluation-harness says more:
it takes a run's adapter by --model_args pretrained=MODEL,peft=RUN/adapter.
"""

import argparse
import functools
import json
import math
import random
import re
import sys
import zipfile
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


@torch.no_grad()
def real_language(model, tokenizer, wikitext: Path, blimp: Path) -> tuple[float, float]:
    """(perplexity on WikiText-2, accuracy on BLiMP by the log-probability of whole sentences)."""
    ids = tokenizer(wikitext.read_text(encoding="utf-8"))["input_ids"][:40 * 512]
    windows = [ids[i:i + 512] for i in range(0, len(ids), 512)]  # the first token is given
    losses = [-twosome.score(model, [(window[:1], [window[1:]])])[0].item() / (len(window) - 1)
              for window in windows]
    pairs = [json.loads(line) for text in read_blimp(blimp) for line in text.splitlines()[:20]]
    begin, right = tokenizer.bos_token_id, 0
    encode = lambda sentence: tokenizer(sentence, add_special_tokens=False)["input_ids"]
    for i in range(0, len(pairs), 8):
        scores = twosome.score(model, [
            ([begin], [encode(pair["sentence_good"]), encode(pair["sentence_bad"])])
            for pair in pairs[i:i + 8]])
        right += sum(int(good > bad) for good, bad in scores)
    return math.exp(sum(losses) / len(losses)), right / len(pairs)


def read_blimp(path: Path) -> list[str]:
    """The texts of its 67 files, by name."""
    if path.is_dir():
        texts = {file.name: file.read_text(encoding="utf-8") for file in path.rglob("[!.]*.jsonl")}
    else:
        with zipfile.ZipFile(path) as archive:
            texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist()
                     if name.endswith(".jsonl") and "/." not in name}  # macOS puts more in
    if len(texts) != 67:
        raise ValueError(f"{path} has {len(texts)} of BLiMP's 67 .jsonl files")
    return [texts[name] for name in sorted(texts)]


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
    parser.add_argument("--wikitext", type=Path, help="WikiText-2's test text; needs --blimp too")
    parser.add_argument("--blimp", type=Path, help="BLiMP's files, a folder or a zip")
    given = parser.parse_args()
    if (given.wikitext is None) != (given.blimp is None):
        raise SystemExit("language.py: --wikitext and --blimp go together")
    if given.wikitext:
        right, measure = "BLiMP", functools.partial(
            real_language, wikitext=given.wikitext, blimp=given.blimp)
    else:
        right, measure = "true ending of four", language
    print(f"run, perplexity before -> after (change), {right} before -> after", flush=True)
    for run in given.runs:
        try:
            agent = load(run)
            if not given.wikitext and agent.model.num_parameters() > 1e7:
                raise ValueError("a real LLM needs --wikitext and --blimp; the head of this script "
                                 "says where they are")
            with agent.model.disable_adapter():
                before = measure(agent.model, agent.tokenizer)
            after = measure(agent.model, agent.tokenizer)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"language.py: {run}: {error}") from None
        print(f"{run}, {before[0]:.3f} -> {after[0]:.3f} ({after[0] / before[0] - 1:+.1%}), "
              f"{before[1]:.3f} -> {after[1]:.3f}")


if __name__ == "__main__":
    main()
