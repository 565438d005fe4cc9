"""View retrieval: how often a crop's nearest neighbor is another crop of the same image.

It needs no labels, and in self-distillation it rises long before k-NN accuracy does.
"""

from functools import partial

import jax
import jax.numpy as jnp

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
