"""Decoders: from an encoder's tokens to pixels."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.layers import TORCH_UNIFORM, Dense, Initializer, LayerNorm, param_dtype, spread, torch_bias
from mim_jax.models.positions import sincos_positions
from mim_jax.models.vit import in_parts, stack, through, visible_first
from mim_jax.sharding import pin_batch


class MaeDecoder(nn.Module):
    """MAE's decoder: visible tokens, with mask tokens in place of masked patches, go through a few blocks and a linear layer.

    Source: MAE (He et al. 2022), section 3. Positions are a parameter without gradient, as in the encoder.
    """

    out_dim: int  # number of values in a patch
    grid: int  # patches per side
    dim: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    unroll: int = 1
    remat: str = "none"
    microbatches: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cls: jax.Array, patch: jax.Array, mask: jax.Array) -> jax.Array:
        """cls [B, n, D], patch [B, n, visible, D] in the order of the image, mask bool [B, n, N] -> [B, n, N, out_dim]."""
        dtype, (batch, n, count) = param_dtype(self.dtype), mask.shape
        positions = self.param("pos_embed", lambda _: jnp.asarray(sincos_positions(self.dim, self.grid, self.grid), dtype))
        positions = jax.lax.stop_gradient(positions).astype(self.dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.dim), dtype)

        x = jnp.concatenate([cls[:, :, None], patch], axis=2)
        x = Dense(self.dim, self.dtype, self.kernel_init, name="embed")(x.reshape(-1, x.shape[-1]))
        x = pin_batch(x.reshape(batch, n, -1, self.dim))
        place = jnp.argsort(visible_first(mask), axis=-1)[..., None]  # the inverse of that order
        tokens = jnp.take_along_axis(x[:, :, 1:], jnp.minimum(place, x.shape[2] - 2), axis=2)
        tokens = jnp.where(mask[..., None], spread(mask_token, tokens.shape, self.dtype), tokens)
        x = jnp.concatenate([x[:, :, :1], tokens], axis=2) + positions
        settings = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, kernel_init=self.kernel_init, dtype=self.dtype)
        blocks = stack(self.depth, self.unroll, self.remat, layout=((n, 1 + count),), stochastic=False, **settings)
        run = functools.partial(through, rates=jnp.zeros(self.depth), biases=(None,))
        x = in_parts(self.microbatches, 1, self.unroll, run, blocks, x.reshape(batch, -1, self.dim))
        x = LayerNorm(self.dtype, name="norm")(x.reshape(batch, n, 1 + count, self.dim)[:, :, 1:])
        x = Dense(self.out_dim, self.dtype, self.kernel_init, name="pred")(x.reshape(-1, self.dim))
        return pin_batch(x.reshape(batch, n, count, self.out_dim).astype(dtype))


class PixelHead(nn.Module):
    """SimMIM's decoder: a linear layer from each patch token to its pixels, [B, n, N, D] -> [B, n, N, out_dim].

    Source: SimMIM (Xie et al. 2022), section 3.4. Initialised as a PyTorch convolution.
    """

    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, fan_in = param_dtype(self.dtype), x.shape[-1]
        head = Dense(self.out_dim, self.dtype, TORCH_UNIFORM, bias_init=torch_bias(fan_in), name="linear")
        return pin_batch(head(x.reshape(-1, fan_in)).reshape(*x.shape[:3], -1).astype(dtype))
