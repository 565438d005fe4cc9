"""Files of weights, as other libraries write them, read without those libraries and without running anything in them.

Sources: the format of safetensors (github.com/huggingface/safetensors, "Format"), NumPy's numpy.lib.format, Python's
pickletools, and for PyTorch torch/serialization.py and torch/_utils.py (what `torch.save` writes and `torch.load` expects).
"""

import dataclasses
import json
import math
import mmap
import pickletools
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 and float8 by name after this
import numpy as np

from mim_jax import storage

Tensors = dict[str, Any]  # name -> array, or Tensors

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt")
FOLDER = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAGIC = 0x1950A86A20F9469CFC6C  # the first number in a file of torch before 1.6
DEPTH = 100  # of containers in containers
STEPS = 2**18  # of a pickle, whatever the size of the file
JSON = 2**22  # bytes of JSON, which may need 25 times as many; there are some 100 a tensor
NAMES = 2**24  # characters of the names of all tensors, as `flat` has them
SAFETENSORS = dict(  # its names of types: NumPy's
    BOOL="bool", U8="uint8", I8="int8", U16="uint16", I16="int16", U32="uint32", I32="int32", U64="uint64", I64="int64",
    F16="float16", BF16="bfloat16", F32="float32", F64="float64", C64="complex64",
    F8_E4M3="float8_e4m3fn", F8_E5M2="float8_e5m2", F8_E8M0="float8_e8m0fnu",
)  # fmt: skip
STORAGES = dict(  # torch.FloatStorage ...
    Bool="bool", Byte="uint8", Char="int8", Short="int16", Int="int32", Long="int64", Half="float16", BFloat16="bfloat16",
    Float="float32", Double="float64", ComplexFloat="complex64", ComplexDouble="complex128", Untyped="uint8",
)  # fmt: skip
DTYPES = {*SAFETENSORS.values(), *STORAGES.values(), "float8_e4m3fnuz", "float8_e5m2fnuz"}


def names(module: str, classes: str) -> set[str]:
    return {f"{module}.{name}" for name in classes.split()}


# What a pickle may call. Nothing is called: of containers and tensors the result is built here; of what only holds data a
# placeholder is kept.
CONTAINERS = names("builtins", "dict list tuple set frozenset") | names("collections", "OrderedDict defaultdict Counter deque")
REBUILD = "torch._utils._rebuild_tensor"
WRAPPED = names("torch._tensor", "_rebuild_from_type _rebuild_from_type_v2")  # (function, class, arguments, state)
FIRST_ARGUMENT = (
    names("torch._utils", "_rebuild_parameter _rebuild_parameter_with_state _rebuild_xla_tensor")
    | names("torch._utils", "_rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor")
    | names("torch.jit._pickle", "build_boollist build_doublelist build_intlist build_tensorlist restore_type_tag")
    | {"torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"}  # torch before 0.4
)
NUMPY_ARRAYS = names("numpy._core", "multiarray._reconstruct numeric._frombuffer")
OBJECTS = names("copyreg", "_reconstructor __newobj__ __newobj_ex__")  # (class, ...)
DATA = (
    names("builtins", "bool bytearray bytes complex float getattr int object range slice str type")
    | names("datetime", "date datetime time timedelta timezone")
    | names("numpy.random._pickle", "__bit_generator_ctor __generator_ctor __randomstate_ctor")
    | names("numpy", "_core.multiarray.scalar dtype")
    | names("torch", "device serialization._get_layout")
    | {"_codecs.encode", "functools.partial", "itertools.count", "operator.attrgetter", "operator.itemgetter", "re._compile"}
)
# Modules of Python of which all classes only hold data. Of other libraries every class becomes a placeholder.
DATA_MODULES = set(
    "argparse collections decimal enum fractions ipaddress logging pathlib pathlib._local random string types typing uuid "
    "zoneinfo".split()
)


class Name(str):
    """What a pickle calls by its module and name, "torch.FloatStorage": a text. Nothing is imported."""


