"""Encoded images to 8-bit RGB that fits a square canvas. The only file that knows Pillow's image modes."""

import contextlib
import io
import math

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # above this Pillow warns: a quarter of a GiB as RGB


class BadImage(ValueError):
    """Not a usable image; the message says why."""


def decode(image: bytes | np.ndarray, canvas: int) -> np.ndarray:
    """An image as RGB, uint8 [h, w, 3], with h and w at most `canvas`; smaller images keep their size.

    Unusual images:
      * EXIF orientation is applied; of animations the first frame is used;
      * transparency is composited over white (the colours of transparent pixels are often garbage);
      * 16-bit grey is scaled by 1 / 257, float grey in [0, 1] by 255; other ranges are refused, never clipped;
      * JPEGs of several times the canvas are decoded at a fraction of their size by the JPEG library itself.

    Args:
      image: encoded bytes of any format that Pillow reads, or uint8 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4].
      canvas: in pixels.

    Raises:
      BadImage: empty, truncated, not an image, more than `MAX_PIXELS` pixels, or of unknown range.
    """
    if isinstance(image, np.ndarray) and image.shape[2:] == (3,) and max(image.shape[:2]) <= canvas:
        return image
    try:
        if isinstance(image, np.ndarray):
            return np.asarray(_shrunk_rgb(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), canvas))
        if not image:
            raise BadImage("the file is empty")
        return np.asarray(_shrunk_rgb(Image.open(io.BytesIO(image)), canvas))
    except BadImage:
        raise
    except Exception as error:  # of broken bytes Pillow's readers raise almost anything: SyntaxError, struct.error, ...
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _shrunk_rgb(image: Image.Image, canvas: int) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels look like a decompression bomb")
    # JPEG only: decode at a fraction of the size, but at 1.5 times the final one or more, so the bicubic filter does the rest
    scale = 1.5 * canvas / max(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF is ignored
        ImageOps.exif_transpose(image, in_place=True)
    image = _rgb(image)
    image.thumbnail((canvas, canvas), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey(np.asarray(image), 65535)  # `convert` would clip above 255
    elif image.mode == "F":
        image = _grey(np.asarray(image), 1.0)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray, white: float) -> Image.Image:
    """Grey values [h, w] in [0, white] to 8 bits, rounded."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # refuses NaN, too
        raise BadImage(f"grey values from {low} to {high}, expected within 0 to {white}")
    return Image.fromarray(np.floor(values * (255 / white) + 0.5).astype(np.uint8))
