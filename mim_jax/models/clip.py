"""CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020), a frozen network whose features are targets.

A ViT with a norm before the blocks, QuickGELU, and no bias in the patch embedding. A projection maps its tokens to the space
that images and texts share.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.models import vit
from mim_jax.models.layers import param_dtype
from mim_jax.models.vit import ViT

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


@dataclasses.dataclass(frozen=True)
class Clip:
    """The tower as a `Network` that makes features: "patch" is EVA's target, "cls" is CLIP's embedding of the image.

    CLIP projects CLS alone; EVA and VQ-KD learn from the patches, which they project alike. The projection is a parameter
    beside those of the ViT.
    """

    vision: ViT
    dim: int

    @property
    def stride(self) -> int:
        return self.vision.patch_size

    def init_parts(self, key: jax.Array) -> dict[str, Any]:
        image = jnp.zeros((1, 1, self.vision.img_size, self.vision.img_size, 3))
        proj = self.vision.token_init(key, (self.vision.dim, self.dim), param_dtype(self.vision.dtype))
        return {"visual": self.vision.init(key, [image])["params"] | {"proj": proj}}

    def features(self, parts: dict[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        images, visual = (images - jnp.array(MEAN)) / jnp.array(STD), parts["visual"]
        return {name: tokens @ visual["proj"] for name, tokens in vit.features(self.vision, visual, images).items()}


def make(config: ml_collections.ConfigDict) -> Clip:
    settings = dict(config.model) | {"dtype": jnp.dtype(config.model.dtype)}
    dim, init = settings.pop("out_dim"), nn.initializers.normal(config.model.dim**-0.5)
    inits = dict.fromkeys(("kernel_init", "patch_init", "token_init", "pos_init"), init)
    of_clip = {"pos_offset": 0.0, "act": "quick_gelu", "norm_eps": 1e-5, "pre_norm": True, "patch_bias": False}
    return Clip(ViT(**settings, **of_clip, **inits), dim)
