"""VQ-VAE's encoder and decoder (van den Oord et al. 2017, section 4.1): strided convolutions and a few residual blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.dvae import TransposedConv, torch_conv
from mim_jax.models.layers import param_dtype
from mim_jax.sharding import pin_batch


class Residual(nn.Module):
    """ReLU, 3 x 3, ReLU, 1 x 1, added to the input."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = torch_conv(x.shape[-1], 3, self.dtype, "conv_1", x.shape[-1])(nn.relu(x))
        return x + torch_conv(x.shape[-1], 1, self.dtype, "conv_2", x.shape[-1])(nn.relu(y))


class VqVaeEncoder(nn.Module):
    """Images [B, H, W, 3] -> vectors to be quantised [B, h, w, code]. Each of the `layers` halves the image's side."""

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
            x = Residual(self.dtype, name=f"res_{i}")(x)
        return pin_batch(torch_conv(self.code, 1, param_dtype(self.dtype), "output", self.hidden)(nn.relu(x)))


class VqVaeDecoder(nn.Module):
    """Codes [B, h, w, code] -> images [B, H, W, 3], twice the side with each of the `layers`."""

    hidden: int = 256
    layers: int = 2
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        x = torch_conv(self.hidden, 3, self.dtype, "input", codes.shape[-1])(codes)
        for i in range(self.blocks):
            x = Residual(self.dtype, name=f"res_{i}")(x)
        for i in range(self.layers):
            width = self.hidden if i < self.layers - 1 else 3
            x = TransposedConv(width, self.dtype, name=f"conv_{i}")(nn.relu(x))
        return pin_batch(x.astype(param_dtype(self.dtype)))
