"""Is your result right? For the exercises whose answer is a number or a piece of code.

    python experiments/lessons/check.py              # which exercises, and what each needs
    python experiments/lessons/check.py 2 -1.234     # the answer to exercise 2

It answers in one line. Where it knows the mistake, it names the mistake. It finds the truth by
itself, from pocket_lm and the environments. Only exercise 5 needs twosome.py for that, and there
the prompt in it does not matter.
"""

import csv
import importlib
import math
import runpy
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
logging.disable_progress_bar()
PROMPT = "{obs} The first step to {goal} is to"  # as in the unchanged twosome.py
END = 1  # the token with which pocket_lm ends a text


class Wrong(Exception):
    """Says in one line what is wrong with an answer."""


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def compare(answers, truth, tolerance, mistakes, relative=0.0):
    """Compare numbers with the truth, and else with what each usual mistake would give."""
    try:
        found = torch.tensor([float(answer) for answer in answers])
    except ValueError:
        raise Wrong(f"these are not all numbers: {' '.join(answers)}") from None

    def equals(numbers):
        numbers = torch.as_tensor(numbers)
        return ((found - numbers).abs() <= tolerance + relative * numbers.abs()).all()

    if not equals(truth):
        for message, numbers in mistakes.items():
            expect(not equals(numbers), message)
        raise Wrong("the result is wrong, and by no mistake that is known here")


# === What pocket_lm says ==========================================================================
@cache
def pocket_lm():
    path = ROOT / "pocket_lm"
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def tokens(text):
    return pocket_lm()[1](text)["input_ids"]


@torch.no_grad()
def log_probs(ids, n, shift=1):
    """log P of each of the last n tokens after those before it (n,). Without the shift it would be
    read from the logits at the token itself."""
    logits = pocket_lm()[0](torch.tensor([ids])).logits[0].roll(shift, 0)
    targets = torch.tensor(ids[-n:])[:, None]
    return logits[-n:].log_softmax(-1).gather(1, targets)[:, 0]


def of_phrase(prompt, phrase):
    """log P of each token of a phrase. No token of pocket_lm reaches across a blank."""
    ids = tokens(f"{prompt} {phrase}")
    return log_probs(ids, len(ids) - len(tokens(prompt)))


def policies(prompt, phrases):
    """The policy with each normalisation."""
    rows = [of_phrase(prompt, phrase) for phrase in phrases]
    total = torch.stack([row.sum() for row in rows])
    n_words = torch.tensor([len(phrase.split()) for phrase in phrases])
    n_tokens = torch.tensor([len(row) for row in rows])
    scores = {"word": total / n_words, "token": total / n_tokens, "none": total}
    return {norm: score.softmax(0) for norm, score in scores.items()}


# === The exercises ================================================================================
def think(norm, *answers):
    env = importlib.import_module("virtualhome_text").VirtualHomeText()
    obs, info = env.reset()
    prompt = PROMPT.format(obs=obs, goal=env.goal)
    by_norm = policies(prompt, info["actions"].values())
    expect(norm in by_norm, "the first answer is word, token or none")
    mistakes = {f"this is the policy of {name}": policy for name, policy in by_norm.items()}
    compare(answers, by_norm[norm], 0.011, mistakes)


def joint_probability(*answer):
    env = importlib.import_module("overcooked_text").OvercookedText()
    prompt = PROMPT.format(obs=env.reset()[0], goal=env.goal)
    phrase = "pick up the tomato"
    own, whole = of_phrase(prompt, phrase), tokens(f"{prompt} {phrase}")
    total, glued = own.sum(), tokens(phrase)  # Its first token is the one that begins a text.
    mistakes = {
        "the first token is missing": own[1:].sum(),
        "these are the logits at each token itself": log_probs(whole, len(own), shift=0).sum(),
        "there is a factor for the end of the text": log_probs([*whole, END], len(own) + 1).sum(),
        "the space is missing": log_probs(tokens(prompt) + glued[1:], len(glued) - 1).sum(),
        "prompt and action are no single text": log_probs(tokens(prompt) + glued, len(glued)).sum(),
        "this is P, not its logarithm": total.exp(),
        "the minus sign is missing": -total,
        "this is the log of a sum, not the sum of logs": own.exp().sum().log(),
        "this is divided by the number of words": total / 4,
    }
    compare(answer, total, 2e-4, mistakes)


