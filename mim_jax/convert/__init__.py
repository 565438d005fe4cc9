"""Official weights in and out, as {state-dict key: numpy array}; no torch is needed.

    arrays = {key: value.numpy() for key, value in torch.load(file, map_location="cpu").items()}
    params = mim_jax.convert.from_torch(arrays, family="dino")

(Many files hold the state dict under a key of their own: `torch.load(file)["model"]` for MAE and SimMIM.)

Each family has one function, `rows(names)`: for official keys or for our paths, the table of its `Row`s, one for each
tensor (official key, path, official shape in symbols, change of layout). Both directions read this table, so a round trip is
exact.
"""

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import weight_files
from mim_jax.convert.table import Dim, Row
from mim_jax.models.positions import relative_position_index

CHUNK = re.compile(r"\bblocks\.\d+\.(?=\d+\.)")
BUFFERS = (
    *(".relative_position_index", ".attn_mask", "rope.freqs_cos", "rope.freqs_sin"),
    *(f"quantize.embedding.{name}" for name in ("cluster_size", "embed_avg", "initted")),
)


# What official files hold that an encoder lacks: tokenizers, CLIP's projection, DINOv2's heads. A network -> the families of
# its files; a family -> a name in such a file, after what stands before all names. `mim_jax.layouts` reads other encoders.
OFFICIAL = {"dvae": ("dalle", "dvae"), "vqkd": ("vqkd",), "vqvae": (), "clip": ("clip",), "dinov2": ("dinov2",)}
MARKS = {
    "dalle": r"((encoder|decoder)\.)?blocks\.group_1\.block_1\.",
    "dvae": r"codebook\.weight$",
    "vqkd": r"quantize\.embedding\.weight$",
    "clip": r"(visual\.)?conv1\.weight$",
    "dinov2": r"dino_head\.",
}


def official(path: str, network: str) -> dict[str, Any]:
    """The parameters of a network of `OFFICIAL` in a file of weights, see `weight_files.read`, by part.

    Raises FileNotFoundError, and ValueError for a file that cannot be read or is not one of this network.
    """
    arrays = arrays_of(path)
    if (found := recognised(arrays, network)) is None:
        raise ValueError(f"{path} has no {' or '.join(OFFICIAL[network]) or 'official'} weights of the network {network}")
    family, before = found
    try:
        return from_torch({name[len(before) :]: array for name, array in arrays.items() if name.startswith(before)}, family)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def arrays_of(path: str) -> dict[str, np.ndarray]:
    return weight_files.flat(weight_files.read(path))


def recognised(names: Iterable[str], network: str) -> tuple[str, str] | None:
    """(the family, what stands before all names) of an official file of a network, of a teacher if there are several; None if
    it is not one."""
    for family in OFFICIAL[network]:
        if found := {match[1] for name in names if (match := re.match(rf"((?:.*?\.)??){MARKS[family]}", name))}:
            return family, max(sorted(found), key=lambda before: "teacher" in before)
    return None


def module_of(family: str) -> Any:
    """`mim_jax/convert/<family>.py`. Raises ValueError for an unknown family."""
    try:
        return importlib.import_module(f"mim_jax.convert.{family}")
    except ModuleNotFoundError:
        raise ValueError(f"no converter for family {family!r}") from None


