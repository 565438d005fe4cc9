"""BEiT v2: masked image modeling with vector-quantized visual tokenizers (Peng et al. 2022, arXiv:2208.06366).

BEiT, with a second prediction of the same tokens from the final CLS token and the patch tokens of an early layer: what the
early patches lack must come from CLS (section 3.3, "patch aggregation").
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax.methods import beit
from mim_jax.methods.base import Params
from mim_jax.models.layers import TORCH_UNIFORM, LayerNorm, param_dtype, torch_bias
from mim_jax.models.vit import rescale_residual, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beit2(beit.Beit):
    early_layers: int  # blocks after which the patches are taken
    head_layers: int  # blocks of the second prediction

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        params, extra = super().init(key)
        tokens = jnp.zeros((1, 1 + self.views.masks.patches, self.backbone.dim))
        key, *bias_keys = jax.random.split(key, 4)
        blocks = self.cls_layers(tokens.shape[1], stochastic=False).init(key, tokens, jnp.zeros(self.head_layers), (None,))
        blocks = rescale_residual(blocks["params"], before=self.early_layers)
        # the official code gives these blocks no first values of its own: they are PyTorch's
        for name, bias_key in zip(("proj", "fc1", "fc2"), bias_keys):
            bias = blocks[name]["bias"]
            fan_in = blocks[name]["kernel"].shape[1]
            blocks[name] = blocks[name] | {"bias": torch_bias(fan_in)(bias_key, bias.shape, bias.dtype)}
        return params | {"cls_layers": {"blocks": blocks}}, extra

    def cls_layers(self, tokens: int, stochastic: bool, crops: int = 1) -> nn.Module:
        """The blocks of the second prediction."""
        settings = self.backbone.block(((crops, tokens),), stochastic) | {"kernel_init": TORCH_UNIFORM}
        return stack(self.head_layers, self.head_layers, self.backbone.remat, **settings)

    def predict(self, params: Params, views: Params, places: jax.Array, key: jax.Array | None = None) -> list[jax.Array]:
        vit, train = self.backbone, key is not None
        keys = (None, None) if key is None else jax.random.split(key)
        rngs = [{} if key is None else {"drop_path": key} for key in keys]
        (out,), variables = vit.apply(
            {"params": params["backbone"]},
            [views["global"]],
            train=train,
            masks=[views["mask"]],
            rngs=rngs[0],
            mutable="intermediates",
        )
        batch, crops, n, dim = out["patch"].shape
        kept = variables["intermediates"]
        early, last = (kept["blocks"]["tokens"][0][i].reshape(batch, crops, 1 + n, dim) for i in (self.early_layers - 1, -1))
        x = jnp.concatenate([last[:, :, :1], early[:, :, 1:]], axis=2).reshape(batch, -1, dim)
        end = self.early_layers + self.head_layers
        rates = jnp.asarray(np.linspace(0, vit.drop_path_rate, max(vit.depth, end))[self.early_layers : end])
        layers = self.cls_layers(1 + n, train and vit.drop_path_rate > 0, crops)
        x, _ = layers.apply({"params": params["cls_layers"]["blocks"]}, x, rates, kept["biases"][0], rngs=rngs[1])
        norm = LayerNorm(param_dtype(vit.dtype))
        x = norm.apply({"params": params["backbone"]["norm"]}, x.reshape(batch, crops, 1 + n, dim)[:, :, 1:])
        return [self.scores(params, patch, places) for patch in (out["patch"], x)]


def make(config: ml_collections.ConfigDict) -> Beit2:
    m = config.model
    if m.get("microbatches", 1) > 1:
        raise ValueError("model.microbatches must be 1 for BEiT v2, whose second prediction needs what a middle block makes")
    if not 0 < m.early_layers < m.depth:
        raise ValueError(f"model.early_layers={m.early_layers} must be between 0 and model.depth={m.depth}")
    return Beit2(**beit.parts(config), early_layers=m.early_layers, head_layers=m.head_layers)
