"""RandAugment, each operation held against Pillow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mim_jax.data.rand_augment import FILL, OPERATIONS, apply, rand_augment

HEIGHT, WIDTH = 24, 32


def picture(seed=0):
    """Smooth colors with noise, which do not use all levels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 200, (4, 5, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.integers(-12, 13, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8))


def transformed(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def added(image, strength):
    return image.point([min(255, i + int(110 * strength)) if i < 128 else i for i in range(256)] * 3)


PILLOW = {
    "autocontrast": lambda image, s, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, s, sign: ImageOps.equalize(image),
    "invert": lambda image, s, sign: ImageOps.invert(image),
    "rotate": lambda image, s, sign: image.rotate(30 * s * sign, Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, s, sign: ImageOps.posterize(image, 4 - int(4 * s)),
    "solarize": lambda image, s, sign: ImageOps.solarize(image, 256 - int(256 * s)),
    "solarize_add": lambda image, s, sign: added(image, s),
    "color": lambda image, s, sign: ImageEnhance.Color(image).enhance(max(0.1, 1 + 0.9 * s * sign)),
    "contrast": lambda image, s, sign: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + 0.9 * s * sign)),
    "brightness": lambda image, s, sign: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + 0.9 * s * sign)),
    "sharpness": lambda image, s, sign: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + 0.9 * s * sign)),
    "shear_x": lambda image, s, sign: transformed(image, 1, 0.3 * s * sign, 0, 0, 1, 0),
    "shear_y": lambda image, s, sign: transformed(image, 1, 0, 0, 0.3 * s * sign, 1, 0),
    "translate_x": lambda image, s, sign: transformed(image, 1, 0, 0.45 * s * sign * WIDTH, 0, 1, 0),
    "translate_y": lambda image, s, sign: transformed(image, 1, 0, 0, 0, 1, 0.45 * s * sign * HEIGHT),
}
ours = jax.jit(apply)


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows(name):
    for seed, strength, sign in ((0, 0.9, 1), (1, 0.93, -1), (2, 0.31, 1), (3, 0.87, -1)):
        image = picture(seed)
        want = np.asarray(PILLOW[name](image, strength, sign), int)
        planes = jnp.moveaxis(jnp.asarray(np.asarray(image)), -1, 0).astype(jnp.float32)
        got = ours(planes, list(OPERATIONS).index(name), jnp.float32(strength), jnp.float32(sign))
        off = np.abs(np.moveaxis(np.asarray(got), 0, -1) - want)
        assert off.max() <= 1 and (off > 0).mean() < 0.01, (off.max(), (off > 0).mean())


def test_all_operations_are_drawn_as_often_and_half_of_them_are_done():
    image = np.asarray(picture())
    images = jnp.broadcast_to(image, (400, HEIGHT, WIDTH, 3))
    result = np.asarray(jax.jit(functools.partial(rand_augment, magnitude=9.0))(images, key=jax.random.key(0)))
    assert result.dtype == np.uint8 and result.shape == images.shape
    untouched = (result == image).all((1, 2, 3)).mean()
    assert abs(untouched - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    for name, few in (("invert", 1 / 30), ("autocontrast", 1 / 30)):  # one of the two, and the other not done
        alone = (np.abs(result - np.asarray(PILLOW[name](picture(), 0.9, 1), int)) <= 1).all((1, 2, 3)).mean()
        assert abs(alone - few) < 4 * math.sqrt(few / 400), name
    assert {len(np.unique(one)) for one in result[:8]} != {len(np.unique(image))}
