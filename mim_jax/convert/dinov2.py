"""The state dicts of facebookresearch/dinov2: ViTs with or without registers, their MLP plain or SwiGLU, and the heads."""

from collections.abc import Iterable

from mim_jax.convert import dino
from mim_jax.convert.table import EMBEDDING, NORM, POSITIONS, ROW, TRANSPOSED, Row, block_rows, parts

HEADS = ("dino_head", "ibot_head")
COMMON = (
    *EMBEDDING,
    *POSITIONS,
    Row("mask_token", "mask_token", (1, "D"), ROW),
    *(Row(f"blocks.{{}}.ls{i}.gamma", f"blocks/gamma_{i}", ("D",)) for i in (1, 2)),
    *NORM,
)
REGISTERS = Row("register_tokens", "register_tokens", (1, "R", "D"))
SWIGLU = (
    Row("blocks.{}.mlp.w3.weight", "blocks/w3/kernel", ("D", "MLP"), TRANSPOSED),
    Row("blocks.{}.mlp.w3.bias", "blocks/w3/bias", ("D",)),
    Row("blocks.{}.mlp.w12.weight", "blocks/w12/kernel", ("2*MLP", "D"), TRANSPOSED),
    Row("blocks.{}.mlp.w12.bias", "blocks/w12/bias", ("2*MLP",)),
)


def backbone(registers: bool, swiglu: bool) -> list[Row]:
    blocks = [row for row in block_rows() if not (swiglu and row.path.startswith(("blocks/fc1", "blocks/fc2")))]
    return [*COMMON, *((REGISTERS,) if registers else ()), *blocks, *(SWIGLU if swiglu else ())]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    """`backbone.`, `dino_head.` and `ibot_head.` before the keys of a full model, nothing before those of a backbone."""
    found = [part for part in ("backbone", *HEADS) if any(key.startswith(f"{part}.") for key in keys)]
    registers, swiglu = (any(key.endswith(end) for key in keys) for end in ("register_tokens", ".mlp.w12.weight"))
    tables = {"backbone": backbone(registers, swiglu)} | {h: dino.head_for_keys(keys, f"{h}.", h) for h in HEADS}
    return parts({part: tables[part] for part in found or ["backbone"]}, prefixed=bool(found))


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    found = [part for part in ("backbone", *HEADS) if any(path.startswith(f"{part}/") for path in paths)]
    tables = {"backbone": backbone("backbone/register_tokens" in paths, "backbone/blocks/w12/kernel" in paths)}
    tables |= {h: dino.head_for_paths(paths, h, h) for h in HEADS}
    return parts({part: tables[part] for part in found}, prefixed=found != ["backbone"])
