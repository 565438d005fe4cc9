"""The peak of memory of a whole curation, stage by stage, with synthetic vectors in place of images.

    python benchmarks/curate_memory.py --rows=1000000 [--width=64] [--select=retrieve] [--asked=100] [--cells=256] [--search]

Every tenth image is an exact copy of an earlier one, every twentieth resembles its neighbor. `asked` images are curated ones,
and as many others the evaluation set. So that time is short, neighbors are not looked for, and the 8 next images stand for
them: their memory is that of a shard, see benchmarks/curate.py; with --search they are looked for in one of `cells` cells.
Their similarity is that of vectors. The peak is that of the process, with Python and JAX; also how many bytes a row it is
above the start.
"""

import contextlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from absl import app, flags

from mim_jax import load_config
from mim_jax.curate import neighbors, stages
from mim_jax.curate.alignment import SIDE
from mim_jax.curate.clusters import mixed
from mim_jax.curate.embedders import Batch
from mim_jax.curate.neighbors import quantized
from mim_jax.curate.shards import Rows
from mim_jax.data.sources import Example


class Synthetic:
    """Images that are numbers."""

    notes, classes, num_classes = (), (), 0

    def __init__(self, name: str, count: int):
        self.description, self.count = name, count
        self.fingerprint = f"{name}-{self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Example:
        return Example(np.full((8, 8, 3), row % 256, np.uint8), -1)

    def name(self, row: int) -> str:
        return f"{self.description}/{row // 10_000:06}/{row:012}.jpg"


class Drawn:
    """Its vectors lie around 2000 centers."""

    batch_size = 4096

    def __init__(self, dims: int):
        self.dims, self.description, self.identity = dims, "synthetic", ["synthetic", dims]
        self.centers = np.random.default_rng(0).normal(size=(2000, self.dims)).astype(np.float32)

    def levels(self, source: Any) -> tuple[None, list[str]]:
        return None, []

    def batches(self, source: Any, levels: None, start: int, stop: int) -> Iterator[Batch]:
        seed = sum(source.description.encode())
        for first in range(start, stop, self.batch_size):
            row = np.arange(first, min(first + self.batch_size, stop), dtype=np.uint64)
            rng = np.random.default_rng((seed, first))
            x = rng.standard_normal((len(row), self.dims), np.float32) + self.centers[rng.integers(0, 2000, len(row))]
            x[1::20] = x[: len(x[1::20]) * 20 : 20] + 0.05 * x[1::20]
            number = np.where(row % 10 == 0, row // 10, row)
            words = np.stack([mixed(number, (10 * seed + i) << 40) for i in range(4)], axis=1)
            sketches = np.repeat(words.view(np.uint8), SIDE, axis=1).reshape(-1, SIDE, SIDE)
            labels = np.full(len(row), -1, np.int32)
            yield Batch(quantized(x), labels, words.view(np.uint8), words[:, 0], sketches, [""] * len(row))


@contextlib.contextmanager
def synthetic(dims: int, heap: int, asked: int, tell: Callable[[str], None]) -> Iterator[None]:
    """Within it `stages.run` has such sets, "heap" and others, and vectors."""
    opened = mock.patch.object(
        stages.curated, "open_any", lambda how: Synthetic(how["name"], heap if how["name"] == "heap" else asked)
    )
    embedder = mock.patch.object(stages.Stages, "opened_embedder", lambda *_: Drawn(dims))
    with opened, embedder, mock.patch.object(stages, "tell", tell):
        yield


def next_ones(rows: Rows, found: Any, own: np.ndarray, probed: Any, k: int) -> tuple[neighbors.Nearest, int]:
    """In place of `neighbors.within_cells`. Of twenty images the first is near the second."""
    ids = (own[:, None] + np.arange(1, k + 1, dtype=np.int32)) % rows.shape[0]
    alike = np.where((own[:, None] % 20 == 0) & (np.arange(k) == 0), 0.99, 0.5)
    return neighbors.Nearest(ids.astype(np.int32), alike.astype(np.float32)), len(own)


def peak() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(_: list[str]) -> None:
    given = flags.FLAGS
    config = load_config("curate").unlock()
    config.update(uncurated="heap", curated="good", evaluation="test", select=given.select)
    config.neighbors.update(exact=1, cells=given.cells, probes=1, k=8, sample=100)
    config.dedup.update(threshold=0.95, by="vectors")
    config.balance.update(clusters=(given.cells, 50), points=(10, 5), rounds=2, iterations=3, images=given.rows // 10)
    begin, before = time.monotonic(), peak()

    def told(line: str) -> None:
        more = f"{peak() / 2**20:7,.0f} MiB, {(peak() - before) / given.rows:6,.0f} bytes a row above the start"
        print(f"{time.monotonic() - begin:6.0f} s, {more}; then {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patched:
        patched.enter_context(synthetic(given.width, given.rows, given.asked, told))
        if not given.search:
            patched.enter_context(mock.patch.object(neighbors, "within_cells", next_ones))
        stages.run(config, Path(folder))
        told("the end")


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 100_000, "Images.")
    flags.DEFINE_integer("width", 64, "Of a vector.")
    flags.DEFINE_enum("select", "retrieve", ["retrieve", "balance", "all"], "See configs/curate.py.")
    flags.DEFINE_integer("asked", 100, "Curated images.")
    flags.DEFINE_integer("cells", 256, "Cells; as many clusters.")
    flags.DEFINE_bool("search", False, "Look for neighbors.")
    app.run(main)
