"""From a source to batches of uint8 images on a canvas, with Grain.

The stream of examples is a pure function of (seed, position). Each epoch is a new permutation of the source, and batch b has
the positions [b * batch_size, (b + 1) * batch_size): a batch may have the end of one epoch and the start of the next. The
number of processes, threads and workers does not matter, and there is nothing to checkpoint.
"""

import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging
from PIL import Image

from mim_jax import storage
from mim_jax.data import decode, processes
from mim_jax.data.sources import ArraySource, Example, Source, sample

MAX_SUBSTITUTES = 100
NAMED = 1000  # bad images that are logged by their names
PERCENTILES = (0.1, 99.9)  # of their values, which become black and white
FAR_THREADS = 4  # of a worker that reads from an address: some wait while others decode
CONSTANT = 2.0  # images whose levels of 0..255 differ by less (a standard deviation) are nearly constant

Batch = dict[str, np.ndarray]
OnBad = Callable[[int, str], None]
DrawMasks = Callable[[np.ndarray], Batch]
Ahead = Callable[[Generator[Batch, None, None]], Iterator[Batch]]


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    canvas: int,
    start: int = 0,
    share: np.ndarray | None = None,
    workers: int | None = 0,
    masks: DrawMasks | None = None,
    on_bad: OnBad | None = None,
    levels: decode.Levels | None = None,
    max_pixels: int = decode.MAX_PIXELS,
    ahead: Ahead = iter,
) -> Generator[Batch, None, None]:
    """Endless batches, of each the rows that this process holds.

    Args:
      seed: of the order, in [0, 2**32).
      batch_size: of the global batch.
      canvas: side, in pixels, of the square on which each image is placed; larger images are reduced to fit.
      start: number of the first batch; to resume, the number of steps done.
      share: int [b], places in each global batch, see `sharding.share`; by default all.
      workers: processes that decode; 0 decodes in threads of this process. None: half as many as this process may use cores.
      masks: positions int64 [b] in the stream -> masks by name, each bool [b, crops, N]; called where images are decoded.
      on_bad: called in this process with (row, "name: reason") for each bad image; by default, each is logged once.
      levels, max_pixels: see `decode.decode`.
      ahead: how the batches are waited for, `Stop.ahead` for example; by default, in the calling thread.

    Yields:
      "image" uint8 [b, canvas, canvas, 3], with the image at the top left and zeros around it; "size" int32 [b, 2], its height
      and width; "label" int32 [b], -1 if unknown; "index" int32 [b], the row in the source; and the `masks`.

    Raises ValueError for a bad argument, and while iterating for MAX_SUBSTITUTES bad images in a row; OSError if a worker is
    killed.
    """
    rows = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    share = np.arange(batch_size) if share is None else share

    def make(number: int, part: slice = slice(None), room: Batch | None = None) -> Batch:
        positions = number * batch_size + share[part]
        drawn = [rows[position] for position in positions.tolist()]
        batch = load(source, drawn, canvas, levels, max_pixels, images=room["image"] if room else None)
        return batch if masks is None else batch | masks(positions)

    workers = max(cores() // 2, 1) if workers is None else workers
    if workers == 0:
        batches = grain.MapDataset.range(len(rows) // batch_size).map(make)[start:]
        iterator = _plain_errors(batches.to_iter_dataset(_read_options(source)))
    else:
        like = load(source, [], canvas) | (masks(share[:1]) if masks else {})
        threads = FAR_THREADS if getattr(source, "far", False) else 1
        iterator = processes.batches(make, like, len(share), start, workers, threads)
    why = functools.partial(_why, source, canvas, levels, max_pixels)
    return _report_bad(ahead(iterator), source, range(len(source)), on_bad or log_once(), why)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain_errors(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    """The batches; an error of Grain's threads as one line."""
    try:
        yield from batches
    except ValueError as error:
        raise ValueError(str(error).partition("\n-----")[0]) from error  # without what Grain adds about its traceback


def choose(source: Sized, count: int, seed: int) -> np.ndarray:
    """`count` distinct random rows of a source (all, if it has fewer), int32."""
    return np.array(list(grain.MapDataset.range(len(source)).seed(seed).shuffle()[:count]), np.int32)


def eval_batches(
    source: Source,
    rows: np.ndarray,
    *,
    canvas: int,
    batch_size: int,
    share: np.ndarray | None = None,
    on_bad: OnBad | None = None,
    levels: decode.Levels | None = None,
    max_pixels: int = decode.MAX_PIXELS,
    among: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The given rows once, in order; of each global batch this process decodes its `share`, as in `train_batches`.

    Yields batches as `train_batches`, with "place" int32 [b], the place of each image in `rows`. The last batch is padded with
    its last image. A bad image is replaced by one of `among`, by default `rows`, so that no other split gets in.
    """
    pool = rows if among is None else among
    places = np.minimum(np.arange(-(-len(rows) // batch_size) * batch_size, dtype=np.int32), len(rows) - 1)
    places = places.reshape(-1, batch_size)[:, slice(None) if share is None else share]
    batches = grain.MapDataset.range(len(places)).map(
        lambda number: load(source, rows[places[number]], canvas, levels, max_pixels, pool) | {"place": places[number]}
    )
    why = functools.partial(_why, source, canvas, levels, max_pixels)
    return _report_bad(_plain_errors(batches.to_iter_dataset(_read_options(source))), source, pool, on_bad or log_once(), why)


def load(
    source: Source,
    rows: Sequence[int] | np.ndarray,
    canvas: int,
    levels: decode.Levels | None = None,
    max_pixels: int = decode.MAX_PIXELS,
    among: Sequence[int] | np.ndarray | None = None,
    images: np.ndarray | None = None,
) -> Batch:
    """A batch, as of `train_batches`, of the given rows; a bad image is replaced by the first good one of its substitutes,
    which are rows of `among`, by default of all. "image" is `images`, whatever that holds, if it is given.

    "drawn" int32 [b] are the given rows, "index" those that are used.
    """
    rows = np.asarray(rows, np.int32)
    if images is None:
        images = np.empty((len(rows), canvas, canvas, 3), np.uint8)
    size, label, index = np.zeros((len(rows), 2), np.int32), np.zeros_like(rows), np.zeros_like(rows)
    if isinstance(source, ArraySource) and max(source.images.shape[1:3]) <= canvas:  # as the loop below, much faster
        size[:] = source.images.shape[1:3]
        _place(images, source.images[rows])
        label[:], index[:] = source.labels[rows], rows
    else:
        if getattr(source, "far", False):
            source = _Ahead(source, rows)
        for i, row in enumerate(rows):
            pool = range(len(source)) if among is None else among
            index[i], image, label[i] = _first_good(source, int(row), pool, canvas, levels, max_pixels)
            size[i] = image.shape[:2]
            _place(images[i], image)
    return {"image": images, "size": size, "label": label, "index": index, "drawn": rows}


def _place(canvas: np.ndarray, image: np.ndarray) -> None:
    """Images [..., h, w, 3] at the top left, zeros around them."""
    height, width = image.shape[-3:-1]
    canvas[..., :height, :width, :] = image
    canvas[..., height:, :, :] = 0
    canvas[..., :height, width:, :] = 0


class _Ahead:
    """A source at an address, of which the given rows are read at once: each takes a while to come."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, pool = source, concurrent.futures.ThreadPoolExecutor(storage.READS)
        self._read = {row: pool.submit(source.__getitem__, row) for row in set(rows.tolist())}
        pool.shutdown(wait=False)

    def __getitem__(self, row: int) -> Example:
        return self._read[row].result() if row in self._read else self._source[row]

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class Survey(NamedTuple):
    """What a sample of a source shows."""

    levels: decode.Levels | None  # the given ones, else measured; None where all images have 8 bits
    lines: list[str]  # what a person should know; nothing where all is usual


def survey(source: Source, canvas: int, levels: decode.Levels | None = None, max_pixels: int = decode.MAX_PIXELS) -> Survey:
    """Looks at the rows of `sources.sample`; a function of the source.

    Where some have more than 8 bits and no `levels` are given, these are the PERCENTILES of their values, of at most
    `decode.SAMPLE` values of each and of all colours together, and whole numbers if the values are. `levels` and
    `max_pixels` are those of `decode.decode`.
    """
    rows = sample(source)
    facts: list[decode.Facts] = []
    images: list[np.ndarray] = []
    bad: list[str] = []

    def each(rows: list[int], look: Callable[[bytes | np.ndarray], Any], found: list[Any]) -> list[int]:
        """Appends what `look` finds; returns the rows that it can be found of."""
        good = []
        for row in rows:
            try:
                found.append(look(source[row].image))
                good.append(row)
            except (decode.BadImage, OSError) as error:
                bad.append(f"{source.name(row)}: {error}")
        return good

    good = each(rows, lambda image: decode.look(image, max_pixels), facts)
    animated = [source.name(row) for row, fact in zip(good, facts, strict=True) if fact.frames > 1]
    deep = [fact.values for fact in facts if fact.values is not None]
    given, values = levels, np.concatenate(deep or [np.zeros(0)])
    if values.size and levels is None:
        levels = _measured(values)
    each(good, lambda image: decode.decode(image, canvas, levels, max_pixels), images)

    of, lines = f"of {len(rows)} sampled images", []
    if levels is not None and values.size:
        clipped = np.mean((values < levels[0]) | (values > levels[1]))
        measured = f"measured on them (percentiles {PERCENTILES}; data.levels sets others)"
        how = measured if given is None else "as data.levels says"
        lines.append(
            f"{len(deep)} {of} have more than 8 bits: their values {levels[0]:.12g} to {levels[1]:.12g} become 0 to 255, {how};"
            f" {clipped:.1%} lie outside and are clipped"
            + f"; the other {len(facts) - len(deep)} have 8 bits and stay as they are"
            * (len(deep) < len(facts))
        )
    elif given is not None:
        lines.append(f"data.levels is not used: none {of} has more than 8 bits")
    if animated:
        lines.append(f"{len(animated)} {of} have several frames, of which only the first is read, such as {animated[0]}")
    if bad:
        lines.append(f"{len(bad)} {of} are bad, such as {bad[0]}")
    return Survey(levels, lines + _constancy(images))


def _measured(values: np.ndarray) -> decode.Levels:
    """The percentiles; the extremes where those are equal, as of a few bright spots on black."""
    black, white = np.percentile(values.astype(np.float64), PERCENTILES).tolist()
    if white <= black:
        black, white = float(values.min()), float(values.max())
    if values.dtype.kind in "iu":
        black, white = math.floor(black), math.ceil(white)
    return black, white if white > black else black + 1


def _constancy(images: list[np.ndarray]) -> list[str]:
    """Lines about images that hardly differ, within themselves or from each other."""
    lines = []
    if images and (within := float(np.median([image.std(axis=(0, 1)).mean() for image in images]))) < CONSTANT:
        lines.append(
            f"the images are nearly constant: within one the levels of 0 to 255 have a standard deviation of {within:.2g}"
        )
    if len(images) > 1:
        small = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX), np.float32) for image in images]
        if (among := float(np.std(small, axis=0).mean())) < CONSTANT:
            lines.append(f"the images hardly differ from each other: their levels have a standard deviation of {among:.2g}")
    return lines


def candidates(row: int, among: Sequence[int] | np.ndarray) -> Iterator[int]:
    """The row, then its substitutes in the order in which they are tried; a function of the row and of `among`."""
    yield row
    yield from (int(among[int(word) % len(among)]) for word in np.random.SeedSequence(row).generate_state(MAX_SUBSTITUTES))


def _first_good(
    source: Source, row: int, among: Sequence[int] | np.ndarray, canvas: int, levels: decode.Levels | None, max_pixels: int
) -> tuple[int, np.ndarray, int]:
    for candidate in candidates(row, among):
        try:
            example = source[candidate]
            return candidate, decode.decode(example.image, canvas, levels, max_pixels), example.label
        except (decode.BadImage, OSError) as error:
            last = f"{source.name(candidate)}: {error}"
    raise ValueError(f"{MAX_SUBSTITUTES} images in a row are bad in {source.description}. The last: {last}")


def _why(source: Source, canvas: int, levels: decode.Levels | None, max_pixels: int, row: int) -> str:
    try:
        decode.decode(source[row].image, canvas, levels, max_pixels)
    except (decode.BadImage, OSError) as error:
        return str(error)
    return "it could not be read"  # and now it can


def _report_bad(
    batches: Iterable[Batch],
    source: Source,
    among: Sequence[int] | np.ndarray,
    on_bad: OnBad,
    why: Callable[[int], str],
) -> Generator[Batch, None, None]:
    """The batches without "drawn"; `on_bad` is called for their bad images, in this process and not in the workers."""
    why = functools.lru_cache(NAMED)(why)
    for batch in batches:
        drawn, index = batch.pop("drawn"), batch["index"]
        for place in np.flatnonzero(drawn != index):
            for row in itertools.takewhile(int(index[place]).__ne__, candidates(int(drawn[place]), among)):
                on_bad(row, f"{source.name(row)}: {why(row)}")
        del drawn, index
        yield batch
        del batch  # it is not held here while the next one is made


def log_once() -> OnBad:
    """An `on_bad` that logs each bad image once, and no more than NAMED of them."""
    seen = set[int]()

    def log(row: int, name: str) -> None:
        if row not in seen and len(seen) < NAMED:
            seen.add(row)
            logging.warning("Bad image, replaced by another one: %s", name)

    return log


def _read_options(source: Source) -> grain.ReadOptions:
    # each thread makes a whole batch; images in memory are only copied, for which one thread is enough
    threads = 1 if isinstance(source, ArraySource) else min(16, os.cpu_count() or 1)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
