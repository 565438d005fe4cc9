"""Pictures of crops, reconstructions, attention maps, features, nearest neighbors and a classifier's confusions.

All functions take NumPy uint8 images; most return a page, a `PIL.Image` of tiles on white.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

PAPER, INK, FAINT = (255, 255, 255), (40, 44, 52), (122, 128, 138)
RIGHT, WRONG = (38, 150, 90), (214, 69, 65)
HIDDEN = 128  # level of a masked patch
GAP = 6  # pixels between tiles
TILE = 112  # approximate side of a tile
MATRIX = 640  # approximate side of a confusion matrix

# matplotlib's Magma, at nine points
MAGMA = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97)]
    + [(254, 194, 135), (252, 253, 191)],
    np.float64,
)


def colorize(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, [...], as colors from black to light yellow: uint8 [..., 3]."""
    position = np.clip(values, 0, 1) * (len(MAGMA) - 1)
    channels = [np.interp(position, np.arange(len(MAGMA)), MAGMA[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarge(image: np.ndarray, side: int = TILE) -> Image.Image:
    """An image [H, W, 3] resized so that its longer side is about `side`; small images by whole factors, with sharp pixels."""
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
    """A page of pictures in rows and columns, with a heading above each column and a caption below each picture.

    None is an empty cell; rows may differ in length; a caption wider than its cell is truncated.
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
    """One row for each of B images [H, W, 3]: the image, then its crops, by name, [B, n, h, w, 3], at their relative sizes."""
    largest = max(group.shape[2] for group in crops.values())
    headings = ["image"] + [f"{name} {i + 1}" for name, group in crops.items() for i in range(group.shape[1])]
    rows = []
    for number, image in enumerate(images):
        cells = [enlarge(image, side)]
        for group in crops.values():
            cells += [enlarge(crop, side * group.shape[2] // largest) for crop in group[number]]
        rows.append(cells)
    return table(rows, headings=headings)


def darkened(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images uint8 [..., H, H, 3] whose masked patches, bool [..., N], are gray."""
    grid = round(mask.shape[-1] ** 0.5)
    size = images.shape[-2] // grid
    pixels = mask.reshape(*mask.shape[:-1], grid, grid).repeat(size, axis=-1).repeat(size, axis=-2)
    return np.where(pixels[..., None], np.uint8(HIDDEN), images)


def reconstructions(columns: Mapping[str, np.ndarray], side: int = TILE) -> Image.Image:
    """Each image as several pictures side by side, by heading, [B, H, W, 3]; two images in a row."""
    names = list(columns)
    each = [[enlarge(one, side) for one in tiles] for tiles in zip(*columns.values(), strict=True)]
    rows = [[*each[i], None, *(each[i + 1] if i + 1 < len(each) else ())] for i in range(0, len(each), 2)]
    return table(rows, headings=[*names, "", *names][: max(map(len, rows))])


def usage(counts: np.ndarray, height: int = 160) -> Image.Image:
    """How often each code is used, int [K], as bars in descending order; the line marks equal use."""
    share = np.sort(counts)[::-1] / max(counts.sum(), 1)
    used = share[share > 0]
    perplexity = np.exp(-np.sum(used * np.log(used)))
    width = max(1, round(768 / len(share)))
    top = max(share[0], 2 / len(share))
    bars = np.full((height, len(share) * width, 3), PAPER, np.uint8)
    filled = np.round(share / top * height).astype(int).repeat(width)
    rows = np.arange(height, 0, -1)[:, None]
    bars[rows <= filled] = colorize(np.array(0.45))
    bars[height - round(height / len(share) / top)] = FAINT
    words = f"{len(used)} of {len(share)} codes used, perplexity {perplexity:.0f}"
    return table([[Image.fromarray(bars)]], [[words]])


def attention_threshold(attention: np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The patches with the largest attention [..., N] that together hold the share `keep` of it: bool [..., N].

    Source: DINO, `visualize_attention.py`: in ascending order, those from where the sum exceeds 1 - `keep`.
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
    """The attention of CLS to the patches, by head, in two rows for each image: a heat map, and `attention_threshold`.

    The attention is [B, heads, N], on a `grid` of (rows, columns) of patches, and images are uint8 [B, H, W, 3]; those of one
    image need no B. `keep` is the share of the attention that the second row shows; other patches are darkened.
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
        words = f"the patches\nthat hold\n{keep:.0%} of the\nattention"
        place, text = (picture.width - 8, picture.height / 2), ImageFont.load_default(size=12)
        ImageDraw.Draw(note).multiline_text(place, words, FAINT, text, "rm", align="right")
        rows.append([note] + [Image.composite(picture, dark, one) for one in shown])
    return table(rows, headings=["image"] + [f"head {i + 1}" for i in range(attention.shape[1])])


def principal_components(features: np.ndarray) -> np.ndarray:
    """The first three principal components of patch features [B, N, D], over all images, as red, green and blue: uint8
    [B, side, side, 3]. Grids are square."""
    count, patches, dim = features.shape
    flat = features.reshape(-1, dim).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    shown = flat @ axes[:3].T
    shown = np.pad(shown, ((0, 0), (0, 3 - shown.shape[1])))  # fewer than three patches have fewer components
    low, high = np.percentile(shown, [2, 98], axis=0)
    shown = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)
    grid = round(patches**0.5)
    return np.round(255 * shown).astype(np.uint8).reshape(count, grid, grid, 3)


def principal_colors(features: np.ndarray, images: np.ndarray, columns: int = 8, side: int = TILE) -> Image.Image:
    """Images uint8 [B, H, W, 3], and below each the `principal_components` of its patch features [B, N, D]."""
    colors, count = principal_components(features), len(images)
    tiles = [enlarge(image, side) for image in images]
    maps = [Image.fromarray(c).resize(tile.size, Image.Resampling.NEAREST) for c, tile in zip(colors, tiles)]
    rows = []
    for start in range(0, count, columns):
        rows += [tiles[start : start + columns], maps[start : start + columns]]
    return table(rows)


def mutual_nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows of a [N, D] and b [M, D] that are mutual nearest neighbors by cosine: (rows of a, rows of b, cosines), in
    descending order."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    cosines = a @ b.T
    nearest = cosines.argmax(axis=1)
    rows = np.flatnonzero(cosines.argmax(axis=0)[nearest] == np.arange(len(a)))
    rows = rows[np.argsort(-cosines[rows, nearest[rows]], kind="stable")]
    return rows, nearest[rows], cosines[rows, nearest[rows]]


def correspondences(features: np.ndarray, views: np.ndarray, count: int = 8, side: int = 2 * TILE) -> Image.Image:
    """Two views of each image, uint8 [B, 2, H, W, 3], with lines between the `count` best pairs of `mutual_nearest` patches.

    Features [B, 2, N, D] are those of square grids.
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
        rows_a, rows_b, _ = mutual_nearest(a, b)
        for number, (i, j) in enumerate(zip(rows_a[:count], rows_b[:count])):
            ends = [((n % grid + 0.5) * patch + left, (n // grid + 0.5) * patch) for n, left in ((i, 0), (j, width + gap))]
            color = ImageColor.getrgb(f"hsv({360 * number / count}, 85%, 95%)")
            draw.line(ends, color, width=2)
            for x, y in ends:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), color, PAPER)
        pairs.append(page)
    return table([pairs[start : start + 2] for start in range(0, len(pairs), 2)])


def neighbors(
    queries: Sequence[np.ndarray],
    found: Sequence[Sequence[np.ndarray]],
    names: Sequence[str] | None = None,
    found_names: Sequence[Sequence[str]] | None = None,
    side: int = TILE,
) -> Image.Image:
    """One row for each query image [H, W, 3]: the query, then the images `found` for it, nearest first.

    With the class `names` of queries and found images, those of the same class are framed green, others red.
    """
    rows, captions = [], []
    for number, (query, nearest) in enumerate(zip(queries, found, strict=True)):
        tiles = [enlarge(image, side) for image in nearest]
        if names is not None and found_names is not None:
            captions.append([names[number], *found_names[number]])
            colors = [RIGHT if name == names[number] else WRONG for name in found_names[number]]
            tiles = [ImageOps.expand(tile, 4, color) for tile, color in zip(tiles, colors, strict=True)]
        rows.append([enlarge(query, side), *tiles])
    return table(rows, captions, ["query"] + [str(i + 1) for i in range(max(map(len, found)))])


def confusion(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The confusions of a classifier: how many images of each class (row) were taken for each class (column), int [K, K].

    A cell's brightness is the square root of its share of the row's images, so that rare confusions are visible; its number,
    where there is room, is that share in percent. A row without images is gray. `names` are written where there is room.
    """
    text = ImageFont.load_default(size=12)
    images = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(images, 1)
    cell = min(max(MATRIX // len(names), 1), 48)
    colors = np.where((images > 0)[..., None], colorize(np.sqrt(share)), np.uint8(HIDDEN))
    matrix = Image.fromarray(colors.repeat(cell, axis=0).repeat(cell, axis=1))
    draw = ImageDraw.Draw(matrix)
    if cell >= 24:
        for (row, column), value in np.ndenumerate(share):
            if percent := round(100 * value):
                place = ((column + 0.5) * cell, (row + 0.5) * cell)
                draw.text(place, str(percent), PAPER if value < 0.5 else INK, text, "mm")
    named = list(map(_shortened, names)) if cell >= 14 else []
    left = top = max([round(text.getlength(name)) for name in named], default=0) + 2 * GAP
    line, margin = 18, 2 * GAP
    page = Image.new("RGB", (line + left + matrix.width + margin, line + top + matrix.height + margin), PAPER)
    corner = line + left, line + top
    page.paste(matrix, corner)
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(named):
        draw.text((corner[0] - GAP, corner[1] + (i + 0.5) * cell), name, INK, text, "rm")
        strip = Image.new("RGB", (top - GAP, cell), PAPER)
        ImageDraw.Draw(strip).text((0, cell / 2), name, INK, text, "lm")
        page.paste(strip.rotate(90, expand=True), (corner[0] + i * cell, line))
    draw.text((corner[0] + matrix.width / 2, 2), "taken for", FAINT, text, "ma")
    side = Image.new("RGB", (matrix.height, line), PAPER)
    ImageDraw.Draw(side).text((matrix.height / 2, 2), "class", FAINT, text, "ma")
    page.paste(side.rotate(90, expand=True), (0, corner[1]))
    return page


def _shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def mistakes(
    images: Sequence[np.ndarray], names: Sequence[str], answers: Sequence[str], columns: int = 8, side: int = TILE
) -> Image.Image:
    """Images [H, W, 3]; below each the name of its class, and that of the class that it was taken for."""
    tiles, text = [], ImageFont.load_default(size=12)
    for image, name, answer in zip(images, names, answers, strict=True):
        picture = enlarge(image, side)
        tile = Image.new("RGB", (max(picture.width, TILE), picture.height + 40), PAPER)
        tile.paste(picture, ((tile.width - picture.width) // 2, 0))
        for line, words in enumerate((name, f"as {answer}")):
            place = (tile.width / 2, picture.height + 2 + 16 * line)
            ImageDraw.Draw(tile).text(place, _shortened(words), INK, text, "ma")
        tiles.append(tile)
    return table([tiles[start : start + columns] for start in range(0, len(tiles), columns)])