@dataclasses.dataclass(eq=False, slots=True)
class Inert:
    """What stands for an object of a class that is not known here: what the file says of it."""

    of: Any
    args: tuple
    items: dict | None = None  # if it was filled as a dict or list is
    state: Any = None


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    key: str
    dtype: str
    count: int
    start: int = 0  # of a view of it, as torch before 0.4 has them, else all of it
    length: int | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
    storage: Storage
    dtype: str
    offset: int
    shape: tuple
    strides: tuple


def read(path: str | Path) -> Tensors:
    """The tensors in a file of weights, or in a folder or `.index.json` of Hugging Face's, whose shards are joined.

    The format is seen from the content: .safetensors; .npz; what `torch.save` writes (.pth, .pt, .bin, .ckpt), in the zip
    format, in the one before torch 1.6, and as TorchScript. A file at an address must be an .npz.

    Returns a dict of name -> array, nested as the file is: {"teacher": {"backbone.cls_token": array, ...}, "optimizer": {...}}.
    Lists and tuples become dicts with the keys "0", "1", ...; other integer keys become texts; a module of TorchScript becomes
    a flat dict with the names of its state dict. What is no tensor and holds none is left out: numbers, texts, arguments,
    objects of unknown classes. Arrays have the shape and type of the file, with ml_dtypes for bfloat16 and float8. They are not
    to be written to and mostly are views of the file itself, transposed or expanded where it says so: memory is used as they
    are read, and the file must stay as it is until then.

    Nothing in the file is imported or run, and what is built stays within a few times its size. Raises FileNotFoundError if
    there is none, and ValueError, in one line, if it is of another format, damaged, has a pickled module, or calls a function.
    """
    path = storage.absolute(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        path = in_folder(path)
    try:
        tensors = read_shards(path) if path.suffix == ".json" else read_file(path)
        if not tensors:
            raise ValueError("it holds no tensors")
    except Exception as error:  # of broken bytes the libraries below raise almost anything
        reason = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:400]
        if not isinstance(error, (ValueError, OSError, zipfile.BadZipFile)):
            reason = f"it is damaged ({type(error).__name__}: {reason})"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    return tensors


def in_folder(folder: Path) -> Path:
    """The file of weights in a folder: Hugging Face's names first, as its libraries look for them, else the only one."""
    for name in FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.iterdir())
    for suffixes in (".index.json",), SUFFIXES:
        found = [file for file in files if file.name.endswith(suffixes)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} holds {len(found)} files of weights ({found[0].name}, {found[1].name}, ...): name one")
    raise ValueError(f"{folder} holds no file of weights: none ends in {', '.join(SUFFIXES)}")


def read_shards(index: Path) -> Tensors:
    """The tensors of all files that an index, {"weight_map": {name: file}}, names; the files stand beside it."""
    if index.stat().st_size > JSON:
        raise ValueError("it is no index of shards: it is too large")
    content = json.loads(index.read_bytes())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError('it is no index of shards: it has no "weight_map" of names and files')
    tensors: Tensors = {}
    for file in sorted(set(places.values())):
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"it names {file!r}, which is not a file in its own folder")
        if not (index.parent / file).is_file():
            raise ValueError(f"its shard {file} is missing")
        try:
            shard = read_file(index.parent / file)
        except Exception as error:
            raise ValueError(f"in its shard {file}: {error}") from error
        named = {name for name, place in places.items() if place == file}
        if wrong := sorted(named ^ shard.keys()):
            raise ValueError(f"{wrong[0]!r} is {'not in' if wrong[0] in named else 'only in'} its shard {file}")
        tensors |= shard
    return tensors


