"""EVA: masked patches as the features of a frozen teacher (Fang et al. 2023, arXiv:2211.07636; EVA-02, arXiv:2303.11331).

Blocks of patches become a mask token, and the model regresses the features that a frozen network, CLIP's vision tower in the
papers, has of them in the whole image.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.data.augment import Target
from mim_jax.masking import BlockMask
from mim_jax.methods.base import BackboneMethod, Params, global_views, make_target, patch_features, vit_settings
from mim_jax.methods.beit import one_std
from mim_jax.models.heads import TokenHead
from mim_jax.models.vit import ViT, masked_first, rescale_residual
from mim_jax.views import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eva(BackboneMethod):
    views: Views[BlockMask]
    backbone: ViT
    head: TokenHead  # to the teacher's features

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        backbone = self.backbone.init(backbone_key, [self.views.zeros()["global"]])["params"]
        if self.backbone.ffn == "mlp":
            backbone = backbone | {"blocks": rescale_residual(backbone["blocks"])}
        elif self.backbone.subln:
            backbone = backbone | {"blocks": scaled_for_subln(backbone["blocks"], self.backbone.depth)}
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.dim)))["params"]
        return {"backbone": backbone, "head": head}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
        """Minus the mean cosine over all masked patches of the batch: an image with more of them weighs more."""
        places, weight = masked_first(views["mask"], self.views.masks.count)
        features = patch_features(self.target, target, views["target"])
        predictions = self.predict(params, views, places, key)
        features = jnp.take_along_axis(features, places[..., None], axis=2).astype(predictions.dtype)
        loss = losses.cosine_distance(predictions, features, weight) - 1
        # the cosine of the best prediction that is the same for all patches
        lengths = jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        mean = jnp.sum(features / lengths * weight[..., None], axis=(0, 1, 2)) / jnp.sum(weight)
        return loss, (extra, {"train/constant_cosine": jnp.linalg.norm(mean)})

    def predict(self, params: Params, views: Params, places: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The teacher's features of the patches at `places` [B, G, M] as the model predicts them, [B, G, M, D]; `key` is for
        stochastic depth."""
        out = self.encoded(params, views["global"], key, masks=[views["mask"]])
        picked = jnp.take_along_axis(out["patch"], places[..., None], axis=2)
        return self.head.apply({"params": params["head"]}, picked)


def scaled_for_subln(blocks: Params, depth: int) -> Params:
    """The initialisation of EVA-02 with sub-LN: these layers times sqrt(log(2 * depth)) (Magneto, Wang et al. 2022)."""
    factor = math.sqrt(math.log(2 * depth))
    scaled = {name: jax.tree.map(lambda a: a * factor, blocks[name]) for name in ("v_proj", "proj", "w1", "w2", "w3")}
    return blocks | scaled


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `model.arch` says of the ViT. "eva01": BEiT's, without relative biases and LayerScale. "eva02": rotary positions
    besides the learned ones, SwiGLU, and Xavier's initialisation.

    Raises ValueError for another word.
    """
    m, init = config.model, one_std(config)
    tokens = {"mask_token": True, "k_bias": False, "token_init": init, "pos_init": init, "pos_offset": 0.0}
    if m.arch == "eva01":
        return tokens | {"kernel_init": init, "patch_init": init, "patch_bias_init": jax.nn.initializers.zeros}
    if m.arch == "eva02":
        xavier = {"kernel_init": jax.nn.initializers.xavier_normal(), "patch_init": jax.nn.initializers.xavier_uniform()}
        return tokens | xavier | {"ffn": "swiglu_eva", "subln": m.subln, "rotary": m.img_size // m.patch_size}
    raise ValueError(f'model.arch is {m.arch!r}, but must be "eva01" or "eva02"')


def make(config: ml_collections.ConfigDict) -> Eva:
    m, teacher, grid = config.model, make_target(config, "features"), config.model.img_size // config.model.patch_size
    masks = BlockMask((grid, grid), config.mask.count, config.mask.smallest)
    backbone = ViT(**vit_settings(m), **architecture(config), patch_grad=m.patch_grad)
    return Eva(
        backbone=backbone,
        head=TokenHead(teacher.dim, backbone.kernel_init, jnp.dtype(m.dtype)),
        views=global_views(config, masks, target=Target(grid * teacher.stride)),
        target=teacher,
    )
