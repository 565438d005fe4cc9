"""K-means on the sphere, k-means of the centroids of k-means, and samples that are balanced over such a tree.

Vo et al. 2024, "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach", arXiv:2405.15613.

Rows and centroids are vectors as `neighbors.quantized` makes them. Sums of rows are whole numbers, and similarities are exact:
any division of the rows gives the same centroids, bit by bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mim_jax.curate.neighbors import UNIT, cells, nearest, quantized
from mim_jax.curate.shards import Memory, Rows, Subset

CHUNK = 2**14  # rows that are read and summed at a time
PLUS, A_CENTROID = 1024, 32  # up to so many centroids are chosen by k-means++, on so many rows for each


@dataclasses.dataclass(frozen=True)
class Clusters:
    centroids: np.ndarray  # int16 [k, D]
    nearest: np.ndarray  # int32 [N], the cluster of each row
    similarity: np.ndarray  # float32 [N], to its centroid

    @property
    def sizes(self) -> np.ndarray:
        return np.bincount(self.nearest, minlength=len(self.centroids))


def order(keys: np.ndarray, seed: int) -> np.ndarray:
    """A random order of rows, int64 [N]: by a mix of the seed with `keys`, uint64 [N], that belong to the rows. So it does not
    depend on which other rows there are, nor on a library's generator."""
    return np.argsort(mixed(keys, seed), kind="stable")


def mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Uniform uint64 from keys and a seed: the finalizer of SplitMix64 (Steele et al. 2014), twice."""
    x = np.array(keys, np.uint64)
    for add in (np.uint64(seed), np.uint64(0x9E3779B97F4A7C15)):
        x += add
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def assign(rows: Rows, centroids: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest centroids of each row, int32 [N, count], and their similarities, float32 [N, count]."""
    total, base = rows.shape[0], Memory(centroids)
    found = np.empty((total, count), np.int32), np.empty((total, count), np.float32)
    for start in range(0, total, CHUNK):
        stop = min(start + CHUNK, total)
        found[0][start:stop], found[1][start:stop] = nearest(rows.read(start, stop), base, count)
    return found


def sums(rows: Rows, labels: np.ndarray, k: int) -> np.ndarray:
    """The sum of the rows with each label, int64 [k, D]."""
    total = np.zeros((k, rows.shape[1]), np.int64)
    for start in range(0, rows.shape[0], CHUNK):
        part = labels[start : start + CHUNK]
        by = np.argsort(part, kind="stable")
        present, first = np.unique(part[by], return_index=True)
        total[present] += np.add.reduceat(rows.read(start, start + CHUNK)[by], first, axis=0, dtype=np.int64)
    return total


