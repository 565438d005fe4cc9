"""Heads: from the backbone's tokens to the scores that the losses compare."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.layers import TORCH_UNIFORM, Dense, Initializer, LayerNorm, gelu, linear, normalize, param_dtype, sums
from mim_jax.sharding import pin_batch


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm1d on [N, D], with running mean and unbiased variance in the collection `batch_stats`."""

    momentum: float = 0.1
    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype, shape = param_dtype(x.dtype), x.shape[-1:]
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
        x = (x - mean) * jax.lax.rsqrt(var + self.eps)
        if not self.affine:
            return x
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        return x * scale + self.param("bias", nn.initializers.zeros, shape, dtype)


class WeightNormDense(nn.Module):
    """A linear map [N, I] -> [N, O] without bias whose columns are weight_g * v / |v| (Salimans & Kingma 2016).

    The output is at least float32, for any `dtype`.
    """

    features: int
    train_norm: bool  # False: weight_g gets no gradient
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = param_dtype(self.dtype)
        g = self.param("weight_g", nn.initializers.ones, (1, self.features), dtype)
        v = self.param("weight_v", TORCH_UNIFORM, (x.shape[-1], self.features), dtype)
        g = g if self.train_norm else jax.lax.stop_gradient(g)
        # The products are scaled, not the kernel: jax 0.10 fuses a kernel's scaling into a slow product on a CPU (25 x).
        return linear(x.astype(self.dtype), v) * (g * jax.lax.rsqrt(sums(v * v, 0)))


class DinoHead(nn.Module):
    """An MLP to a small bottleneck, L2 normalisation, and weight-normalised prototypes: [..., D] -> [..., out_dim].

    Source: DINO (Caron et al. 2021), appendix C; iBOT (Zhou et al. 2021), section 3.2, for patches. `use_bn` puts batch
    normalisation before each GELU. With a `patch_out_dim`, patches have a last layer of their own, `last_layer2`, with this
    number of prototypes. Logits are float32 (float64 where `dtype` is).
    """

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    nlayers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    patch_out_dim: int = 0
    init_std: float = 0.02
    dtype: Any = jnp.float32

    def setup(self) -> None:
        layer = functools.partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std))
        self.mlp = [layer(self.hidden_dim) for _ in range(self.nlayers - 1)] + [layer(self.bottleneck_dim)]
        self.bn = [BatchNorm() for _ in range(self.nlayers - 1)] if self.use_bn else []
        prototypes = functools.partial(WeightNormDense, train_norm=not self.norm_last_layer, dtype=self.dtype)
        self.last_layer = prototypes(self.out_dim)
        self.last_layer2 = prototypes(self.patch_out_dim) if self.patch_out_dim else self.last_layer

    def __call__(
        self, cls: jax.Array, patch: jax.Array | None = None, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """cls [..., D] -> [..., out_dim]; or cls [B, n, D] and patch [B, M, D] -> both logits, those of patches
        [B, M, patch_out_dim or out_dim]."""
        if patch is None:
            return self.prototypes(self.bottleneck(cls, train))
        x = self.bottleneck(jnp.concatenate([cls, patch], axis=1), train)
        return self.prototypes(x[:, : cls.shape[1]]), self.prototypes(x[:, cls.shape[1] :], self.last_layer2)

    def bottleneck(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Tokens [..., D] -> unit vectors [..., bottleneck_dim]."""
        shape, dtype = x.shape[:-1], param_dtype(self.dtype)
        x = x.reshape(-1, x.shape[-1])
        for i, layer in enumerate(self.mlp[:-1]):
            x = pin_batch(layer(x))
            x = gelu(self.bn[i](x, train).astype(self.dtype) if self.use_bn else x)
        x = pin_batch(self.mlp[-1](x)).astype(dtype)
        return (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).reshape(*shape, -1)

    def prototypes(self, x: jax.Array, layer: WeightNormDense | None = None) -> jax.Array:
        """Unit vectors [..., bottleneck_dim] -> logits [..., out_dim], or those of another last layer."""
        logits = (layer or self.last_layer)(x.reshape(-1, x.shape[-1]))
        return pin_batch(logits.reshape(*x.shape[:-1], -1))


class BatchNormMlp(nn.Module):
    """MoCo v3's projector (3 layers) and predictor (2): [N, D] -> [N, out_dim], at least float32, all N normalised together.

    Linear layers without bias, each followed by batch normalisation, and all but the last by ReLU; the last normalisation has
    no scale and no bias. Source: MoCo v3 (Chen et al. 2021), section 4, "MLP heads".
    """

    layers: int
    hidden_dim: int
    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers - 1):
            x = pin_batch(Dense(self.hidden_dim, self.dtype, TORCH_UNIFORM, use_bias=False, name=f"mlp_{i}")(x))
            x = nn.relu(BatchNorm(name=f"bn_{i}")(x, train=True))
        last = self.layers - 1
        x = pin_batch(Dense(self.out_dim, self.dtype, TORCH_UNIFORM, use_bias=False, name=f"mlp_{last}")(x))
        return BatchNorm(affine=False, name=f"bn_{last}")(x, train=True)


class TokenHead(nn.Module):
    """BEiT's head: a linear map from tokens to scores over a vocabulary, [..., D] -> [..., vocab_size], at least float32."""

    vocab_size: int
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        logits = Dense(self.vocab_size, self.dtype, self.kernel_init, name="linear")(x.reshape(-1, x.shape[-1]))
        return pin_batch(logits.astype(param_dtype(self.dtype)).reshape(*x.shape[:-1], self.vocab_size))


class Classifier(nn.Module):
    """Features [B, D] -> class scores [B, num_classes]."""

    num_classes: int
    norm: str = ""  # "layer": MAE's fine-tuning after mean pooling; "batch": its linear probe, without scale and bias; "": none
    init_std: float = 2e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.norm == "layer":
            x = LayerNorm(self.dtype, name="fc_norm")(x)
        elif self.norm == "batch":
            x = BatchNorm(eps=1e-6, affine=False, name="bn")(x, train)
        return Dense(self.num_classes, self.dtype, nn.initializers.normal(self.init_std), name="linear")(x)


class LinearHead(NamedTuple):
    """A trained classifier for other programs: what is pooled, a norm and a linear layer. The last two may be {}."""

    pool: str  # "cls", "mean" of the patches, or "cls+mean", joined
    norm: dict[str, Any]  # scale and bias of a LayerNorm of what is pooled
    linear: dict[str, Any]  # kernel [D, K] and bias [K]
    eps: float = 1e-6  # of the norm
    labels: tuple[str, ...] = ()  # names of the classes, if they are known

    @property
    def classes(self) -> int:
        return len(self.linear["bias"]) if self.linear else 0

    @property
    def params(self) -> dict[str, Any]:
        return {"norm": self.norm, "linear": self.linear}

    def scores(self, features: dict[str, jax.Array]) -> jax.Array:
        """A backbone's features {"cls": [B, D], "patch": [B, N, D]} -> [B, K]."""
        kinds = {"cls": features["cls"], "mean": features["patch"].mean(1)}
        x = jnp.concatenate([kinds[kind] for kind in self.pool.split("+")], axis=-1)
        x = normalize(x, self.norm["scale"], self.norm["bias"], self.eps) if self.norm else x
        return x @ self.linear["kernel"] + self.linear["bias"]
