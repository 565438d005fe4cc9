"""The vision transformer (Dosovitskiy et al. 2021) as the self-supervised methods use it.

It takes crops of several resolutions at once: all tokens of an image lie side by side, [B, G * n + L * m, D], for the
layers that treat tokens one by one; attention runs once per resolution. Blocks are stacked along a leading depth axis.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.layers import attention, attention_weights, dense, gelu, layer_norm, param_dtype
from mim_jax.sharding import pin_batch

Layout = tuple[tuple[int, int], ...]  # (crops, tokens per crop) of each resolution


def drop_path(x: jax.Array, rate: jax.Array, layout: Layout, key: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zero x [B, T, D] for whole crops, the survivors divided by 1 - rate."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], sum(crops for crops, _ in layout)))
    repeats = np.concatenate([np.full(crops, tokens) for crops, tokens in layout])
    scale = jnp.repeat(keep / (1 - rate), repeats, axis=1, total_repeat_length=x.shape[1])
    return x * scale[..., None].astype(x.dtype)


def split_heads(qkv: jax.Array, heads: int) -> jax.Array:
    """[B, T, 3 * D] -> [3, B, T, H, d]; queries, keys and values in this order, each head-contiguous."""
    return jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_ratio: float
    layout: Layout
    stochastic: bool  # whether stochastic depth is on
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, drop_path_rate: jax.Array) -> tuple[jax.Array, None]:
        batch, tokens, dim = x.shape
        linear = functools.partial(dense, dtype=self.dtype, init_std=self.init_std)

        def drop(y: jax.Array) -> jax.Array:
            y = pin_batch(y.reshape(batch, tokens, dim))
            return drop_path(y, drop_path_rate, self.layout, self.make_rng("drop_path")) if self.stochastic else y

        y = layer_norm(self.dtype, name="norm1")(x)
        qkv = linear(3 * dim, name="qkv")(y.reshape(-1, dim))
        y = pin_batch(self.attend(qkv.reshape(batch, tokens, 3 * dim)))
        x = x + drop(linear(dim, name="proj")(y.reshape(-1, dim)))

        y = layer_norm(self.dtype, name="norm2")(x)
        y = gelu(linear(int(dim * self.mlp_ratio), name="fc1")(y.reshape(-1, dim)))
        x = x + drop(linear(dim, name="fc2")(y))
        self.sow("intermediates", "tokens", x)
        return x, None

    def attend(self, qkv: jax.Array) -> jax.Array:
        """qkv [B, T, 3 * D] -> [B, T, D], each crop attending to itself alone."""
        out, start = [], 0
        for crops, tokens in self.layout:
            part = qkv[:, start : start + crops * tokens].reshape(-1, tokens, qkv.shape[-1])
            out.append(attention(*split_heads(part, self.heads)).reshape(qkv.shape[0], crops * tokens, -1))
            start += crops * tokens
        return jnp.concatenate(out, axis=1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each mapped linearly: [N, H, W, C] -> [N, H // p, W // p, dim]; a remainder is cut off.

    The initial values are those of a PyTorch convolution: uniform within 1 / sqrt(C * p^2).
    """

    patch_size: int
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        n, height, width, channels = images.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        bound = (channels * p * p) ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("kernel", uniform, (p, p, channels, self.dim), param_dtype(self.dtype))
        bias = self.param("bias", uniform, (self.dim,), param_dtype(self.dtype))
        patches = images[:, : rows * p, : columns * p].reshape(n, rows, p, columns, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n * rows * columns, -1).astype(self.dtype)
        out = patches @ kernel.reshape(-1, self.dim).astype(self.dtype) + bias.astype(self.dtype)
        return out.reshape(n, rows, columns, self.dim)


def interpolation_weights(size: int, to: int, offset: float = 0.1) -> np.ndarray:
    """[to, size] weights of torch's bicubic interpolation (a = -0.75, clamped borders, no antialiasing) by a factor.

    The official code resizes positions by the factor (to + 0.1) / size and torch maps coordinates with that very factor:
    source = (target + 0.5) / factor - 0.5 (recipe sheet 1.1).
    """
    source = (np.arange(to) + 0.5) * size / (to + offset) - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((to, size))
    for tap in range(4):
        t = np.abs(source - (first + tap))
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        np.add.at(weights, (np.arange(to), np.clip(first + tap, 0, size - 1)), np.where(t <= 1, near, far))
    return weights


