"""Features of all images of a data set, in one file.

  python -m mim_jax.embed --run=runs/dino --data=~/images --out=features.npz
  python -m mim_jax.embed --run=runs/dino --name=cifar10 --split=test --kind=cls+mean --layers=4 --out=cifar10.parquet

  --run=WORKDIR            the workdir of a run, or a file or folder of weights
  --which=student          not the teacher, of a run that has both
  --heads=6 --act=gelu     of a file of weights that does not say it; it is asked for then
  --data=FOLDER            images, by the rules of mim_jax/data/folder.py; with --name the data.dir of that data set
  --name=NAME --split=train   a data set as in the recipes: folder (the default), cifar10, or one of TFDS
  --out=FILE               .npz, .npy or .parquet; what is half done is in the folder FILE.parts beside it
  --kind=cls               cls, mean (of the patches), patch, or cls+mean, joined
  --size=224               side that the network sees, in pixels; by default that of the run
  --resize=1               side of the central square that is seen, as a share of the short side; by default that of the run, or
                           of a file's configuration, else 0.875
  --layers=4               of the last 4 blocks, joined, the oldest first
  --batch_size=256         images at a time, on all devices of a process together
  --coordinator=HOST:PORT --processes=N --process=I   several hosts that share the folder of FILE, where no cluster tells jax

Rows are in the order of the data set: of a folder, sorted by path. A bad image is named, and its row is NaN; its label is -1.
The same command goes on after a kill. It then ends with the same bytes as one that was never killed, on the same devices and
versions; a command with other settings is refused. A damaged part is named and made again. The parts and the finished file are
both on the disk for a moment. If all images are bad, no file is written.

  .npz      features float32 [N, D] (patch: [N, patches, D]), names [N], label int32 [N] if there are labels, and about
  .npy      features alone; names, label and about are in FILE.json
  .parquet  columns name, label and features, a list (patches in a row); about is the schema's metadata "mim_jax"

about is JSON: of what these are the features, and how they were made; bad: {row: name and reason}.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
import sys
import time
import traceback
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import jax
import numpy as np

import mim_jax
from mim_jax import checkpoint, cli, hosts, storage
from mim_jax.checkpoint import of_any_process
from mim_jax.cli import raised_here
from mim_jax.data import pipeline, sources
from mim_jax.data.sources import Source, shown
from mim_jax.journal import named_errors, replacing, write_whole
from mim_jax.lock import locked
from mim_jax.pretrained import Model, Readable, load
from mim_jax.stopping import leave

KINDS = ("cls", "mean", "patch", "cls+mean")
ROWS, BYTES = 2048, 2**26  # of a part, at most, or one batch: what a kill can lose, and what is in memory
EVERY = 10.0  # s between lines of progress
STOPPED = "stopped; the same command goes on from there"


@dataclasses.dataclass(frozen=True)
class Flags:
    run: str
    out: str
    data: str | None = None
    name: str = "folder"
    split: str = "train"
    kind: str = "cls"
    size: int | None = None
    layers: int = 1
    batch_size: int | None = None
    heads: int = 0
    act: str = ""
    which: Literal["", "teacher", "student"] = ""
    resize: float | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is finished of an output: a file for each of its parts, of `rows` rows. A file is there whole or not at all.

    `shape` is that of a row's features, `names` are those of all rows, `about` is what the output says of itself.
    """

    folder: Path
    total: int
    rows: int
    shape: tuple[int, ...]
    names: Sequence[str]
    labeled: bool
    about: dict[str, Any]

    @property
    def starts(self) -> range:
        """The first row of each part."""
        return range(0, self.total, self.rows)

    def file(self, start: int) -> Path:
        return self.folder / f"{start:012}.npz"

    def missing(self) -> list[int]:
        return [start for start in self.starts if not self.file(start).exists()]

    def drop_damaged(self) -> None:
        """Removes the parts that cannot be read as they were written, and names them."""
        for start in self.starts:
            count = min(self.rows, self.total - start)
            if self.file(start).exists():
                try:
                    features, label, bad = self.read(start, "features", "label", "bad")
                    if (features.shape, label.shape) != ((count, *self.shape), (count,)):
                        raise ValueError(f"{self.file(start)} is damaged: it has features {list(features.shape)}")
                    json.loads(str(bad))
                except ValueError as error:
                    tell(f"{error}; it is made again")
                    self.file(start).unlink()

    def read(self, start: int, *names: str) -> list[np.ndarray]:
        """What a part has under these names. Raises ValueError, with its file, if it is damaged."""
        try:
            with np.load(self.file(start)) as part:
                return [part[name] for name in names]
        except Exception as error:  # of broken bytes NumPy and zipfile raise almost anything
            if isinstance(error, OSError) and error.filename is not None:  # it may be whole
                raise
            raise ValueError(f"{self.file(start)} is damaged ({type(error).__name__})") from error

    def save(self, start: int, features: np.ndarray, label: np.ndarray, bad: dict[int, str]) -> None:
        content = io.BytesIO()
        np.savez(content, features=features, label=label, bad=np.array(json.dumps(bad)))
        with named_errors(self.file(start)):
            write_whole(self.file(start), content.getvalue())

    def each(self, what: str) -> Iterator[np.ndarray]:
        """ "features", "label" or "bad" of one part after the other."""
        for start in self.starts:
            yield from self.read(start, what)

    def bad(self) -> dict[str, str]:
        """row -> name and reason."""
        return {row: why for text in self.each("bad") for row, why in json.loads(str(text)).items()}

    def text(self) -> str:
        """`about`, with the bad images, as JSON."""
        return json.dumps(self.about | {"bad": self.bad()}, indent=1)


