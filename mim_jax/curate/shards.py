"""What a stage has made: files of rows in a folder, whose name follows from what went into it.

A stage works in a folder NAME-ADDRESS.parts-LAYOUT, shard by shard; each file there is whole or absent. At the end it writes
the manifest and renames the folder to NAME-ADDRESS. So what is half done is never taken for a result, the same command goes on
after a kill, and a result that is there is used again.

ADDRESS has the digests of the inputs, the version of the stage and its settings, but not the division into shards. The digest
of a result is that of its rows, so the next stage does not see the division either.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax
import numpy as np

from mim_jax import sharding
from mim_jax.journal import named_errors, replacing, write_whole

MANIFEST = "manifest.json"
PIECE = 2**16  # rows that are read at a time
GROUP = 2**16  # rows that a Parquet file has side by side


class Made(NamedTuple):
    """A shard: rows of arrays, columns of records, and what else there is to say (JSON)."""

    arrays: Mapping[str, np.ndarray]
    records: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = {}


class Rows(Protocol):
    """Rows of an array that may be larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...

    def take(self, ids: np.ndarray) -> np.ndarray: ...  # in this order; fast if it is ascending


class Memory:
    """An array in memory as Rows."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self.array[ids]


class Subset:
    """Some rows, in the order of `ids`."""

    def __init__(self, rows: Rows, ids: np.ndarray):
        self.rows, self.ids, self.shape = rows, ids, (len(ids), *rows.shape[1:])

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.take(self.ids[start:stop])

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self.rows.take(self.ids[ids])


class Files:
    """.npy files as one array of Rows. A file is mapped only while it is read: its pages do not stay in this process."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        maps = [_mapped(file) for file in files]
        self.starts = np.cumsum([0, *map(len, maps)])
        self.shape, self.dtype = (int(self.starts[-1]), *maps[0].shape[1:]), maps[0].dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        stop = min(stop, len(self))
        result = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        for file in range(np.searchsorted(self.starts, start, "right") - 1, np.searchsorted(self.starts, stop)):
            first, last = max(start, self.starts[file]), min(stop, self.starts[file + 1])
            if first < last:
                mapped = _mapped(self.files[file])
                result[first - start : last - start] = mapped[first - self.starts[file] : last - self.starts[file]]
        return result

    def take(self, ids: np.ndarray) -> np.ndarray:
        result = np.empty((len(ids), *self.shape[1:]), self.dtype)
        where = np.searchsorted(self.starts, ids, "right") - 1
        for file in np.unique(where):
            chosen = np.flatnonzero(where == file)
            rows = ids[chosen] - self.starts[file]
            mapped = _mapped(self.files[file])
            if rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
                rows = slice(rows[0], rows[-1] + 1)
            result[chosen] = mapped[rows]
        return result

    def __len__(self) -> int:
        return self.shape[0]


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except ValueError:  # it has no rows, and nothing can be mapped
        return np.load(file)


class Result:
    """A finished stage."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, json.loads((folder / MANIFEST).read_text())
        self.digest: str = self.manifest["digest"]
        self.abouts: list[dict[str, Any]] = self.manifest["about"]

    def rows(self, name: str) -> Files:
        return Files([self.folder / f"{i:06}.{name}.npy" for i in range(self.manifest["shards"])])

    def array(self, name: str) -> np.ndarray:
        """All rows, in memory."""
        rows = self.rows(name)
        return rows.read(0, len(rows))

    def tables(self, *names: str) -> Iterator[Any]:
        """These columns of the records of one shard after the other, as pyarrow tables."""
        from pyarrow import parquet

        for i in range(self.manifest["shards"]):
            yield parquet.read_table(self.folder / f"{i:06}.parquet", columns=list(names))

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column of the records; memory holds those of a shard."""
        for table in self.tables(name):
            yield from table[name].to_pylist()


