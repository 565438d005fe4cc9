"""The state dicts of openai/DALL-E's dVAE: its encoder, its decoder, or both."""

import re
from collections.abc import Iterable

from mim_jax.convert import table
from mim_jax.convert.table import Dim, Row


def conv(key: str, path: str, out: Dim, inputs: Dim, size: int) -> list[Row]:
    return [row._replace(key=key + end) for row, end in zip(table.conv(key, path, out, inputs, size), (".w", ".b"))]


def part_rows(part: str, blocks: int) -> list[Row]:
    """Q is a quarter of the narrowest group's width; the rows from which it is known come first."""
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
    return sorted(rows, key=lambda row: "Q" not in row.shape)


def rows(names: Iterable[str]) -> list[Row]:
    """Keys without a prefix are the decoder's if its first group begins with a change of width, as the encoder's does not."""
    single = "decoder" if table.has(names, "blocks.group_1.block_1.id_path.") else "encoder"
    parts, prefixed = table.parts_of(names, ("encoder", "decoder"), single)
    numbers = [int(match[1]) for name in names if (match := re.search(r"group_1[._]block_(\d+)[./]", name))]
    blocks = max(numbers, default=1)  # of each group
    return [row for part in parts for row in table.under(part, part_rows(part, blocks), prefixed)]
