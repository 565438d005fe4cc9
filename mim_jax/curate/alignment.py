"""Whether an image is another one, a part of it, or the mirror image of either: by its pixels.

Of each image there is a sketch: SIDE x SIDE levels of gray. The sketch of one image is compared with all crops of the other
one's, from 0.7 of its side on, and with their mirror images, by normalized cross-correlation after a band-pass: first small
sketches, then, where these resemble each other, large ones. So a crop is found without an embedder that knows crops. It is too
slow for all pairs; neighbors by vectors are the candidates.

Both sides are rounded as vectors are, see `neighbors.quantized`: their products are exact.
"""

import functools
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
    scales: int  # of crops, from 0.7 of the side to the whole
    step: float  # between neighboring crops, at most, in pixels
    blurs: tuple[float, float]  # standard deviations, in pixels, of the two blurs whose difference is compared


COARSE, FINE = Level(16, 6, 0.75, (0, 1.5)), Level(SIDE, 10, 1.0, (0.6, 3.0))
LEAST = 0.7  # side of a crop, of the whole
LOOSE = 0.6  # coarse correlation from which on the fine one is looked at
FLAT = 0.25  # levels; an image that differs less from its blur is flat, and resembles nothing
QUERIES = 256  # that a device has in a call, at most
SLOTS = 4  # pairs of one query in a row of the fine level


def sketch(image: np.ndarray) -> np.ndarray:
    """Of an image uint8 [h, w, 3]: uint8 [SIDE, SIDE]."""
    return np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def aligned(sketches: np.ndarray, base: Rows, ids: np.ndarray) -> np.ndarray:
    """The largest correlation of a crop of each sketch with the whole of others: float32 [n, k], in [-1, 1]. It is the fine one
    where the coarse one is at least LOOSE.

    Args:
      sketches: uint8 [n, SIDE, SIDE].
      base: of such sketches.
      ids: int32 [n, k], which of the base each is compared with. Where it is `neighbors.NONE` the result is -inf.
    """
    found = np.where(ids == NONE, -np.inf, _compared(COARSE, sketches, base, ids))
    query, place = np.nonzero(found >= LOOSE)
    # Rows of SLOTS pairs, all of one query: pair number i of a query is in the row i // SLOTS of it.
    number = np.arange(len(query)) - np.searchsorted(query, query)
    row = np.cumsum(number % SLOTS == 0) - 1
    some = np.full((row[-1] + 1 if len(row) else 0, SLOTS), NONE, np.int32)
    some[row, number % SLOTS] = ids[query, place]
    fine = _compared(FINE, sketches[query[number % SLOTS == 0]], base, some)
    found[query, place] = fine[row, number % SLOTS]
    return found.astype(np.float32)


def _compared(level: Level, sketches: np.ndarray, base: Rows, ids: np.ndarray) -> np.ndarray:
    count, k = ids.shape
    found, devices = np.empty(ids.shape, np.float32), sharding.device_count()
    compare = _compiled(level, sharding.current_mesh())
    rows = devices * power(-(-count // devices), 1, QUERIES)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        wanted, places = np.unique(np.maximum(ids[start:stop], 0), return_inverse=True)
        others = base.take(wanted)[places.reshape(-1, k)]
        batch = sharding.global_batch({"crops": padded(sketches[start:stop], rows, 0), "whole": padded(others, rows, 0)})
        found[start:stop] = jax.device_get(compare(batch["crops"], batch["whole"]))[: stop - start]
    return found


@functools.cache
def crop_matrices(level: Level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of one axis, float32 [2, U, side, SIDE]: each cuts a part out, enlarges it to the side (bilinear) and blurs it,
    by either blur. And of each crop, int [V], the matrices of its rows and of its columns; the last crop is the whole."""
    side, scales, step, blurs = level
    smaller = np.repeat(np.eye(side), SIDE // side, axis=1) * side / SIDE
    cuts, first, second = list[np.ndarray](), list[int](), list[int]()
    for scale in np.linspace(LEAST, 1, scales):
        room = (1 - scale) * side
        starts = np.linspace(0, room, int(room / step + 1e-6) + 1)
        here = range(len(cuts), len(cuts) + len(starts))
        for start in starts:
            at = np.clip(start + (np.arange(side) + 0.5) * scale - 0.5, 0, side - 1)
            cuts.append(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side))) @ smaller)
        first += [i for i in here for _ in here]
        second += [i for _ in here for i in here]
    blurred = [scipy.ndimage.gaussian_filter1d(cuts, blur, axis=1, mode="nearest") if blur else cuts for blur in blurs]
    return np.array(blurred, np.float32), np.array(first), np.array(second)


def _unit(x: jax.Array) -> jax.Array:
    """Images [..., side, side] after a band-pass, of mean zero and unit length, as multiples of 1/UNIT: [..., side**2]."""
    x = (x - x.mean(axis=(-2, -1), keepdims=True)).reshape(*x.shape[:-2], -1)
    length = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
    flat = FLAT * x.shape[-1] ** 0.5
    return jnp.where(length > flat, jnp.round(x * (UNIT / jnp.maximum(length, flat))) / UNIT, 0)


@functools.cache
def _compiled(level: Level, mesh: Any) -> Any:
    """uint8 [n, SIDE, SIDE] and [n, k, SIDE, SIDE] to float32 [n, k]; each device has its part of the n."""
    cuts, first, second = crop_matrices(level)
    product = functools.partial(jnp.einsum, precision="highest")

    def one(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, others = (each.astype(jnp.float32) for each in x)
        rows = product("gurs,st->gurt", cuts, query)
        crops = jnp.subtract(*(product("vrt,vct->vrc", rows[g, first], cuts[g, second]) for g in (0, 1)))
        whole = jnp.subtract(*(product("rs,kst,ct->krc", cuts[g, -1], others, cuts[g, -1]) for g in (0, 1)))
        either = _unit(jnp.concatenate([crops, crops[..., ::-1]]))
        return product("vp,kp->vk", either, _unit(whole)).max(axis=0)

    def run(queries: jax.Array, others: jax.Array) -> jax.Array:
        return jax.lax.map(one, (queries, others))

    if mesh is None:
        return jax.jit(run)
    batch = sharding.BATCH
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(batch, batch), out_specs=batch, check_vma=False))