def digest_of(*values: Any) -> str:
    """16 hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Make(Protocol):
    """Makes shard i, whose files then are in `folder`; `given` is what `make` of the stage is given besides the shard."""

    def __call__(self, folder: Path, i: int, *given: Any) -> None: ...


Engine = Callable[[Path, Make, Sequence[int]], None]  # has the shards with these numbers made in a folder


def threads(workers: int, work: Path, make: Make, missing: Sequence[int]) -> None:
    """So many threads of this process make the shards."""
    mesh = sharding.current_mesh()

    def work_on(i: int) -> None:
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():  # which is that of a thread
            make(work, i)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work_on, i) for i in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


ONE_BY_ONE: Engine = functools.partial(threads, 1)


def stage(
    root: Path,
    name: str,
    version: int,
    inputs: Sequence[str],
    settings: Mapping[str, Any],
    shards: Sequence[Any],
    make: Callable[..., Made],
    engine: Engine = ONE_BY_ONE,
    tell: Callable[[str], None] = lambda line: None,
) -> Result:
    """The result of `make` on each shard, in a folder below `root`; it is made only where it is not there yet.

    Args:
      name, version, inputs, settings: what the address is made of. A stage that computes something else gets a new version.
      shards: what `make` is called with, which JSON can hold: a division of the work.
      engine: what has the shards made; it may give `make` more than the shard.
      tell: is told how far it is.

    Raises OSError, naming the path, if something cannot be written; finished shards stay.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("curation needs pyarrow: pip install 'mim_jax[curate]'")
    address = digest_of(name, version, list(inputs), dict(settings))
    folder = root / f"{name}-{address}"
    if (folder / MANIFEST).exists():
        return Result(folder)
    work = root / f"{folder.name}.parts-{digest_of(list(shards))[:8]}"
    with named_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(shards)) if not (work / f"{i:06}.json").exists()]
    tell(f"{name}: " + (f"{len(missing)} of {len(shards)} shards" if len(shards) > 1 else "under way"))
    if missing:
        engine(work, functools.partial(_make, shards, make), missing)
    for draft in work.glob("*.tmp"):  # that a kill has left
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    abouts = [json.loads((work / f"{i:06}.json").read_text()) for i in range(len(shards))]
    manifest = {
        "stage": name,
        "version": version,
        "inputs": list(inputs),
        "settings": dict(settings),
        "shards": len(shards),
        "digest": _digest(work, len(shards)),
        "about": abouts,
    }
    with named_errors(work):
        write_whole(work / MANIFEST, json.dumps(manifest, indent=1).encode())
        work.rename(folder)
        _sync(root)
    for other in root.glob(f"{folder.name}.parts-*"):  # of another division, which was not finished
        shutil.rmtree(other, ignore_errors=True)
    with contextlib.suppress(AttributeError, OSError):  # of a C library without it
        ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps what the stage had
    return Result(folder)


def _make(shards: Sequence[Any], make: Callable[..., Made], folder: Path, i: int, *given: Any) -> None:
    made = make(shards[i], *given)
    with named_errors(folder):
        for name, array in made.arrays.items():
            with replacing(folder / f"{i:06}.{name}.npy") as file:
                np.save(file, array)
        if made.records is not None:
            with replacing(folder / f"{i:06}.parquet") as file:
                write_parquet(file, [made.records])
        write_whole(folder / f"{i:06}.json", json.dumps(dict(made.about), sort_keys=True).encode())  # last: now it is whole


def write_parquet(file: BinaryIO, parts: Iterable[Mapping[str, Any]]) -> None:
    """Records, part after part and each column by column, as a file whose bytes follow from them, not from their division.
    Memory holds GROUP of them, as Arrow does, and a part of them."""
    from pyarrow import parquet

    with contextlib.ExitStack() as opened:
        writer = None
        for group in _groups(parts):
            writer = writer or opened.enter_context(parquet.ParquetWriter(file, group.schema, use_dictionary=False))
            writer.write_table(group)


def _groups(parts: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Of GROUP rows each, but for the last one, as pyarrow tables whose columns are in one piece: pages follow from pieces."""
    import pyarrow

    waiting: list[Any] = []
    for part in parts:
        table = pyarrow.table(dict(part))
        while (room := GROUP - sum(map(len, waiting))) < len(table):
            waiting.append(table.slice(0, room))
            table = table.slice(room)
            yield _in_one_piece(waiting)
        waiting.append(table)
    yield _in_one_piece(waiting)


def _in_one_piece(tables: list[Any]) -> Any:
    """Takes the tables out of the list; so only one column is in memory twice."""
    import pyarrow

    left, made = pyarrow.concat_tables(tables), {}
    tables.clear()
    for name in left.column_names:
        made[name] = left[name].combine_chunks()
        left = left.drop_columns(name)
    return pyarrow.table(made)


def _digest(work: Path, shards: int) -> str:
    """Of the rows, array by array and column by column, however they are divided."""
    from pyarrow import parquet

    digest = hashlib.sha256()
    for name in sorted(path.name.partition(".")[2] for path in work.glob("000000.*.npy")):
        digest.update(name.encode())
        rows = Files([work / f"{i:06}.{name}" for i in range(shards)])
        for start in range(0, len(rows), PIECE):
            digest.update(rows.read(start, start + PIECE).tobytes())
    if (work / "000000.parquet").exists():
        for name in parquet.read_schema(work / "000000.parquet").names:
            digest.update(name.encode())
            for i in range(shards):
                values = parquet.read_table(work / f"{i:06}.parquet", columns=[name])[name].to_pylist()
                digest.update("".join(f"{value!r}\0" for value in values).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _sync(folder: Path) -> None:
    """Puts names of a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def spans(count: int, rows: int) -> list[tuple[int, int]]:
    """[start, stop) of each shard of so many rows."""
    return [(start, min(start + rows, count)) for start in range(0, count, rows)]