def read_file(path: Path) -> Tensors:
    """The tensors in one file, of the format that its first bytes show."""
    if not path.is_file():
        raise ValueError("it is not a file")
    if storage.remote(path):
        if path.suffix != ".npz":
            raise ValueError("at an address only .npz files are read: copy it to a disk")
        with path.open("rb") as opened:
            return read_npz(opened, limit(opened.seek(0, SEEK_END)))
    if not (size := path.stat().st_size):
        raise ValueError("it is empty")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head = data[:512]
    if head.startswith(b"PK"):
        return read_zip(path, data)
    # the length of a header may begin as a pickle does, with 0x80; the first 8 bytes of a pickle are a length beyond any file
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return read_safetensors(data)
    if head[0] == 0x80:
        return read_legacy(data)
    if head[8:9] == b"{" and path.suffix == ".safetensors":
        return read_safetensors(data)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        raise ValueError(
            "it is a web page, not a file of weights: was it downloaded from a page that needs a login or is gone?"
        )
    kinds = {b"\x1f\x8b": "compressed with gzip: unpack it", b"\x89HDF": "HDF5", b"\x93NUMPY": "a single array (.npy)"}
    kind = next((kind for magic, kind in kinds.items() if head.startswith(magic)), "")
    kind = "a tar file (torch before 0.1.10 wrote such)" if head[257:262] == b"ustar" else kind
    raise ValueError(
        f"it is {kind or 'not a file of weights that is known here'} ({size:,} bytes, beginning with {head[:16]!r})"
    )


def limit(size: int) -> int:
    """The bytes that a file of `size` bytes may unpack to."""
    return 4 * size + 2**24


def array(content: Any, dtype: np.dtype, shape: tuple, offset: int = 0, strides: tuple | None = None) -> np.ndarray:
    """A view of bytes, which cannot be written to; strides and offset in bytes."""
    return np.ndarray(shape, dtype, content, offset, strides) if math.prod(shape) else np.empty(shape, dtype)


def aligned(content: Any) -> Any:
    """The bytes; a copy where they begin at a place from which a machine may not read numbers."""
    return content if not len(content) or np.frombuffer(content, np.uint8).ctypes.data % 8 == 0 else bytes(content)


def whole_numbers(values: Any) -> bool:
    """Whether it is a list of integers >= 0, of no more than NumPy has dimensions."""
    return isinstance(values, (list, tuple)) and len(values) <= 64 and all(type(n) is int and n >= 0 for n in values)


