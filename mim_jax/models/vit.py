"""The vision transformer (Dosovitskiy et al. 2021) as the self-supervised methods use it.

It takes crops of several resolutions at once. All tokens of an image are concatenated, [B, G * n + L * m, D]; attention runs
once per resolution. The parameters of the blocks are stacked along a leading depth axis.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.layers import (
    DENSE,
    TORCH_UNIFORM,
    Dense,
    Initializer,
    LayerNorm,
    attention,
    attention_weights,
    gelu,
    linear,
    param_dtype,
    patchify,
    quick_gelu,
    spread,
    torch_bias,
)
from mim_jax.models.positions import interpolate_positions, relative_bias, rotated, rotated_by_halves, sincos_positions
from mim_jax.sharding import pin_batch

Layout = tuple[tuple[int, int], ...]  # (crops, tokens per crop) of each resolution
Branch = Callable[[jax.Array, Layout], jax.Array]  # tokens [B, T, D] -> the residual that is added to them


def drop_path(x: jax.Array, rate: jax.Array, layout: Layout, key: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeros x [B, T, D] for whole crops, divides the others by 1 - rate."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], sum(crops for crops, _ in layout)))
    repeats = np.concatenate([np.full(crops, tokens) for crops, tokens in layout])
    scale = jnp.repeat(keep / (1 - rate), repeats, axis=1, total_repeat_length=x.shape[1])
    return x * scale[..., None].astype(x.dtype)


def kept_rows(rows: int, rate: float) -> tuple[int, float]:
    """(number of rows that a branch is computed for, factor of its residual) at a drop rate (DINOv2)."""
    kept = max(int(rows * (1 - rate)), 1)
    return kept, rows / kept


def add_to_kept_rows(x: jax.Array, branch: Branch, layout: Layout, group_size: int, rate: float, key: jax.Array) -> jax.Array:
    """Stochastic depth with an exact number of kept rows; the branch is computed for them alone: x [B, T, D] -> [B, T, D].

    A row is a crop. For each resolution and each group of `group_size` images, `kept_rows` rows are drawn; the branch's scaled
    residual is added to them, and the others are not changed. Source: DINOv2, section 5, where a group is the batch of a GPU.
    """
    batch, _, dim = x.shape
    groups, start = batch // group_size, 0
    orders, chosen, small = [], [], []
    for (crops, tokens), one in zip(layout, jax.random.split(key, len(layout))):
        rows = x[:, start : start + crops * tokens].reshape(groups, group_size * crops, tokens, dim)
        start += crops * tokens
        kept, _ = kept_rows(rows.shape[1], rate)
        orders.append(jnp.argsort(jax.random.uniform(one, rows.shape[:2]), axis=1))
        chosen.append(jnp.take_along_axis(rows, orders[-1][:, :kept, None, None], axis=1).reshape(groups, -1, dim))
        small.append((kept, tokens))
    y = branch(pin_batch(jnp.concatenate(chosen, axis=1)), tuple(small))
    parts, start = [], 0
    for (crops, tokens), (kept, _), order in zip(layout, small, orders):
        rows = y[:, start : start + kept * tokens].reshape(groups, kept, tokens, dim) * kept_rows(group_size * crops, rate)[1]
        start += kept * tokens
        rows = jnp.pad(rows, ((0, 0), (0, group_size * crops - kept), (0, 0), (0, 0)))
        back = jnp.take_along_axis(rows, jnp.argsort(order, axis=1)[..., None, None], axis=1)
        parts.append(back.reshape(batch, crops * tokens, dim))
    return x + pin_batch(jnp.concatenate(parts, axis=1).astype(x.dtype))


def split_heads(qkv: jax.Array, heads: int) -> jax.Array:
    """[B, T, 3 * D] -> [3, B, T, H, d]: queries, keys and values."""
    return jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_ratio: float
    layout: Layout
    stochastic: bool  # whether stochastic depth is on
    kernel_init: Initializer
    dtype: Any
    layerscale: float = 0.0  # initial value of the factors on both branches (CaiT, Touvron et al. 2021); 0: no factors
    k_bias: bool = True  # False: only queries and values have a bias (BEiT)
    norm_eps: float = 1e-6
    ffn: str = "mlp"  # or w3(silu(a) * b), (a, b) = w12(x): "swiglu" (DINOv2) or "swiglu_eva" (EVA-02)
    act: Callable[[jax.Array], jax.Array] = gelu  # of "mlp"
    subln: bool = False  # with SwiGLU and without k_bias: a norm before w3; q, k, v, a and b have a matrix each (EVA-02)
    rotary: int = 0  # side of the grid whose positions turn queries and keys, see `rotated`; 0: nothing turns them
    rotary_period: float = 0.0  # of `rotated_by_halves`, which turns them in place of that (DINOv3); 0: nothing
    attn_norm: bool = False  # a norm before the projection (EVA-02's CLIP)
    bilinear: bool = False  # of the table at another size, see `relative_bias`
    bias_grid: int = 0  # side of the grid of the block's own table of relative position biases; 0: no table
    grids: tuple[tuple[int, int], ...] = ()  # of the layout's crops, for that table and for `rotary`
    kept: tuple[int, float] | None = None  # (group_size, rate) of `add_to_kept_rows`

    @nn.compact
    def __call__(self, x: jax.Array, drop_path_rate: jax.Array, biases: Sequence[jax.Array | None]) -> tuple[jax.Array, None]:
        """x [B, T, D]; `biases`: for each resolution of the layout, [heads, tokens, tokens] or None."""
        if self.bias_grid:
            table = bias_table(self, self.bias_grid, self.heads, self.dtype)
            biases = [relative_bias(table, self.bias_grid, grid, self.bilinear) for grid in self.grids]

        def added(x: jax.Array, branch: Branch) -> jax.Array:
            if not self.stochastic:
                return x + branch(x, self.layout)
            key = self.make_rng("drop_path")
            if self.kept:
                return add_to_kept_rows(x, branch, self.layout, *self.kept, key)
            return x + drop_path(branch(x, self.layout), drop_path_rate, self.layout, key)

        x = added(x, functools.partial(self.attention_branch, biases=biases))
        x = added(x, self.mlp_branch)
        self.sow("intermediates", "tokens", x)
        return x, None

    def attention_branch(self, x: jax.Array, layout: Layout, biases: Sequence[jax.Array | None]) -> jax.Array:
        batch, tokens, dim = x.shape
        y = LayerNorm(self.dtype, self.norm_eps, name="norm1")(x).reshape(-1, dim)
        if self.subln:
            qkv = jnp.concatenate([self.linear(dim, f"{name}_proj", use_bias=False)(y) for name in "qkv"], axis=-1)
        else:
            qkv = self.linear(3 * dim, "qkv", use_bias=self.k_bias)(y)
        if not self.k_bias:
            q_bias, v_bias = (
                self.param(name, nn.initializers.zeros, (dim,), param_dtype(self.dtype)) for name in ("q_bias", "v_bias")
            )
            qkv += spread(jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]), qkv.shape, self.dtype)
        y = pin_batch(self.attend(qkv.reshape(batch, tokens, 3 * dim), layout, biases))
        if self.attn_norm:
            y = LayerNorm(self.dtype, self.norm_eps, name="attn_norm")(y)
        return self.scaled(self.linear(dim, "proj")(y.reshape(-1, dim)), x.shape, "gamma_1")

    def mlp_branch(self, x: jax.Array, layout: Layout) -> jax.Array:
        dim = x.shape[-1]
        y, hidden = LayerNorm(self.dtype, self.norm_eps, name="norm2")(x).reshape(-1, dim), int(dim * self.mlp_ratio)
        if self.ffn == "mlp":
            y = self.linear(dim, "fc2")(self.act(self.linear(hidden, "fc1")(y)))
            return self.scaled(y, x.shape, "gamma_2")
        hidden = swiglu_width(hidden) if self.ffn == "swiglu" else hidden
        if self.subln:
            y = nn.silu(self.linear(hidden, "w1")(y)) * self.linear(hidden, "w2")(y)
            y = LayerNorm(self.dtype, self.norm_eps, name="ffn_ln")(y)
        else:
            gate, value = jnp.split(self.linear(2 * hidden, "w12")(y), 2, axis=-1)
            y = nn.silu(gate) * value
        return self.scaled(self.linear(dim, "w3")(y), x.shape, "gamma_2")

    def linear(self, features: int, name: str, use_bias: bool = True) -> Dense:
        return Dense(features, self.dtype, self.kernel_init, use_bias, name=name)

    def scaled(self, y: jax.Array, shape: tuple[int, ...], name: str) -> jax.Array:
        """A branch's residual in this shape, times its LayerScale if there is one."""
        y = pin_batch(y.reshape(shape))
        if self.layerscale:
            gamma = self.param(name, nn.initializers.constant(self.layerscale), shape[-1:], param_dtype(self.dtype))
            y = y * spread(gamma, y.shape, self.dtype)
        return y

    def attend(self, qkv: jax.Array, layout: Layout, biases: Sequence[jax.Array | None]) -> jax.Array:
        """qkv [B, T, 3 * D] -> [B, T, D]; each crop attends to its own tokens."""
        out, start = [], 0
        for i, ((crops, tokens), bias) in enumerate(zip(layout, biases)):
            part = qkv[:, start : start + crops * tokens].reshape(-1, tokens, qkv.shape[-1])
            q, k, v = split_heads(part, self.heads)
            if self.rotary:
                q, k = (rotated(x, self.grids[i], self.rotary) for x in (q, k))
            if self.rotary_period:
                q, k = (rotated_by_halves(x, self.grids[i], self.rotary_period) for x in (q, k))
            bias = None if bias is None else bias[None]
            out.append(attention(q, k, v, bias).reshape(qkv.shape[0], crops * tokens, -1))
            if self.is_mutable_collection("attention"):
                self.sow("attention", "weights", attention_weights(q.swapaxes(1, 2), k.swapaxes(1, 2), bias))
            start += crops * tokens
        return jnp.concatenate(out, axis=1)


