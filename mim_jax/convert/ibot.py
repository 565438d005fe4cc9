"""The state dicts of bytedance/ibot: ViT backbones, with or without the mask token, and iBOTHead."""

from collections.abc import Mapping

import numpy as np

from mim_jax.convert import dino
from mim_jax.convert.table import ROW, Row, parts_of, under

MASK_TOKEN = Row("masked_embed", "mask_token", (1, "D"), ROW)  # the student's alone
LAYERSCALE = [Row(f"blocks.{{}}.{name}", f"blocks/{name}", ("D",)) for name in ("gamma_1", "gamma_2")]
SEPARATE = dino.last_layer("last_layer2", "head_K2", "head_BOTTLENECK", "last_layer2")
SHARED = dino.last_layer("last_layer2", "head_K", "head_BOTTLENECK", "last_layer")


def shares_last_layer(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether patches and CLS share the last layer. Official files then hold it twice, under both names, with equal numbers."""
    if any("/" in name for name in arrays):
        return "head/last_layer2/weight_v" not in arrays
    ends = [(key, key.replace("last_layer.", "last_layer2.")) for key in arrays if "last_layer." in key]
    return all(np.array_equal(arrays[a], arrays[b]) for a, b in ends if b in arrays)


def rows(arrays: Mapping[str, np.ndarray]) -> list[Row]:
    parts, prefixed = parts_of(arrays, dino.PARTS, dino.single_part(arrays))
    mask_token = any(name.endswith(("masked_embed", "backbone/mask_token")) for name in arrays)
    layerscale = any(name.endswith("gamma_1") for name in arrays)
    tables = {
        "backbone": [*dino.BACKBONE, *([MASK_TOKEN] if mask_token else []), *(LAYERSCALE if layerscale else [])],
        "head": [*dino.head(arrays), *(SHARED if shares_last_layer(arrays) else SEPARATE)],
    }
    return [row for part in parts for row in under(part, tables[part], prefixed)]
