"""Small pictures, and files of them, for tests."""

import io

import numpy as np
from PIL import Image


def picture(height=12, width=16, channels=3, seed=0):
    """Smooth uint8 [h, w, c] without symmetry."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    wave = np.sin(2.7 * x / width + c + seed) * np.cos(1.9 * y / height - c) + 0.5 * x / width
    return np.uint8(255 * (wave - wave.min()) / np.ptp(wave))


def encode(image, file_format="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
