"""Curation: its algorithms against brute force, and the whole command: any division of the work, kills, bad input."""

import functools
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
from pictures import encode

from mim_jax import load_config
from mim_jax.curate import __main__ as command
from mim_jax.curate import alignment, calibration, clusters, components, neighbors, plants, shards, stages
from mim_jax.curate.alignment import aligned
from mim_jax.curate.calibration import Known, Pairs
from mim_jax.curate.clusters import kmeans
from mim_jax.curate.embedders import Network, Pixels, dhash, dhash_distance
from mim_jax.curate.neighbors import nearest, quantized
from mim_jax.curate.shards import Made, Memory, Subset, stage, threads
from mim_jax.data.sources import ArraySource, open_source, sample
from mim_jax.methods.base import Encoder
from mim_jax.models import vit
from mim_jax.pretrained import Model
from mim_jax.sharding import make_mesh

pytest.importorskip("pyarrow")
ROOT = Path(__file__).parent.parent


def vectors(count, dims=12, seed=0, centers=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dims))
    if centers is not None:
        x = 0.3 * x + rng.normal(size=(len(centers), dims)).repeat(centers, axis=0) * 2
    return quantized(x)


def brute(queries, base, k, own=None):
    """Numbers and similarities in whole units of 2**-22, by (similarity, number)."""
    products = queries.astype(np.int64) @ base.T.astype(np.int64)
    if own is not None:
        products[np.arange(len(queries)), own] = -(2**40)
    by = np.lexsort((np.broadcast_to(np.arange(len(base)), products.shape), -products))[:, :k]
    return by, np.take_along_axis(products, by, axis=1)


# Neighbors


def test_vectors_have_unit_length_and_exact_products():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 384))
    rounded = quantized(np.concatenate([x, [np.zeros(384)], [np.full(384, np.nan)]]))
    assert rounded.dtype == np.int16 and not rounded[50:].any()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(rounded[:50] / 2048, unit, atol=0.51 / 2048)
    floats = rounded.astype(np.float32) / 2048
    want = rounded.astype(np.int64) @ rounded.T.astype(np.int64) / 2**22
    for _ in range(3):
        order = rng.permutation(384)
        assert np.array_equal(floats[:, order] @ floats[:, order].T, want)
    np.testing.assert_allclose(want[:50, :50], unit @ unit.T, atol=2e-3)


@pytest.mark.parametrize(("devices", "block", "queries"), [(1, 8192, 1024), (8, 16, 4), (2, 64, 8)])
def test_neighbors_are_those_of_brute_force_in_any_blocks(monkeypatch, devices, block, queries):
    x = vectors(100, 5)  # of few dimensions, so that some are equally near
    x[60:70] = x[3]
    monkeypatch.setattr(neighbors, "BLOCK", block)
    monkeypatch.setattr(neighbors, "QUERIES", {"cpu": queries})
    ids, products = brute(x, x, 7, np.arange(100))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
        found = nearest(x, Memory(x), 7, own=np.arange(100))
    assert np.array_equal(found.ids, ids) and np.array_equal(found.similarity, products / 2**22)


def test_fewer_rows_than_neighbors():
    x = vectors(3)
    found = nearest(x, Memory(x), 4, own=np.arange(3))
    assert (found.ids[:, 2:] == neighbors.NONE).all() and np.isinf(found.similarity[:, 2:]).all()
    assert sorted(found.ids[0, :2].tolist()) == [1, 2]


@pytest.mark.peers
def test_neighbors_are_those_of_faiss():
    faiss, x = pytest.importorskip("faiss"), vectors(3000, 64, centers=[300] * 10)
    index = faiss.IndexFlatIP(64)
    index.add(x.astype(np.float32) / 2048)
    similarity, ids = index.search(x.astype(np.float32) / 2048, 21)
    other = ids != np.arange(3000)[:, None]
    assert (other.sum(axis=1) == 20).all()
    found = nearest(x, Memory(x), 20, own=np.arange(3000))
    assert np.array_equal(found.similarity, similarity[other].reshape(3000, 20))
    assert (found.ids == ids[other].reshape(3000, 20)).mean() > 0.99  # equal ones it has in another order


def test_cells_find_what_is_near():
    x, k, count = vectors(400, 8, centers=[100] * 4), 5, np.arange(400, dtype=np.int32)
    found = kmeans(Memory(x), 16, 10, seed=0)
    probed, _ = clusters.assign(Memory(x), found.centroids, 6)
    cells = neighbors.cells(found.nearest, 16)
    near, products = neighbors.within_cells(Memory(x), cells, count, probed, k)
    for query in range(0, 400, 7):
        there = np.flatnonzero(np.isin(found.nearest, probed[query]) & (count != query))
        assert np.array_equal(near.ids[query], there[brute(x[[query]], x[there], k)[0][0]])
    some = np.array([3, 399, 17], np.int32)
    part, _ = neighbors.within_cells(Memory(x), cells, some, probed[some], k)
    assert np.array_equal(part.ids, near.ids[some])
    recall = neighbors.recall(Memory(x), count, near.ids, k)
    exact = brute(x, x, k, count)[0]
    assert recall == np.mean([len(set(a) & set(b)) / k for a, b in zip(exact.tolist(), near.ids.tolist())])
    assert recall > 0.95 and products == found.sizes[probed].sum() < 400 * 400 * 0.6


# Alignment


