"""MAE: masked autoencoders (He et al. 2022, arXiv:2111.06377).

The encoder sees the visible quarter of the patches, a light decoder sees its tokens and mask tokens, and the loss is the
squared error of the masked patches' pixels.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses, optim
from mim_jax.data.augment import FLIP, Crops
from mim_jax.masking import RandomMask
from mim_jax.methods.base import Params, vit_settings
from mim_jax.models.decoders import MaeDecoder
from mim_jax.models.layers import painted_in, patchify, unpatchify
from mim_jax.models.vit import ViT, features, last_attention


@dataclasses.dataclass(frozen=True)
class Mae:
    backbone: ViT
    decoder: MaeDecoder
    crops: tuple[Crops, ...]
    mask: RandomMask
    norm_pix_loss: bool
    schedules: Mapping[str, optim.Schedule] = dataclasses.field(default_factory=dict)
    fixed: str = r"pos_embed$"
    teacher_parts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ("reconstruction", "attention")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, decoder_key = jax.random.split(key)
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, 3))
        out, backbone = self.backbone.init_with_output(backbone_key, [image])
        mask = jnp.zeros(out[0]["patch"].shape[:3], bool)
        decoder = self.decoder.init(decoder_key, **out[0], mask=mask)
        return {"backbone": backbone["params"], "decoder": decoder["params"]}, {}

    def frozen(self, key: jax.Array) -> Params:
        return {}

    def loss(self, params, teacher, frozen, extra, views, key, step):
        target = patchify(views["global"], self.backbone.patch_size)
        if self.norm_pix_loss:
            target, _, _ = losses.normalized_patches(target)
        return losses.mae_loss(self.predict(params, views, key), target, views["mask"]), (extra, {})

    def predict(self, params: Params, views: Params, key: jax.Array | None = None) -> jax.Array:
        """All patches as the decoder sees them, [B, G, N, p * p * C]; `key` is for stochastic depth."""
        encode = functools.partial(self.backbone.apply, masks=[views["mask"]], visible=self.mask.visible)
        rngs, train = ({}, False) if key is None else ({"drop_path": key}, True)
        out = encode({"params": params["backbone"]}, [views["global"]], train=train, rngs=rngs)[0]
        return self.decoder.apply({"params": params["decoder"]}, **out, mask=views["mask"])

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return features(self.backbone, params["backbone"], images)

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        return last_attention(self.backbone, params["backbone"], images)[:, :, 0, 1:]

    def reconstruction(self, params: Params, extra: Params, frozen: Params, views: Params) -> dict[str, jax.Array]:
        patches = self.predict(params, views)
        if self.norm_pix_loss:  # the prediction says nothing of a patch's mean and contrast: they are the image's own
            _, mean, std = losses.normalized_patches(patchify(views["global"], self.backbone.patch_size))
            patches = patches * std + mean
        painted = unpatchify(patches, self.backbone.patch_size)
        return {"painted in": painted_in(views["global"], painted, views["mask"]), "all painted": painted}


def make(config: ml_collections.ConfigDict) -> Mae:
    m, c, dtype = config.model, config.crops, jnp.dtype(config.model.dtype)
    if m.img_size % m.patch_size:
        raise ValueError(f"patches of model.patch_size={m.patch_size} pixels do not fill an image of {m.img_size}")
    xavier = jax.nn.initializers.xavier_uniform()
    grid = m.img_size // m.patch_size
    return Mae(
        backbone=ViT(
            **vit_settings(m),
            pos="sincos",
            kernel_init=xavier,
            patch_init=xavier,
        ),
        decoder=MaeDecoder(m.patch_size**2 * 3, grid, **config.decoder, mlp_ratio=m.mlp_ratio, unroll=m.unroll, dtype=dtype),
        crops=(Crops("global", m.img_size, tuple(c.global_crops_scale), (FLIP,) * c.global_crops_number),),
        # truncated, in floating point, as the official code does
        mask=RandomMask(grid, grid**2 - int(grid**2 * (1 - config.mask.ratio))),
        norm_pix_loss=config.loss.norm_pix_loss,
    )
