"""VQ-VAE's encoder and decoder (van den Oord et al. 2017, section 4.1): strided convolutions and a few residual blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.dvae import ResBlock, TransposedConv, torch_conv
from mim_jax.models.layers import param_dtype
from mim_jax.sharding import pin_batch


class VqVaeEncoder(nn.Module):
    """Images [B, H, W, 3] -> vectors to quantise [B, h, w, code]; each layer halves the side."""

    code: int
    hidden: int = 256
    layers: int = 2
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(self.layers):
            x = nn.relu(torch_conv(self.hidden, 4, self.dtype, f"conv_{i}", x.shape[-1], stride=2)(x))
        for i in range(self.blocks):
            x = ResBlock(self.dtype, (3, 1), relu_first=True, name=f"res_{i}")(x)
        return pin_batch(torch_conv(self.code, 1, param_dtype(self.dtype), "output", self.hidden)(nn.relu(x)))


class VqVaeDecoder(nn.Module):
    """Codes [B, h, w, code] -> images [B, H, W, 3]; each layer doubles the side."""

    hidden: int = 256
    layers: int = 2
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        x = torch_conv(self.hidden, 3, self.dtype, "input", codes.shape[-1])(codes)
        for i in range(self.blocks):
            x = ResBlock(self.dtype, (3, 1), relu_first=True, name=f"res_{i}")(x)
        for i in range(self.layers):
            width = self.hidden if i < self.layers - 1 else 3
            x = TransposedConv(width, self.dtype, name=f"conv_{i}")(nn.relu(x))
        return pin_batch(x.astype(param_dtype(self.dtype)))
