"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294).

A student sees all crops of an image, its EMA teacher only the global ones; the student predicts the teacher's centred
and sharpened distribution over prototypes from every other crop.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import durations, health, losses, optim
from mim_jax.data.augment import Crops, Policy
from mim_jax.masking import NO_MASKS, Masks
from mim_jax.methods.base import BackboneMethod, Params, make_views, vit_settings
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT
from mim_jax.views import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDistillation(BackboneMethod):
    """What DINO, iBOT and DINOv2 have in common."""

    backbone: ViT
    student_temp: float
    center_momentum: float
    teacher_parts: tuple[str, ...] = ("backbone", "head")

    def tokens(self, params: Params, views: Params, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """CLS tokens [B, V, D] of the crops and patch tokens [B, G, N, D] of the global ones. The student is the one with a
        `key` (for stochastic depth): it sees all crops, the global ones masked; the teacher sees the global crops whole."""
        if key is None:
            out = self.backbone.apply({"params": params["backbone"]}, [views["global"]])
        else:
            crops = [views[group.name] for group in self.views.crops]
            masks = [views.get("mask"), None][: len(crops)]
            rngs = {"drop_path": key}
            out = self.backbone.apply({"params": params["backbone"]}, crops, train=True, masks=masks, rngs=rngs)
        return jnp.concatenate([o["cls"] for o in out], axis=1), out[0]["patch"]

    def figures(self, student_log: jax.Array, teacher: jax.Array, center: jax.Array | None) -> dict[str, jax.Array]:
        """`health.assignment_figures`, each teacher crop beside the student's next global crop; [B, V, K] and [B, G, K]."""
        return health.assignment_figures(teacher, jnp.roll(student_log[:, : teacher.shape[1]], 1, axis=1), center)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dino(SelfDistillation):
    head: DinoHead

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.dim)), train=True)
        backbone = self.backbone.init(backbone_key, [self.views.zeros()["global"]])
        stats = head.get("batch_stats", {})
        center = jnp.zeros((1, self.head.out_dim), head["params"]["last_layer"]["weight_v"].dtype)
        extra = {"center": center, "student_stats": stats, "teacher_stats": jax.tree.map(jnp.copy, stats)}
        return {"backbone": backbone["params"], "head": head["params"]}, extra

    def loss(self, params, teacher, target, extra, views, key, step):
        student_logits, student_stats = self.logits(params, extra["student_stats"], views, key)
        teacher_logits, teacher_stats = self.logits(teacher, extra["teacher_stats"], views)
        targets = losses.dino_teacher(teacher_logits, extra["center"], self.schedules["teacher_temp"](step))
        log_probs = jax.nn.log_softmax(student_logits / self.student_temp)
        loss = losses.dino_loss(log_probs, targets)
        # the loss has seen the old centre; the new one is for the next step
        center = losses.update_center(extra["center"], teacher_logits, self.center_momentum)
        extra = {"center": center, "student_stats": student_stats, "teacher_stats": teacher_stats}
        return loss, (extra, self.figures(log_probs, targets, center))

    def logits(self, params: Params, stats: Params, views: Params, key: jax.Array | None = None) -> tuple[jax.Array, Params]:
        """(logits [B, V, K], new running statistics of batch norm, if any) of the student (with a `key`) or the teacher."""
        cls, _ = self.tokens(params, views, key)
        variables = {"params": params["head"], "batch_stats": stats}
        logits, updates = self.head.apply(variables, cls, train=True, mutable="batch_stats")
        return logits, updates.get("batch_stats", {})


def make(config: ml_collections.ConfigDict) -> Dino:
    untrained = r"last_layer/weight_g$" if config.head.norm_last_layer else ""
    return Dino(**parts(config, ViT(**vit_of(config))), views=multi_crop(config, *policies(config)), untrained=untrained)


def vit_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Settings of the backbone."""
    return vit_settings(config.model) | {"kernel_init": jax.nn.initializers.normal(config.model.init_std)}


def parts(config: ml_collections.ConfigDict, backbone: ViT) -> dict[str, Any]:
    """What DINO and iBOT have in common."""
    warmup = durations.steps(config, "loss.teacher_temp_warmup") / durations.steps_per_epoch(config)
    temps = config.loss.warmup_teacher_temp, config.loss.teacher_temp
    return dict(
        backbone=backbone,
        head=DinoHead(**config.head, init_std=config.model.init_std, dtype=jnp.dtype(config.model.dtype)),
        schedules={"teacher_temp": optim.warmup_by_epoch(*temps, warmup, durations.steps_per_epoch(config))},
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
    )


def policies(config: ml_collections.ConfigDict) -> tuple[Policy, ...]:
    """Of the global crops: the first is always blurred, the others rarely, but they may be solarised (DINO, appendix C)."""
    if config.crops.global_crops_number < 2:
        raise ValueError("DINO compares crops with other crops: crops.global_crops_number must be at least 2")
    policy = functools.partial(Policy, blur_radius=tuple(config.crops.blur_radius))
    return policy(blur=1.0), *(policy(blur=0.1, solarize=0.2),) * (config.crops.global_crops_number - 1)


def multi_crop(config: ml_collections.ConfigDict, *policies: Policy, masks: Masks = NO_MASKS) -> Views:
    """Global crops of these policies, and local ones (SwAV; DINO, section 3.1)."""
    c = config.crops
    crops = [Crops("global", c.global_crops_size, tuple(c.global_crops_scale), policies)]
    if c.local_crops_number:
        local = (Policy(blur=0.5, blur_radius=tuple(c.blur_radius)),) * c.local_crops_number
        crops.append(Crops("local", c.local_crops_size, tuple(c.local_crops_scale), local))
    return make_views(config, *crops, masks=masks)