def from_torch(arrays: Mapping[str, np.ndarray], family: str) -> dict[str, Any]:
    """{official state-dict key: array} -> parameters by part, as `method.init` lays them out.

    A leading `module.` and buffers that follow from the model's shape are dropped.

    Families:
        dino: a backbone alone has no prefix in its keys, a full model has `backbone.` and `head.`.
        ibot: the same; the head's last layer is shared or not.
        dinov2: a backbone without a prefix, or a full model with `backbone.`, `dino_head.` and `ibot_head.`. Of
            `blocks.<chunk>.<block>`, as its trainer writes, the chunk is dropped.
        mae: encoder, with or without decoder, or with a classifier.
        simmim: ViT or Swin, with or without decoder.
        beit: BEiT and BEiT v2, or with a classifier.
        eva: EVA-01 and EVA-02, with or without the mask token and the head `lm_head`.
        clip: the vision tower of OpenAI's CLIP, with or without `visual.` before its keys; the tower of texts is ignored.
        mocov3: the whole state, or one encoder without a prefix, with or without its projector. Of the whole, the base encoder
            and the predictor are the parameters; the momentum encoder is under `teacher`, and running statistics are under
            `extra`, as in a training state.
        vqkd: BEiT v2's tokenizer.
        dalle: the dVAE's encoder or decoder, or both with `encoder.` and `decoder.` before their keys.
        dvae: BEiT's small discrete VAE.

    Raises ValueError that names every tensor that is missing, unexpected or misshapen.
    """
    arrays = {CHUNK.sub("blocks.", key.removeprefix("module.")): np.asarray(value) for key, value in arrays.items()}
    arrays = {key: value for key, value in arrays.items() if not key.endswith(BUFFERS)}
    module = module_of(family)
    # IGNORED: a regex that keys of other parts of the model begin with
    params, problems = filled(arrays, module.rows(arrays), getattr(module, "IGNORED", "(?!)"))
    if problems:
        raise ValueError(f"this is not a {family} state dict:\n  " + "\n  ".join(problems))
    return unflatten_dict(params, sep="/")


def filled(
    arrays: Mapping[str, np.ndarray], rows: Sequence[Row], ignored: str = "(?!)"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(parameters by path, problems): the rows of a table filled from official arrays. Every tensor that is missing, misshapen
    or, but for the regex `ignored`, unexpected is a problem."""
    problems: list[str] = []
    sizes: dict[str, int] = {}
    params: dict[str, np.ndarray] = {}
    known: set[str] = set()
    for row in rows:
        keys = row.keys(number_of_blocks(arrays, row.key))
        known |= set(keys)
        problems += [f"missing: {key}" for key in keys if key not in arrays]
        for key in keys:
            problems += misshapen(key, arrays[key], row.shape, sizes) if key in arrays else []
        if not problems:
            values = [row.layout.to_flax(arrays[key]) for key in keys]
            params[row.path] = np.stack(values) if "{}" in row.key else np.array(values[0])
    problems += [f"unexpected: {key}" for key in arrays if key not in known and not re.match(ignored, key)]
    return params, problems


def to_torch(params: Mapping[str, Any], family: str) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: parameters by part -> {official state-dict key: array}, with the index of relative biases.

    Raises ValueError for missing and unexpected parameters.
    """
    flat = flatten_dict(params, sep="/")
    rows = module_of(family).rows(flat)
    missing, unexpected = {row.path for row in rows} - flat.keys(), flat.keys() - {row.path for row in rows}
    if missing or unexpected:
        raise ValueError(f"these are not {family} parameters: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    out = unfilled(flat, rows)
    return out | buffers(out)


def unfilled(flat: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The inverse of `filled`: {official key: array} of the rows of a table, from parameters by path."""
    out: dict[str, np.ndarray] = {}
    for row in rows:
        values = flat[row.path] if "{}" in row.key else [flat[row.path]]
        out |= {key: np.array(row.layout.to_torch(v)) for key, v in zip(row.keys(len(values) * row.every), values)}
    return out


def buffers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The index of each relative position bias table. (Swin's masks follow from the image's size: they are left out.)

    Raises ValueError for the table of an oblong grid, whose sides its number of rows does not tell.
    """
    out = {}
    for key, table in arrays.items():
        if key.endswith("relative_position_bias_table"):
            cls = math.isqrt(len(table)) ** 2 != len(table)  # three rows more than a square grid needs
            side = (math.isqrt(len(table)) + 1) // 2
            if (2 * side - 1) ** 2 + 3 * cls != len(table):
                raise ValueError(f"{key} has {len(table)} rows, which are not those of a square grid of patches")
            out[key.replace("bias_table", "index")] = relative_position_index(side, side, cls)
    return out


def number_of_blocks(keys: Any, row_key: str) -> int:
    """One more than the largest number that a key has in the place of `row_key`'s `{}`.

    At least 1, so that the missing tensors of a state dict without blocks are named.
    """
    before = row_key.partition("{}")[0]
    numbers = [key.removeprefix(before).split(".")[0] for key in keys if key.startswith(before)]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=1)


def misshapen(key: str, array: np.ndarray, shape: tuple[Dim, ...], sizes: dict[str, int]) -> list[str]:
    """[] or one problem. Symbols that `sizes` lacks are read off the array, and added to it."""
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
