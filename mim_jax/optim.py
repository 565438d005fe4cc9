"""The optimizer and the schedules, derived from the config once the command line has changed it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mim_jax.durations import steps, steps_of_each, total_steps
from mim_jax.models.vit import is_stacked
from mim_jax.sharding import path_name

Schedule = Callable[[jax.Array], jax.Array]  # step -> scalar


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


def warmup_by_epoch(start: float, final: float, epochs: float, epoch_steps: int, hold: int = 0) -> Schedule:
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
    `warmup_lr`, the cosine runs from step 0 regardless of the warm-up (so that the rate drops where they meet), and the steps
    divide the rate by 1 / `decay_rate` at each of `decay_at`; `warmup_lr` and `min_lr` are scaled with the batch.
    """
    o, total = config.optim, total_steps(config)
    scale = (config.data.batch_size / o.lr_batch_size) ** o.lr_batch_power if o.lr_batch_size else 1.0
    base, warmup = o.lr * scale, min(steps(config, "optim.warmup"), total)
    if o.schedule == "dino":
        return cosine_schedule(base, o.min_lr, total, warmup)
    if o.schedule == "mae":
        return cosine_schedule(base, o.min_lr, total, warmup, endpoint=False)
    warm = cosine_schedule(base, 0.0, total, warmup, start=o.warmup_lr * scale, endpoint=False)
    if o.schedule == "timm_cosine":
        after = cosine_schedule(base, o.min_lr * scale, total)
    else:
        decays = steps_of_each(config, "optim.decay_at")
        after = lambda step: base * o.decay_rate ** sum(step >= at for at in decays)  # noqa: E731

    def shifted(step: jax.Array) -> jax.Array:
        step = jnp.maximum(step - 1, 0)
        return jnp.where(step < warmup, warm(step), after(step))

    return shifted


def backbone_rate(config: ml_collections.ConfigDict) -> Schedule:
    """The factor of the backbone's updates in a run with `continue_from`: 0 for the `continued.frozen` steps, then up to 1 by
    equal amounts over the `continued.ramp` steps, the last of which has 1."""
    frozen, ramp = (steps(config, f"continued.{name}") for name in ("frozen", "ramp"))

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.clip(jnp.asarray(step + 1 - frozen, jnp.result_type(float)) / max(ramp, 1), 0.0, 1.0)

    return schedule


def schedules(config: ml_collections.ConfigDict) -> dict[str, Schedule]:
    """`lr`, `weight_decay`, where the config has `optim.momentum_teacher` a cosine from it to 1, or to
    `optim.momentum_teacher_end`, and with `continue_from` the `backbone_rate`."""
    o, total = config.optim, total_steps(config)
    decay = cosine_schedule(o.weight_decay, o.weight_decay_end, total)
    rest = {"lr": learning_rate(config), "weight_decay": decay}
    if "momentum_teacher" in o:
        rest["momentum_teacher"] = cosine_schedule(o.momentum_teacher, o.get("momentum_teacher_end", 1.0), total)
    if config.get("continue_from"):
        rest["backbone_rate"] = backbone_rate(config)
    return rest


def clip(limit: float, per: str) -> optax.GradientTransformation:
    """Scale gradients down to an L2 norm of `limit` (0: never): of each tensor by itself (`per` "parameter", as DINO does;
    stacked blocks are separate tensors), of each part of the model ("part", as DINOv2 does), or of all together ("model").

    Raises ValueError for a negative limit.
    """
    if limit < 0:
        raise ValueError(f"optim.clip_grad is {limit}, but must be at least 0 (0: gradients are not clipped)")

    def factor(norm: jax.Array) -> jax.Array:
        return jnp.minimum(limit / (norm + 1e-6), 1.0)

    def one(path: tuple, g: jax.Array) -> jax.Array:
        axes = tuple(range(1 if is_stacked(path_name(path)) else 0, g.ndim))
        return g * factor(jnp.sqrt(jnp.sum(g * g, axes, keepdims=True)))

    def together(grads: Any) -> Any:
        scale = factor(optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * scale, grads)

    ways = {
        "parameter": lambda grads: jax.tree_util.tree_map_with_path(one, grads),
        "part": lambda grads: {part: together(tree) for part, tree in grads.items()},
        "model": together,
    }
    return optax.stateless(lambda grads, _: ways[per](grads)) if limit else optax.identity()


def decayed(params: Any, no_decay: tuple[str, ...], vectors: bool = False) -> Any:
    """True for the parameters that weight decay applies to: all but those of the names `no_decay` and, without `vectors`, the
    vectors (biases, scales of norms and branches)."""

    def applies(path: tuple, leaf: Any) -> bool:
        name = path_name(path)
        return (vectors or leaf.ndim - is_stacked(name) > 1) and name.rpartition("/")[2] not in no_decay

    return jax.tree_util.tree_map_with_path(applies, params)


