"""The state dicts of facebookresearch/dino: ViT backbones and DINOHead, with or without batch normalisation."""

import re
from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, NORM, POSITIONS, TRANSPOSED, Row, block_rows

BACKBONE = (*EMBEDDING, *POSITIONS, *block_rows(), *NORM)


def head(nlayers: int, use_bn: bool) -> list[Row]:
    """DINOHead's MLP is a torch Sequential, so that its keys depend on what stands between the linear layers."""
    rows = [
        Row("last_layer.weight_g", "last_layer/weight_g", ("K", 1), TRANSPOSED),
        Row("last_layer.weight_v", "last_layer/weight_v", ("K", "BOTTLENECK"), TRANSPOSED),
    ]
    for i in range(nlayers):
        at = f"mlp.{(3 if use_bn else 2) * i}" if nlayers > 1 else "mlp"
        width_in, width = "D" if i == 0 else "HIDDEN", "BOTTLENECK" if i == nlayers - 1 else "HIDDEN"
        rows.append(Row(f"{at}.weight", f"mlp_{i}/kernel", (width, width_in), TRANSPOSED))
        rows.append(Row(f"{at}.bias", f"mlp_{i}/bias", (width,)))
        if use_bn and i < nlayers - 1:
            bn = f"mlp.{3 * i + 1}"
            rows.append(Row(f"{bn}.weight", f"bn_{i}/scale", (width,)))
            rows.append(Row(f"{bn}.bias", f"bn_{i}/bias", (width,)))
            rows.append(Row(f"{bn}.running_mean", f"batch_stats/bn_{i}/mean", (width,)))
            rows.append(Row(f"{bn}.running_var", f"batch_stats/bn_{i}/var", (width,)))
            rows.append(Row(f"{bn}.num_batches_tracked", f"batch_stats/bn_{i}/num_batches_tracked", ()))
    return rows


def table(parts: Iterable[str], prefixed: bool, nlayers: int, use_bn: bool) -> list[Row]:
    """The rows of these parts. Batch norm's running figures are no parameters: they become a part `batch_stats`."""
    tables = {"backbone": BACKBONE, "head": head(nlayers, use_bn)}
    return [
        row._replace(
            key=f"{part}.{row.key}" if prefixed else row.key,
            path=row.path if row.path.startswith("batch_stats/") else f"{part}/{row.path}",
        )
        for part in parts
        for row in tables[part]
    ]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    """The table for official keys: `backbone.` and `head.` before those of a full model, nothing before a part's own."""
    parts = [part for part in ("backbone", "head") if any(key.startswith(f"{part}.") for key in keys)]
    own = ["head"] if any(key.startswith(("mlp.", "last_layer.")) for key in keys) else ["backbone"]
    use_bn = any(key.endswith("running_mean") for key in keys)
    numbers = [int(n) for key in keys for n in re.findall(r"^(?:head\.)?mlp\.(\d+)\.", key)]
    return table(parts or own, bool(parts), max(numbers, default=0) // (3 if use_bn else 2) + 1, use_bn)


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    """The table for our own paths; one part alone gets no prefix, as in the official files."""
    parts = [part for part in ("backbone", "head") if any(path.startswith(f"{part}/") for path in paths)]
    nlayers = sum(bool(re.match(r"head/mlp_\d+/kernel$", path)) for path in paths)
    return table(parts, len(parts) > 1, nlayers, any(path.startswith("batch_stats/") for path in paths))
