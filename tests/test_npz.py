"""Files of official weights: what is no .npz of plain arrays is refused in one line, within a few times its size of memory."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from mim_jax import weight_files


def npz(**members):
    """A .npz of given bytes, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array, header=None):
    file = io.BytesIO()
    if header is None:
        np.save(file, array, allow_pickle=True)
    else:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())
    return file.getvalue()


def saved(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Runs:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


GOOD = saved(weight=np.arange(6.0).reshape(2, 3))
HUGE = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
PYTORCH = io.BytesIO()
with zipfile.ZipFile(PYTORCH, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))
METHOD = bytearray(GOOD)
METHOD[GOOD.index(b"PK\1\2") + 10] = 12  # bzip2, which Python unpacks without a limit
BROKEN = {  # kind -> (file, what the line says)
    "bomb": (npz(a=npy(np.zeros(5 * 10**6, np.float32))), "claims to unpack to 20,000,128 bytes, and more than"),
    "many small bombs": (npz(**{f"a{i}": npy(np.zeros(10**6, np.float32)) for i in range(5)}), "claims to unpack to 20,0"),
    "header of a bomb": (npz(a=npy(np.zeros(4, np.float32), HUGE)), r"do not fit float32 \[1000000, 1000000\]"),
    "negative shape": (npz(a=npy(np.zeros(4), HUGE | {"shape": (-1, -4)})), "do not fit|'a.npy'"),
    "objects": (npz(a=npy(np.array([Runs(), 1], object))), "array of object, not of numbers"),
    "text array": (saved(a=np.array(["a", "b"])), "not of numbers"),
    "records": (saved(a=np.zeros(2, [("x", "f4")])), "not of numbers"),
    "no array in it": (npz(a=b"no array"), "magic string"),
    "header that is code": (npz(a=b"\x93NUMPY\1\0\x10\0__import__('os')"), "malformed node"),
    "another member": (PYTORCH.getvalue(), "it holds no tensors"),
    "bzip2": (bytes(METHOD), "compressed by method 12"),
    "truncated": (GOOD[:-30], "not a zip file"),
    "changed": (GOOD.replace(np.float64(4).tobytes(), np.float64(5).tobytes()), "Bad CRC-32"),
    "npy": (npy(np.zeros(3)), "it is a single array"),
    "pickle": (pickle.dumps(Runs()), "its pickle calls what is no class"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "it is truncated"),
    "text": (b"no arrays", "it is not a file of weights"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_file_of_arrays_is_refused_in_one_line(tmp_path, kind):
    content, reason = BROKEN[kind]
    file = tmp_path / "weights.npz"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"weights.npz cannot be read: .*({reason})") as error:
            weight_files.read(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_arrays_are_read_as_they_were_saved(tmp_path):
    arrays = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "scalar": np.float64(3),
        "half": np.ones((2, 0, 4), np.float16),
        "bool": np.array([True, False]),
        "big": np.arange(3, dtype=">i4"),
    }
    for save in np.savez, np.savez_compressed:
        save(tmp_path / "file.npz", **arrays)
        read = weight_files.read_npz(str(tmp_path / "file.npz"), 10**6)
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype and read[name].shape == np.shape(array)
            np.testing.assert_array_equal(read[name], array)
