"""The state dicts of openai/DALL-E's dVAE: its encoder, its decoder, or both."""

import re
from collections.abc import Iterable

from mim_jax.convert.table import CONV, Dim, Row, under

PARTS = ("encoder", "decoder")


def conv(key: str, path: str, out: Dim, inputs: Dim, size: int) -> list[Row]:
    return [Row(f"{key}.w", f"{path}/kernel", (out, inputs, size, size), CONV), Row(f"{key}.b", f"{path}/bias", (out,))]


def table(part: str, blocks: int) -> list[Row]:
    """Q is a quarter of the narrowest group's width; the rows that tell it come first."""
    factors, kernels, x = (1, 2, 4, 8), (3, 3, 3, 1), "4*Q"
    rows = conv("blocks.input", "input", "4*Q", "C", 7) + conv("blocks.output.conv", "output", "V", "32*Q", 1)
    if part == "decoder":
        factors, kernels, x = factors[::-1], kernels[::-1], "INIT"
        rows = conv("blocks.input", "input", "INIT", "V", 1) + conv("blocks.output.conv", "output", "OUT", "4*Q", 1)
    for g, factor in enumerate(factors, 1):
        width, inside = f"{4 * factor}*Q", f"{factor}*Q" if factor > 1 else "Q"
        for b in range(1, blocks + 1):
            key, path = f"blocks.group_{g}.block_{b}", f"group_{g}_block_{b}"
            chain = (x, inside, inside, inside, width)
            for i, size in enumerate(kernels):
                rows += conv(f"{key}.res_path.conv_{i + 1}", f"{path}/conv_{i + 1}", chain[i + 1], chain[i], size)
            rows += conv(f"{key}.id_path", f"{path}/id_path", width, x, 1) if x != width else []
            x = width
    return under(part, sorted(rows, key=lambda row: "Q" not in row.shape))


def number_of_blocks(names: Iterable[str]) -> int:
    """Of each group, told by the first; at least 1."""
    return max((int(match[1]) for name in names if (match := re.search(r"group_1[._]block_(\d+)[./]", name))), default=1)


def tables(parts: Iterable[str], prefixed: bool, blocks: int) -> list[Row]:
    rows = [(part, row) for part in parts for row in table(part, blocks)]
    return [row._replace(key=f"{part}.{row.key}") if prefixed else row for part, row in rows]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    """`encoder.` and `decoder.` stand before the keys of both, nothing before those of one alone. The decoder's first
    group begins with a change of width, the encoder's does not."""
    parts = [part for part in PARTS if any(key.startswith(f"{part}.") for key in keys)]
    own = "decoder" if any(key.startswith("blocks.group_1.block_1.id_path.") for key in keys) else "encoder"
    return tables(parts or [own], bool(parts), number_of_blocks(keys))


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    parts = [part for part in PARTS if any(path.startswith(f"{part}/") for path in paths)]
    return tables(parts, len(parts) > 1, number_of_blocks(paths))