def swiglu_width(hidden: int) -> int:
    """Width of DINOv2's SwiGLU layer: two thirds of the MLP's hidden width, rounded up to a multiple of 8."""
    return (int(2 / 3 * hidden) + 7) // 8 * 8


def bias_table(module: nn.Module, grid: int, heads: int, dtype: Any) -> jax.Array:
    """The module's parameter `relative_position_bias_table`; to be called inside its `__call__`."""
    shape = (2 * grid - 1) ** 2 + 3, heads
    return module.param("relative_position_bias_table", nn.initializers.zeros, shape, param_dtype(dtype))


def remembering(block: Callable[..., nn.Module], remat: str) -> Any:
    """The block, with what the backward pass finds in memory and need not compute again. `remat`: "none": everything; "dots":
    the outputs of its linear layers; "full": only its input (Chen et al. 2016, arXiv:1604.06174)."""
    if remat == "none":
        return block
    if remat == "auto":
        raise ValueError('model.remat is "auto": call mim_jax.dry_run.resolve_remat(config)')
    return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(DENSE) if remat == "dots" else None)


def stack(depth: int, unroll: int, remat: str = "none", **block: Any) -> nn.Module:
    """`depth` blocks, their parameters stacked under `blocks`: called with (x, [depth] drop-path rates, biases)."""
    return nn.scan(
        remembering(Block, remat),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "drop_path": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=unroll,
    )(**block, name="blocks")


