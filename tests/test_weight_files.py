"""Files of weights: each kind is read as it was saved, and what is no such file, or a hostile one, is refused in one line.

tests/golden/weights holds files that torch 2.13, safetensors and NumPy wrote, of tiny random models, and the hash of each
tensor in float32. Hostile files are written here, opcode by opcode.
"""

import functools
import hashlib
import io
import json
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN

from mim_jax import weight_files

FILES = GOLDEN / "weights"
RAW = GOLDEN.parents[2] / "shared/golden/weights/files"  # beside the checkout, where there is one
EXPECTED = json.loads((FILES / "expected.json").read_text())


def digest_of(array):
    array = array if array.dtype.kind in "iub" and array.dtype != "bfloat16" else array.astype(np.float32)
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def outcome(file, entry):
    """(what came of a file, whether that is the verdict of `expected.json` beside it, with all tensors as they were saved)"""
    try:
        tensors = weight_files.flat(weight_files.read(file))
    except ValueError as error:
        return str(error).removeprefix(f"{file} cannot be read: "), "refuse" in entry["verdict"]
    named = [(tensors.get(key, tensors.get(f"{entry['where']}.{key}")), one) for key, one in entry.get("tensors", {}).items()]
    same = all(a is not None and list(a.shape) == one["shape"] and digest_of(a) == one["sha256"] for a, one in named)
    return f"read, {len(tensors)} tensors", "load" in entry["verdict"] and same


def test_all_files_of_the_shared_folder():
    if not RAW.exists():
        pytest.skip(f"{RAW} is absent; the files of tests/golden/weights are a part of it")
    expected = json.loads((RAW / "expected.json").read_text())
    outcomes = {name: outcome(RAW / name, entry) for name, entry in expected["files"].items()}
    assert len(outcomes) == 52 and not {name: what for name, (what, right) in outcomes.items() if not right}
    assert not [*Path("/tmp").glob("mim_jax_pwned_*"), *Path("/tmp").glob("mim_jax_traversal_*")]


@pytest.mark.parametrize("name", EXPECTED)
def test_tensors_are_read_as_they_were_saved(name):
    tensors = weight_files.flat(weight_files.read(FILES / name))
    assert tensors.keys() >= EXPECTED[name].keys()
    for key, (dtype, shape, digest) in EXPECTED[name].items():
        array = tensors[key]
        assert (array.dtype.name, list(array.shape)) == (dtype, shape), key
        assert digest_of(array) == digest, key


def test_dicts_are_nested_as_in_the_file_and_hold_tensors_only():
    checkpoint = weight_files.read(FILES / "dino_full_checkpoint.pth")
    assert checkpoint.keys() == {"student", "teacher", "optimizer", "dino_loss"}  # no epoch and no argparse.Namespace
    assert checkpoint["optimizer"].keys() == {"state"} and checkpoint["optimizer"]["state"]["0"].keys() > {"exp_avg"}
    assert weight_files.read(FILES / "nested.pth").keys() == {"half", "list", "nested"}
    assert weight_files.read(FILES / "dinov2_teacher_omegaconf.pth").keys() == {"teacher"}
    assert "visual.weight" in weight_files.read(FILES / "torchscript.pt")


def test_arrays_are_views_of_the_file_that_cannot_be_written_to():
    views = weight_files.read(FILES / "views.pth")
    assert not any(array.flags.writeable for array in views.values() if array.size)
    assert 0 in views["expanded"].strides and views["transposed"].strides[0] < views["transposed"].strides[1]


def test_shards_are_joined_and_must_be_complete(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FILES / "sharded", folder)
    index = folder / "model.safetensors.index.json"
    assert (
        weight_files.read(folder).keys()
        == weight_files.read(index).keys()
        == json.loads(index.read_text())["weight_map"].keys()
    )
    content = index.read_text()
    for wrong, reason in (
        (content.replace("cls_token", "other"), "'cls_token' is only in its shard model-00001"),
        (
            content.replace("model-00002", "../model-00002"),
            "names '../model-00002-of-00002.safetensors', which is not a file in",
        ),
        ("[]", 'no "weight_map"'),
        ("[" * 10**5, "damaged .RecursionError"),
    ):
        index.write_text(wrong)
        refused(index, reason)
    index.write_text(content)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "its shard model-00002-of-00002.safetensors is missing")


