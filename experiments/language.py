"""Has an agent's LM kept its language?

    python experiments/language.py RUN [RUN ...]                                # for pocket_lm
    python experiments/language.py RUN --wikitext FILE --blimp FOLDER_OR_ZIP    # for a real LM

It prints two numbers for the untrained LM (adapter off) and for the trained one (adapter on): a
perplexity, and how often the LM prefers the right one of several texts.

pocket_lm is measured on texts of make_pocket_lm.py that it has not read, and on the true ending of
such a text among four. A real LM is measured on the first 40 windows of 512 tokens of WikiText-2
(test, a text file), and on BLiMP (Warstadt et al., 2020): the first 20 pairs of a right and a wrong
sentence in each of its 67 files (.jsonl, in a folder or a zip).

The data are not in this repository. They are in github.com/pytorch/examples (CC BY-SA, file
word_language_model/data/wikitext-2/test.txt) and github.com/alexwarstadt/blimp (CC BY, data/).
lm-evaluation-harness says more. It takes a run by --model_args pretrained=MODEL,peft=RUN/adapter.
"""

import functools
import json
import math
import random
import re
import sys
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket_lm")]
import make_pocket_lm  # noqa: E402

import twosome  # noqa: E402
from experiments import baselines  # noqa: E402
from twosome import UserError, chunks, encode, plain_log_probs, require  # noqa: E402


# === pocket_lm ====================================================================================
@functools.cache
def held_out():
    """The texts that pocket_lm has not read. A few are equal to one that it has, and go."""
    texts = make_pocket_lm.write_corpus()
    read = set(texts[:-1000])
    return [text for text in texts[-1000:] if text not in read]


@functools.cache
def cloze():
    """Return 200 beginnings of held-out texts, and four endings of each: the true one, and then
    three endings of other texts, with the same first word. Chance is right in one of four."""
    rng, halves = random.Random(0), []
    for text in held_out():
        words = text.split(" ")
        last_sentence = re.split(r"(?<=[.!?]) ", text)[-1]
        n = len(last_sentence.split()) // 2
        if n >= 2:
            halves.append((" ".join(words[:-n]), " ".join(words[-n:])))
    same_first_word = {}
    for ending in sorted({ending for _, ending in halves}):
        same_first_word.setdefault(ending.split()[0], []).append(ending)
    questions = []
    for beginning, true in halves:
        others = [ending for ending in same_first_word[true.split()[0]] if ending != true]
        if len(others) >= 3:
            questions.append((beginning, (true, *rng.sample(others, 3))))
    return rng.sample(questions, 200)


@torch.no_grad()
def language(model, tokenizer):
    """Return perplexity, and accuracy by the log-probability per token."""
    nats, n = 0.0, 0
    for texts in chunks(held_out(), 32):
        rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
        # The padding comes after the text and needs no mask. -100 does not count.
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)
        n_predicted = (labels[:, 1:] != -100).sum().item()
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        nats += loss.item() * n_predicted
        n += n_predicted
    right = []
    for beginning, endings in cloze():
        encoded = encode(tokenizer, beginning, endings)
        (log_probs,) = plain_log_probs(model, [encoded])
        scores = twosome.normalize(log_probs, encoded[1], None, "token")
        right.append(scores.argmax().item() == 0)
    return math.exp(nats / n), sum(right) / len(right)


# === A real LM ====================================================================================
def read_blimp(path):
    """The texts of BLiMP's 67 files, by name."""
    texts = {}
    if path.is_dir():
        for file in path.rglob("[!.]*.jsonl"):
            texts[file.name] = file.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".jsonl") and "/." not in name:  # macOS puts more in.
                    texts[Path(name).name] = archive.read(name).decode()
    require(len(texts) == 67, f"{path} has {len(texts)} of BLiMP's 67 .jsonl files")
    return [texts[name] for name in sorted(texts)]


@torch.no_grad()
def real_language(model, tokenizer, wikitext, blimp, score=plain_log_probs):
    """Return perplexity on WikiText-2, and accuracy on BLiMP by whole sentences' log P. An agent's
    own `score` finds that log P faster."""
    ids = tokenizer(wikitext.read_text(encoding="utf-8"))["input_ids"]
    losses = []
    for window in chunks(ids[: 40 * 512], 512):
        # The first token is given, the others are predicted.
        (log_prob,) = plain_log_probs(model, [(window[:1], [window[1:]])])
        losses.append(-log_prob.item() / (len(window) - 1))
    begin = tokenizer.bos_token_id
    require(begin is not None, "this LM has no token for the beginning of a text")
    pairs = []
    for text in read_blimp(blimp):
        for line in text.splitlines()[:20]:
            pair = json.loads(line)
            sentences = [pair["sentence_good"], pair["sentence_bad"]]
            rows = tokenizer(sentences, add_special_tokens=False)["input_ids"]
            pairs.append(([begin], rows))
    right = []
    for chunk in chunks(pairs, 8):
        right += [(good > bad).item() for good, bad in score(model, chunk)]
    return math.exp(sum(losses) / len(losses)), sum(right) / len(right)


# === The command line =============================================================================
def compare(run, wikitext, blimp):
    """Print how well a run's LM knows its language, untrained and trained."""
    _, agent = baselines.load_run(run, device="cpu")
    require(hasattr(agent, "tokenizer"), f"{run} has trained no LM")
    is_small = agent.model.num_parameters() < 1e7
    require(is_small or wikitext, "a real LM needs --wikitext and --blimp")
    lm = agent.model, agent.tokenizer
    measure = functools.partial(language, *lm)
    if wikitext:
        measure = functools.partial(real_language, *lm, wikitext, blimp, agent.score)
    with agent.model.disable_adapter():
        perplexity_0, accuracy_0 = measure()
    perplexity, accuracy = measure()
    change = perplexity / perplexity_0 - 1
    print(f"{run}: perplexity {perplexity_0:.3f} -> {perplexity:.3f} ({change:+.1%}), ", end="")
    print(f"right {accuracy_0:.3f} -> {accuracy:.3f}", flush=True)


def main(argv=()):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--wikitext", type=Path, help="WikiText-2's test text")
    parser.add_argument("--blimp", type=Path, help="BLiMP's files, a folder or a zip")
    given = parser.parse_args(argv)
    try:
        together = (given.wikitext is None) == (given.blimp is None)
        require(together, "--wikitext and --blimp go together")
        for run in given.runs:
            compare(run, given.wikitext, given.blimp)
    except (UserError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"language.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
