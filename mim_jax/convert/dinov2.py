"""The state dicts of facebookresearch/dinov2: ViTs with or without registers, their MLP plain or SwiGLU, and the heads."""

from collections.abc import Iterable

from mim_jax.convert import dino
from mim_jax.convert.table import EMBEDDING, NORM, POSITIONS, ROW, Row, block_rows, linear, parts_of, under

HEADS = ("dino_head", "ibot_head")
COMMON = [
    *EMBEDDING,
    POSITIONS,
    Row("mask_token", "mask_token", (1, "D"), ROW),
    *(Row(f"blocks.{{}}.ls{i}.gamma", f"blocks/gamma_{i}", ("D",)) for i in (1, 2)),
    *NORM,
]
REGISTERS = Row("register_tokens", "register_tokens", (1, "R", "D"))
SWIGLU = [
    *linear("blocks.{}.mlp.w3", "blocks/w3", "D", "MLP"),
    *linear("blocks.{}.mlp.w12", "blocks/w12", "2*MLP", "D"),
]


def backbone(registers: bool, swiglu: bool) -> list[Row]:
    blocks = [row for row in block_rows() if not (swiglu and row.path.startswith(("blocks/fc1", "blocks/fc2")))]
    return [*COMMON, *([REGISTERS] if registers else []), *blocks, *(SWIGLU if swiglu else [])]


def rows(names: Iterable[str]) -> list[Row]:
    parts, prefixed = parts_of(names, ("backbone", *HEADS), "backbone")
    registers, swiglu = (any(word in name for name in names) for word in ("register_tokens", "w12"))
    tables = {"backbone": backbone(registers, swiglu)} | {part: dino.head(names, part) for part in HEADS}
    return [row for part in parts for row in under(part, tables[part], prefixed or parts != ["backbone"])]
