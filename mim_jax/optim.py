"""Everything that follows from the config once the command line has changed it: durations, schedules, the optimizer."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mim_jax.sharding import path_name

Schedule = Callable[[jax.Array], jax.Array]  # step -> scalar

STACKED = re.compile("(^|/)blocks/")  # parameters with a leading depth axis: one tensor a block, as the papers count


def steps_per_epoch(config: ml_collections.ConfigDict) -> int:
    """Full batches in one pass over the data. Raises ValueError where `data.num_examples` is not known yet."""
    if not config.data.num_examples:
        raise ValueError("durations in epochs need config.data.num_examples (main.py reads it off the data set)")
    return max(config.data.num_examples // config.data.batch_size, 1)


def duration(config: ml_collections.ConfigDict, section: ml_collections.ConfigDict, name: str) -> int:
    """The steps that `section` asks for by `<name>_steps`, `<name>_examples` or `<name>_epochs`, the first that is set.

    So `--config.total_steps=20` on the command line beats the `total_epochs` of the recipe. Raises ValueError if none is.
    """
    if section.get(f"{name}_steps") is not None:
        return int(section[f"{name}_steps"])
    if section.get(f"{name}_examples") is not None:
        return int(section[f"{name}_examples"]) // config.data.batch_size
    if section.get(f"{name}_epochs") is not None:
        return round(section[f"{name}_epochs"] * steps_per_epoch(config))
    raise ValueError(f"set one of {name}_steps, {name}_examples, {name}_epochs in the config")


def total_steps(config: ml_collections.ConfigDict) -> int:
    return duration(config, config, "total")


def cosine_schedule(base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> Schedule:
    """DINO's schedule: linear from `start` to `base`, both included, over `warmup` steps, then a cosine to `final`.

    As in the official code the peak is reached at step `warmup - 1` and again at `warmup`, and the cosine divides by its
    own length, so that `final` is approached at step `total - 1` and kept from `total` on.
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        linear = start + (base - start) * step / max(warmup - 1, 1)
        progress = jnp.minimum((step - warmup) / max(total - warmup, 1), 1.0)
        cosine = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, linear, cosine)

    return schedule


def warmup_by_epoch(start: float, final: float, epochs: int, epoch_steps: int) -> Schedule:
    """DINO's teacher temperature: linspace(start, final, epochs), one value an epoch, then `final`."""

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step // epoch_steps, jnp.result_type(float))
        warm = start + (final - start) * epoch / max(epochs - 1, 1)
        return jnp.where(epoch < epochs, warm, final)

    return schedule


def schedules(config: ml_collections.ConfigDict) -> dict[str, Schedule]:
    """`lr` (scaled linearly with the batch, the recipe's value being for 256 images) and `weight_decay`."""
    o, total = config.optim, total_steps(config)
    warmup = min(duration(config, o, "warmup"), total)
    return {
        "lr": cosine_schedule(o.lr * config.data.batch_size / 256, o.min_lr, total, warmup),
        "weight_decay": cosine_schedule(o.weight_decay, o.weight_decay_end, total),
    }


def clip_per_parameter(limit: float) -> optax.GradientTransformation:
    """Scale each tensor's gradient down to an L2 norm of `limit` (0: never), as DINO does; blocks are tensors apart."""

    def clip(path: tuple, g: jax.Array) -> jax.Array:
        axes = tuple(range(1 if STACKED.search(path_name(path)) else 0, g.ndim))
        norm = jnp.sqrt(jnp.sum(g * g, axes, keepdims=True))
        return g * jnp.minimum(limit / (norm + 1e-6), 1.0)

    if not limit:
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def decayed(params: Any) -> Any:
    """True for the parameters that weight decay applies to: all but biases and the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path[-1:]) not in ("bias", "scale"), params)


def make_optimizer(config: ml_collections.ConfigDict, fixed: str) -> optax.GradientTransformation:
    """AdamW with per-parameter clipping. `fixed`: a regex of parameters that are never updated nor decayed.

    For `freeze_last_layer` steps the heads' last layers get no update, no decay and no moments, and their bias
    correction starts when they do.
    """
    o, s = config.optim, schedules(config)
    freeze = duration(config, o, "freeze_last_layer")

    def adamw(start: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(o.beta1, o.beta2, o.eps),
            optax.add_decayed_weights(lambda count: s["weight_decay"](count + start), mask=decayed),
            optax.scale_by_learning_rate(lambda count: s["lr"](count + start)),
        )

    def label(path: tuple, _: jax.Array) -> str:
        name = path_name(path)
        if fixed and re.search(fixed, name):
            return "fixed"
        return "last_layer" if "/last_layer/" in name else "trained"

    groups = {
        "trained": adamw(0),
        "last_layer": optax.conditionally_mask(adamw(freeze), lambda step: step >= freeze),
        "fixed": optax.set_to_zero(),
    }
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(clip_per_parameter(o.clip_grad), optax.partition(groups, labels))