def test_a_folder_is_read_if_it_says_what_of_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*model"):
        weight_files.read(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no file of weights"):
        weight_files.read(tmp_path)
    shutil.copy(FILES / "parameters.pth", tmp_path / "a.pth")
    assert weight_files.read(tmp_path).keys() == {"w", "w_frozen", "buffer"}
    shutil.copy(FILES / "nested.pth", tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds 2 files of weights .a.pth, b.pth, ....: name one"):
        weight_files.read(tmp_path)
    shutil.copy(FILES / "backbone_legacy.pth", tmp_path / "pytorch_model.bin")
    assert "cls_token" in weight_files.read(tmp_path)


def refused(file, reason):
    """Within a few times the size of the file."""
    size = file.stat().st_size if file.is_file() else 0
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as error:
            weight_files.read(file)
        assert tracemalloc.get_traced_memory()[1] < 8 * size + 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and str(error.value).startswith(str(file)) and len(str(error.value)) < 600


# Pickles, opcode by opcode


def text(value):
    return b"X" + struct.pack("<i", len(value.encode())) + value.encode()


def whole(value):
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def several(*parts):
    return b"(" + b"".join(parts) + b"t"


def mapping(**values):
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def called(module, name, *args):
    return f"c{module}\n{name}\n".encode() + several(*args) + b"R"


def storage(key="0", count=4, kind="FloatStorage", *more):
    return several(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), whole(count), *more) + b"Q"


def tensor(offset=0, shape=(4,), strides=(1,), of=None):
    sizes = [several(*map(whole, values)) for values in (shape, strides)]
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", of or storage(), whole(offset), *sizes, b"\x89", hooks)


FOUR = np.arange(4, dtype=np.float32).tobytes()


def zipped(content, members=None, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for name, value in ({"data/0": FOUR} if members is None else members).items():
            archive.writestr(f"archive/{name}", value)
    return file.getvalue()


def legacy(content, keys=("0",), counts=(4,)):
    start = b"".join(pickle.dumps(value, 2) for value in (weight_files.MAGIC, 1001, {"little_endian": True}))
    storages = b"".join(struct.pack("<q", count) + FOUR for count in counts)
    return start + b"\x80\x02" + content + b"." + pickle.dumps(list(keys), 2) + storages


def overlapping(count, size):
    """Storages that all are the same zeros of the file, at an odd place."""
    names = [f"data/{i:0{len(str(count))}}" for i in range(count)]
    tensors = {f"w{i}": tensor(of=storage(name[5:], size // 4)) for i, name in enumerate(names)}
    content = bytearray(zipped(mapping(**tensors), {"odd": b"1", names[0]: bytes(size)}))
    entry = content.rindex(b"PK\1\2")
    end = content.rindex(b"PK\5\6")
    old = bytes(content[entry:end])
    entries = b"".join(old.replace(names[0].encode(), name.encode()) for name in names)
    start, tail = content[:entry], content[end:]
    directory = content.index(b"PK\1\2")
    tail[8:16] = struct.pack("<HHI", count + 2, count + 2, entry - directory + len(entries))
    return bytes(start + entries + tail)


def good(more=b"N"):
    """A tensor and something else."""
    return mapping(w=tensor(), more=more)


def module(name="torch.nn.modules.linear\nLinear", **state):
    return f"c{name}\n".encode() + b")\x81" + mapping(training=b"\x88", **state) + b"b"


# A pair of two pairs of two pairs ...: 2 bytes more double what its hash or text would cost.
PAIRS = b")" + b"2\x86" * 60
HOOKS = called("collections", "OrderedDict")
PARAMETERS = mapping(_parameters=mapping(weight=tensor()), _modules=HOOKS)
VIEW = several(text("1"), whole(2), whole(2))
FINE = {  # kind -> bytes, each with a tensor "w" of 0 1 2 3
    "zip": zipped(good()),
    "deflated": zipped(good(), compression=zipfile.ZIP_DEFLATED),
    "legacy": legacy(mapping(w=tensor(of=storage("0", 4, "FloatStorage", b"N")))),
    "Python 2": legacy(mapping(w=tensor()).replace(text("w"), b"U\1w").replace(text("storage"), b"T\7\0\0\0storage")),
    "of a GPU": zipped(mapping(w=tensor(of=storage().replace(b"ctorch\n", b"ctorch.cuda\n")))),
    "before 0.4": legacy(mapping(v=tensor(shape=(2,), of=storage("0", 4, "FloatStorage", VIEW)), w=tensor())),
    "pairs": zipped(called("collections", "OrderedDict", b"]" + b"](" + text("w") + tensor() + b"ea")),
    "unknown dict": zipped(b"cmmcv.utils\nConfigDict\n)\x81(" + text("w") + tensor() + b"u"),
    "parameter": zipped(mapping(w=called("torch._utils", "_rebuild_parameter", tensor(), b"\x88", HOOKS))),
    "untyped": zipped(
        mapping(
            w=called(
                *("torch._utils", "_rebuild_tensor_v3", storage("0", 16, "UntypedStorage"), whole(0)),
                *(several(whole(4)), several(whole(1)), b"\x89", HOOKS, b"ctorch\nfloat32\n"),
            )
        )
    ),
    "subclass": zipped(
        mapping(
            w=called(
                *("torch._tensor", "_rebuild_from_type_v2", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cmine\nTensor\n"),
                *(several(storage(), whole(0), several(whole(4)), several(whole(1)), b"\x89", HOOKS), b"}"),
            )
        )
    ),
    "class that is not installed": zipped(good(module("of_no_library\nThing"))),
    "class by call": zipped(good(called("pathlib", "PosixPath", text("runs")))),
    "member of an enum": zipped(good(called("builtins", "getattr", b"cmine\nKind\n", text("A")))),
    "function of data": zipped(good(b"ctorch._C._nn\ngelu\n")),
    "module in arguments": zipped(good(mapping(loss=module(**{"_parameters": HOOKS, "_modules": HOOKS})))),
    "shared twice": zipped(mapping(w=tensor() + b"q\1", same=b"h\1", part=tensor(2, (2,)))),
}


@pytest.mark.parametrize("kind", FINE)
def test_pickles_of_these_kinds_are_read(tmp_path, kind):
    file = tmp_path / "file.pth"
    file.write_bytes(FINE[kind])
    tensors = weight_files.read(file)
    assert tensors["w"].dtype == np.float32
    np.testing.assert_array_equal(tensors["w"], range(4))
    if kind == "before 0.4":
        np.testing.assert_array_equal(tensors["v"], [2, 3])
    assert "more" not in tensors


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_numpy_in_a_pickle_are_read(tmp_path, protocol):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
    }
    file = tmp_path / "file.pth"
    file.write_bytes(zipped(pickle.dumps(arrays | {"words": np.array(["a"]), "number": np.float64(1)}, protocol)[2:-1], {}))
    tensors = weight_files.read(file)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


# A list of two lists of two lists ...
LAUGHS = b"]q\0" + tensor() + b"a" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
ITSELF = b"]q\0h\0a"
HOSTILE = {  # kind -> (bytes, what the line says)
    "shell": (zipped(good(called("posix", "system", text("true")))), "calls posix.system, which builds no tensor"),
    "shell, legacy": (legacy(good(called("os", "system", text("true")))), "calls os.system"),
    "control characters": (zipped(good(called("os", "\x1b[2Jsystem", text("true")))), r"calls os\. \[2Jsystem, which"),
    "eval": (zipped(good(called("__builtin__", "eval", text("1")))), "calls builtins.eval"),
    "class of Python that runs": (zipped(good(called("subprocess", "Popen", text("true")))), "calls subprocess.Popen"),
    "torch's own shell": (
        zipped(good(called("torch.utils.collect_env", "run", text("true")))),
        "calls torch.utils.collect_env.run",
    ),
    "a pickle in it": (
        zipped(good(called("torch.storage", "_load_from_bytes", b"C\0"))),
        "calls torch.storage._load_from_bytes",
    ),
    "function of a function": (
        zipped(good(called("functools", "partial", b"cos\nsystem\n") + b")R")),
        "calls what is no class",
    ),
    "method": (zipped(good(b"\x8c\7pathlib\x8c\x14PosixPath.write_text\x93)R")), "calls pathlib.PosixPath.write_text"),
    "old instance": (zipped(good(b"(" + text("true") + b"ios\nsystem\n")), "calls os.system"),
    "through a wrapper": (
        zipped(good(called("torch._tensor", "_rebuild_from_type_v2", b"cos\nsystem\n", b"N", several(text("true")), b"}"))),
        "calls torch._tensor._rebuild_from_type_v2",
    ),
    "extension": (zipped(good(b"\x82\1")), "needs what is not in the file .EXT1"),
    "beyond the storage": (zipped(mapping(w=tensor(shape=(1000,)))), r"'w', shape \(1000,\), .* does not fit its storage of 4"),
    "beyond by one": (zipped(mapping(w=tensor(1))), "does not fit its storage"),
    "negative offset": (zipped(mapping(w=tensor(-2))), "offset -2, does not fit"),
    "negative stride": (zipped(mapping(w=tensor(3, strides=(-1,)))), "does not fit"),
    "negative shape": (zipped(mapping(w=tensor(shape=(-1, -4), strides=(1, 1)))), "does not fit"),
    "huge stride": (zipped(mapping(w=tensor(shape=(2,), strides=(2**62,)))), "does not fit"),
    "too few strides": (zipped(mapping(w=tensor(shape=(2, 2)))), "does not fit"),
    "expanded": (zipped(mapping(w=tensor(shape=(2**20, 2**20), strides=(0, 0)))), "larger than is plausible"),
    "expanded often": (
        zipped(mapping(**{f"w{i}": tensor(shape=(2**20,), strides=(0,)) for i in range(9)})),
        "up to 'w4', are larger than is plausible",
    ),
    "storage that lies": (
        zipped(mapping(w=tensor(of=storage(count=2**40)))),
        "has 16 bytes, the pickle says 4,398,046,511,104",
    ),
    "storage that lies, legacy": (
        legacy(mapping(w=tensor(of=storage(count=2**40)))),
        "truncated: its storage '0' should end at",
    ),
    "count that lies, legacy": (legacy(good(), counts=(5,)), "has 5 numbers, the pickle says 4"),
    "truncated, legacy": (legacy(good())[:-1], "truncated: its storage '0'"),
    "view outside": (
        legacy(mapping(w=tensor(of=storage("0", 4, "FloatStorage", VIEW.replace(whole(2), whole(3)))))),
        "not in it",
    ),
    "no storage": (zipped(good(), {}), "'data/0' is missing"),
    "path as a key": (
        zipped(mapping(w=tensor(of=storage("../../../../etc/passwd")))),
        "'data/../../../../etc/passwd' is missing",
    ),
    "member outside": (zipped(good(), {"data/0": FOUR, "../../x": b""}), "member outside of itself, 'archive/../../x'"),
    "two members": (zipped(good(), {"data/0": FOUR, "data/1": FOUR}).replace(b"data/1", b"data/0"), "two members of one name"),
    "long class": (
        zipped(text("a" * 10**4) + b"q\0](" + b"h\0h\0\x93" * 500 + b"e"),
        "class whose name has 20,000 characters",
    ),
    "copies of arguments": (
        zipped(b"(ccopyreg\n_reconstructor\nq\0" + b"K\1" * 1000 + b"tq\1](" + b"h\0h\1R" * 500 + b"e"),
        "more steps than are plausible",
    ),
    "parts at one place": (overlapping(100, 2**18), "claim to unpack to 26,2.*, and more than"),
    "bytes as lists": (
        zipped(b"\x96" + struct.pack("<Q", 2**13) + bytes(2**13) + b"q\0](" + b"cbuiltins\nlist\nh\0\x85R" * 9 + b"e"),
        "more steps than are plausible",
    ),
    "bomb of zeros": (
        zipped(mapping(w=tensor(of=storage(count=2**23))), {"data/0": bytes(2**25)}, zipfile.ZIP_DEFLATED),
        "claim to unpack to 33,55.* bytes",
    ),
    "changed": (zipped(good()).replace(FOUR, FOUR[::-1]), "'data/0' has another length or checksum"),
    "truncated": (zipped(good())[:-30], "truncated or damaged zip"),
    "other byte order": (zipped(good(), {"data/0": FOUR, "byteorder": b"big"}), "highest byte"),
    "quantised": (zipped(mapping(w=tensor(of=storage(kind="QInt8Storage")))), "of the kind torch.QInt8Storage"),
    "sparse": (zipped(good(called("torch._utils", "_rebuild_sparse_tensor"))), "calls torch._utils._rebuild_sparse_tensor"),
    "in itself": (zipped(mapping(w=tensor(), more=ITSELF)), "hold each other more often"),
    "laughs": (zipped(LAUGHS), "hold each other more often"),
    "deep": (zipped(good(b"]" * 500 + b"a" * 499)), "hold each other more often"),
    "steps": (zipped(b"N" * 5000), "more steps than are plausible"),
    "copies": (zipped(b"](" + b"K\1" * 1000 + b"eq\0" + b"cbuiltins\nlist\nh\0\x85R" * 500), "more steps than are plausible"),
    "long text": (zipped(good(b"\x8d" + struct.pack("<Q", 2**62))), "cannot be read"),
    "far memo": (zipped(b"]r\xff\xff\xff\xff"), "holds no tensors"),
    "module": (
        zipped(module(**{"_parameters": HOOKS, "_modules": mapping(a=module())})),
        "pickled module .torch.nn.modules.linear.Linear",
    ),
    "module in a dict": (
        zipped(mapping(epoch=b"K\1", model=b"cmine\nNet\n)\x81" + PARAMETERS + b"b")),
        "model is a pickled module .mine.Net.",
    ),
    "single tensor": (zipped(tensor()), "a single tensor without a name"),
    "nothing": (zipped(b"}"), "holds no tensors"),
    "odd key": (zipped(b"}" + several(whole(1)) + tensor() + b"s"), "under a key that is neither a text nor an integer"),
    "two keys": (
        zipped(b"}(" + whole(1) + tensor() + text("1") + tensor() + b"u"),
        "two tensors under the key '1' in its dict",
    ),
    "pairs as a key": (zipped(b"}" + PAIRS + tensor() + b"s"), "under a key that is neither a text nor an integer"),
    "pairs as a key of pairs": (
        zipped(called("collections", "OrderedDict", b"](" + PAIRS + tensor() + b"\x86e")),
        "under a key that is neither a text nor an integer",
    ),
    "pairs as a class": (zipped(mapping(w=PAIRS + b")R")), "calls what is no class"),
    "pairs as a new class": (zipped(mapping(w=PAIRS + b")\x81")), "holds no tensors"),
    "pairs as a shape": (
        zipped(mapping(w=tensor().replace(several(whole(4)), PAIRS))),
        r"'w', shape of the type tuple, strides \(1,\)",
    ),
    "pairs as an offset": (zipped(mapping(w=tensor().replace(whole(0), PAIRS))), "offset of the type tuple, does not fit"),
    "pairs as a count": (
        zipped(mapping(w=tensor(of=storage().replace(whole(4), PAIRS)))),
        "'0' whose count of numbers is of the type tuple",
    ),
    "pairs as flags": (
        zipped(mapping(w=tensor()[:-2] + b"}" + PAIRS + b"\x88stR")),
        "a kind that is not read here: 'float32', of the type Inert",
    ),
    "pairs as a type": (
        zipped(
            mapping(w=called("numpy._core.numeric", "_frombuffer", b"C\4aaaa", called("numpy", "dtype", PAIRS), whole(1), b"N"))
        ),
        "holds no tensors",
    ),
    "pairs as a key of a storage": (
        legacy(good(), keys=(functools.reduce(lambda pair, _: (pair, pair), range(60), ()),)),
        "its storage of the type tuple belongs to no tensor",
    ),
    "pickle": (pickle.dumps({"a": 1}), "a pickle, but not one that torch.save writes"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 8\n", "a pointer of Git LFS"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed with gzip"),
    "other zip": (zipped(good()).replace(b"data.pkl", b"data.pk2"), "not one that torch.save or np.savez writes"),
    "text": (b'{"a": {"b": 1}}', "not a file of weights that is known here"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_hostile_or_broken_is_refused_in_one_line(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(weight_files, "STEPS", 2**12)
    content, reason = HOSTILE[kind]
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    refused(file, reason)


def test_names_are_clear_and_end(tmp_path):
    """As the dict of all tensors, without dicts in it."""
    file, one = tmp_path / "weights.pth", mapping(b=tensor(2, (2,)))
    file.write_bytes(zipped(b"}(" + text("a.b") + tensor() + text("a") + one + b"u"))
    with pytest.raises(ValueError, match="two tensors of the name 'a.b'"):
        weight_files.flat(weight_files.read(file))
    often = b"](" + tensor() + b"q\1" + b"h\1" * 2000 + b"e"
    file.write_bytes(zipped(mapping(**{"n" * 10**4: often})))
    with pytest.raises(ValueError, match="the names of its tensors have more than 16,777,216 characters"):
        weight_files.flat(weight_files.read(file))


def test_a_pickled_module_is_named_and_nothing_is_imported():
    refused(
        FILES / "whole_module.pth", "a pickled module .torch.nn.modules.linear.Linear., not a state dict: save its state_dict"
    )
    assert "torch" not in sys.modules and "omegaconf" not in sys.modules


def safetensors(size=16, **entries):
    header = json.dumps({name: dict(dtype="F32", shape=[4], data_offsets=[0, 16]) | entry for name, entry in entries.items()})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size)


SAFETENSORS = {
    "offsets": (safetensors(w=dict(shape=[1000], data_offsets=[0, 4000])), "truncated: 'w' should end at byte 4,000 of 16"),
    "shape": (safetensors(w=dict(shape=[4, 1000])), r"'w' has 16 bytes, which do not fit float32 \[4, 1000\]"),
    "negative shape": (safetensors(w=dict(shape=[-2, -2])), "'w' has the shape"),
    "negative offset": (safetensors(w=dict(data_offsets=[-16, 0])), "'w' has the shape"),
    "overlap": (safetensors(v={}, w={}), "'w' begins at byte 0, but the tensor before it ends at 16"),
    "gap": (safetensors(32, v={}, w=dict(shape=[3], data_offsets=[20, 32])), "begins at byte 20, but"),
    "more": (safetensors(20, w={}), "end at byte 16 of 20"),
    "type": (safetensors(w=dict(dtype="F4")), "type 'F4', which is not read here"),
    "twice": (safetensors(v={}, w={}).replace(b'"v"', b'"w"'), "names something twice"),
    "header": (struct.pack("<Q", 2**60) + b"{}", "truncated: its header should have 1,152,921,504,606,846,976 bytes"),
    "no JSON": (struct.pack("<Q", 9) + b"{" + b"[" * 8, "cannot be read"),
    "list": (struct.pack("<Q", 2) + b"{}", "no tensors"),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_broken_safetensors_are_refused_in_one_line(tmp_path, kind):
    content, reason = SAFETENSORS[kind]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    refused(file, reason)


def test_arrays_that_are_not_aligned_in_the_file_are_copied(tmp_path):
    header = b'{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}} '
    header += b" " * (1 - len(header) % 2)  # so that the numbers begin at an odd byte
    file = tmp_path / "weights.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + np.array([0x3F80, 0x4000, 0x4040], "<u2").tobytes())
    array = weight_files.read(file)["a"]
    assert array.dtype.name == "bfloat16" and array.flags.aligned
    np.testing.assert_array_equal(array.astype(np.float32), [1, 2, 3])
