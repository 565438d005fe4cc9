"""VQ-VAE: neural discrete representation learning (van den Oord et al. 2017, arXiv:1711.00937).

An image becomes a grid of codes, each the nearest of a codebook to what the encoder found there, and is rebuilt from them.
The codes are moving averages of their members (appendix A.1); those that lose theirs begin anew.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import health
from mim_jax.methods.base import Params, Tokenizer, global_views
from mim_jax.models.layers import param_dtype
from mim_jax.models.quantizers import EmaQuantizer
from mim_jax.models.vqvae import VqVaeDecoder, VqVaeEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqVae(Tokenizer):
    encoder: VqVaeEncoder
    quantizer: EmaQuantizer
    decoder: VqVaeDecoder

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        keys = jax.random.split(key, 3)
        encoder = self.encoder.init(keys[0], self.views.zeros()["global"][0, :1])
        decoder = self.decoder.init(keys[1], jnp.zeros((1, 1, 1, self.quantizer.dim)))
        state = self.quantizer.init(keys[2], param_dtype(self.encoder.dtype))
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, {"quantizer": state}

    def loss(self, params, teacher, target, extra, views, key, step):
        images = views["global"].reshape(-1, *views["global"].shape[2:])
        z = self.encode(params, images)
        quantized, state = self.quantizer(extra["quantizer"], z, train=True)
        vectors = z.reshape(-1, z.shape[-1])
        state = self.quantizer.replace_dead(state, vectors[jax.random.randint(key, (self.codes,), 0, len(vectors))])
        error = jnp.mean((self.pixels(params, quantized.z) - images) ** 2)
        figures = health.codebook_figures(state["cluster_size"]) | {"train/mse": error, "train/commitment": quantized.loss}
        return 4 * error + quantized.loss, ({"quantizer": state}, figures)  # the error of values in -1..1

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in 0..1 -> what is quantised, [B, h, w, code]."""
        return self.encoder.apply({"params": params["encoder"]}, 2 * images - 1)

    def pixels(self, params: Params, codes: jax.Array) -> jax.Array:
        """Codes [B, h, w, code] -> images [B, H, W, 3], about in 0..1."""
        return (1 + self.decoder.apply({"params": params["decoder"]}, codes)) / 2

    def tokens(self, parts: Params, images: jax.Array) -> jax.Array:
        quantized, _ = self.quantizer(parts["quantizer"], self.encode(parts, images))
        return quantized.indices.reshape(len(images), -1)

    def decode(self, parts: Params, tokens: jax.Array) -> jax.Array:
        side = math.isqrt(tokens.shape[-1])
        codes = parts["quantizer"]["codebook"][tokens.reshape(-1, side, side)]
        return jnp.clip(self.pixels(parts, codes), 0, 1)

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        z = self.encode(params, images)
        patch = z.reshape(len(z), -1, z.shape[-1])
        return {"cls": patch.mean(1), "patch": patch}


def make(config: ml_collections.ConfigDict) -> VqVae:
    m, q, c, dtype = config.model, config.quantizer, config.crops, jnp.dtype(config.model.dtype)
    sizes = dict(hidden=m.hidden, layers=m.layers, blocks=m.blocks, dtype=dtype)
    if m.img_size % 2**m.layers:
        raise ValueError(f"model.img_size={m.img_size} cannot be halved model.layers={m.layers} times")
    return VqVae(
        encoder=VqVaeEncoder(q.dim, **sizes),
        codes=q.codes,
        stride=2**m.layers,
        quantizer=EmaQuantizer(q.codes, q.dim, q.decay, commitment=q.commitment, threshold=q.threshold),
        decoder=VqVaeDecoder(**sizes),
        views=global_views(config),
    )
