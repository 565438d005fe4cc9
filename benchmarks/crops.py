"""What a canvas does to the crops, against crops of the whole picture, and how fast pictures are decoded onto it.

    python benchmarks/crops.py --photos=a.jpg,b.png [--canvas=320,512] [--rounds=5]

The official programs cut their crops from the picture as it is in the file; ours cut them from a canvas to which larger
pictures are reduced. Each photograph is taken as it is and, as most of ImageNet is, with a longer side of 500 pixels, both as
JPEGs of quality 95. The same boxes (torchvision's RandomResizedCrop) are cut from both and resized by Pillow's bicubic filter,
which `tests/test_augment.py` compares ours with, level by level. Shown is the mean absolute difference of their levels of 0 to
255; for scale, also that of crops of the whole picture resized with the bilinear filter instead. Speed is in images a second of
the CPU, of one core; the quickest of the rounds.
"""

import io
import math
import platform
import time

import numpy as np
import PIL
from absl import app, flags
from PIL import Image

from mim_jax.data.decode import decode

PHOTOS = flags.DEFINE_list("photos", None, "Files of photographs.", required=True)
CANVAS = flags.DEFINE_list("canvas", ["320", "512"], "Sides of the canvas, in pixels.")
BOXES = flags.DEFINE_integer("boxes", 8, "Crops of each kind from each photograph.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often decoding is timed.")

KINDS = {"MAE 224": (224, (0.2, 1.0)), "DINO 224": (224, (0.25, 1.0)), "DINO 96": (96, (0.05, 0.25))}
IMAGENET = 500


def main(_: list[str]) -> None:
    whole = [Image.open(path).convert("RGB") for path in PHOTOS.value]
    small = [
        image.resize([round(n * IMAGENET / max(image.size)) for n in image.size], Image.Resampling.LANCZOS) for image in whole
    ]
    print(
        f"Pillow {PIL.__version__}, Python {platform.python_version()}; {len(whole)} photographs, {BOXES.value} crops of a kind"
    )
    print("| longer side | crops | " + " | ".join(f"canvas {side}" for side in CANVAS.value) + " | bilinear |")
    print("| --- " * (3 + len(CANVAS.value)) + "|")
    groups = {
        str(IMAGENET): small,
        "above 500": [image for image in whole if max(image.size) > IMAGENET],
        "1000 and more": [image for image in whole if max(image.size) >= 1000],
    }
    files = {name: [jpeg(image) for image in images] for name, images in groups.items()}
    for name, encoded in files.items():
        for kind, (size, scale) in KINDS.items():
            rng, found = np.random.default_rng(0), []
            for file in encoded:
                image = Image.open(io.BytesIO(file)).convert("RGB")
                canvases = [Image.fromarray(decode(file, int(side))) for side in CANVAS.value]
                for _ in range(BOXES.value):
                    box = draw(rng, *image.size, scale)
                    exact = cut(image, box, size)
                    others = [cut(canvas, scaled(box, image, canvas), size) for canvas in canvases]
                    others.append(cut(image, box, size, Image.Resampling.BILINEAR))
                    found.append([np.abs(other - exact).mean() for other in others])
            print(f"| {name} ({len(encoded)}) | {kind} | " + " | ".join(f"{gap:.2f}" for gap in np.mean(found, axis=0)) + " |")
    print("\n| longer side | kB | " + " | ".join(f"canvas {side}" for side in CANVAS.value) + " |")
    print("| --- " * (2 + len(CANVAS.value)) + "|")
    for name, encoded in files.items():
        rates = [max(speed(encoded, int(side)) for _ in range(ROUNDS.value)) for side in CANVAS.value]
        mean = sum(map(len, encoded)) / len(encoded) / 1024
        print(f"| {name} | {mean:.0f} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def draw(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) as RandomResizedCrop draws it."""
    while True:
        area, ratio = width * height * rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h


def scaled(box: tuple[int, ...], image: Image.Image, canvas: Image.Image) -> tuple[float, ...]:
    """The same region of the picture on its canvas."""
    return tuple(n * canvas.size[i % 2] / image.size[i % 2] for i, n in enumerate(box))


def cut(image: Image.Image, box: tuple[float, ...], size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(image.resize((size, size), how, box=box), np.float32)


def speed(files: list[bytes], canvas: int) -> float:
    """Files decoded in a second of the CPU."""
    start = time.process_time()
    for file in files:
        decode(file, canvas)
    return len(files) / (time.process_time() - start)


if __name__ == "__main__":
    app.run(main)
