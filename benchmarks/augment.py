"""Images per second of decoding, of augmentation on the device and of augmentation on the host, in one run.

    python benchmarks/augment.py                                              # 2 x 224 + 8 x 96 from 256 x 256 images
    python benchmarks/augment.py --side=32 --global_size=32 --local_size=16 --local_number=4 --batch=128

* host decode: JPEG bytes to a canvas, as in the pipeline, on one core;
* device augmentation: all crops of DINO's recipe from the canvas, by `mim_jax.data.augment`, on all of JAX's devices;
* host augmentation: the same crops and operations with Pillow, on one core.

The images are noise with the spectrum of natural images. The programs run in turn in each round; medians are printed.
"""

import io
import math
import platform
import random
import statistics

import jax
import numpy as np
import PIL
from absl import app, flags
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from step import ROUNDS, interleaved

from mim_jax import sharding
from mim_jax.data.augment import Crops, Policy, augment
from mim_jax.data.decode import decode

SIDE = flags.DEFINE_integer("side", 256, "Side of the square images and of the canvas, in pixels.")
GLOBAL_SIZE = flags.DEFINE_integer("global_size", 224, "Side of the global crops.")
LOCAL_SIZE = flags.DEFINE_integer("local_size", 96, "Side of the local crops.")
LOCAL_NUMBER = flags.DEFINE_integer("local_number", 8, "Local crops of an image.")
BATCH = flags.DEFINE_integer("batch", 32, "Images on the device at a time.")
HOST_IMAGES = flags.DEFINE_integer("host_images", 16, "Images for the host in each round.")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(_: list[str]) -> None:
    crops = (
        Crops("global", GLOBAL_SIZE.value, (0.25, 1.0), (Policy(blur=1.0), Policy(blur=0.1, solarize=0.2))),
        Crops("local", LOCAL_SIZE.value, (0.05, 0.25), (Policy(blur=0.5),) * LOCAL_NUMBER.value),
    )
    size, host, side = BATCH.value, HOST_IMAGES.value, SIDE.value
    files = [jpeg(natural_noise(side, seed)) for seed in range(max(size, host))]
    images = [decode(file, side) for file in files]
    batch = {"image": np.stack(images[:size]), "size": np.full((size, 2), side), "index": np.arange(size, dtype=np.int32)}
    with jax.set_mesh(sharding.make_mesh()):
        batch = sharding.global_batch(batch)
    make_views, rng = jax.jit(lambda batch: augment(batch, crops, jax.random.key(0), MEAN, STD)), random.Random(0)
    programs = {
        "host decode": lambda: [decode(file, side) for file in files[:host]],
        "device augmentation": lambda: make_views(batch),
        "host augmentation": lambda: [with_pillow(Image.fromarray(image), crops, rng) for image in images[:host]],
    }
    where = {
        "host decode": f"one core, Pillow {PIL.__version__}, {sum(map(len, files)) / len(files) / 1024:.0f} kB a file",
        "device augmentation": f"{jax.device_count()} x {jax.devices()[0].device_kind}, batch {size}",
        "host augmentation": "one core, Pillow",
    }
    print(f"jax {jax.__version__}, Python {platform.python_version()}")
    print(f"images of {side} pixels, crops 2 x {GLOBAL_SIZE.value} + {LOCAL_NUMBER.value} x {LOCAL_SIZE.value}")
    for name, seconds in interleaved(programs, ROUNDS.value).items():
        per_image = statistics.median(seconds) / (size if name == "device augmentation" else host)
        print(f"{name:<20} {1 / per_image:>10,.0f} images/s   {per_image * 1e3:8.3f} ms an image   ({where[name]})")


def natural_noise(side: int, seed: int) -> np.ndarray:
    """Noise uint8 [side, side, 3] with amplitudes that fall as 1 / frequency and correlated channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = np.inf
    planes = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, side, side))) / frequency).real
    planes = planes / planes.std(axis=(1, 2), keepdims=True)
    mixed = 0.8 * planes[0] + 0.35 * planes
    return np.clip(118 + 58 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def with_pillow(image: Image.Image, crops: tuple[Crops, ...], rng: random.Random) -> list[np.ndarray]:
    """The same views with Pillow, float32 [size, size, 3] each."""
    return [view_with_pillow(image, group, policy, rng) for group in crops for policy in group.policies]


def view_with_pillow(image: Image.Image, group: Crops, policy: Policy, rng: random.Random) -> np.ndarray:
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * rng.uniform(*group.scale)
        ratio = math.exp(rng.uniform(math.log(group.ratio[0]), math.log(group.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    view = image.crop(box).resize((group.size, group.size), Image.Resampling.BICUBIC)
    if rng.random() < policy.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < policy.jitter:
        operations = [
            lambda view: ImageEnhance.Brightness(view).enhance(rng.uniform(1 - policy.brightness, 1 + policy.brightness)),
            lambda view: ImageEnhance.Contrast(view).enhance(rng.uniform(1 - policy.contrast, 1 + policy.contrast)),
            lambda view: ImageEnhance.Color(view).enhance(rng.uniform(1 - policy.saturation, 1 + policy.saturation)),
            lambda view: shift_hue(view, rng.uniform(-policy.hue, policy.hue)),
        ]
        for operation in rng.sample(operations, 4):
            view = operation(view)
    if rng.random() < policy.gray:
        view = view.convert("L").convert("RGB")
    if rng.random() < policy.blur:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(*policy.blur_radius)))
    if rng.random() < policy.solarize:
        view = ImageOps.solarize(view)
    return (np.asarray(view, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)


def shift_hue(view: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = view.convert("HSV").split()
    hue = hue.point(lambda level: (level + int(shift * 255)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


if __name__ == "__main__":
    app.run(main)