def through(blocks: nn.Module, x: jax.Array, rates: jax.Array, biases: Sequence[jax.Array | None]) -> jax.Array:
    """The tokens after all blocks of a `stack`."""
    return blocks(x, rates, biases)[0]


def in_parts(
    number: int, group_size: int, unroll: int, run: Callable[[nn.Module, jax.Array], jax.Array], module: nn.Module, x: jax.Array
) -> jax.Array:
    """`run(module, x)` for x [B, ...] -> [B, ...], in `number` parts of the batch one after the other, and of each part once
    more in the backward pass: there is memory for the activations of one part.

    A part has equally many groups of `group_size` images that follow each other of each device. A batch that cannot be divided
    so, as in evaluation, or whose activations are asked for, is run whole.
    """
    asked = any(module.is_mutable_collection(name) for name in ("intermediates", "attention"))
    if number == 1 or asked or module.is_initializing() or len(x) % (number * group_size):
        return run(module, x)
    parts = x.reshape(-1, number, group_size, *x.shape[1:])
    parts = jnp.moveaxis(parts, 1, 0).reshape(number, -1, *x.shape[1:])
    scan = nn.scan(
        nn.remat(lambda module, carry, x: (carry, run(module, x)), prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False, "drop_path": True},
        length=number,
        unroll=unroll,
    )
    _, out = scan(module, (), parts)
    rest = out.shape[2:]
    return pin_batch(jnp.moveaxis(out.reshape(number, -1, group_size, *rest), 0, 1).reshape(-1, *rest))


