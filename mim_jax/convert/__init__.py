"""Official weights in and out, as {state-dict key: numpy array}; no torch is needed.

    arrays = {key: value.numpy() for key, value in torch.load(file, map_location="cpu").items()}
    params = mim_jax.convert.from_torch(arrays, family="dino")

(Many files hold the state dict under a key of their own: `torch.load(file)["model"]` for MAE and SimMIM.)

Each family is a table of `Row`s, one for each tensor: its official key, our path, the official shape in symbols, and how
the layout changes. The two directions read the same table, so a round trip is exact.
"""

import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.convert.table import Dim
from mim_jax.models.positions import relative_position_index

CHUNK = re.compile(r"\bblocks\.\d+\.(?=\d+\.)")
BUFFERS = (
    *(".relative_position_index", ".attn_mask"),
    *(f"quantize.embedding.{name}" for name in ("cluster_size", "embed_avg", "initted")),
)


def family_module(family: str) -> Any:
    """`mim_jax/convert/<family>.py`. Raises ValueError for a family that is not known."""
    try:
        return importlib.import_module(f"mim_jax.convert.{family}")
    except ModuleNotFoundError:
        raise ValueError(f"no converter for family {family!r}") from None


def from_torch(arrays: Mapping[str, np.ndarray], family: str) -> dict[str, Any]:
    """{official state-dict key: array} -> parameters by part, as `method.init` lays them out.

    Families: "dino" (a backbone alone comes without a prefix in its keys, a full model with `backbone.` and `head.`),
    "ibot" (the same, the head's last layer shared or not), "dinov2" (a backbone without a prefix, a full model with
    `backbone.`, `dino_head.` and `ibot_head.`; of `blocks.<chunk>.<block>`, as its trainer writes, the chunk is dropped),
    "mae" (encoder, with or without decoder, or with a classifier), "simmim" (ViT or Swin, with or without decoder), "beit"
    (BEiT and BEiT v2, or with a classifier), "vqkd" (BEiT v2's tokenizer), "dalle" (the dVAE's encoder or decoder, or both
    with `encoder.` and `decoder.` before their keys) and "dvae" (BEiT's small discrete VAE). A leading `module.` and buffers
    that follow from the model's shape are dropped. Raises ValueError that names every tensor which is missing, unexpected or
    misshapen.
    """
    arrays = {CHUNK.sub("blocks.", key.removeprefix("module.")): np.asarray(value) for key, value in arrays.items()}
    arrays = {key: value for key, value in arrays.items() if not key.endswith(BUFFERS)}
    problems: list[str] = []
    sizes: dict[str, int] = {}
    params: dict[str, Any] = {}
    rows = family_module(family).rows_for_keys(arrays)
    known: set[str] = set()
    for row in rows:
        keys = row.keys(number_of_blocks(arrays, row.key))
        known |= set(keys)
        problems += [f"missing: {key}" for key in keys if key not in arrays]
        for key in keys:
            problems += misshapen(key, arrays[key], row.shape, sizes) if key in arrays else []
        if not problems:
            values = [row.layout.to_flax(arrays[key]) for key in keys]
            put(params, row.path, np.stack(values) if "{}" in row.key else np.array(values[0]))
    problems += [f"unexpected: {key}" for key in arrays if key not in known]
    if problems:
        raise ValueError(f"this is not a {family} state dict:\n  " + "\n  ".join(problems))
    return params


def to_torch(params: Mapping[str, Any], family: str) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: parameters by part -> {official state-dict key: array}, with the buffers that can be told.

    Raises ValueError for parameters that the family's table does not know or does not find.
    """
    flat = flatten(params)
    out: dict[str, np.ndarray] = {}
    rows = family_module(family).rows_for_paths(flat)
    missing, unexpected = {row.path for row in rows} - flat.keys(), flat.keys() - {row.path for row in rows}
    if missing or unexpected:
        raise ValueError(f"these are not {family} parameters: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    for row in rows:
        values = flat[row.path] if "{}" in row.key else [flat[row.path]]
        out |= {key: np.array(row.layout.to_torch(v)) for key, v in zip(row.keys(len(values) * row.every), values)}
    return out | buffers(out)


def buffers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The index of each relative position bias table. (Swin's masks follow from the image's size: they are left out.)"""
    out = {}
    for key, table in arrays.items():
        if key.endswith("relative_position_bias_table"):
            cls = math.isqrt(len(table)) ** 2 != len(table)  # a square grid's alone, or three rows more
            side = (round((len(table) - 3 * cls) ** 0.5) + 1) // 2
            index = relative_position_index(side, side, cls)
            out[key.replace("bias_table", "index")] = index
    return out


def number_of_blocks(keys: Any, row_key: str) -> int:
    """One more than the largest number that stands in a key where `row_key` has `{}`, whatever follows it.

    At least 1, so that a state dict without blocks names them.
    """
    before = row_key.partition("{}")[0]
    numbers = [key.removeprefix(before).split(".")[0] for key in keys if key.startswith(before)]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=1)


def misshapen(key: str, array: np.ndarray, shape: tuple[Dim, ...], sizes: dict[str, int]) -> list[str]:
    """[] or one complaint. Symbols that `sizes` lacks are learnt from the array."""
    if len(shape) == array.ndim:
        for dim, size in zip(shape, array.shape):
            if isinstance(dim, str) and "*" not in dim:
                sizes.setdefault(dim, size)
    wanted = tuple(resolve(dim, sizes) for dim in shape)
    return [] if wanted == array.shape else [f"misshapen: {key} is {array.shape}, expected {wanted}"]


def resolve(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    if isinstance(dim, int):
        return dim
    *factors, symbol = dim.split("*")
    return math.prod(map(int, factors)) * sizes[symbol] if symbol in sizes else dim


def put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    out: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: np.asarray(value)}
    return out
