"""What the golden tests do with stored arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import convert


def prefixed(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def channels_last(images):
    return jnp.asarray(np.moveaxis(images, -3, -1))


def relative_error(got, want):
    return np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))


def double(tree):
    """Floating-point leaves in float64."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype.kind == "f" else a.dtype), tree)


def official(tree, family):
    """A tree of parameters (or gradients) under its official names, fetched."""
    return convert.to_torch(jax.device_get(tree), family)
