"""Decoding: files and arrays of every kind become uint8 RGB, or are refused in one line and within bounded memory."""

import math
import os
import re
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from pictures import encode, picture
from PIL import Image, ImageCms

from mim_jax.data import augment, decode, pipeline, sources


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_plain_rgb(file_format):
    options = {
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    decoded = decode.decode(encode(picture(), file_format, **options.get(file_format, {})), canvas=32)
    assert decoded.dtype == np.uint8
    tolerance = {"AVIF": 8, "JPEG": 4, "GIF": 30}.get(file_format, 0)
    np.testing.assert_allclose(decoded.astype(int), picture(), atol=tolerance)


def test_grey_is_repeated():
    grey = picture(channels=1)
    expected = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(decode.decode(encode(grey[..., 0]), 32), expected)
    np.testing.assert_array_equal(decode.decode(grey, 32), expected)
    np.testing.assert_array_equal(decode.decode(grey[..., 0], 32), expected)
    black_and_white = Image.fromarray(grey[..., 0] > 127)
    assert black_and_white.mode == "1"
    np.testing.assert_array_equal(decode.decode(encode(black_and_white), 32), np.where(expected > 127, 255, 0))


def test_transparency_is_composited_over_white():
    rgba = np.dstack([picture(), np.uint8([[0, 255] * 8] * 12)])
    expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
    np.testing.assert_array_equal(decode.decode(encode(rgba), 32), expected)
    np.testing.assert_array_equal(decode.decode(rgba, 32), expected)
    half = decode.decode(encode(np.full((4, 4, 4), (0, 100, 200, 128), np.uint8)), 32)
    np.testing.assert_allclose(half[0, 0], (127, 177, 227), atol=1)
    grey = decode.decode(encode(np.dstack([np.zeros((2, 2), np.uint8), np.uint8([[0, 255]] * 2)])), 32)
    np.testing.assert_array_equal(grey[0, :, 0], (255, 0))


def test_palette_with_and_without_transparency():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    np.testing.assert_array_equal(decode.decode(encode(image), 8), [[(10, 20, 30), (40, 50, 60), (70, 80, 90)]])
    transparent = decode.decode(encode(image, transparency=1), 8)
    np.testing.assert_array_equal(transparent, [[(10, 20, 30), (255, 255, 255), (70, 80, 90)]])


def test_cmyk():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    decoded = decode.decode(encode(cmyk, "JPEG", quality=100), 32)
    np.testing.assert_allclose(decoded.astype(int), picture(), atol=8)
    np.testing.assert_array_equal(decode.decode(encode(cmyk, "TIFF"), 32), np.asarray(cmyk.convert("RGB")))


WIDE = np.linspace(0, 65535, 12 * 16).reshape(12, 16).round().astype(np.uint16)


def wide_files(values):
    """Grey of more than 8 bits, in each form that holds uint16."""
    yield "png", encode(values)
    yield "tiff", encode(values, "TIFF")
    yield "compressed tiff", encode(values, "TIFF", compression="tiff_lzw")
    yield "big-endian tiff", encode(Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()), "TIFF")
    yield "32-bit tiff", encode(values.astype(np.int32), "TIFF")
    yield "float tiff", encode(values.astype(np.float32), "TIFF")
    yield "pgm", b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()
    yield "array", values
    yield "array with a channel", values[..., None].astype(np.int64)
    yield "array of floats", values.astype(np.float64)


@pytest.mark.parametrize("levels", [(0, 65535), (1000, 5095), (-100.5, 70_000)])
def test_levels_become_0_and_255(levels):
    expected = np.floor(np.clip((WIDE.astype(float) - levels[0]) * (255 / (levels[1] - levels[0])), 0, 255) + 0.5)
    for kind, image in wide_files(WIDE):
        decoded = decode.decode(image, 32, levels)
        np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=-1), err_msg=kind)