TRUST = optax.scale_by_trust_ratio(trust_coefficient=0.001)


def trusted(updates: Any, params: Any) -> Any:
    """Updates of matrices scaled to a norm of 0.001 of the parameter's, unless one of the two norms is 0; stacked blocks are
    separate tensors. Source: LARS (You et al. 2017), as in the code of MAE and MoCo v3."""

    def one(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        stacked = is_stacked(path_name(path))
        if update.ndim - stacked < 2:
            return update
        scaled = lambda update, param: TRUST.update(update, None, param)[0]  # noqa: E731
        return (jax.vmap(scaled) if stacked else scaled)(update, param)

    return jax.tree_util.tree_map_with_path(one, updates, params)


def make_optimizer(
    config: ml_collections.ConfigDict, schedules: Mapping[str, Schedule], method: Any
) -> optax.GradientTransformationExtraArgs:
    """`optim.name` after clipping; `update` takes the `step`, which the schedules follow. `method.untrained` is never updated.

    "adamw": weight decay is apart from Adam's averages. "sgd" (PyTorch's): it is added to the gradient, and the update is this
    sum plus `momentum` times the last update, times the rate. "lars": the same, the sum scaled by the trust ratio of `trusted`.

    For `optim.freeze_last_layer` the heads' last layers get no update and no decay. By "update" they get no moments either,
    and their bias correction starts when they do; by "lr" (DINOv2) their moments move all the while.

    Where there is a schedule `backbone_rate`, all updates of the backbone, with their weight decay, have this factor, and its
    layer-wise decay is `continued.layer_decay` if that is smaller. Moments move all the while. Its mask token is like a head:
    files lack it, and no features depend on it.
    """
    o, freeze = config.optim, steps(config, "optim.freeze_last_layer")

    def descent(frozen: int = 0) -> optax.GradientTransformationExtraArgs:
        averages = optax.scale_by_adam(o.beta1, o.beta2, o.eps) if o.name == "adamw" else optax.trace(o.momentum)

        def update(grads: Any, state: Any, params: Any, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
            decay, rate = schedules["weight_decay"](step), jnp.where(step < frozen, 0.0, schedules["lr"](step))

            def add_decay(update: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
                return (update + decay * param).astype(update.dtype) if decays else update

            def with_decay(updates: Any) -> Any:
                return jax.tree.map(add_decay, updates, params, decayed(params, tuple(o.no_decay), o.decay_vectors))

            if o.name == "adamw":
                updates, state = averages.update(grads, state)
                updates = with_decay(updates)
            else:
                updates = with_decay(grads)
                updates, state = averages.update(trusted(updates, params) if o.name == "lars" else updates, state)
            return jax.tree.map(lambda update: (-rate * update).astype(update.dtype), updates), state

        return optax.GradientTransformationExtraArgs(averages.init, update)

    def begins_later(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        def update(grads: Any, state: Any, params: Any, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
            waiting = lambda: (jax.tree.map(jnp.zeros_like, grads), state)  # noqa: E731
            return jax.lax.cond(step < freeze, waiting, lambda: inner.update(grads, state, params, step=step))

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def label(path: tuple, _: jax.Array) -> str:
        name = path_name(path)
        if method.untrained and re.search(method.untrained, name):
            return "untrained"
        return "last_layer" if freeze and "/last_layer" in name else "trained"

    def by_layer(updates: Any, state: Any, params: Any, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
        scales = method.lr_scales(params, decay, o.patch_embed_lr)
        if continued:
            rate = schedules["backbone_rate"](step)
            ramped = jax.tree.map(lambda scale: scale * rate, scales["backbone"])
            scales |= {"backbone": {name: 1.0 if name == "mask_token" else tree for name, tree in ramped.items()}}
        return jax.tree.map(lambda u, scale: (u * scale).astype(u.dtype), updates, scales), state

    groups = {"trained": descent(), "untrained": optax.set_to_zero()}
    if freeze:
        groups["last_layer"] = descent(frozen=freeze) if o.freeze_last_layer_by == "lr" else begins_later(descent())
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    continued = "backbone_rate" in schedules
    decay = min(o.layer_decay, config.continued.layer_decay) if continued else o.layer_decay
    scales = continued or method.own_rates or (decay, o.patch_embed_lr) != (1, 1)
    no_state = lambda _: optax.EmptyState()  # noqa: E731
    scaled = optax.GradientTransformationExtraArgs(no_state, by_layer) if scales else optax.identity()
    return optax.chain(clip(o.clip_grad, o.clip_per), optax.partition(groups, labels), scaled)
