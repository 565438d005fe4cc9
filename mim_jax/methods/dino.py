"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294).

A student sees all crops of an image, its EMA teacher only the global ones; the student predicts the teacher's centred
and sharpened distribution over prototypes from every other crop.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import health, losses, optim
from mim_jax.data.augment import Crops, Policy
from mim_jax.masking import Mask
from mim_jax.methods.base import Params, vit_settings
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT, features, last_attention


@dataclasses.dataclass(frozen=True)
class Dino:
    backbone: ViT
    head: DinoHead
    crops: tuple[Crops, ...]
    schedules: Mapping[str, optim.Schedule]
    student_temp: float
    center_momentum: float
    mask: Mask | None = None
    teacher_parts: tuple[str, ...] = ("backbone", "head")
    pictures: tuple[str, ...] = ("attention",)

    @property
    def fixed(self) -> str:
        return r"last_layer/weight_g$" if self.head.norm_last_layer else ""

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, 3))
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.dim)), train=True)
        params = {"backbone": self.backbone.init(backbone_key, [image])["params"], "head": head["params"]}
        stats = head.get("batch_stats", {})
        center = jnp.zeros((1, self.head.out_dim), params["head"]["last_layer"]["weight_v"].dtype)
        return params, {"center": center, "student_stats": stats, "teacher_stats": jax.tree.map(jnp.copy, stats)}

    def frozen(self, key: jax.Array) -> Params:
        return {}

    def loss(self, params, teacher, frozen, extra, views, key, step):
        crops = [views[c.name] for c in self.crops]
        student_logits, student_stats = self.logits(params, extra["student_stats"], crops, key)
        teacher_logits, teacher_stats = self.logits(teacher, extra["teacher_stats"], [views["global"]])

        targets = losses.dino_teacher(teacher_logits, extra["center"], self.schedules["teacher_temp"](step))
        log_probs = jax.nn.log_softmax(student_logits / self.student_temp)
        loss = losses.dino_loss(log_probs, targets)

        # the loss has seen the old centre; the new one is for the next step
        center = losses.update_center(extra["center"], teacher_logits, self.center_momentum)
        extra = {"center": center, "student_stats": student_stats, "teacher_stats": teacher_stats}
        # each teacher crop beside the student's next global crop
        student = jnp.roll(log_probs[:, : targets.shape[1]], 1, axis=1)
        return loss, (extra, health.vote_figures(targets, student, center))

    def logits(self, params: Params, stats: Params, crops: list, key: jax.Array | None = None) -> tuple:
        """([B, V, K], new running figures of batch norm, if any); `key` is for the student's stochastic depth."""
        rngs = {} if key is None else {"drop_path": key}
        out = self.backbone.apply({"params": params["backbone"]}, crops, train=key is not None, rngs=rngs)
        cls = jnp.concatenate([o["cls"] for o in out], axis=1)
        variables = {"params": params["head"], "batch_stats": stats}
        logits, updates = self.head.apply(variables, cls, train=True, mutable="batch_stats")
        return logits, updates.get("batch_stats", {})

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return features(self.backbone, params["backbone"], images)

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        return last_attention(self.backbone, params["backbone"], images)[:, :, 0, 1:]


def make(config: ml_collections.ConfigDict) -> Dino:
    return Dino(**parts(config))


def parts(config: ml_collections.ConfigDict, **vit: Any) -> dict[str, Any]:
    """What DINO and iBOT have in common; `vit` are more settings of the backbone."""
    m, c, o, epoch = config.model, config.crops, config.optim, optim.steps_per_epoch(config)
    dtype = jnp.dtype(m.dtype)
    if c.global_crops_number < 2:
        raise ValueError("DINO compares crops with other crops: crops.global_crops_number must be at least 2")
    policy = functools.partial(Policy, blur_radius=tuple(c.blur_radius))
    # DINO, appendix C: the first global crop is always blurred, the second rarely, but it may be solarized
    policies = (policy(blur=1.0), *(policy(blur=0.1, solarize=0.2),) * (c.global_crops_number - 1))
    crops = [Crops("global", c.global_crops_size, tuple(c.global_crops_scale), policies)]
    if c.local_crops_number:
        policies = (policy(blur=0.5),) * c.local_crops_number
        crops.append(Crops("local", c.local_crops_size, tuple(c.local_crops_scale), policies))
    return dict(
        backbone=ViT(
            **vit_settings(m),
            kernel_init=jax.nn.initializers.normal(m.init_std),
            **vit,
        ),
        head=DinoHead(**config.head, init_std=m.init_std, dtype=dtype),
        crops=tuple(crops),
        schedules={
            "teacher_temp": optim.warmup_by_epoch(
                config.loss.warmup_teacher_temp,
                config.loss.teacher_temp,
                config.loss.warmup_teacher_temp_epochs,
                epoch,
            ),
            "momentum_teacher": optim.cosine_schedule(o.momentum_teacher, 1.0, optim.total_steps(config)),
        },
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
    )
