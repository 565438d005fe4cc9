"""A short form of the storm of tests/storm.py; the whole of it fills the table of docs/reliability.md."""

import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parent / "storm.py"


KINDS = [("flips", "cuts", "poison"), ("kills", "signals", "disk"), ("images", "folders", "workdirs")]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS)
def test_a_short_storm_does_no_harm(kinds, tmp_path):
    table = tmp_path / "table.md"
    table.write_text("before\n<!-- storm: begin -->\nold\n<!-- storm: end -->\nafter\n")
    command = [sys.executable, STORM, "--seed=1", "--scale=0.05", f"--out={table}", "--only", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    text = table.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = {cells[1].strip(" `"): cells[3:-2] for line in text.splitlines() if (cells := line.split("|"))[1:]}
    for kind in kinds:
        trials, survived, *failed = (int(cell) for cell in rows[kind])
        assert trials == survived > 0 and failed == [0, 0, 0, 0]
