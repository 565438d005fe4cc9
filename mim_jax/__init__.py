"""Self-supervised pretraining of vision transformers in JAX.

    config = mim_jax.load_config("configs/dino.py:demo")
    method = mim_jax.make_method(config)
    state, target = mim_jax.init_state(method, config)
    train_step = mim_jax.make_train_step(method, config)
    state, metrics = train_step(state, target, batch)
    run = mim_jax.load_run("runs/dino")  # what a run has learned
    out = method.features(state.learned, images)
"""

from mim_jax import convert
from mim_jax.config import load_config
from mim_jax.learned import load_run
from mim_jax.methods.base import make_method
from mim_jax.state import TrainState, init_state
from mim_jax.step import make_train_step

__version__ = "0.2.0"

__all__ = ["TrainState", "convert", "init_state", "load_config", "load_run", "make_method", "make_train_step"]
