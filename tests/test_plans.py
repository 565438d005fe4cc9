"""Recipes as compiled for slices that need not be here: hours for TPUs, with the extras plan-tpu and plan-gpu."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks/scale.py"


@pytest.mark.slow
@pytest.mark.parametrize("slice_, module", [("v5e-256", "libtpu"), *((f"h100-{n}", "jax_cuda12_plugin") for n in (8, 256))])
def test_all_recipes_pass_the_gates(slice_: str, module: str, tmp_path: Path):
    """They fit, send no activations, sum gradients in float32 and donate their state."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    subprocess.run([sys.executable, PROGRAM, f"--slices={slice_}", f"--out={tmp_path}/scale.md"], check=True)
