"""The rows of a converter's table."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A change of axes from PyTorch to Flax and back."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a: a.T)  # linear: (out, in) <-> (in, out)
ROW = Layout(lambda a: a[None], lambda a: a[0])  # a token that has two axes there: (1, D) <-> (1, 1, D)
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
        """The official keys, of `blocks` blocks in all where there is one for each block."""
        if "{}" not in self.key:
            return [self.key]
        return [self.key.format(i) for i in range(self.first, blocks, self.every)]


def under(part: str, rows: Iterable[Row]) -> list[Row]:
    """The rows with `part/` before their paths."""
    return [row._replace(path=f"{part}/{row.path}") for row in rows]


def parts(tables: Mapping[str, Iterable[Row]], prefixed: bool) -> list[Row]:
    """The rows of a model's parts under their paths, the keys of each with `<part>.` before them if `prefixed`.

    Batch norm's running figures are no parameters: they become a part `batch_stats`.
    """
    return [
        row._replace(
            key=f"{part}.{row.key}" if prefixed else row.key,
            path=row.path if row.path.startswith("batch_stats/") else f"{part}/{row.path}",
        )
        for part, rows in tables.items()
        for row in rows
    ]


def block_rows(blocks: str = "blocks", dim: str = "D", mlp: str = "MLP") -> tuple[Row, ...]:
    """The transformer blocks of timm's ViT, official keys `<blocks>.<number>. ...`, under our path `blocks`."""
    return (
        Row(f"{blocks}.{{}}.norm1.weight", "blocks/norm1/scale", (dim,)),
        Row(f"{blocks}.{{}}.norm1.bias", "blocks/norm1/bias", (dim,)),
        Row(f"{blocks}.{{}}.attn.qkv.weight", "blocks/qkv/kernel", (f"3*{dim}", dim), TRANSPOSED),
        Row(f"{blocks}.{{}}.attn.qkv.bias", "blocks/qkv/bias", (f"3*{dim}",)),
        Row(f"{blocks}.{{}}.attn.proj.weight", "blocks/proj/kernel", (dim, dim), TRANSPOSED),
        Row(f"{blocks}.{{}}.attn.proj.bias", "blocks/proj/bias", (dim,)),
        Row(f"{blocks}.{{}}.norm2.weight", "blocks/norm2/scale", (dim,)),
        Row(f"{blocks}.{{}}.norm2.bias", "blocks/norm2/bias", (dim,)),
        Row(f"{blocks}.{{}}.mlp.fc1.weight", "blocks/fc1/kernel", (mlp, dim), TRANSPOSED),
        Row(f"{blocks}.{{}}.mlp.fc1.bias", "blocks/fc1/bias", (mlp,)),
        Row(f"{blocks}.{{}}.mlp.fc2.weight", "blocks/fc2/kernel", (dim, mlp), TRANSPOSED),
        Row(f"{blocks}.{{}}.mlp.fc2.bias", "blocks/fc2/bias", (dim,)),
    )


def beit_block_rows(blocks: str = "blocks", layerscale: bool = True) -> tuple[Row, ...]:
    """Those of BEiT's ViT: queries and values have biases, keys have none, and there may be LayerScale."""
    return (
        *(row for row in block_rows(blocks) if row.path != "blocks/qkv/bias"),
        *(Row(f"{blocks}.{{}}.{name}", f"blocks/{name}", ("D",)) for name in ("gamma_1", "gamma_2") if layerscale),
        *(Row(f"{blocks}.{{}}.attn.{name}", f"blocks/{name}", ("D",)) for name in ("q_bias", "v_bias")),
    )


EMBEDDING = (
    Row("cls_token", "cls_token", (1, 1, "D")),
    Row("patch_embed.proj.weight", "patch_embed/kernel", ("D", "C", "P", "P"), CONV),
    Row("patch_embed.proj.bias", "patch_embed/bias", ("D",)),
)
POSITIONS = (Row("pos_embed", "pos_embed", (1, "1+N", "D")),)
MASK_TOKEN = Row("mask_token", "mask_token", (1, 1, "D"))
SHARED_BIAS = Row("rel_pos_bias.relative_position_bias_table", "relative_position_bias_table", ("TABLE", "HEADS"))
FC_NORM = (Row("fc_norm.weight", "fc_norm/scale", ("D",)), Row("fc_norm.bias", "fc_norm/bias", ("D",)))
LINEAR = (Row("head.weight", "linear/kernel", ("CLASSES", "D"), TRANSPOSED), Row("head.bias", "linear/bias", ("CLASSES",)))
NORM = (Row("norm.weight", "norm/scale", ("D",)), Row("norm.bias", "norm/bias", ("D",)))
