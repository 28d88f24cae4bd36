"""Does the lesson run? Its notebook is executed in a copy of the repository, with a short training.
It is skipped where something is missing: pip install nbclient ipykernel matplotlib"""

import ast
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the lesson needs: pip install nbclient")
nbclient = pytest.importorskip("nbclient", reason="the lesson needs: pip install nbclient")
pytest.importorskip("ipykernel", reason="the lesson needs: pip install ipykernel")
pytest.importorskip("matplotlib", reason="the lesson needs: pip install matplotlib")

ROOT = Path(__file__).resolve().parent.parent
LESSON = Path("experiments/lessons/lesson.ipynb")
TRAINING = '["--out", str(RUN)]'  # the flags of the training in the notebook


def read_lesson():
    return nbformat.read(ROOT / LESSON, as_version=4)


def sources(lesson):
    return [cell.source for cell in lesson.cells if cell.cell_type == "code"]


def names_of_definitions(source):
    kinds = ast.FunctionDef, ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


def test_lesson_is_short():
    lesson = read_lesson()
    nbformat.validate(lesson)
    assert len(lesson.cells) <= 60
    for source in sources(lesson):
        lines = source.splitlines()
        assert len(lines) <= 12, source
        assert max(map(len, lines)) <= 100, source
    assert (ROOT / LESSON).stat().st_size < 1_000_000


def test_lesson_defines_nothing_that_twosome_has():
    of_twosome = names_of_definitions((ROOT / "twosome.py").read_text())
    of_lesson = [names_of_definitions(source) for source in sources(read_lesson())]
    assert not set.union(*of_lesson) & of_twosome


def test_lesson_is_stored_clean():
    """Its outputs are there, in order, and tell nothing about the machine that made them."""
    lesson = read_lesson()
    cells = [cell for cell in lesson.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.metadata for cell in lesson.cells)
    assert lesson.metadata.kernelspec.name == "python3"
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {(output.output_type, output.get("name", "")) for output in outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", "")}  # no warning, no error
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    printed = "".join(output.get("text", "") for output in outputs)
    assert not any(path in printed for path in ("/home/", "/root/", "/tmp/", "/work/", "C:\\"))


def test_lesson_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "runs", "models", "results", "*venv*", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    lesson = read_lesson()
    n_found = sum(cell.source.count(TRAINING) for cell in lesson.cells)
    assert n_found == 1, f"{LESSON} has {TRAINING} {n_found} times, and not once"
    for cell in lesson.cells:
        cell.source = cell.source.replace(TRAINING, f'{TRAINING} + ["--steps", "1024"]')
    resources = {"metadata": {"path": str(copy / LESSON.parent)}}  # where the kernel starts
    nbclient.NotebookClient(
        lesson, timeout=300, kernel_name="python3", resources=resources
    ).execute()
    assert (copy / "runs/lesson/page.html").exists()
