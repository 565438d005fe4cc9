"""From a source to batches of uint8 images on a canvas, with Grain.

The stream of examples is a pure function of (seed, position): each epoch is a new permutation of the source, epochs
follow each other without a gap, and batch b holds the positions [b * batch_size, (b + 1) * batch_size). It depends
neither on the number of processes, threads or workers, nor on where it was entered, so there is nothing to checkpoint.
Nothing is dropped: a batch may hold the end of one epoch and the beginning of the next.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence, Sized

import grain
import numpy as np
from absl import flags, logging

from mim_jax.data import decode
from mim_jax.data.sources import ArraySource, Source

MAX_SUBSTITUTES = 100

Batch = dict[str, np.ndarray]
OnBad = Callable[[int, str], None]
DrawMasks = Callable[[np.ndarray], Batch]


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    canvas: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    masks: DrawMasks | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Batch]:
    """Endless batches of process p: rows `[p * b, (p + 1) * b)` of each global batch, `b = batch_size / process_count`.

    Args:
      seed: of the order, in [0, 2**32).
      batch_size: global; must be divisible by `process_count`.
      canvas: side of the square every image is placed on, in pixels; larger images are reduced to fit.
      start: number of the first batch; to resume, the number of steps done.
      workers: processes that decode; 0 decodes in threads of this process.
      masks: positions int64 [b] in the stream -> masks by name, each bool [b, crops, N]; drawn where the images are decoded.
      on_bad: called in this process with (row, name) each time a bad image is met; by default, each is logged once.

    Yields:
      "image" uint8 [b, canvas, canvas, 3], the picture at the top left and zeros around it; "size" int32 [b, 2], its
      height and width; "label" int32 [b], -1 when unknown; "index" int32 [b], the row in the source; and the `masks`.

    Raises:
      ValueError: a bad argument (at once), or MAX_SUBSTITUTES bad images in a row (while iterating).
    """
    if batch_size % process_count:
        raise ValueError(f"The batch size {batch_size} must be divisible by the number of processes {process_count}.")
    rows = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    size = batch_size // process_count
    blocks = rows.batch(size, drop_remainder=True)  # Of an endless stream: nothing to drop.

    def make(block: int, rows: np.ndarray) -> Batch:
        batch = load(source, rows, canvas)
        return batch if masks is None else batch | masks(block * size + np.arange(size))

    batches = blocks.map_with_index(make)[process_index::process_count][start:]
    if workers == 0:
        iterator = batches.to_iter_dataset(_read_options(source))
    else:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which nobody parses in a notebook.
            flags.FLAGS.mark_as_parsed()
        one_at_a_time = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        iterator = one_at_a_time.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return _name_bad(iterator, source, on_bad or log_once())


def choose(source: Sized, count: int, seed: int) -> np.ndarray:
    """`count` distinct rows of a source chosen by `seed` (all, if it has fewer), int32, in random order."""
    return np.array(list(grain.MapDataset.range(len(source)).seed(seed).shuffle()[:count]), np.int32)


def eval_batches(
    source: Source,
    rows: np.ndarray,
    *,
    canvas: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    on_bad: OnBad | None = None,
) -> Iterator[Batch]:
    """The given rows in their order, once: process p decodes its share of each global batch, as in `train_batches`.

    Yields:
      The batch of `train_batches`, and "place" int32 [b], where in `rows` each image is. The last batch is filled up with
      its last image, so that all have one size.
    """
    if batch_size % process_count:
        raise ValueError(f"The batch size {batch_size} must be divisible by the number of processes {process_count}.")
    places = np.minimum(np.arange(-(-len(rows) // batch_size) * batch_size, dtype=np.int32), len(rows) - 1)
    places = places.reshape(-1, process_count, batch_size // process_count)[:, process_index]
    batches = grain.MapDataset.range(len(places)).map(
        lambda number: load(source, rows[places[number]], canvas) | {"place": places[number]}
    )
    return _name_bad(batches.to_iter_dataset(_read_options(source)), source, on_bad or log_once())


def load(source: Source, rows: Sequence[int] | np.ndarray, canvas: int) -> Batch:
    """One batch of the given rows of a source, each bad image replaced by the first good one of its substitutes.

    Returns:
      The batch of `train_batches`, and "drawn" int32 [b]: the rows asked for, which differ from "index" where bad.
    """
    rows = np.asarray(rows, np.int32)
    images = np.zeros((len(rows), canvas, canvas, 3), np.uint8)
    size, label, index = np.zeros((len(rows), 2), np.int32), np.zeros_like(rows), np.zeros_like(rows)
    if isinstance(source, ArraySource) and max(source.images.shape[1:3]) <= canvas:  # The loop's result, much faster.
        size[:] = height, width = source.images.shape[1:3]
        images[:, :height, :width] = source.images[rows]
        label[:], index[:] = source.labels[rows], rows
    else:
        for i, row in enumerate(rows):
            index[i], image, label[i] = _first_good(source, int(row), canvas)
            size[i] = height, width = image.shape[:2]
            images[i, :height, :width] = image
    return {"image": images, "size": size, "label": label, "index": index, "drawn": rows}


def candidates(row: int, length: int) -> Iterator[int]:
    """The row, then its substitutes in the order they are tried: spread over the source, always the same."""
    yield row
    yield from (int(word) % length for word in np.random.SeedSequence(row).generate_state(MAX_SUBSTITUTES))


def _first_good(source: Source, row: int, canvas: int) -> tuple[int, np.ndarray, int]:
    for candidate in candidates(row, len(source)):
        try:
            example = source[candidate]
            return candidate, decode.decode(example.image, canvas), example.label
        except (decode.BadImage, OSError) as error:
            last = f"{source.name(candidate)}: {error}"
    raise ValueError(f"{MAX_SUBSTITUTES} images in a row are bad in {source.description}. The last: {last}")


def _name_bad(batches: Iterator[Batch], source: Source, on_bad: OnBad) -> Iterator[Batch]:
    """Passes the batches on and names their bad images, here because workers cannot: what they met can be derived."""
    for batch in batches:
        for drawn, used in zip(batch.pop("drawn").tolist(), batch["index"].tolist(), strict=True):
            for row in itertools.takewhile(used.__ne__, candidates(drawn, len(source))):
                on_bad(row, source.name(row))
        yield batch


def log_once() -> OnBad:
    """Logs each bad image the first time that it is met."""
    seen = set()

    def log(row: int, name: str) -> None:
        if row not in seen:
            seen.add(row)
            logging.warning("Bad image, replaced by another one: %s", name)

    return log


def _read_options(source: Source) -> grain.ReadOptions:
    # Each thread makes a whole batch. Images in memory are only copied, for which one thread is enough.
    threads = 1 if isinstance(source, ArraySource) else min(16, os.cpu_count() or 1)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
