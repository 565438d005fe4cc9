"""Vector quantisers: each vector is replaced by a code of a codebook, and the codes follow the vectors.

A quantiser is called with `(state, z)` and returns `(Quantized, new state)`. The state is a dict with the codebook [K, D] and
its statistics. Output and loss are those of the old codebook. Statistics are sums over the global batch, computed as products
with one-hot vectors, so that they are reproducible.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mim_jax import losses

State = dict[str, jax.Array]


class Quantized(NamedTuple):
    z: jax.Array  # [..., D] the codes, with the gradient of the vectors (straight-through)
    indices: jax.Array  # [...] int32
    loss: jax.Array  # scalar


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the code at the smallest Euclidean distance, the first of equals: [..., D], [K, D] -> int32 [...]."""
    products = jnp.einsum("...d,kd->...k", z, codebook, precision="highest")
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The codes, with the gradient of z (VQ-VAE, section 3.2)."""
    return z + jax.lax.stop_gradient(codes - z)


def members(z: jax.Array, indices: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """The number of vectors z [..., D] assigned to each code, [K], and their sum, [K, D]; without gradient."""
    one_hot = jax.nn.one_hot(indices.reshape(-1), codes, dtype=z.dtype)
    vectors = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
    return one_hot.sum(0), jnp.einsum("nk,nd->kd", one_hot, vectors, precision="highest")


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Vectors [..., D] scaled to length 1; those shorter than `eps` are divided by `eps`."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps**2))


def unit_means(counts: jax.Array, sums: jax.Array, empty: jax.Array) -> jax.Array:
    """The means of the codes' members, scaled to length 1; `empty` [K, D] for codes without members."""
    means = unit(sums / jnp.maximum(counts, 1)[:, None])
    return jnp.where(counts[:, None] > 0, means, empty)


def moving_average(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    return decay * old + (1 - decay) * new


def cosine_kmeans(samples: jax.Array, means: jax.Array, steps: int = 10) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means of unit vectors [N, D] from initial means [K, D]: (unit means [K, D], members of each [K]).

    A mean without members does not move. Members are counted before the last update. Source: BEiT v2, which initialises its
    codebook so.
    """

    def step(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        means = state[0]
        indices = jnp.argmax(jnp.einsum("nd,kd->nk", samples, means, precision="highest"), axis=-1)
        counts, sums = members(samples, indices, len(means))
        return unit_means(counts, sums, means), counts

    return jax.lax.fori_loop(0, steps, step, (means, jnp.zeros(len(means), samples.dtype)))


@dataclasses.dataclass(frozen=True)
class EmaQuantizer:
    """VQ-VAE's quantiser whose codes are moving averages of their members (van den Oord et al. 2017, appendix A.1).

    Counts start at one and are smoothed by `eps`, as in lucidrains' vector-quantize-pytorch.
    """

    codes: int
    dim: int
    decay: float = 0.8
    eps: float = 1e-5
    commitment: float = 1.0
    threshold: float = 0.0  # a code is dead if the moving average of its members is smaller

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> State:
        bound = (6 / (self.codes * self.dim)) ** 0.5
        codebook = jax.random.uniform(key, (self.codes, self.dim), dtype, -bound, bound)
        return {"codebook": codebook, "cluster_size": jnp.ones(self.codes, dtype), "embed_avg": jnp.array(codebook)}

    def __call__(self, state: State, z: jax.Array, train: bool = False) -> tuple[Quantized, State]:
        """z [..., D]; the state changes in training only."""
        z = z.astype(state["codebook"].dtype)
        indices = nearest(z, state["codebook"])
        codes = state["codebook"][indices]
        out = Quantized(straight_through(z, codes), indices, self.commitment * losses.commitment_loss(z, codes))
        if not train:
            return out, state
        counts, sums = members(z, indices, self.codes)
        size = moving_average(state["cluster_size"], counts, self.decay)
        embed_avg = moving_average(state["embed_avg"], sums, self.decay)
        smoothed = (size + self.eps) / (size.sum() + self.codes * self.eps) * size.sum()
        return out, {"codebook": embed_avg / smoothed[:, None], "cluster_size": size, "embed_avg": embed_avg}

    def replace_dead(self, state: State, vectors: jax.Array) -> State:
        """Dead codes are replaced by their rows of `vectors` [K, D], vectors of the batch, with `threshold` members."""
        dead = state["cluster_size"] < self.threshold
        vectors = jax.lax.stop_gradient(vectors).astype(state["codebook"].dtype)
        return {
            "codebook": jnp.where(dead[:, None], vectors, state["codebook"]),
            "cluster_size": jnp.where(dead, self.threshold, state["cluster_size"]),
            "embed_avg": jnp.where(dead[:, None], vectors * self.threshold, state["embed_avg"]),
        }


@dataclasses.dataclass(frozen=True)
class NormEmaQuantizer:
    """BEiT v2's quantiser (Peng et al. 2022): unit codes, the nearest by cosine.

    A code moves towards the mean of its members in the batch, which is scaled to length 1; a code without members does not
    move. `cluster_size` is only a statistic, and is updated outside training, too.
    """

    codes: int
    dim: int
    decay: float = 0.99
    beta: float = 1.0

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> State:
        codebook = unit(jax.random.normal(key, (self.codes, self.dim), dtype))
        return {"codebook": codebook, "cluster_size": jnp.zeros(self.codes, dtype)}

    def __call__(self, state: State, z: jax.Array, train: bool = False) -> tuple[Quantized, State]:
        """z [..., D], of any length; it is scaled to length 1 first."""
        codebook = state["codebook"]
        z = unit(z.astype(codebook.dtype))
        indices = nearest(z, codebook)
        codes = codebook[indices]
        out = Quantized(straight_through(z, codes), indices, self.beta * losses.commitment_loss(z, codes))
        counts, sums = members(z, indices, self.codes)
        if train:
            codebook = unit(moving_average(codebook, unit_means(counts, sums, codebook), self.decay))
        return out, {"codebook": codebook, "cluster_size": moving_average(state["cluster_size"], counts, self.decay)}


def gumbel_softmax(logits: jax.Array, noise: jax.Array, temp: jax.Array | float) -> jax.Array:
    """A relaxed sample of each distribution: logits and Gumbel noise [..., K] -> [..., K] (Jang et al. 2017, equation 2)."""
    return jax.nn.softmax((logits + noise) / temp)
