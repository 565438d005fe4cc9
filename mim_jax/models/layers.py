"""Layers that the models share.

Dense layers are given flat tokens [N, D], not [B, T, D]: in the weight gradient, XLA's CPU backend contracts one axis faster
than two, and other backends are as fast.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mim_jax.sharding import of_each_device, platform

LANES = 128  # of a TPU: its fused attention takes multiples of so many tokens
LONG = 512  # tokens from which it takes less memory than the plain product (compiled for a v5e: not with 261, with 785)


def param_dtype(dtype: Any) -> Any:
    """The dtype of parameters, norms and losses: float32, or float64 where the computation has it."""
    return jnp.promote_types(jnp.float32, dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016); only x is stored for the backward pass."""
    return x * _cdf(x)


def _cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_bwd(x, dy):
    return (dy * (_cdf(x) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default, within 1 / sqrt(fan_in)

Initializer = Callable[..., jax.Array]


def torch_bias(fan_in: int) -> Initializer:
    """PyTorch's default for biases, uniform within 1 / sqrt(fan_in)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [N, I] times `kernel` [I, O], plus `bias` [O], in the dtype of x. The gradients of the two parameters are summed, over
    tokens and devices, in their own dtype, which is at least float32."""
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def _linear_fwd(x, kernel, bias):
    return linear(x, kernel, bias), (x, kernel, bias)


def _linear_bwd(residuals, dy):
    x, kernel, bias = residuals
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (((1,), (1,)), ((), ())))
    dkernel = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype)
    return dx, dkernel, None if bias is None else jnp.sum(dy, 0, dtype=bias.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)


