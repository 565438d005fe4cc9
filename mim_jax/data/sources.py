"""Sources of images with random access: CIFAR-10, a folder of images, or a TFDS data set. No TensorFlow."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val", "validation", "test")


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

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...

    def name(self, row: int) -> str: ...  # a path, or a place in the data set; reads nothing


def open_source(name: str, data_dir: str | os.PathLike | None = None, split: str = "train") -> Source:
    """Opens a source by name.

    Args:
      name: "cifar10" (fetched on first use), "folder", or a prepared TFDS data set such as "imagenet2012", "name/config" or
        "name:1.0.0".
      data_dir: for "folder" the folder of images; for "cifar10" the cache, by default $MIM_JAX_CACHE or mim_jax in the user's
        cache; for TFDS the folder of all data sets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      split: "train", "test", ...; for TFDS also sub-splits such as "train[:90%]".

    Raises FileNotFoundError if there is no such data, and ValueError if it has no such split or no images.
    """
    if name == "cifar10":
        return _open_cifar10(pathlib.Path(data_dir).expanduser() if data_dir else _cache(), split)
    if name == "folder":
        return _open_folder(data_dir, split)
    return _open_tfds(name, data_dir, split)


# Images in memory: CIFAR-10, or a user's arrays.


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one size in memory."""

    images: np.ndarray  # uint8 [N, h, w, 3]
    labels: np.ndarray  # int [N]
    num_classes: int
    description: str = "arrays in memory"
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Example:
        return Example(self.images[row], int(self.labels[row]))

    def name(self, row: int) -> str:
        return f"image {row} of {self.description}"


def _cache() -> pathlib.Path:
    user_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(os.environ.get("MIM_JAX_CACHE") or user_cache / "mim_jax").expanduser()


def _open_cifar10(cache: pathlib.Path, split: str) -> Source:
    import tensorflow_datasets as tfds  # takes half a second: imported only where it is needed

    from mim_jax.data import cifar10

    if split not in cifar10.MD5:
        raise ValueError(f"CIFAR-10 has the splits {', '.join(cifar10.MD5)}, not {split!r}.")
    try:
        folder = cifar10.prepare(cache)
    except cifar10.FetchError as error:
        tried = " ".join(str(error).split())
        raise OSError(
            f"CIFAR-10 could not be fetched ({tried}). With a network this works by itself, once; without one, train on a "
            "folder of images: --config.data.name=folder --config.data.dir=FOLDER"
        ) from error
    except OSError as error:
        raise OSError(f"Cannot keep CIFAR-10 in {cache} ({error}). Set MIM_JAX_CACHE to a writable folder.") from error
    data = tfds.builder_from_directory(folder).as_data_source(split)
    rows = data.__getitems__(range(len(data)))
    return ArraySource(
        images=np.stack([row["image"] for row in rows]),
        labels=np.array([row["label"] for row in rows], np.int32),
        num_classes=len(cifar10.CLASSES),
        description=f"CIFAR-10 {split} ({len(rows):,} images of 32 x 32), {folder}",
        classes=cifar10.CLASSES,
    )


# A folder of images.


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files below a folder, sorted by path."""

    root: pathlib.Path
    files: Sequence[str]  # relative to the root
    labels: np.ndarray  # int32 [N]
    classes: Sequence[str]  # empty: no labels

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def description(self) -> str:
        classes = f"{self.num_classes:,} classes" if self.classes else "no labels"
        return f"{self.root} ({len(self):,} image files, {classes})"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Example:
        return Example((self.root / self.files[row]).read_bytes(), int(self.labels[row]))

    def name(self, row: int) -> str:
        return str(self.root / self.files[row])


def _open_folder(data_dir: str | os.PathLike | None, split: str) -> Source:
    """Finds files by extension, without hidden ones, in `root/split` if the root has folders of splits, else in the root.

    If all images are in two or more sub-folders, these are the classes, in sorted order over all splits (so labels agree even
    if a split lacks a class). Otherwise the images have no labels.
    """
    root = pathlib.Path(data_dir or "").expanduser()
    if not data_dir or not root.is_dir():
        where = f"There is no folder {root.absolute()}" if data_dir else "data.dir is missing"
        raise FileNotFoundError(f"{where}: set --config.data.dir to a folder of images.")
    roots = [root / name for name in dict.fromkeys((split, *SPLITS)) if (root / name).is_dir()] or [root]
    if roots != [root]:
        root = root / split
        if root not in roots:
            raise FileNotFoundError(f"There is no split {split!r} in {root.parent.absolute()}, only {[r.name for r in roots]}.")
    files = sorted(_image_files(root))
    if not files:
        raise ValueError(f"No images below {root.resolve()}: no file ends in {', '.join(EXTENSIONS)}.")
    folders = [pathlib.PurePath(file).parts[0] if os.sep in file else "" for file in files]
    if "" in folders or len(set(folders)) < 2:
        return FolderSource(root, files, np.full(len(files), -1, np.int32), ())
    classes = sorted({entry.name for r in roots for entry in r.iterdir() if entry.is_dir() and entry.name[0] != "."})
    label = {name: i for i, name in enumerate(classes)}
    return FolderSource(root, files, np.array([label[folder] for folder in folders], np.int32), classes)


def _image_files(root: pathlib.Path) -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images = [name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        files += [os.path.relpath(os.path.join(folder, name), root) for name in images]
    return files


# TFDS.


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """A prepared TFDS data set with the features "image" and, if it has labels, "label"."""

    data: Any  # TFDS data source: random access to dicts of features
    dataset: str
    split: str
    classes: Sequence[str]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def description(self) -> str:
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no labels"
        return f"TFDS {self.dataset}, {self.split} ({len(self):,} images, {classes})"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Example:
        example = self.data[row]
        return Example(example["image"], int(example["label"]) if self.num_classes else -1)

    def name(self, row: int) -> str:
        return f"row {row} of {self.dataset}, {self.split}"


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
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(f"There is no TFDS data set {name!r} in {', '.join(data_dirs)}. {how}") from error
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"TFDS {name!r} has no feature 'image', only {sorted(features)}.")
    if split.split("[")[0] not in builder.info.splits:
        raise ValueError(f"TFDS {name!r} has the splits {', '.join(builder.info.splits)}, not {split!r}.")
    encoded = isinstance(features["image"], tfds.features.Image)
    try:  # undecoded: decode.py handles broken and unusual images
        decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        data = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(f"TFDS {name!r} in {builder.data_dir} is not in a random-access format. {how}") from error
    classes = getattr(features["label"], "names", ()) if "label" in features else ()
    return TfdsSource(data, builder.info.full_name, split, classes)
