"""The rows of a converter's table, and the rows that several families share."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A change of axes from PyTorch to Flax and back."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a: a.T)  # linear: (out, in) <-> (in, out)
ROW = Layout(lambda a: a[None], lambda a: a[0])  # a token with two axes in the official code: (1, D) <-> (1, 1, D)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # (O, I, h, w) <-> (h, w, I, O)

Dim = int | str  # a size, a symbol, or "<factor>*<factor>*...*<symbol>"


class Row(NamedTuple):
    key: str  # "{}" stands for the block's number
    path: str  # slash-joined; with "{}" in `key`, blocks are stacked on a leading axis
    shape: tuple[Dim, ...]
    layout: Layout = SAME
    first: int = 0  # the numbers of the blocks that are stacked: first, first + every, ...
    every: int = 1

    def keys(self, blocks: int) -> list[str]:
        """The official keys for a model of `blocks` blocks; a key without "{}" is one key."""
        if "{}" not in self.key:
            return [self.key]
        return [self.key.format(i) for i in range(self.first, blocks, self.every)]


def has(names: Iterable[str], *starts: str) -> bool:
    """Whether an official key or a path starts with one of `starts`."""
    return any(name.startswith(starts) for name in names)


def parts_of(names: Iterable[str], parts: Sequence[str], default: str) -> tuple[list[str], bool]:
    """(the parts that the names belong to, whether official keys begin with the part).

    `names` are official keys or paths. Keys of a single part have no prefix: they belong to `default`.
    """
    by_key, by_path = ([part for part in parts if has(names, part + separator)] for separator in "./")
    return by_key or by_path or [default], bool(by_key) or len(by_path) > 1


def under(part: str, rows: Iterable[Row], prefixed: bool = False) -> list[Row]:
    """The rows with `part/` before their paths and, if `prefixed`, `part.` before their keys.

    The running statistics of batch normalisation keep their paths: they are a part `batch_stats`.
    """
    return [
        row._replace(
            key=f"{part}.{row.key}" if prefixed else row.key,
            path=row.path if row.path.startswith("batch_stats/") else f"{part}/{row.path}",
        )
        for row in rows
    ]


def weight_and_bias(key: str, path: str, shape: tuple[Dim, ...], layout: Layout = SAME) -> list[Row]:
    """A weight [out, ...], which changes its layout, and a bias [out]."""
    return [Row(f"{key}.weight", f"{path}/kernel", shape, layout), Row(f"{key}.bias", f"{path}/bias", shape[:1])]


def linear(key: str, path: str, out: Dim, inputs: Dim) -> list[Row]:
    return weight_and_bias(key, path, (out, inputs), TRANSPOSED)


def conv(key: str, path: str, out: Dim, inputs: Dim, size: Dim) -> list[Row]:
    return weight_and_bias(key, path, (out, inputs, size, size), CONV)


def norm(key: str, path: str, dim: Dim = "D") -> list[Row]:
    return [Row(f"{key}.weight", f"{path}/scale", (dim,)), Row(f"{key}.bias", f"{path}/bias", (dim,))]


def statistics(key: str, path: str, dim: Dim) -> list[Row]:
    """The running statistics of batch normalisation."""
    rows = [Row(f"{key}.running_{name}", f"{path}/{name}", (dim,)) for name in ("mean", "var")]
    return [*rows, Row(f"{key}.num_batches_tracked", f"{path}/num_batches_tracked", ())]


def block_rows(blocks: str = "blocks", dim: str = "D", mlp: str = "MLP") -> list[Row]:
    """The transformer blocks of timm's ViT, official keys `<blocks>.<number>. ...`, under our path `blocks`."""
    at = f"{blocks}.{{}}"
    return [
        *norm(f"{at}.norm1", "blocks/norm1", dim),
        *linear(f"{at}.attn.qkv", "blocks/qkv", f"3*{dim}", dim),
        *linear(f"{at}.attn.proj", "blocks/proj", dim, dim),
        *norm(f"{at}.norm2", "blocks/norm2", dim),
        *linear(f"{at}.mlp.fc1", "blocks/fc1", mlp, dim),
        *linear(f"{at}.mlp.fc2", "blocks/fc2", dim, mlp),
    ]


def beit_block_rows(blocks: str = "blocks", layerscale: bool = True) -> list[Row]:
    """The blocks of BEiT's ViT: queries and values have biases, keys have none; with or without LayerScale."""
    return [
        *(row for row in block_rows(blocks) if row.path != "blocks/qkv/bias"),
        *(Row(f"{blocks}.{{}}.{name}", f"blocks/{name}", ("D",)) for name in ("gamma_1", "gamma_2") if layerscale),
        *(Row(f"{blocks}.{{}}.attn.{name}", f"blocks/{name}", ("D",)) for name in ("q_bias", "v_bias")),
    ]


EMBEDDING = [Row("cls_token", "cls_token", (1, 1, "D")), *conv("patch_embed.proj", "patch_embed", "D", "C", "P")]
POSITIONS = Row("pos_embed", "pos_embed", (1, "1+N", "D"))
MASK_TOKEN = Row("mask_token", "mask_token", (1, 1, "D"))
SHARED_BIAS = Row("rel_pos_bias.relative_position_bias_table", "relative_position_bias_table", ("TABLE", "HEADS"))
FC_NORM = norm("fc_norm", "fc_norm")
LINEAR = linear("head", "linear", "CLASSES", "D")
NORM = norm("norm", "norm")
