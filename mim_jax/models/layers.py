"""The layers of a transformer on flat tokens [N, D], with the gradients written out.

Dense layers see [tokens, D] and not [B, T, D], and bias gradients are a product with a row of ones: XLA's CPU backend
is about 1.5x faster so (`benchmarks/step.py`), and other backends lose nothing. The values are the textbook ones.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def param_dtype(dtype: Any) -> Any:
    """Parameters, norms and losses are float32 whatever computes between them, and float64 when all is float64."""
    return jnp.promote_types(jnp.float32, dtype)


def column_sum(x: jax.Array) -> jax.Array:
    """[N, D] -> [D], accumulated in float32 at least. A product with ones forces XLA to make `x` only once."""
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    return jnp.matmul(ones, x, preferred_element_type=param_dtype(x.dtype))[0]


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016); keeps Phi for the backward pass."""
    return _gelu_fwd(x)[0]


def _gelu_fwd(x):
    cdf = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    return x * cdf, (x, cdf)


def _gelu_bwd(residuals, dy):
    x, cdf = residuals
    return (dy * (cdf + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [N, I] @ kernel [I, O] + bias [O]."""
    return x @ kernel + bias


def _dense_fwd(x, kernel, bias):
    return dense(x, kernel, bias), (x, kernel)


def _dense_bwd(residuals, dy):
    x, kernel = residuals
    return dy @ kernel.T, x.T @ dy, column_sum(dy).astype(dy.dtype)


dense.defvjp(_dense_fwd, _dense_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation of x [N, D], computed in the dtype of `scale` and returned in it."""
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    y = x.astype(scale.dtype)
    y = y - y.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y * rstd * scale + bias, (x, rstd, scale)


def _layer_norm_bwd(eps, residuals, dy):
    x, rstd, scale = residuals
    y = x.astype(scale.dtype)
    normed = (y - y.mean(-1, keepdims=True)) * rstd
    d = dy * scale
    dx = rstd * (d - d.mean(-1, keepdims=True) - normed * jnp.mean(d * normed, -1, keepdims=True))
    return dx.astype(x.dtype), column_sum(dy * normed), column_sum(dy)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class Dense(nn.Module):
    """A linear layer on flat tokens: [N, I] -> [N, features]. Weights N(0, init_std), biases 0."""

    features: int
    dtype: Any = jnp.float32
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features), dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        return dense(x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))


class LayerNorm(nn.Module):
    """Layer normalisation of [..., D], statistics in float32; the output has `dtype`."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], dtype)
        flat = layer_norm(x.reshape(-1, x.shape[-1]), scale, bias, self.eps)
        return flat.reshape(x.shape).astype(self.dtype)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) in float32 at least: [..., T, d] -> [..., T, T]."""
    dtype = param_dtype(q.dtype)
    return jax.nn.softmax(jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, q, k, v [B, T, H, d] -> [B, T, H, d].

    On a GPU in half precision cuDNN's fused kernel, which in training refuses odd T: one zero token is added, hidden
    from the softmax, and dropped again. Elsewhere the plain product over [B * H, T, d].
    """
    batch, length, heads, depth = q.shape
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        odd = length % 2
        q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full((batch,), length, jnp.int32)
        out = jax.nn.dot_product_attention(
            q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        )
        return out[:, :length]
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, length, depth) for x in (q, k, v))
    out = attention_weights(q, k).astype(v.dtype) @ v
    return out.reshape(batch, heads, length, depth).transpose(0, 2, 1, 3)