def test_12_bits_are_not_black():
    values = np.linspace(0, 4095, 12 * 16).reshape(12, 16).astype(np.uint16)
    for _, image in wide_files(values):
        with pytest.raises(decode.BadImage, match=r"more than 8 bits \(.*, 0 to 4095\): set data.levels"):
            decode.decode(image, 32)
        assert len(np.unique(decode.decode(image, 32, (0, 4095)))) == len(np.unique(np.floor(values / 4095 * 255 + 0.5)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = value
    for image in values, encode(values, "TIFF"):
        with pytest.raises(decode.BadImage, match="not finite"):
            decode.decode(image, 32, (0, 1))


def test_white_may_be_zero_and_alpha_a_value():
    white_is_zero = tiff({262: 0, 258: 16}, WIDE.astype("<u2").tobytes())
    np.testing.assert_allclose(decode.decode(white_is_zero, 32, (0, 65535))[..., 0], 255 - WIDE / 257, atol=0.51)
    for value in WIDE[2, 3], WIDE[-1, -1]:
        decoded = decode.decode(encode(WIDE, transparency=int(value)), 32, (0, 65535))[..., 0]
        expected = np.where(value == WIDE, 255, np.floor(WIDE / 257 + 0.5))
        np.testing.assert_array_equal(decoded, expected)


def png(width, height, bits, color, rows, chunks=b"", interlace=0):
    """A PNG of given bytes, for what Pillow does not write."""
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, color, 0, 0, interlace))
        + chunks
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(tags, data, pages=1, order="<", size=(16, 12)):
    """An uncompressed TIFF of one strip (of the same data in each page), for what Pillow does not write."""
    tags = {256: size[0], 257: size[1], 259: 1, 277: 1, 273: 8, 278: size[1], 279: len(data)} | tags
    tags = {tag: value if isinstance(value, tuple) else (value,) for tag, value in sorted(tags.items())}
    file = bytearray((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data)) + data)
    for page in range(pages):
        extra = len(file) + 2 + 12 * len(tags) + 4
        file += struct.pack(order + "H", len(tags))
        more = b""
        for tag, values in tags.items():
            values = values if page == 0 or tag != 254 else (1,)
            packed = struct.pack(f"{order}{len(values)}I", *values)
            file += struct.pack(order + "HHI", tag, 4, len(values))
            file += packed if len(packed) == 4 else struct.pack(order + "I", extra + len(more))
            more += packed if len(packed) > 4 else b""
        file += struct.pack(order + "I", extra + len(more) if page < pages - 1 else 0) + more
    return bytes(file)


COLORS = np.random.default_rng(0).integers(0, 4096, (12, 16, 3)).astype(np.uint16)


def wide_colors():
    alpha = np.full((12, 16, 1), 65535, np.uint16)
    for name, values in ("RGB", COLORS), ("RGBA", np.dstack([COLORS, alpha])):
        rows = [row.astype(">u2").tobytes() for row in values]
        yield f"png {name}", png(16, 12, 16, 2 if name == "RGB" else 6, rows)
        for order in "<>":
            tags = {262: 2, 258: (16,) * len(values[0, 0]), 277: len(values[0, 0])} | ({338: 2} if name == "RGBA" else {})
            yield f"tiff {name} {order}", tiff(tags, values.astype(order + "u2").tobytes(), order=order)
    yield "array", COLORS
    yield "array of floats", COLORS.astype(np.float32)


def test_colors_of_16_bits_keep_the_low_byte():
    """Pillow drops it without a word, which makes 12 bits nearly black."""
    expected = np.floor(COLORS * (255 / 4095) + 0.5)
    for kind, image in wide_colors():
        np.testing.assert_array_equal(decode.decode(image, 32, (0, 4095)), expected, err_msg=kind)
        with pytest.raises(decode.BadImage, match=r"more than 8 bits \(.*set data.levels"):
            decode.decode(image, 32)
        values = decode.look(image).values
        assert sorted(values.tolist()) == sorted(COLORS.reshape(-1).tolist()), kind


