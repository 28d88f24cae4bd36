"""A real LLM, SmolLM2-135M-Instruct, where `python experiments/get_smollm2.py` was run."""

import csv
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, as in test_twosome.py
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402

FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"


pytestmark = pytest.mark.skipif(not FOLDER.exists(),
                                reason="no model: python experiments/get_smollm2.py")


def test_one_update(tmp_path, monkeypatch):
    """Otherwise everything would be shown on an LM only that we made ourselves."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 1)
    monkeypatch.setattr(twosome, "EPISODES_PER_ROW", 1)
    twosome.main(["--model", str(FOLDER), "--steps", "8", "--n-envs", "2", "--rollout-steps", "4",
                  "--epochs", "1", "--out", str(tmp_path / "run")])
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["entropy"]) < 1.7 and float(row["approx_kl"]) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packs(dtype):
    """Otherwise a real LLM would be scored the slow way, with one line that nobody reads."""
    model, tokenizer = twosome.load_lm(str(FOLDER), "cpu", dtype)
    prompt, actions = twosome.make_episode(twosome.Args()).state()
    assert twosome.may_pack(model, [twosome.encode(tokenizer, prompt, actions)])
