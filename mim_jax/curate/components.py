"""Connected components of a graph whose edges come in any order. The label of a component is its smallest member."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # from, to int32 [E], similarity float32 [E]


class Component(NamedTuple):
    label: int
    size: int
    density: float  # edges over those that k neighbors of each member could make


def join(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Union-find over many edges at once: `parent`, int32 [N] with parent[i] <= i, is changed in place. A root is the smallest
    of its tree."""
    while len(first):
        first, second = roots(parent, first), roots(parent, second)
        apart = first != second
        first, second = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
        np.minimum.at(parent, second, first)


def roots(parent: np.ndarray, ids: np.ndarray) -> np.ndarray:
    while True:
        above = parent[ids]
        if (above == ids).all():
            return ids
        ids = above


def components(count: int, edges: Iterable[Edges]) -> np.ndarray:
    """The label of each of `count` nodes, int32 [count]. Memory holds 8 bytes a node and the edges of one item."""
    parent = np.arange(count, dtype=np.int32)
    for first, second, _ in edges:
        join(parent, first, second)
        parent = roots(parent, parent)  # flat again: the next edges find their roots at once
    return parent


def above(edges: Iterable[Edges], threshold: float) -> Iterator[Edges]:
    """The edges of at least this similarity."""
    for first, second, similarity in edges:
        good = similarity >= threshold
        yield first[good], second[good], similarity[good]


def largest(labels: np.ndarray, edges: Iterable[Edges], k: int, least: int) -> list[Component]:
    """The components of at least so many members, the largest first. `edges`: those that made them, directed, at most `k` from
    each node."""
    sizes = np.bincount(labels, minlength=len(labels))
    inside = np.zeros(len(labels), np.int64)
    for first, _, _ in edges:
        np.add.at(inside, labels[first], 1)
    found = [
        Component(int(label), int(sizes[label]), float(inside[label] / (sizes[label] * min(k, sizes[label] - 1))))
        for label in np.flatnonzero(sizes >= max(least, 2))
    ]
    return sorted(found, key=lambda each: (-each.size, each.label))


ROUNDS = 8  # of cutting; each halves the distance to 1


def cut(
    labels: np.ndarray, edges: Callable[[], Iterable[Edges]], threshold: float, k: int, least: int, density: float
) -> np.ndarray:
    """The labels after components of at least `least` members whose density is below `density` are cut: their edges must be
    more and more similar until none is left. Chains of images that hardly resemble each other break, groups of copies do not.
    """
    opened = np.ones(len(labels), bool)
    for _ in range(ROUNDS):
        found = largest(labels, above(edges(), threshold), k, least)
        sparse = [each.label for each in found if each.density < density and opened[each.label]]
        if not sparse:
            break
        threshold = (threshold + 1) / 2
        opened = np.isin(labels, sparse)
        parent = np.where(opened, np.arange(len(labels)), labels).astype(np.int32)
        for first, second, _ in above(edges(), threshold):
            inside = opened[first] & opened[second]
            join(parent, first[inside], second[inside])
            parent = roots(parent, parent)
        labels = parent
    return labels


# By rounds of stars, for graphs whose edges lie on many machines: Kiveris et al. 2014, "Connected Components in MapReduce and
# Beyond". An edge is an int64, node * 2**32 + neighbor; a sorted array has the edges of a node side by side.


def packed(edges: Iterable[Edges]) -> np.ndarray:
    """Each edge once, from the larger node to the smaller one."""
    found = [_pack(np.maximum(first, second), np.minimum(first, second)) for first, second, _ in edges]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def both_ways(edges: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([edges, _pack(*_unpack(edges)[::-1])]))


def large_star(edges: np.ndarray) -> np.ndarray:
    """Of nodes with all their neighbors, sorted: each larger neighbor is joined to the smallest node that its node knows, which
    may be itself. Of the larger end's side."""
    node, other, least = _least(edges)
    larger = other > node
    return _pack(other[larger], least[larger])


def small_star(edges: np.ndarray) -> np.ndarray:
    """Of nodes with all their smaller neighbors, sorted: these and the node are joined to the smallest one."""
    node, other, least = _least(edges)
    rest = other > least
    return np.concatenate([_pack(node, least), _pack(other[rest], least[rest])])


def labels(count: int, stars: np.ndarray) -> np.ndarray:
    """The label of each node, from edges to the smallest of its component."""
    result = np.arange(count, dtype=np.int32)
    node, least = _unpack(stars)
    result[node] = least
    return result


def _pack(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.astype(np.int64) << 32 | second


def _unpack(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return edges >> 32, edges & 0xFFFFFFFF


def _least(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, neighbors, and for each edge the smallest of its node and that one's neighbors."""
    node, other = _unpack(edges)
    first = np.flatnonzero(np.diff(node, prepend=-1))
    return node, other, np.minimum(node, np.repeat(other[first], np.diff(first, append=len(node))))
