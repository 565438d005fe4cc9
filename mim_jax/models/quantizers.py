"""Vector quantisers: which code stands for a vector, and how the codes learn.

The quantisers of a codebook are called with `(state, z)` and give `(Quantized, new state)`; the state is a dict with the
codebook [K, D] and what is counted beside it. The output and the loss are those of the codebook that came in. All figures
are sums over the global batch; as products with one-hot vectors they are the same numbers in every run.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mim_jax import losses

State = dict[str, jax.Array]


class Quantized(NamedTuple):
    z: jax.Array  # [..., D] the codes; their gradient goes to the vectors that they stand for
    indices: jax.Array  # [...] int32
    loss: jax.Array  # scalar


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The code of the smallest Euclidean distance, the first of equals: [..., D], [K, D] -> int32 [...]."""
    products = jnp.einsum("...d,kd->...k", z, codebook, precision="highest")
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The codes, with the gradient of z (VQ-VAE, section 3.2)."""
    return z + jax.lax.stop_gradient(codes - z)


def members(z: jax.Array, indices: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """How many vectors z [..., D] chose each code, [K], and their sums, [K, D]; without gradient."""
    one_hot = jax.nn.one_hot(indices.reshape(-1), codes, dtype=z.dtype)
    vectors = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
    return one_hot.sum(0), jnp.einsum("nk,nd->kd", one_hot, vectors, precision="highest")


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Vectors [..., D] scaled to length 1, those shorter than `eps` divided by it."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps**2))


def unit_means(counts: jax.Array, sums: jax.Array, empty: jax.Array) -> jax.Array:
    """The means of the members, scaled to length 1, and `empty` [K, D] where there are none."""
    means = unit(sums / jnp.maximum(counts, 1)[:, None])
    return jnp.where(counts[:, None] > 0, means, empty)


def moving_average(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    return decay * old + (1 - decay) * new


def cosine_kmeans(samples: jax.Array, means: jax.Array, steps: int = 10) -> tuple[jax.Array, jax.Array]:
    """(means [K, D] of length 1, members of each [K]) of unit vectors [N, D], from the first means given.

    A mean without members stays where it was. The members are those of the last step, before its means moved (BEiT v2's
    first codebook, from the first batch).
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

    As in lucidrains' vector-quantize-pytorch, counts start at one and are smoothed by `eps` for the division.
    """

    codes: int
    dim: int
    decay: float = 0.8
    eps: float = 1e-5
    commitment: float = 1.0
    threshold: float = 0.0  # codes with fewer members, on the moving average, are dead

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> State:
        bound = (6 / (self.codes * self.dim)) ** 0.5
        codebook = jax.random.uniform(key, (self.codes, self.dim), dtype, -bound, bound)
        return {"codebook": codebook, "cluster_size": jnp.ones(self.codes, dtype), "embed_avg": jnp.array(codebook)}

    def __call__(self, state: State, z: jax.Array, train: bool = False) -> tuple[Quantized, State]:
        """z [..., D]; the state is a new one in training only."""
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
        """Each dead code begins anew as its row of `vectors` [K, D] (vectors of the batch), with `threshold` members."""
        dead = state["cluster_size"] < self.threshold
        vectors = jax.lax.stop_gradient(vectors).astype(state["codebook"].dtype)
        return {
            "codebook": jnp.where(dead[:, None], vectors, state["codebook"]),
            "cluster_size": jnp.where(dead, self.threshold, state["cluster_size"]),
            "embed_avg": jnp.where(dead[:, None], vectors * self.threshold, state["embed_avg"]),
        }


@dataclasses.dataclass(frozen=True)
class NormEmaQuantizer:
    """BEiT v2's quantiser (Peng et al. 2022): unit codes, the nearest by cosine, moved towards their members.

    The mean of the batch's members is scaled to length 1, averaged with the code, and scaled again; a code without members
    stays. `cluster_size` only tells how much each code is used: it moves outside training too.
    """

    codes: int
    dim: int
    decay: float = 0.99
    beta: float = 1.0

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> State:
        codebook = unit(jax.random.normal(key, (self.codes, self.dim), dtype))
        return {"codebook": codebook, "cluster_size": jnp.zeros(self.codes, dtype)}

    def __call__(self, state: State, z: jax.Array, train: bool = False) -> tuple[Quantized, State]:
        """z [..., D] of any length. The straight-through gradient is that of z scaled to length 1."""
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