def spread(parameter: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A parameter broadcast to `shape`, then cast: so its gradient, too, is summed in its own dtype."""
    return jnp.broadcast_to(parameter, shape).astype(dtype)


DENSE = "dense"  # the outputs of linear layers, as `jax.checkpoint` knows them


class Dense(nn.Module):
    """A linear layer for flat tokens, [N, I] -> [N, features]."""

    features: int
    dtype: Any
    kernel_init: Initializer
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), dtype)
        bias = self.param("bias", self.bias_init, (self.features,), dtype) if self.use_bias else None
        return checkpoint_name(linear(x.astype(self.dtype), kernel, bias), DENSE)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def patchify(images: jax.Array, size: int) -> jax.Array:
    """[..., H, W, C] -> [..., N, size * size * C]; patches are row-major, their values in the order (row, column, channel)."""
    *batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    patches = images.reshape(*batch, rows, size, columns, size, channels)
    return jnp.moveaxis(patches, -4, -3).reshape(*batch, rows * columns, size * size * channels)


def unpatchify(patches: jax.Array, size: int, grid: tuple[int, int] | None = None) -> jax.Array:
    """The inverse of `patchify`: [..., N, size * size * C] -> [..., H, W, C]; `grid` is (rows, columns), by default square."""
    *batch, count, _ = patches.shape
    rows, columns = grid or (math.isqrt(count), math.isqrt(count))
    images = jnp.moveaxis(patches.reshape(*batch, rows, columns, size, size, -1), -4, -3)
    return images.reshape(*batch, rows * size, columns * size, -1)


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **rest: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` without dilation, as `flax.linen.Conv` calls it: x [B, H, W, I], kernel [h, w, I, O].

    With a stride, on a CPU, it is one matrix product with the concatenated shifted images: XLA's gradients of such are
    slow there.
    """
    if platform() != "cpu" or tuple(strides) == (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (height, width, _, out), (rows, columns) = kernel.shape, strides
    bottom, right = x.shape[1] - height + 1, x.shape[2] - width + 1
    shifted = [x[:, i : i + bottom : rows, j : j + right : columns] for i in range(height) for j in range(width)]
    taps = jnp.concatenate(shifted, axis=-1)
    return (taps.reshape(-1, taps.shape[-1]) @ kernel.reshape(-1, out)).reshape(*taps.shape[:-1], out)


def convolve_to_twice(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jax.lax.conv_transpose` with stride 2: x [B, H, W, I], kernel [4, 4, I, O] -> [B, 2 * H, 2 * W, O].

    On a CPU, for the same reason, it is one product, whose results are added where they overlap.
    """
    if platform() != "cpu":
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")
    batch, rows, columns, dim = x.shape
    flat = x.reshape(-1, dim) @ jnp.moveaxis(kernel, 2, 0).reshape(dim, -1)
    y = flat.reshape(batch, rows, columns, 4, 4, -1)

    def doubled(y: jax.Array, axis: int, taps: int) -> jax.Array:
        """Pixel 2 * i is tap 2 of input i plus tap 0 of i - 1; pixel 2 * i + 1 is tap 1 of input i plus tap 3 of i + 1."""
        one, two, three, four = (jnp.take(y, k, axis=taps) for k in range(4))

        def shifted(z: jax.Array, by: int) -> jax.Array:
            return jax.lax.pad(z, jnp.zeros((), z.dtype), [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(z.ndim)])

        pairs = jnp.stack([three + shifted(one, 1), two + shifted(four, -1)], axis=axis + 1)
        return pairs.reshape(*pairs.shape[:axis], -1, *pairs.shape[axis + 2 :])

    return doubled(doubled(y, 1, 3), 2, 3)


def fill_masked(images: jax.Array, filling: jax.Array, mask: jax.Array) -> jax.Array:
    """`images` with the masked patches of `filling`, both [..., H, W, C]; mask bool [..., N] of square patches."""
    height, width = images.shape[-3:-1]
    size = math.isqrt(height * width // mask.shape[-1])
    patches = mask.reshape(*mask.shape[:-1], height // size, width // size)
    pixels = jnp.repeat(jnp.repeat(patches, size, -2), size, -1)
    return jnp.where(pixels[..., None], filling, images)


def sums(x: jax.Array, axis: int) -> jax.Array:
    """The sums of a matrix along an axis, which is kept, as a product with ones: fast on a CPU, and a reduction elsewhere."""
    ones = jnp.ones((x.shape[axis], 1), x.dtype)
    return jnp.matmul(ones.T, x, precision="highest") if axis == 0 else jnp.matmul(x, ones, precision="highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Rows of x [N, D] with mean 0 and variance 1, times `scale` [D], plus `bias` [D] (Ba et al. 2016)."""
    return _normalize_fwd(x, scale, bias, eps)[0]


def _normalize_fwd(x, scale, bias, eps):
    x = x - sums(x, 1) / x.shape[1]
    inverse = jax.lax.rsqrt(sums(x * x, 1) / x.shape[1] + eps)
    x = x * inverse
    return x * scale + bias, (x, inverse, scale)


def _normalize_bwd(eps, residuals, dy):
    x, inverse, scale = residuals
    dx, width = dy * scale, x.shape[1]
    dx = inverse * (dx - sums(dx, 1) / width - x * (sums(dx * x, 1) / width))
    return dx, sums(dy * x, 0)[0], sums(dy, 0)[0]


normalize.defvjp(_normalize_fwd, _normalize_bwd)


class LayerNorm(nn.Module):
    """Layer normalisation: [..., D] -> [..., D]. Its statistics are at least float32, its output has `dtype`."""

    dtype: Any
    eps: float = 1e-6  # of ViTs

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, shape = param_dtype(self.dtype), x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return normalize(x.reshape(-1, *shape).astype(dtype), scale, bias, self.eps).astype(self.dtype).reshape(x.shape)


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(d) + bias), at least float32: [..., T, d] -> [..., T, T]."""
    dtype = param_dtype(q.dtype)
    logits = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits if bias is None else logits + bias.astype(dtype))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax attention, q, k, v [B, T, H, d] -> [B, T, H, d]; `bias` [1 or B, H, T, T] is added to the logits.

    On a GPU in half precision it is cuDNN's fused kernel, on a TPU in half precision JAX's splash attention for LONG rows.
    Elsewhere it is the plain product over [B * H, T, d].
    """
    batch, length, heads, depth = q.shape
    if platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        if bias is not None and len(bias) == 1 < batch:
            return of_each_device(cudnn_attention, q, k, v, whole=(bias,))  # else its gradient is summed in half precision
        return cudnn_attention(q, k, v, bias)
    if platform() == "tpu" and q.dtype == jnp.bfloat16 and bias is None and length >= LONG:
        return of_each_device(splash_attention, q, k, v)
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, length, depth) for x in (q, k, v))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (batch, heads, length, length)).reshape(batch * heads, length, length)
    return _attend(q, k, v, bias).reshape(batch, heads, length, depth).transpose(0, 2, 1, 3)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`attention` in cuDNN's fused kernel. In training this refuses odd T (in the newest jax only with a bias): so a zero token
    is added, which the softmax ignores."""
    batch, length, *_ = q.shape
    odd = length % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    if bias is not None:
        bias = jnp.pad(bias.astype(q.dtype), ((0, 0), (0, 0), (0, odd), (0, odd)))
    lengths = jnp.full((batch,), length, jnp.int32) if odd else None
    out = jax.nn.dot_product_attention(
        q, k, v, bias, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """`attention` in a fused kernel for TPUs, which takes multiples of 128 tokens: zeros are added, which nobody attends to."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads, depth = q.shape[1:]
    size = length + -length % LANES
    block = size if size <= 2048 else LANES  # of keys: as many as fit into the memory beside a core
    sizes: Any = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), LANES)
    sizes |= dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), block)
    all_pairs = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((size, size))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(
        all_pairs, block_sizes=splash_attention_kernel.BlockSizes(**sizes), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    real = (jnp.arange(size) < length).astype(jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, size - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q * depth**-0.5, k, v))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, splash_attention_kernel.SegmentIds(real, real))
    return out.transpose(0, 2, 1, 3)[:, :length]


@jax.custom_vjp
def _attend(q, k, v, bias):
    """q, k, v [N, T, d], bias [N, T, T] or None -> [N, T, d]. The weights are stored once for the backward pass."""
    return _attend_fwd(q, k, v, bias)[0]


def _attend_fwd(q, k, v, bias):
    weights = attention_weights(q, k, bias).astype(v.dtype)
    out = weights @ v
    return out, (q, k, v, None if bias is None else jnp.zeros((), bias.dtype), weights, out)


def _attend_bwd(residuals, dy):
    q, k, v, bias, weights, out = residuals
    along = jnp.sum((dy * out).astype(param_dtype(q.dtype)), axis=-1, keepdims=True)
    dlogits = weights * (jnp.einsum("ntd,nsd->nts", dy, v, preferred_element_type=along.dtype) - along)
    dscaled = (dlogits * q.shape[-1] ** -0.5).astype(q.dtype)
    dq, dk = dscaled @ k, jnp.einsum("nts,ntd->nsd", dscaled, q)
    return dq, dk, jnp.einsum("nts,ntd->nsd", weights, dy), None if bias is None else dlogits.astype(bias.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)
