"""RandAugment (Cubuk et al. 2020) on the device, with the operations and ranges of timm's "rand-m9-mstd0.5-inc1".

Each image gets two operations, each of which is drawn from all and then done with probability 1/2. As in `augment`, images have
8 bits between operations, and the functions that work on one image take its planes [3, h, w], levels in float32. All operations
are computed for all images and one result is taken: under `vmap` a branch would do no less.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mim_jax.data.augment import luma

Array = jax.Array

LAYERS = 2
FILL = (124, 116, 104)  # of what a geometric operation leaves empty: ImageNet's mean


def rand_augment(images: Array, magnitude: float, key: Array) -> Array:
    """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3]. The magnitude of an operation is normal around `magnitude`, with standard
    deviation 0.5, and cut to 0..10."""
    drawn, normal = jax.random.split(key)
    shape = len(images), LAYERS
    uniform = jax.random.uniform(drawn, (*shape, 3))
    strength = jnp.clip(magnitude + 0.5 * jax.random.normal(normal, shape), 0, 10) / 10

    def layer(image: Array, draws: tuple[Array, Array]) -> tuple[Array, None]:
        (operation, happens, negative), strength = draws
        operation = jnp.floor(operation * len(OPERATIONS)).astype(jnp.int32)
        changed = apply(image, operation, strength, jnp.where(negative < 0.5, 1.0, -1.0))
        return jnp.where(happens < 0.5, changed, image), None

    levels = jnp.stack([images[..., channel] for channel in range(3)], axis=1).astype(jnp.float32)
    levels = jax.vmap(lambda image, *draws: jax.lax.scan(layer, image, draws)[0])(levels, uniform, strength)
    return jnp.moveaxis(levels, -3, -1).astype(jnp.uint8)


def apply(image: Array, operation: ArrayLike, strength: Array, sign: Array) -> Array:
    """The operation of this number in OPERATIONS, of a strength in 0..1 and, if it has two directions, in that of `sign`."""
    result = affine(image, matrix(operation, strength * sign, *image.shape[1:]))
    for number, function in enumerate(OPERATIONS.values()):
        if function is not None:
            result = jnp.where(operation == number, function(image, strength, sign), result)
    return result


# Geometry


def matrix(operation: ArrayLike, strength: ArrayLike, height: int, width: int) -> Array:
    """(a, b, c, d, e, f) of Pillow's affine transform: an output pixel at (x, y) is read at (a x + b y + c, d x + e y + f)."""
    kind = list(OPERATIONS)
    rotate, shear_x, shear_y, move_x, move_y = (
        jnp.where(operation == kind.index(name), strength, 0.0)
        for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    )
    angle = -math.radians(30) * rotate
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    c, f = x - cos * x - sin * y, y + sin * x - cos * y
    return jnp.stack(
        [cos, sin + 0.3 * shear_x, c + 0.45 * width * move_x, 0.3 * shear_y - sin, cos, f + 0.45 * height * move_y]
    )


def affine(image: Array, matrix: Array) -> Array:
    """Pillow's `transform` by an affine map, bicubic (a = -1), with borders repeated and FILL outside the image."""
    _, height, width = image.shape
    a, b, c, d, e, f = matrix
    y, x = jnp.mgrid[:height, :width] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)

    def taps(at: Array, size: int) -> tuple[Array, Array]:
        """The four pixels around each place along an axis, and their weights: [4, h, w]."""
        first = jnp.floor(at - 0.5)
        t = at - 0.5 - first
        weights = t * (-1 + t * (2 - t)), 1 + t * t * (t - 2), t * (1 + t * (1 - t)), t * t * (t - 1)
        pixels = jnp.clip(first.astype(jnp.int32) + np.arange(-1, 3)[:, None, None], 0, size - 1)
        return pixels, jnp.stack(weights)

    (columns, across), (rows, down) = taps(x, width), taps(y, height)
    values = image.reshape(3, -1)[:, rows[:, None] * width + columns[None]]
    made = jnp.sum(jnp.sum(values * across, axis=2) * down, axis=1)
    made = jnp.floor(jnp.clip(made + 1e-3, 0, 255))  # truncated, as in Pillow: whole numbers stay what they are
    return jnp.where(inside, made, jnp.array(FILL, jnp.float32)[:, None, None])


# Tones: functions of (image, strength, sign)


def blend(background: Callable[[Array], ArrayLike]) -> Callable[[Array, Array, Array], Array]:
    """Pillow's `ImageEnhance` with this degenerate image, and a factor in 0.1..1.9."""

    def enhanced(image: Array, strength: Array, sign: Array) -> Array:
        gray = background(image)
        return jnp.floor(jnp.clip(gray + jnp.maximum(0.1, 1 + 0.9 * sign * strength) * (image - gray), 0, 255))

    return enhanced


def smooth(image: Array) -> Array:
    """Pillow's filter SMOOTH; the border stays as it is."""
    height, width = image.shape[1:]
    wide = jnp.pad(image, ((0, 0), (1, 1), (1, 1)))
    around = sum(wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    made = jnp.floor((around + 4 * image) / 13 + 0.5)
    return image.at[:, 1:-1, 1:-1].set(made[:, 1:-1, 1:-1])


def autocontrast(image: Array, *_: Array) -> Array:
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    made = jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1) + 1e-3)
    return jnp.where(high > low, made, image)


def equalize(image: Array, *_: Array) -> Array:
    """Pillow's `ImageOps.equalize`: a table from the histogram of each channel."""

    def one(plane: Array) -> Array:
        levels = plane.reshape(-1).astype(jnp.int32)
        histogram = jnp.zeros(256, jnp.int32).at[levels].add(1)
        step = (levels.size - histogram[levels.max()]) // 255
        table = (step // 2 + jnp.cumsum(histogram) - histogram) // jnp.maximum(step, 1)
        made = jnp.clip(table, 0, 255)[levels].reshape(plane.shape).astype(plane.dtype)
        return jnp.where(step > 0, made, plane)

    return jax.vmap(one)(image)


def invert(image: Array, *_: Array) -> Array:
    return 255 - image


def posterize(image: Array, strength: Array, _: Array) -> Array:
    """The highest 4 to 0 bits."""
    unit = jnp.exp2(4 + jnp.floor(4 * strength))
    return jnp.floor(image / unit) * unit


def solarize(image: Array, strength: Array, _: Array) -> Array:
    return jnp.where(image >= 256 - jnp.floor(256 * strength), 255 - image, image)


def solarize_add(image: Array, strength: Array, _: Array) -> Array:
    return jnp.where(image < 128, jnp.minimum(image + jnp.floor(110 * strength), 255), image)


OPERATIONS: dict[str, Callable[[Array, Array, Array], Array] | None] = {  # None: by `affine`
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": None,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": blend(luma),
    "contrast": blend(lambda image: jnp.floor(jnp.mean(luma(image)) + 0.5)),
    "brightness": blend(lambda image: 0.0),
    "sharpness": blend(smooth),
    "shear_x": None,
    "shear_y": None,
    "translate_x": None,
    "translate_y": None,
}
