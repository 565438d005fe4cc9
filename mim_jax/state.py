"""The training state and its creation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import sharding
from mim_jax.methods.base import Params
from mim_jax.optim import make_optimizer
from mim_jax.target import load_frozen


@flax.struct.dataclass
class TrainState:
    """All that a run is: the next step reads nothing else but the data. No key, no optimizer object, no functions."""

    step: jax.Array  # int32 [], updates made
    params: Params  # part -> trained parameters
    teacher: Params  # part -> EMA of the same part, under the student's names; {} without a teacher
    opt_state: Any
    extra: Params  # what the method carries along without gradients


def create(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """A fresh state from `config.seed`; pure, so `jax.eval_shape` gives its shapes."""
    params, extra = method.init(jax.random.key(config.seed))
    teacher = {part: jax.tree.map(jnp.copy, params[part]) for part in method.teacher_parts}
    opt_state = make_optimizer(config, method.fixed).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, teacher, opt_state, extra)


def abstract_state(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """The state as `ShapeDtypeStruct`s, with their shardings where a mesh is set. Allocates nothing."""
    shapes = jax.eval_shape(lambda: create(method, config))
    mesh = sharding.current_mesh()
    if mesh is None:
        return shapes
    placed = sharding.shardings(shapes, config.mesh.rules, mesh)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)


def init_state(method: Any, config: ml_collections.ConfigDict) -> tuple[TrainState, Params]:
    """(state, frozen). Raises what `load_frozen` raises where the method has a fixed network and there is none."""
    return first_state(method, config), load_frozen(method, config)


def first_state(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """A fresh state, made where it is to live: no device ever holds what it will not keep."""
    out_shardings = jax.tree.map(lambda s: s.sharding, abstract_state(method, config))
    return jax.jit(lambda: create(method, config), out_shardings=out_shardings)()
