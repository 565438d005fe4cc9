"""k-NN and k-means of curation on synthetic vectors: recall, products, rates, and the peak of memory.

    python benchmarks/curate.py --rows=200000 [--width=384] [--cells=4096] [--probes=256] [--sample=500]

Rows lie near a mixture of curved sheets of 16 dimensions in `width`, with groups of very different sizes, and are on the disk
as in a run. What is measured: the search in cells (recall@64 against the exact neighbors of a sample, products of two rows as a
share of all pairs, rows a second), the exact search (rows a second on the sample), and the k-means.
"""

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
SAMPLE = flags.DEFINE_integer("sample", 500, "Rows whose exact neighbors are found.")
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
        found, ids, products = neighbors.cells(own, cells), np.empty((count, K), np.int32), count * cells
        for start in range(0, count, CHUNK):
            query = np.arange(start, min(start + CHUNK, count), dtype=np.int32)
            probed, _ = clusters.assign(Subset(rows, query), centroids, PROBES.value)
            near, more = neighbors.within_cells(rows, found, query, probed, K)
            ids[query], products = near.ids, products + more
        seconds = time.monotonic() - begin
        fewer = count**2 / products
        told(f"cells: {seconds:.1f} s, {count / seconds:,.0f} rows/s, {fewer:.1f} times fewer products than all pairs")
        sample = np.unique(np.linspace(0, count - 1, SAMPLE.value).astype(np.int64))
        begin = time.monotonic()
        recall = neighbors.recall(rows, sample, ids[sample], K)
        seconds = time.monotonic() - begin
        told(f"exact: {len(sample) / seconds:,.0f} rows/s of {len(sample):,}; recall@{K} of the cells {recall:.4f}")


if __name__ == "__main__":
    app.run(main)