def is_stacked(path: str) -> bool:
    """Whether the parameter at this slash-joined path has a leading axis of blocks, or of heads that are trained at once."""
    return re.search("(^|/)(blocks|heads)/", path) is not None


def rescale_residual(blocks: dict[str, Any], before: int = 0) -> dict[str, Any]:
    """BEiT's initialisation: the last kernel of both branches divided by sqrt(2 * layer); layers count from `before` + 1."""
    kernels = {name: blocks[name]["kernel"] for name in ("proj", "fc2")}
    layers = before + np.arange(1, len(kernels["proj"]) + 1)[:, None, None]
    scaled = {name: (kernel * (2.0 * layers) ** -0.5).astype(kernel.dtype) for name, kernel in kernels.items()}
    return blocks | {name: blocks[name] | {"kernel": kernel} for name, kernel in scaled.items()}


class PatchEmbed(nn.Module):
    """A linear map of non-overlapping patches: [N, H, W, C] -> [N, H // p, W // p, dim]; a remainder is cut off.

    `kernel_init` is given the shape of a matrix, [p * p * C, dim].
    """

    patch_size: int
    dim: int
    kernel_init: Initializer
    dtype: Any
    bias_init: Initializer | None = None  # None: PyTorch's for a convolution
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        n, height, width, channels = images.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        fan_in, dtype = channels * p * p, param_dtype(self.dtype)

        def matrix(key, shape, dtype):
            return self.kernel_init(key, (fan_in, self.dim), dtype).reshape(shape)

        kernel = self.param("kernel", matrix, (p, p, channels, self.dim), dtype)
        patches = patchify(images[:, : rows * p, : columns * p], p).reshape(-1, fan_in).astype(self.dtype)
        bias = self.param("bias", self.bias_init or torch_bias(fan_in), (self.dim,), dtype) if self.use_bias else None
        return linear(patches, kernel.reshape(-1, self.dim), bias).reshape(n, rows, columns, self.dim)


