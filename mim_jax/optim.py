"""Everything that follows from the config once the command line has changed it: durations, schedules, the optimizer."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
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


def cosine_schedule(
    base: float, final: float, total: int, warmup: int = 0, start: float = 0.0, endpoint: bool = True
) -> Schedule:
    """DINO's schedule: linear from `start` to `base`, both included, over `warmup` steps, then a cosine to `final`.

    As in the official code the peak is reached at step `warmup - 1` and again at `warmup` (without `endpoint`, as in
    MAE's, at `warmup` alone), and the cosine divides by its own length, so that `final` is approached at step
    `total - 1` and kept from `total` on.
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        linear = start + (base - start) * step / max(warmup - endpoint, 1)
        progress = jnp.minimum((step - warmup) / max(total - warmup, 1), 1.0)
        cosine = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, linear, cosine)

    return schedule


def warmup_by_epoch(start: float, final: float, epochs: int, epoch_steps: int, hold: int = 0) -> Schedule:
    """DINO's teacher temperature: linspace(start, final, epochs), one value an epoch, then `final`; all of it `hold` steps
    later, and `start` until then."""

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(jnp.maximum(step - hold, 0) // epoch_steps, jnp.result_type(float))
        warm = start + (final - start) * epoch / max(epochs - 1, 1)
        return jnp.where(epoch < epochs, warm, final)

    return schedule


def learning_rate(config: ml_collections.ConfigDict) -> Schedule:
    """`optim.schedule`, named after the code that it is the schedule of. The recipe's rate is for a batch of
    `optim.lr_batch_size` and scaled with the batch, see `lr_batch_power`; 0 there: it is absolute.

    "dino" (and BEiT, iBOT, DINOv2): `cosine_schedule`. "mae" (and MoCo v3): the same, but the warm-up's last step is one
    short of the peak. "timm_cosine" and "timm_multistep" (SimMIM): step s has the value for step s - 1, warm-up starts at
    `warmup_lr`, the cosine runs from step 0 whatever the warm-up (so that the rate drops where they meet), and the steps
    divide the rate by 1 / `decay_rate` at each of `decay_epochs`; `warmup_lr` and `min_lr` are scaled with the batch.
    """
    o, total = config.optim, total_steps(config)
    scale = (config.data.batch_size / o.lr_batch_size) ** o.lr_batch_power if o.lr_batch_size else 1.0
    base, warmup = o.lr * scale, min(duration(config, o, "warmup"), total)
    if o.schedule == "dino":
        return cosine_schedule(base, o.min_lr, total, warmup)
    if o.schedule == "mae":
        return cosine_schedule(base, o.min_lr, total, warmup, endpoint=False)
    if not o.schedule.startswith("timm_"):
        raise ValueError(f'optim.schedule is {o.schedule!r}, but must be "dino", "mae", "timm_cosine" or "timm_multistep"')
    warm = cosine_schedule(base, 0.0, total, warmup, start=o.warmup_lr * scale, endpoint=False)
    if o.schedule == "timm_cosine":
        after = cosine_schedule(base, o.min_lr * scale, total)
    else:
        decays = [round(epoch * steps_per_epoch(config)) for epoch in o.decay_epochs]
        after = lambda step: base * o.decay_rate ** sum(step >= at for at in decays)  # noqa: E731

    def shifted(step: jax.Array) -> jax.Array:
        step = jnp.maximum(step - 1, 0)
        return jnp.where(step < warmup, warm(step), after(step))

    return shifted


def schedules(config: ml_collections.ConfigDict) -> dict[str, Schedule]:
    """The optimizer's: `lr` and `weight_decay`."""
    o = config.optim
    decay = cosine_schedule(o.weight_decay, o.weight_decay_end, total_steps(config))
    return {"lr": learning_rate(config), "weight_decay": decay}


def clip(limit: float, per: str) -> optax.GradientTransformation:
    """Scale gradients down to an L2 norm of `limit` (0: never): of each tensor apart (`per` "parameter", as DINO does;
    blocks are tensors apart), of each part of the model ("part", as DINOv2 does), or of all together ("model")."""

    def factor(norm: jax.Array) -> jax.Array:
        return jnp.minimum(limit / (norm + 1e-6), 1.0)

    def one(path: tuple, g: jax.Array) -> jax.Array:
        axes = tuple(range(1 if STACKED.search(path_name(path)) else 0, g.ndim))
        return g * factor(jnp.sqrt(jnp.sum(g * g, axes, keepdims=True)))

    def all_alike(grads: Any) -> Any:
        scale = factor(optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * scale, grads)

    ways = {
        "parameter": lambda grads: jax.tree_util.tree_map_with_path(one, grads),
        "part": lambda grads: {part: all_alike(tree) for part, tree in grads.items()},
        "model": all_alike,
    }
    if per not in ways:
        raise ValueError(f'optim.clip_per is {per!r}, but must be "parameter", "part" or "model"')
    return optax.stateless(lambda grads, _: ways[per](grads)) if limit else optax.identity()


def decayed(params: Any, not_decayed: str) -> Any:
    """True for the parameters that weight decay applies to: those in whose path the regex `not_decayed` is not found."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(not_decayed, path_name(path)), params)


def layer_scales(params: Any, decay: float, patch_embed: float = 1.0) -> Any:
    """Layer-wise learning-rate decay (BEiT, MAE): a factor for each tensor, that of stacked blocks [depth, 1, ...].

    It is decay ** (depth + 1 - id): id 0 is what comes before the blocks (patch embedding, tokens, absolute positions), block
    k is id k + 1, all that comes after is depth + 1. `patch_embed` is a factor more for the patch embedding. Raises
    ValueError for parameters with more than one stack of blocks (Swin, or a decoder).
    """
    paths = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    stacks = {STACKED.split(name)[0]: len(leaf) for name, leaf in paths if STACKED.search(name)}
    if len(stacks) != 1:
        raise ValueError(f"optim.layer_decay is for models with one stack of blocks, not those of {sorted(stacks)}")
    (depth,) = stacks.values()

    def scale(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        if STACKED.search(name):
            return (decay ** (depth - np.arange(depth))).reshape(depth, *[1] * (leaf.ndim - 1))
        first = re.search("patch_embed/|(cls_token|mask_token|register_tokens|pos_embed)$", name)
        return decay ** (depth + 1 if first else 0) * (patch_embed if "patch_embed/" in name else 1.0)

    return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(config: ml_collections.ConfigDict, fixed: str) -> optax.GradientTransformation:
    """AdamW after clipping. `fixed`: a regex of parameters that are never updated nor decayed.

    For `freeze_last_layer` steps the heads' last layers get no update and no decay. By "update" they get no moments either,
    and their bias correction starts when they do; by "lr" (DINOv2) their moments move all the while.
    """
    o, s = config.optim, schedules(config)
    freeze = duration(config, o, "freeze_last_layer")

    def adamw(start: int = 0, frozen: int = 0) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(o.beta1, o.beta2, o.eps),
            optax.add_decayed_weights(lambda count: s["weight_decay"](count + start), lambda p: decayed(p, o.not_decayed)),
            optax.scale_by_learning_rate(lambda count: jnp.where(count < frozen, 0.0, s["lr"](count + start))),
        )

    def label(path: tuple, _: jax.Array) -> str:
        name = path_name(path)
        if fixed and re.search(fixed, name):
            return "fixed"
        return "last_layer" if freeze and "/last_layer" in name else "trained"

    def by_layer(updates: Any, params: Any) -> Any:
        scales = layer_scales(params, o.layer_decay, o.patch_embed_lr)
        return jax.tree.map(lambda u, scale: (u * scale).astype(u.dtype), updates, scales)

    if o.freeze_last_layer_by not in ("update", "lr"):
        raise ValueError(f'optim.freeze_last_layer_by is {o.freeze_last_layer_by!r}, but must be "update" or "lr"')
    groups = {"trained": adamw(), "fixed": optax.set_to_zero()}
    if freeze and o.freeze_last_layer_by == "lr":
        groups["last_layer"] = adamw(frozen=freeze)
    elif freeze:
        groups["last_layer"] = optax.conditionally_mask(adamw(start=freeze), lambda step: step >= freeze)
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    scaled = optax.stateless(by_layer) if (o.layer_decay, o.patch_embed_lr) != (1, 1) else optax.identity()
    return optax.chain(clip(o.clip_grad, o.clip_per), optax.partition(groups, labels), scaled)
