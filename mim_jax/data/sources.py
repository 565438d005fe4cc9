"""Sources of images with random access: CIFAR-10, a folder of images, or a TFDS data set. No TensorFlow."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np

from mim_jax import storage

SAMPLED = 64  # rows that a fingerprint and a survey read
OFTEN_MEANT = {"cifar10": "cifar10", "cifar": "cifar10", "imagenet": "imagenet2012", "imagenet1k": "imagenet2012"}
OFTEN_MEANT |= dict.fromkeys(("folder", "imagefolder", "images", "directory"), "folder")
PLACE = r"-?\d+(?:_\d+)*%?"
SLICE = re.compile(rf"([^\[\]]+)\[({PLACE})?:({PLACE})?\]")


class Example(NamedTuple):
    """One row of a source."""

    image: bytes | np.ndarray  # encoded bytes, or uint8 [h, w, c]
    label: int  # -1 if unknown


class Source(Protocol):
    """Images with random access. `source[row]` may raise OSError; a broken image is noticed when it is decoded."""

    @property
    def num_classes(self) -> int: ...  # 0: the images have no labels

    @property
    def classes(self) -> Sequence[str]: ...  # names of the labels, if they have any

    @property
    def description(self) -> str: ...  # which data this is, in one line

    @property
    def notes(self) -> Sequence[str]: ...  # how the data was understood, and what was left out: lines for the start of a run

    @property
    def fingerprint(self) -> str: ...  # 16 hex digits, the same wherever the data lies; reads a few images

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...

    def name(self, row: int) -> str: ...  # a path, or a place in the data set, as `shown`; reads nothing


def open_source(name: str, data_dir: str | os.PathLike | None = None, split: str = "train") -> Source:
    """Opens a source by name.

    Args:
      name: "cifar10" (fetched on first use), "folder", "curated" (a list that `mim_jax.curate` has made), or a prepared TFDS
        data set such as "imagenet2012", "name/config" or "name:1.0.0".
      data_dir: for "folder" the folder of images; for "curated" that of the list; for "cifar10" the cache, by default
        $MIM_JAX_CACHE or mim_jax in the user's cache; for TFDS the folder of all data sets, by default $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      split: "train", "test", ..., or a slice of one in the syntax of TFDS: "train[:90%]", "train[-5000:]". The rules of a
        folder: `folder.open_folder`.

    A slice counts places in a fixed order. For CIFAR-10 and folders it is random and has every class in proportion, see
    `mixed_order`. For TFDS it is that of the data set, which TFDS has shuffled; a random one if it has not. Percentages are
    rounded to the nearest image.

    Raises FileNotFoundError if there is no such data, OSError if it cannot be read or fetched, and ValueError if it has no such
    split or slice, or no images.
    """
    return _part(*_cut(split, functools.partial(_open_whole, name, data_dir)))


def open_splits(name: str, data_dir: str | os.PathLike | None, split: str, eval_split: str) -> tuple[Source, Source]:
    """The images to train on and those to measure on, as by `open_source`. Raises ValueError also for two slices that have
    images in common, unless they are the same: Evaluation divides it."""
    opened = functools.cache(functools.partial(_open_whole, name, data_dir))
    (whole, places), (other, others) = (_cut(each, opened) for each in (split, eval_split))
    common = min(places.stop, others.stop) - max(places.start, others.start)
    if whole.description == other.description and places != others and common > 0:
        raise ValueError(
            f"data.split={split} and data.eval_split={eval_split} have {common:,} images in common: what is measured on them "
            "would be flattered. Choose slices without common images."
        )
    return _part(whole, places), _part(other, others)


def _cut(split: str, opened: Callable[[str], Any]) -> tuple[Any, range]:
    """The whole of the split that is sliced, which `opened` opens, and the places of the slice in it."""
    match = SLICE.fullmatch(split)
    if match is None and re.search(r"[\[\]]", split):
        raise ValueError(f'the split {split!r} is no slice, such as "train[:90%]", "train[90%:]" or "train[:45000]"')
    whole = opened(match[1] if match else split)
    return whole, _places(split, match[2], match[3], len(whole)) if match else range(len(whole))


def _places(split: str, first: str | None, end: str | None, count: int) -> range:
    """What `split`, a slice from `first` to before `end`, is of `count` images."""

    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number, full = (int(text[:-1]), 100) if text.endswith("%") else (int(text), count)
        if abs(number) > full:
            raise ValueError(f"the split {split!r} goes beyond its {count:,} images")
        number += full * text.startswith("-")
        return (number * count + 50) // 100 if text.endswith("%") else number

    places = range(place(first, 0), place(end, count))
    if not places:
        raise ValueError(f"the split {split!r} has no images: it would begin at {places.start:,} and end at {places.stop:,}")
    return places


def _part(whole: Any, places: range) -> Source:
    return whole if len(places) == len(whole) else whole.part(places)


def mixed_order(labels: np.ndarray) -> np.ndarray:
    """The order from which slices of labelled images are cut, int [N], a function of the labels [N]: random, with each class
    spread evenly over it, so that a slice has about its share of every class."""
    drawn = np.random.RandomState(0).permutation(len(labels))  # the same in all versions of NumPy
    rows = np.lexsort((drawn, labels))  # class by class
    _, first, count = np.unique(labels[rows], return_index=True, return_counts=True)
    spread = (np.arange(len(rows)) - np.repeat(first, count) + 0.5) / np.repeat(count, count)
    return rows[np.lexsort((drawn[rows], spread))]


def sliced(labels: np.ndarray, places: range) -> tuple[np.ndarray, str]:
    """The rows at these places of `mixed_order`, sorted, and a note that says so."""
    of = f"[{places.start}:{places.stop}] of {len(labels):,} images"
    note = f"{of}, cut from a fixed random order that has every class in proportion"
    return np.sort(mixed_order(labels)[places.start : places.stop]), note


def _open_whole(name: str, data_dir: str | os.PathLike | None, split: str) -> Any:
    if data_dir and storage.remote(data_dir):
        storage.absolute(data_dir)  # which refuses an address that cannot be read
        if name == "cifar10":
            raise ValueError(f"data.dir is {data_dir}, but the cache of CIFAR-10 must be a folder of this machine")
    if name == "cifar10":
        return _open_cifar10(pathlib.Path(data_dir).expanduser() if data_dir else user_cache(), split)
    if name == "folder":
        from mim_jax.data.folder import open_folder

        return open_folder(data_dir, split)
    if name == "curated":
        from mim_jax.data.curated import open_curated

        return open_curated(data_dir, split)
    return _open_tfds(name, data_dir, split)


def shown(name: str) -> str:
    """A name for a terminal, a log or a page: control characters and bytes that are no UTF-8 as escapes such as \\x1b."""
    return "".join(
        c if c.isprintable() else f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) < 0xDD00 else ascii(c)[1:-1] for c in name
    )


def sample(source: Sized, most: int = SAMPLED) -> list[int]:
    """So many evenly spaced rows, or all of fewer."""
    return np.unique(np.linspace(0, len(source) - 1, most).astype(int)).tolist()


def fingerprint(source: "Source", names: str, labels: Sequence[int] | np.ndarray) -> str:
    """16 hex digits of these names and labels, and of the images and labels of the rows of `sample`."""
    digest = hashlib.sha256(f"{len(source)} {source.num_classes} {names}".encode(errors="surrogatepass"))
    digest.update(np.asarray(labels, "<i8").tobytes())
    for row in sample(source):
        try:
            image, label = source[row]
        except OSError:  # it is a bad image for the run, too
            image, label = b"", -1
        form, content = (str((image.dtype, image.shape)), image.tobytes()) if isinstance(image, np.ndarray) else ("", image)
        digest.update(f"{label} {form} {hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()[:16]


# Images in memory: CIFAR-10, or a user's arrays.


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one size in memory. Raises ValueError for other arrays than uint8 [N, h, w, 3] or [N, h, w, 1]."""

    images: np.ndarray  # uint8 [N, h, w, 3]; or [N, h, w, 1], grey
    labels: np.ndarray  # int [N]
    num_classes: int
    description: str = "arrays in memory"
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        dtype, shape = getattr(self.images, "dtype", type(self.images).__name__), list(np.shape(self.images))
        if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8:
            what = {"f": "(images * 255).round().astype(np.uint8) of floats in 0..1", "b": "images * np.uint8(255)"}
            raise ValueError(
                f"images are {dtype} {shape}, wanted is uint8 [N, h, w, 3] with levels of 0 to 255, or [N, h, w, 1]: "
                + (
                    "move or add the axis of channels, such as images[..., None]"
                    if dtype == np.uint8
                    else what.get(getattr(dtype, "kind", ""), "scale them to 0..255 and use .astype(np.uint8)")
                )
            )
        labels = np.asarray(self.labels)
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, wanted are integers [{len(self.images)}]")
        if self.num_classes and len(labels) and not -1 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(f"labels are {labels.min()} to {labels.max()}, but there are {self.num_classes} classes")

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self, "", self.labels)

    def part(self, places: range) -> "ArraySource":
        chosen, note = sliced(self.labels, places)
        return dataclasses.replace(
            self,
            images=self.images[chosen],
            labels=self.labels[chosen],
            description=f"[{places.start}:{places.stop}] of {self.description}",
            notes=(*self.notes, note),
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Example:
        return Example(self.images[row], int(self.labels[row]))

    def name(self, row: int) -> str:
        return f"image {row} of {self.description}"


def user_cache() -> pathlib.Path:
    """Where this package keeps what it can make again: $MIM_JAX_CACHE, or `mim_jax` in the user's cache."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(os.environ.get("MIM_JAX_CACHE") or caches / "mim_jax").expanduser()


def _open_cifar10(cache: pathlib.Path, split: str) -> Source:
    from mim_jax.data import cifar10  # imports TFDS, which takes half a second: only where it is needed
    from mim_jax.data.folder import is_image

    if cache.is_dir() and any(is_image(file.name) for file in cache.iterdir()):
        raise ValueError(f"{cache} holds images, and CIFAR-10 would be fetched into it. To read them name the data set folder")
    if split not in cifar10.MD5:
        raise ValueError(f"CIFAR-10 has the splits {', '.join(cifar10.MD5)}, not {split!r}.")
    try:
        folder, images, labels, notes = cifar10.load(cache, split)
    except cifar10.FetchError as error:
        tried = " ".join(str(error).split())
        raise OSError(
            f"CIFAR-10 could not be fetched ({tried}). With a network this works by itself, once; without one, train on a "
            "folder of images: --config.data.name=folder --config.data.dir=FOLDER"
        ) from error
    except OSError as error:
        raise OSError(f"Cannot keep CIFAR-10 in {cache} ({error}). Set MIM_JAX_CACHE to a writable folder.") from error
    return ArraySource(
        images=images,
        labels=labels.astype(np.int32),
        num_classes=len(cifar10.CLASSES),
        description=f"CIFAR-10 {split} ({len(images):,} images of 32 x 32), {folder}",
        classes=cifar10.CLASSES,
        notes=notes,
    )


# TFDS.


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """A prepared TFDS data set with the features "image" and, if it has labels, "label"."""

    data: Any  # TFDS data source: random access to dicts of features
    dataset: str
    split: str
    classes: Sequence[str]
    rows: Sequence[int] | np.ndarray  # of `data`
    shuffled: bool = True  # when it was prepared
    far: bool = False  # at an address: it takes a while until an image comes
    notes: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def description(self) -> str:
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no labels"
        return f"TFDS {self.dataset}, {self.split} ({len(self):,} images, {classes})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the labels it has only those of the rows that are read: to read all takes minutes."""
        return fingerprint(self, self.dataset, ())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        example = self.data[int(self.rows[row])]
        return Example(example["image"], int(example["label"]) if self.num_classes else -1)

    def name(self, row: int) -> str:
        return f"row {row} of {self.dataset}, {self.split}"

    def part(self, places: range) -> "TfdsSource":
        split = f"{self.split}[{places.start}:{places.stop}]"
        chosen = places if self.shuffled else np.sort(mixed_order(np.zeros(len(self)))[places.start : places.stop])
        note = f"{split}, cut from {'the order of the data set' if self.shuffled else 'a fixed random order'}"
        return dataclasses.replace(self, split=split, rows=chosen, notes=(*self.notes, note))


def _open_tfds(name: str, data_dir: str | os.PathLike | None, split: str) -> Source:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    data_dirs = [str(folder) for folder in file_utils.list_data_dirs(data_dir)]
    how = (
        f"Prepare it where TensorFlow is installed with `tfds build {name} --data_dir={data_dirs[0]} "
        "--file_format=array_record`, or try `--config=configs/dino.py:demo`, which needs no preparation."
    )
    try:  # from files only: the data set's own code might download
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ValueError as error:  # DatasetNotFoundError is one, and so is that of a name that none can have
        meant = OFTEN_MEANT.get(re.sub("[^a-z0-9]", "", name.lower()), "folder" if os.path.isdir(name) else None)
        where = " with --config.data.dir=FOLDER" if meant == "folder" else ""
        hint = f"Did you mean --config.data.name={meant}{where}? " if meant else ""
        raise FileNotFoundError(f"{hint}There is no TFDS data set {name!r} in {', '.join(data_dirs)}. {how}") from error
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"TFDS {name!r} has no feature 'image', only {sorted(features)}.")
    if split not in builder.info.splits:
        raise ValueError(f"TFDS {name!r} has the splits {', '.join(builder.info.splits)}, not {split!r}.")
    encoded = isinstance(features["image"], tfds.features.Image)
    try:  # undecoded: decode.py handles broken and unusual images
        decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        data = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(f"TFDS {name!r} in {builder.data_dir} is not in a random-access format. {how}") from error
    classes = getattr(features["label"], "names", ()) if "label" in features else ()
    shuffled, far = not builder.info.disable_shuffling, storage.remote(builder.data_dir)
    return TfdsSource(data, builder.info.full_name, split, classes, range(len(data)), shuffled, far)
