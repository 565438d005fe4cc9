"""The notebooks run as they are committed, and are committed without their outputs."""

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def code_cells(name: str) -> list[Any]:
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


@pytest.fixture
def executed(monkeypatch):
    """Runs a notebook: (what it printed, its outputs). Nothing may be written to standard error."""

    def execute(name: str) -> tuple[str, list[Any]]:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        path = ROOT / f"notebooks/{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        # "python3" is ipykernel's name for the interpreter that runs this test.
        NotebookClient(notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": path.parent}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs), outputs
        return "".join(output.text for output in outputs if output.output_type == "stream"), outputs

    return execute


@pytest.mark.parametrize(("name", "most"), [("dino", 25), ("bert", 170)])
def test_notebook_is_short_and_committed_without_outputs(name: str, most: int):
    cells = code_cells(name)
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert sum(lines(cell.source) for cell in cells) <= most


@pytest.mark.slow
def test_dino_runs(executed):
    printed, outputs = executed("dino")
    assert [step for step, _ in re.findall(r"step (\d): loss (\d+\.\d+)", printed)] == ["1", "2"]
    assert "image/png" in outputs[-1].data


@pytest.mark.slow
def test_bert_runs_and_learns(executed):
    printed, outputs = executed("bert")
    found = re.findall(r"(\w+) on test \w+: ([\d.]+)% of the masked tokens right, most frequent token ([\d.]+)%", printed)
    right = {name: (float(accuracy), float(constant)) for name, accuracy, constant in found}
    assert list(right) == ["BERT", "BEiT"]
    for accuracy, constant in right.values():
        assert accuracy > 1.3 * constant > 0
    assert "image/png" in outputs[-1].data


def test_method_of_bert():
    """It is short, and chooses and changes pieces as the paper says."""
    cells = code_cells("bert")
    method = next(cell.source for cell in cells if "class Bert(Method)" in cell.source)
    assert lines(method) < 60
    rng, special = np.random.default_rng(0), 5
    names: dict[str, Any] = {"special": [""] * special, "MASK": 4}
    exec(cells[0].source, names)
    exec(method, names)
    pieces = np.pad(rng.integers(special, 1000, (2000, 62)), ((0, 0), (1, 1)), constant_values=2)
    bert = names["Bert"](encoder=names["Encoder"](1000))
    views = {name: np.asarray(array) for name, array in bert.mix({"pieces": pieces}, names["jax"].random.key(0)).items()}
    assert (views["mask"].sum(1) == 10).all() and not views["mask"][:, [0, -1]].any()  # 15 % of 64, none of them special
    np.testing.assert_array_equal(views["seen"][~views["mask"]], pieces[~views["mask"]])
    seen, before = views["seen"][views["mask"]], pieces[views["mask"]]
    shares = np.array([np.mean(seen == 4), np.mean(seen == before), np.mean((seen != 4) & (seen != before))])
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)  # 20,000 pieces
