"""Whether an image is another one, a part of it, or the mirror image of either: by its pixels.

Of each image there is a sketch: SIDE x SIDE levels of gray. The sketch of one image is compared with all crops of the other
one's, of any shape and about half its area or more, and with their mirror images, by normalized cross-correlation after a
band-pass: first small sketches, then, where these resemble each other, large ones, of crops near the best one. So a crop is
found without an embedder that knows crops. It is too slow for all pairs; neighbors by vectors are the candidates.

Both sides are rounded as vectors are, see `neighbors.quantized`: their products are exact.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage  # type: ignore[import-untyped]
from PIL import Image

from mim_jax import sharding
from mim_jax.curate.neighbors import NONE, UNIT, padded, power
from mim_jax.curate.shards import Rows

SIDE = 32  # of a sketch, in pixels


class Level(NamedTuple):
    side: int  # to which sketches are reduced, in pixels
    blurs: tuple[float, float]  # standard deviations, in pixels, of the two blurs whose difference is compared


COARSE, FINE = Level(16, (0.7, 2.5)), Level(SIDE, (0.6, 3.0))
LEAST = 0.5  # area of a crop, of the whole
LENGTHS = 2  # between the lengths of coarse crops, in pixels of their sketch
STEPS = (1 / 32, 1 / 64, 1 / 128)  # by which a crop is shifted along an axis; it is made longer and shorter by twice as much
LOOSE = 0.75  # coarse correlation from which on the fine one is looked at,
BEST = 0.6  # and from which on it is for the largest of a sketch
FLAT = 0.25  # levels; an image that differs less from its blur is flat, and resembles nothing
QUERIES = 256  # that a device has in a call, at most

_product = functools.partial(jnp.einsum, precision="highest")


def sketch(image: np.ndarray) -> np.ndarray:
    """Of an image uint8 [h, w, 3]: uint8 [SIDE, SIDE]."""
    return np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def aligned(sketches: np.ndarray, base: Rows, ids: np.ndarray) -> np.ndarray:
    """The largest correlation of a crop of each sketch with the whole of others: float32 [n, k], in [-1, 1]. It is the fine one
    where the coarse one is at least LOOSE, or at least BEST and the largest of the sketch.

    Args:
      sketches: uint8 [n, SIDE, SIDE].
      base: of such sketches.
      ids: int32 [n, k], which of the base each is compared with. Where it is `neighbors.NONE` the result is -inf.
    """
    found, best = np.empty(ids.shape, np.float32), np.empty(ids.shape, np.int32)
    _compare(COARSE, (found, best), sketches, base, ids)
    found[ids == NONE] = -np.inf
    near = (found >= LOOSE) | (found >= np.maximum(found.max(axis=1, keepdims=True), BEST))
    fine = np.empty(near.sum(), np.float32)
    _compare(FINE, (fine,), sketches[np.nonzero(near)[0]], base, ids[near], best[near])
    found[near] = fine
    return found


def _compare(
    level: Level, found: Sequence[np.ndarray], sketches: np.ndarray, base: Rows, ids: np.ndarray, *more: np.ndarray
) -> None:
    """Fills `found`, of the shape of `ids`, [n, k] or [n], with what `_coarse`, or `_fine`, makes of n sketches."""
    compare, devices = _compiled(level, sharding.current_mesh()), sharding.device_count()
    rows = devices * power(-(-len(ids) // devices), 1, QUERIES)
    for start in range(0, len(ids), rows):
        part = slice(start, min(start + rows, len(ids)))
        wanted, places = np.unique(np.maximum(ids[part], 0), return_inverse=True)
        others = base.take(wanted)[places.reshape(ids[part].shape)]
        given = [sketches[part], others, *(each[part] for each in more)]
        batch = sharding.global_batch({str(i): padded(each, rows, 0) for i, each in enumerate(given)})
        for whole, made in zip(found, jax.device_get(compare(*batch.values())), strict=True):
            whole[part] = made[: len(ids[part])]


def coarse_parts() -> np.ndarray:
    """Of one axis, rows or columns, the parts that coarse crops have: start and length as shares of it, float64 [P, 2]. They
    begin and end between pixels of the small sketch. The last is the whole."""
    side = COARSE.side
    lengths = range(round(LEAST * side), side + 1, LENGTHS)
    return np.array([(start, length) for length in lengths for start in range(side - length + 1)]) / side


def coarse_crops() -> tuple[np.ndarray, np.ndarray]:
    """Of each coarse crop the numbers of its parts of the rows and of the columns: int [V] each. The last is the whole."""
    lengths = coarse_parts()[:, 1]
    rows, columns = np.nonzero(lengths[:, None] * lengths >= LEAST)
    return rows, columns


def cuts(level: Level, parts: Any) -> jax.Array:
    """Matrices of one axis, float32 [2, P, side, side], of parts [P, 2] of it: each cuts one out, enlarges it to the side
    (bilinear) and blurs it, by either blur."""
    side = level.side
    blurred = [scipy.ndimage.gaussian_filter1d(np.eye(side), blur, axis=0, mode="nearest") for blur in level.blurs]
    start, length = jnp.split(jnp.asarray(parts, jnp.float32), 2, axis=1)
    at = jnp.clip(start * side + (np.arange(side) + 0.5) * length - 0.5, 0, side - 1)
    cut = jnp.maximum(0, 1 - jnp.abs(at[:, :, None] - np.arange(side)))
    return _product("grt,ptu->gpru", np.array(blurred, np.float32), cut)


def _near(part: jax.Array, step: float) -> jax.Array:
    """A part, float32 [2], and those near it: longer, shorter and shifted ones, [9, 2]."""
    by = np.array([-step, 0, step], np.float32)
    length = jnp.minimum(part[1] + 2 * by[:, None], 1)
    start = jnp.clip(part[0] + part[1] / 2 + by - length / 2, 0, 1 - length)
    return jnp.stack(jnp.broadcast_arrays(start, length), axis=-1).reshape(-1, 2)


def _unit(x: jax.Array) -> jax.Array:
    """Images [..., side, side] after a band-pass, of mean zero and unit length, as multiples of 1/UNIT: [..., side**2]."""
    x = (x - x.mean(axis=(-2, -1), keepdims=True)).reshape(*x.shape[:-2], -1)
    length = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
    flat = FLAT * x.shape[-1] ** 0.5
    return jnp.where(length > flat, jnp.round(x * (UNIT / jnp.maximum(length, flat))) / UNIT, 0)


def _banded(rows: jax.Array, columns: jax.Array, sketch: jax.Array) -> jax.Array:
    """Crops of a sketch after the band-pass, float32 [U, V, side, side]: of all these parts of its rows, [2, U, side, side] of
    `cuts`, and of its columns, [2, V, side, side]."""
    side = rows.shape[-1]
    small = sketch.astype(jnp.float32).reshape(side, SIDE // side, side, SIDE // side).mean(axis=(1, 3))
    return jnp.subtract(*(_product("urs,st,vct->uvrc", rows[g], small, columns[g]) for g in (0, 1)))


def _coarse(query: jax.Array, others: jax.Array) -> tuple[jax.Array, ...]:
    """Of a sketch and k others: the largest correlations, float32 [k], and the numbers of the crops, int32 [k], plus V where it
    is the mirror image that resembles the crop."""
    every, side = cuts(COARSE, coarse_parts()), COARSE.side
    crops = _unit(_banded(every, every, query)[coarse_crops()])
    whole = _unit(jax.vmap(functools.partial(_banded, every[:, -1:], every[:, -1:]))(others)[:, 0, 0])
    mirrored = whole.reshape(-1, side, side)[..., ::-1].reshape(whole.shape)
    found = jnp.concatenate([_product("kp,vp->kv", each, crops) for each in (whole, mirrored)], axis=1)
    return found.max(axis=1), found.argmax(axis=1).astype(jnp.int32)


def _fine(query: jax.Array, other: jax.Array, best: jax.Array) -> tuple[jax.Array, ...]:
    """Of two sketches, and the number of the best coarse crop: the correlation of the best crop near that one. Its columns and
    its rows are moved by turns, by smaller and smaller steps."""
    parts, (first, second) = jnp.asarray(coarse_parts(), jnp.float32), (jnp.asarray(each) for each in coarse_crops())
    number, whole = best % len(first), cuts(FINE, parts[-1:])
    other = _unit(_banded(whole, whole, jnp.where(best < len(first), other, other[:, ::-1])))[0, 0]
    crop, found = [parts[first[number]], parts[second[number]]], jnp.zeros(1)
    for step in STEPS:
        for axis in (1, 0):
            tried = _near(crop[axis], step)
            rows, columns = (cuts(FINE, tried if i == axis else crop[i][None]) for i in (0, 1))
            found = _product("vp,p->v", _unit(_banded(rows, columns, query)).reshape(len(tried), -1), other)
            crop[axis] = tried[found.argmax()]
    return (found.max(),)


@functools.cache
def _compiled(level: Level, mesh: Any) -> Any:
    """`_coarse`, or `_fine`, of n sketches; each device has its part of them."""
    compare: Callable[..., tuple[jax.Array, ...]] = _coarse if level == COARSE else _fine

    def run(*given: jax.Array) -> tuple[jax.Array, ...]:
        return jax.lax.map(lambda each: compare(*each), given)

    if mesh is None:
        return jax.jit(run)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH, check_vma=False))
