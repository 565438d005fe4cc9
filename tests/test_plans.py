"""Recipes as compiled for slices that need not be here; each takes up to some minutes, and the extras plan-tpu and plan-gpu."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

SCALE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/scale.py"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SCALE["RECIPES"].split())
@pytest.mark.parametrize("slice_", ["v5e-256", "h100-8", "h100-256"])
def test_a_recipe_passes_the_gates(recipe: str, slice_: str):
    """It fits, sends no activations, sums gradients in float32 and donates its state."""
    module = "libtpu" if slice_.startswith("v") else "jax_cuda12_plugin"
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    assert SCALE["cell"](recipe, slice_)[-2] == "passed"
