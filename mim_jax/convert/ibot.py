"""The state dicts of bytedance/ibot: ViT backbones, with or without the mask token, and iBOTHead."""

from collections.abc import Iterable, Mapping

import numpy as np

from mim_jax.convert import dino
from mim_jax.convert.table import ROW, Row, parts

MASK_TOKEN = Row("masked_embed", "mask_token", (1, "D"), ROW)  # the student's alone
LAYERSCALE = tuple(Row(f"blocks.{{}}.{name}", f"blocks/{name}", ("D",)) for name in ("gamma_1", "gamma_2"))


def backbone(mask_token: bool, layerscale: bool) -> tuple[Row, ...]:
    return (*dino.BACKBONE, *((MASK_TOKEN,) if mask_token else ()), *(LAYERSCALE if layerscale else ()))


def patch_layer(separate: bool) -> list[Row]:
    """The last layer for patches. One that is shared with CLS is stored twice, under both names."""
    return dino.last_layer("last_layer2", "K2", "BOTTLENECK") if separate else SHARED


SHARED = dino.last_layer("last_layer2", "K", "BOTTLENECK", path="last_layer")


def rows_for_keys(arrays: Mapping[str, np.ndarray]) -> list[Row]:
    """Whether the last layer is shared, no key tells: it is if both are the same numbers."""
    found, at = dino.parts_of_keys(arrays)
    layers, names = ("last_layer", "last_layer2"), ("weight_g", "weight_v")
    pairs = [[arrays.get(f"{at}{layer}.{name}") for layer in layers] for name in names]
    separate = not all(np.array_equal(a, b) for a, b in pairs if a is not None and b is not None)
    tables = {
        "backbone": backbone(
            any(key.endswith("masked_embed") for key in arrays), any(key.endswith(".gamma_1") for key in arrays)
        ),
        "head": [*dino.head_for_keys(arrays, at), *patch_layer(separate)],
    }
    return parts({part: tables[part] for part in found}, prefixed=bool(at))


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    found = dino.parts_of_paths(paths)
    tables = {
        "backbone": backbone("backbone/mask_token" in paths, "backbone/blocks/gamma_1" in paths),
        "head": [*dino.head_for_paths(paths), *patch_layer("head/last_layer2/weight_v" in paths)],
    }
    return parts({part: tables[part] for part in found}, prefixed=len(found) > 1)