def words_matter(word, task, *answer):
    wording = importlib.import_module("experiments.wording")
    first = PROMPT.removeprefix("{obs} ")
    words = {"first": first, "next": first.replace("first", "next")}
    words |= {"wrong": first.replace("first", "wrong"), "was": first.replace("is", "was")}
    expect(word in words, f"the first answer is one of {', '.join(words)}")
    expect(task in wording.TASKS, f"the second answer is one of {', '.join(wording.TASKS)}")
    lm, world = wording.load(str(ROOT / "pocket_lm")), wording.World(task)
    success = {}
    for name in ("first", word):
        success[name] = wording.untrained_success(lm, world, words[name])[0]
    unchanged = "this is the success with 'first': what stood in twosome.py when exact.py ran?"
    compare(answer, success[word], 2e-4, {unchanged: success["first"]})


def discounts(*answers):
    mistakes = {
        "what comes two primitive steps later is discounted once": [0.08, 0.9, 0.98],
        "within the macro-action nothing is discounted": [0.1, 0.81, 0.91],
        "the first primitive step has number 0, and no discount": [0.072, 0.81, 0.801],
        "the third primitive step has number 2": [0.08, 0.729, 0.809],
    }
    compare(answers, [0.08, 0.81, 0.89], 1e-3, mistakes)


def trained_weights(*answer):
    blocks = pocket_lm()[0].model.layers
    names = "q_proj.weight", "v_proj.weight"
    shapes = [p.shape for name, p in blocks.named_parameters() if name.endswith(names)]
    total = 32 * sum(n + m for m, n in shapes)
    mistakes = {
        "the critic is counted, too": total + 129 * 1024 + 1025 * 512 + 513,
        "one of the two matrices of each layer is missing": total / 2,  # All layers are square.
        "this is one block": total / len(blocks),
    }
    compare(answer, total, 0, mistakes)


def read_log(folder):
    """The columns of a run's metrics.csv, by name, without the seconds."""
    try:
        names, *rows = csv.reader(Path(folder, "metrics.csv").read_text().splitlines())
        log = dict(zip(names, zip(*rows, strict=True), strict=True))
        del log["seconds"]
    except (OSError, ValueError, KeyError):
        raise Wrong(f"{folder} is not the folder of a run that has learned") from None
    return log


def adapter_on(*folders):
    off, on = map(read_log, folders)
    first = [name for name in off if off[name][0] != on[name][0]]
    expect(off != on, "the two runs are the same: the change has no effect")
    expect(
        not first, "the first rows differ already: are the settings the same, and the gradients?"
    )
    second = off["value_loss"][1] != on["value_loss"][1]
    expect(second, "the critic sees in the second row what it saw: what is cached is out of date")


def mended(*folders):
    sound, planted = map(read_log, folders)
    late, now = (sum(map(float, log["value_loss"][8:])) for log in (sound, planted))
    expect(now < 3 * late, "the bug is still there")
    for name in sound:
        for a, b in zip(sound[name], planted[name], strict=True):
            same = math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-6)  # up to rounding
            expect(same, "closer, but not the same: in which ways can an episode end?")


def play(plan, chop_reward):
    """The return of a plan in the kitchen, and its primitive steps."""
    kitchen = importlib.import_module("overcooked_text")
    kitchen.CHOP_REWARD = chop_reward
    env, total, n = kitchen.OvercookedText(), 0.0, 0
    env.reset()
    for action in plan:
        _, reward, _, _, info = env.step(action)
        total += 0.99**n * reward
        n += info["primitive_steps"]
    return total, n


def never_serve(*answer):
    circle, honest = [0, 2, 4, 0, 3], [0, 2, 4, 0, 1, 3]
    gaps = []
    for chop_reward in (0.0, 1.0):
        (once, n), (twice, m) = play(circle, chop_reward), play(circle + circle, chop_reward)
        serve, _ = play(honest, chop_reward)
        forever = once + (twice - once) / (1 - 0.99 ** (m - n))
        as_the_first = once / (1 - 0.99**n)
        gaps.append([forever - serve, as_the_first - serve, forever - play(honest, 0.2)[0]])
    at_0, at_1 = torch.tensor(gaps)
    truth, later, same = at_0 / (at_0 - at_1)  # where a linear function is 0
    mistakes = {"a later round does not begin where the first one does": later}
    mistakes["who serves the salad chops, too"] = same
    compare(answer, truth, 1e-3, mistakes)


