"""MAE: masked autoencoders (He et al. 2022, arXiv:2111.06377).

The encoder sees the visible quarter of the patches, a light decoder sees its tokens and mask tokens, and the loss is the
squared error of the masked patches' pixels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.masking import RandomMask
from mim_jax.methods.base import BackboneMethod, Images, Params, global_views, loop_settings, vit_settings
from mim_jax.models.decoders import MaeDecoder
from mim_jax.models.layers import fill_masked, patchify, unpatchify
from mim_jax.models.vit import ViT
from mim_jax.views import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mae(BackboneMethod):
    views: Views[RandomMask]
    backbone: ViT
    decoder: MaeDecoder
    norm_pix_loss: bool
    untrained: str = r"pos_embed$"
    pictures: tuple[str, ...] = ("reconstruction", "attention")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, decoder_key = jax.random.split(key)
        out, backbone = self.backbone.init_with_output(backbone_key, [self.views.zeros()["global"]])
        mask = jnp.zeros(out[0]["patch"].shape[:3], bool)
        decoder = self.decoder.init(decoder_key, **out[0], mask=mask)
        return {"backbone": backbone["params"], "decoder": decoder["params"]}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
        patches = patchify(views["global"], self.backbone.patch_size)
        if self.norm_pix_loss:
            patches, _, _ = losses.normalized_patches(patches)
        return losses.mae_loss(self.predict(params, views, key), patches, views["mask"]), (extra, {})

    def predict(self, params: Params, views: Params, key: jax.Array | None = None) -> jax.Array:
        """All patches as the decoder sees them, [B, G, N, p * p * C]; `key` is for stochastic depth."""
        out = self.encoded(params, views["global"], key, masks=[views["mask"]], visible=self.views.masks.visible)
        return self.decoder.apply({"params": params["decoder"]}, **out, mask=views["mask"])

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        patches = self.predict(params, views)
        if self.norm_pix_loss:  # the prediction has no mean and contrast: they are taken from the image
            _, mean, std = losses.normalized_patches(patchify(views["global"], self.backbone.patch_size))
            patches = patches * std + mean
        predicted = unpatchify(patches, self.backbone.patch_size)
        return {"masked predicted": fill_masked(views["global"], predicted, views["mask"]), "all predicted": predicted}


def make(config: ml_collections.ConfigDict) -> Mae:
    m, dtype = config.model, jnp.dtype(config.model.dtype)
    xavier = jax.nn.initializers.xavier_uniform()
    grid = m.img_size // m.patch_size
    # truncated, in floating point, as the official code does
    masks = RandomMask((grid, grid), grid**2 - int(grid**2 * (1 - config.mask.ratio)))
    return Mae(
        views=global_views(config, masks),
        backbone=ViT(
            **vit_settings(m),
            pos="sincos",
            kernel_init=xavier,
            patch_init=xavier,
        ),
        decoder=MaeDecoder(m.patch_size**2 * 3, grid, **config.decoder, mlp_ratio=m.mlp_ratio, dtype=dtype, **loop_settings(m)),
        norm_pix_loss=config.loss.norm_pix_loss,
    )
