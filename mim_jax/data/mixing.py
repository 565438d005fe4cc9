"""What supervised training does to finished crops, on the device: random erasing, mixup and cutmix.

The reference is timm. Images are batches [B, H, W, C], normalised.
"""

import math

import jax
import jax.numpy as jnp

TRIES = 10  # draws of a rectangle until one is smaller than the image, as in timm
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of an erased rectangle: share of the image, height over width


def erase(images: jax.Array, probability: float, key: jax.Array) -> jax.Array:
    """Fills a random rectangle of some images with noise, a normal number for each value (random erasing, Zhong et al. 2020;
    timm's mode "pixel")."""
    batch, height, width, _ = images.shape
    which, draw, noise = jax.random.split(key, 3)
    area, aspect, above, left = jnp.moveaxis(jax.random.uniform(draw, (batch, TRIES, 4)), -1, 0)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    aspect = jnp.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * aspect)
    rows, columns = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (rows < height) & (columns < width)
    top, left = jnp.floor(above * (height - rows + 1)), jnp.floor(left * (width - columns + 1))
    first = jnp.argmax(fits, axis=1)[:, None]
    top, rows, left, columns = (jnp.take_along_axis(x, first, axis=1) for x in (top, rows, left, columns))
    happens = jax.random.bernoulli(which, probability, (batch, 1)) & fits.any(1, keepdims=True)
    y, x = jnp.arange(height), jnp.arange(width)
    inside = (happens & (y >= top) & (y < top + rows))[:, :, None] & ((x >= left) & (x < left + columns))[:, None]
    return jnp.where(inside[..., None], jax.random.normal(noise, images.shape, images.dtype), images)


def mix(images: jax.Array, targets: jax.Array, mixup: float, cutmix: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes each image of a batch with its neighbour, and their targets [B, K] in the same proportion.

    Mixup (Zhang et al. 2018) adds the two, cutmix (Yun et al. 2019) pastes a rectangle of the one into the other. `mixup` and
    `cutmix` are the parameters of the beta distribution of the proportion, 0: never. If both are given, one of them is drawn
    for the batch, and one proportion: timm's batch mode. Partners are images 2 * i and 2 * i + 1, so that none moves to another
    device; timm's are images i and B - 1 - i. `B` is even.
    """
    which, proportion, place = jax.random.split(key, 3)
    cut = jax.random.bernoulli(which) if mixup and cutmix else jnp.array(bool(cutmix))
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(proportion, alpha, alpha)

    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - share)
    rows, columns = jnp.floor(height * side) // 2, jnp.floor(width * side) // 2
    row, column = jnp.floor(jax.random.uniform(place, (2,)) * jnp.array([height, width]))
    y, x = jnp.arange(height), jnp.arange(width)
    pasted = ((y >= row - rows) & (y < row + rows))[:, None] & ((x >= column - columns) & (x < column + columns))
    share = jnp.where(cut, 1 - pasted.mean(), share).astype(images.dtype)
    weight = jnp.where(cut, 1 - pasted.astype(images.dtype), share)[..., None]

    def partner(a: jax.Array) -> jax.Array:
        return a.reshape(-1, 2, *a.shape[1:])[:, ::-1].reshape(a.shape)

    return images * weight + partner(images) * (1 - weight), targets * share + partner(targets) * (1 - share)
