"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al. 2022, arXiv:2111.07832).

DINO, whose student sees the global crops with some patches masked and predicts, besides the class token's prototypes, those
that the EMA teacher finds in the hidden patches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import durations, losses, optim
from mim_jax.masking import RatioMask
from mim_jax.methods.base import Params
from mim_jax.methods.dino import SelfDistillation, multi_crop, parts, policies, vit_of
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT, masked_first
from mim_jax.views import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ibot(SelfDistillation):
    views: Views[RatioMask]
    head: DinoHead
    teacher_head: DinoHead
    patch_center_momentum: float
    cls_weight: float
    patch_weight: float
    per_image: bool
    pictures: tuple[str, ...] = ("attention", "features")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        token = jnp.zeros((1, 1, self.backbone.dim))
        backbone = self.backbone.init(backbone_key, [self.views.zeros()["global"]])["params"]
        head = self.head.init(head_key, token, token, train=True)
        stats, dtype = head.get("batch_stats", {}), head["params"]["last_layer"]["weight_v"].dtype
        extra = {
            "center": jnp.zeros((1, self.head.out_dim), dtype),
            "patch_center": jnp.zeros((1, 1, self.head.patch_out_dim or self.head.out_dim), dtype),
            "student_stats": stats,
            "teacher_stats": jax.tree.map(jnp.copy, stats),
        }
        return {"backbone": backbone, "head": head["params"]}, extra

    def loss(self, params, teacher, target, extra, views, key, step):
        places, weight = masked_first(views["mask"], self.views.masks.count)
        student, student_stats = self.logits(self.head, params, extra["student_stats"], views, places, key)
        (cls, patch), teacher_stats = self.logits(self.teacher_head, teacher, extra["teacher_stats"], views)

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
            # the mean of all patches, masked or not
            "patch_center": losses.update_center(extra["patch_center"], patch, self.patch_center_momentum),
            "student_stats": student_stats,
            "teacher_stats": teacher_stats,
        }
        figures = self.figures(cls_log, cls_probs, extra["center"])
        figures |= {"train/loss_cls": cls_loss, "train/loss_patch": patch_loss, "train/masked": views["mask"].mean()}
        return cls_loss + patch_loss, (extra, figures)

    def logits(
        self,
        head: DinoHead,
        params: Params,
        stats: Params,
        views: Params,
        places: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], Params]:
        """((CLS logits [B, V, K], patch logits [B, G, M, K] at `places` [B, G, M], or of all patches), new running statistics
        of batch norm, if any) of the student (with a `key`) or the teacher."""
        cls, patch = self.tokens(params, views, key)
        if places is not None:
            patch = jnp.take_along_axis(patch, places[..., None], axis=2)
        variables = {"params": params["head"], "batch_stats": stats}
        flat = patch.reshape(len(patch), -1, patch.shape[-1])
        (cls, logits), updates = head.apply(variables, cls, flat, train=True, mutable="batch_stats")
        return (cls, logits.reshape(*patch.shape[:3], -1)), updates.get("batch_stats", {})


def make(config: ml_collections.ConfigDict) -> Ibot:
    m, loss, mask = config.model, config.loss, config.mask
    backbone = ViT(**vit_of(config), mask_token=True, mask_token_init=jax.nn.initializers.zeros)
    common, start = parts(config, backbone), durations.steps(config, "mask.start")
    head = common["head"]
    if loss.shared_head_teacher and head.patch_out_dim not in (0, head.out_dim):
        raise ValueError("with loss.shared_head_teacher, head.patch_out_dim must be 0 or head.out_dim")
    grid, ratios = config.crops.global_crops_size // m.patch_size, tuple((mean, half) for mean, half in mask.ratios)
    masks = RatioMask((grid, grid), ratios, mask.shape, start * config.data.batch_size)
    epoch = durations.steps_per_epoch(config)
    warmup = durations.steps(config, "loss.teacher_temp_warmup") / epoch
    temps = loss.warmup_teacher_patch_temp, loss.teacher_patch_temp
    common["schedules"]["teacher_patch_temp"] = optim.warmup_by_epoch(*temps, warmup, epoch, hold=start)
    return Ibot(
        **common,
        views=multi_crop(config, *policies(config), masks=masks),
        untrained=r"last_layer2?/weight_g$" if head.norm_last_layer else "",
        teacher_head=head.clone(patch_out_dim=0) if loss.shared_head_teacher else head,
        patch_center_momentum=loss.patch_center_momentum,
        cls_weight=loss.cls_weight,
        patch_weight=loss.patch_weight,
        per_image=loss.per_image,
    )
