"""The threshold from which on two images are one: the lowest that is precise for images and copies of them."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mim_jax.curate import neighbors
from mim_jax.curate.alignment import aligned
from mim_jax.curate.embedders import dhash_distance
from mim_jax.curate.neighbors import nearest
from mim_jax.curate.shards import Rows

CALIBRATED = 1024  # images whose copies are compared with all others at a time
DHASH = 12  # bits of 64; images whose hashes differ by no more may be copies without our doing: where vectors decide
AGREE = 0.9  # where pixels decide, images of this similarity may be,
LOOKED_AT = 0.75  # which is looked at where an image and the copy of the other one have this similarity
ALIKE = (
    "the images that a threshold would be calibrated with look so much alike that copies cannot be told from others: give "
    "dedup.threshold"
)


class Known(NamedTuple):
    """What is known of some images."""

    digest: str
    vectors: Rows  # int16 [N, D]
    sketches: Rows  # uint8 [N, SIDE, SIDE], see `alignment`

    def __len__(self) -> int:
        return self.vectors.shape[0]


class Pairs(NamedTuple):
    """How similar pairs of n images and n copies of them are."""

    own: np.ndarray  # float32 [n], of an image and its copy
    others: Iterable[np.ndarray]  # float32, of an image and the copy of another one, in parts
    alike: int = 0  # pairs of images that are left out as they are similar by pixels


def by_vectors(images: Known, copies: Known, dhash: np.ndarray) -> Pairs:
    """All pairs, but those of images whose dHashes, uint64 [n], nearly agree, also mirrored. Raises ValueError if most do."""
    alike = dhash_distance(dhash[:CALIBRATED, None], dhash) <= DHASH
    if alike.sum() - len(alike) > alike.size / 2:
        raise ValueError(ALIKE)
    ours, theirs = (each.vectors.read(0, len(each)).astype(np.float32) / neighbors.UNIT for each in (images, copies))

    def others() -> Iterator[np.ndarray]:
        for start in range(0, len(ours), CALIBRATED):
            part = slice(start, start + CALIBRATED)
            yield (theirs[part] @ ours.T)[dhash_distance(dhash[part, None], dhash) > DHASH]  # so not an image and itself

    return Pairs(np.einsum("nd,nd->n", ours, theirs), others())  # exact, in any order


def by_pixels(images: Known, copies: Known, pool: Rows, k: int) -> Pairs:
    """The pairs of which one is among the k nearest of the other one, by vectors. An image and its copy are such a pair if they
    are as near as the k nearest in the pool are. Pairs of others whose images are similar themselves are left out: they may be
    copies without our doing. Raises ValueError if most are."""
    count = len(images)
    numbers = np.arange(count, dtype=np.int32)
    own, found = np.full(count, -np.inf, np.float32), []
    for one, other in ((images, copies), (copies, images)):
        vectors, sketches = one.vectors.read(0, count), one.sketches.read(0, count)
        products = np.einsum("nd,nd->n", vectors.astype(np.int64), other.vectors.read(0, count).astype(np.int64))
        near = products / neighbors.UNIT**2 >= nearest(vectors, pool, k).similarity[:, -1]
        own[near] = np.maximum(own, aligned(sketches, other.sketches, numbers[:, None])[:, 0])[near]
        ids = nearest(vectors, other.vectors, min(k, count - 1), own=numbers).ids
        first = np.broadcast_to(numbers[:, None], ids.shape)
        image, copy = (first, ids) if one is images else (ids, first)
        found.append((image.astype(np.int64) * count + copy, aligned(sketches, other.sketches, ids)))
    pair, similarity = (np.concatenate([each.ravel() for each in both]) for both in zip(*found))
    best = np.lexsort((-similarity, pair))  # of a pair that was compared both ways the larger one
    best = best[np.diff(pair[best], prepend=-1) > 0]
    image, copy = np.divmod(pair[best], count)
    similarity, left = similarity[best], np.ones(len(best), bool)
    seen = np.flatnonzero(similarity >= LOOKED_AT)
    sketches, pairs = images.sketches.read(0, count), (image[seen], copy[seen])
    alike = [aligned(sketches[a], images.sketches, b.astype(np.int32)[:, None])[:, 0] for a, b in (pairs, pairs[::-1])]
    left[seen] = np.maximum(*alike) < AGREE
    if left.mean() < 0.5:
        raise ValueError(ALIKE)
    doubted = {(min(pair), max(pair)) for pair in zip(image[~left].tolist(), copy[~left].tolist())}
    return Pairs(own, [similarity[left]], len(doubted))


@dataclasses.dataclass(frozen=True)
class Curve:
    """What each threshold finds. `share` of edges that join an image and its copy, by the side of all edges: precision."""

    thresholds: np.ndarray  # ascending
    precision: np.ndarray
    recall: np.ndarray
    by_kind: dict[str, np.ndarray]  # recall

    def lowest(self, precision: float) -> int:
        """The place of the lowest threshold from which on the precision is at least so much. Raises ValueError if there is
        none."""
        bad = np.flatnonzero(self.precision < precision)
        place = int(bad[-1]) + 1 if len(bad) else 0
        if place == len(self.thresholds) or not self.recall[place]:
            raise ValueError(
                f"no threshold has a precision of {precision:g}: other images are as similar as copies. Give "
                "dedup.threshold, lower calibrate.precision, or take another embedder"
            )
        return place


def curve(pairs: Pairs, kinds: Sequence[str], factor: float, least: float = 0.0) -> Curve:
    """What each threshold, from `least` on, finds of copies of these kinds, if pairs of others are `factor` times as many
    beside them as here."""
    own, thresholds = pairs.own, np.round(np.arange(least, 1.0, 0.005), 3)
    true = np.array([(own >= t).sum() for t in thresholds])
    inside = sum((np.histogram(part, [*thresholds, np.inf])[0] for part in pairs.others), np.zeros(len(thresholds), np.int64))
    false = np.cumsum(inside[::-1])[::-1] * factor
    by = {
        kind: np.array([(own[[each == kind for each in kinds]] >= t).mean() for t in thresholds])
        for kind in dict.fromkeys(kinds)
    }
    precision = np.where(true + false > 0, true / np.maximum(true + false, 1), 1.0)
    return Curve(thresholds, precision, true / max(1, len(own)), by)