class ViT(nn.Module):
    """Maps crops, a sequence with one array [B, n, H, W, C] for each resolution, to a list with one dict for each:
    {"cls": [B, n, D], "patch": [B, n, N, D]}, and "registers" [B, n, R, D] if there are any.

    The outputs are those of the last block after the final norm, if there is one. Positions are interpolated where H and W
    are not `img_size`. Computes in `dtype`; parameters are float32 (float64 where `dtype` is).

    Attributes:
        drop_path_rate: of stochastic depth in the last block; it grows linearly from 0 in the first.
        drop_path_group: if given, all blocks have this rate, and an exact number of crops is dropped in each group of this many
            images, see `add_to_kept_rows`.
        pos: "learned": a table added to the tokens; "sincos": a fixed table (a parameter without gradient) of MAE, or
            "sincos_row_first" of MoCo v3; "relative": a bias on the attention, shared by all blocks (pre-training of BEiT and
            SimMIM); "relative_each": a bias for each block (their fine-tuning); "none": no more than `rotary_period`.
        mask_token: True: a learned token replaces masked patches; False: masked patches are dropped.
        pos_offset: of learned positions at another resolution, see `interpolation_weights`; 0.1 is DINO's.
        layerscale, k_bias, ffn, subln, rotary, rotary_period, attn_norm, bilinear: see `Block`. A grid of another size than
            `rotary` is stretched to it.
        act: "gelu" or "quick_gelu", of the MLPs. norm_eps: of all norms.
        cls: without a CLS token, "cls" is the mean of the patches.
        pre_norm: a norm before the first block (CLIP). patch_bias: whether the patch embedding has a bias.
        patch_grad: a factor of the gradient of the patch embedding.
        registers: number of tokens between CLS and the patches, without positions (Darcet et al. 2024).
        antialias: interpolate learned positions with an antialiased cubic (DINOv2 with registers) rather than as DINO does.
        resizable: False: nobody knows how the positions of these weights are interpolated; another size is refused.
        kernel_init, patch_init, patch_bias_init, token_init, pos_init: initializers of the linear layers, of the patch
            embedding, of CLS, registers and mask token, and of learned positions.
        unroll: blocks per iteration of the loop over the blocks.
        remat: see `remembering`.
        microbatches: parts of the batch, see `in_parts`.
    """

    patch_size: int
    img_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    drop_path_group: int = 0
    pos: str = "learned"
    pos_offset: float = 0.1
    mask_token: bool = False
    layerscale: float = 0.0
    k_bias: bool = True
    ffn: str = "mlp"
    subln: bool = False
    rotary: int = 0
    rotary_period: float = 0.0
    attn_norm: bool = False
    bilinear: bool = False
    act: str = "gelu"
    norm_eps: float = 1e-6
    cls: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    patch_grad: float = 1.0
    registers: int = 0
    antialias: bool = False
    resizable: bool = True
    final_norm: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    patch_init: Initializer = TORCH_UNIFORM
    patch_bias_init: Initializer | None = None
    token_init: Initializer = nn.initializers.normal(0.02)
    mask_token_init: Initializer | None = None  # None: as CLS
    pos_init: Initializer = nn.initializers.normal(0.02)
    unroll: int = 1
    remat: str = "none"
    microbatches: int = 1
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Side, in pixels, of the square that a patch token stands for."""
        return self.patch_size

    def block(self, layout: Layout, stochastic: bool, grids: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
        """The settings of a block; `grids` are used by blocks with biases of their own or rotary positions."""
        own = self.pos == "relative_each"
        shared = ("heads", "mlp_ratio", "kernel_init", "dtype", "layerscale", "k_bias", "norm_eps", "ffn", "subln", "rotary")
        more = ("rotary_period", "attn_norm", "bilinear")
        return {name: getattr(self, name) for name in shared + more} | dict(
            act={"gelu": gelu, "quick_gelu": quick_gelu}[self.act],
            bias_grid=self.img_size // self.patch_size if own else 0,
            grids=grids if own or self.rotary or self.rotary_period else (),
            layout=layout,
            stochastic=stochastic,
            kept=(self.drop_path_group, self.drop_path_rate) if self.drop_path_group else None,
        )

    def lr_scales(self, params: dict[str, Any], decay: float, patch_embed: float) -> dict[str, Any]:
        """Learning-rate factors of layer-wise decay (BEiT, MAE): decay ** (depth + 1 - layer), [depth, 1, ...] for the blocks.

        The embedding is layer 0, block k is layer k + 1, and the final norm is layer depth + 1. `patch_embed` is a further
        factor for the patch embedding (DINOv2).
        """
        before = {"patch_embed", "cls_token", "mask_token", "register_tokens", "pos_embed"}
        blocks = decay ** (self.depth - np.arange(self.depth))

        def scale(path: tuple, leaf: Any) -> Any:
            name = path[0].key
            if name == "blocks":
                return blocks.reshape(self.depth, *[1] * (leaf.ndim - 1))
            return decay ** (self.depth + 1 if name in before else 0) * (patch_embed if name == "patch_embed" else 1.0)

        return jax.tree_util.tree_map_with_path(scale, params)

    @nn.compact
    def __call__(
        self,
        crops: Sequence[jax.Array],
        train: bool = False,
        masks: Sequence[jax.Array | None] | None = None,
        visible: int = 0,
    ) -> list[dict[str, jax.Array]]:
        """`masks`: for each resolution bool [B, n, N] (True: masked) or None. `visible`: the number of visible patches of each
        crop, needed where masked patches are dropped; "patch" is then [B, n, visible, D], in the order of the image."""
        dtype, grid = param_dtype(self.dtype), self.img_size // self.patch_size
        cls_token = jnp.zeros((1, 0, self.dim), dtype)
        if self.cls:
            cls_token = self.param("cls_token", self.token_init, (1, 1, self.dim), dtype)
        patch_embed = PatchEmbed(
            self.patch_size,
            self.dim,
            self.patch_init,
            self.dtype,
            self.patch_bias_init,
            self.patch_bias,
            name="patch_embed",
        )
        if self.mask_token:
            mask_token = self.param("mask_token", self.mask_token_init or self.token_init, (1, 1, self.dim), dtype)
        if self.registers:
            register_tokens = self.param("register_tokens", self.token_init, (1, self.registers, self.dim), dtype)
        if self.pos == "learned":
            pos_embed = self.param("pos_embed", self.pos_init, (1, 1 + grid**2, self.dim), dtype)
        elif self.pos in ("sincos", "sincos_row_first"):
            table_of = functools.partial(sincos_positions, self.dim, grid, grid, self.pos == "sincos_row_first")
            pos_embed = self.param("pos_embed", lambda _: jnp.asarray(table_of(), dtype))
            pos_embed = jax.lax.stop_gradient(pos_embed)
        elif self.pos == "relative":
            table = bias_table(self, grid, self.heads, self.dtype)
        elif self.pos not in ("relative_each", "none"):
            raise ValueError(
                f"pos is {self.pos!r}: there are learned, sincos, sincos_row_first, relative, relative_each and none"
            )

        def embed(images: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            """Tokens [B, n * T, D] and the relative position bias, if any."""
            batch, n = images.shape[:2]
            patches = patch_embed(images.reshape(batch * n, *images.shape[2:]))
            if self.patch_grad != 1:
                patches = self.patch_grad * patches + (1 - self.patch_grad) * jax.lax.stop_gradient(patches)
            rows, columns = patches.shape[1:3]
            patches = patches.reshape(batch, n, rows * columns, self.dim)
            cls, bias = cls_token, None
            if mask is not None and self.mask_token:
                patches = jnp.where(mask[..., None], spread(mask_token, patches.shape, self.dtype), patches)
            if self.pos == "relative":
                bias = relative_bias(table, grid, (rows, columns), self.bilinear)
            elif self.pos not in ("relative_each", "none"):
                if not self.resizable and (rows, columns) != (grid, grid):
                    raise ValueError(
                        f"positions of {grid} x {grid} patches are not resized to {rows} x {columns}: it is not known how "
                        "these weights need it. Say it: python -m mim_jax.convert FILE --positions=..., dino, size (as MAE and "
                        "transformers) or antialiased (as timm), --out=DIR, then name DIR"
                    )
                offset = self.pos_offset if self.pos == "learned" and not self.antialias else 0.0
                positions = interpolate_positions(pos_embed, rows, columns, offset, self.antialias)
                patches, cls = patches + spread(positions[:, 1:], patches.shape, self.dtype), cls + positions[:, :1]
            if mask is not None and not self.mask_token:
                patches = jnp.take_along_axis(patches, visible_first(mask)[..., :visible, None], axis=2)
            first = jnp.concatenate([cls, register_tokens], axis=1) if self.registers else cls
            first = spread(first[:, None], (batch, n, *first.shape[1:]), self.dtype)
            return jnp.concatenate([first, patches], axis=2).reshape(batch, -1, self.dim), bias

        tokens, biases = zip(*(embed(images, mask) for images, mask in zip(crops, masks or [None] * len(crops))))
        layout = tuple((images.shape[1], t.shape[1] // images.shape[1]) for images, t in zip(crops, tokens))
        x = pin_batch(jnp.concatenate(tokens, axis=1))
        x = LayerNorm(self.dtype, self.norm_eps, name="norm_pre")(x) if self.pre_norm else x
        self.sow("intermediates", "tokens", x)
        self.sow("intermediates", "biases", biases)
        grids = tuple((images.shape[2] // self.patch_size, images.shape[3] // self.patch_size) for images in crops)
        blocks = stack(self.depth, self.unroll, self.remat, **self.block(layout, train and self.drop_path_rate > 0, grids))
        rates = jnp.linspace(0, self.drop_path_rate, self.depth)
        run = functools.partial(through, rates=rates, biases=biases)
        x = in_parts(self.microbatches, self.drop_path_group or 1, self.unroll, run, blocks, x)

        norm = LayerNorm(dtype, self.norm_eps, name="norm") if self.final_norm else lambda x: x.astype(dtype)
        out, start = [], 0
        for n, length in layout:
            part = x[:, start : start + n * length].reshape(-1, n, length, self.dim)
            end = self.cls + self.registers
            tokens_of = {"cls": part[:, :, 0], "patch": part[:, :, end:]} if self.cls else {"patch": part[:, :, end:]}
            tokens_of |= {"registers": part[:, :, self.cls : end]} if self.registers else {}
            normed = {name: norm(x) for name, x in tokens_of.items()}
            out.append({"cls": normed["patch"].mean(2)} | normed)
            start += n * length
        return out


def visible_first(mask: jax.Array) -> jax.Array:
    """Indices [..., N] of the visible patches, then of the masked ones, both in the order of the image."""
    return jnp.argsort(mask, axis=-1, stable=True)


def features(backbone: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The outputs of a ViT or Swin for unmasked images [B, H, W, C]: {"cls": [B, D], "patch": [B, N, D]}."""
    (out,) = backbone.apply({"params": params}, [images[:, None]])
    return {name: tokens[:, 0] for name, tokens in out.items()}


