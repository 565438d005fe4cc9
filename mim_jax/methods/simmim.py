"""SimMIM: a simple framework for masked image modeling (Xie et al. 2022, arXiv:2111.09886).

Large random squares of the image become a mask token, the encoder (ViT or Swin) sees all tokens, and one linear layer
predicts the masked pixels, by their absolute error.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses, optim
from mim_jax.data.augment import FLIP, Crops
from mim_jax.masking import RandomMask
from mim_jax.methods.base import Params, vit_settings
from mim_jax.models.decoders import PixelHead
from mim_jax.models.layers import painted_in, patchify, unpatchify
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT, features, last_attention, rescale_residual


@dataclasses.dataclass(frozen=True)
class SimMim:
    backbone: ViT | Swin
    decoder: PixelHead
    crops: tuple[Crops, ...]
    mask: RandomMask
    norm_target_window: int
    fixed: str
    pictures: tuple[str, ...]
    schedules: Mapping[str, optim.Schedule] = dataclasses.field(default_factory=dict)
    teacher_parts: tuple[str, ...] = ()

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, decoder_key = jax.random.split(key)
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, 3))
        out, variables = self.backbone.init_with_output(backbone_key, [image])
        backbone = variables["params"]
        if isinstance(self.backbone, ViT):
            backbone = backbone | {"blocks": rescale_residual(backbone["blocks"])}
        return {"backbone": backbone, "decoder": self.decoder.init(decoder_key, out[0]["patch"])["params"]}, {}

    def frozen(self, key: jax.Array) -> Params:
        return {}

    def loss(self, params, teacher, frozen, extra, views, key, step):
        target, _, _ = self.target(views["global"])
        pred = self.predict(params, views, key)
        size = self.backbone.patch_size
        return losses.simmim_loss(patchify(pred, size), patchify(target, size), views["mask"]), (extra, {})

    def target(self, images: jax.Array) -> tuple[jax.Array, jax.Array | float, jax.Array | float]:
        """(what is predicted of the images, and the mean and std that were taken out of it)"""
        window = self.norm_target_window
        return losses.locally_normalized(images, window) if window else (images, 0.0, 1.0)

    def predict(self, params: Params, views: Params, key: jax.Array | None = None) -> jax.Array:
        """The images as the model paints them, [B, G, H, W, C]; `key` is for stochastic depth."""
        rngs, train = ({}, False) if key is None else ({"drop_path": key}, True)
        variables = {"params": params["backbone"]}
        out = self.backbone.apply(variables, [views["global"]], train=train, masks=[views["mask"]], rngs=rngs)[0]
        return unpatchify(self.decoder.apply({"params": params["decoder"]}, out["patch"]), self.backbone.stride)

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return features(self.backbone, params["backbone"], images)

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        return last_attention(self.backbone, params["backbone"], images)[:, :, 0, 1:]

    def reconstruction(self, params: Params, extra: Params, frozen: Params, views: Params) -> dict[str, jax.Array]:
        _, mean, std = self.target(views["global"])
        painted = self.predict(params, views) * std + mean
        return {"painted in": painted_in(views["global"], painted, views["mask"]), "all painted": painted}


def make(config: ml_collections.ConfigDict) -> SimMim:
    m, dtype = config.model, jnp.dtype(config.model.dtype)
    if m.arch == "swin":
        if len(m.depths) != len(m.heads):
            raise ValueError(f"model.depths={m.depths} and model.heads={m.heads} must have one number for each stage")
        settings = {name: m[name] for name in ("patch_size", "img_size", "dim", "mlp_ratio", "drop_path_rate", "unroll")}
        backbone: ViT | Swin = Swin(
            depths=tuple(m.depths), heads=tuple(m.heads), window=m.window, dtype=dtype, **settings
        )
    elif m.arch == "vit":
        one_std = jax.nn.initializers.truncated_normal(m.init_std, lower=-1.0, upper=1.0)
        backbone = ViT(
            **vit_settings(m),
            pos=m.pos,
            mask_token=True,
            layerscale=m.layerscale,
            k_bias=False,
            kernel_init=one_std,
            patch_init=one_std,
            patch_bias_init=jax.nn.initializers.zeros,
            token_init=one_std,
        )
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
    grid = size // square
    scale, number = tuple(config.crops.global_crops_scale), config.crops.global_crops_number
    return SimMim(
        backbone=backbone,
        decoder=PixelHead(backbone.stride**2 * 3, dtype),
        crops=(Crops("global", size, scale, (FLIP,) * number, interpolation="bilinear"),),
        mask=RandomMask(grid, math.ceil(grid**2 * config.mask.ratio), square // m.patch_size),
        norm_target_window=window,
        fixed=r"pos_embed$" if m.arch == "vit" and m.pos == "sincos" else "",
        pictures=("reconstruction", "attention") if m.arch == "vit" else ("reconstruction",),
    )
