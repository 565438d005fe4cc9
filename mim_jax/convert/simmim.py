"""The state dicts of microsoft/SimMIM: ViT or Swin, with the pre-training's prefix `encoder.`."""

import re
from collections.abc import Iterable

import numpy as np

from mim_jax.convert.table import (
    EMBEDDING,
    MASK_TOKEN,
    NORM,
    POSITIONS,
    SHARED_BIAS,
    TRANSPOSED,
    Layout,
    Row,
    beit_block_rows,
    block_rows,
    under,
)


def to_last(a: np.ndarray) -> np.ndarray:
    """(3 * p * p, ...) in (channel, row, column) order -> (p * p * 3, ...) in (row, column, channel) order."""
    side = round((len(a) // 3) ** 0.5)
    return np.moveaxis(a.reshape(3, side, side, *a.shape[1:]), 0, 2).reshape(a.shape)


def to_first(a: np.ndarray) -> np.ndarray:
    """The inverse of `to_last`."""
    side = round((len(a) // 3) ** 0.5)
    return np.moveaxis(a.reshape(side, side, 3, *a.shape[1:]), 2, 0).reshape(a.shape)


# a 1 x 1 convolution and pixel shuffle: (3 * p * p, D, 1, 1) <-> (D, p * p * 3)
PIXELS = Layout(lambda a: to_last(a[:, :, 0, 0]).T, lambda a: to_first(a.T)[:, :, None, None])
DECODER = (
    Row("decoder.0.weight", "linear/kernel", ("PIXELS", "OUT", 1, 1), PIXELS),
    Row("decoder.0.bias", "linear/bias", ("PIXELS",), Layout(to_last, to_first)),
)
PARTS = ("pos_embed$", "gamma_1$", "^decoder")  # that a model may have or not, as keys and as paths name them


def vit(positions: bool, layerscale: bool) -> list[Row]:
    """With absolute positions instead of relative biases, if such there are; with or without LayerScale."""
    where = POSITIONS if positions else (SHARED_BIAS,)
    return [*EMBEDDING, MASK_TOKEN, *where, *beit_block_rows(layerscale=layerscale), *NORM]


def swin(stages: int) -> list[Row]:
    """Stage s has width 2 ** s * D; the final norm is as wide as the last."""
    rows = [
        MASK_TOKEN,
        *(row for row in EMBEDDING if row.path.startswith("patch_embed/")),
        Row("patch_embed.norm.weight", "patch_norm/scale", ("D",)),
        Row("patch_embed.norm.bias", "patch_norm/bias", ("D",)),
    ]
    for s in range(stages):
        dim, at, to = f"{2**s}*D", f"layers.{s}", f"stage_{s}"
        bias = "relative_position_bias_table"
        block = (
            *block_rows(f"{at}.blocks", dim, f"MLP{s}"),
            Row(f"{at}.blocks.{{}}.attn.{bias}", f"blocks/{bias}", (f"TABLE{s}", f"HEADS{s}")),
        )
        for first, name in enumerate(("plain", "shifted")):
            inside = f"{to}/blocks/{name}/"
            rows += [row._replace(path=row.path.replace("blocks/", inside), first=first, every=2) for row in block]
        if s < stages - 1:
            twice, four = f"{2 ** (s + 1)}*D", f"{2 ** (s + 2)}*D"
            rows += [
                Row(f"{at}.downsample.reduction.weight", f"{to}/merge/kernel", (twice, four), TRANSPOSED),
                Row(f"{at}.downsample.norm.weight", f"{to}/merge_norm/scale", (four,)),
                Row(f"{at}.downsample.norm.bias", f"{to}/merge_norm/bias", (four,)),
            ]
    return rows + [row._replace(shape=(f"{2 ** (stages - 1)}*D",)) for row in NORM]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    stages = {match[1] for key in keys if (match := re.match(r"(?:encoder\.layers\.|backbone/stage_)(\d+)", key))}
    positions, layerscale, decoder = (any(re.search(part, key) for key in keys) for part in PARTS)
    rows = swin(len(stages)) if stages else vit(positions, layerscale)
    backbone = [row._replace(key=f"encoder.{row.key}") for row in rows]
    return [*under("backbone", backbone), *under("decoder", DECODER if decoder else ())]


rows_for_paths = rows_for_keys  # what is looked for has its name in both