def grpo(path):
    expect(Path(path).is_file(), f"there is no file {path}")
    advantages = runpy.run_path(path, run_name="student").get("advantages")
    expect(callable(advantages), f"{path} has no function advantages")
    returns, episode = torch.tensor([1.0, 0.0, 0.5, 0.1]), torch.tensor([0, 1, 1, 1, 1, 2, 2, 3])
    found = advantages(returns, episode)
    fine = isinstance(found, torch.Tensor) and found.shape == episode.shape
    expect(fine, "for unequal returns, give a tensor with a number for each decision")
    each = returns[episode]
    per_decision = (each - each.mean()) / each.std()
    mistakes = {
        "the division by std is missing": each - returns.mean(),
        "the mean is not subtracted": each / returns.std(),
        "mean and std are those of the decisions, not of the episodes": per_decision,
    }
    correction = int(found[0] < 1.45)  # There are two kinds of std, and both are fine.
    truth = (each - returns.mean()) / returns.std(correction=correction)
    compare(found, truth, 0.01, mistakes)
    nothing = advantages(torch.full((4,), 0.3), episode)
    expect(nothing is None, "if all returns of a group are equal, give None")


def shortest_way(*answer):
    env = importlib.import_module("virtualhome_text").VirtualHomeText()
    obs, info = env.reset()
    chosen = []
    for key in (4, 6, 5, 8, 7, 9):
        prompt = PROMPT.format(obs=obs, goal=env.goal)
        policy = policies(prompt, info["actions"].values())["word"]
        chosen.append(policy[list(info["actions"]).index(key)].item())
        obs, *_, info = env.step(key)
    truth = math.prod(chosen)
    mistakes = {"this is the log of the product": math.log(truth)}
    mistakes["this is a mean, not a product"] = sum(chosen) / 6
    mistakes["the last action is missing"] = truth / chosen[-1]
    mistakes["this is the number of episodes"] = 1 / truth
    compare(answer, truth, 0, mistakes, relative=0.01)


def separation(*answers):
    truth = [2 / math.comb(2 * n, n) for n in (3, 4, 5)]
    mistakes = {"either method may win, so this is half of it": [p / 2 for p in truth]}
    compare(answers, truth, 6e-4, mistakes)


CHECKS = {
    "1": (think, "NORM P P P P P", "word, token or none, and the five probabilities"),
    "2": (joint_probability, "LOG_P", "with four digits"),
    "5": (words_matter, "WORD TASK SUCCESS", "first, next, wrong or was; a task; its success"),
    "6": (discounts, "REWARD DISCOUNT RETURN", "the three numbers of the last step"),
    "7": (trained_weights, "N", "the number of the actor's trained weights"),
    "10": (adapter_on, "RUN RUN", "the folders: with the adapter off, and with it on"),
    "11": (mended, "RUN RUN", "the folders: the sound run, and the mended one"),
    "12": (never_serve, "CHOP_REWARD", "the value of step 5, with three digits"),
    "13": (grpo, "FILE", "your file with the function advantages"),
    "15": (shortest_way, "PRODUCT", "for pocket_lm, with three digits"),
    "16": (separation, "P P P", "p for three, four and five seeds"),
}


def main(argv=()):
    if not argv or argv[0] in ("-h", "--help"):
        for number, (_, needs, meaning) in CHECKS.items():
            print(f"check.py {number + ' ' + needs:25} {meaning}")
        return
    exercise, *answers = argv
    try:
        expect(exercise in CHECKS, f"only these exercises have a check: {', '.join(CHECKS)}")
        check, needs, meaning = CHECKS[exercise]
        expect(len(answers) == len(needs.split()), f"the answer is {needs}: {meaning}")
        check(*answers)
        print("Right.")
    except Wrong as error:
        sys.exit(f"Not yet: {error}")
    except (Exception, SystemExit) as error:  # in a file of the student
        files = "twosome.py", *answers
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"line {f.lineno} of {f.filename}: " for f in frames if f.filename.endswith(files)]
        sys.exit(f"Not yet: {''.join(lines[-1:])}{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
