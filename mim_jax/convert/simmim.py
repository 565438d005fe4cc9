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
    norm,
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
DECODER = [
    Row("decoder.0.weight", "linear/kernel", ("PIXELS", "OUT", 1, 1), PIXELS),
    Row("decoder.0.bias", "linear/bias", ("PIXELS",), Layout(to_last, to_first)),
]


def swin(stages: int) -> list[Row]:
    """Stage s has width 2 ** s * D; the final norm is as wide as the last."""
    patch_embed = [row for row in EMBEDDING if row.path.startswith("patch_embed/")]
    rows = [MASK_TOKEN, *patch_embed, *norm("patch_embed.norm", "patch_norm")]
    for s in range(stages):
        dim, at, to = f"{2**s}*D", f"layers.{s}", f"stage_{s}"
        bias = "relative_position_bias_table"
        block = [
            *block_rows(f"{at}.blocks", dim, f"MLP{s}"),
            Row(f"{at}.blocks.{{}}.attn.{bias}", f"blocks/{bias}", (f"TABLE{s}", f"HEADS{s}")),
        ]
        for first, name in enumerate(("plain", "shifted")):
            inside = f"{to}/blocks/{name}/"
            rows += [row._replace(path=row.path.replace("blocks/", inside), first=first, every=2) for row in block]
        if s < stages - 1:
            twice, four = f"{2 ** (s + 1)}*D", f"{2 ** (s + 2)}*D"
            rows.append(Row(f"{at}.downsample.reduction.weight", f"{to}/merge/kernel", (twice, four), TRANSPOSED))
            rows += norm(f"{at}.downsample.norm", f"{to}/merge_norm", four)
    return rows + norm("norm", "norm", f"{2 ** (stages - 1)}*D")


def rows(names: Iterable[str]) -> list[Row]:
    """A ViT has relative biases or absolute positions, and may have LayerScale."""
    stages = {match[1] for name in names if (match := re.match(r"(?:encoder\.layers\.|backbone/stage_)(\d+)", name))}
    absolute, layerscale, decoder = (
        any(re.search(part, name) for name in names) for part in ("pos_embed$", "gamma_1$", "^decoder")
    )
    vit = [*EMBEDDING, MASK_TOKEN, POSITIONS if absolute else SHARED_BIAS, *beit_block_rows(layerscale=layerscale), *NORM]
    backbone = [row._replace(key=f"encoder.{row.key}") for row in (swin(len(stages)) if stages else vit)]
    return [*under("backbone", backbone), *under("decoder", DECODER if decoder else [])]
