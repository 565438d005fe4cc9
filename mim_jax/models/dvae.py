"""Discrete VAEs: DALL-E's, and the small one of BEiT's code.

Encoders map images [B, H, W, 3] to logits [B, h, w, K] over a vocabulary, whose argmax are the image's tokens; decoders map
one-hot vectors or relaxed samples [B, h, w, K] to pixels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.layers import TORCH_UNIFORM, convolve, convolve_to_twice, param_dtype, torch_bias
from mim_jax.sharding import pin_batch

LOGIT_LAPLACE_EPS = 0.1
Kernels = tuple[int, int, int, int]
FAN_IN_NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def map_pixels(images: jax.Array) -> jax.Array:
    """[0, 1] -> [0.1, 0.9], as the logit-Laplace distribution needs it (DALL-E, appendix A.3)."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def unmap_pixels(pixels: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((pixels - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS), 0, 1)


def dalle_pixels(stats: jax.Array) -> jax.Array:
    """The images of DALL-E's decoder: its output [B, H, W, 6] -> [B, H, W, 3] in [0, 1]."""
    return unmap_pixels(jax.nn.sigmoid(stats[..., :3]))


def conv(features: int, size: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution that keeps the image's size, with DALL-E's initialisation."""
    how = dict(dtype=dtype, param_dtype=param_dtype(dtype), conv_general_dilated=convolve)
    return nn.Conv(features, (size, size), padding=(size - 1) // 2, kernel_init=FAN_IN_NORMAL, name=name, **how)


class DalleBlock(nn.Module):
    """A residual block: four convolutions, ReLU before each; where the width changes, the skip path is a 1 x 1 convolution."""

    features: int
    kernels: Kernels
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, size in enumerate(self.kernels, 1):
            y = conv(self.features if i == 4 else self.features // 4, size, self.dtype, f"conv_{i}")(nn.relu(y))
        same = x.shape[-1] == self.features
        return (x if same else conv(self.features, 1, self.dtype, "id_path")(x)) + self.gain * y


def dalle_group(x: jax.Array, number: int, blocks: int, features: int, kernels: Kernels, dtype: Any) -> jax.Array:
    """One of a network's four groups of blocks; to be called inside its `__call__`."""
    gain = (4 * blocks) ** -2
    for b in range(1, blocks + 1):
        x = DalleBlock(features, kernels, gain, dtype, name=f"group_{number}_block_{b}")(x)
    return x


class DalleEncoder(nn.Module):
    """DALL-E's encoder (Ramesh et al. 2021, appendix A.1): mapped pixels [B, H, W, 3] -> logits [B, H / 8, W / 8, vocab]."""

    vocab: int = 8192
    hidden: int = 256
    blocks: int = 2  # of each group
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = conv(self.hidden, 7, self.dtype, "input")(pixels)
        for g, width in enumerate((1, 2, 4, 8), 1):
            x = dalle_group(x, g, self.blocks, width * self.hidden, (3, 3, 3, 1), self.dtype)
            x = nn.max_pool(x, (2, 2), (2, 2)) if g < 4 else x
        return pin_batch(conv(self.vocab, 1, param_dtype(self.dtype), "output")(nn.relu(x)))


class DalleDecoder(nn.Module):
    """DALL-E's decoder (appendix A.1): [B, h, w, vocab] -> [B, 8 * h, 8 * w, 6], location and log scale of each channel."""

    initial: int = 128
    hidden: int = 256
    blocks: int = 2  # of each group
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, sample: jax.Array) -> jax.Array:
        x = conv(self.initial, 1, param_dtype(self.dtype), "input")(sample).astype(self.dtype)
        for g, width in enumerate((8, 4, 2, 1), 1):
            x = dalle_group(x, g, self.blocks, width * self.hidden, (1, 3, 3, 3), self.dtype)
            x = x.repeat(2, axis=1).repeat(2, axis=2) if g < 4 else x
        return pin_batch(conv(6, 1, self.dtype, "output")(nn.relu(x)).astype(param_dtype(self.dtype)))


def torch_conv(features: int, size: int, dtype: Any, name: str, fan_in: int, stride: int = 1) -> nn.Conv:
    """A convolution with PyTorch's initialisation, padded so that the image's size is divided by the stride."""
    inits = dict(kernel_init=TORCH_UNIFORM, bias_init=torch_bias(fan_in * size**2))
    how = dict(dtype=dtype, param_dtype=param_dtype(dtype), conv_general_dilated=convolve)
    return nn.Conv(features, (size, size), stride, padding=(size - stride) // 2, name=name, **inits, **how)


class TransposedConv(nn.Module):
    """A 4 x 4 transposed convolution with PyTorch's initialisation: [B, H, W, I] -> [B, 2 * H, 2 * W, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        fan_out = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # PyTorch counts the outputs here
        kernel = self.param("kernel", fan_out, (4, 4, x.shape[-1], self.features), dtype)
        bias = self.param("bias", torch_bias(self.features * 4**2), (self.features,), dtype)
        return convolve_to_twice(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class ResBlock(nn.Module):
    """A residual block: convolutions of these sizes, ReLU between them and, if `relu_first`, before the first."""

    dtype: Any
    sizes: tuple[int, ...] = (3, 3, 1)
    relu_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, width = x, x.shape[-1]
        for i, size in enumerate(self.sizes, 1):
            y = torch_conv(width, size, self.dtype, f"conv_{i}", width)(nn.relu(y) if i > 1 or self.relu_first else y)
        return x + y


class DvaeEncoder(nn.Module):
    """The encoder of BEiT's small discrete VAE: [B, H, W, 3] -> logits [B, h, w, codes]; each layer halves the side."""

    codes: int = 8192
    hidden: int = 256
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(self.layers):
            x = nn.relu(torch_conv(self.hidden, 4, self.dtype, f"conv_{i}", x.shape[-1], stride=2)(x))
            x = ResBlock(self.dtype, name=f"res_{i}")(x)
        return pin_batch(torch_conv(self.codes, 1, param_dtype(self.dtype), "output", self.hidden)(x))


class DvaeDecoder(nn.Module):
    """Its decoder: [B, h, w, codes] -> [B, H, W, 3]; after a product with the codebook, each layer doubles the side."""

    codebook_dim: int = 512
    hidden: int = 256
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, sample: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        shape = sample.shape[-1], self.codebook_dim
        x = (sample @ self.param("codebook", nn.initializers.normal(1.0), shape, dtype)).astype(self.dtype)
        for i in range(self.layers):
            x = nn.relu(TransposedConv(self.hidden, self.dtype, name=f"conv_{i}")(x))
            x = ResBlock(self.dtype, name=f"res_{i}")(x)
        return pin_batch(torch_conv(3, 1, self.dtype, "output", self.hidden)(x).astype(dtype))
