"""A folder of images: which of its files are read, what its splits are, and what the labels."""

import collections
import dataclasses
import errno
import functools
import hashlib
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mim_jax import storage
from mim_jax.data.decode import read_file
from mim_jax.data.sources import Example, fingerprint, shown, sliced

ENDINGS = frozenset(
    ".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pfm .pgm .png .pnm .ppm .qoi "
    ".tga .tif .tiff .webp".split()
)
STRAY = 10  # pictures beside sub-folders are stray if at most one in so many is
NO_DATA = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # what systems leave on disks
OF_A_RUN = ("checkpoints", "pictures", "tensorboard")
KINDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val"}
KINDS |= {"test": "test", "testing": "test"}
WORD = re.compile(rf"({'|'.join(KINDS)})([-_ ]?(set|split|data|images?))?[-_ ]?\d*")

AGAIN, OTHER = "link{s} to what is read already", "file{s} without the ending of an image"

LeftOut = dict[str, list[str]]  # reason -> names, relative to the root
Images = dict[str, list[str]]  # a folder, relative to the root and with "/" at its end (the root is "") -> its images


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files below a folder, sorted by path."""

    root: pathlib.Path
    files: Sequence[str]  # relative to the root
    labels: np.ndarray  # int32 [N]
    classes: Sequence[str]  # empty: no labels
    notes: Sequence[str] = ()
    places: str = ""  # "[0:90]" of a slice

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def description(self) -> str:
        classes = f"{self.num_classes:,} classes" if self.classes else "no labels"
        return f"{shown(str(self.root))}{self.places} ({len(self):,} image files, {classes})"

    @property
    def far(self) -> bool:
        return storage.remote(self.root)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self, "\0".join(self.files), self.labels)

    @functools.cached_property
    def sizes(self) -> str:
        """16 hex digits of the sizes of all files, which tell of one that was replaced; at an address "", as it takes long."""
        if self.far:
            return ""
        found = []
        for file in self.files:
            try:
                found.append(os.stat(self.root / file).st_size)
            except OSError:  # it is a bad image
                found.append(-1)
        return hashlib.sha256(np.array(found, "<i8").tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Example:
        """Raises OSError for a file that is gone, no regular one any more, or too large."""
        return Example(read_file(self.root / self.files[row]), int(self.labels[row]))

    def name(self, row: int) -> str:
        return shown(str(self.root / self.files[row]))

    def part(self, places: range) -> "FolderSource":
        rows, note = sliced(self.labels, places)
        return dataclasses.replace(
            self,
            files=[self.files[row] for row in rows],
            labels=self.labels[rows],
            notes=(*self.notes, note),
            places=f"[{places.start}:{places.stop}]",
        )


def open_folder(data_dir: str | os.PathLike | None, split: str) -> FolderSource:
    """A folder of images, by these rules; the `notes` of the source tell what they led to.

    Files: all regular files below the folder whose names end like an image's (ENDINGS, in any case), sorted by path. Left out
    are hidden files and folders, folders of the system (NO_DATA), and what a run of mim_jax has written to its workdir. A
    folder that cannot be listed is an error.

    Links: each image counts once, where it really is. A link to what is read already is left out, and so are a link to a
    folder above, a second link to the same thing, and a broken one. A link to data elsewhere is followed.

    Wrappers: a folder that has all images is entered, again and again. "All" allows for a few stray pictures beside it, at most
    one in ten; stray pictures are left out where there are splits or labels.

    Splits: sub-folders are splits if all of them are named like one, or if at least a training and a held-out split are among
    them (then all are splits). Named like a split are train, training; val, valid, validation, dev, eval; test, testing, in any
    case, also with "set", "split", "data", "images" or a number after it. Where other names have a word of both kinds in them
    (seg_train, seg_test), it is not clear what they are: an error. A split is asked for by its folder's name or by one of
    these words. A folder without splits is read whole for any of these words, which is said: Evaluation divides it.
    Slices of either, such as "train[:90%]" and "train[90%:]", are those of `sources.open_source`.

    Labels: two or more sub-folders of the split are its classes. Splits with a class of the training split share one list of
    classes, of all of them, in sorted order. A split without such a class has a list of its own.

    Folders without images count for none of this. At an address (gs://, s3://), where there are no links, all else is the same.

    Raises FileNotFoundError if there is no such folder or split, OSError for a
    folder that cannot be read, and ValueError if there are no images or it is not clear what a split is.
    """
    root = storage.absolute(data_dir or "")
    if not data_dir or not root.is_dir():
        path = shown(str(root))
        where = f"{path} is no folder" if root.exists() else f"There is no folder {path}"
        raise FileNotFoundError(f"{where if data_dir else 'data.dir is missing'}: set --config.data.dir to a folder of images.")
    images, left = _images_below(root)
    if not images:
        others = "; ".join(_left_out(left)) or "it is empty"
        raise ValueError(f"No images below {shown(str(root))}: no file ends like one (.jpg, .png, .tif, ...); {others}.")

    notes: list[str] = []
    top, inside = _enter(images, "", to_splits=True)
    splits, where = _splits(inside), shown(str(root / top))
    if splits and _mixed(inside):
        raise ValueError(f"{where} has {inside['']:,} pictures beside its folders of splits: move them into one of these.")
    if splits:
        chosen = _choose(split, splits, where)
        bases = {name: f"{top}{name}/" for name in splits}
        counts = _some([f"{name} ({inside[name]:,} images)" for name in splits])
        notes.append(f"splits in {where}: {counts}; {split!r} is {shown(chosen)}")
    elif split.lower() in KINDS:
        _refuse_names_with_splits_in_them(inside, where)
        splits, chosen, bases = {"": "train"}, "", {"": ""}
        if KINDS[split.lower()] != "train":
            notes.append(f"no folders of splits in {where}: {split!r} is all of it")
        if alike := [name for name in inside if _kind(name)]:
            notes.append(f"a class, not a split, since others beside it are classes: {_some(alike)}")
    else:
        raise ValueError(
            f"{shown(str(root))} has no folders of splits: data.split is 'train' for all of its images, or a word such as "
            f"'validation' for the same ones, but not {split!r}."
        )

    found = {name: _classes(images, base) for name, base in bases.items()}
    start, classes = found[chosen]
    keys = {name: set(map(_key, folders)) for name, (_, folders) in found.items()}
    training = set[str]().union(*(keys[name] for name, kind in splits.items() if kind == "train"))
    labels = keys[chosen]
    if labels & training:
        if alien := sorted(labels - training):
            notes.append(f"classes of {shown(chosen)} that the training split lacks: {_some(alien)}")
        labels = set[str]().union(*(own for own in keys.values() if own & training))
    number = {key: i for i, key in enumerate(sorted(labels))}
    if classes and chosen == "":
        _refuse_splits_in_classes(images, start, shown(str(root / start)))
    if classes:
        notes.append(f"classes of {split!r}: {_some(classes)}")
    if start != bases[chosen]:
        notes.append(f"entered, as it has all the images: {shown(start)}")
    if not classes and "" in (beside := _enter(images, start)[1]) and len(beside) > 1:
        notes.append(f"no labels: of {sum(beside.values()):,} pictures {beside['']:,} lie beside the sub-folders")

    read = [folder for folder in images if folder.startswith(start) and not (classes and folder == start)]
    of_others = tuple(base for name, base in bases.items() if name != chosen)
    strays = [folder for folder in images.keys() - set(read) if not folder.startswith(of_others)]
    left["stray picture{s} beside folders"] += sorted(folder + name for folder in strays for name in images[folder])
    files = sorted(folder[len(start) :] + name for folder in read for name in images[folder])
    label = [number[_key(file.partition("/")[0])] for file in files] if classes else np.full(len(files), -1)
    return FolderSource(
        root / start, files, np.array(label, np.int32), list(map(shown, number)), tuple(notes + _left_out(left))
    )


# Which files.


def _images_below(root: pathlib.Path) -> tuple[Images, LeftOut]:
    """The images by folder, and what is left out by reason. Of regular files only the names are looked at."""
    tree = storage.tree(root) if storage.remote(root) else {}
    images: Images = collections.defaultdict(list)
    left: LeftOut = collections.defaultdict(list)
    seen: set[Any] = set()  # inodes and devices of folders
    folders, links, files = collections.deque([""]), collections.deque[str](), []
    while folders or links:
        folder = (folders or links).popleft()  # links last: an image is named by its real place
        path = os.path.join(root, folder)
        try:
            inode = path if tree else os.stat(path)[1:3]
            if inode in seen:
                left[AGAIN].append(folder)
                continue
            seen.add(inode)
            if not tree and not os.access(path, os.X_OK):  # its files could be listed, not read
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            found = sorted(_listed(path, tree), key=lambda entry: entry.name)
            if not found:
                left["empty folder{s}"].append(folder)
            names = {entry.name for entry in found}
            of_a_run = OF_A_RUN if len(names & {"config.json", "metrics.jsonl", "checkpoints"}) > 1 else ()
            for entry in found:
                name, is_link = folder + entry.name, entry.is_symlink()
                is_folder, is_file = _kinds(entry)
                if entry.name.startswith("."):
                    if is_folder or is_image(name):
                        left["hidden file{s} or folder{s}"].append(name)
                elif is_folder and entry.name in NO_DATA:
                    left["folder{s} of the system"].append(name)
                elif is_folder and entry.name in of_a_run:
                    left["folder{s} of a run of mim_jax"].append(name)
                elif is_folder and is_link and _is_above(path, entry.path, root):
                    left["link{s} to a folder above"].append(name)
                elif is_folder:
                    (links if is_link else folders).append(f"{name}/")
                elif not is_file:
                    broken = is_link and not os.path.exists(entry.path)
                    left["broken link{s}" if broken else "device{s}, pipe{s} or socket{s}"].append(name)
                elif not is_image(name):
                    left[OTHER].append(name)
                elif is_link:
                    files.append((folder, entry.name, os.path.realpath(entry.path)))
                else:
                    images[folder].append(entry.name)
        except OSError as error:
            raise OSError(f"Cannot read the folder {shown(path)} ({error.strerror}): allow it, or move it away.") from error
    targets = set()
    for folder, name, target in files:
        real = os.path.basename(target)
        is_read = is_image(real) and not real.startswith(".") and os.stat(os.path.dirname(target))[1:3] in seen
        if is_read or target in targets:
            left[AGAIN].append(folder + name)
        else:
            targets.add(target)
            images[folder].append(name)
    return images, left


def _listed(path: str, tree: Mapping[str, list[storage.Entry]]) -> list[Any]:
    if tree:
        return tree[path.rstrip("/")]
    with os.scandir(path) as entries:
        return list(entries)


def _kinds(entry: os.DirEntry[str] | storage.Entry) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is a regular file; behind a link, what it leads to."""
    try:
        return entry.is_dir(), entry.is_file()
    except PermissionError:
        raise
    except OSError:  # a link to itself
        return False, False


def _is_above(folder: str, link: str, root: pathlib.Path) -> bool:
    target = os.path.realpath(link)
    return any(os.path.commonpath([target, os.path.realpath(below)]) == target for below in (folder, root))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS


def _left_out(left: LeftOut) -> list[str]:
    lines = []
    for reason, names in left.items():
        if names:
            text = f"{len(names):,} {reason.format(s='s' if len(names) > 1 else '')}"
            if reason == OTHER:
                endings = collections.Counter(os.path.splitext(name)[1].lower() or "none" for name in names)
                text += f" ({', '.join(f'{shown(ending)} {count:,}' for ending, count in endings.most_common(6))})"
            lines.append(f"left out: {text}: {_some(names)}")
    return lines


def _some(names: Collection[str]) -> str:
    return ", ".join(map(shown, itertools.islice(names, 3))) + (", ..." if len(names) > 3 else "")


# What its sub-folders mean.


def _inside(images: Images, top: str) -> dict[str, int]:
    """The number of images in each sub-folder of `top`, and under "" of those beside them."""
    counts = collections.Counter[str]()
    for folder, names in images.items():
        if folder.startswith(top):
            counts[folder[len(top) :].partition("/")[0]] += len(names)
    return dict(sorted(counts.items()))


def _enter(images: Images, top: str, to_splits: bool = False) -> tuple[str, dict[str, int]]:
    """`top`, or the folder below it that has all images, and what is inside of it."""
    while True:
        inside = _inside(images, top)
        folders = [name for name in inside if name]
        if len(folders) != 1 or _mixed(inside) or (to_splits and _splits(inside)):
            return top, inside
        top += f"{folders[0]}/"


def _mixed(inside: Mapping[str, int]) -> bool:
    return inside.get("", 0) * STRAY > sum(inside.values())


def _kind(name: str) -> str | None:
    word = WORD.fullmatch(name.lower())
    return KINDS[word[1]] if word else None


def _splits(inside: Iterable[str]) -> dict[str, str]:
    """The kind of each sub-folder, or of an unknown split its name; empty if they are no splits."""
    kinds = {name: _kind(name) for name in inside if name}
    known = set(kinds.values()) - {None}
    if known and (None not in kinds.values() or ("train" in known and len(known) > 1)):
        return {name: kind or name for name, kind in kinds.items()}
    return {}


def _refuse_names_with_splits_in_them(inside: Iterable[str], where: str) -> None:
    words = {name: map(str.lower, re.findall("[A-Z]*[a-z]+|[A-Z]+", name)) for name in inside}
    kinds = {name: {KINDS[word] for word in found if word in KINDS} for name, found in words.items()}
    alike = [name for name, found in kinds.items() if found]
    if len(set[str]().union(*kinds.values()) & {"train", "val", "test"}) > 1 and not any(map(_kind, inside)):
        raise ValueError(
            f"It is not clear whether {_some(alike)} in {where} are splits or classes. Name splits train, val and test; if "
            "these are classes, give them names without these words."
        )


def _choose(split: str, splits: Mapping[str, str], where: str) -> str:
    """The folder of a split that is asked for by its name or by a word of its kind."""
    chosen = [name for name in splits if name == split] or [
        name for name in splits if splits[name] == KINDS.get(split.lower(), "")
    ]
    if not chosen:
        there = _some([repr(name) for name in splits])
        raise FileNotFoundError(
            f"There is no split {split!r} in {where}, only {there}: set data.split and data.eval_split to those that there are."
        )
    if len(chosen) > 1:
        raise ValueError(f"{split!r} may be any of {', '.join(map(shown, chosen))} in {where}: name one of them.")
    return chosen[0]


def _classes(images: Images, base: str) -> tuple[str, list[str]]:
    """The folder that has the folders of classes, and their names; `base` and [] if there are none."""
    start, inside = _enter(images, base)
    folders = [name for name in inside if name]
    return (start, folders) if len(folders) > 1 and not _mixed(inside) else (base, [])


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS and Linux write the same accents in different ways


def _refuse_splits_in_classes(images: Images, top: str, where: str) -> None:
    inside = collections.defaultdict[str, set[str]](set)
    for folder in images:
        if folder.startswith(top) and folder != top:
            name, _, deeper = folder[len(top) :].partition("/")
            inside[name].add(deeper.partition("/")[0])
    if all("" not in folders and len(folders) > 1 and _splits(folders) for folders in inside.values()):
        name = min(inside)
        part = shown(min(inside[name]))
        raise ValueError(
            f"The splits in {where} are inside of the classes: {shown(name)}/{part}. Move them above, as {part}/{shown(name)}: "
            "as it is, training would see all of them."
        )
