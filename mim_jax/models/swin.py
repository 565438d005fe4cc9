"""The Swin transformer (Liu et al. 2021, arXiv:2103.14030), with SimMIM's mask token."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.layers import TORCH_UNIFORM, Dense, Initializer, LayerNorm, attention, param_dtype, spread
from mim_jax.models.positions import bias_of_pairs
from mim_jax.models.vit import Block, Layout, PatchEmbed, in_parts, remembering, split_heads
from mim_jax.sharding import pin_batch

EPS = 1e-5  # of all norms


def windows(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size * W / size, size * size, C]; windows and their pixels are row-major."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // size, size, width // size, size, c)
    return x.swapaxes(2, 3).reshape(b, -1, size * size, c)


def unwindowed(x: jax.Array, size: int, height: int) -> jax.Array:
    """The inverse of `windows`: [B, windows, size * size, C] -> [B, H, W, C]."""
    b, count, _, c = x.shape
    rows = height // size
    x = x.reshape(b, rows, count // rows, size, size, c)
    return x.swapaxes(2, 3).reshape(b, height, -1, c)


def shift_mask(height: int, width: int, size: int, shift: int) -> np.ndarray:
    """The mask of shifted windows, [windows, T, T], added to the attention's logits: -100 between tokens that are in one window
    only because the map was rolled (Swin, section 3.2)."""

    def regions(length: int) -> np.ndarray:
        return np.searchsorted([length - size, length - shift], np.arange(length), side="right")

    region = (3 * regions(height)[:, None] + regions(width))[None, ..., None]
    region = np.asarray(windows(region, size))[0, :, :, 0]
    return np.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


class SwinBlock(Block):
    """A transformer block whose tokens, a map [height, width], attend within (shifted) windows, each with its own bias."""

    height: int = 0
    window: int = 0
    shift: int = 0

    def attend(self, qkv: jax.Array, layout: Layout, biases: Sequence[jax.Array | None]) -> jax.Array:
        batch, tokens, _ = qkv.shape
        width, size = tokens // self.height, self.window
        shape, init = ((2 * size - 1) ** 2, self.heads), nn.initializers.normal(0.02)
        table = self.param("relative_position_bias_table", init, shape, param_dtype(self.dtype))
        bias = bias_of_pairs(table, size, size, cls=False)[None]
        qkv = qkv.reshape(batch, self.height, width, -1)
        if self.shift:
            qkv = jnp.roll(qkv, (-self.shift, -self.shift), (1, 2))
            bias = bias + shift_mask(self.height, width, size, self.shift)[:, None].astype(bias.dtype)
        parts = windows(qkv, size)
        count = parts.shape[1]
        bias = pin_batch(jnp.broadcast_to(bias, (batch, count, *bias.shape[1:])).reshape(-1, *bias.shape[1:]))
        q, k, v = split_heads(parts.reshape(batch * count, size * size, -1), self.heads)
        out = attention(q, k, v, bias)
        out = unwindowed(out.reshape(batch, count, size * size, -1), size, self.height)
        if self.shift:
            out = jnp.roll(out, (self.shift, self.shift), (1, 2))
        return out.reshape(batch, tokens, -1)


class Pair(nn.Module):
    """A block with plain windows and one with shifted windows: x [B, T, C], rates [2]."""

    block: Any  # partial SwinBlock, without shift and name
    shift: int

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array) -> tuple[jax.Array, None]:
        x, _ = self.block(name="plain")(x, rates[0], (None,))
        return self.block(shift=self.shift, name="shifted")(x, rates[1], (None,))


class Stage(nn.Module):
    """Pairs of blocks on a map [B, H, W, C]; then, if `merge`, 2 x 2 patches are merged: [B, H / 2, W / 2, 2 * C].

    Raises ValueError for a map that the windows do not divide, and for an odd number of blocks.
    """

    block: Any
    window: int
    merge: bool
    unroll: int

    @nn.compact
    def __call__(self, x: jax.Array, rates: np.ndarray) -> jax.Array:
        batch, height, width, dim = x.shape
        size = min(self.window, height, width)
        if height % size or width % size or (self.merge and (height % 2 or width % 2)):
            raise ValueError(f"a map of {height} x {width} patches cannot be cut into windows of {size} and merged by two")
        if len(rates) % 2:
            raise ValueError(f"a stage has pairs of blocks, with plain and with shifted windows, and cannot have {len(rates)}")
        layout = ((1, height * width),)
        block = functools.partial(self.block, layout=layout, norm_eps=EPS, height=height, window=size)
        rngs, count = {"params": True, "drop_path": True}, len(rates) // 2
        pairs = nn.scan(Pair, variable_axes={"params": 0}, split_rngs=rngs, length=count, unroll=self.unroll)
        shift = size // 2 if min(height, width) > size else 0
        x = pin_batch(x.reshape(batch, height * width, dim))
        x, _ = pairs(block, shift, name="blocks")(x, jnp.asarray(rates, jnp.float32).reshape(-1, 2))
        x = x.reshape(batch, height, width, dim)
        if not self.merge:
            return x
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        dtype, kernel_init = block.keywords["dtype"], block.keywords["kernel_init"]
        x = LayerNorm(dtype, EPS, name="merge_norm")(x).reshape(-1, 4 * dim)
        merged = Dense(2 * dim, dtype, kernel_init, name="merge", use_bias=False)(x)
        return pin_batch(merged.reshape(batch, height // 2, width // 2, 2 * dim))


class Swin(nn.Module):
    """Called as `ViT`, with one resolution: [[B, n, H, W, C]] -> [{"cls": [B, n, D], "patch": [B, n, N, D]}].

    Patches are those of the last stage; "cls" is their mean. Masks are for the patches of the first stage. The parameters of
    a stage's blocks are stacked in pairs.
    """

    patch_size: int
    img_size: int
    dim: int  # width of the first stage; each stage doubles it and halves the rows and columns
    depths: Sequence[int]
    heads: Sequence[int]
    window: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    mask_token: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    unroll: int = 1
    remat: str = "none"
    microbatches: int = 1
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Side, in pixels, of the square that a patch of the last stage stands for."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def lr_scales(self, params: dict[str, Any], decay: float, patch_embed: float) -> dict[str, Any]:
        """As `ViT.lr_scales`, with the blocks of all stages in a row (SimMIM): patches are merged in the layer of the block
        before, and the final norm has a layer of its own."""
        last = sum(self.depths) + 1

        def scale(path: tuple, leaf: Any) -> Any:
            part, *rest = (each.key for each in path)
            if not part.startswith("stage_"):
                layer = last if part == "norm" else 0
                return decay ** (last - layer) * (patch_embed if part == "patch_embed" else 1.0)
            stage = int(part.removeprefix("stage_"))
            before = sum(self.depths[:stage])
            if rest[0] != "blocks":
                return decay ** (last - before - self.depths[stage])
            layers = before + 1 + np.arange(rest[1] == "shifted", self.depths[stage], 2)
            return (decay ** (last - layers)).reshape(-1, *[1] * (leaf.ndim - 1))

        return jax.tree_util.tree_map_with_path(scale, params)

    @nn.compact
    def __call__(
        self, crops: Sequence[jax.Array], train: bool = False, masks: Sequence[jax.Array] | None = None
    ) -> list[dict[str, jax.Array]]:
        (images,) = crops
        batch, n = images.shape[:2]
        dtype = param_dtype(self.dtype)
        patch_embed = PatchEmbed(self.patch_size, self.dim, TORCH_UNIFORM, self.dtype, name="patch_embed")
        x = LayerNorm(self.dtype, EPS, name="patch_norm")(patch_embed(images.reshape(-1, *images.shape[2:])))
        if self.mask_token:
            mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.dim), dtype)
        if masks is not None:
            x = jnp.where(masks[0].reshape(*x.shape[:3], 1), spread(mask_token, x.shape, self.dtype), x)

        rates = np.split(np.linspace(0, self.drop_path_rate, sum(self.depths)), np.cumsum(self.depths)[:-1])
        for i, (heads, of_stage) in enumerate(zip(self.heads, rates)):
            block = functools.partial(
                remembering(SwinBlock, self.remat),
                heads=heads,
                mlp_ratio=self.mlp_ratio,
                stochastic=train and self.drop_path_rate > 0,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
            )
            stage = Stage(block, self.window, merge=i < len(rates) - 1, unroll=self.unroll, name=f"stage_{i}")
            x = in_parts(self.microbatches, 1, self.unroll, functools.partial(Stage.__call__, rates=of_stage), stage, x)
        x = LayerNorm(dtype, EPS, name="norm")(x).reshape(batch, n, -1, x.shape[-1])
        return [{"cls": x.mean(2), "patch": x}]
