"""k-NN and k-means of curation on synthetic vectors: recall, products, rates, and the peak of memory.

    python benchmarks/curate.py --rows=200000 [--width=384] [--cells=4096] [--probes=256] [--queries=65536] [--sample=500]

Rows lie near a mixture of curved sheets of 16 dimensions in `width`, with groups of very different sizes, and are on the disk
as in a run. What is measured: the search in cells (recall@64 against the exact neighbors of a sample, products of two rows as a
share of all pairs, rows a second), the exact search (rows a second on the sample), and the k-means. If it is installed
(`pip install faiss-cpu`), faiss does the same on the same vectors, which it holds in memory, with as many threads as there are
CPUs: IndexIVFFlat with as many cells and probes, and IndexFlatIP.
"""

import importlib.util
import os
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from mim_jax import sharding
from mim_jax.curate import clusters, neighbors
from mim_jax.curate.shards import Files, Subset

ROWS = flags.DEFINE_integer("rows", 200_000, "Vectors.")
WIDTH = flags.DEFINE_integer("width", 384, "Of a vector.")
CELLS = flags.DEFINE_integer("cells", 4096, "Cells.")
PROBES = flags.DEFINE_integer("probes", 256, "Cells in which the neighbors of a row are looked for.")
QUERIES = flags.DEFINE_integer("queries", None, "Rows, cell by cell, whose neighbors are found; by default all.")
SAMPLE = flags.DEFINE_integer("sample", 500, "Of these, rows whose exact neighbors are found.")
K, CHUNK, GROUPS = 64, 2**16, 2000


def write(folder: Path, count: int, width: int) -> Files:
    """Shards of CHUNK rows."""
    rng = np.random.default_rng(0)
    centers, turn = rng.normal(size=(GROUPS, 16)) * 1.5, rng.normal(size=(32, width))
    weight = 1 / np.arange(1, GROUPS + 1)
    files = []
    for start in range(0, count, CHUNK):
        n = min(CHUNK, count - start)
        z = centers[rng.choice(GROUPS, n, p=weight / weight.sum())] + rng.normal(size=(n, 16))
        x = np.concatenate([z, np.sin(2 * z)], axis=1) @ turn + 0.5 * rng.normal(size=(n, width))
        files.append(folder / f"{start:012}.npy")
        np.save(files[-1], neighbors.quantized(x))
    return Files(files)


def beside(rows: Files, learned: np.ndarray, asked: np.ndarray, places: np.ndarray, exact: np.ndarray) -> None:
    """The same by faiss; `exact` are the neighbors of the rows that are asked for at these places, int32 [n, K]."""
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    vectors = rows.read(0, rows.shape[0]).astype(np.float32) / neighbors.UNIT
    what = f"faiss {faiss.__version__}, {len(os.sched_getaffinity(0))} threads"

    def search(index: "faiss.Index", chosen: np.ndarray) -> tuple[np.ndarray, float]:
        begin = time.monotonic()
        ids = index.search(vectors[chosen], K + 1)[1]
        return ids, len(ids) / (time.monotonic() - begin)

    begin, quantizer = time.monotonic(), faiss.IndexFlatIP(rows.shape[1])
    index = faiss.IndexIVFFlat(quantizer, rows.shape[1], CELLS.value, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 10
    index.train(vectors[learned])
    told(f"{what}: k-means {time.monotonic() - begin:.1f} s")
    begin, index.nprobe = time.monotonic(), PROBES.value
    index.add(vectors)
    told(f"{what}: cells of all rows {time.monotonic() - begin:.1f} s")
    ids, rate = search(index, asked)
    told(f"{what}, cells: {rate:,.0f} rows/s; recall@{K} {neighbors.overlap(exact, ids[places]):.4f}")
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(vectors)
    ids, rate = search(flat, asked[places])
    told(f"{what}, exact: {rate:,.0f} rows/s; recall@{K} {neighbors.overlap(exact, ids):.4f}")


def told(what: str) -> None:
    print(f"{what}; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh()):
        count, cells = ROWS.value, CELLS.value
        rows = write(Path(folder), count, WIDTH.value)
        told(f"{count:,} x {WIDTH.value} vectors; {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
        begin = time.monotonic()
        learned = np.sort(clusters.order(np.arange(count, dtype=np.uint64), 0)[: 64 * cells])
        centroids = clusters.kmeans(Subset(rows, learned), cells, 10, 0).centroids
        seconds = time.monotonic() - begin
        told(f"k-means, {cells:,} cells of {len(learned):,} rows, at most 10 iterations: {seconds:.1f} s")
        begin = time.monotonic()
        own = clusters.assign(rows, centroids)[0][:, 0]
        told(f"cells of all rows: {time.monotonic() - begin:.1f} s")
        begin, queries = time.monotonic(), QUERIES.value or count
        found, ids, products = neighbors.cells(own, cells), np.empty((queries, K), np.int32), queries * cells
        asked = found.members[:queries]
        for start in range(0, len(asked), CHUNK):
            query = asked[start : start + CHUNK]
            probed, _ = clusters.assign(Subset(rows, query), centroids, PROBES.value)
            near, more = neighbors.within_cells(rows, found, query, probed, K)
            ids[start : start + CHUNK], products = near.ids, products + more
        seconds = time.monotonic() - begin
        fewer = queries * count / products
        told(f"cells: {seconds:.1f} s, {queries / seconds:,.0f} rows/s, {fewer:.1f} times fewer products than all pairs")
        places = np.unique(np.linspace(0, queries - 1, SAMPLE.value).astype(np.int64))
        begin, sample = time.monotonic(), asked[places]
        exact = neighbors.nearest(rows.take(sample), rows, K, own=sample).ids
        seconds = time.monotonic() - begin
        recall = neighbors.overlap(exact, ids[places])
        told(f"exact: {len(sample) / seconds:,.0f} rows/s of {len(sample):,}; recall@{K} of the cells {recall:.4f}")
        if importlib.util.find_spec("faiss"):
            beside(rows, learned, asked, places, exact)


if __name__ == "__main__":
    app.run(main)
