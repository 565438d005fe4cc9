"""Folders of images as people have them: links, splits, wrappers, leftovers, names, and what must never be read."""

import os
import re
import socket

import numpy as np
import pytest

from mim_jax.data import folder, pipeline, sources


def make(root, *names, count=3):
    """Files below the root; for a name that ends in "/" a folder of `count` images."""
    for name in names:
        for file in [f"{name}{i}.png" for i in range(count)] if name.endswith("/") else [name]:
            path = os.path.join(root, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as written:
                written.write(os.path.basename(file).encode(errors="surrogateescape"))
    return root


def open_folder(root, split="train"):
    return sources.open_source("folder", root, split)


def summary(root, split="train"):
    """(number of images, classes, labels that occur)"""
    source = open_folder(root, split)
    return len(source), source.classes, sorted(set(source.labels.tolist()))


def note(source, start):
    """What the only note with this start says."""
    (found,) = (line.removeprefix(start) for line in source.notes if line.startswith(start))
    return found


TWO = ["cat", "dog"], [0, 1]
NO_LABELS = [], [-1]


# Splits


def test_a_class_may_be_named_like_a_split(tmp_path):
    make(tmp_path, "bus/", "car/", "train/")
    for split in "train", "test":
        assert summary(tmp_path, split) == (9, ["bus", "car", "train"], [0, 1, 2])
    assert note(open_folder(tmp_path), "a class, not a split") == ", since others beside it are classes: train"
    assert note(open_folder(tmp_path, "test"), "no folders of splits in ") == f"{tmp_path}: 'test' is all of it"
    assert not any(line.startswith("no folders") for line in open_folder(tmp_path).notes)


@pytest.mark.parametrize("train", ["Train", "training", "TRAIN", "train2017", "train_images", "training_set"])
@pytest.mark.parametrize("asked, test", [("test", "Test"), ("testing", "test1"), ("validation", "valid"), ("val", "dev")])
def test_splits_in_any_case_and_by_any_word(tmp_path, train, asked, test):
    make(tmp_path, f"{train}/cat/", f"{train}/dog/", f"{test}/cat/", f"{test}/dog/9.png")
    assert summary(tmp_path) == (6, *TWO)
    assert summary(tmp_path, asked) == (4, *TWO)
    assert f"'train' is {train}" in note(open_folder(tmp_path), "splits in ")


def test_a_split_that_is_not_there(tmp_path):
    make(tmp_path, "splits/train/cat/", "splits/valid/cat/", "plain/cat/", "plain/dog/")
    for split in "test", "tset", "tset[:50%]":
        with pytest.raises(FileNotFoundError, match="only 'train', 'valid'"):
            open_folder(tmp_path / "splits", split)
    for split in "tset", "tset[:50%]", "cat":
        with pytest.raises(ValueError, match="no folders of splits"):
            open_folder(tmp_path / "plain", split)


def test_held_out_images_alone_are_not_trained_on(tmp_path):
    make(tmp_path, "val/cat/", "val/dog/")
    with pytest.raises(FileNotFoundError, match="only 'val'"):
        open_folder(tmp_path)


def test_beside_two_splits_every_folder_is_one(tmp_path):
    make(tmp_path, "train/cat/", "train/dog/", "test/cat/", "test/dog/", "extra/", "0.png")
    source = open_folder(tmp_path)
    assert summary(tmp_path) == (6, *TWO) and summary(tmp_path, "extra") == (3, *NO_LABELS)
    assert "extra (3 images)" in note(source, "splits in ") and note(source, "left out: ").endswith("beside folders: 0.png")


def test_two_folders_for_one_word(tmp_path):
    make(tmp_path, "train2014/", "train2017/", "val/")
    with pytest.raises(ValueError, match=r"'train' may be any of train2014, train2017"):
        open_folder(tmp_path)
    assert len(open_folder(tmp_path, "train2014")) == 3


def test_splits_inside_of_classes_are_refused(tmp_path):
    make(tmp_path, "cat/train/", "cat/test/", "dog/train/", "dog/test/")
    with pytest.raises(ValueError, match="inside of the classes: cat/test. Move them above, as test/cat"):
        open_folder(tmp_path)


# Labels


@pytest.mark.parametrize("test", ["test/", "test/unknown/", "test/cat/"])
def test_a_split_without_classes_has_no_labels(tmp_path, test):
    make(tmp_path, "train/cat/", "train/dog/", test)
    assert summary(tmp_path) == (6, *TWO) and summary(tmp_path, "test") == (3, *NO_LABELS)


def test_a_split_of_other_classes_has_its_own(tmp_path):
    make(tmp_path, "train/cat/", "train/dog/", "test/n01/", "test/n02/")
    assert summary(tmp_path) == (6, *TWO) and summary(tmp_path, "test") == (6, ["n01", "n02"], [0, 1])


def test_splits_that_share_classes_have_one_list(tmp_path):
    make(tmp_path, "train/cat/", "train/eel/", "test/dog/", "test/eel/", "val/x/", "val/y/")
    assert summary(tmp_path) == (6, ["cat", "dog", "eel"], [0, 2])
    assert summary(tmp_path, "test") == (6, ["cat", "dog", "eel"], [1, 2])
    assert note(open_folder(tmp_path, "test"), "classes of test") == " that the training split lacks: dog"


def test_the_same_accents_are_the_same_class(tmp_path):
    make(tmp_path, "train/caf\u00e9/", "train/x/", "test/cafe\u0301/", "test/x/")  # as Linux and as macOS write them
    assert open_folder(tmp_path).classes == open_folder(tmp_path, "test").classes == ["caf\u00e9", "x"]


def test_wrappers_are_entered(tmp_path):
    make(tmp_path, "data/images/cat/", "data/images/dog/", "data/labels/0.txt")
    assert summary(tmp_path) == (6, *TWO)
    assert note(open_folder(tmp_path), "entered").endswith("data/images/")
    make(tmp_path / "data" / "more", "train/set/cat/", "train/set/dog/", "test/cat/", "test/dog/")
    assert summary(tmp_path / "data" / "more") == (6, *TWO) == summary(tmp_path / "data" / "more", "test")


def test_few_stray_pictures_are_left_out_and_many_are_not(tmp_path):
    make(tmp_path, "cat/", "dog/", "a.png", count=5)
    source = open_folder(tmp_path)
    assert summary(tmp_path) == (10, *TWO) and note(source, "left out: ") == "1 stray picture beside folders: a.png"
    make(tmp_path, "b.png")
    assert summary(tmp_path) == (12, *NO_LABELS)
    assert note(open_folder(tmp_path), "no labels: ") == "of 12 pictures 2 lie beside the sub-folders"


def test_a_stray_picture_stays_where_there_are_no_labels(tmp_path):
    make(tmp_path, "all/", "a.png", count=20)
    assert summary(tmp_path) == (21, *NO_LABELS)


def test_numbers_spaces_and_depth(tmp_path):
    make(tmp_path, "1/x/y/", "10/", "2 b/")
    assert summary(tmp_path) == (9, ["1", "10", "2 b"], [0, 1, 2])


# Links


def test_each_image_counts_once(tmp_path):
    make(tmp_path / "elsewhere", "eel/", "0.png")
    root = make(tmp_path / "data", "a/", "b/", count=5)
    for link, target in {
        "a/back": "..", "b/back": "..", "c": "a", "a/all": "/", "b/0b.png": "../a/0.png", "loop": "loop", "gone": "nowhere",
        "e": "../elsewhere/eel", "f": "../elsewhere/eel", "a/9.png": f"{tmp_path}/elsewhere/0.png", "b/9.png": "../a/9.png",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    source = open_folder(root)
    assert len(source) == 5 + 5 + 3 + 1 and source.classes == ["a", "b", "e"]
    assert {line.removeprefix("left out: ") for line in source.notes if line.startswith("left out")} == {
        "3 links to a folder above: a/all, a/back, b/back",
        "4 links to what is read already: c/, f/, b/0b.png, ...",
        "2 broken links: gone, loop",
    }
    (tmp_path / "link").symlink_to("data")
    assert open_folder(tmp_path / "link").files == source.files


def test_links_of_a_split_to_another_one(tmp_path):
    make(tmp_path, "train/cat/", "train/dog/", "test/cat/", "test/dog/")
    (tmp_path / "test" / "dog" / "seen.png").symlink_to("../../train/dog/0.png")
    (tmp_path / "test" / "eel").symlink_to("../train/cat")
    source = open_folder(tmp_path, "test")
    assert len(source) == 6 and source.classes == ["cat", "dog"]
    assert note(source, "left out: ").startswith("2 links to what is read already")


def test_links_to_a_hidden_store_are_followed(tmp_path):
    make(tmp_path, ".store/")
    for i, name in enumerate(["cat", "dog", "dog"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"x{i}.png").symlink_to(f"../.store/{i}.png")
    assert summary(tmp_path) == (3, *TWO)


# What is never read


def test_folders_that_are_no_classes(tmp_path):
    make(tmp_path, "cat/", "dog/", "__MACOSX/", ".hidden/", "lost+found/", "cat/._0.png", "arrays/0.npy", "arrays/1.txt")
    (tmp_path / "void").mkdir()
    source = open_folder(tmp_path)
    assert summary(tmp_path) == (6, *TWO)
    assert {line.removeprefix("left out: ") for line in source.notes if line.startswith("left out")} == {
        "2 hidden files or folders: .hidden, cat/._0.png",
        "2 folders of the system: __MACOSX, lost+found",
        "2 files without the ending of an image (.npy 1, .txt 1): arrays/0.npy, arrays/1.txt",
        "1 empty folder: void/",
    }


@pytest.mark.parametrize("run", ["", "cat/", "runs/mine/"])
def test_pictures_of_a_run_are_no_images(tmp_path, run):
    make(tmp_path, "cat/", "dog/")
    before = open_folder(tmp_path).fingerprint
    make(tmp_path, *(run + name for name in ("config.json", "metrics.jsonl", "pictures/", "checkpoints/6/state/")))
    source = open_folder(tmp_path)
    assert source.fingerprint == before and source.classes == ["cat", "dog"]
    assert any("2 folders of a run" in line for line in source.notes)


def test_only_regular_files_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, "cat/", "dog/") / "cat")  # the address of a socket must be short
    os.mkfifo("pipe.png")
    os.symlink("/dev/zero", "zero.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    assert len(open_folder(tmp_path)) == 6
    assert (
        note(open_folder(tmp_path), "left out: 3 devices, pipes or sockets") == ": cat/pipe.png, cat/socket.png, cat/zero.png"
    )


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    make(tmp_path, "0.png", "1.png")
    source = open_folder(tmp_path)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(OSError, match="no regular file"):
        source[0]
    os.truncate(tmp_path / "1.png", 3 * 2**30)  # sparse
    with pytest.raises(OSError, match="3,221,225,472 bytes"):
        source[1]
    with pytest.raises(ValueError, match="100 images in a row are bad"):
        pipeline.load(source, [0, 1], 8)


@pytest.mark.parametrize("call", ["scandir", "access"])
def test_a_folder_without_permission_is_an_error(tmp_path, monkeypatch, call):
    make(tmp_path, "cat/", "dog/")
    scandir, access = os.scandir, os.access

    def denied(path):
        if path.endswith("dog/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    if call == "scandir":  # root may do everything
        monkeypatch.setattr(os, "scandir", denied)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("dog/") and access(path, mode))
    with pytest.raises(OSError, match=r"Cannot read the folder .*dog/ \(Permission denied\)"):
        open_folder(tmp_path)


def test_endings(tmp_path):
    make(tmp_path, "a.PNG", "b.jfif", "c.JPE", "d.jp2", "e.pnm", "f.apng", "g.png.txt", "h.eps", "i.pdf", "j")
    assert open_folder(tmp_path).files == ["a.PNG", "b.jfif", "c.JPE", "d.jp2", "e.pnm", "f.apng"]
    assert note(open_folder(tmp_path), "left out: 4 files").startswith(" without the ending of an image (")
    make(tmp_path / "none", "a.npy", "b.npy", "c.dcm")
    with pytest.raises(ValueError, match=r"No images below .*\(\.npy 2, \.dcm 1\)"):
        open_folder(tmp_path / "none")


def test_the_root_is_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.zip is no folder"):
        open_folder(make(tmp_path, "a.zip") / "a.zip")


# Names


def test_names_are_shown_without_control_characters(tmp_path):
    make(tmp_path, "a\nb/\x1b[31m.png", "caf\u00e9 1/\udcff.png", "caf\u00e9 1/\u202e.jpg", "x\x07.txt")
    source = open_folder(tmp_path)
    assert source.classes == ["a\\nb", "caf\u00e9 1"]
    names = [source.name(row).removeprefix(f"{tmp_path}/") for row in range(3)]
    assert names == ["a\\nb/\\x1b[31m.png", "caf\u00e9 1/\\u202e.jpg", "caf\u00e9 1/\\xff.png"]
    assert source[2].image == b"\xff.png" and len(source.fingerprint) == 16
    assert note(source, "left out: ").endswith("x\\x07.txt")
    "".join([source.description, *names, *source.notes]).encode()


# Fingerprints


def test_a_fingerprint_follows_names_labels_order_and_contents(tmp_path):
    first = make(tmp_path / "a", "cat/", "dog/", count=100)
    second = make(tmp_path / "b" / "c", "cat/", "dog/", count=100)
    print_of = lambda root: open_folder(root).fingerprint  # noqa: E731
    same = print_of(first)
    assert same == print_of(second) == print_of(tmp_path / "b") and len(same) == 16 and int(same, 16)
    (second / "cat" / "1.png").rename(second / "cat" / "1x.png")
    assert print_of(second) != same
    (second / "cat" / "1x.png").rename(second / "cat" / "1.png")
    make(second, "eel/0.png")
    assert print_of(second) != same
    os.remove(second / "eel" / "0.png")
    assert print_of(second) == same
    (second / "cat" / "0.png").write_bytes(b"another")
    assert print_of(second) != same
    (second / "cat" / "0.png").unlink()
    (second / "cat" / "0.png").mkdir()
    assert print_of(second) != same


def test_fingerprints_of_arrays():
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), np.uint8)
    labels = np.arange(100) % 7
    same = sources.ArraySource(images, labels, 7, "one").fingerprint
    assert same == sources.ArraySource(images.copy(), labels.astype(np.int32), 7, "two").fingerprint
    others = [(images[::-1], labels), (images, labels[::-1]), (images[:99], labels[:99]), (255 - images, labels)]
    assert len({same, *(sources.ArraySource(*pair, 7).fingerprint for pair in others)}) == 5


