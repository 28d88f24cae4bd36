"""check.py accepts a right answer, and refuses a wrong one with a line that helps."""

import importlib
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def experiment(name):
    return importlib.import_module(f"experiments.{name}")


GOOD_GROUP = "def advantages(returns, episode):\n    std = returns.std()\n"
GOOD_GROUP += "    return ((returns - returns.mean()) / std)[episode] if std > 0 else None\n"
CHECKED = [
    ("1 word 0.32 0.13 0.14 0.27 0.15", "Right."),
    ("1 token 0.32 0.13 0.14 0.27 0.15", "this is the policy of word"),
    ("2 -0.6271", "the first token is missing"),
    ("2 0.7621", "the minus sign is missing"),
    ("6 0.08 0.81 0.89", "Right."),
    ("6 0.08 0.9 0.98", "discounted once"),
    ("7 65536", "Right."),
    ("7 32768", "one of the two matrices"),
    ("7 722945", "the critic is counted, too"),
    ("12 0.309", "Right."),
    ("12 0.249", "a later round"),
    ("15 0.00067", "Right."),
    ("13 good.py", "Right."),
    ("13 bad.py", "the division by std is missing"),
    ("13 broken.py", "line 2 of broken.py: NameError"),
    ("13 nothing.py", "there is no file"),
    ("11 run run", "is not the folder of a run"),
    ("16 0.1 x 0.01", "these are not all numbers"),
    ("6", "the answer is REWARD"),
    ("99 1", "only these exercises"),
]


@pytest.mark.parametrize("answer, verdict", CHECKED, ids=[answer for answer, _ in CHECKED])
def test_check_tells_right_from_wrong(answer, verdict, tmp_path, monkeypatch, capsys):
    """Otherwise a student would be told that a right result is wrong, or would read a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("overcooked_text.CHOP_REWARD", 0.2)  # The check of exercise 12 changes it.
    Path("good.py").write_text(GOOD_GROUP)
    Path("bad.py").write_text(GOOD_GROUP.replace(" / std", ""))
    Path("broken.py").write_text("def advantages(returns, episode):\n    return advantage\n")
    try:
        experiment("lessons.check").main(answer.split())
        said = capsys.readouterr().out
    except SystemExit as error:
        said = error.code
        assert said.startswith("Not yet: ") and "\n" not in said
    assert verdict in said and (verdict == "Right.") == (said == "Right.\n")


def test_check_agrees_with_twosome(capsys):
    """Otherwise the exercises would be checked against another algorithm than the one taught."""
    twosome, check = importlib.import_module("twosome"), experiment("lessons.check")
    model, tokenizer = twosome.load_lm("pocket_lm")
    env = twosome.OvercookedText()
    prompt = twosome.build_prompt(env.reset()[0], env.goal)
    encoded = twosome.encode(tokenizer, prompt, ("pick up the tomato",))
    (log_prob,) = twosome.plain_log_probs(model, [encoded])
    check.main(["2", f"{log_prob.item():.4f}"])
    assert check.PROMPT.format(obs="A.", goal="b") == twosome.build_prompt("A.", "b")
    weights = twosome.trainable(twosome.add_lora(model)).values()
    check.main(["7", str(sum(p.numel() for p in weights))])
    assert capsys.readouterr().out == "Right.\nRight.\n"
