"""Images per second of decoding and augmentation, on host and device, measured in turn.

    python benchmarks/augment.py                                              # 2 x 224 + 8 x 96 from 256 x 256 pictures
    python benchmarks/augment.py --side=32 --global_size=32 --local_size=16 --local_number=4 --batch=128

* host decode: JPEG bytes to a canvas, as in the pipeline, on one core;
* device augmentation: all crops of DINO's recipe with `mim_jax.data.augment`, on all of JAX's devices;
* host augmentation: the same crops and operations with Pillow, on one core, for comparison.

The images are noise with the spectrum of natural images. Medians over the rounds are printed.
"""

import argparse
import io
import math
import platform
import random
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import PIL
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mim_jax.data.augment import Crops, Policy, augment
from mim_jax.data.decode import decode

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the images and the canvas, in pixels")
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--local_number", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="images on the device at a time")
    parser.add_argument("--host_images", type=int, default=16, help="images on the host in each round")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    crops = (
        Crops("global", args.global_size, (0.25, 1.0), (Policy(blur=1.0), Policy(blur=0.1, solarize=0.2))),
        Crops("local", args.local_size, (0.05, 0.25), (Policy(blur=0.5),) * args.local_number),
    )
    count = max(args.batch, args.host_images)
    files = [jpeg(natural_noise(args.side, seed)) for seed in range(count)]
    pictures = [decode(file, args.side) for file in files]
    batch = on_devices(
        {
            "image": np.stack(pictures[: args.batch]),
            "size": np.full((args.batch, 2), args.side, np.int32),
            "index": np.arange(args.batch, dtype=np.int32),
        }
    )
    views_of = jax.jit(lambda batch, key: augment(batch, crops, key, MEAN, STD))
    start = time.perf_counter()
    jax.block_until_ready(views_of(batch, jax.random.key(0)))
    compile_s = time.perf_counter() - start

    rng = random.Random(0)
    host = args.host_images
    seconds = interleaved(
        {
            "host decode": (host, lambda: [decode(file, args.side) for file in files[:host]]),
            "device augmentation": (args.batch, lambda: jax.block_until_ready(views_of(batch, jax.random.key(1)))),
            "host augmentation": (host, lambda: [with_pillow(Image.fromarray(p), crops, rng) for p in pictures[:host]]),
        },
        args.rounds,
    )
    where = {
        "host decode": f"one core, Pillow {PIL.__version__}, {sum(map(len, files)) / count / 1024:.0f} kB a file",
        "device augmentation": f"{jax.device_count()} x {jax.devices()[0].device_kind}, batch {args.batch}",
        "host augmentation": "one core, Pillow",
    }
    print(f"jax {jax.__version__}, Python {platform.python_version()}; compiled in {compile_s:.1f} s")
    print(f"images of {args.side} pixels, crops 2 x {args.global_size} + {args.local_number} x {args.local_size}")
    for name, per_image in seconds.items():
        print(f"{name:<20} {1 / per_image:>10,.0f} images/s   {per_image * 1e3:8.3f} ms an image   ({where[name]})")


def interleaved(programs: dict[str, tuple[int, Callable]], rounds: int) -> dict[str, float]:
    """Median seconds per image of `programs` (images per call, call), run in turn. The first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, (images, program) in programs.items():
            start = time.perf_counter()
            program()
            if number:
                seconds[name].append((time.perf_counter() - start) / images)
    return {name: statistics.median(values) for name, values in seconds.items()}


def on_devices(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def natural_noise(side: int, seed: int) -> np.ndarray:
    """uint8 [side, side, 3] noise with amplitudes proportional to 1 / frequency and correlated channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = np.inf
    planes = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, side, side))) / frequency).real
    planes = planes / planes.std(axis=(1, 2), keepdims=True)
    mixed = 0.8 * planes[0] + 0.35 * planes
    return np.clip(118 + 58 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()


def with_pillow(picture: Image.Image, crops: tuple[Crops, ...], rng: random.Random) -> list[np.ndarray]:
    """The same views made with Pillow, as in a data loader's worker: float32 [size, size, 3] each."""
    return [view_with_pillow(picture, group, policy, rng) for group in crops for policy in group.policies]


def view_with_pillow(picture: Image.Image, group: Crops, policy: Policy, rng: random.Random) -> np.ndarray:
    width, height = picture.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * rng.uniform(*group.scale)
        ratio = math.exp(rng.uniform(math.log(group.ratio[0]), math.log(group.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    view = picture.crop(box).resize((group.size, group.size), Image.Resampling.BICUBIC)
    if rng.random() < policy.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < policy.jitter:
        operations = [
            lambda view: ImageEnhance.Brightness(view).enhance(
                rng.uniform(1 - policy.brightness, 1 + policy.brightness)
            ),
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
    main()
