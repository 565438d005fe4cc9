"""View retrieval: does a crop find the other crop of its own image? It needs no labels.

It is what self-distillation optimizes, so it moves within minutes, long before k-NN accuracy does.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mim_jax.evaluators.knn import Array, normalize


@partial(jax.jit, static_argnames="chunk")
def view_retrieval(first: Array, second: Array, chunk: int = 500) -> jax.Array:
    """Share (0 to 1) of the images whose nearest second view is their own.

    Features are standardized (mean 0 and std 1 per dimension, over all views, since what all images share tells none of them
    apart) and compared by cosine. Chance is 1 / N, so a value means nothing without N.

    Args:
        first, second: features of two views of the same N images in the same order, [N, D].
        chunk: first views compared at a time: memory is `chunk * N` floats.

    Returns:
        float32 scalar. Features that are the same for all images score 1 / N, not 1.
    """
    both = jnp.concatenate([first, second])
    mean, std = both.mean(axis=0), both.std(axis=0)
    varies = std > 1e-6 * (jnp.abs(mean) + std.max())

    def standardize(x: Array) -> jax.Array:
        return normalize(jnp.where(varies, (x - mean) / jnp.where(varies, std, 1.0), 0.0))

    second = standardize(second)
    nearest = jax.lax.map(lambda query: jnp.argmax(second @ query), standardize(first), batch_size=chunk)
    return jnp.mean(nearest == jnp.arange(len(first)), dtype=jnp.float32)