def first_centroids(rows: Rows, k: int, seed: int) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample; for more than PLUS centroids random rows."""
    shuffled = order(np.arange(rows.shape[0], dtype=np.uint64), seed)
    if k > PLUS:
        return rows.take(np.sort(shuffled[:k]))
    sample = rows.take(np.sort(shuffled[: A_CENTROID * k])).astype(np.float32) / UNIT
    chosen, far = [0], np.full(len(sample), np.inf, np.float32)
    while len(chosen) < k:
        far = np.minimum(far, 1 - sample @ sample[chosen[-1]])
        far[chosen[-1]] = 0
        # Of weights w the row with the smallest -log(u) / w is drawn with a probability in proportion to w.
        draws = (mixed(np.arange(len(sample), dtype=np.uint64), seed + len(chosen)) >> np.uint64(11)) / 2**53
        wait = np.full(len(sample), np.inf)
        np.divide(-np.log(draws + 2.0**-54), far, out=wait, where=far > 0)
        wait[chosen] = np.inf
        left = np.isinf(wait).all()  # fewer different rows than centroids
        chosen.append(int(np.setdiff1d(np.arange(len(sample)), chosen)[0] if left else np.argmin(wait)))
    return np.rint(sample[chosen] * UNIT).astype(np.int16)


def kmeans(
    rows: Rows,
    k: int,
    iterations: int,
    seed: int,
    begin: tuple[int, np.ndarray] | None = None,
    keep: Callable[[int, np.ndarray], Any] = lambda iteration, centroids: None,
) -> Clusters:
    """Spherical k-means by Lloyd's algorithm: at most so many iterations, fewer if nothing changes any more.

    An empty cluster gets the row that is least similar to its centroid. `keep` is called with the centroids that each iteration
    ends with; with the last of these as `begin` a run goes on as if it had not been killed. Memory holds 8 bytes a row, the
    centroids and their sums.

    Raises ValueError for fewer rows than clusters.
    """
    if rows.shape[0] < k:
        raise ValueError(f"{k:,} clusters are asked for, but there are {rows.shape[0]:,} images: ask for fewer")
    iteration, centroids = begin or (0, first_centroids(rows, k, seed))
    while True:
        near, similarity = (found[:, 0] for found in assign(rows, centroids))
        if iteration >= iterations:
            break
        total = sums(rows, near, k)
        new = np.concatenate([quantized(total[start : start + CHUNK]) for start in range(0, k, CHUNK)])
        new = np.where(new.any(axis=1, keepdims=True), new, centroids)
        empty = np.flatnonzero(np.bincount(near, minlength=k) == 0)
        if len(empty):
            new[empty] = rows.take(np.argsort(similarity, kind="stable")[: len(empty)])
        iteration, done = iteration + 1, np.array_equal(new, centroids)
        centroids = new
        keep(iteration, centroids)
        if done:
            break
    return Clusters(centroids, near, similarity)


def resampled(rows: Rows, clusters: Clusters, points: int, iterations: int, seed: int, **kept: Any) -> Clusters:
    """One round of resampling: k-means of the `points` rows of each cluster that are nearest to its centroid. The clusters of
    these are more even, as dense regions have no more of them than others. Then all rows go to the new centroids.

    `kept`: `begin` and `keep` of `kmeans`.
    """
    by = np.lexsort((-clusters.similarity, clusters.nearest))  # stable: equal ones by number
    place = np.arange(len(by)) - np.repeat(np.cumsum(clusters.sizes) - clusters.sizes, clusters.sizes)
    chosen = np.sort(by[place < points])
    k = len(clusters.centroids)
    if len(chosen) < k:
        return clusters
    centroids = kmeans(Subset(rows, chosen), k, iterations, seed, **kept).centroids
    near, similarity = (found[:, 0] for found in assign(rows, centroids))
    return Clusters(centroids, near, similarity)


Make = Callable[[dict[str, Any]], Clusters]


def hierarchy(
    rows: Rows,
    counts: Sequence[int],
    iterations: int,
    rounds: int,
    points: Sequence[int],
    seed: int,
    step: Callable[[int, int, Make], Clusters] = lambda level, number, make: make({}),
) -> list[Clusters]:
    """Hierarchical k-means: level 0 has the rows that are given, each further level the centroids of the one before.

    Args:
      counts: of clusters, from level 0 upwards.
      rounds, points: of resampling, and the rows of each cluster that a round has, level by level.
      step: (level, round, what makes it) -> the result of round 0, which is a k-means, or of a round of resampling. What makes
        it takes `begin` and `keep` of `kmeans`.
    """
    made: list[Clusters] = []
    for level, (k, each) in enumerate(zip(counts, points, strict=True)):
        below: Rows = Memory(made[-1].centroids) if made else rows
        base = seed + 1000 * level
        found = step(level, 0, functools.partial(_plain, below, k, iterations, base))
        for number in range(1, rounds + 1):
            found = step(level, number, functools.partial(_again, below, found, each, iterations, base + number))
        made.append(found)
    return made


def _plain(rows: Rows, k: int, iterations: int, seed: int, kept: dict[str, Any]) -> Clusters:
    return kmeans(rows, k, iterations, seed, **kept)


def _again(rows: Rows, before: Clusters, points: int, iterations: int, seed: int, kept: dict[str, Any]) -> Clusters:
    return resampled(rows, before, points, iterations, seed, **kept)


def entropy(sizes: np.ndarray) -> float:
    """Of the cluster of a random row, as a share of its maximum: 1 if all clusters have equally many rows."""
    share = sizes[sizes > 0] / sizes.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(sizes))) if len(sizes) > 1 else 1.0


def allotted(target: int, sizes: np.ndarray) -> np.ndarray:
    """How many of each cluster are taken, int64 [k], so that they are `target` together and as equal as the sizes allow: the
    same number of each, or all of a smaller one. What does not divide goes to the first that have more."""
    target = min(target, int(sizes.sum()))
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the largest number of each that is not too much
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= target else (low, middle - 1)
    take = np.minimum(sizes, low)
    take[np.flatnonzero(sizes > low)[: target - int(take.sum())]] += 1
    return take


def balanced(levels: Sequence[Clusters], target: int, keys: np.ndarray, seed: int) -> np.ndarray:
    """`target` rows, int64, ascending: from the top level down, the share of a cluster is allotted evenly among the clusters
    below it, and in the lowest level rows are drawn at random. `keys`, uint64 [N]: see `order`."""
    # How many rows each cluster of each level has below it.
    sizes = [levels[0].sizes]
    for upper in levels[1:]:
        sizes.append(np.bincount(upper.nearest, weights=sizes[-1], minlength=len(upper.centroids)).astype(np.int64))
    take = allotted(target, sizes[-1])
    for number in range(len(levels) - 1, 0, -1):
        below = np.zeros(len(sizes[number - 1]), np.int64)
        inside = cells(levels[number].nearest, len(take))
        for cluster in np.flatnonzero(take):
            children = inside[cluster]
            below[children] = allotted(int(take[cluster]), sizes[number - 1][children])
        take = below
    return np.sort(drawn(levels[0].nearest, take, keys, seed))


def drawn(labels: np.ndarray, take: np.ndarray, keys: np.ndarray, seed: int) -> np.ndarray:
    """So many random rows of each cluster, `take` int [k], as row numbers; in no order."""
    by = np.lexsort((mixed(keys, seed), labels))
    sizes = np.bincount(labels, minlength=len(take))
    place = np.arange(len(by)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return by[place < take[labels[by]]]