def test_a_fingerprint_reads_64_images_and_a_listing_none(tmp_path, monkeypatch):
    read = []
    source = open_folder(make(tmp_path, "cat/", "dog/", count=200))
    monkeypatch.setattr(folder.FolderSource, "__getitem__", lambda self, row: read.append(row) or sources.Example(b"", 0))
    assert source.fingerprint and source.fingerprint and len(read) == 64 and {0, 399} < set(read)


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test", "seg_pred"), ("train.X1", "train.X2", "val.X"), ("trainA", "testA")]
)
def test_names_with_words_of_splits_in_them_are_not_guessed(tmp_path, names):
    make(tmp_path, *(f"{name}/cat/0.png" for name in names))
    with pytest.raises(ValueError, match="It is not clear whether .* are splits or classes. Name splits train, val and test"):
        open_folder(tmp_path)


def test_words_in_the_names_of_classes_are_no_splits(tmp_path):
    make(tmp_path, "test_tube/0.png", "cat/0.png", "Contest/0.png")
    assert open_folder(tmp_path).classes == ["Contest", "cat", "test_tube"]


def test_many_pictures_beside_splits_are_an_error(tmp_path):
    make(tmp_path, "train/0.png", "val/0.png", "1.png", "2.png")
    with pytest.raises(ValueError, match="has 2 pictures beside its folders of splits"):
        open_folder(tmp_path)


def test_a_split_is_asked_for_by_an_exact_word(tmp_path):
    make(tmp_path, "train/0.png", "val/0.png")
    with pytest.raises(FileNotFoundError, match="no split 'train2' in .*, only 'train', 'val': set data.split and data."):
        open_folder(tmp_path, "train2")


@pytest.mark.parametrize("labels, words", [
    ([0, 1, 5], "labels are 0 to 5, but there are 3 classes"), ([0, 1], "labels are int64 [2], wanted are integers [3]"),
    ([0.0, 1.7, 2.0], "labels are float64 [3], wanted are integers [3]"),
])  # fmt: skip
def test_labels_of_arrays_are_checked(labels, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sources.ArraySource(np.zeros((3, 4, 4, 3), np.uint8), np.array(labels), 3)
