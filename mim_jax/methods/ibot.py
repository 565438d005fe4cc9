"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al. 2022, arXiv:2111.07832).

DINO, whose student sees the global crops with some patches masked and predicts, besides the class token's prototypes, those
that the EMA teacher finds in the hidden patches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import health, losses, optim
from mim_jax.masking import RatioMask
from mim_jax.methods import dino
from mim_jax.methods.base import Params
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import masked_first


@dataclasses.dataclass(frozen=True)
class Ibot(dino.Dino):
    pictures: tuple[str, ...] = ("attention", "features")
    mask: RatioMask = dataclasses.field(kw_only=True)
    teacher_head: DinoHead = dataclasses.field(kw_only=True)
    patch_center_momentum: float = dataclasses.field(kw_only=True)
    cls_weight: float = dataclasses.field(kw_only=True)
    patch_weight: float = dataclasses.field(kw_only=True)
    per_image: bool = dataclasses.field(kw_only=True)

    @property
    def fixed(self) -> str:
        return r"last_layer2?/weight_g$" if self.head.norm_last_layer else ""

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, 3))
        mask = jnp.zeros((1, 1, self.mask.grid**2), bool)
        token = jnp.zeros((1, 1, self.backbone.dim))
        backbone = self.backbone.init(backbone_key, [image], masks=[mask])["params"]
        head = self.head.init(head_key, token, token, train=True)
        stats, dtype = head.get("batch_stats", {}), head["params"]["last_layer"]["weight_v"].dtype
        extra = {
            "center": jnp.zeros((1, self.head.out_dim), dtype),
            "patch_center": jnp.zeros((1, 1, self.head.patch_out_dim or self.head.out_dim), dtype),
            "student_stats": stats,
            "teacher_stats": jax.tree.map(jnp.copy, stats),
        }
        return {"backbone": backbone, "head": head["params"]}, extra

    def loss(self, params, teacher, frozen, extra, views, key, step):
        places, weight = masked_first(views["mask"], self.mask.count)
        crops = [views[c.name] for c in self.crops]
        masks = [views["mask"], None][: len(crops)]
        student, student_stats = self.both(self.head, params, extra["student_stats"], crops, masks, places, key)
        (cls, patch), teacher_stats = self.both(self.teacher_head, teacher, extra["teacher_stats"], crops[:1])

        cls_probs = losses.dino_teacher(cls, extra["center"], self.schedules["teacher_temp"](step))
        picked = jnp.take_along_axis(patch, places[..., None], axis=2)
        patch_probs = losses.dino_teacher(picked, extra["patch_center"], self.schedules["teacher_patch_temp"](step))
        cls_log, patch_log = (jax.nn.log_softmax(logits / self.student_temp) for logits in student)
        cls_loss = self.cls_weight * losses.dino_loss(cls_log, cls_probs)
        number = weight.sum(-1, keepdims=True)
        weight = weight / jnp.maximum(number, 1) if self.per_image else weight
        patch_loss = self.patch_weight * losses.patch_loss(patch_log, patch_probs, weight, number.size)

        extra = {
            "center": losses.update_center(extra["center"], cls, self.center_momentum),
            # of all patches, not of the masked ones alone
            "patch_center": losses.update_center(extra["patch_center"], patch, self.patch_center_momentum),
            "student_stats": student_stats,
            "teacher_stats": teacher_stats,
        }
        beside = jnp.roll(cls_log[:, : cls_probs.shape[1]], 1, axis=1)
        figures = health.vote_figures(cls_probs, beside, extra["center"])
        figures |= {"train/loss_cls": cls_loss, "train/loss_patch": patch_loss, "train/masked": views["mask"].mean()}
        return cls_loss + patch_loss, (extra, figures)

    def both(
        self,
        head: DinoHead,
        params: Params,
        stats: Params,
        crops: list,
        masks: list | None = None,
        places: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], Params]:
        """((CLS logits of all crops [B, V, K], patch logits of the global ones at `places` [B, G, M, K], or of all patches),
        new running figures of batch norm, if any); `key` is for the student's stochastic depth."""
        rngs = {} if key is None else {"drop_path": key}
        out = self.backbone.apply({"params": params["backbone"]}, crops, train=key is not None, masks=masks, rngs=rngs)
        cls, patch = jnp.concatenate([o["cls"] for o in out], axis=1), out[0]["patch"]
        if places is not None:
            patch = jnp.take_along_axis(patch, places[..., None], axis=2)
        variables = {"params": params["head"], "batch_stats": stats}
        flat = patch.reshape(len(patch), -1, patch.shape[-1])
        (cls, logits), updates = head.apply(variables, cls, flat, train=True, mutable="batch_stats")
        return (cls, logits.reshape(*patch.shape[:3], -1)), updates.get("batch_stats", {})


def make(config: ml_collections.ConfigDict) -> Ibot:
    m, loss, mask = config.model, config.loss, config.mask
    parts = dino.parts(config, mask_token=True, mask_token_init=jax.nn.initializers.zeros)
    warmup = loss.warmup_teacher_temp_epochs, optim.steps_per_epoch(config)
    start = optim.duration(config, mask, "start")
    patch_temp = optim.warmup_by_epoch(loss.warmup_teacher_patch_temp, loss.teacher_patch_temp, *warmup, hold=start)
    ratios = tuple((mean, half) for mean, half in mask.ratios)
    if config.crops.global_crops_size % m.patch_size:
        raise ValueError(
            f"patches of model.patch_size={m.patch_size} pixels do not fill crops of {config.crops.global_crops_size}"
        )
    shared = loss.shared_head_teacher
    if shared and parts["head"].patch_out_dim not in (0, parts["head"].out_dim):
        raise ValueError("with loss.shared_head_teacher, head.patch_out_dim must be 0 or head.out_dim")
    return Ibot(
        **parts | {"schedules": parts["schedules"] | {"teacher_patch_temp": patch_temp}},
        mask=RatioMask(
            config.crops.global_crops_size // m.patch_size, ratios, mask.shape, start * config.data.batch_size
        ),
        teacher_head=parts["head"].clone(patch_out_dim=0) if shared else parts["head"],
        patch_center_momentum=loss.patch_center_momentum,
        cls_weight=loss.cls_weight,
        patch_weight=loss.patch_weight,
        per_image=loss.per_image,
    )