def textured(seed):
    """Like a photograph: the lower the frequency, the stronger it is."""
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(3, 48, 48)))
    image = np.fft.ifft2(noise / (0.02 + np.hypot(*np.meshgrid(np.fft.fftfreq(48), np.fft.fftfreq(48)))) ** 1.5).real
    return np.clip(128 + 50 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def sketches(images):
    return np.stack([alignment.sketch(image) for image in images])


def correlation(level, sketch, crop, other):
    """Of the crop, whose rows and columns begin at and have so much of the sketch, with the whole of another one."""
    side = level.side
    at = [start * side + (np.arange(side) + 0.5) * length - 0.5 for start, length in crop]
    one, two = (each.reshape(side, 32 // side, side, 32 // side).mean(axis=(1, 3)) for each in (sketch, other))
    one = scipy.ndimage.map_coordinates(one, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    bands = []
    for image in (one, two):
        small, large = (scipy.ndimage.gaussian_filter(image, blur, mode="nearest") for blur in level.blurs)
        bands.append((small - large).ravel())
    return np.corrcoef(*bands)[0, 1]


def test_coarse_alignment_is_the_best_correlation_of_all_crops():
    one, other = sketches(map(textured, range(2))), sketches(map(textured, range(2, 4)))
    parts = [(start / 16, length / 16) for length in (8, 10, 12, 14, 16) for start in range(17 - length)]
    crops = [crop for crop in itertools.product(parts, parts) if crop[0][1] * crop[1][1] >= 0.5]
    assert len(crops) > 100
    best = np.array([[max(correlation(alignment.COARSE, a, crop, turned) for crop in crops for turned in (b, b[:, ::-1]))
                      for b in other] for a in one])  # fmt: skip
    found, which = np.empty((2, 2), np.float32), np.empty((2, 2), np.int32)
    alignment._compare(alignment.COARSE, (found, which), one, Memory(other), np.tile(np.arange(2, dtype=np.int32), (2, 1)))
    np.testing.assert_allclose(found, best, atol=2e-3)
    for i, j in itertools.product(range(2), range(2)):
        mirrored, number = divmod(which[i, j], len(crops))
        turned = other[j][:, ::-1] if mirrored else other[j]
        np.testing.assert_allclose(correlation(alignment.COARSE, one[i], crops[number], turned), best[i, j], atol=2e-3)


@pytest.mark.parametrize("mirrored", [False, True])
def test_fine_alignment_finds_the_best_crop_near_the_coarse_one(mirrored):
    sketch = sketches([textured(0)])[0]
    rows, columns = (0.21, 0.61), (0.03, 0.93)  # starts and lengths, between those that are tried
    at = [start * 32 + (np.arange(32) + 0.5) * length - 0.5 for start, length in (rows, columns)]
    part = scipy.ndimage.map_coordinates(sketch.astype(float), np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    part = np.round(part[:, ::-1] if mirrored else part).astype(np.uint8)[None]
    ids, found, best = np.zeros((1, 1), np.int32), np.empty((1, 1), np.float32), np.empty((1, 1), np.int32)
    alignment._compare(alignment.COARSE, (found, best), sketch[None], Memory(part), ids)
    assert best[0, 0] // len(alignment.coarse_crops()[0]) == mirrored
    tried = itertools.product(np.arange(0.15, 0.28, 0.01), np.arange(0.55, 0.68, 0.01), np.arange(0, 0.07, 0.01))
    turned = part[0][:, ::-1] if mirrored else part[0]
    most = max(correlation(alignment.FINE, sketch, ((a, b), (c, 0.93)), turned) for a, b, c in tried)
    assert found[0, 0] < most - 0.02 and aligned(sketch[None], Memory(part), ids)[0, 0] > most - 0.01


def test_copies_are_aligned_and_others_are_not():
    images = [textured(seed) for seed in range(12)]
    copies = [plants.copied(image, list(plants.KINDS)[i % 6], (i,)) for i, image in enumerate(images)]
    ours, theirs, ids = sketches(images), sketches(copies), np.tile(np.arange(12, dtype=np.int32), (12, 1))
    both = np.maximum(aligned(ours, Memory(theirs), ids), aligned(theirs, Memory(ours), ids).T)
    assert np.diagonal(both).min() > 0.85 and both[~np.eye(12, dtype=bool)].max() < 0.6
    crops = [i for i in range(12) if i % 6 == 1]
    assert all(aligned(theirs, Memory(ours), ids)[i, i] < both[i, i] for i in crops)  # an image is no part of its crop
    flat = np.full((2, 32, 32), [[[7]], [[250]]], np.uint8)
    assert (aligned(flat, Memory(flat), ids[:2, :2]) == 0).all()


def test_alignment_has_the_same_bits_in_any_division(monkeypatch):
    base = sketches(textured(seed % 30) for seed in range(40))
    ids = np.random.default_rng(0).integers(0, 40, (40, 6)).astype(np.int32)
    ids[3, 4:], ids[:, 0] = neighbors.NONE, (np.arange(40) + 30) % 40  # for some their own copy
    base[29], ids[29] = base[5:7].mean(axis=0), [5, 7, 19, 20, 21, 22]  # resembles the first
    whole = aligned(base, Memory(base), ids)
    assert np.isinf(whole[3, 4:]).all() and (whole[:10, 0] > 0.99).all() and (whole >= alignment.LOOSE).mean() < 0.5
    coarse, best = np.empty(ids.shape, np.float32), np.empty(ids.shape, np.int32)
    alignment._compare(alignment.COARSE, (coarse, best), base, Memory(base), ids)
    coarse[ids == neighbors.NONE] = -np.inf
    loose = (coarse < alignment.LOOSE) & (coarse < np.maximum(coarse.max(axis=1, keepdims=True), alignment.BEST))
    assert loose.any() and (~loose & (coarse < alignment.LOOSE)).any()
    assert np.array_equal(whole[loose], coarse[loose]) and not (whole[~loose] == coarse[~loose]).any()
    monkeypatch.setattr(alignment, "QUERIES", 8)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:2])):
        parts = [aligned(base[i : i + 7], Memory(base), ids[i : i + 7]) for i in range(0, 40, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert aligned(base[:0], Memory(base), ids[:0]).shape == (0, 6)


def test_pairs_that_are_near_either_way_are_compared_both_ways():
    images = [textured(seed) for seed in range(10)]
    images[1], images[3] = images[0], images[2][:38, 10:]  # copies by themselves
    copies = [plants.copied(image, "jpeg", (i,)) for i, image in enumerate(images)]
    one, other = (Known("", Memory(vectors(10, 4, seed)), Memory(sketches(each))) for seed, each in ((0, images), (1, copies)))
    other.vectors.array[[1, 3]] = one.vectors.array[[0, 2]]
    ids = np.tile(np.arange(10, dtype=np.int32), (10, 1))
    forth, back = (aligned(a.sketches.array, b.sketches, ids) for a, b in ((one, other), (other, one)))
    near = [np.array([[j in row for j in range(10)] for row in brute(a.vectors.array, b.vectors.array, 3, np.arange(10))[0]])
            for a, b in ((one, other), (other, one))]  # fmt: skip
    want = np.maximum(np.where(near[0], forth, -np.inf), np.where(near[1], back, -np.inf).T)
    assert min(want[0, 1], want[2, 3]) > 0.9
    want[0, 1] = want[1, 0] = want[2, 3] = want[3, 2] = -np.inf
    pool = vectors(6, 4, 2)
    found = calibration.by_pixels(one, other, Memory(pool), 3)
    others = want[np.isfinite(want) & ~np.eye(10, dtype=bool)]
    assert sorted(np.concatenate(list(found.others))) == sorted(others) and found.alike == 2
    for i in range(10):
        ways = []
        for a, b, similarity in ((one, other, forth), (other, one, back)):
            rank = (pool.astype(int) @ a.vectors.array[i] > a.vectors.array[i].astype(int) @ b.vectors.array[i]).sum()
            ways += [similarity[i, i]] * int(rank < 3)
        assert found.own[i] == max(ways, default=-np.inf)
    same = Known("", one.vectors, Memory(np.repeat(one.sketches.array[:1], 10, axis=0)))
    with pytest.raises(ValueError, match="look so much alike that copies cannot be told from others: give dedup.threshold"):
        calibration.by_pixels(same, same, Memory(pool), 3)


# Components


def test_components_are_those_of_scipy_for_any_order_and_division():
    rng = np.random.default_rng(0)
    for case in range(20):
        count, many = int(rng.integers(2, 200)), int(rng.integers(0, 200))
        first, second = rng.integers(0, count, (2, many)).astype(np.int32)
        graph = scipy.sparse.coo_matrix((np.ones(many), (first, second)), (count, count))
        _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
        want = np.array([np.flatnonzero(label == each).min() for each in label])
        parts = np.array_split(rng.permutation(many), int(rng.integers(1, 5)))
        edges = [(first[part], second[part], np.ones(len(part), np.float32)) for part in parts]
        assert np.array_equal(components.components(count, edges), want), case


def test_a_chain_is_cut_and_copies_are_not():
    """Two groups of copies, joined by a chain of pairs that are less alike."""
    clique = [(a, b, 0.98) for base in (0, 10) for a, b in itertools.permutations(range(base, base + 6), 2)]
    chain = [(a, b, 0.8) for a, b in zip([5, *range(20, 60)], [*range(20, 60), 10])]
    first, second, alike = (np.array(column) for column in zip(*clique, *chain))
    edges = [(first.astype(np.int32), second.astype(np.int32), alike.astype(np.float32))]
    labels = components.components(60, components.above(edges, 0.7))
    giant, *rest = components.largest(labels, components.above(edges, 0.7), 10, 10)
    assert (giant.label, giant.size) == (0, 52) and giant.density < 0.3 and not rest
    cut = components.cut(labels, lambda: edges, 0.7, 10, 10, 0.3)
    assert (cut[:6] == 0).all() and (cut[10:16] == 10).all() and len(np.unique(cut)) == 60 - 10


# Clusters


def test_kmeans_is_that_of_brute_force():
    x = vectors(300, 6, centers=[100, 100, 100])
    found = kmeans(Memory(x), 3, 20, seed=1)
    want = clusters.first_centroids(Memory(x), 3, 1)
    for _ in range(20):
        near, _ = (each[:, 0] for each in brute(x, want, 1))
        want = quantized(np.stack([x[near == i].astype(np.int64).sum(0) for i in range(3)]))
    assert np.array_equal(found.centroids, want) and found.sizes.tolist() == [100, 100, 100]


def test_kmeans_has_the_same_bits_in_any_chunks_and_after_a_kill(monkeypatch):
    x, kept = vectors(500, 6), []
    whole = kmeans(Memory(x), 20, 9, seed=3, keep=lambda *now: kept.append(now))
    assert [number for number, _ in kept] == list(range(1, len(kept) + 1)) and len(kept) > 4
    again = kmeans(Memory(x), 20, 9, seed=3, begin=kept[2])
    monkeypatch.setattr(clusters, "CHUNK", 37)
    chunks = kmeans(Subset(Memory(x[::-1]), np.arange(499, -1, -1)), 20, 9, seed=3)
    for other in (again, chunks):
        assert np.array_equal(whole.centroids, other.centroids) and np.array_equal(whole.nearest, other.nearest)
    with pytest.raises(ValueError, match="501 clusters are asked for, but there are 500 images"):
        kmeans(Memory(x), 501, 1, seed=0)


def test_no_cluster_stays_empty():
    x = np.concatenate([vectors(1).repeat(50, 0), vectors(6, seed=1)])
    found = kmeans(Memory(x), 7, 20, seed=0)
    assert (found.sizes > 0).all()


def test_resampling_evens_out_a_long_tail():
    x = vectors(1440, 8, centers=[1000, 300, 100, 20, 10, 10])
    plain, fine = (clusters.hierarchy(Memory(x), (60, 6), 10, rounds, (4, 3), seed=0) for rounds in (0, 4))
    share = [np.mean([len(np.unique(found[0].nearest[1400:]))]) for found in (plain, fine)]
    assert share[1] >= share[0] and len(fine[1].nearest) == 60
    assert clusters.entropy(np.bincount(fine[1].nearest, minlength=6)) > 0.5
    keys = np.arange(1440, dtype=np.uint64)
    chosen = clusters.balanced(fine, 60, keys, seed=0)
    top = fine[1].nearest[fine[0].nearest]
    assert len(chosen) == len(set(chosen.tolist())) == 60
    before, after = (clusters.entropy(np.bincount(each, minlength=6)) for each in (top, top[chosen]))
    assert after > max(before, 0.95)


def test_allotted_is_as_even_as_sizes_allow():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 9, int(rng.integers(1, 7)))
        target = int(rng.integers(0, 30))
        take, want = clusters.allotted(target, sizes), np.zeros_like(sizes)
        for _ in range(min(target, sizes.sum())):  # one after the other to the one that has least
            want[min((i for i in range(len(sizes)) if want[i] < sizes[i]), key=lambda i: (want[i], i))] += 1
        assert np.array_equal(take, want)


def test_draws_follow_from_the_images_and_not_from_their_places():
    keys = np.random.default_rng(0).integers(0, 2**63, 40).astype(np.uint64)
    labels, take = np.arange(40) % 3, np.array([2, 0, 5])
    chosen = keys[clusters.drawn(labels, take, keys, 7)]
    by = np.random.default_rng(1).permutation(40)
    assert set(chosen) == set(keys[by][clusters.drawn(labels[by], take, keys[by], 7)]) and len(chosen) == 7
    assert clusters.entropy(np.array([5, 5, 5])) == pytest.approx(1) and clusters.entropy(np.array([9, 0])) == 0


# Shards


def test_a_result_does_not_know_its_shards_and_is_not_made_twice(tmp_path):
    data, calls = np.arange(10, dtype=np.int16)[:, None], []

    def make(span):
        calls.append(span)
        return Made({"x": data[slice(*span)]}, {"name": [f"{i}" for i in range(*span)]}, {"first": span[0]})

    found = [
        stage(tmp_path / f"{rows}", "a", 1, ["in"], {"k": 2}, shards.spans(10, rows), make, functools.partial(threads, rows))
        for rows in (3, 10)
    ]
    assert found[0].digest == found[1].digest and found[0].folder.name == found[1].folder.name
    assert list(found[0].column("name")) == [f"{i}" for i in range(10)] and len(found[0].abouts) == 4
    assert np.array_equal(found[0].rows("x").take(np.array([9, 0, 4, 5])), data[[9, 0, 4, 5]])
    assert np.array_equal(found[0].rows("x").read(2, 8), data[2:8])
    before = len(calls)
    stage(tmp_path / "3", "a", 1, ["in"], {"k": 2}, shards.spans(10, 5), make)
    assert len(calls) == before
    others = [("b", 1, ["in"], {"k": 2}), ("a", 2, ["in"], {"k": 2}), ("a", 1, ["on"], {"k": 2}), ("a", 1, ["in"], {"k": 3})]
    names = {stage(tmp_path / "3", *other, [(0, 10)], make).folder.name for other in others}
    assert len(names) == 4 and found[0].folder.name not in names


def test_a_table_does_not_know_its_parts(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(shards, "GROUP", 16)
    for count in (1, 15, 16, 17, 32, 70):
        records = {"name": [f"image {i}" for i in range(count)], "of": [i % 3 for i in range(count)], "none": [None] * count}
        parquet.write_table(pyarrow.table(records), tmp_path / "want", row_group_size=16, use_dictionary=False)
        for rows in (5, 16, 40, 100):
            parts = ({name: values[slice(*span)] for name, values in records.items()} for span in shards.spans(count, rows))
            with (tmp_path / "found").open("wb") as file:
                shards.write_parquet(file, parts)
            assert (tmp_path / "found").read_bytes() == (tmp_path / "want").read_bytes(), (count, rows)


def test_a_half_written_set_is_not_visible_and_its_shards_are_used(tmp_path):
    made = []

    def make(i, last):
        if i == last:
            raise MemoryError
        made.append(i)
        return Made({"x": np.full(2, i)})

    with pytest.raises(MemoryError):
        stage(tmp_path, "a", 1, [], {}, [0, 1, 2], lambda i: make(i, 2))
    (folder,) = tmp_path.iterdir()
    assert ".parts-" in folder.name and made == [0, 1]
    found = stage(tmp_path, "a", 1, [], {}, [0, 1, 2], lambda i: make(i, -1))
    assert made == [0, 1, 2] and [path.name for path in tmp_path.iterdir()] == [found.folder.name]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="cannot write: No space left on device.*a-"):
        stage(tmp_path, "a", 1, [], {}, [0], lambda _: Made({"x": np.zeros(3)}))
    assert not list(tmp_path.rglob("*.tmp"))


class Embedded:
    """In place of `stages.Images`."""

    def __init__(self, folder, **arrays):
        self.good = np.arange(len(next(iter(arrays.values()))))
        self.result = stage(folder, "a", 1, [], {}, shards.spans(len(self.good), 7), lambda span: Made({
            name: array[slice(*span)] for name, array in arrays.items()}))  # fmt: skip


def test_hashes_that_begin_alike_are_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PIECE", 8)
    sha256 = np.random.default_rng(0).integers(0, 2, (100, 32), np.uint8)
    sha256[:, 1:24] = 0  # many have the same first 8 bytes, some all
    sha256[:, 25:29] = 0
    good = np.arange(100) % 9 > 0
    these = stages.Stages(config_of(tmp_path), tmp_path, None)
    sets = [
        Embedded(tmp_path / f"{span}", sha256=sha256[slice(*span)], good=good[slice(*span)]) for span in ((0, 30), (30, 100))
    ]
    found = these.order(sets)
    words = [each.tobytes() for each in sha256]
    first = {word: i for i, word in reversed(list(enumerate(words))) if good[i]}
    names = sorted(first)
    assert found.array("origin").tolist() == [first[word] for word in names] and 2 < len(names) < 70
    assert found.array("member").tolist() == [names.index(word) if good[i] else -1 for i, word in enumerate(words)]
    assert found.array("keys").tolist() == [int.from_bytes(word[:8]) for word in names]


def test_an_image_is_asked_for_by_the_first_that_is_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PIECE", 4)
    rng, best = np.random.default_rng(0), {}
    state = object.__new__(stages.Curation)
    state.labels, state.candidates, retrieved = np.zeros(40), np.arange(5, 35), []
    for number in range(2):
        ids = np.argsort(rng.random((25, 30)), axis=1)[:, :3].astype(np.int32)
        alike = rng.integers(0, 4, (25, 3)).astype(np.float32)  # many are equal
        images = Embedded(tmp_path / f"{number}", ids=ids, similarity=alike)
        retrieved.append((images, images.result))
        for place, rank in np.ndindex(*ids.shape):
            image = int(state.candidates[ids[place, rank]])
            if image not in best or alike[place, rank] > best[image][0]:
                best[image] = alike[place, rank], number, place
    state.why = {"retrieved": retrieved}
    sets, places = stages.asked_by(state)
    assert {i: (sets[i], places[i]) for i in np.flatnonzero(sets >= 0)} == {i: best[i][1:] for i in best}


# Copies


def test_copies_are_of_their_kinds():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for kind in plants.KINDS:
        one, two, other = (plants.copied(image, kind, seed) for seed in ((1, 2), (1, 2), (1, 3)))
        assert np.array_equal(one, two) and one.dtype == np.uint8
        assert kind == "flip" or one.shape != other.shape or not np.array_equal(one, other)
    assert np.array_equal(plants.copied(image, "flip", (0,)), image[:, ::-1])
    for seed in range(20):
        height, width, _ = plants.copied(image, "crop", (seed,)).shape
        assert 0.47 < height * width / (32 * 48) < 1


def test_the_threshold_is_the_lowest_that_is_precise_from_there_on():
    copies, others = np.array([0.9, 0.8, 0.6, 0.2]), np.array([0.5, 0.3, 0.1])
    curve = calibration.curve(Pairs(copies, np.split(others, [1])), ["jpeg", "jpeg", "crop", "crop"], factor=2)
    place = curve.lowest(0.99)
    assert curve.thresholds[place] == 0.505 and curve.recall[place] == 0.75
    assert curve.by_kind["jpeg"][place] == 1 and curve.by_kind["crop"][place] == 0.5
    at = np.searchsorted(curve.thresholds, 0.25)
    assert curve.precision[at] == 3 / (3 + 2 * 2)
    with pytest.raises(ValueError, match="no threshold has a precision of 0.99: other images are as similar"):
        calibration.curve(Pairs(copies, [np.ones(3)]), [""] * 4, 1).lowest(0.99)


def test_dhash_tells_where_it_gets_darker():
    rising = np.arange(72, dtype=np.uint8).repeat(3).reshape(8, 9, 3)
    assert dhash(rising) == 2**64 - 1 and dhash(rising[:, ::-1]) == 0
    image = np.random.default_rng(0).permutation(216).astype(np.uint8).reshape(8, 9, 3)
    hashes = np.array([dhash(image), dhash(image[:, ::-1]), dhash(image[::-1])], np.uint64)
    near = dhash_distance(hashes[:, None], hashes) < 6  # a few places are equally dark
    assert np.array_equal(near, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def small_network(depth=1):
    network = Encoder(vit.ViT(patch_size=8, img_size=16, dim=8, depth=depth, heads=2), (0.5,) * 3, (0.2,) * 3)
    return Model(network, network.init_parts(jax.random.key(0)), 16, "small", resize=1.0)


def noise(count):
    return ArraySource(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8), np.zeros(count, np.int32), 1)


def test_features_of_a_block_made_white(monkeypatch):
    monkeypatch.setattr(Model, "batch_size", lambda *_: 32)
    model, source = small_network(depth=3), noise(80)
    features = model.features(source.images, layers=2)
    for kind in ("cls", "mean", "cls+mean"):
        wanted = np.concatenate([features[each][:, :8] for each in kind.split("+")], axis=1).astype(np.float64)
        plain = Network(model, kind, block=2)
        found = np.concatenate([batch.vectors for batch in plain.batches(source, None, 0, 80)])
        np.testing.assert_allclose(found, quantized(wanted), atol=1)
        white = plain.basis(source, 6)
        moved = (wanted - white[0]) @ white[1]
        np.testing.assert_allclose(np.cov(moved.T, bias=True), np.eye(6), atol=1e-3)
        embedder = plain.projected(white)
        found = np.concatenate([batch.vectors for batch in embedder.batches(source, None, 64, 80)])
        np.testing.assert_allclose(found, quantized(moved[64:]), atol=2)
        assert embedder.dims == 6 and embedder.identity != plain.identity != Network(model, kind).identity
    assert Network(model, "cls", block=3).identity == Network(model, "cls").identity
    for block in (0, 4):
        with pytest.raises(ValueError, match=f"block is {block}, but of this network 1 to 3 can be used"):
            Network(model, "cls", block=block)


def test_bad_images_do_not_count_for_the_whitening(monkeypatch):
    monkeypatch.setattr(Model, "batch_size", lambda *_: 32)

    class Broken(ArraySource):
        def __getitem__(self, row):
            if row % 3 == 1:
                raise OSError("gone")
            return super().__getitem__(row)

    source, zeros = noise(60), np.zeros(60, np.int32)
    left = ArraySource(source.images[np.arange(60) % 3 != 1], zeros[:40], 1)
    for embedder in (Network(small_network(), "cls"), Pixels()):
        for one, other in zip(embedder.basis(Broken(source.images, zeros, 1), 4), embedder.basis(left, 4)):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
            if isinstance(embedder, Pixels):  # its crops are drawn anew
                break
        with pytest.raises(ValueError, match="fewer than two of 2 sampled images can be read"):
            embedder.basis(Broken(source.images[:2], zeros[:2], 1), 4)


def test_a_network_and_a_curated_list_as_a_set(images, tmp_path, monkeypatch):
    """As in DINOv2: copies are removed with one embedder, what is left is retrieved from with another."""
    model = small_network(depth=2)
    monkeypatch.setattr(stages, "load", lambda *_, **__: model)
    monkeypatch.setattr(Model, "batch_size", lambda *_: 32)
    network = {"embedder": f"{tmp_path}/network", "dedup.threshold": 0.99}
    config = config_of(images, select="all", curated="", block=1, whiten=5, **network)
    first = stages.run(config, tmp_path / "first")
    assert first.pool.shape[1] == 5 and "cls after block 1, 16 pixels, 5 white components" in first.embedder.description
    monkeypatch.setattr(Network, "basis", None)  # a second start does not look at the images again
    again = stages.run(config, tmp_path / "first")
    assert again.embedder.identity == first.embedder.identity

    config = config_of(images, uncurated=f"{tmp_path}/first", **{**network, "dedup.threshold": 1.0, "whiten": 0})
    second = stages.run(config, tmp_path / "second")
    assert len(second.labels) == len(first.chosen) < len(first.labels) and second.pool.shape[1] == 8
    names = {first.uncurated[0].source.name(int(row)) for row in first.origin[first.chosen]}
    assert {second.uncurated[0].source.name(row) for row in range(len(second.uncurated[0].source))} == names


@pytest.mark.slow
def test_an_embedder_goes_to_another_process():
    model, source = small_network(), noise(5)
    plain = Pixels()
    for embedder in (Network(model, "cls"), plain.projected(plain.basis(source, 2))):
        (batch,) = embedder.batches(source, None, 0, 5)
        (there,) = cloudpickle.loads(cloudpickle.dumps(embedder)).batches(source, None, 0, 5)
        assert batch.vectors.any() and all(map(np.array_equal, batch, there))


def test_rounds_of_stars_end_with_the_components():
    rng, many, last = np.random.default_rng(0), np.arange(98), np.full(98, 98)
    cases = [rng.integers(0, 99, (2, 10 * case)) for case in range(20)]
    for first, second in [*cases, (many, many + 1), (many, last)]:
        edges = [(first.astype(np.int32), second.astype(np.int32), np.ones(len(first), np.float32))]
        now, before, rounds = components.packed(edges), None, 0
        while not np.array_equal(now, before):
            before, rounds = now, rounds + 1
            large = components.large_star(components.both_ways(now))
            now = np.unique(components.small_star(np.unique(large)))
        assert np.array_equal(components.labels(99, now), components.components(99, edges)) and rounds < 9


# The command


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A heap of 150 images with three exact and four other copies, two copies of images to test on, a part of one and one of
    which a part is there, and a bad file."""
    root = tmp_path_factory.mktemp("images")
    for name, seeds in (("heap", range(150)), ("good", range(300, 330)), ("test", range(400, 406))):
        (root / name).mkdir()
        for seed in seeds:
            (root / name / f"{seed:03}.png").write_bytes(encode(textured(seed)))
    for i in range(3):
        (root / "heap" / f"same{i}.png").write_bytes(encode(textured(i)))
    for i, kind in enumerate(("jpeg", "flip", "jpeg", "color")):
        (root / "heap" / f"like{i}.png").write_bytes(encode(plants.copied(textured(10 + i), kind, (i,))))
    (root / "heap" / "leak0.png").write_bytes(encode(textured(400)))
    (root / "heap" / "leak1.png").write_bytes(encode(textured(401)[:, ::-1]))
    (root / "heap" / "leak2.png").write_bytes(encode(textured(402)[4:44, 6:46]))
    (root / "heap" / "leak3.png").write_bytes(encode(textured(403)))
    (root / "test" / "403.png").write_bytes(encode(textured(403)[3:43, 2:42]))
    (root / "heap" / "bad.png").write_bytes(b"no image")
    return root


def config_of(images, **changes):
    config = load_config("curate").unlock()
    config.update(uncurated=f"{images}/heap", curated=f"{images}/good", evaluation=f"{images}/test", shard_rows=16)
    config.dedup.threshold, config.retrieve.k = 0.9, 2
    config.balance.update(clusters=(8, 3), points=(2, 2), rounds=2, iterations=4, images=12)
    config.update_from_flattened_dict(changes)
    return config


OUTPUTS = ("list.json", "provenance.parquet", "report.html")


def outputs(workdir):
    return {path.name: path.read_bytes() for path in workdir.iterdir() if path.name in OUTPUTS or path.name.startswith("rows-")}


def test_what_becomes_of_each_image(images, tmp_path, capsys):
    from pyarrow import parquet

    state = stages.run(config_of(images), tmp_path)
    rows = {Path(row["name"]).name: row for row in parquet.read_table(tmp_path / "provenance.parquet").to_pylist()}
    fate = {name: row["fate"] for name, row in rows.items()}
    assert len(rows) == 162 and fate["bad.png"] == "bad image" and "no image of the formats" in rows["bad.png"]["why_bad"]
    assert all(fate[f"same{i}.png"] == "exact copy of another image" for i in range(3))
    assert fate["leak0.png"] == fate["leak1.png"] == fate["leak2.png"] == "copy of an evaluation image"
    named = {name: Path(row["evaluation_image"]).name for name, row in rows.items() if row["evaluation_image"]}
    assert named == {f"leak{i}.png": f"{400 + i}.png" for i in range(4)}
    for i in range(4):
        pair = [rows[name] for name in (f"{10 + i:03}.png", f"like{i}.png")]
        assert sorted(row["fate"] == "near-duplicate of another image" for row in pair) == [False, True]
        assert pair[0]["component"] == pair[1]["component"] == min(row["sha256"] for row in pair)
    chosen = {name for name in fate if fate[name] == "chosen"}
    assert chosen == {Path(rows[name]["name"]).name for name in chosen} and 2 <= len(chosen) <= 60
    assert all(Path(rows[name]["asked_by"]).parent.name == "good" for name in chosen)
    assert len(state.candidates) == 150
    told = capsys.readouterr().err
    assert "1 of 162 images are bad, such as" in told and "train on them" in told
    page = (tmp_path / "report.html").read_text()
    assert "without copies of evaluation images</td><td>150" in page and "<h2>Leakage" in page and "Duplicate groups" in page

    train, held_out = open_source("curated", tmp_path), open_source("curated", tmp_path, "test")
    assert len(held_out) == 6 and len(train) == len(chosen) + 30
    assert {Path(train.name(row)).name for row in range(len(train))} == chosen | {f"{i}.png" for i in range(300, 330)}
    assert len(open_source("curated", tmp_path, "train[:50%]")) == (len(train) + 1) // 2
    (tmp_path / next(name for name in outputs(tmp_path) if name.startswith("rows-"))).write_bytes(b"")
    with pytest.raises(ValueError, match="is not what was written"):
        open_source("curated", tmp_path)


def test_whole_components_go_with_evaluation_images():
    """0 and 3 are one component, of which only 3 resembles an evaluation image."""
    state = object.__new__(stages.Curation)
    state.labels, state.leakage_threshold = np.array([0, 1, 2, 0], np.int32), 0.8
    state.leaks = [np.array([0.1, 0.7, 0.2, 0.3]), np.array([0.1, 0.1, 0.1, 0.8])]
    assert state.leaked.tolist() == [True, False, False, True]
    state.leaks = []
    assert not state.leaked.any()


SELECT = ["retrieve", "balance", pytest.param("cluster", marks=pytest.mark.slow)]


@pytest.mark.parametrize("select", SELECT)
def test_any_division_of_the_work_gives_the_same_bytes(images, tmp_path, monkeypatch, select):
    more = {"select": select}
    if select == "cluster":
        more = {"select": "retrieve", "retrieve.by": "cluster", "retrieve.clusters": 9, "retrieve.hits": 0}
    found, cells = [], {"neighbors.exact": 10, "neighbors.cells": 5, "neighbors.probes": 5}  # all cells are probed
    for case, (rows, workers, block, chunk) in enumerate([(1000, 1, 8192, 2**14), (50, 3, 64, 37), (40, 1, 256, 100)]):
        monkeypatch.setattr("mim_jax.curate.embedders.Pixels.batch_size", 8)
        monkeypatch.setattr(neighbors, "BLOCK", block)
        monkeypatch.setattr(clusters, "CHUNK", chunk)
        monkeypatch.setattr(stages, "PIECE", chunk)
        config = config_of(images, shard_rows=rows, workers=workers, **more, **(cells if case == 2 else {}))
        stages.run(config, tmp_path / f"{case}")
        found.append(outputs(tmp_path / f"{case}"))
    for each in found:
        each.pop("report.html")  # it has the config
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


@pytest.mark.slow
def test_two_hundred_random_divisions(images, tmp_path, monkeypatch):
    rng, want = np.random.default_rng(0), {}
    monkeypatch.setattr("mim_jax.curate.embedders.Pixels.batch_size", 8)
    for case in range(200):
        select = ("retrieve", "balance", "all")[case % 3]
        rows, workers = (1000, 1) if select not in want else (int(rng.integers(10, 170)), int(rng.integers(1, 5)))
        monkeypatch.setattr(neighbors, "BLOCK", int(2 ** rng.integers(6, 9)))
        monkeypatch.setattr(clusters, "CHUNK", int(rng.integers(20, 200)))
        cells = {"neighbors.exact": 10, "neighbors.cells": 8, "neighbors.probes": 3} if case % 3 == 1 else {}
        stages.run(config_of(images, shard_rows=rows, workers=workers, select=select, **cells), tmp_path / f"{case}")
        found = outputs(tmp_path / f"{case}")
        found.pop("report.html")
        assert found == want.setdefault(select, found), (case, rows, workers)


class Killed(BaseException):
    pass


def test_death_at_any_file_leaves_the_same_bytes(images, tmp_path, monkeypatch):
    """The process "dies" at its n-th file, before or after it is put in its place; then it goes on."""
    config = config_of(images, uncurated=f"{images}/good", curated=f"{images}/test", evaluation="", select="balance")
    stages.run(config, tmp_path / "whole")
    replace, rename, left, rng = Path.replace, Path.rename, [10**9], np.random.default_rng(0)

    def dying(move):
        def moved(self, target):
            left[0] -= 1
            if left[0] == 0:
                if rng.random() < 0.5:
                    move(self, target)
                raise Killed
            return move(self, target)

        return moved

    monkeypatch.setattr(Path, "replace", dying(replace))
    monkeypatch.setattr(Path, "rename", dying(rename))
    deaths = 0
    while True:
        left[0] = int(rng.integers(1, 25))
        try:
            stages.run(config, tmp_path / "killed")
            break
        except Killed:
            deaths += 1
    assert deaths > 5 and outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


BAD = [
    ({"uncurated": ""}, "uncurated is missing: --config.uncurated=FOLDER"),
    ({"curated": ""}, 'curated is missing: .* "all" without'),
    ({"select": "best"}, "select is 'best', but must be retrieve or balance or all"),
    ({"dedup.threshold": 1.5}, r"dedup.threshold is 1.5, but must be in \[0, 1\]"),
    ({"neighbors.k": 0}, "neighbors.k is 0, but must be 1 or more"),
    ({"dedup.threshold": 0.0, "leakage.threshold": 0.9}, r"only 0 of 158 images .*: at dedup.threshold=0 .* Raise the"),
    ({"dedup.threshold": 0.0, "evaluation": ""}, "only 1 of 158 images would be left"),
    ({"leakage.threshold": 0.0}, "all images of .*good .* are copies of evaluation images, at leakage.threshold=0"),
    ({"uncurated": ","}, "uncurated is missing"),
    ({"uncurated": "@"}, "'@' is no set: a folder, or a data set such as cifar10@test"),
    ({"seed": 10**20}, r"seed is 100000000000000000000, but must be below 2\*\*63"),
    ({"dedup.giant": -0.1}, r"dedup.giant is -0.1, but must be in \[0, 1\]"),
    ({"balance.clusters": (0, 3)}, "balance.clusters is .*, but must be 1 or more"),
    ({"balance.clusters": ()}, "balance.clusters is .*, but must be numbers of clusters"),
    ({"retrieve.cap": 0}, "retrieve.cap is 0, but must be 1 or more"),
    ({"write.curated": 1e12}, "write.curated is 1000000000000.0, but must be at most 1,000"),
    ({"levels": (5, 5)}, "levels is .*, but must be .* with black below white"),
    (
        {"select": "balance", "balance.clusters": (200, 3)},
        r'balance.clusters\[0\] is 200, but 150 images are left: ask for fewer clusters, such as .*="\(15, 1\)"',
    ),
    ({"plant.evaluation": 7}, "plant.evaluation is 7, but there are 6 evaluation images"),
    ({"calibrate.share": 0.0}, r"calibrate.share is 0.0, but must be in \(0, 1\]"),
    ({"block": 2}, "block is 2, but there is no embedder whose block it could be"),
    ({"engine": "spark"}, "engine is 'spark', but must be local or beam"),
    ({"retrieve.by": "cluster", "retrieve.clusters": 4, "retrieve.hits": 99}, "no cluster has more than retrieve.hits=99"),
]


@pytest.mark.parametrize(("changes", "told"), BAD, ids=range(len(BAD)))
def test_bad_settings(images, tmp_path_factory, monkeypatch, changes, told):
    monkeypatch.setattr(stages, "LEAST", 0.5)
    workdir = tmp_path_factory.getbasetemp() / "bad_settings"  # one for all: what is made is used again
    with pytest.raises(ValueError, match=told):
        config = config_of(images)
        config.update_from_flattened_dict(changes)
        stages.run(config, workdir)
    assert not (workdir / "list.json").exists()


def test_beam_is_missing(images, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engine is 'beam', but .* not installed: pip install 'mim_jax\[beam\]'"):
        stages.run(config_of(images, engine="beam"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_sources_and_another_embedder(images, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No images below"):
        stages.run(config_of(images, uncurated=f"{tmp_path}/empty"), tmp_path / "run")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="fewer than two of 3 sampled images can be read"):
        stages.run(config_of(images, uncurated=f"{tmp_path}/broken"), tmp_path / "run")
    with pytest.raises(ValueError, match="none of the 3 images of .*broken.* can be read: .*0.png: no image of the formats"):
        stages.run(config_of(images, curated=f"{tmp_path}/broken"), tmp_path / "run")
    monkeypatch.setattr(stages, "DIMS", 3)
    with pytest.raises(ValueError, match="has vectors of another embedder, .* of 20 dimensions; now it is .* of 3. Thresholds"):
        stages.run(config_of(images), tmp_path / "run")


def test_images_that_are_curated_too(images, tmp_path, capsys):
    """Evaluation images leave a curated set; what a curated set has is not chosen once more."""
    from pyarrow import parquet

    def fates():
        table = parquet.read_table(tmp_path / "run/provenance.parquet").to_pydict()
        return table, {Path(name).name: fate for name, fate in zip(table["name"], table["fate"])}

    heap, good = tmp_path / "the,heap@home", tmp_path / "good"
    shutil.copytree(images / "heap", heap)
    shutil.copytree(images / "good", good)
    (good / "leak.png").write_bytes(encode(textured(402)[:, ::-1]))
    (good / "also.png").write_bytes(encode(textured(20)))  # of 020.png, and of its copy
    (heap / "also.png").write_bytes(encode(plants.copied(textured(20), "jpeg", (0,))))
    changes = {"uncurated": str(heap), "curated": str(good), "retrieve.k": 150}
    state = stages.run(config_of(images, **changes), tmp_path / "run")
    told = f"1 of 32 images of {good} (32 image files, no labels) are left out: copies of evaluation images, such as "
    assert f"{told}{good}/leak.png" in capsys.readouterr().err
    table, fate = fates()
    assert fate["020.png"] == fate["also.png"] == "also in a curated set, or in one component with such"
    source = open_source("curated", tmp_path / "run")
    names = [Path(source.name(row)) for row in range(len(source))]
    assert len(names) == len(set(names)) == len(state.chosen) + 31 and good / "leak.png" not in names
    assert {name.name for name in names if name.parent == heap} == {name for name, told in fate.items() if told == "chosen"}

    page = (tmp_path / "run/report.html").read_text()
    assert "<td>31 x 1</td>" in page and "bad.png</td><td>no image of the formats" in page
    assert "without images that are also in a curated set" in page

    # Without curated images in the list these are chosen; other images can be added to a workdir.
    (heap / "new.png").write_bytes(encode(textured(500)))
    stages.run(config_of(images, **changes, **{"write.curated": 0.0}), tmp_path / "run")
    assert "the components of the features are those that this workdir had before, for" in capsys.readouterr().err
    table, fate = fates()
    assert sorted((fate["020.png"], fate["also.png"]))[0] == "chosen" and fate["new.png"] == "chosen"
    there = open_source("folder", heap)
    unseen = Path(there.name(next(row for row in range(50, len(there)) if row not in sample(there))))
    size = unseen.stat().st_size
    unseen.write_bytes(encode(textured(403)))  # the same name, and an image to evaluate with
    assert unseen.stat().st_size != size
    stages.run(config_of(images, **changes), tmp_path / "run")
    table, fate = fates()
    assert fate[unseen.name] == "copy of an evaluation image"
    assert table["evaluation_similarity"][list(fate).index("bad.png")] is None
    heap.rename(tmp_path / "moved")
    stages.run(config_of(images, **changes | {"uncurated": f"{tmp_path}/moved"}), tmp_path / "run")
    table, _ = fates()
    assert {str(Path(name).parent) for name in table["name"]} == {f"{tmp_path}/moved"}
    (tmp_path / "moved").rename(heap)
    with pytest.raises(FileNotFoundError, match="lists the images of .*moved, which are not there any more: move them back"):
        open_source("curated", tmp_path / "run")


def test_parts_of_a_list_share_no_image(images, tmp_path):
    stages.run(config_of(images, **{"write.curated": 2.5}), tmp_path)
    parts = [open_source("curated", tmp_path, f"train[{part}]") for part in (":30%", "30%:60%", "60%:")]
    names = [{part.name(row) for row in range(len(part))} for part in parts]
    whole = open_source("curated", tmp_path)
    assert sum(map(len, parts)) == len(whole) and sum(map(len, names)) == len(set().union(*names))
    assert all(abs(len(part) - len(whole) / 3) < len(whole) / 15 for part in parts)


def test_a_full_disk_leaves_the_outputs_as_they_were(images, tmp_path, monkeypatch):
    stages.run(config_of(images), tmp_path)
    before = outputs(tmp_path)

    def full(*_):
        raise OSError("400 requested and 0 written")

    monkeypatch.setattr(stages, "write_parquet", full)
    with pytest.raises(OSError, match="cannot write: 400 requested and 0 written; is the disk full?"):
        stages.run(config_of(images, select="all"), tmp_path)
    assert outputs(tmp_path) == before and not list(tmp_path.glob("*.tmp"))


def test_words_of_the_command(images, tmp_path, capsys):
    for words, told in [
        ("--config=curate:demo", "error: --workdir is missing"),
        ("--config=curate:dem --workdir=x", "error: .*has no variant"),
        ("--config.neighbours.k=3 --workdir=x", "error: the config has no key neighbours.k; did you mean neighbors.k"),
        ("--workdir=x more", "error: not understood: more"),
        ("--config=mae:demo --workdir=x", "error: --config=mae:demo is a recipe for training; here it is curate"),
        ("--workdir=gs://b/x", "error: --workdir is gs://b/x, but must be a folder of this machine"),
        (f"--config.uncurated={tmp_path}/none/ --config.select=all --workdir={tmp_path}/run", "error: There is no folder"),
    ]:
        with pytest.raises(SystemExit, match=told) as stop:
            command.main(["curate", *words.split()])
        assert "\n" not in str(stop.value)


def test_a_small_demo(images, tmp_path, monkeypatch):
    """Copies and evaluation images are planted, the threshold is calibrated, and what was planted is found."""
    config = config_of(images, **{"plant.copies": 18, "plant.evaluation": 4, "calibrate.images": 30})
    config.dedup.threshold = None
    config.calibrate.precision = 0.9
    with pytest.raises(ValueError, match="30 images are too few to calibrate a threshold with, 100 are needed: give dedup"):
        stages.run(config, tmp_path)
    monkeypatch.setattr(stages, "LEAST_CALIBRATED", 30)
    monkeypatch.setattr(stages, "ENOUGH", 30)
    state = stages.run(config, tmp_path)
    found = stages.report.planted_found(state)
    assert state.curve is not None and stages.LOOSE <= state.threshold < 1
    assert found["recall"] > 0.5 and found["recall, flip"] == 1 and found["precision"] > 0.65  # the heap has copies of its own
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Calibration" in page and "<h2>Planted" in page
    assert len(open_source("curated", tmp_path)) == len(state.chosen) + 30
    monkeypatch.setattr(stages, "LOOSE", 0.0)  # where there are mistakes
    often = stages.run(config, tmp_path)
    config.calibrate.share /= 10
    rarer, at = stages.run(config, tmp_path), int(np.flatnonzero((0 < often.curve.precision) & (often.curve.precision < 1))[0])
    wrong, more = (1 / each.curve.precision[at] - 1 for each in (often, rarer))
    assert rarer.threshold >= often.threshold and more == pytest.approx(10 * wrong)


def test_classes_of_what_was_retrieved(tmp_path):
    for name, count in (("heap", 20), ("good", 4)):
        for i in range(count):
            (tmp_path / name / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "ab"[i % 2] / f"{i}.png").write_bytes(encode(textured(i + 100 * count)))
    (tmp_path / "heap/b/1.png").write_bytes(encode(plants.copied(textured(400), "jpeg", (0,))))  # of class b, as one of class a
    state = stages.run(config_of(tmp_path, evaluation="", **{"retrieve.k": 5}), tmp_path / "run")
    rows = {name: (count, float(precision)) for name, count, precision, _ in stages.report.by_class(state)}
    source = state.uncurated[0].source
    named = [source.name(row) for row in range(len(source))]
    pool = ["ab"["/b/" in f"/{named[where]}"] for where in state.origin[state.candidates]]
    (images, result), right = state.why["retrieved"][0], {"a": [], "b": []}
    for name, ids in zip(map(images.source.name, range(4)), result.array("ids")):
        own = "ab"["/b/" in f"/{name}"]
        right[own] += [pool[i] == own for i in ids]
    expected = {name: (len(of) // 5, np.mean(of)) for name, of in right.items()} | {
        "all": (4, np.mean(right["a"] + right["b"]))
    }
    assert rows == {name: (count, pytest.approx(share, abs=5e-4)) for name, (count, share) in expected.items()}
    assert rows["a"][1] < 1 and "<h2>Retrieved, by class" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_kills_at_random_moments(images, tmp_path):
    """kill -9 of the command, until it ends by itself."""
    rng, killed = np.random.default_rng(0), 0
    flags = [
        f"--config.{key}={images}/{name}" for key, name in (("uncurated", "heap"), ("curated", "good"), ("evaluation", "test"))
    ]
    flags += ["--config.dedup.threshold=0.9", "--config.retrieve.k=2", "--config.shard_rows=16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(workdir):
        line = [sys.executable, "-m", "mim_jax.curate", *flags, f"--workdir={workdir}"]
        return subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait(300) == 0
    took = time.monotonic() - begin
    for case in range(300):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.3, 1.1) * took)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        killed += code != 0
        if code == 0:
            assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole"), case
            subprocess.run(["rm", "-r", tmp_path / "killed"], check=True)
        if killed == 100:
            break
    assert start(tmp_path / "killed").wait(300) == 0
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole") and killed == 100
