"""The program, and a file that appears when it comes to a phase: python tests/storm_child.py PHASE FILE [flags of mim_jax].

It imports nothing before the program does: what a library starts must not come before the program listens to signals.
"""

import importlib.abc
import importlib.util
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PAUSE = 0.3  # seconds by which the baselines and an evaluation are lengthened: they would be too short to be hit


def mark(phase: str, marker: Path) -> None:
    """Changes the program, once its modules are loaded."""
    from mim_jax import checkpoint, evaluators
    from mim_jax.data import pipeline

    def marked(function: Callable, pause: float) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            marker.touch()
            time.sleep(pause)
            return function(*args, **kwargs)

        return wrapper

    train_batches = pipeline.train_batches

    def blocked(source: Any, *, batch_size: int, start: int = 0, masks: Any = None, **kwargs: Any) -> Any:
        """Batches of which the third never comes: who makes it sleeps."""

        def wait(positions: Any) -> dict[str, Any]:
            if positions[0] >= (start + 2) * batch_size:
                marker.touch()
                time.sleep(3600)
            return masks(positions) if masks else {}

        return train_batches(source, batch_size=batch_size, start=start, masks=wait, **kwargs)

    if phase == "data wait":
        pipeline.train_batches = blocked
    elif phase == "baselines":
        evaluators.Evaluation.baselines = marked(evaluators.Evaluation.baselines, PAUSE)
    elif phase == "evaluation":
        evaluators.Evaluation.scores = marked(evaluators.Evaluation.scores, PAUSE)
    elif phase == "commit":
        checkpoint.Checkpoints.save = marked(checkpoint.Checkpoints.save, 0)


class WithMarks(importlib.abc.MetaPathFinder):
    """Calls `mark` after the program has loaded its training."""

    def __init__(self, phase: str, marker: Path):
        self.phase, self.marker = phase, marker

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mim_jax.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_mark(module: ModuleType) -> None:
            load(module)
            mark(self.phase, self.marker)

        spec.loader.exec_module = load_and_mark
        return spec


if __name__ == "__main__":
    phase, marker = sys.argv[1], Path(sys.argv[2])
    sys.argv = ["mim_jax", *sys.argv[3:]]
    sys.path[0] = str(Path(__file__).parent.parent)
    if phase == "start-up":
        marker.touch()
    else:
        sys.meta_path.insert(0, WithMarks(phase, marker))
    runpy.run_module("mim_jax.main", run_name="__main__", alter_sys=True)
