"""The notebook runs as it is committed, and is committed without its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/dino.ipynb"


def test_notebook_is_short_and_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) <= 25


@pytest.mark.slow
def test_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # "python3" is ipykernel's name for the interpreter that runs this test.
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert [step for step, _ in re.findall(r"step (\d): loss (\d+\.\d+)", printed)] == ["1", "2"]
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs), outputs
    assert "image/png" in outputs[-1].data
