"""The state dicts of facebookresearch/dino: ViT backbones and DINOHead, with or without batch normalisation."""

import re
from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, NORM, POSITIONS, TRANSPOSED, Row, block_rows, parts

BACKBONE = (*EMBEDDING, *POSITIONS, *block_rows(), *NORM)


def head(nlayers: int, use_bn: bool, of: str = "") -> list[Row]:
    """DINOHead's MLP is a torch Sequential, so that its keys depend on what stands between the linear layers.

    `of` tells the sizes of one head from those of another.
    """
    hidden, bottleneck = f"HIDDEN{of}", f"BOTTLENECK{of}"
    rows = last_layer("last_layer", f"K{of}", bottleneck)
    for i in range(nlayers):
        at = f"mlp.{(3 if use_bn else 2) * i}" if nlayers > 1 else "mlp"
        width_in, width = "D" if i == 0 else hidden, bottleneck if i == nlayers - 1 else hidden
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


def last_layer(name: str, prototypes: str, bottleneck: str, path: str = "") -> list[Row]:
    """A weight-normalised layer, under our `path` (by default its own name)."""
    path = path or name
    return [
        Row(f"{name}.weight_g", f"{path}/weight_g", (prototypes, 1), TRANSPOSED),
        Row(f"{name}.weight_v", f"{path}/weight_v", (prototypes, bottleneck), TRANSPOSED),
    ]


def head_for_keys(keys: Iterable[str], at: str = "", of: str = "") -> list[Row]:
    """The head whose official keys start with `at`."""
    names = [key.removeprefix(at) for key in keys if key.startswith(at)]
    use_bn = any(name.endswith("running_mean") for name in names)
    numbers = [int(match[1]) for name in names if (match := re.match(r"mlp\.(\d+)\.", name))]
    return head(max(numbers, default=0) // (3 if use_bn else 2) + 1, use_bn, of)


def head_for_paths(paths: Iterable[str], part: str = "head", of: str = "") -> list[Row]:
    """The head that is our part `part`."""
    nlayers = sum(bool(re.match(rf"{part}/mlp_\d+/kernel$", path)) for path in paths)
    return head(nlayers, any(path.startswith("batch_stats/") for path in paths), of)


def parts_of_keys(keys: Iterable[str]) -> tuple[list[str], str]:
    """(the parts, what stands before a head's keys): `backbone.` and `head.` before those of a full model, nothing before
    a part's own."""
    found = [part for part in ("backbone", "head") if any(key.startswith(f"{part}.") for key in keys)]
    own = ["head"] if any(key.startswith(("mlp.", "last_layer.")) for key in keys) else ["backbone"]
    return found or own, "head." if found else ""


def parts_of_paths(paths: Iterable[str]) -> list[str]:
    return [part for part in ("backbone", "head") if any(path.startswith(f"{part}/") for path in paths)]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    found, at = parts_of_keys(keys)
    tables = {"backbone": BACKBONE, "head": head_for_keys(keys, at)}
    return parts({part: tables[part] for part in found}, prefixed=bool(at))


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    """One part alone gets no prefix, as in the official files."""
    found = parts_of_paths(paths)
    tables = {"backbone": BACKBONE, "head": head_for_paths(paths)}
    return parts({part: tables[part] for part in found}, prefixed=len(found) > 1)
