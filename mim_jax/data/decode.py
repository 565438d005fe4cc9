"""Encoded images to 8-bit RGB that fits a square canvas. The only file that knows Pillow's image modes."""

import contextlib
import io
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mim_jax import storage

MAX_PIXELS = 89_478_485  # above this Pillow warns: a third of a GB as RGB, which Pillow holds in 4 bytes
BYTES_PER_PIXEL = 8  # decoding may take this times `max_pixels`
MAX_FILE = 2**30  # bytes of a file; each reader thread may hold one
ORIENTATION = 0x0112  # in EXIF
WHOLE = 2**22  # pixels; larger images are converted and reduced in bands, so that memory has no second one of their size
BAND = 2**20  # pixels of a band
SAMPLE = 65536  # values that `look` returns
Levels = tuple[float, float]

# Pictures of pixels only: nothing that is run (EPS, PDF, WMF) or made of parts (PSD, ICO). JPEG has MPO in it.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "QOI", "TGA")
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}  # bytes per pixel of a mode; of others 4
READER = {"WEBP": 4, "AVIF": 3, "JPEG2000": 5, "TIFF": 2, "GIF": 3}  # what a reader takes, in times of that; of others 1
# Of 16-bit colour Pillow keeps the high byte; read in the other byte order, it keeps the low one.
LOW_BYTES = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA") for a, b in ("LB", "BL", "NB")}

Image.init()  # all readers, once and not in a thread


class BadImage(ValueError):
    """Not a usable image; the message says why."""


class Facts(NamedTuple):
    """What `look` finds."""

    frames: int
    values: np.ndarray | None  # of an image of more than 8 bits: at most SAMPLE of its values


def read_file(path: str | os.PathLike, limit: int = MAX_FILE) -> bytes:
    """The bytes of a regular file, or of one that a link leads to.

    Raises OSError for anything else (a pipe, a device, a folder), which is neither read nor waited for, and for more than
    `limit` bytes.
    """
    if storage.remote(path):
        return storage.read(path, limit)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("no regular file (a pipe, a device, ...)")
        if found.st_size > limit:
            raise OSError(f"a file of {found.st_size:,} bytes, the limit is {limit:,}")
        return file.read(found.st_size)


