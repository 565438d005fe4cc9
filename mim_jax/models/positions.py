"""Positions of patches: sine-cosine tables, learned tables at another resolution, and relative position biases."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.interpolate  # type: ignore[import-untyped]


def sincos_positions(dim: int, rows: int, columns: int, row_first: bool = False) -> np.ndarray:
    """MAE's fixed table, float64 [1, 1 + rows * columns, dim]: zeros for CLS, then the patches row-major.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of the coordinate
    times 10000 ** (-i / (dim / 4)). Source: MAE, `pos_embed.py`. `row_first` swaps the halves: MoCo v3. Raises ValueError if 4
    does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} cannot have sine-cosine positions: it must be a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1) * frequencies
    first, second = (row, column) if row_first else (column, row)
    patches = np.concatenate([np.sin(first), np.cos(first), np.sin(second), np.cos(second)], axis=1)
    return np.concatenate([np.zeros((1, dim)), patches])[None]


def rotary_angles(dim: int, grid: tuple[int, int], side: int) -> np.ndarray:
    """The angles of EVA-02's rotary positions, float64 [rows * columns, dim], patches row-major.

    The first half of a head's channels is for the row, the second for the column. Two channels that are neighbours have one
    angle: the coordinate times 10000 ** (-i / (dim / 4)). A grid of another size than `side` x `side` is stretched to it.
    Source: EVA-02 (Fang et al. 2023, arXiv:2303.11331), `rope.py`. Raises ValueError if 4 does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"heads of width {dim} cannot have rotary positions: it must be a multiple of 4")
    frequencies = (10000.0 ** (-np.arange(dim // 4) / (dim / 4))).astype(np.float32)  # as in the official code
    row, column = (places.reshape(-1, 1) / n * side * frequencies for places, n in zip(np.mgrid[: grid[0], : grid[1]], grid))
    return np.repeat(np.concatenate([row, column], axis=1), 2, axis=1)


def rotated(x: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
    """Queries or keys [B, T, H, d] with each pair of channels turned by its angle, see `rotary_angles`.

    The last tokens are the patches of the grid, (rows, columns); those before them, CLS and registers, stay as they are.
    """
    angles = rotary_angles(x.shape[-1], grid, side)
    angles = np.concatenate([np.zeros((x.shape[1] - len(angles), x.shape[-1])), angles])[:, None]
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    cos, sin = (jnp.asarray(table, dtype) for table in (np.cos(angles), np.sin(angles) * np.tile([-1, 1], x.shape[-1] // 2)))
    other = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (x * cos + other * sin).astype(x.dtype)


def rotated_by_halves(x: jax.Array, grid: tuple[int, int], period: float) -> jax.Array:
    """As `rotated`, by DINOv3's angles (Simeoni et al. 2025, arXiv:2508.10104), as its released weights need them.

    Places are -1..1 along each side, whatever its length; an angle is 2 pi times the place, over period ** (4 i / d). The first
    quarter of a head's channels is for the row, the second for the column; channel c turns with channel c + d / 2. Raises
    ValueError if 4 does not divide the width d of a head.
    """
    width = x.shape[-1]
    if width % 4:
        raise ValueError(f"heads of width {width} cannot have rotary positions: it must be a multiple of 4")
    periods = period ** (4 * np.arange(width // 4) / width)
    row, column = ((2 * places.reshape(-1, 1) + 1) / n - 1 for places, n in zip(np.mgrid[: grid[0], : grid[1]], grid))
    angles = 2 * np.pi * np.concatenate([row / periods, column / periods], axis=1)
    angles = np.concatenate([np.zeros((x.shape[1] - len(angles), width // 2)), angles])[:, None]
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    cos, sin = (jnp.asarray(table, dtype) for table in (np.cos(angles), np.sin(angles)))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def interpolation_weights(size: int, to: int, offset: float = 0.1) -> np.ndarray:
    """Weights [to, size] of PyTorch's bicubic interpolation (a = -0.75, clamped borders, no antialiasing).

    DINO's code passes the scale factor (to + 0.1) / size, by which PyTorch then maps the coordinates; MAE's passes the size,
    which is `offset` 0.
    """
    source = (np.arange(to) + 0.5) * size / (to + offset) - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((to, size))
    for tap in range(4):
        t = np.abs(source - (first + tap))
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        np.add.at(weights, (np.arange(to), np.clip(first + tap, 0, size - 1)), np.where(t <= 1, near, far))
    return weights


def interpolate_positions(
    pos_embed: jax.Array, rows: int, columns: int, offset: float = 0.1, antialias: bool = False
) -> jax.Array:
    """Positions [1, 1 + N, D] of a square grid -> [1, 1 + rows * columns, D]; that of CLS does not change.

    `antialias`: by an antialiased cubic (a = -0.5), as DINOv2 with registers; else see `interpolation_weights`.
    """
    size = round((pos_embed.shape[1] - 1) ** 0.5)
    if rows == columns == size:
        return pos_embed
    grid = pos_embed[0, 1:].reshape(size, size, -1)
    if antialias:
        grid = jax.image.resize(grid, (rows, columns, grid.shape[-1]), "bicubic", precision="highest")
    else:
        vertical, horizontal = (jnp.asarray(interpolation_weights(size, to, offset), grid.dtype) for to in (rows, columns))
        grid = jnp.einsum("rh,cw,hwd->rcd", vertical, horizontal, grid, precision="highest")
    return jnp.concatenate([pos_embed[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


def relative_position_index(rows: int, columns: int, cls: bool) -> np.ndarray:
    """The row of the bias table for each pair of tokens, int [T, T], query by key, patches row-major.

    For patches: (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1, where d is query minus key (Swin, section 3.2). With
    `cls`, token 0 is CLS, and the last three rows are for CLS to patch, patch to CLS, and CLS to itself (BEiT).
    """
    y, x = (axis.reshape(-1) for axis in np.mgrid[:rows, :columns])
    patches = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
    if not cls:
        return patches
    last = (2 * rows - 1) * (2 * columns - 1)
    index = np.full((1 + len(patches), 1 + len(patches)), last)
    index[1:, 1:], index[1:, 0], index[0, 0] = patches, last + 1, last + 2
    return index


def relative_bias(table: jax.Array, grid: int, to: tuple[int, int], bilinear: bool = False) -> jax.Array:
    """The bias [heads, 1 + N, 1 + N] of CLS and the patches of the grid `to`, from the table [rows, heads] of a square grid.
    `bilinear`: see `interpolate_bias_table`."""
    return bias_of_pairs(interpolate_bias_table(table, (grid, grid), to, cls=True, bilinear=bilinear), *to, cls=True)


def bias_of_pairs(table: jax.Array, rows: int, columns: int, cls: bool) -> jax.Array:
    """The table's entry for each pair of tokens: [R, heads] -> [heads, T, T], by `relative_position_index`.

    By products with constant zeros and ones, which are exact: the gradient of a gather is a slow scatter.
    """

    def pairs(n: int) -> jax.Array:
        places = np.arange(n)
        return jnp.asarray(np.eye(2 * n - 1)[places[:, None] - places + n - 1], table.dtype)

    sides, heads = (2 * rows - 1, 2 * columns - 1), table.shape[1]
    patches = table[: sides[0] * sides[1]].reshape(*sides, heads)
    bias = jnp.einsum("yYa,xXb,abh->hyxYX", pairs(rows), pairs(columns), patches, precision="highest")
    bias = bias.reshape(heads, rows * columns, rows * columns)
    if not cls:
        return bias
    to_patch, from_patch, itself = (jnp.broadcast_to(row[:, None], (heads, rows * columns)) for row in table[-3:])
    first = jnp.concatenate([itself[:, :1], to_patch], axis=1)[:, None]
    return jnp.concatenate([first, jnp.concatenate([from_patch[..., None], bias], axis=2)], axis=1)


def progression(size: int, to: int) -> tuple[float, np.ndarray]:
    """(ratio, places): the places of a table's `size` rows on a side of `to` rows, dense in the middle.

    Places are 0, +-1, +-(1 + q), +-(1 + q + q**2), ...; the ratio q is the one for which the last place is the end of the
    side `to`, found by bisection between 1.01 and 1.5. Source: BEiT's fine-tuning code.
    """
    low, high, ratio = 1.01, 1.5, 0.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (size // 2)) / (1 - ratio) > to // 2:
            high = ratio
        else:
            low = ratio
    places = np.cumsum(ratio ** np.arange(size // 2))
    return ratio, np.concatenate([-places[::-1], [0], places])


def spline_weights(size: int, to: int) -> np.ndarray:
    """Weights [to, size] of the cubic spline through the places of `progression`; clamped beyond the ends."""
    _, places = progression(size, to)
    wanted = np.clip(np.arange(to) - to // 2, places[0], places[-1])
    return scipy.interpolate.make_interp_spline(places, np.eye(size), k=min(3, size - 1))(wanted)


def bilinear_weights(size: int, to: int) -> np.ndarray:
    """Weights [to, size] of PyTorch's bilinear interpolation to a size, not antialiased."""
    source = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    return np.maximum(1 - np.abs(source[:, None] - np.arange(size)), 0)


def interpolate_bias_table(
    table: jax.Array, grid: tuple[int, int], to: tuple[int, int], cls: bool, bilinear: bool = False
) -> jax.Array:
    """A relative position bias table [rows, heads] of one grid of patches -> that of another; rows of CLS are copied.

    Source: the fine-tuning code of BEiT and SimMIM; `bilinear`: as transformers does it.
    """
    if grid == to:
        return table
    sides, new_sides = ([2 * n - 1 for n in g] for g in (grid, to))
    patches = table[: sides[0] * sides[1]].reshape(*sides, -1)
    weights = bilinear_weights if bilinear else spline_weights
    vertical, horizontal = (
        jnp.asarray(np.eye(a) if a == b else weights(a, b), table.dtype) for a, b in zip(sides, new_sides)
    )
    patches = jnp.einsum("rh,cw,hwd->rcd", vertical, horizontal, patches, precision="highest")
    patches = patches.reshape(-1, table.shape[-1])
    return jnp.concatenate([patches, table[-3:]]) if cls else patches


LEARNED = r"(pos_embed|relative_position_bias_table)$"  # paths of the tables that `fit_positions` can interpolate


def fit_positions(
    name: str, table: jax.Array, shape: tuple[int, ...], offset: float = 0.1, antialias: bool = False
) -> jax.Array:
    """A learned table of a square grid of patches, interpolated to the `shape` of a table of another square grid.

    `name`: "pos_embed", a table [1, 1 + N, D], see `interpolate_positions`; or "relative_position_bias_table", [rows, heads] or
    [blocks, rows, heads], with rows for CLS (ViT) or without (Swin). A table that all blocks share is copied for each of them
    where `shape` has one more axis.
    """
    if name == "pos_embed":
        side = math.isqrt(shape[1])
        return interpolate_positions(table, side, side, offset, antialias)
    if table.ndim < len(shape):
        table = jnp.broadcast_to(table, (shape[0], *table.shape))
    cls = math.isqrt(shape[-2]) ** 2 != shape[-2]
    grid, to = ((math.isqrt(rows) + 1) // 2 for rows in (table.shape[-2], shape[-2]))
    fit = functools.partial(interpolate_bias_table, grid=(grid, grid), to=(to, to), cls=cls)
    return fit(table) if table.ndim == 2 else jax.vmap(fit)(table)