def embed(
    model: Model,
    source: Source,
    out: Path,
    kind: str = "cls",
    size: int | None = None,
    layers: int = 1,
    batch_size: int | None = None,
) -> None:
    """Writes the features of all images of a source to the file `out`, as the head of this module says.

    Of several processes each makes some of the parts, on its own devices, and the first joins them.

    Raises ValueError for settings that do not fit, for those that the parts in `FILE.parts` do not have, and if all images are
    bad; OSError if `out` is there, is being made by another process, or cannot be written.
    """
    if kind not in KINDS or out.suffix not in WRITERS:
        raise ValueError(f"kind={kind}, out={out.name}: kinds are {', '.join(KINDS)}, files end with {', '.join(WRITERS)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{out.name} cannot be written without pyarrow: pip install 'mim_jax[parquet]'")
    folder = out.with_name(f"{out.name}.parts")
    settings, begun = folder / "settings.json", [file for file in (out, beside(out)) if file.exists()]
    if begun and not settings.exists():
        raise OSError(f"{begun[0]} is there already: remove it, or give another --out")
    size, devices = model.checked(size, layers), jax.local_device_count()
    batch_size = model.batch_size(len(source), size) if batch_size is None else batch_size
    if batch_size < 1 or batch_size % devices:
        raise ValueError(f"batch_size is {batch_size}, but must be a multiple of the {devices} devices")
    survey = pipeline.survey(source, model.canvas_of(size), model.levels, model.max_pixels)
    tell(*source.notes, *survey.lines)
    shapes = model.shapes(kind.split("+"), size, layers)
    shape = (*shapes[0][:-1], sum(each[-1] for each in shapes))
    about: dict[str, Any] = {
        "network": model.description,
        "parameters": checkpoint.fingerprint(model.parts),
        "data": source.description,
        "fingerprint": source.fingerprint,
        "classes": list(source.classes),
        "shape": [len(source), *shape],
        "kind": kind,
        "size": size,
        "layers": layers,
        "resize": model.resize,
        "canvas": model.canvas_of(size),
        "levels": survey.levels and list(survey.levels),
        "batch_size": batch_size,
        "devices": f"{devices} x {jax.local_devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "mim_jax": mim_jax.__version__},
    }
    rows = batch_size * max(1, min(ROWS, BYTES // (4 * int(np.prod(shape)))) // batch_size)
    parts = Parts(folder, len(source), rows, shape, names_of(source), source.num_classes > 0, about)
    with locked(folder):
        same_settings(settings, about, fresh=not begun and not any(folder.glob("*.npz")))
        if jax.process_index() == 0:
            parts.drop_damaged()
        of_any_process("")  # now all see the same parts
        missing = parts.missing()
        of_any_process("")  # now all have looked: the first may be done at once
        if len(missing) < len(parts.starts):
            tell(f"going on: {len(parts.starts) - len(missing)} of {len(parts.starts)} parts are there")
        mine = [start for start in missing if start // rows % jax.process_count() == jax.process_index()]
        if mine:
            compute(model, Readable(source, about["canvas"], survey.levels, model.max_pixels), parts, mine)
        while parts.missing() if jax.process_index() == 0 else folder.exists():
            time.sleep(0.5)
        if jax.process_index() == 0:
            join(parts, out)


def same_settings(file: Path, about: dict[str, Any], fresh: bool) -> None:
    """Raises ValueError, in all processes, if the parts beside this file were made with other settings. If it is `fresh`, there
    are none yet."""
    if jax.process_index() == 0 and fresh:
        write_whole(file, json.dumps(about, indent=1).encode())
    of_any_process("")  # from now on it is there
    there, now = {}, json.loads(json.dumps(about))
    with contextlib.suppress(ValueError):  # if it is damaged, it has no settings
        there = json.loads(file.read_text())
    changed = [f"{key} {there.get(key)} -> {now[key]}" for key in now if there.get(key) != now[key]]
    told = f"{file.parent} has parts with other settings: {'; '.join(changed)}. Remove it, or give another --out"
    if problem := of_any_process(told if changed else ""):
        raise ValueError(problem)


def compute(model: Model, source: Readable, parts: Parts, mine: Sequence[int]) -> None:
    """Makes the parts that begin at the rows `mine`."""
    kinds = parts.about["kind"].split("+")
    size, layers, batch_size = (parts.about[name] for name in ("size", "layers", "batch_size"))
    spans = [(start, min(start + parts.rows, parts.total)) for start in mine]
    rows = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
    done, begun, told = 0, 0.0, time.monotonic()
    with jax.set_mesh(model.mesh):
        stream = model.stream(source, rows, kinds, size, layers, batch_size)
        for start, stop in spans:
            made = []
            for _ in range(start, stop, batch_size):
                made.append(next(stream))
                done, now = min(done + batch_size, len(rows)), time.monotonic()
                begun = begun or now  # the first batch is compilation
                if done > batch_size and now - told > EVERY:
                    told, speed = now, (done - batch_size) / (now - begun)
                    tell(f"{done:,} of {len(rows):,} images, {speed:,.1f} images/s, {(len(rows) - done) / speed:,.0f} s left")
            features = np.concatenate([np.concatenate([batch[kind] for kind in kinds], axis=-1) for batch in made])
            label = np.concatenate([batch["label"] for batch in made])
            bad = {row: source.bad[row] for row in range(start, stop) if row in source.bad}
            features[[row - start for row in bad]] = np.nan
            parts.save(start, features[: stop - start], label[: stop - start], bad)
    if done > batch_size:
        tell(f"{done:,} images, {(done - batch_size) / (time.monotonic() - begun):,.1f} images/s")


def join(parts: Parts, out: Path) -> None:
    """Writes the output, says which images are bad, and removes the parts: last the settings, which say what they are of.
    Raises ValueError if all images are bad."""
    bad = parts.bad()
    if len(bad) == parts.total:
        remove(parts)
        raise ValueError(f"all {parts.total:,} images are bad, nothing is written: {bad['0']}")
    with named_errors(out):
        if beside(out) != out:
            label = np.concatenate([*parts.each("label")]).tolist() if parts.labeled else None
            text = json.dumps(json.loads(parts.text()) | {"names": list(parts.names), "label": label}, indent=1)
            write_whole(beside(out), text.encode())
        with replacing(out) as file:
            WRITERS[out.suffix](file, parts)
        remove(parts)
    for row, why in list(bad.items())[: pipeline.NAMED]:
        tell(f"bad image, row {row}: {why}")
    of_these = f"; {len(bad):,} rows are NaN: their images are bad" if bad else ""
    tell(f"{out}: {parts.about['kind']}, float32 {parts.about['shape']}{of_these}")


def remove(parts: Parts) -> None:
    for start in parts.starts:
        parts.file(start).unlink()
    shutil.rmtree(parts.folder)


def beside(out: Path) -> Path:
    """The file of names, labels and `about`: the output itself where it has room for them."""
    return out.with_name(f"{out.name}.json") if out.suffix == ".npy" else out


def names_of(source: Any) -> Sequence[str]:
    """The files of a folder, relative to it; else the places in the data set."""
    return getattr(source, "files", None) or [source.name(row) for row in range(len(source))]


# The files. Their bytes follow from the parts: no date, no time.


def write_array(file: Any, shape: tuple[int, ...], dtype: Any, pieces: Iterable[np.ndarray]) -> None:
    """An array as .npy, from pieces along its first axis."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype).tobytes())


def write_npy(file: BinaryIO, parts: Parts) -> None:
    write_array(file, (parts.total, *parts.shape), np.float32, parts.each("features"))


def write_npz(file: BinaryIO, parts: Parts) -> None:
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, shape: tuple[int, ...], dtype: Any, pieces: Iterable[np.ndarray], pack: int) -> None:
            info = zipfile.ZipInfo(f"{name}.npy")  # of 1980
            info.compress_type = pack
            with archive.open(info, "w", force_zip64=True) as member:
                write_array(member, shape, dtype, pieces)

        add("features", (parts.total, *parts.shape), np.float32, parts.each("features"), zipfile.ZIP_STORED)
        pieces = (np.array(parts.names[start : start + parts.rows]) for start in parts.starts)
        # four bytes a character, most of them zeros
        add("names", (parts.total,), f"<U{max(map(len, parts.names))}", pieces, zipfile.ZIP_DEFLATED)
        if parts.labeled:
            add("label", (parts.total,), np.int32, parts.each("label"), zipfile.ZIP_STORED)
        text = np.array(parts.text())
        add("about", (), text.dtype, [text], zipfile.ZIP_DEFLATED)


def write_parquet(file: BinaryIO, parts: Parts) -> None:
    import pyarrow
    from pyarrow import parquet

    width = int(np.prod(parts.shape))
    fields = [("name", pyarrow.string()), ("label", pyarrow.int32()), ("features", pyarrow.list_(pyarrow.float32(), width))]
    fields = [field for field in fields if field[0] != "label" or parts.labeled]
    schema = pyarrow.schema(fields, metadata={"mim_jax": parts.text()})
    with parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for start, features, label in zip(parts.starts, parts.each("features"), parts.each("label")):
            names = parts.names[start : start + len(features)]
            columns = {
                "name": [name.encode(errors="backslashreplace").decode() for name in names],
                "label": label,
                "features": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), width),
            }
            writer.write_table(pyarrow.table({name: columns[name] for name, _ in fields}, schema=schema))


WRITERS = {".npz": write_npz, ".npy": write_npy, ".parquet": write_parquet}


def tell(*lines: str) -> None:
    """On standard error; the first process does."""
    if jax.process_index() == 0:
        print(*map(shown, lines), sep="\n", end="\n" if lines else "", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    given, _ = cli.begin(Flags, argv, __doc__ or "")
    try:
        out = cli.of_this_machine("out", given.out)
        if given.name == "folder" and not given.data:
            raise ValueError("--data is missing, for example --data=~/images; without a folder --name=cifar10")
        if given.data and not storage.absolute(given.data).is_dir():
            raise ValueError(f"--data is {given.data}, but there is no such folder")
        hosts.start(given.coordinator, given.processes, given.process)
        model = load(given.run, which=given.which, resize=given.resize, heads=given.heads, act=given.act)
        tell(model.description)
        source = sources.open_source(given.name, given.data, given.split)
        embed(model, source, out, given.kind, given.size, given.layers, given.batch_size)
    except KeyboardInterrupt:
        leave(130, STOPPED)
    except Exception as error:
        expected = isinstance(error, (OSError, ValueError)) and raised_here(error)
        if hosts.several():
            hosts.fail(error, f"error: {error}" if expected else traceback.format_exc())
        if not expected:
            raise
        sys.exit(f"error: {error}")
    if hosts.several():
        hosts.finish(0)


if __name__ == "__main__":
    main(sys.argv)
