"""A real LM, SmolLM2-135M-Instruct, where `python experiments/get_smollm2.py` was run."""

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
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="python experiments/get_smollm2.py")


def test_one_update(tmp_path, monkeypatch):
    """Otherwise everything would be shown on an LM only that we made ourselves."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 1)
    sizes = {"steps": 8, "n_envs": 2, "rollout_steps": 4, "epochs": 1, "test_episodes": 1}
    sizes["minibatches"] = 2
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    twosome.main([*flags, f"--model={FOLDER}", f"--out={tmp_path / 'run'}"])
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["entropy"]) < 1.7
    assert float(row["approx_kl"]) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tree(dtype):
    """Otherwise a real LM would be scored the slow way, with one line that nobody reads."""
    model, _ = twosome.load_lm(str(FOLDER), dtype=dtype)
    assert isinstance(twosome.choose_scorer(model), twosome.TreeScorer)
