"""The state dicts of facebookresearch/dino: ViT backbones and DINOHead, with or without batch normalisation."""

import re
from collections.abc import Iterable

from mim_jax.convert import table
from mim_jax.convert.table import EMBEDDING, NORM, POSITIONS, TRANSPOSED, Row, block_rows, has, linear, norm, parts_of, under

BACKBONE = [*EMBEDDING, POSITIONS, *block_rows(), *NORM]
PARTS = ("backbone", "head")


def last_layer(name: str, prototypes: str, bottleneck: str, path: str) -> list[Row]:
    """A weight-normalised linear layer."""
    return [
        Row(f"{name}.weight_g", f"{path}/weight_g", (prototypes, 1), TRANSPOSED),
        Row(f"{name}.weight_v", f"{path}/weight_v", (prototypes, bottleneck), TRANSPOSED),
    ]


def head(names: Iterable[str], part: str = "head") -> list[Row]:
    """DINOHead's MLP is a torch Sequential, so its keys depend on what stands between the linear layers."""
    inside = [name.removeprefix(f"{part}.").removeprefix(f"{part}/") for name in names]
    use_bn = any(re.match(r"mlp\.\d+\.running_|batch_stats/", name) for name in inside)
    step = 3 if use_bn else 2  # modules of the Sequential for each linear layer
    matches = [match for name in inside if (match := re.match(r"mlp([._])(\d+)[./]", name))]
    nlayers = 1 + max((int(match[2]) // (step if match[1] == "." else 1) for match in matches), default=0)

    hidden, bottleneck = f"{part}_HIDDEN", f"{part}_BOTTLENECK"
    rows = last_layer("last_layer", f"{part}_K", bottleneck, "last_layer")
    for i in range(nlayers):
        at, width = f"mlp.{step * i}" if nlayers > 1 else "mlp", hidden if i < nlayers - 1 else bottleneck
        rows += linear(at, f"mlp_{i}", width, hidden if i else "D")
        if use_bn and i < nlayers - 1:
            bn = f"mlp.{step * i + 1}"
            rows += norm(bn, f"bn_{i}", width) + table.statistics(bn, f"batch_stats/bn_{i}", width)
    return rows


def single_part(keys: Iterable[str]) -> str:
    """The part that keys without a prefix belong to."""
    return "head" if has(keys, "mlp.", "last_layer.") else "backbone"


def rows(names: Iterable[str]) -> list[Row]:
    parts, prefixed = parts_of(names, PARTS, single_part(names))
    tables = {"backbone": BACKBONE, "head": head(names)}
    return [row for part in parts for row in under(part, tables[part], prefixed)]
