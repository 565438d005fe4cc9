"""View retrieval: how often a crop's nearest neighbor is another crop of the same image. Patch retrieval: how often the nearest
patch in another picture of an image shows the same place.

They need no labels, and in self-distillation view retrieval rises long before k-NN accuracy does.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.knn import Array, normalize


@partial(jax.jit, static_argnames="chunk")
def view_retrieval(first: Array, second: Array, chunk: int = 500) -> jax.Array:
    """Share (0 to 1) of the N images whose first view [N, D] is nearest to their own second view [N, D]; chance is 1 / N.

    Features are standardized over all views and compared by cosine; constant features score 1 / N. `chunk` first views are
    compared at a time, in `chunk * N` floats.
    """
    both = jnp.concatenate([first, second])
    mean, std = both.mean(axis=0), both.std(axis=0)
    varies = std > 1e-6 * (jnp.abs(mean) + std.max())

    def standardize(x: Array) -> jax.Array:
        return normalize(jnp.where(varies, (x - mean) / jnp.where(varies, std, 1.0), 0.0))

    second = standardize(second)
    nearest = jax.lax.map(lambda query: jnp.argmax(second @ query), standardize(first), batch_size=chunk)
    return jnp.mean(nearest == jnp.arange(len(first)), dtype=jnp.float32)


def patch_retrieval(whole: jax.Array, half: jax.Array) -> jax.Array:
    """For each image, the share (0 to 1) of the patches of `half` whose nearest patch of `whole`, by cosine, is the one that
    their centre lies in; chance is 1 / N. Float32 [B], for patches [B, N, D] of square pictures, row-major.

    `half` is the central square of half of the side of `whole`, mirrored left to right and enlarged to its size. So a position
    alone, the same in both, is no answer, and neither are the pixels.
    """
    n = math.isqrt(whole.shape[1])
    row = (n + 2 * np.arange(n) + 1) // 4
    place = row[:, None] * n + row[::-1]
    nearest = jnp.argmax(normalize(half) @ normalize(whole).swapaxes(1, 2), axis=-1)
    return jnp.mean(nearest == place.reshape(-1), axis=-1, dtype=jnp.float32)