def shown(value: Any) -> str:
    """A text, an integer or a list of integers, for a message; of anything else only the type. Pairs of pairs of pairs ..., of
    which each is the last one twice, are small in a file and endless in words."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    plain = len(numbers) <= 64 and all(type(n) is int and n.bit_length() < 256 for n in numbers)
    return str(value) if plain else repr(value) if type(value) is str else f"of the type {type(value).__name__}"


# safetensors: the length of the header (8 bytes), the header (JSON), the arrays without gaps.


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def read_safetensors(data: mmap.mmap) -> Tensors:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError(f"it is truncated: its header should have {length:,} bytes, the file has {len(data):,}")
    if length > JSON + len(data) // 8:
        raise ValueError(f"its header has {length:,} bytes, which is not plausible for a file of {len(data):,}")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=unique)
    header.pop("__metadata__", None)
    content = memoryview(data)[8 + length :]
    tensors, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = SAFETENSORS.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name!r} is of the type {entry['dtype']!r}, which is not read here")
        if not whole_numbers(shape) or not whole_numbers(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has the shape {shape} and the place {offsets}")
        begin, end = offsets
        if end > len(content):
            raise ValueError(f"it is truncated: {name!r} should end at byte {end:,} of {len(content):,}")
        if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"{name!r} has {end - begin:,} bytes, which do not fit {dtype} {shape}")
        if begin != place:
            raise ValueError(f"{name!r} begins at byte {begin:,}, but the tensor before it ends at {place:,}")
        place = end
        tensors[name] = array(aligned(content[begin:end]), np.dtype(dtype), tuple(shape))
    if place != len(content):
        raise ValueError(f"its tensors end at byte {place:,} of {len(content):,}")
    return {name: tensors[name] for name in header}


# .npz


def read_npz(file: str | Path | BinaryIO, limit: int) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, of numbers only and of at most `limit` bytes together, which is known before any is read."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if other := [member.filename for member in members if not member.filename.endswith(".npy")]:
            raise ValueError(f"it has the member {other[0]!r}" + " (a file of PyTorch?)" * other[0].endswith(".pkl"))
        if (size := sum(member.file_size for member in members)) > limit:
            raise ValueError(f"it claims to unpack to {size:,} bytes, and more than {limit:,} are not plausible")
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename!r} is compressed by method {member.compress_type}")
            with archive.open(member) as content:
                read_header = HEADERS.get(version := np.lib.format.read_magic(content))
                if read_header is None:
                    raise ValueError(f"{member.filename!r} has version {version} of the format")
                shape, fortran, dtype = read_header(content)
                if dtype.kind not in "fiub":
                    raise ValueError(f"{member.filename!r} is an array of {dtype}, not of numbers")
                if math.prod(shape) * dtype.itemsize != member.file_size - content.tell():
                    raise ValueError(
                        f"{member.filename!r} has {member.file_size:,} bytes, which do not fit {dtype} {list(shape)}"
                    )
                data = np.frombuffer(content.read(member.file_size - content.tell()), dtype)  # no more, whatever there is
            arrays[member.filename.removesuffix(".npy")] = data.reshape(shape, order="F" if fortran else "C")
    return arrays


# PyTorch: a pickle in which storages are named, and the bytes of the storages.


def read_zip(path: Path, data: mmap.mmap) -> Tensors:
    """torch.save since 1.6, and TorchScript: a zip file with NAME/data.pkl and a member NAME/data/KEY for each storage."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is a truncated or damaged zip file ({error})") from error
    with archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("it has two members of one name")
        if bad := [name for name in members if re.search(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)", name)]:
            raise ValueError(f"it has a member outside of itself, {bad[0]!r}")
        roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if not roots:
            if any(name.endswith(".npy") for name in members):
                return read_npz(path, limit(len(data)))
            if any(name.endswith("model.json") for name in members):
                raise ValueError("it is TorchScript of torch before 1.4: load it there and save its state_dict()")
            raise ValueError("it is a zip file, but not one that torch.save or np.savez writes")
        if len(roots) > 1:
            raise ValueError("it holds several pickles")
        size = sum(member.file_size for member in members.values())  # all may be at one place of the file
        if size > limit(len(data)):
            raise ValueError(
                f"its parts claim to unpack to {size:,} bytes, and more than {limit(len(data)):,} are not plausible"
            )
        view = memoryview(data)

        def content(name: str) -> Any:
            member = members.get(roots[0] + name)
            if member is None:
                raise ValueError(f"its part {name!r} is missing")
            if member.flag_bits & 1:
                raise ValueError("it is encrypted")
            place, size = member.header_offset, member.file_size
            place += 30 + sum(int.from_bytes(data[place + at : place + at + 2], "little") for at in (26, 28))
            found = view[place : place + member.compress_size]
            if member.compress_type == zipfile.ZIP_DEFLATED:  # PyTorch does not compress, but reads it
                found = memoryview(zlib.decompressobj(-15).decompress(found, size + 1))
            elif member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {name!r} is compressed by method {member.compress_type}")
            if len(found) != size or zlib.crc32(found) != member.CRC:
                raise ValueError(f"it is truncated or damaged: its part {name!r} has another length or checksum")
            return found

        if roots[0] + "byteorder" in members and bytes(content("byteorder")) != b"little":
            raise ValueError("it was written on a machine whose numbers begin with the highest byte")
        found = unpickle(BytesIO(content("data.pkl")), len(data))
        kept: dict[str, Any] = {}

        def stored(storage: Storage) -> Any:
            size = storage.count * np.dtype(storage.dtype).itemsize
            member = members.get(f"{roots[0]}data/{storage.key}")
            if member is not None and member.file_size != size:
                raise ValueError(f"its storage {storage.key!r} has {member.file_size:,} bytes, the pickle says {size:,}")
            if storage.key not in kept:
                kept[storage.key] = aligned(content(f"data/{storage.key}"))
            return kept[storage.key]

        tensors = Collector(len(data), stored).collect(found)
        if roots[0] + "constants.pkl" in members and not tensors:
            raise ValueError(
                "it is TorchScript in which no tensors are found: save torch.jit.load(file).state_dict() with PyTorch"
            )
        return tensors


def read_legacy(data: mmap.mmap) -> Tensors:
    """torch.save before 1.6: pickles of a magic number, a version, the machine, the object and the keys of storages; then for
    each key its count of numbers (8 bytes) and the numbers."""
    size = len(data)
    if unpickle(data, size) != MAGIC:
        raise ValueError("it is a pickle, but not one that torch.save writes")
    version, machine = unpickle(data, size), unpickle(data, size)
    if version != 1001:
        raise ValueError(f"it has version {shown(version)} of the format, of which only 1001 is known")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a machine whose numbers begin with the highest byte")
    storages: dict[str, Storage] = {}
    found = unpickle(data, size, storages)
    content, places, place = memoryview(data), {}, 0
    keys = unpickle(data, size)
    place = data.tell()
    for key in keys:
        if type(key) is not str or key not in storages:
            raise ValueError(f"its storage {shown(key)} belongs to no tensor")
        storage = storages[key]
        end = place + 8 + storage.count * np.dtype(storage.dtype).itemsize
        if end > size:
            raise ValueError(f"it is truncated: its storage {key!r} should end at byte {end:,} of {size:,}")
        if (count := int.from_bytes(data[place : place + 8], "little", signed=True)) != storage.count:
            raise ValueError(f"its storage {key!r} has {count:,} numbers, the pickle says {storage.count:,}")
        places[key] = content[place + 8 : end]
        place = end

    def stored(storage: Storage) -> Any:
        if storage.key not in places:
            raise ValueError(f"its storage {storage.key!r} is missing")
        places[storage.key] = aligned(places[storage.key])
        return places[storage.key]

    return Collector(size, stored).collect(found)


def unpickle(file: Any, size: int, storages: dict[str, Storage] | None = None) -> Any:
    """The next object of a pickle, made of containers, numbers, texts, `Tensor`, `Storage`, `Name` and `Inert`.

    A pickle is a program for a machine with a stack. This is such a machine, but it cannot import or call: what the program
    calls is known here, becomes a placeholder, or is refused. Sets become lists. The pickle in a file of `size` bytes may have
    only so many steps that what they build is a few times as large. `storages` is filled with the storages by key.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages
    left = steps(size)

    def spend(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise ValueError("its pickle has more steps than are plausible for a file of this size")

    def call(called: Any, args: Any) -> Any:
        spend(len(args))
        if isinstance(called, Name) and called in CONTAINERS:  # copying one is as many steps as it has items
            spend(sum(len(arg) for arg in args if isinstance(arg, (dict, list, tuple, str, bytes, bytearray))))
        return result(called, args)

    def top() -> list[Any]:
        """What lies above the last mark, taken from the stack."""
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    arg: Any
    for opcode, arg, _ in pickletools.genops(file):
        spend(1)
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                top()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "LIST" | "FROZENSET":
                stack.append(top())
            case "TUPLE":
                stack.append(tuple(top()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                items = top()
                stack.append(filled(items[::2], items[1::2]))
            case "APPEND":
                item = stack.pop()
                fill(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = top()
                fill(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                fill(stack[-1], [key, value], pairs=True)
            case "SETITEMS":
                items = top()
                fill(stack[-1], items, pairs=True)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(name_of(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(name_of(module, attribute))
            case "REDUCE":
                args, called = stack.pop(), stack.pop()
                stack.append(call(called, args))
            case "INST":
                stack.append(call(name_of(*arg.split(" ", 1)), tuple(top())))
            case "OBJ":
                called, *rest = top()
                stack.append(call(called, tuple(rest)))
            case "NEWOBJ":
                args, called = stack.pop(), stack.pop()
                contains = isinstance(called, Name) and called in CONTAINERS
                stack.append(call(called, args) if contains else Inert(called, args))
            case "NEWOBJ_EX":
                _, args, called = stack.pop(), stack.pop(), stack.pop()
                stack.append(Inert(called, args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(named_storage(stack.pop(), storages))
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"its pickle needs what is not in the file ({opcode.name})")
            case _:  # numbers, texts and bytes
                stack.append(arg)
    raise ValueError("its pickle has no end")


def steps(size: int) -> int:
    """The steps that the pickle in a file of `size` bytes may have: each may need some 100 bytes, and 45 make a tensor."""
    return STEPS + size // 16


def fill(target: Any, items: list, pairs: bool = False) -> None:
    """As the pickle appends items to a list or sets them (key, value, key, ...) in a dict; a placeholder keeps them."""
    if isinstance(target, Inert):
        target.items = {} if target.items is None else target.items
        if not pairs:
            items = [x for i, item in enumerate(items, start=len(target.items)) for x in (i, item)]
        target, pairs = target.items, True
    if pairs and isinstance(target, dict):
        target.update(filled(items[::2], items[1::2]))
    elif not pairs and isinstance(target, list):
        target.extend(items)
    else:
        raise ValueError(f"its pickle fills a {type(target).__name__}")


def filled(keys: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
    """A dict. A container as a key becomes a placeholder, which no other key equals: the hash of a tuple may be endless, see
    `shown`."""
    return {Inert("key", (key,)) if isinstance(key, (tuple, list, dict)) else key: value for key, value in zip(keys, values)}


def name_of(module: Any, name: Any) -> Name:
    """Python 2 and NumPy before 2.0 had other names for some modules."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("its pickle names a class by what is no text")
    if len(module) + len(name) > 1000:
        raise ValueError(f"its pickle has a class whose name has {len(module) + len(name):,} characters")
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    return Name(f"{re.sub('^numpy[.]core(?=[.]|$)', 'numpy._core', module)}.{name}")


def result(called: Any, args: Any) -> Any:
    """What the pickle gets for a call: a container, a tensor or a placeholder. Raises ValueError if it is none of these."""
    if not isinstance(called, Name) or not isinstance(args, tuple):
        raise ValueError("its pickle calls what is no class")
    if called in CONTAINERS:
        if called.endswith("defaultdict"):
            args = args[1:]
        if called.endswith(("dict", "Dict", "Counter")):
            if not args or isinstance(args[0], dict):
                return args[0] if args else {}
            if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in args[0]):
                raise ValueError("its pickle makes a dict of what are no pairs")
            return filled(*([pair[i] for pair in args[0]] for i in (0, 1)))
        return list(args[0]) if args else []
    if called in (REBUILD, f"{REBUILD}_v2"):
        storage, offset, shape, strides = args[:4]
        return tensor(storage, offset, shape, strides, storage.dtype, args[6:])
    if called == f"{REBUILD}_v3":
        storage, offset, shape, strides, _, _, dtype = args[:7]
        return tensor(storage, offset, shape, strides, dtype.removeprefix("torch."), args[7:])
    if called in FIRST_ARGUMENT:
        return args[0]
    if called in WRAPPED and args[0].startswith(REBUILD):
        return result(args[0], args[2])
    if called in OBJECTS:
        return Inert(args[0], args[1:])
    module, _, last = called.rpartition(".")
    is_class = last.lstrip("_")[:1].isupper()
    if called.partition(".")[0] in sys.stdlib_module_names:
        is_class = is_class and module in DATA_MODULES
    if not (is_class or called in DATA or called in NUMPY_ARRAYS):
        raise ValueError(f"its pickle calls {called}, which builds no tensor or container known here; nothing was run")
    return Inert(called, args)


def tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, bits: Any) -> Tensor:
    bits = bits[0] if bits and bits[0] else {}  # conjugated, negated
    if not isinstance(storage, Storage) or dtype not in DTYPES or len(bits) > 8 or any(bits.values()):
        raise ValueError(f"it has a tensor of a kind that is not read here: {', '.join(map(shown, [dtype, *bits][:3]))}")
    return Tensor(storage, dtype, offset, shape, strides)


def named_storage(key: Any, storages: dict[str, Storage]) -> Any:
    """The storage that the pickle names: ("storage", class, key, device, count of numbers, [view]); torch before 1.6 also names
    ("module", class, file, source)."""
    if isinstance(key, tuple) and len(key) > 1 and key[0] == "module":
        return key[1]
    if not isinstance(key, tuple) or not 5 <= len(key) <= 6 or key[0] != "storage" or not isinstance(key[1], Name):
        raise ValueError("its pickle names a storage in a way that is not known here")
    kind = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", key[1])
    if not kind or kind[1] not in STORAGES:
        raise ValueError(f"it has a storage of the kind {key[1]}, which is not read here")
    name, count, view = key[2], key[4], key[5] if len(key) == 6 else None
    if type(name) is not str or not whole_numbers([count]):
        raise ValueError(f"it has a storage {shown(name)} whose count of numbers is {shown(count)}")
    known = storages.setdefault(name, Storage(name, STORAGES[kind[1]], count))
    if (known.dtype, known.count) != (STORAGES[kind[1]], count):
        raise ValueError(f"it has two storages of the name {name!r}")
    if view is None:
        return known
    _, start, length = view
    if not whole_numbers([start, length]) or start + length > count:
        raise ValueError(f"it has a part of the storage {name!r} that is not in it")
    return dataclasses.replace(known, start=start, length=length)


