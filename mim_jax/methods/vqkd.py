"""VQ-KD: the tokenizer of BEiT v2 (Peng et al. 2022, arXiv:2208.06366, section 3.2).

An encoder's tokens become codes of unit length, from which a small decoder predicts the features that a frozen teacher has of
each patch. So the codes stand for meaning rather than for pixels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import health, losses
from mim_jax.data.augment import Target
from mim_jax.methods.base import Params, Tokenizer, global_views, make_target, patch_features, vit_settings
from mim_jax.models.layers import Dense, param_dtype
from mim_jax.models.quantizers import NormEmaQuantizer, State, cosine_kmeans, unit
from mim_jax.models.vit import ViT, features, rescale_residual


class TaskLayer(nn.Module):
    """Linear, tanh, linear on tokens [..., D] -> [..., out_dim], in float32 at least."""

    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, shape = param_dtype(self.dtype), x.shape[:-1]
        x, init = x.reshape(-1, x.shape[-1]).astype(dtype), nn.initializers.normal(0.02)
        x = jnp.tanh(Dense(x.shape[-1], dtype, init, name="hidden")(x))
        return Dense(self.out_dim, dtype, init, name="out")(x).reshape(*shape, self.out_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqKd(Tokenizer):
    encoder: ViT
    encode_task: TaskLayer
    quantizer: NormEmaQuantizer
    decoder: ViT
    decode_task: TaskLayer
    kmeans_init: bool
    pictures: tuple[str, ...] = ("tokens",)

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        keys = jax.random.split(key, 5)
        grid, code = self.decoder.img_size, self.quantizer.dim
        params = {
            "encoder": self.encoder.init(keys[0], [jnp.zeros((1, 1, self.encoder.img_size, self.encoder.img_size, 3))]),
            "encode_task": self.encode_task.init(keys[1], jnp.zeros((1, self.encoder.dim))),
            "decoder": self.decoder.init(keys[2], [jnp.zeros((1, 1, grid, grid, code))]),
            "decode_task": self.decode_task.init(keys[3], jnp.zeros((1, self.decoder.dim))),
        }
        params = {name: variables["params"] for name, variables in params.items()}
        for name in ("encoder", "decoder"):
            params[name] = params[name] | {"blocks": rescale_residual(params[name]["blocks"])}
        return params, {"quantizer": self.quantizer.init(keys[4], param_dtype(self.encoder.dtype))}

    def loss(self, params, teacher, target, extra, views, key, step):
        images, state = views["global"], extra["quantizer"]
        z = self.encode(params, images)
        if self.kmeans_init:
            state = jax.lax.cond(step == 0, lambda: self.first_codes(state, z, key), lambda: state)
        quantized, state = self.quantizer(state, z, train=True)
        features = patch_features(self.target, target, views["target"])
        loss = quantized.loss + losses.cosine_distance(self.rebuild(params, quantized.z), features)
        figures = health.codebook_figures(state["cluster_size"]) | {"train/commitment": quantized.loss}
        return loss, ({"quantizer": state}, figures)

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """Images [B, G, H, W, 3] in 0..1 -> what is quantised, [B, G, N, code]."""
        out = self.encoder.apply({"params": params["encoder"]}, [2 * images - 1])[0]
        return self.encode_task.apply({"params": params["encode_task"]}, out["patch"])

    def first_codes(self, state: State, z: jax.Array, key: jax.Array) -> State:
        """The codebook from the first batch: its k-means, from random vectors of it."""
        vectors = unit(jax.lax.stop_gradient(z.reshape(-1, z.shape[-1])))
        first = vectors[jax.random.randint(key, (self.codes,), 0, len(vectors))]
        means, counts = cosine_kmeans(vectors, first)
        return {"codebook": means, "cluster_size": counts}

    def rebuild(self, params: Params, codes: jax.Array) -> jax.Array:
        """Codes [B, G, N, code] -> the teacher's features as the decoder predicts them, [B, G, N, D]."""
        grid = self.decoder.img_size
        out = self.decoder.apply({"params": params["decoder"]}, [codes.reshape(*codes.shape[:2], grid, grid, -1)])[0]
        return self.decode_task.apply({"params": params["decode_task"]}, out["patch"])

    def tokens(self, parts: Params, images: jax.Array) -> jax.Array:
        quantized, _ = self.quantizer(parts["quantizer"], self.encode(parts, images[:, None]))
        return quantized.indices[:, 0]

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return features(self.encoder, params["encoder"], 2 * images - 1)


def make(config: ml_collections.ConfigDict) -> VqKd:
    m, q, teacher = config.model, config.quantizer, make_target(config, "features")
    grid, dtype = m.img_size // m.patch_size, jnp.dtype(m.dtype)
    settings = vit_settings(m) | {"drop_path_rate": 0.0, "k_bias": False}
    decoder = settings | {"patch_size": 1, "img_size": grid, "depth": m.decoder_depth}
    return VqKd(
        encoder=ViT(**settings),
        encode_task=TaskLayer(q.dim, dtype),
        codes=q.codes,
        stride=m.patch_size,
        quantizer=NormEmaQuantizer(q.codes, q.dim, q.decay, q.beta),
        decoder=ViT(**decoder),
        decode_task=TaskLayer(teacher.dim, dtype),
        views=global_views(config, target=Target(grid * teacher.stride)),
        target=teacher,
        kmeans_init=q.kmeans_init,
    )
