"""The train step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mim_jax.methods.base import Params
from mim_jax.state import TrainState, abstract_state
from mim_jax.views import LOSS, MIX


def make_train_step(method: Any, config: ml_collections.ConfigDict) -> jax.stages.Wrapped:
    """`train_step(state, target, batch) -> (state, metrics)`, jitted; the state given is donated.

    `target` are the parameters of the frozen network, {} for a method without. `batch` is what the pipeline yields, or
    finished views (no key `image`): then nothing is augmented. If the loss, the gradient or the new state is not finite,
    nothing of the state changes but the step, and `train/skipped` is 1.
    """

    def follow(teacher: Params, params: Params, step: jax.Array) -> Params:
        m = method.schedules["momentum_teacher"](step)
        return {part: ema(teacher[part], params[part], m) for part in method.teacher_parts}

    def train_step(state: TrainState, target: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, dict]:
        # (1) randomness
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        # (2) views
        views = method.views.make(batch, key) if "image" in batch else batch
        views = method.mix(views, jax.random.fold_in(key, MIX))
        # (3) loss and gradient; before them the teacher, where it follows first
        teacher = follow(state.teacher, state.params, state.step) if method.teacher_first else state.teacher
        (loss, (extra, metrics)), grads = jax.value_and_grad(method.loss, has_aux=True)(
            state.params, teacher, target, state.extra, views, jax.random.fold_in(key, LOSS), state.step
        )
        # (4) optimizer
        updates, opt_state = method.optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        # (5) teacher
        if method.teacher_parts and not method.teacher_first:
            teacher = follow(teacher, params, state.step)
        new = method.after_update(TrainState(state.step + 1, params, teacher, opt_state, extra))
        # (6) the next state, unless something is not finite
        grad_norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(new)
        new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, dataclasses.replace(state, step=new.step))

        metrics = metrics | {f"train/{name}": schedule(state.step) for name, schedule in method.schedules.items()}
        metrics |= {"train/loss": loss, "train/grad_norm": grad_norm, "train/skipped": 1 - ok.astype(jnp.int32)}
        return new, metrics | {"step": new.step}

    out_shardings = (jax.tree.map(lambda s: s.sharding, abstract_state(method, config)), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def all_finite(tree: Any) -> jax.Array:
    """Whether no number in a tree is NaN or infinite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in floats]).all()


def ema(teacher: Any, student: Any, momentum: jax.Array) -> Any:
    """teacher <- momentum * teacher + (1 - momentum) * student, leaf by leaf."""
    return jax.tree.map(lambda t, s: (momentum * t + (1 - momentum) * s).astype(t.dtype), teacher, student)
