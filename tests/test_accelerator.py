"""The benchmark of an accelerator, on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks/accelerator.py"


def measured(folder: Path, *options: str) -> str:
    """The page that it writes."""
    subprocess.run([sys.executable, PROGRAM, "--small", "--seconds=1", f"--out={folder}", *options], check=True)
    return next(folder.glob("*-accelerator.md")).read_text()


@pytest.mark.slow
def test_every_part_ends_well(tmp_path: Path):
    page = measured(tmp_path)
    for part in ("device", "numbers", "attention", "augmentation", "dino", "mae", "dinov2"):
        assert f"\n## {part}\n" in page
    assert " failed after " not in page and " was ended after " not in page
    assert page.count("| step, JPEGs decoded | **") == 3


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_does_not_end_the_others(tmp_path: Path):
    page = measured(tmp_path, "--parts=dino,device", "--remat=much")
    assert 's: ValueError: model.remat is "much", but must be "none" or "dots" or "full" or "auto"**' in page
    assert "product of two bfloat16 matrices" in page