TO_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
WIDE_TIFF = {262: 2, 258: (16, 16, 16), 277: 3}
UNREAD = {  # kind -> (file, what the line says)
    "grey and alpha of 16 bits": (png(4, 4, 16, 4, [bytes(16)] * 4), "more than 8 bits in PNG"),
    "CMYK of 16 bits": (tiff({262: 5, 258: (16,) * 4, 277: 4}, bytes(12 * 16 * 8)), "more than 8 bits in TIFF CMYK"),
    "planes of 16 bits": (tiff(WIDE_TIFF | {284: 2}, bytes(12 * 16 * 6)), "16-bit planes"),
    "ppm of 16 bits": (b"P6 2 2 4095\n" + bytes(24), "more than 8 bits in PPM"),
    "signed 8 bits": (tiff({262: 1, 258: 8, 339: 2}, bytes(12 * 16)), "signed 8-bit"),
    "unsigned 32 bits": (tiff({262: 1, 258: 32, 339: 1}, b"\xff" * (12 * 16 * 4)), r"2\*\*31"),
    "three pages": (tiff({262: 1, 258: 8}, bytes(12 * 16), pages=3), "3 or more pages"),
    "pages of another byte order": (tiff({262: 1, 258: 8}, bytes(12 * 16), pages=2, order=">"), "2 or more pages"),
    "a reduced first page": (tiff({262: 1, 258: 8, 254: 1, 330: 8}, bytes(12 * 16)), "reduced copy"),
    "near infrared": (tiff({262: 2, 258: (8,) * 4, 277: 4}, bytes(12 * 16 * 4)), "4 channels, of which 3 are"),
    "near infrared, said to be no alpha": (tiff({262: 2, 258: (8,) * 4, 277: 4, 338: 0}, bytes(768)), "4 channels"),
    "13 bands": (tiff({262: 1, 258: (16,) * 13, 277: 13, 338: (0,) * 12}, bytes(12 * 16 * 26)), "13 channels, of which 1 "),
    "two grey channels": (tiff({262: 1, 258: (8, 8), 277: 2, 338: 0}, bytes(12 * 16 * 2)), "2 channels"),
    "float of 64 bits": (tiff({262: 1, 258: 64, 339: 3}, bytes(12 * 16 * 8)), "TIFF: unknown pixel mode"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n", "no image of the formats"),
    "a short text": (b"hi", "no image of the formats"),
    "PDF": (b"%PDF-1.4\n1 0 obj", "no image of the formats"),
    "PSD": (b"8BPS\0\1" + bytes(40), "no image of the formats"),
    "array [3, h, w]": (np.zeros((3, 8, 9), np.uint8), r"uint8 \[3, 8, 9\], wanted"),
    "array of two channels": (np.zeros((8, 9, 2), np.uint8), "wanted is uint8"),
    "complex array": (np.zeros((8, 9), np.complex64), "wanted is uint8"),
    "float array with alpha": (np.zeros((8, 9, 4), np.float32), "alpha"),
    "array without pixels": (np.zeros((0, 9, 3), np.uint8), "no pixels"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_would_come_out_wrong_is_refused_in_one_line(kind):
    image, line = UNREAD[kind]
    with pytest.raises(decode.BadImage, match=line) as error:
        decode.decode(image, 32, levels=(0, 255))
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_jpeg_2000_of_more_than_8_bits():
    with pytest.raises(decode.BadImage, match="set data.levels"):
        decode.decode(encode(WIDE, "JPEG2000"), 32)
    np.testing.assert_allclose(decode.decode(encode(WIDE, "JPEG2000"), 32, (0, 65535))[..., 0], WIDE / 257, atol=1)
    wide = bytearray(encode(picture(), "JPEG2000"))
    at = wide.index(b"\xff\x4f\xff\x51") + 42
    assert wide[at] == 7
    wide[at : at + 9 : 3] = b"\x0b" * 3  # 12 bits
    with pytest.raises(decode.BadImage, match="more than 8 bits in JPEG2000 RGB"):
        decode.decode(bytes(wide), 32, (0, 255))
    assert decode.decode(encode(picture(), "JPEG2000"), 32).shape == (12, 16, 3)


def test_a_pyramid_and_thumbnails_are_one_image():
    pixels = picture()
    for order in "<>":
        data = tiff({262: 2, 258: (8, 8, 8), 277: 3, 254: 0}, pixels.tobytes(), pages=4, order=order)
        np.testing.assert_array_equal(decode.decode(data, 32), pixels)
        assert decode.look(data) == (1, None)


def test_a_tiff_whose_pages_go_round_in_a_ring():
    data = bytearray(tiff({262: 1, 258: 8, 254: 0}, bytes(12 * 16)))
    data[-4:] = data[4:8]
    assert decode.decode(bytes(data), 32).shape == (12, 16, 3)


def test_other_modes():
    grey, alpha = picture(channels=1)[..., 0], np.full((12, 16), 128, np.uint8)
    la = tiff({262: 1, 258: (8, 8), 277: 2, 338: 1}, np.dstack([grey // 2, alpha]).tobytes())  # premultiplied
    np.testing.assert_allclose(decode.decode(la, 32)[..., 0], grey / 2 + 127, atol=2)
    lab = ImageCms.applyTransform(Image.fromarray(picture()), TO_LAB)
    np.testing.assert_allclose(decode.decode(encode(lab, "TIFF"), 32).astype(int), picture(), atol=20)
    ycc = Image.fromarray(picture()).convert("YCbCr")
    np.testing.assert_allclose(decode.decode(encode(ycc, "TIFF"), 32).astype(int), picture(), atol=3)
    mpo = encode(Image.fromarray(picture()), "MPO", save_all=True, append_images=[Image.fromarray(picture(seed=3))], quality=95)
    np.testing.assert_allclose(decode.decode(mpo, 32).astype(int), picture(), atol=40)
    np.testing.assert_array_equal(decode.decode(grey > 99, 32)[..., 2], np.where(grey > 99, 255, 0))
    np.testing.assert_array_equal(decode.decode(encode(picture(), "QOI"), 32), picture())
    np.testing.assert_array_equal(decode.decode(encode(picture(), "TGA"), 32), picture())


def test_exif_orientation():
    upright = picture()
    stored = {  # EXIF orientation -> how a camera that was held so stores the upright picture.
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for file_format in "PNG", "TIFF":
            data = encode(np.ascontiguousarray(pixels), file_format, exif=exif)
            np.testing.assert_array_equal(decode.decode(data, canvas=32), upright, err_msg=f"{orientation}")


def test_broken_exif_is_ignored():
    data = encode(picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    np.testing.assert_array_equal(decode.decode(data, canvas=32), picture())


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(seed=i)) for i in range(3)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode(data, canvas=32), picture())


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(40, 50, (26, 32)), (90, 60, (32, 21)), (32, 32, (32, 32)), (3, 5, (3, 5))]
)
def test_only_larger_images_are_reduced(height, width, expected):
    image = picture(height, width)
    for given in encode(image), image:
        decoded = decode.decode(given, canvas=32)
        assert decoded.shape == (*expected, 3)
        resized = np.asarray(Image.fromarray(image).resize(expected[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_allclose(decoded.astype(int), resized, atol=3)


def test_extreme_aspect_ratio():
    for file_format in "PNG", "JPEG":
        assert decode.decode(encode(picture(2, 5000), file_format), canvas=32).shape == (1, 32, 3)


def test_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    decoded_sizes = []
    rgb = decode._rgb
    monkeypatch.setattr(decode, "_rgb", lambda image, *rest: decoded_sizes.append(image.size) or rgb(image, *rest))
    image = picture(1200, 1600)
    decoded = decode.decode(encode(image, "JPEG", quality=95), canvas=64)
    assert decoded_sizes == [(200, 150)]
    resized = Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC)
    assert np.abs(decoded - np.asarray(resized, float)).mean() < 1


BAD = {
    "empty": b"",
    "text": b"This is not an image.",
    "truncated png": encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))[:-600],
    "truncated jpeg": encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")[:-600],
    "header only": encode(picture())[:20],
    "random bytes": np.random.default_rng(0).bytes(1000),
    "png with garbage inside": encode(picture())[:40] + bytes(20) + encode(picture())[60:],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images(kind):
    with pytest.raises(decode.BadImage, match="the file is empty|no image of the formats|Error") as error:
        decode.decode(BAD[kind], canvas=32)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and refuses the second.
def test_decompression_bomb(side):
    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0))
    with pytest.raises(decode.BadImage, match=f"{side} x {side} pixels look like a .* bomb: data.max_pixels is 89,478,485"):
        decode.decode(b"\x89PNG\r\n\x1a\n" + header + encode(picture())[33:], canvas=32)


def test_the_limit_of_pixels_is_the_callers(monkeypatch):
    data = encode(picture(), "TIFF", compression="tiff_lzw")
    with pytest.raises(decode.BadImage, match="data.max_pixels is 191"):
        decode.decode(data, 32, max_pixels=191)
    decode.decode(data, 32, max_pixels=192)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # also of Pillow's own, which its reader of compressed TIFF asks
    assert decode.decode(data, 32, max_pixels=192).shape == (12, 16, 3)
    for file_format in "WEBP", "PNG", "GIF":
        assert decode.decode(encode(picture(), file_format), 32, max_pixels=10**6).shape == (12, 16, 3)


def test_memory_is_counted_in_bytes():
    data = encode(picture(), "WEBP")  # its reader holds four copies of 4 bytes
    with pytest.raises(decode.BadImage, match="16 x 12 pixels of WEBP RGB take .* 8 bytes times data.max_pixels=383"):
        decode.decode(data, 32, max_pixels=383)
    decode.decode(data, 32, max_pixels=384)
    tiles = tiff({262: 1, 258: 8, 254: 0, 322: 40_000, 323: 40_000}, bytes(12 * 16))
    with pytest.raises(decode.BadImage, match="40000 x 40000 pixels look"):
        decode.decode(tiles, 32)


@pytest.mark.parametrize("color", ["RGBA", "16-bit RGB", "palette"])
def test_large_images_are_decoded_in_bands(monkeypatch, color):
    """As whole ones are, up to the rounding of a mean; also where they are turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.ascontiguousarray(picture(101, 203))
    if color == "16-bit RGB":
        rows = [row.astype(">u2").tobytes() for row in pixels.astype(np.uint16) * 257]
        data = png(203, 101, 16, 2, rows, chunk(b"eXIf", exif.tobytes()[6:]))
    elif color == "palette":
        data = encode(Image.fromarray(pixels).quantize(64), exif=exif, transparency=3)
    else:
        data = encode(np.dstack([pixels, pixels[..., 0]]), exif=exif)
    whole = decode.decode(data, 16, (0, 65535))
    assert whole.shape == (16, 8, 3)
    monkeypatch.setattr(decode, "WHOLE", 100)
    monkeypatch.setattr(decode, "BAND", 2000)
    sizes = []
    monkeypatch.setattr(decode, "_rgb", lambda image, *rest, rgb=decode._rgb: sizes.append(image.height) or rgb(image, *rest))
    banded = decode.decode(data, 16, (0, 65535))
    assert len(sizes) > 5 and sum(sizes) == 101
    np.testing.assert_allclose(banded.astype(int), whole, atol=10)
    monkeypatch.setattr(decode, "BAND", 500_000)
    np.testing.assert_array_equal(decode.decode(data, 16, (0, 65535)), banded)


@pytest.mark.parametrize("name, data", [("zTXt", b"k\0\0"), ("iTXt", b"k\0\1\0\0\0"), ("iCCP", b"k\0\0")])
def test_bombs_in_the_chunks_of_a_png(name, data):
    bomb = zlib.compress(bytes(3 * 10**6), 9)
    with pytest.raises(decode.BadImage, match="too large"):
        decode.decode(png(4, 4, 8, 2, [bytes(12)] * 4, chunk(name.encode(), data + bomb)), 32)


# Files.


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    file, link, pipe, sparse = (tmp_path / name for name in ("file.png", "link.png", "pipe.png", "sparse.png"))
    file.write_bytes(b"bytes")
    link.symlink_to(file)
    assert decode.read_file(file) == decode.read_file(link) == b"bytes"
    os.mkfifo(pipe)
    with open(sparse, "wb") as opened:
        opened.truncate(3 * 2**30)
    zero = tmp_path / "zero.png"
    zero.symlink_to("/dev/zero")
    for path, reason in ((pipe, "no regular file"), (zero, "no regular file"), (tmp_path, "no regular file|directory")):
        with pytest.raises(OSError, match=reason):
            decode.read_file(path)
    with pytest.raises(OSError, match="3,221,225,472 bytes, the limit is 1,073,741,824"):
        decode.read_file(sparse)
    with pytest.raises(FileNotFoundError):
        decode.read_file(tmp_path / "none")


def test_a_folder_reads_regular_files_only(tmp_path):
    for name in "a.png", "b.png":
        (tmp_path / name).write_bytes(encode(picture()))
    source = sources.open_source("folder", tmp_path)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")  # after the files were listed
    batch = pipeline.load(source, [0], 32)
    assert batch["index"].tolist() == [1]


# Arrays.


@pytest.mark.parametrize("images, line", [
    (np.zeros((2, 4, 4, 3), np.float32), r"float32 \[2, 4, 4, 3\].*\(images \* 255\).round\(\).astype\(np.uint8\)"),
    (np.zeros((2, 4, 4, 3), np.bool_), "bool"),
    (np.zeros((2, 4, 4, 3), np.uint16), "uint16"),
    (np.zeros((2, 3, 4, 4), np.uint8), r"uint8 \[2, 3, 4, 4\], wanted is uint8 \[N, h, w, 3\]"),
    (np.zeros((2, 4, 4), np.uint8), r"images\[..., None\]"),
    ([[1, 2]], "list"),
])
def test_arrays_that_are_not_images_are_refused(images, line):
    with pytest.raises(ValueError, match=line) as error:
        sources.ArraySource(images, np.zeros(2, np.int32), 1)
    assert "\n" not in str(error.value)


def test_grey_arrays_and_labels():
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    batch = pipeline.load(sources.ArraySource(images, np.zeros(2, np.int32), 1), [1], 4)
    np.testing.assert_array_equal(batch["image"], images[1:].repeat(3, axis=3))
    with pytest.raises(ValueError, match=r"labels are int32 \[3\], wanted are integers \[2\]"):
        sources.ArraySource(images, np.zeros(3, np.int32), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.bool_])
def test_the_step_takes_uint8_only(dtype):
    batch = {"image": np.ones((2, 8, 8, 3), dtype), "size": np.full((2, 2), 8), "index": np.arange(2)}
    crops = [augment.Crops("global", 4, (0.5, 1.0), (augment.FLIP,))]
    with pytest.raises(ValueError, match=rf'batch\["image"\] is {np.dtype(dtype)}, wanted is uint8.*astype\(np.uint8\)'):
        jax.jit(lambda batch: augment.augment(batch, crops, jax.random.key(0), (0.5,) * 3, (0.5,) * 3))(batch)


# The survey.


class Listed:
    """A source of given images."""

    description = "a list"

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return sources.Example(self.images[row], 0)

    def name(self, row):
        return f"image {row}"


def test_nothing_is_said_of_usual_images():
    assert pipeline.survey(Listed(*(encode(picture(seed=i)) for i in range(5))), 32) == (None, [])


def test_levels_are_measured():
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(200, 4000, (40, 50)).astype(np.uint16)) for _ in range(4)]
    (black, white), lines = pipeline.survey(Listed(*images), 32)
    assert abs(black - 204) <= 3 and abs(white - 3996) <= 3 and isinstance(white, int)
    assert len(lines) == 1 and f"4 of 4 sampled images have more than 8 bits: their values {black} to {white} be" in lines[0]
    levels, lines = pipeline.survey(Listed(*images, encode(picture())), 32, levels=(0, 2000))
    assert levels == (0, 2000)
    assert re.search("4 of 5 .* as data.levels says; 52.*% lie outside and are clipped; the other 1 have 8 bits", lines[0])
    floats = [encode(rng.random((40, 50), np.float32) / 7, "TIFF") for _ in range(70)]
    (black, white), lines = pipeline.survey(Listed(*floats), 32)
    assert 0 < black < 1e-3 and 0.142 < white < 1 / 7 and "64 of 64" in lines[0]
    assert pipeline.survey(Listed(encode(np.full((4, 4), 9, np.uint16))), 8).levels == (9, 10)


def test_what_a_survey_says():
    frames = [Image.fromarray(picture(seed=i)) for i in range(3)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    lines = pipeline.survey(Listed(animation, b"garbage", encode(picture(seed=5))), 32, levels=(0, 9)).lines
    assert "data.levels is not used" in lines[0] and "1 of 3 sampled images have several frames" in lines[1]
    assert "1 of 3 sampled images are bad, such as image 1: no image" in lines[2] and len(lines) == 3
    flat = pipeline.survey(Listed(*(np.full((8, 8, 3), level, np.uint8) for level in (0, 90, 255))), 32).lines
    assert len(flat) == 1 and "nearly constant" in flat[0]
    same = pipeline.survey(Listed(*[picture()] * 3), 32).lines
    assert len(same) == 1 and "hardly differ from each other" in same[0]
    assert "100 images in a row" not in pipeline.survey(Listed(b"", b""), 32).lines[0]


def test_levels_and_pixels_reach_the_batches():
    source = Listed(*(encode(np.full((4, 4), 100 * i, np.uint16)) for i in range(4)))
    options = dict(canvas=4, batch_size=4, levels=(0, 300))
    train = next(pipeline.train_batches(source, seed=0, **options))
    (held_out,) = pipeline.eval_batches(source, np.arange(4), **options)
    for batch in train, held_out:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"] * 85)
        options["max_pixels"] = 15
    for stream in pipeline.train_batches(source, seed=0, **options), pipeline.eval_batches(source, np.arange(4), **options):
        with pytest.raises(ValueError, match="data.max_pixels is 15"):
            next(stream)


PEAK = """
import re, sys
from mim_jax.data import decode
data = sys.stdin.buffer.read()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
try:
    print(decode.decode(data, 320, levels=(0, 65535)).shape, end=" ")
except decode.BadImage as error:
    print(error, end=" ")
print((peak() - before) // 1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits, color, bytes_per_pixel", [(8, 6, 5), (8, 4, 5), (16, 0, 3), (16, 2, 9.5), (16, 6, 9.5)])
def test_peak_memory_of_the_largest_image(bits, color, bytes_per_pixel):
    """A file of 300 kB; of 8-bit RGBA it once took 1.4 GB."""
    side = math.isqrt(decode.MAX_PIXELS)
    row = bytes(side * bits // 8 * {0: 1, 2: 3, 4: 2, 6: 4}[color])
    data = png(side, side, bits, color, [row] * side)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PEAK], input=data, capture_output=True, env=env)
    *shape, peak = done.stdout.decode().split()
    assert " ".join(shape) == "(320, 320, 3)", done.stderr.decode()
    assert int(peak) * 1000 < bytes_per_pixel * decode.MAX_PIXELS, f"{len(data):,} bytes take {peak} MB"


def test_levels_of_a_few_bright_spots_are_their_extremes():
    spots = np.zeros((100, 100), np.uint16)
    spots[5, 5] = 4000
    assert pipeline._measured(spots.reshape(-1)) == (0, 4000)
    assert pipeline._measured(20_000_000 + np.arange(40)) == (20_000_000, 20_000_039)
    black, white = pipeline._measured(np.linspace(1000, 1000.001, 1000))
    assert 1000 < black < 1000.0001 < 1000.0009 < white < 1000.001


def test_a_stack_of_imagej_in_one_page_is_refused():
    data = encode(Image.fromarray(picture()), "TIFF", tiffinfo={270: "ImageJ=1.53\nimages=5\nslices=5\n"})
    with pytest.raises(decode.BadImage, match="an ImageJ stack of 5 images, of which only the first would be read"):
        decode.decode(data, 40)
