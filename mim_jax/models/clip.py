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

from mim_jax.models.layers import LayerNorm, param_dtype, quick_gelu
from mim_jax.models.positions import interpolate_positions
from mim_jax.models.vit import PatchEmbed, stack

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
EPS = 1e-5


class ClipVision(nn.Module):
    """Normalised images [B, H, W, 3] -> all tokens [B, 1 + N, out_dim], CLS first, normalised and projected.

    CLIP projects CLS alone; EVA and VQ-KD learn from the patches, which they project alike. Positions are interpolated where H
    and W are not `img_size`.
    """

    patch_size: int
    img_size: int
    dim: int
    depth: int
    heads: int
    out_dim: int
    mlp_ratio: float = 4.0
    unroll: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        dtype, init = param_dtype(self.dtype), nn.initializers.normal(self.dim**-0.5)
        patches = PatchEmbed(self.patch_size, self.dim, init, self.dtype, use_bias=False, name="patch_embed")(images)
        batch, rows, columns, _ = patches.shape
        cls_token = self.param("cls_token", init, (1, 1, self.dim), dtype)
        pos_embed = self.param("pos_embed", init, (1, 1 + (self.img_size // self.patch_size) ** 2, self.dim), dtype)
        cls = jnp.broadcast_to(cls_token.astype(self.dtype), (batch, 1, self.dim))
        x = jnp.concatenate([cls, patches.reshape(batch, rows * columns, self.dim)], axis=1)
        x += interpolate_positions(pos_embed, rows, columns, offset=0.0).astype(self.dtype)
        x = LayerNorm(self.dtype, EPS, name="ln_pre")(x)
        blocks = stack(
            self.depth,
            self.unroll,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            layout=((1, x.shape[1]),),
            stochastic=False,
            kernel_init=init,
            dtype=self.dtype,
            norm_eps=EPS,
            act=quick_gelu,
        )
        x, _ = blocks(x, jnp.zeros(self.depth), (None,))
        return LayerNorm(dtype, EPS, name="ln_post")(x) @ self.param("proj", init, (self.dim, self.out_dim), dtype)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The tower as a `Network` that makes features: "patch" is EVA's target, "cls" is CLIP's embedding of the image."""

    vision: ClipVision

    @property
    def dim(self) -> int:
        return self.vision.out_dim

    @property
    def stride(self) -> int:
        return self.vision.patch_size

    def init_parts(self, key: jax.Array) -> dict[str, Any]:
        image = jnp.zeros((1, self.vision.img_size, self.vision.img_size, 3))
        return {"visual": self.vision.init(key, image)["params"]}

    def features(self, parts: dict[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        images = (images - jnp.array(MEAN)) / jnp.array(STD)
        tokens = self.vision.apply({"params": parts["visual"]}, images)
        return {"cls": tokens[:, 0], "patch": tokens[:, 1:]}


def make(config: ml_collections.ConfigDict) -> Clip:
    return Clip(ClipVision(**{**config.model, "dtype": jnp.dtype(config.model.dtype)}))
