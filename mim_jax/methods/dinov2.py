"""DINOv2: learning robust visual features without supervision (Oquab et al. 2024, arXiv:2304.07193).

iBOT's two losses, of heads of their own or of one, with targets balanced by Sinkhorn-Knopp or centred, and a third term that
spreads the student's features (KoLeo). Masks are drawn for groups of images, so that the number of masked patches in a group
has a tight bound: heads see these patches alone.
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
from mim_jax.masking import GroupMask
from mim_jax.methods.base import Params, vit_settings
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT, features, last_attention, masked_first


@dataclasses.dataclass(frozen=True)
class Dinov2:
    backbone: ViT
    dino_head: DinoHead
    ibot_head: DinoHead | None  # None: the other serves patches, too
    crops: tuple[Crops, ...]
    mask: GroupMask | None
    group_size: int  # images whose masks are drawn together, and among which KoLeo looks for neighbours
    schedules: Mapping[str, optim.Schedule]
    centering: str
    student_temp: float
    center_momentum: float
    dino_weight: float
    ibot_weight: float
    koleo_weight: float
    fixed: str = ""
    pictures: tuple[str, ...] = ("attention", "features")

    @property
    def teacher_parts(self) -> tuple[str, ...]:
        return ("backbone", "dino_head", *(("ibot_head",) if self.ibot_head else ()))

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        keys = jax.random.split(key, 3)
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, 3))
        grid, token = self.backbone.img_size // self.backbone.patch_size, jnp.zeros((1, self.backbone.dim))
        mask = jnp.zeros((1, 1, grid**2), bool)
        params = {
            "backbone": self.backbone.init(keys[0], [image], masks=[mask])["params"],
            "dino_head": self.dino_head.init(keys[1], token)["params"],
        }
        if self.ibot_head:
            params["ibot_head"] = self.ibot_head.init(keys[2], token)["params"]
        if self.centering == "sinkhorn_knopp":
            return params, {}
        dtype, patches = params["dino_head"]["last_layer"]["weight_v"].dtype, (self.ibot_head or self.dino_head).out_dim
        return params, {"center": jnp.zeros((1, self.dino_head.out_dim), dtype), "patch_center": jnp.zeros((1, patches), dtype)}

    def frozen(self, key: jax.Array) -> Params:
        return {}

    def loss(self, params, teacher, frozen, extra, views, key, step):
        batch, crops = views["global"].shape[:2]
        if batch % self.group_size:
            raise ValueError(f"a batch of {batch} images cannot be divided into groups of mask.group_size={self.group_size}")
        places, masked, weight = self.chosen(views)

        sizes = [views[c.name] for c in self.crops]
        masks, rngs = [views.get("mask"), None][: len(sizes)], {"drop_path": key}
        out = self.backbone.apply({"params": params["backbone"]}, sizes, train=True, masks=masks, rngs=rngs)
        cls, patch = self.heads(params, [o["cls"] for o in out], out[0]["patch"], places)
        cls_teacher, patch_teacher = self.votes(teacher, frozen, views["global"], places)

        temp = self.schedules["teacher_temp"](step)
        if self.centering == "sinkhorn_knopp":
            cls_probs = losses.sinkhorn_knopp(cls_teacher, temp)
            patch_probs = losses.sinkhorn_knopp(patch_teacher, temp, masked)
        else:
            cls_probs = losses.dino_teacher(cls_teacher, extra["center"], temp)
            patch_probs = losses.dino_teacher(patch_teacher, extra["patch_center"], temp)
            # each group's mean weighs the same, however many of its patches are masked
            means = jnp.einsum("gmk,gm->gk", patch_teacher, masked / jnp.maximum(masked.sum(-1, keepdims=True), 1))
            extra = {
                "center": losses.update_center(extra["center"], cls_teacher, self.center_momentum),
                "patch_center": losses.update_center(extra["patch_center"], means, self.center_momentum),
            }
        cls_log, patch_log = (jax.nn.log_softmax(x / self.student_temp) for x in (cls, patch))
        # the official code divides by a pair too many where there are no local crops
        alone = 1.0 if len(sizes) > 1 else 2 / 3
        koleo = sum(losses.koleo(out[0]["cls"][:, i], self.group_size) for i in range(crops))
        terms = {
            "train/loss_cls": self.dino_weight * alone * losses.dino_loss(cls_log, cls_probs),
            "train/loss_patch": self.ibot_weight * losses.patch_loss(patch_log, patch_probs, weight, batch * crops),
            "train/loss_koleo": self.koleo_weight * koleo,
        }
        beside = jnp.roll(cls_log[:, :crops], 1, axis=1)
        figures = health.vote_figures(cls_probs, beside, extra.get("center"))
        figures |= terms | {"train/masked": masked.sum() / (batch * crops * out[0]["patch"].shape[2])}
        return jnp.stack(list(terms.values())).sum(), (extra, figures)

    def chosen(self, views: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The patches of the second loss: their places in their group, [groups, upper], whether these are masked (the others
        only fill up), and their weights."""
        assert self.mask is not None
        mask = views["mask"]
        batch, crops, patches = mask.shape
        groups = batch // self.group_size
        places, masked = masked_first(mask.reshape(groups, -1), self.mask.upper)
        each = jnp.repeat(1 / jnp.maximum(mask.sum(-1), 1), patches, axis=-1, total_repeat_length=crops * patches)
        return places, masked, jnp.take_along_axis(each.reshape(groups, -1), places, axis=-1) * masked

    def votes(self, teacher: Params, frozen: Params, crops: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The teacher's logits of the global crops: see `heads`."""
        (seen,) = self.backbone.apply({"params": teacher["backbone"]}, [crops])
        return self.heads(teacher, [seen["cls"]], seen["patch"], places)

    def heads(
        self, params: Params, cls: list[jax.Array], patch: jax.Array, places: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """CLS logits of all crops, [B, V, K], and those of the patches [B, G, N, D] at `places` of their group, [groups, upper,
        K]."""
        groups = patch.reshape(len(places), -1, patch.shape[-1])
        picked = jnp.take_along_axis(groups, places[..., None], axis=1)
        head, name = (self.ibot_head, "ibot_head") if self.ibot_head else (self.dino_head, "dino_head")
        logits = self.dino_head.apply({"params": params["dino_head"]}, jnp.concatenate(cls, axis=1))
        return logits, head.apply({"params": params[name]}, picked)

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return features(self.backbone, params["backbone"], images)

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        return last_attention(self.backbone, params["backbone"], images)[:, :, 0, 1 + self.backbone.registers :]


def make(config: ml_collections.ConfigDict) -> Dinov2:
    c, mask = config.crops, config.mask
    grid, ratio = c.global_crops_size // config.model.patch_size, tuple(mask.ratio)
    return Dinov2(**parts(config), mask=GroupMask(grid, mask.group_size, 2, mask.probability, ratio, mask.exact))


def parts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All that does not depend on the masks."""
    m, c, o, loss = config.model, config.crops, config.optim, config.loss
    dtype, epoch = jnp.dtype(m.dtype), optim.steps_per_epoch(config)
    if loss.centering not in ("centering", "sinkhorn_knopp"):
        raise ValueError(f'loss.centering is {loss.centering!r}, but must be "centering" or "sinkhorn_knopp"')
    if c.global_crops_number != 2:
        raise ValueError(f"DINOv2 compares two global crops, not crops.global_crops_number={c.global_crops_number}")
    if c.global_crops_size % m.patch_size:
        raise ValueError(f"patches of model.patch_size={m.patch_size} pixels do not fill crops of {c.global_crops_size}")
    policy = functools.partial(Policy, blur_radius=tuple(c.blur_radius))
    # what the official code does: it takes the probability of a blur for that of none
    policies = policy(blur=0.0), policy(blur=0.9, solarize=0.2)
    crops = [Crops("global", c.global_crops_size, tuple(c.global_crops_scale), policies)]
    if c.local_crops_number:
        local = (policy(blur=0.5),) * c.local_crops_number
        crops.append(Crops("local", c.local_crops_size, tuple(c.local_crops_scale), local))
    head = functools.partial(DinoHead, norm_last_layer=False, init_std=m.init_std, dtype=dtype)
    warmup = round(loss.warmup_teacher_temp_epochs * epoch)
    tiny = jax.nn.initializers.normal(1e-6)
    return dict(
        backbone=ViT(
            **vit_settings(m),
            drop_path_group=config.mask.group_size,
            mask_token=True,
            layerscale=m.layerscale,
            ffn=m.ffn,
            registers=m.registers,
            antialias=m.antialias,
            kernel_init=jax.nn.initializers.normal(m.init_std),
            token_init=tiny,
            mask_token_init=jax.nn.initializers.zeros,
        ),
        dino_head=head(**config.head),
        ibot_head=head(**config.ibot_head) if loss.separate_head else None,
        crops=tuple(crops),
        group_size=config.mask.group_size,
        schedules={
            "teacher_temp": optim.cosine_schedule(
                loss.teacher_temp, loss.teacher_temp, warmup, warmup, start=loss.warmup_teacher_temp
            ),
            "momentum_teacher": optim.cosine_schedule(o.momentum_teacher, 1.0, optim.total_steps(config)),
        },
        centering=loss.centering,
        student_temp=loss.student_temp,
        center_momentum=loss.center_momentum,
        dino_weight=loss.dino_weight,
        ibot_weight=loss.ibot_weight,
        koleo_weight=loss.koleo_weight,
    )