class Collector:
    """Makes nested dicts of arrays of what `unpickle` gives, for a file of `size` bytes; `stored(storage)` gives its bytes."""

    def __init__(self, size: int, stored: Any):
        self.stored = stored
        self.visits = steps(size)  # a container in which another stands many times is small in the file and endless here
        self.room = limit(size)
        self.modules: list[str] = []
        self.known: dict[int, tuple[Any, int, int]] = {}  # id of a container -> what it holds, visits and bytes of it

    def collect(self, value: Any) -> Tensors:
        found = self.tensors(value, [])
        if isinstance(found, np.ndarray):
            raise ValueError("it is a single tensor without a name")
        if not found and self.modules:
            raise ValueError(self.modules[0])
        return found or {}

    def tensors(self, value: Any, path: list[str]) -> Any:
        """The array, or the dict of what holds arrays; None if there are none. What stands in several places is made once, but
        counts in each."""
        visits, room = self.visits, self.room
        found, more_visits, more_room = self.known.get(id(value), (None, 1, 0))
        self.visits -= more_visits
        if self.visits < 0 or len(path) > DEPTH:
            raise ValueError("its containers hold each other more often than is plausible for a file of this size")
        self.take(more_room, path)
        if id(value) not in self.known and isinstance(value, (Tensor, Inert, dict, list, tuple)):
            found = self.made(value, path)
            self.known[id(value)] = found, visits - self.visits, room - self.room
        return found

    def made(self, value: Any, path: list[str]) -> Any:
        if isinstance(value, Tensor):
            return self.array(value, path)
        if isinstance(value, Inert):
            if not isinstance(value.of, Name):
                return None
            if value.of in NUMPY_ARRAYS:
                return self.numpy_array(value, path)
            if value.of.startswith("__torch__."):
                inside = self.tensors(value.state, path) if isinstance(value.state, dict) else None
                return flat(inside) if inside else None
            if isinstance(value.state, dict) and "_parameters" in value.state and "_modules" in value.state:
                where, what = ".".join(path) or "it", f"a pickled module ({value.of}), not a state dict"
                self.modules.append(f"{where} is {what}: save its state_dict() with PyTorch")
                if len(path) < 2 and (value.state["_parameters"] or value.state["_modules"]):
                    raise ValueError(self.modules[-1])
                return None
            value = value.items
        if value is None:
            return None
        found: Tensors = {}
        where = ".".join(path) or "its dict"
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if (inside := self.tensors(item, [*path, str(key) if type(key) in (str, int) else "?"])) is None:
                continue
            if type(key) not in (str, int):
                raise ValueError(f"it has a tensor under a key that is neither a text nor an integer, in {where}")
            if str(key) in found:
                raise ValueError(f"it has two tensors under the key {shown(key)} in {where}")
            found[str(key)] = inside
        return found or None

    def take(self, size: int, path: list[str]) -> None:
        self.room -= size
        if self.room < 0:
            raise ValueError(f"its tensors, up to {'.'.join(path)!r}, are larger than is plausible for a file of this size")

    def array(self, tensor: Tensor, path: list[str]) -> np.ndarray:
        storage, dtype = tensor.storage, np.dtype(tensor.dtype)
        if not whole_numbers([tensor.offset]) or not all(map(whole_numbers, (tensor.shape, tensor.strides))):
            fits = False
        else:
            bytes_there = (storage.count if storage.length is None else storage.length) * np.dtype(storage.dtype).itemsize
            steps = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides)]
            end = tensor.offset + (sum(steps) + 1 if all(tensor.shape) else 0)
            fits = len(tensor.shape) == len(tensor.strides) and end * dtype.itemsize <= bytes_there
        if not fits:
            raise ValueError(
                f"its tensor {'.'.join(path)!r}, shape {shown(tensor.shape)}, strides {shown(tensor.strides)}, offset "
                f"{shown(tensor.offset)}, does not fit its storage of {storage.count:,} numbers"
            )
        self.take(math.prod(tensor.shape) * dtype.itemsize, path)
        offset = tensor.offset * dtype.itemsize + storage.start * np.dtype(storage.dtype).itemsize
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return array(self.stored(storage), dtype, tuple(tensor.shape), offset, strides)

    def numpy_array(self, value: Inert, path: list[str]) -> np.ndarray | None:
        """An array of numbers that NumPy pickled, as (version, shape, dtype, Fortran's order, bytes) or (bytes, dtype, shape,
        order); None for one of other things."""
        if value.of == "numpy._core.numeric._frombuffer":
            raw, dtype, shape, order = value.args
        else:
            _, shape, dtype, fortran, raw = value.state
            order = "F" if fortran else "C"
        name = dtype.args[0] if isinstance(dtype, Inert) and dtype.of == "numpy.dtype" else None
        if type(name) is not str or not re.fullmatch(r"[fiub]\d", name):
            return None
        kind = np.dtype(name)
        if dtype.state and dtype.state[1] == ">":
            kind = kind.newbyteorder(">")
        if isinstance(raw, Inert) and raw.of == "_codecs.encode":
            raw = raw.args[0].encode("latin1")
        if not whole_numbers(shape) or not isinstance(raw, (bytes, bytearray)) or len(raw) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"it has an array of the shape {shown(shape)} whose bytes do not fit")
        self.take(len(raw), path)
        return np.frombuffer(raw, kind).reshape(shape, order="F" if order == "F" else "C")


def flat(tensors: Tensors) -> Tensors:
    """{"a": {"b": x}} as {"a.b": x}. Raises ValueError if two tensors would have one name, and for endless names."""
    named: Tensors = {}
    left = NAMES

    def add(tensors: Tensors, before: str) -> None:
        nonlocal left
        for key, value in tensors.items():
            if isinstance(value, dict):
                add(value, f"{before}{key}.")
                continue
            name = before + key
            left -= len(name)
            if left < 0:
                raise ValueError(f"the names of its tensors have more than {NAMES:,} characters")
            if name in named:
                raise ValueError(f"it has two tensors of the name {name[:100]!r}")
            named[name] = value

    add(tensors, "")
    return named


def safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A .safetensors file of the arrays, in float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, start = [], 0
    for name, array in sorted(arrays.items()):
        blob = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + len(blob)]}
        start += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])
