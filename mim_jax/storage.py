"""Files on a disk of this machine, or at an address: gs://bucket/folder, s3://bucket/folder.

Both have the methods of pathlib (those of an address are etils' `epath`, which Orbax uses, too). What differs is here: a bucket
has whole objects, which cannot be appended to, and no locks.
"""

import concurrent.futures
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what reads an address; the extras of mim_jax that bring them are gcs and s3
READS = 32  # that are under way at a time: each takes a while to come
PART = 2**20  # bytes of a part after which another one begins


def absolute(path: str | os.PathLike) -> Path:
    """The absolute path, `~` expanded, or an address as a path. Raises ValueError for an address that cannot be read here."""
    text = os.fspath(path)
    if not remote(path):
        return Path(text).expanduser().absolute()
    scheme, _, rest = text.partition("://")
    if scheme not in PACKAGES or not rest.strip("/"):
        raise ValueError(f"{text} is no folder that can be read: addresses are gs://BUCKET/FOLDER and s3://BUCKET/FOLDER")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        extra = {"gs": "gcs"}.get(scheme, scheme)
        raise ValueError(f"{text} cannot be read without {PACKAGES[scheme]}: pip install 'mim_jax[{extra}]'")
    import fsspec
    from etils import epath

    # A listing that is kept does not have what other processes and TensorStore write.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def remote(path: str | os.PathLike) -> bool:
    """Whether it is an address."""
    return "://" in os.fspath(path)


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in one line. Libraries for addresses raise errors of any type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def parts(path: Path) -> list[Path]:
    """The files that hold what was appended to `path`, in order; [] if there is none. See `Parts`."""
    found = [path] if path.exists() else []
    if remote(path):
        found += sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9]"))
    return found


class Parts:
    """Appends to a file at an address: the objects `path`, `path.00001`, ... are its content, one after the other.

    `flush` writes what is new, with what the last part has already, in one piece. A kill loses what was not flushed.
    """

    def __init__(self, path: Path):
        last = parts(path)[-1:]
        self._path, self._new, self._part = path, False, bytearray(b"".join(part.read_bytes() for part in last))
        self._number = int(last[0].name[-5:]) if last and last[0] != path else 0

    def write(self, content: str | bytes) -> None:
        self._part += content.encode() if isinstance(content, str) else content
        self._new = True

    def flush(self) -> None:
        if self._new:
            name = f"{self._path.name}.{self._number:05}" if self._number else self._path.name
            self._path.with_name(name).write_bytes(bytes(self._part))
            self._new = False
            if len(self._part) >= PART:
                self._number, self._part = self._number + 1, bytearray()

    close = flush


class Entry(NamedTuple):
    """What is in a folder at an address, as `os.scandir` has it; there are no links."""

    name: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder

    def is_symlink(self) -> bool:
        return False


def tree(root: Path) -> dict[str, list[Entry]]:
    """The address of each folder at and below `root`, and what is in it. Raises OSError."""
    system, _ = _system(root)
    scheme = f"{str(root).partition('://')[0]}://"

    def scan(folder: str) -> list[Entry]:
        found = [(scheme + info["name"].rstrip("/"), info["type"] == "directory") for info in system.ls(folder, detail=True)]
        return [Entry(path.rpartition("/")[2], below) for path, below in found if path != folder]

    tree, level = dict[str, list[Entry]](), [str(root)]
    try:
        with concurrent.futures.ThreadPoolExecutor(READS) as pool:
            while level:
                tree |= zip(level, pool.map(scan, level))
                level = [f"{folder}/{entry.name}" for folder in level for entry in tree[folder] if entry.folder]
    except Exception as error:
        raise OSError(f"Cannot read {root}: {reason(error)}") from error
    return tree


def read(path: str | os.PathLike, limit: int) -> bytes:
    """The bytes of an object at an address. Raises OSError, also for more than `limit` bytes."""
    try:
        system, name = _system(path)
        content = system.cat_file(name, end=limit + 1)
    except Exception as error:
        raise OSError(reason(error)) from error
    if len(content) > limit:
        raise OSError(f"a file of more than {limit:,} bytes")
    return content


def _system(path: str | os.PathLike) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(absolute(path)))
