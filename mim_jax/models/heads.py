"""The projection heads that the losses see."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.layers import dense, gelu, param_dtype
from mim_jax.sharding import pin_batch


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm1d on [N, D]: normalises by the batch and keeps running figures (unbiased variance) beside."""

    momentum: float = 0.1
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype, shape = param_dtype(x.dtype), x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        batches = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        x = x.astype(dtype)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var = x.mean(0), x.var(0)
            if not self.is_initializing():
                unbiased = var * len(x) / (len(x) - 1)
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
                batches.value += 1
        return (x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias


class WeightNormDense(nn.Module):
    """A linear map [N, I] -> [N, O] without bias whose columns are weight_g * v / |v| (Salimans & Kingma 2016).

    Initial g is 1 and v is PyTorch's default for a linear layer, uniform within 1 / sqrt(I).
    """

    features: int
    train_norm: bool  # False: no gradient reaches weight_g
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, bound = param_dtype(self.dtype), x.shape[-1] ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        g = self.param("weight_g", nn.initializers.ones, (1, self.features), dtype)
        v = self.param("weight_v", uniform, (x.shape[-1], self.features), dtype)
        g = g if self.train_norm else jax.lax.stop_gradient(g)
        kernel = v * (g * jax.lax.rsqrt(jnp.sum(v * v, axis=0, keepdims=True)))
        return x.astype(self.dtype) @ kernel.astype(self.dtype)


class DinoHead(nn.Module):
    """An MLP to a small bottleneck, L2 normalisation, and weight-normalised prototypes: [..., D] -> [..., out_dim].

    Source: DINO (Caron et al. 2021), appendix C. `nlayers=1` is a single linear layer; `use_bn` puts batch
    normalisation (collection `batch_stats`) before each GELU. Logits are float32 (float64 where `dtype` is).
    """

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    nlayers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        linear = functools.partial(dense, dtype=self.dtype, init_std=self.init_std)
        for i in range(self.nlayers - 1):
            x = linear(self.hidden_dim, name=f"mlp_{i}")(x)
            x = gelu(BatchNorm(name=f"bn_{i}")(x, train).astype(self.dtype) if self.use_bn else x)
        x = linear(self.bottleneck_dim, name=f"mlp_{self.nlayers - 1}")(x).astype(param_dtype(self.dtype))
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        x = WeightNormDense(self.out_dim, not self.norm_last_layer, self.dtype, name="last_layer")(x)
        return pin_batch(x.astype(param_dtype(self.dtype)).reshape(*shape, self.out_dim))
