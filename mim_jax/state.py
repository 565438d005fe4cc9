"""The training state and its creation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import sharding
from mim_jax.learned import load_target
from mim_jax.methods.base import Params


@flax.struct.dataclass
class TrainState:
    """All that a run is: the next step reads nothing else but the data. No key, no optimizer object, no functions."""

    step: jax.Array  # int32 [], batches seen, those that were skipped included
    params: Params  # part -> trained parameters
    teacher: Params  # part -> EMA of the same part, under the student's names; {} without a teacher
    opt_state: Any
    extra: Params  # the method's state without gradient

    @property
    def learned(self) -> Params:
        """What is evaluated and used: the teacher, or the parameters of a method without."""
        return self.teacher or self.params


def create(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """A fresh state from `config.seed`; pure, so `jax.eval_shape` gives its shapes."""
    params, extra = method.init(jax.random.key(config.seed))
    teacher = {part: jax.tree.map(jnp.copy, params[part]) for part in method.teacher_parts}
    return TrainState(jnp.zeros((), jnp.int32), params, teacher, method.optimizer.init(params), extra)


def abstract_state(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """The state as `ShapeDtypeStruct`s, with their shardings where a mesh is set. Allocates nothing."""
    return sharding.placed(jax.eval_shape(lambda: create(method, config)), config.mesh.rules)


def init_state(method: Any, config: ml_collections.ConfigDict) -> tuple[TrainState, Params]:
    """(state, target). Raises what `load_target` raises if the method has a frozen target without weights."""
    return first_state(method, config), load_target(method, config)


def first_state(method: Any, config: ml_collections.ConfigDict) -> TrainState:
    """A fresh state, initialised in its final sharding."""
    out_shardings = jax.tree.map(lambda s: s.sharding, abstract_state(method, config))
    return jax.jit(lambda: create(method, config), out_shardings=out_shardings)()
