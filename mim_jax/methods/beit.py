"""BEiT: BERT pre-training of image transformers (Bao et al. 2022, arXiv:2106.08254).

Blocks of patches become a mask token, and the model predicts their visual tokens: those that a frozen tokenizer makes of the
whole image, in a rendering of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.data.augment import Policy, Target
from mim_jax.masking import BlockMask
from mim_jax.methods.base import BackboneMethod, Images, Params, global_views, make_target, vit_settings
from mim_jax.models.heads import TokenHead
from mim_jax.models.layers import Initializer
from mim_jax.models.vit import ViT, masked_first, rescale_residual
from mim_jax.views import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beit(BackboneMethod):
    views: Views[BlockMask]
    backbone: ViT
    head: TokenHead

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        backbone = self.backbone.init(backbone_key, [self.views.zeros()["global"]])["params"]
        backbone = backbone | {"blocks": rescale_residual(backbone["blocks"])}
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.dim)))["params"]
        return {"backbone": backbone, "head": head}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
        places, weight = masked_first(views["mask"], self.views.masks.count)
        targets = jnp.take_along_axis(self.tokens(target, views["target"]), places, axis=-1)
        predictions = self.predict(params, views, places, key)
        loss = jnp.stack([losses.masked_cross_entropy(logits, targets, weight) for logits in predictions]).sum()
        right = jnp.sum((predictions[0].argmax(-1) == targets) * weight) / jnp.sum(weight)
        counts = jnp.bincount(targets.reshape(-1), weight.reshape(-1).astype(loss.dtype), length=self.head.vocab_size)
        return loss, (extra, {"train/masked_accuracy": right, "train/most_frequent_token": counts.max() / counts.sum()})

    def tokens(self, target: Params, crops: jax.Array) -> jax.Array:
        """The tokenizer's tokens of crops [B, G, H, W, 3] in 0..1: int32 [B, G, N]."""
        return self.target.tokens(target, crops.reshape(-1, *crops.shape[2:])).reshape(*crops.shape[:2], -1)

    def predict(self, params: Params, views: Params, places: jax.Array, key: jax.Array | None = None) -> list[jax.Array]:
        """Scores [B, G, M, K] of the patches at `places` [B, G, M], one array for each term of the loss."""
        out = self.encoded(params, views["global"], key, masks=[views["mask"]])
        return [self.scores(params, out["patch"], places)]

    def scores(self, params: Params, patch: jax.Array, places: jax.Array) -> jax.Array:
        """The head's scores [B, G, M, K] of those patch tokens, [B, G, N, D], that stand at `places`."""
        picked = jnp.take_along_axis(patch, places[..., None], axis=2)
        return self.head.apply({"params": params["head"]}, picked)

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        true = self.tokens(target, views["target"])
        all_places = jnp.broadcast_to(jnp.arange(true.shape[-1]), true.shape)
        predicted = self.predict(params, views, all_places)[0].argmax(-1)
        shown = {"decoded tokens": true, "masked tokens predicted": jnp.where(views["mask"], predicted, true)}
        decoded = {name: self.target.decode(target, tokens.reshape(-1, tokens.shape[-1])) for name, tokens in shown.items()}
        mean, std = jnp.array(self.views.mean), jnp.array(self.views.std)
        return {name: ((images - mean) / std).reshape(*true.shape[:2], *images.shape[1:]) for name, images in decoded.items()}


def make(config: ml_collections.ConfigDict) -> Beit:
    return Beit(**parts(config))


def one_std(config: ml_collections.ConfigDict) -> Initializer:
    """A normal distribution cut at one standard deviation, `model.init_std`."""
    return jax.nn.initializers.truncated_normal(config.model.init_std, lower=-1.0, upper=1.0)


def beit_vit(config: ml_collections.ConfigDict, pos: str) -> ViT:
    """The ViT of BEiT and SimMIM."""
    init = one_std(config)
    return ViT(
        **vit_settings(config.model),
        pos=pos,
        mask_token=True,
        layerscale=config.model.layerscale,
        k_bias=False,
        kernel_init=init,
        patch_init=init,
        patch_bias_init=jax.nn.initializers.zeros,
        token_init=init,
    )


def parts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What BEiT and BEiT v2 have in common. Raises ValueError if the grid of tokens is not that of the patches."""
    m, c = config.model, config.crops
    tokenizer, grid = make_target(config, "tokens"), m.img_size // m.patch_size
    if tokenizer.codes != config.head.vocab_size:
        raise ValueError(
            f"the tokenizer of config.target has {tokenizer.codes} tokens, but head.vocab_size is {config.head.vocab_size}"
        )
    if c.target_size != grid * tokenizer.stride:
        raise ValueError(
            f"a target of crops.target_size={c.target_size} pixels has {c.target_size / tokenizer.stride:g} tokens a side "
            f"(of {tokenizer.stride} pixels), but the model's image has {m.img_size / m.patch_size:g} patches a side"
        )
    jitter = dict.fromkeys(("brightness", "contrast", "saturation"), c.color_jitter)
    policy = Policy(jitter=1.0, hue=0.0, gray=0.0, blur=0.0, **jitter)
    target = Target(c.target_size, c.target_interpolation)
    masks = BlockMask((grid, grid), config.mask.count, config.mask.smallest, config.mask.exact)
    return dict(
        backbone=beit_vit(config, "relative"),
        head=TokenHead(config.head.vocab_size, one_std(config), jnp.dtype(m.dtype)),
        views=global_views(config, masks, policy, color_first=True, target=target),
        target=tokenizer,
        pictures=("reconstruction", "attention") if "reconstruction" in tokenizer.pictures else ("attention",),
    )