def decode(image: bytes | np.ndarray, canvas: int, levels: Levels | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as RGB, uint8 [h, w, 3], with h and w at most `canvas`; smaller images keep their size.

    Unusual images:
      * EXIF orientation is applied; of animations the first frame is used;
      * transparency is composited over white (the colours of transparent pixels are often garbage);
      * more than 8 bits (integers or floats, grey or colour) are mapped linearly from `levels` to 0..255 and clipped; a whole
        number that the file itself scales (a PGM of another maximum, JPEG 2000) is scaled to 0..65535 first; without levels,
        and with values that are not finite, they are refused. 1 bit and bool are 0 and 255;
      * a TIFF of several pages, or of channels that are neither colours nor alpha, is refused; reduced copies of the first
        page do not count;
      * JPEGs of several times the canvas are decoded at a fraction of their size by the JPEG library itself.

    Args:
      image: encoded bytes of one of `FORMATS`, or an array [h, w], [h, w, 1], [h, w, 3] or (uint8 only) [h, w, 4].
      canvas: in pixels.
      levels: (black, white), what becomes 0 and 255 in images of more than 8 bits. Not used in others.
      max_pixels: an image may have so many, and decoding it may take `BYTES_PER_PIXEL` times so many bytes.

    Raises:
      BadImage: empty, truncated, not an image, too large, or of unknown range.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        if 0 < min(image.shape) and max(image.shape[:2]) <= canvas:
            return image
    with _bad():
        if isinstance(image, np.ndarray):
            return np.asarray(_shrunk(_from_array(image, levels), None, canvas, levels))
        opened, low = _opened(image, max_pixels)
        # JPEG only: decode at a fraction of the size, but 1.5 times the final one or more, so the bicubic filter does the rest
        scale = 1.5 * canvas / max(opened.size)
        opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
        return np.asarray(_shrunk(opened, low, canvas, levels))


def look(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> Facts:
    """How many frames an image has, and values of one of more than 8 bits. Raises BadImage as `decode`."""
    with _bad():
        if isinstance(image, np.ndarray):
            _check_array(image)
            return Facts(1, None if image.dtype in (np.uint8, np.bool_) else _some(image))
        opened, low = _opened(image, max_pixels)
        frames = 1 if opened.format == "TIFF" else getattr(opened, "n_frames", 1)
        if low is None and not _is_deep_grey(opened):
            return Facts(frames, None)
        parts = [opened] if low is None else [opened, low]
        for part in parts:
            part.load()
        rows = np.unique(np.linspace(0, opened.height - 1, 256).astype(int))
        cut = [[part.crop((0, y, opened.width, y + 1)) for part in parts] for y in rows]
        return Facts(frames, _some(np.stack([_values(*row) for row in cut])))


def _some(values: np.ndarray) -> np.ndarray:
    """At most SAMPLE of the finite values, at random places, always the same."""
    values = values.reshape(-1)
    if len(values) > SAMPLE:
        values = values[np.random.default_rng(0).integers(0, len(values), SAMPLE)]
    return values[np.isfinite(values)]


@contextlib.contextmanager
def _bad() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"{error} See data.max_pixels.") from error
    except Exception as error:  # of broken bytes Pillow's readers raise almost anything: SyntaxError, struct.error, ...
        raise BadImage(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


# Opening


def _opened(data: bytes, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    """The image, not yet loaded, and for 16-bit colour another that loads the low bytes. Raises BadImage for its header."""
    if not data:
        raise BadImage("the file is empty")
    if Image.MAX_IMAGE_PIXELS and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # some readers look at this global
    tile = _check_tiff(data) if data[:2] in (b"II", b"MM") and (42 in data[2:4] or 43 in data[2:4]) else (0, 0)
    image = _identified(data)
    width, height = max(image.width, tile[0]), max(image.height, tile[1])
    low = None
    if _deep_color(image):
        low = _identified(data)
        low.tile = [t._replace(args=_low_bytes(t.args)) for t in low.tile]
    pixels = width * height
    if pixels > max_pixels:
        raise BadImage(
            f"{width} x {height} pixels look like a decompression bomb: data.max_pixels is {max_pixels:,} (raise it to read "
            "such images on purpose)"
        )
    each = STORED.get(image.mode, 4) * READER.get(image.format, 1) * (1 if low is None else 2)
    if pixels * each > max_pixels * BYTES_PER_PIXEL:
        raise BadImage(
            f"{width} x {height} pixels of {image.format} {image.mode} take {pixels * each / 1e9:.1f} GB to decode, more than "
            f"{BYTES_PER_PIXEL} bytes times data.max_pixels={max_pixels:,} (raise it to read such images on purpose)"
        )
    if not pixels:
        raise BadImage("it has no pixels")
    return image, low


def _identified(data: bytes) -> Any:
    """The image as its reader opens it. As `Image.open`, but no global limit of pixels, and the reader's reason is told."""
    reasons = ""
    for name in FORMATS:
        if name not in Image.OPEN:  # an older Pillow
            continue
        factory, accepts = Image.OPEN[name]
        accepted = not accepts or accepts(data[:16].ljust(16, b"\0"))
        if isinstance(accepted, str):  # the library of this format is missing
            raise BadImage(accepted)
        if accepted:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                reasons += f"; {name}: {error}" * bool(accepts)
    raise BadImage(f"no image of the formats that are read ({', '.join(FORMATS)}), or of a kind of them that is not{reasons}")


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_color(image: Any) -> bool:
    """Whether it has colour of 16 bits, of which Pillow keeps the high byte. Raises BadImage if the low one cannot be read."""
    if image.format == "JPEG2000":
        start = image.fp.getvalue().find(b"\xff\x4f\xff\x51")
        deep = not _is_deep_grey(image) and (image.fp.getvalue()[start + 42] & 127) >= 8  # one less than the bits
    else:
        args: Any = image.tile[0].args if image.tile else None
        parts: Any = [args] if isinstance(args, str) else args or [""]
        rawmode, *more = parts
        if image.format in ("PNG", "TIFF") and rawmode in LOW_BYTES:
            return True
        deep = image.format in ("PNG", "TIFF") and ";16" in rawmode and not _is_deep_grey(image)
        deep |= image.format == "PPM" and image.mode == "RGB" and bool(more) and max(more) > 255
    if deep:
        raise BadImage(f"colour of more than 8 bits in {image.format} {image.mode} is not read: save it as RGB in PNG or TIFF")
    return False


def _low_bytes(args: Any) -> Any:
    return LOW_BYTES[args] if isinstance(args, str) else (LOW_BYTES[args[0]], *args[1:])


def _check_tiff(data: bytes) -> tuple[int, int]:
    """The size of a tile. Raises BadImage where pages, channels or values would be dropped or changed."""
    pages = _tiff_pages(data)
    first = pages[0] if pages else {}
    if (stack := re.search(rb"ImageJ=[^\0]{1,300}\bimages=(\d+)", data[:4096])) and int(stack[1]) > max(len(pages), 1):
        raise BadImage(f"an ImageJ stack of {int(stack[1])} images, of which only the first would be read: save each as a file")
    full = [page for page in pages if not page.get(254, [0])[0] & 5 and page.get(255, [1])[0] != 2]  # 1: reduced, 4: a mask
    if len(full) > 1:
        raise BadImage(f"a TIFF of {len(full)} or more pages, of which only the first would be read: save each as a file")
    if first not in full and (len(pages) > 1 or 330 in first):
        raise BadImage("a TIFF whose first page is a reduced copy of another one: save the large one as a file")
    colors = {2: 3, 5: 4, 6: 3, 8: 3}.get(first.get(262, [0])[0], 1)
    channels, extra, bits = first.get(277, [1])[0], first.get(338, []), first.get(258, [1])
    if channels > colors and not (channels == colors + 1 and extra in ([1], [2])):
        raise BadImage(
            f"a TIFF of {channels} channels, of which {colors} are said to be colours and the others not to be alpha: save the "
            "wanted ones as grey or RGB"
        )
    if first.get(339, [1])[0] == 2 and bits[0] <= 8:
        raise BadImage("a TIFF of signed 8-bit values is not read: save it as unsigned")
    if first.get(284, [1])[0] == 2 and channels > 1 and bits[0] > 8:
        raise BadImage("a TIFF of 16-bit planes is not read: save it with its channels interleaved")
    return first.get(322, [0])[0], first.get(323, [0])[0]


def _tiff_pages(data: bytes) -> list[dict[int, list[int]]]:
    """The whole numbers in the tags of a TIFF's pages, at most 8 of each; of a damaged file as far as they can be read."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    first, counted, entry, size, last = ("Q", "Q", "HHQ", 8, "Q") if big else ("I", "H", "HHI", 4, "I")
    pages: list[dict[int, list[int]]] = []
    seen: set[int] = set()
    with contextlib.suppress(struct.error):
        (at,) = struct.unpack_from(order + first, data, 8 if big else 4)
        while at and at not in seen and len(pages) < 1000:
            seen.add(at)
            pages.append({})
            (count,) = struct.unpack_from(order + counted, data, at)
            at += struct.calcsize(order + counted)
            for _ in range(min(count, 65535)):
                tag, kind, number = struct.unpack_from(order + entry, data, at)
                field, at = at + 4 + size, at + 4 + 2 * size
                if code := {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind):
                    if number * struct.calcsize(code) > size:
                        (field,) = struct.unpack_from(order + last, data, field)
                    pages[-1][tag] = list(struct.unpack_from(f"{order}{min(number, 8)}{code}", data, field))
            (at,) = struct.unpack_from(order + last, data, at)
    return pages


# Pixels


def _shrunk(image: Any, low: Any, canvas: int, levels: Levels | None) -> Image.Image:
    image.load()
    if low is not None:
        low.load()
    if image.format == "TIFF" and image.mode == "I" and image.tag_v2.get(339, (1,))[0] == 1 and image.getextrema()[0] < 0:
        raise BadImage("values of 2**31 and more are not read: divide them")
    if image.format == "TIFF" and image.tag_v2.get(262) == 0 and levels:
        levels = levels[::-1]  # "white is zero", which Pillow heeds for 8 bits only
    orientation = 1
    with contextlib.suppress(Exception):  # broken EXIF is ignored
        orientation = image.getexif().get(ORIENTATION, 1)
    if image.width * image.height <= WHOLE:
        image = _rgb(image, low, levels)
    else:
        image = _rgb_in_bands(image, low, canvas, levels)
    if orientation != 1:
        image.getexif()[ORIENTATION] = orientation
        ImageOps.exif_transpose(image, in_place=True)
    image.thumbnail((canvas, canvas), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _rgb_in_bands(image: Image.Image, low: Image.Image | None, canvas: int, levels: Levels | None) -> Image.Image:
    """The image as RGB, reduced by a whole factor to twice the canvas or more; never a second one of its size in memory."""
    (width, height), factor = image.size, max(1, int(max(image.size) / canvas / 2))
    rows = factor * max(1, BAND // (width * factor))
    result = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        band = _rgb(image.crop(box), low and low.crop(box), levels)
        result.paste(band.reduce(factor), (0, top // factor))
    return result


def _rgb(image: Image.Image, low: Image.Image | None = None, levels: Levels | None = None) -> Image.Image:
    if low is not None or _is_deep_grey(image):
        image = _eight_bits(image, low, levels)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, low: Image.Image | None, levels: Levels | None) -> Image.Image:
    values = _values(image, low)
    result = Image.fromarray(_mapped(values, levels))
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A"))
    elif (transparent := image.info.get("transparency")) is not None:
        hidden = (values == transparent).reshape(*values.shape[:2], -1).all(axis=2)
        result.putalpha(Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255))))
    return result


def _values(image: Image.Image, low: Image.Image | None = None) -> np.ndarray:
    """The values of more than 8 bits, without alpha: [h, w] or [h, w, 3]."""
    if low is None:
        return np.asarray(image)
    return np.asarray(image)[..., :3].astype(np.uint16) * 256 + np.asarray(low)[..., :3]


def _mapped(values: np.ndarray, levels: Levels | None) -> np.ndarray:
    """Values mapped linearly from (black, white) to 0..255, rounded and clipped."""
    if not np.isfinite(values).all():
        raise BadImage("it has values that are not finite (NaN or infinity)")
    if levels is None:
        raise BadImage(
            f"more than 8 bits ({values.dtype}, {values.min():g} to {values.max():g}): set data.levels (levels in Python and "
            "for curate) to (black, white), the values that are to become 0 and 255"
        )
    black, white = levels
    result = np.empty(values.shape, np.uint8)
    rows = max(1, BAND // values[0].size)
    for top in range(0, len(values), rows):
        scaled = (values[top : top + rows].astype(np.float64) - black) * (255 / (white - black))
        result[top : top + rows] = np.floor(np.clip(scaled, 0, 255) + 0.5)
    return result


# Arrays


def _check_array(image: np.ndarray) -> None:
    if image.dtype.kind not in "buif" or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        raise BadImage(
            f"an array of {image.dtype} {list(image.shape)}, wanted is uint8 [h, w, 3] (or [h, w], or 1 or 4 channels)"
        )
    if image.ndim == 3 and image.shape[2] == 4 and image.dtype != np.uint8:
        raise BadImage(f"an array with alpha is wanted as uint8, not {image.dtype}")
    if not image.size:
        raise BadImage("it has no pixels")


def _from_array(image: np.ndarray, levels: Levels | None) -> Image.Image:
    _check_array(image)
    if image.dtype == np.bool_:
        image = image * np.uint8(255)
    elif image.dtype != np.uint8:
        image = _mapped(image, levels)
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
