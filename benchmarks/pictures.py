"""Pictures for measurements: noise with the spectrum of natural images, as JPEGs.

    python benchmarks/pictures.py FOLDER NUMBER

writes so many of 375 x 500 pixels, with all cores.
"""

import io
import multiprocessing
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def write(file: Path) -> None:
    """The picture whose number the file's name is."""
    file.write_bytes(jpeg(natural_noise(375, 500, seed=int(file.stem))))


def natural_noise(height: int, width: int, seed: int) -> np.ndarray:
    """Noise uint8 [height, width, 3] with amplitudes that fall as 1 / frequency and correlated channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = np.inf
    planes = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, height, width))) / frequency).real
    planes = planes / planes.std(axis=(1, 2), keepdims=True)
    mixed = 0.8 * planes[0] + 0.35 * planes
    return np.clip(118 + 58 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        pool.map(write, [folder / f"{number}.jpg" for number in range(int(sys.argv[2]))])
