"""Pictures of what goes in and what comes out: crops, reconstructions, attention maps, features, nearest neighbors.

Everything takes numpy uint8 images and gives a `PIL.Image`: tiles on white, captions in the margins.
"""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, FAINT = (255, 255, 255), (40, 44, 52), (122, 128, 138)
RIGHT, WRONG = (38, 150, 90), (214, 69, 65)
HIDDEN = 128  # level of a masked patch
GAP = 6  # pixels between tiles
TILE = 112  # side of a tile, about

# Magma (matplotlib), eight steps; in between is interpolated.
MAGMA = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97)]
    + [(254, 194, 135), (252, 253, 191)],
    np.float64,
)


def colorize(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, [...], as colors from black over purple to light yellow: uint8 [..., 3]."""
    position = np.clip(values, 0, 1) * (len(MAGMA) - 1)
    channels = [np.interp(position, np.arange(len(MAGMA)), MAGMA[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarge(image: np.ndarray, side: int = TILE) -> Image.Image:
    """An image [H, W, 3] so that its longer side is about `side`: small ones by whole factors with visible pixels."""
    height, width = image.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(height, width) <= side:
        factor = max(1, round(side / max(height, width)))
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)


def table(
    rows: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[Sequence[str]] | None = None,
    headings: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures in rows and columns, each centered in its cell, with a heading above each column and captions below.

    Args:
        rows: pictures, None for an empty cell; rows may differ in length.
        captions: as `rows`; a caption wider than its cell is cut.
        headings: one a column.
    """
    text = ImageFont.load_default(size=12)
    line = 17
    count = max(len(row) for row in rows)
    widths = [max([cell.width for row in rows for cell in row[i : i + 1] if cell] or [0]) for i in range(count)]
    heights = [max([cell.height for cell in row if cell] or [0]) + (line if captions else 0) for row in rows]
    if headings:
        widths = [max(width, round(text.getlength(name)) + 2) for width, name in zip(widths, headings, strict=True)]
    margin = 2 * GAP
    top = margin + (line + 2 if headings else 0)
    size = (2 * margin + sum(widths) + GAP * (count - 1), top + sum(heights) + GAP * (len(rows) - 1) + margin)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)

    def write(words: str, x: int, y: int, width: int, color: tuple[int, int, int]) -> None:
        while text.getlength(words) > width and len(words) > 1:
            words = words.rstrip("…")[:-1].rstrip() + "…"
        draw.text((x + width / 2, y), words, font=text, fill=color, anchor="ma")

    lefts = [margin + sum(widths[:i]) + GAP * i for i in range(count)]
    for name, x, width in zip(headings or (), lefts, widths, strict=False):
        write(name, x, margin - 2, width, FAINT)
    y = top
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        inner = height - (line if captions else 0)
        for i, (cell, x, width) in enumerate(zip(row, lefts, widths, strict=False)):
            if cell is not None:
                page.paste(cell, (x + (width - cell.width) // 2, y + (inner - cell.height) // 2))
            if captions and i < len(captions[number]):
                write(captions[number][i], x, y + inner + 2, width, INK)
        y += height + GAP
    return page


def crop_grid(images: Sequence[np.ndarray], crops: Mapping[str, np.ndarray], side: int = TILE) -> Image.Image:
    """One row for each image: the image as the host decoded it, then all its crops, at their sizes relative to each other.

    Args:
        images: B valid pictures uint8 [H, W, 3] (the canvas cut to its `size`).
        crops: by name ("global", "local"), uint8 [B, n, h, w, 3].
    """
    largest = max(group.shape[2] for group in crops.values())
    headings = ["image"] + [f"{name} {i + 1}" for name, group in crops.items() for i in range(group.shape[1])]
    rows = []
    for number, image in enumerate(images):
        cells = [enlarge(image, side)]
        for group in crops.values():
            cells += [enlarge(crop, side * group.shape[2] // largest) for crop in group[number]]
        rows.append(cells)
    return table(rows, headings=headings)


def masked_pixels(mask: np.ndarray, side: int) -> np.ndarray:
    """Masks bool [..., N] of a square grid of patches as bool [..., side, side]."""
    grid = round(mask.shape[-1] ** 0.5)
    return mask.reshape(*mask.shape[:-1], grid, grid).repeat(side // grid, axis=-1).repeat(side // grid, axis=-2)


def darkened(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images uint8 [..., H, H, 3] with their masked patches, bool [..., N], painted over in gray."""
    return np.where(masked_pixels(mask, images.shape[-2])[..., None], np.uint8(HIDDEN), images)


def reconstructions(columns: Mapping[str, np.ndarray], side: int = TILE) -> Image.Image:
    """Two images a row, each as several pictures side by side: by heading, uint8 [B, H, W, 3]."""
    names = list(columns)
    each = [[enlarge(one, side) for one in tiles] for tiles in zip(*columns.values(), strict=True)]
    rows = [[*each[i], None, *(each[i + 1] if i + 1 < len(each) else ())] for i in range(0, len(each), 2)]
    return table(rows, headings=[*names, "", *names][: max(map(len, rows))])


def usage(counts: np.ndarray, height: int = 160) -> Image.Image:
    """How often each code of a codebook is used, int [K], as bars from the most used on; the line is where all are equal."""
    share = np.sort(counts)[::-1] / max(counts.sum(), 1)
    some = share[share > 0]
    perplexity = np.exp(-np.sum(some * np.log(some)))
    width = max(1, round(768 / len(share)))
    top = max(share[0], 2 / len(share))
    bars = np.full((height, len(share) * width, 3), PAPER, np.uint8)
    filled = np.round(share / top * height).astype(int).repeat(width)
    rows = np.arange(height, 0, -1)[:, None]
    bars[rows <= filled] = colorize(np.array(0.45))
    bars[height - round(height / len(share) / top)] = FAINT
    words = f"{len(some)} of {len(share)} codes used, perplexity {perplexity:.0f}"
    return table([[Image.fromarray(bars)]], [[words]])


def attention_threshold(attention: np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The patches that together hold the share `keep` of each head's attention, largest first.

    DINO, `visualize_attention.py`: values in ascending order; kept from where their sum exceeds 1 - `keep`.

    Args:
        attention: [..., N], not negative.

    Returns:
        bool [..., N].
    """
    order = np.argsort(attention, axis=-1, kind="stable")
    ascending = np.take_along_axis(attention, order, axis=-1)
    ascending = ascending / ascending.sum(axis=-1, keepdims=True)
    mask = np.empty(attention.shape, bool)
    np.put_along_axis(mask, order, np.cumsum(ascending, axis=-1) > 1 - keep, axis=-1)
    return mask


def attention_maps(
    attention: np.ndarray, grid: tuple[int, int], images: np.ndarray, keep: float = 0.6, side: int = TILE
) -> Image.Image:
    """Where each head of the CLS token looks: two rows for each image, the heat and the patches that hold most of it.

    Args:
        attention: CLS row of the last block's softmax over the patches, [B, heads, N]. One image: [heads, N].
        grid: (h, w) of the patches, h * w = N.
        images: uint8 [B, H, W, 3], or [H, W, 3]: what the encoder saw.
        keep: share of the attention that the second row shows; the other patches are darkened.
    """
    if attention.ndim == 2:
        attention, images = attention[None], images[None]
    rows = []
    for weights, image in zip(attention, images, strict=True):
        picture = enlarge(image, side)
        masks = attention_threshold(weights, keep).reshape(-1, *grid)
        heat = weights.reshape(-1, *grid)
        low, high = heat.min(axis=(1, 2), keepdims=True), heat.max(axis=(1, 2), keepdims=True)
        heat = (heat - low) / np.maximum(high - low, 1e-12)
        patches = [Image.fromarray(colorize(one)).resize(picture.size, Image.Resampling.NEAREST) for one in heat]
        gray = picture.convert("L").convert("RGB")
        rows.append([picture] + [Image.blend(gray, one, 0.72) for one in patches])
        dark = Image.blend(gray, Image.new("RGB", picture.size, (18, 18, 24)), 0.82)
        shown = [Image.fromarray(one).resize(picture.size, Image.Resampling.NEAREST) for one in masks]
        note = Image.new("RGB", picture.size, PAPER)
        text = ImageFont.load_default(size=12)
        words = f"the patches\nthat hold\n{keep:.0%} of the\nattention"
        ImageDraw.Draw(note).multiline_text((picture.width - 8, picture.height / 2), words, FAINT, text, "rm", align="right")
        rows.append([note] + [Image.composite(picture, dark, one) for one in shown])
    return table(rows, headings=["image"] + [f"head {i + 1}" for i in range(attention.shape[1])])


def principal_colors(features: np.ndarray, images: np.ndarray, columns: int = 8, side: int = TILE) -> Image.Image:
    """What patches are alike: their first three principal components as red, green and blue, on axes that all images share.

    Args:
        features: patches of square grids, [B, N, D].
        images: uint8 [B, H, W, 3].
    """
    count, patches, dim = features.shape
    flat = features.reshape(-1, dim).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    shown = flat @ axes[:3].T
    low, high = np.percentile(shown, [2, 98], axis=0)
    shown = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)
    grid = round(patches**0.5)
    colors = np.round(255 * shown).astype(np.uint8).reshape(count, grid, grid, 3)
    tiles = [enlarge(image, side) for image in images]
    maps = [Image.fromarray(c).resize(tile.size, Image.Resampling.NEAREST) for c, tile in zip(colors, tiles)]
    rows = []
    for start in range(0, count, columns):
        rows += [tiles[start : start + columns], maps[start : start + columns]]
    return table(rows)


def mutual_nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a [N, D] and b [M, D] each of which is the nearest to the other by cosine: (row of a, row of b, cosine), the
    most alike first."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    cosines = a @ b.T
    there = cosines.argmax(axis=1)
    rows = np.flatnonzero(cosines.argmax(axis=0)[there] == np.arange(len(a)))
    rows = rows[np.argsort(-cosines[rows, there[rows]], kind="stable")]
    return rows, there[rows], cosines[rows, there[rows]]


def correspondences(features: np.ndarray, views: np.ndarray, count: int = 8, side: int = 2 * TILE) -> Image.Image:
    """Which patches of two views of an image are alike: lines between the `count` best pairs of `mutual_nearest`.

    Args:
        features: patches of square grids, [B, 2, N, D].
        views: uint8 [B, 2, H, W, 3].
    """
    grid = round(features.shape[2] ** 0.5)
    pairs = []
    for (a, b), images in zip(features, views, strict=True):
        tiles = [enlarge(image, side) for image in images]
        width, gap = tiles[0].width, 4 * GAP
        page = Image.new("RGB", (2 * width + gap, tiles[0].height), PAPER)
        page.paste(tiles[0], (0, 0))
        page.paste(tiles[1], (width + gap, 0))
        draw, patch = ImageDraw.Draw(page), width / grid
        here, there, _ = mutual_nearest(a, b)
        for number, (i, j) in enumerate(zip(here[:count], there[:count])):
            ends = [((n % grid + 0.5) * patch + left, (n // grid + 0.5) * patch) for n, left in ((i, 0), (j, width + gap))]
            color = hsv(number / count)
            draw.line(ends, color, width=2)
            for x, y in ends:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), color, PAPER)
        pairs.append(page)
    return table([pairs[start : start + 2] for start in range(0, len(pairs), 2)])


def hsv(hue: float) -> tuple[int, int, int]:
    """A bright color, from red at 0 through all hues."""
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.85, 0.95))  # type: ignore[return-value]


def neighbors(
    queries: Sequence[np.ndarray],
    found: Sequence[Sequence[np.ndarray]],
    names: Sequence[str] | None = None,
    found_names: Sequence[Sequence[str]] | None = None,
    side: int = TILE,
) -> Image.Image:
    """One row for each query: the query, then the images nearest to it in the bank, nearest first.

    Args:
        queries: Q images uint8 [H, W, 3].
        found: for each, its k nearest.
        names: class of each query; with `found_names`, neighbors of the same class are framed green, others red.
        found_names: classes of `found`.
    """
    rows, captions = [], []
    for number, (query, nearest) in enumerate(zip(queries, found, strict=True)):
        tiles = [enlarge(image, side) for image in nearest]
        caption = [""] * (1 + len(tiles))
        if names is not None and found_names is not None:
            caption = [names[number], *found_names[number]]
            tiles = [
                ImageOps.expand(tile, 4, RIGHT if name == names[number] else WRONG)
                for tile, name in zip(tiles, found_names[number], strict=True)
            ]
        rows.append([enlarge(query, side), *tiles])
        captions.append(caption)
    headings = ["query"] + [str(i + 1) for i in range(max(len(nearest) for nearest in found))]
    return table(rows, captions if names is not None else None, headings)
