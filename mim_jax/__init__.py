"""Self-supervised pretraining of vision transformers in JAX.

    config = mim_jax.load_config("configs/dino.py:demo")
    method = mim_jax.make_method(config)
    state, target = mim_jax.init_state(method, config)
    train_step = mim_jax.make_train_step(method, config)
    state, metrics = train_step(state, target, batch)
    run = mim_jax.load_run("runs/dino")  # what a run has learned
    out = method.features(state.learned, images)
    model = mim_jax.load("runs/dino")  # the same as a frozen network
    out = model.features(["a.jpg", "b.png"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mim_jax import convert
    from mim_jax.config import load_config
    from mim_jax.learned import load_run
    from mim_jax.methods.base import make_method
    from mim_jax.pretrained import load
    from mim_jax.state import TrainState, init_state
    from mim_jax.step import make_train_step

__version__ = "0.6.0"

__all__ = ["TrainState", "convert", "init_state", "load", "load_config", "load_run", "make_method", "make_train_step"]

HOMES = {
    "load": "pretrained",
    "load_config": "config",
    "load_run": "learned",
    "make_method": "methods.base",
    "TrainState": "state",
    "init_state": "state",
    "make_train_step": "step",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that the command line can listen to signals before it imports jax."""
    if name == "convert":
        return importlib.import_module("mim_jax.convert")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mim_jax.{HOMES[name]}"), name)
