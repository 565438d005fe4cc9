"""The layers of a transformer.

Dense layers are given flat tokens [N, D], not [B, T, D]: XLA's CPU backend contracts one axis faster than two in the weight
gradient, and to other backends it is the same.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def param_dtype(dtype: Any) -> Any:
    """Parameters, norms and losses are float32 whatever computes between them, and float64 when all is float64."""
    return jnp.promote_types(jnp.float32, dtype)


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


def dense(features: int, dtype: Any, init_std: float = 0.02, name: str | None = None) -> nn.Dense:
    """A linear layer for flat tokens, [N, I] -> [N, features]: weights N(0, init_std), biases 0."""
    kernel_init = nn.initializers.normal(init_std)
    return nn.Dense(features, dtype=dtype, param_dtype=param_dtype(dtype), kernel_init=kernel_init, name=name)


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Layer normalisation with the ViTs' eps, statistics in float32 at least; the output has `dtype`."""
    return nn.LayerNorm(1e-6, dtype=dtype, param_dtype=param_dtype(dtype), use_fast_variance=False, name=name)


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