def hidden_states(vit: ViT, params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """(the inputs of all blocks and the output of the last, before the final norm, [depth + 1, B, 1 + N, D]; the `biases`
    that the blocks are called with)"""
    _, variables = vit.apply({"params": params}, [images[:, None]], mutable="intermediates")
    sown = variables["intermediates"]
    return jnp.concatenate([sown["tokens"][0][None], sown["blocks"]["tokens"][0]]), sown["biases"][0]


def masked_first(mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(indices [..., count] of the masked patches, in the order of the image; bool [..., count]: padding entries, where fewer
    patches are masked, are False)"""
    places = jnp.argsort(~mask, axis=-1, stable=True)[..., :count]
    return places, jnp.take_along_axis(mask, places, axis=-1)


def intermediate_layers(vit: ViT, params: Any, images: jax.Array, n: int = 1) -> jax.Array:
    """The outputs of the last `n` blocks after the final norm, if there is one, oldest first: [n, B, 1 + N, D]."""
    tokens = hidden_states(vit, params, images)[0][-n:]
    if not vit.final_norm:
        return tokens
    return LayerNorm(param_dtype(vit.dtype), vit.norm_eps).apply({"params": params["norm"]}, tokens)


def last_attention(vit: ViT, params: Any, images: jax.Array) -> jax.Array:
    """The attention weights of the last block, query by key: [B, heads, 1 + N, 1 + N]."""
    tokens, biases = hidden_states(vit, params, images)
    grid = images.shape[1] // vit.patch_size, images.shape[2] // vit.patch_size
    block = Block(**vit.block(((1, tokens.shape[2]),), stochastic=False, grids=(grid,)))
    last = jax.tree.map(lambda p: p[-1], params["blocks"])
    _, variables = block.apply({"params": last}, tokens[-2], jnp.zeros(()), biases, mutable="attention")
    return variables["attention"]["weights"][0]
