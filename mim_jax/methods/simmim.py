"""SimMIM: a simple framework for masked image modeling (Xie et al. 2022, arXiv:2111.09886).

Large random squares of the image become a mask token, the encoder (ViT or Swin) sees all tokens, and one linear layer
predicts the masked pixels, by their absolute error.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.masking import RandomMask
from mim_jax.methods.base import BackboneMethod, Images, Params, global_views, loop_settings
from mim_jax.methods.beit import beit_vit
from mim_jax.models.decoders import PixelHead
from mim_jax.models.layers import fill_masked, patchify, unpatchify
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT, rescale_residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimMim(BackboneMethod):
    backbone: ViT | Swin
    decoder: PixelHead
    norm_target_window: int

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, decoder_key = jax.random.split(key)
        out, variables = self.backbone.init_with_output(backbone_key, [self.views.zeros()["global"]])
        backbone = variables["params"]
        if isinstance(self.backbone, ViT):
            backbone = backbone | {"blocks": rescale_residual(backbone["blocks"])}
        return {"backbone": backbone, "decoder": self.decoder.init(decoder_key, out[0]["patch"])["params"]}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
        images, _, _ = self.normalized(views["global"])
        pred = self.predict(params, views, key)
        size = self.backbone.patch_size
        return losses.simmim_loss(patchify(pred, size), patchify(images, size), views["mask"]), (extra, {})

    def normalized(self, images: jax.Array) -> tuple[jax.Array, jax.Array | float, jax.Array | float]:
        """(the images that are predicted, and the mean and std that were taken out of them)"""
        window = self.norm_target_window
        return losses.locally_normalized(images, window) if window else (images, 0.0, 1.0)

    def predict(self, params: Params, views: Params, key: jax.Array | None = None) -> jax.Array:
        """The predicted images [B, G, H, W, C]; `key` is for stochastic depth."""
        out = self.encoded(params, views["global"], key, masks=[views["mask"]])
        return unpatchify(self.decoder.apply({"params": params["decoder"]}, out["patch"]), self.backbone.stride)

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        _, mean, std = self.normalized(views["global"])
        predicted = self.predict(params, views) * std + mean
        return {"masked predicted": fill_masked(views["global"], predicted, views["mask"]), "all predicted": predicted}


def make(config: ml_collections.ConfigDict) -> SimMim:
    m, dtype = config.model, jnp.dtype(config.model.dtype)
    if m.arch == "swin":
        if len(m.depths) != len(m.heads):
            raise ValueError(f"model.depths={m.depths} and model.heads={m.heads} must have one number for each stage")
        settings = {name: m[name] for name in ("patch_size", "img_size", "dim", "mlp_ratio", "drop_path_rate")} | loop_settings(
            m
        )
        backbone: ViT | Swin = Swin(depths=tuple(m.depths), heads=tuple(m.heads), window=m.window, dtype=dtype, **settings)
    elif m.arch == "vit":
        backbone = beit_vit(config, m.pos)
    else:
        raise ValueError(f'model.arch is {m.arch!r}, but must be "vit" or "swin"')
    size, square = m.img_size, config.mask.mask_patch_size
    if size % square or square % m.patch_size or size % backbone.stride:
        raise ValueError(
            f"masks of squares of mask.mask_patch_size={square} pixels need squares that patches of {m.patch_size} pixels fill "
            f"and that fill the image, which is of {size}; so must the encoder's tokens, of {backbone.stride}"
        )
    window = config.loss.norm_target_window
    if window and (window % 2 == 0 or window < 3):
        raise ValueError(f"loss.norm_target_window is {window}, but must be 0 or an odd number of pixels, 3 at least")
    grid, count = size // m.patch_size, math.ceil((size // square) ** 2 * config.mask.ratio)
    masks = RandomMask((grid, grid), count, square // m.patch_size)
    return SimMim(
        views=global_views(config, masks, interpolation="bilinear"),
        backbone=backbone,
        decoder=PixelHead(backbone.stride**2 * 3, dtype),
        norm_target_window=window,
        untrained=r"pos_embed$" if m.arch == "vit" and m.pos == "sincos" else "",
        pictures=("reconstruction", "attention") if m.arch == "vit" else ("reconstruction",),
    )
