"""Distillation of a smaller student from a frozen DINOv2 teacher (Oquab et al. 2024, arXiv:2304.07193, section 5).

DINOv2's losses with the outputs of a larger trained network as targets. Nothing is masked: the second loss is of all
patches of the global crops. The moving average of the student is the result.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.methods import dinov2
from mim_jax.methods.base import Params, made
from mim_jax.methods.dino import multi_crop
from mim_jax.models.heads import DinoHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(dinov2.Dinov2):
    target: dinov2.Dinov2  # with its heads
    untrained: str = r"mask_token$"  # official files have one

    def chosen(self, views: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, crops, side, *_ = views["global"].shape
        patches = (side // self.backbone.patch_size) ** 2
        groups, each = batch // self.group_size, self.group_size * crops * patches
        places = jnp.broadcast_to(jnp.arange(each), (groups, each))
        return places, jnp.ones(places.shape, bool), jnp.full(places.shape, 1 / patches)

    def teacher_of(self, teacher: Params, target: Params) -> tuple[dinov2.Dinov2, Params]:
        return self.target, target


def make(config: ml_collections.ConfigDict) -> Distillation:
    """Raises ValueError if the student and the teacher have different prototypes, patches or images."""
    network = config.target.network
    parts, source = dinov2.parts(config), made(network)
    if not isinstance(source, dinov2.Dinov2):
        raise ValueError(f"the teacher of config.target must be of DINOv2, not of {network.method}")

    def prototypes(*heads: DinoHead | None) -> list[int]:
        return [head.out_dim for head in heads if head]

    here = prototypes(parts["dino_head"], parts["ibot_head"])
    for what, student, teacher in (
        ("prototypes (of CLS and, if apart, of patches)", here, prototypes(source.dino_head, source.ibot_head)),
        ("patch size in pixels", parts["backbone"].patch_size, source.backbone.patch_size),
        ("mean and std of the images", [*config.data.mean, *config.data.std], [*network.data.mean, *network.data.std]),
    ):
        if student != teacher:
            raise ValueError(f"student and teacher must have the same {what}: {student} here, {teacher} there")
    views = multi_crop(config, *dinov2.policies(config))
    return Distillation(**parts, views=views, target=source)