def interpolate_positions(pos_embed: jax.Array, rows: int, columns: int) -> jax.Array:
    """Positions [1, 1 + N, D] of a square grid for a grid of rows x columns: [1, 1 + rows * columns, D]. CLS is kept."""
    size = round((pos_embed.shape[1] - 1) ** 0.5)
    if rows == columns == size:
        return pos_embed
    grid = pos_embed[0, 1:].reshape(size, size, -1)
    vertical, horizontal = (jnp.asarray(interpolation_weights(size, to), grid.dtype) for to in (rows, columns))
    grid = jnp.einsum("rh,cw,hwd->rcd", vertical, horizontal, grid, precision="highest")
    return jnp.concatenate([pos_embed[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


class ViT(nn.Module):
    """crops: a sequence of [B, n, H, W, C], one for each resolution -> for each {"cls": [B, n, D], "patch": [B, n, N, D]}.

    The outputs are those of the last block after the final norm. H and W need not be `img_size`: positions are
    interpolated. `init_std` is that of the linear layers' first weights. `dtype` is that of the computation; parameters
    are float32 (float64 where `dtype` is).
    """

    patch_size: int
    img_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    init_std: float = 0.02
    unroll: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, crops: Sequence[jax.Array], train: bool = False) -> list[dict[str, jax.Array]]:
        dtype, normal = param_dtype(self.dtype), nn.initializers.normal(0.02)
        cls_token = self.param("cls_token", normal, (1, 1, self.dim), dtype)
        pos_embed = self.param("pos_embed", normal, (1, 1 + (self.img_size // self.patch_size) ** 2, self.dim), dtype)
        patch_embed = PatchEmbed(self.patch_size, self.dim, self.dtype, name="patch_embed")

        def embed(images: jax.Array) -> jax.Array:
            batch, n = images.shape[:2]
            patches = patch_embed(images.reshape(batch * n, *images.shape[2:]))
            positions = interpolate_positions(pos_embed, *patches.shape[1:3]).astype(self.dtype)
            patches = patches.reshape(batch * n, -1, self.dim) + positions[:, 1:]
            cls = cls_token.astype(self.dtype) + positions[:, :1]
            tokens = jnp.concatenate([jnp.broadcast_to(cls, (batch * n, 1, self.dim)), patches], axis=1)
            return tokens.reshape(batch, -1, self.dim)

        tokens = [embed(images) for images in crops]
        layout = tuple((images.shape[1], t.shape[1] // images.shape[1]) for images, t in zip(crops, tokens))
        x = pin_batch(jnp.concatenate(tokens, axis=1))
        self.sow("intermediates", "tokens", x)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "drop_path": True},
            length=self.depth,
            unroll=self.unroll,
        )(self.heads, self.mlp_ratio, layout, train and self.drop_path_rate > 0, self.init_std, self.dtype, name="blocks")
        x, _ = blocks(x, jnp.linspace(0, self.drop_path_rate, self.depth))

        norm = layer_norm(dtype, name="norm")
        out, start = [], 0
        for n, length in layout:
            part = x[:, start : start + n * length].reshape(-1, n, length, self.dim)
            out.append({"cls": norm(part[:, :, 0]), "patch": norm(part[:, :, 1:])})
            start += n * length
        return out


def all_tokens(vit: ViT, params: Any, images: jax.Array) -> jax.Array:
    """The tokens that enter each block and leave the last, before the final norm: [depth + 1, B, 1 + N, D]."""
    _, variables = vit.apply({"params": params}, [images[:, None]], mutable="intermediates")
    seen = variables["intermediates"]
    return jnp.concatenate([seen["tokens"][0][None], seen["blocks"]["tokens"][0]])


def intermediate_layers(vit: ViT, params: Any, images: jax.Array, n: int = 1) -> jax.Array:
    """The outputs of the last `n` blocks after the final norm, oldest first: [n, B, 1 + N, D]."""
    norm = layer_norm(param_dtype(vit.dtype))
    return norm.apply({"params": params["norm"]}, all_tokens(vit, params, images)[-n:])


def last_attention(vit: ViT, params: Any, images: jax.Array) -> jax.Array:
    """The attention of the last block, from each token (row) to each: [B, heads, 1 + N, 1 + N]."""
    x = all_tokens(vit, params, images)[-2]
    block = jax.tree.map(lambda p: p[-1], params["blocks"])
    y = layer_norm(vit.dtype).apply({"params": block["norm1"]}, x)
    qkv = dense(3 * vit.dim, vit.dtype).apply({"params": block["qkv"]}, y.reshape(-1, vit.dim))
    q, k, _ = split_heads(qkv.reshape(*x.shape[:2], -1), vit.heads).transpose(0, 1, 3, 2, 4)
    return attention_weights(q, k)
