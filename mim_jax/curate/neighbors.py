"""Nearest rows by cosine, as products of blocks on all devices: exact, or within the cells of a k-means.

All similarities are exact, see `quantized`; equal ones are ordered by the number of the row. So results do not depend on
blocks, shards or devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mim_jax import sharding
from mim_jax.curate.shards import Memory, Rows

UNIT = 2048
QUERIES = {"cpu": 1024}  # of a product on a device; others than CPUs have 8192
BLOCK = 8192  # rows that they are multiplied with
NONE = -1  # the number of a neighbor that is not there; its similarity is -inf


class Nearest(NamedTuple):
    """The k nearest of each query, the nearest first."""

    ids: np.ndarray  # int32 [n, k]
    similarity: np.ndarray  # float32 [n, k]


def quantized(features: np.ndarray) -> np.ndarray:
    """Features [N, D] scaled to unit length and rounded to multiples of 1/2048, as int16 [N, D] of these.

    A similarity is changed by about 2e-4 (a standard deviation). In return it is exact: products are multiples of 2**-22, and
    partial sums are below 2, so float32 holds them; and the 11 bits of a coordinate fit those of TF32. Rows that are zero or
    not finite become zero.
    """
    features = np.asarray(features, np.float64)
    length = np.sqrt(np.einsum("nd,nd->n", features, features))
    good = np.isfinite(length) & (length > 0)
    scaled = np.where(good, UNIT / np.where(good, length, 1), 0)[:, None] * np.where(good[:, None], features, 0)
    return np.rint(scaled).astype(np.int16)


def nearest(
    queries: np.ndarray,
    base: Rows,
    k: int,
    own: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    begin: Nearest | None = None,
) -> Nearest:
    """The k nearest rows of `base` for each of `queries`, both int16 as `quantized` makes them.

    Args:
      own: int32 [n], the numbers of the queries in the base, which are not their own neighbors.
      ids: int32, the numbers of the rows of `base`, ascending; by default they count from 0.
      begin: the nearest of other rows, which are ahead of equal ones.

    Memory holds the products of two blocks for each device of the mesh, on a CPU 32 MB, besides queries and result.
    """
    count, devices = len(queries), sharding.device_count()
    own = np.full(count, NONE - 1, np.int32) if own is None else own.astype(np.int32)
    found = Nearest(np.empty((count, k), np.int32), np.empty((count, k), np.float32))
    merge = _merge(sharding.current_mesh(), k)
    # Powers of two, so that few programs are compiled; small ones for small data.
    rows = devices * power(-(-count // devices), 32, QUERIES.get(sharding.platform(), 8192))
    block = power(base.shape[0], 256, BLOCK)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        best: Any = (np.full((rows, k), -np.inf, np.float32), np.full((rows, k), NONE, np.int32))
        if begin:
            best = padded(begin.similarity[start:stop], rows, 0), padded(begin.ids[start:stop], rows, NONE)
        these = sharding.global_batch(
            {"query": padded(queries[start:stop], rows, 0), "own": padded(own[start:stop], rows, NONE - 1)}
        )
        for first in range(0, base.shape[0], block):
            last = min(first + block, base.shape[0])
            numbers = np.arange(first, last, dtype=np.int32) if ids is None else ids[first:last].astype(np.int32)
            rest = padded(base.read(first, last), block, 0), padded(numbers, block, NONE)
            best = merge(*best, these["query"], these["own"], *rest)
        similarity, numbers = jax.device_get(best)
        found.ids[start:stop], found.similarity[start:stop] = numbers[: stop - start], similarity[: stop - start]
    return found


def power(count: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << max(count - 1, 0).bit_length()))


def padded(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full((rows - len(array), *array.shape[1:]), value, array.dtype)])


@functools.cache
def _merge(mesh: Any, k: int) -> Any:
    """The k best of those so far and of a block, compiled; each device has its part of the queries and the whole block."""

    def run(similarity: Any, ids: Any, queries: Any, own: Any, block: Any, numbers: Any) -> tuple[jax.Array, jax.Array]:
        def unit(x: jax.Array) -> jax.Array:
            return x.astype(jnp.float32) / UNIT

        new = jax.lax.dot_general(unit(queries), unit(block), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        new = jnp.where((numbers == NONE) | (numbers == own[:, None]), -jnp.inf, new)
        # Of equal values top_k takes the first, and the blocks come in ascending order.
        best, at = jax.lax.top_k(jnp.concatenate([similarity, new], axis=1), k)
        before = jnp.take_along_axis(ids, jnp.minimum(at, k - 1), axis=1)
        ids = jnp.where(at < k, before, numbers[jnp.maximum(at - k, 0)])
        return best, jnp.where(best > -jnp.inf, ids, NONE)

    if mesh is None:
        return jax.jit(run)
    batch = (sharding.BATCH,) * 2
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=batch * 2 + (P(), P()), out_specs=batch, check_vma=False))


@dataclasses.dataclass(frozen=True)
class Cells:
    """Rows by the cell that they are in."""

    members: np.ndarray  # int32 [N], ordered by cell, then number
    at: np.ndarray  # int64 [cells + 1], where each cell begins in it

    def __getitem__(self, cell: int | np.integer) -> np.ndarray:
        """The rows in a cell, ascending."""
        return self.members[self.at[cell] : self.at[cell + 1]]


def cells(nearest_cell: np.ndarray, count: int) -> Cells:
    """From the cell of each row, int32 [N]; there are `count` cells."""
    members = np.argsort(nearest_cell, kind="stable").astype(np.int32)
    return Cells(members, np.concatenate([[0], np.cumsum(np.bincount(nearest_cell, minlength=count))]))


def within_cells(rows: Rows, found: Cells, own: np.ndarray, probed: np.ndarray, k: int) -> tuple[Nearest, int]:
    """The k nearest of the rows `own`, int32 [n], among those in the cells that are `probed` for each, int32 [n, probes]; and
    how many products that took.

    A function of each row and the cells, not of which rows are asked for at a time.
    """
    queries = rows.take(own)
    best = Nearest(np.full((len(own), k), NONE, np.int32), np.full((len(own), k), -np.inf, np.float32))
    asking = cells(probed.reshape(-1), len(found.at) - 1)
    sizes, times = np.diff(found.at), np.diff(asking.at)
    for cell in np.flatnonzero((sizes > 0) & (times > 0)):
        members, who = found[cell], asking[cell] // probed.shape[1]
        begin = Nearest(best.ids[who], best.similarity[who])
        best.ids[who], best.similarity[who] = nearest(
            queries[who], Memory(rows.take(members)), k, own=own[who], ids=members, begin=begin
        )
    order = np.lexsort((best.ids, -best.similarity))  # cells are not in the order of the rows
    products = int((times * sizes).sum())
    return Nearest(*(np.take_along_axis(each, order, axis=1) for each in best)), products


def recall(rows: Rows, queries: np.ndarray, found: np.ndarray, k: int) -> float:
    """The share of the exact k nearest of the rows `queries` that is in `found`, int32 [n, k]."""
    return overlap(nearest(rows.take(queries), rows, k, own=queries).ids, found)


def overlap(exact: np.ndarray, found: np.ndarray) -> float:
    """The share of the exact neighbors, int32 [n, k], that is in `found`, int [n, any]."""
    pairs = [(set(a.tolist()) - {NONE}, set(b.tolist())) for a, b in zip(exact, found)]
    return sum(len(a & b) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs))
