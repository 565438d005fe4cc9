"""Masked patch prediction of the ViT paper (Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.2).

Half of the patches are corrupted as BERT corrupts words, and the model predicts the mean colour of each of them, of 3 bits a
channel: the oldest of the masked image models here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.masking import RandomMask
from mim_jax.methods.base import BackboneMethod, Images, Params, global_views, vit_settings
from mim_jax.models.heads import TokenHead
from mim_jax.models.layers import fill_masked, patchify, unpatchify
from mim_jax.models.vit import ViT
from mim_jax.views import Views

LEVELS = 8  # of a channel: 3 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedPatch(BackboneMethod):
    views: Views[RandomMask]  # a masked patch is one that is corrupted, in whichever way
    backbone: ViT
    head: TokenHead
    pictures: tuple[str, ...] = ("reconstruction", "attention")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        backbone = self.backbone.init(backbone_key, [self.views.zeros()["global"]])
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.dim)))
        return {"backbone": backbone["params"], "head": head["params"]}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
        corrupt_key, drop_key = jax.random.split(key)
        images, hidden = self.corrupted(views["global"], views["mask"], corrupt_key)
        logits, colors = self.predict(params, images, hidden, drop_key), self.colors(views["global"])
        loss = losses.masked_cross_entropy(logits, colors, views["mask"])
        right = jnp.sum((logits.argmax(-1) == colors) & views["mask"]) / jnp.sum(views["mask"])
        counts = jnp.bincount(colors.reshape(-1), views["mask"].reshape(-1).astype(loss.dtype), length=LEVELS**3)
        return loss, (extra, {"train/masked_accuracy": right, "train/most_frequent_color": counts.max() / counts.sum()})

    def corrupted(self, images: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(images [B, G, H, W, C] with the replaced patches, bool [B, G, N] of those that become the mask token).

        Of the patches in `mask` 80 % become the token, 10 % another patch of their image, and 10 % stay (BERT, section 3.1). To
        replace a patch's pixels is to replace its embedding: positions are added later.
        """
        way_key, other_key = jax.random.split(key)
        way, count = jax.random.uniform(way_key, mask.shape), mask.shape[-1]
        patches = patchify(images, self.backbone.patch_size)
        others = (jnp.arange(count) + jax.random.randint(other_key, mask.shape, 1, count)) % count
        replaced = mask & (way >= 0.8) & (way < 0.9)
        patches = jnp.where(replaced[..., None], jnp.take_along_axis(patches, others[..., None], axis=2), patches)
        grid = images.shape[2] // self.backbone.patch_size, images.shape[3] // self.backbone.patch_size
        return unpatchify(patches, self.backbone.patch_size, grid), mask & (way < 0.8)

    def colors(self, images: jax.Array) -> jax.Array:
        """The class of each patch's mean colour, 64 * red + 8 * green + blue: normalised [..., H, W, 3] -> int32 [..., N]."""
        patches = patchify(images, self.backbone.patch_size)
        mean = patches.reshape(*patches.shape[:-1], -1, 3).mean(-2) * jnp.array(self.views.std) + jnp.array(self.views.mean)
        levels = jnp.clip(jnp.floor(mean * LEVELS), 0, LEVELS - 1).astype(jnp.int32)
        return levels @ jnp.array([LEVELS**2, LEVELS, 1])

    def predict(self, params: Params, images: jax.Array, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scores [B, G, N, 512] of all patches where those in `hidden` are the token; `key` is for stochastic depth."""
        patch = self.encoded(params, images, key, masks=[hidden])["patch"]
        return self.head.apply({"params": params["head"]}, patch)

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        predicted = self.predict(params, views["global"], views["mask"]).argmax(-1)
        true = self.painted(self.colors(views["global"]), views["global"])
        return {"colors": true, "masked predicted": fill_masked(true, self.painted(predicted, true), views["mask"])}

    def painted(self, colors: jax.Array, like: jax.Array) -> jax.Array:
        """Normalised images of the shape of `like`, each patch in the middle of its class of colours."""
        levels = jnp.stack([colors // LEVELS**2, colors // LEVELS % LEVELS, colors % LEVELS], axis=-1)
        pixels = ((levels + 0.5) / LEVELS - jnp.array(self.views.mean)) / jnp.array(self.views.std)
        size = self.backbone.patch_size
        return unpatchify(jnp.tile(pixels, size**2), size, (like.shape[2] // size, like.shape[3] // size))


def make(config: ml_collections.ConfigDict) -> MaskedPatch:
    m, grid = config.model, config.model.img_size // config.model.patch_size
    masks = RandomMask((grid, grid), int(grid**2 * config.mask.ratio))
    return MaskedPatch(
        views=global_views(config, masks),
        backbone=ViT(**vit_settings(m), mask_token=True, kernel_init=jax.nn.initializers.xavier_uniform()),
        head=TokenHead(LEVELS**3, dtype=jnp.dtype(m.dtype)),
    )
