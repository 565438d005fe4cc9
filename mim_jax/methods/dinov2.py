"""DINOv2: learning robust visual features without supervision (Oquab et al. 2024, arXiv:2304.07193).

iBOT's two losses, of heads of their own or of one, with targets balanced by Sinkhorn-Knopp or centred, and a third term that
spreads the student's features (KoLeo). Masks are drawn for groups of images, so that the number of masked patches in a group
has a tight bound: heads see these patches alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import durations, losses, optim
from mim_jax.data.augment import Policy
from mim_jax.masking import GroupMask
from mim_jax.methods.base import Params
from mim_jax.methods.dino import SelfDistillation, multi_crop, vit_of
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT, masked_first
from mim_jax.sharding import device_count, replicate
from mim_jax.views import Views

PIECE = 2**28  # bytes of patch logits that a device holds at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2(SelfDistillation):
    views: Views[Any]  # masks: GroupMask, or none for distillation
    dino_head: DinoHead
    ibot_head: DinoHead | None  # None: dino_head serves patches, too
    group_size: int  # images whose masks are drawn together
    koleo_size: int  # images among which KoLeo looks for neighbours
    centering: str
    dino_weight: float
    ibot_weight: float
    koleo_weight: float
    pictures: tuple[str, ...] = ("attention", "features")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        keys = jax.random.split(key, 3)
        token = jnp.zeros((1, self.backbone.dim))
        params = {
            "backbone": self.backbone.init(keys[0], [self.views.zeros()["global"]])["params"],
            "dino_head": self.dino_head.init(keys[1], token)["params"],
        }
        if self.ibot_head:
            params["ibot_head"] = self.ibot_head.init(keys[2], token)["params"]
        if self.centering == "sinkhorn_knopp":
            return params, {}
        dtype, patches = params["dino_head"]["last_layer"]["weight_v"].dtype, (self.ibot_head or self.dino_head).out_dim
        return params, {"center": jnp.zeros((1, self.dino_head.out_dim), dtype), "patch_center": jnp.zeros((1, patches), dtype)}

    def loss(self, params, teacher, target, extra, views, key, step):
        batch, crops = views["global"].shape[:2]
        if batch % self.group_size:
            raise ValueError(f"a batch of {batch} images cannot be divided into groups of mask.group_size={self.group_size}")
        places, masked, weight = self.chosen(views)

        cls_tokens, patch_tokens = self.tokens(params, views, key)
        student_patch = self.patch_vectors(params, patch_tokens, places)
        source, trained = self.teacher_of(teacher, target)
        cls_teacher, patch_teacher = source.tokens(trained, views)
        cls_teacher = source.dino_head.apply({"params": trained["dino_head"]}, cls_teacher)
        patch_teacher = source.patch_vectors(trained, patch_teacher, places)

        temp = self.schedules["teacher_temp"](step)
        pieces = self.pieces(student_patch), self.pieces(patch_teacher), self.pieces(weight)
        if self.centering == "sinkhorn_knopp":
            cls_probs = losses.sinkhorn_knopp(cls_teacher, temp)
            logits = functools.partial(source.patch_logits, trained)
            bias = losses.sinkhorn_bias(logits, pieces[1], self.pieces(masked), temp, unroll=self.backbone.unroll)
        else:
            cls_probs = losses.dino_teacher(cls_teacher, extra["center"], temp)
            bias = -extra["patch_center"] / temp
            # each group's mean weighs the same, however many of its patches are masked; logits are linear in the vectors
            means = jnp.einsum("gmd,gm->gd", patch_teacher, masked / jnp.maximum(masked.sum(-1, keepdims=True), 1))
            means = source.patch_logits(trained, means)
            extra = {
                "center": losses.update_center(extra["center"], cls_teacher, self.center_momentum),
                "patch_center": losses.update_center(extra["patch_center"], means, self.center_momentum),
            }

        def of_piece(total: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            student, teacher, weight = piece
            probs = jax.lax.stop_gradient(jax.nn.softmax(source.patch_logits(trained, teacher) / temp + bias))
            log_probs = jax.nn.log_softmax(self.patch_logits(params, student) / self.student_temp)
            return total + losses.patch_loss(log_probs, probs, weight, batch * crops), None

        of_piece = jax.checkpoint(of_piece) if len(pieces[0]) > 1 else of_piece
        patch_loss, _ = jax.lax.scan(of_piece, jnp.zeros((), student_patch.dtype), pieces, unroll=self.backbone.unroll)
        cls_log = jax.nn.log_softmax(self.dino_head.apply({"params": params["dino_head"]}, cls_tokens) / self.student_temp)
        # the official code divides by a pair too many if there are no local crops
        alone = 1.0 if len(self.views.crops) > 1 else 2 / 3
        neighbors = cls_tokens[:, :crops]
        neighbors = neighbors if self.koleo_size == self.group_size else replicate(neighbors)  # of several devices
        koleo = sum(losses.koleo(neighbors[:, i], self.koleo_size) for i in range(crops))
        terms = {
            "train/loss_cls": self.dino_weight * alone * losses.dino_loss(cls_log, cls_probs),
            "train/loss_patch": self.ibot_weight * patch_loss,
            "train/loss_koleo": self.koleo_weight * koleo,
        }
        figures = self.figures(cls_log, cls_probs, extra.get("center"))
        figures |= terms | {"train/masked": masked.sum() / (batch * crops * patch_tokens.shape[2])}
        return jnp.stack(list(terms.values())).sum(), (extra, figures)

    def chosen(self, views: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The patches of the second loss: their places in their group, [groups, upper], whether these are masked (padding
        entries are False), and their weights."""
        mask = views["mask"]
        batch, crops, patches = mask.shape
        groups = batch // self.group_size
        places, masked = masked_first(mask.reshape(groups, -1), self.views.masks.upper)
        each = jnp.repeat(1 / jnp.maximum(mask.sum(-1), 1), patches, axis=-1, total_repeat_length=crops * patches)
        return places, masked, jnp.take_along_axis(each.reshape(groups, -1), places, axis=-1) * masked

    def teacher_of(self, teacher: Params, target: Params) -> tuple["Dinov2", Params]:
        """The network that makes the targets, and its parameters."""
        return self, teacher

    def patch_vectors(self, params: Params, patch: jax.Array, places: jax.Array) -> jax.Array:
        """The head's unit vectors [groups, upper, bottleneck] of the patch tokens [B, G, N, D] at `places` in their group."""
        groups = patch.reshape(len(places), -1, patch.shape[-1])
        picked = jnp.take_along_axis(groups, places[..., None], axis=1)
        head, name = self.patch_head
        return head.apply({"params": params[name]}, picked, method="bottleneck")

    def patch_logits(self, params: Params, vectors: jax.Array) -> jax.Array:
        """[..., bottleneck] -> [..., K]."""
        head, name = self.patch_head
        return head.apply({"params": params[name]}, vectors, method="prototypes")

    @property
    def patch_head(self) -> tuple[DinoHead, str]:
        return (self.ibot_head, "ibot_head") if self.ibot_head else (self.dino_head, "dino_head")

    def pieces(self, x: jax.Array) -> jax.Array:
        """[groups, upper, ...] -> [pieces, groups, some, ...], padded with zeros: a device computes the logits of one piece
        after the other, and again in the backward pass."""
        groups, upper = x.shape[:2]
        size = groups * upper * self.patch_head[0].out_dim * 4 // device_count()
        number = min(-(-size // PIECE), upper)
        some = -(-upper // number)
        x = jnp.pad(x, ((0, 0), (0, number * some - upper)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(groups, number, some, *x.shape[2:]), 1, 0)


def make(config: ml_collections.ConfigDict) -> Dinov2:
    mask, grid = config.mask, config.crops.global_crops_size // config.model.patch_size
    masks = GroupMask((grid, grid), mask.group_size, 2, mask.probability, tuple(mask.ratio), mask.exact)
    return Dinov2(**parts(config), views=multi_crop(config, *policies(config), masks=masks))


def policies(config: ml_collections.ConfigDict) -> tuple[Policy, Policy]:
    """Of the two global crops, as the official code does it: it takes the probability of a blur for that of none."""
    if config.crops.global_crops_number != 2:
        raise ValueError(f"crops.global_crops_number is {config.crops.global_crops_number}, but must be 2 for DINOv2")
    policy = functools.partial(Policy, blur_radius=tuple(config.crops.blur_radius))
    return policy(blur=0.0), policy(blur=0.9, solarize=0.2)


def parts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All but the views."""
    m, loss = config.model, config.loss
    head = functools.partial(DinoHead, norm_last_layer=False, init_std=m.init_std, dtype=jnp.dtype(m.dtype))
    warmup = durations.steps(config, "loss.teacher_temp_warmup")
    temp = optim.cosine_schedule(loss.teacher_temp, loss.teacher_temp, warmup, warmup, start=loss.warmup_teacher_temp)
    return dict(
        backbone=ViT(
            **vit_of(config),
            drop_path_group=config.mask.group_size,
            mask_token=True,
            layerscale=m.layerscale,
            ffn=m.ffn,
            registers=m.registers,
            antialias=m.antialias,
            token_init=jax.nn.initializers.normal(1e-6),
            mask_token_init=jax.nn.initializers.zeros,
        ),
        dino_head=head(**config.head),
        ibot_head=head(**config.ibot_head) if loss.separate_head else None,
        teacher_parts=("backbone", "dino_head", *(("ibot_head",) if loss.separate_head else ())),
        group_size=config.mask.group_size,
        koleo_size=config.mask.group_size * config.loss.get("koleo_groups", 1),
        schedules={"teacher_temp": temp},
        centering=loss.centering,
        student_temp=loss.student_temp,
        center_momentum=loss.center_momentum,
        dino_weight=loss.dino_weight,
        ibot_weight=loss.ibot_weight,
        koleo_weight=loss.koleo_weight,
    )
