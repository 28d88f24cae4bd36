"""One update of a real LLM, SmolLM2-135M-Instruct, if `python experiments/get_smollm2.py` was run."""

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import twosome  # noqa: E402

FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not FOLDER.exists(), reason="no model: python experiments/get_smollm2.py")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_update(dtype, tmp_path, monkeypatch, capsys):
    """Otherwise everything would be shown on an LM that we made ourselves only, or a real one would
    silently be scored the slow way."""
    monkeypatch.setattr(twosome, "EVALUATION_EPISODES", 2)
    monkeypatch.setattr(twosome, "EPISODES_PER_ROW", 2)
    twosome.main(["--model", str(FOLDER), "--dtype", dtype, "--steps", "16", "--n-envs", "2",
                  "--rollout-steps", "8", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "cannot be packed" not in capsys.readouterr().err
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["entropy"]) < 1.7 and float(row["approx_kl"]) < 0.02
