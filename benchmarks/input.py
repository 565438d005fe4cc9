"""CPU time of decoding and augmenting an image, ours against torchvision's transforms, on the same JPEG files.

    python benchmarks/input.py --torch=/path/to/python/with/torchvision [--canvas=512]

* ours: JPEG bytes to a canvas, as in the pipeline, on one core; then all crops of DINO's recipe on JAX's devices;
* torchvision: JPEG bytes to a picture, then DINO's transforms of Pillow pictures, in one thread of a process of its own.

The programs take turns in each round, and the process that waits does nothing. Shown are medians and quartiles of the rounds.
Time of the CPU is of all threads; without --torch, only ours is measured. The pictures are noise with the spectrum of natural
images.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import PIL
from absl import app, flags
from pictures import jpeg, natural_noise

from mim_jax import sharding
from mim_jax.data.augment import Crops, Policy, augment
from mim_jax.data.decode import decode

TORCH = flags.DEFINE_string("torch", "", "A Python that has torchvision.")
CANVAS = flags.DEFINE_integer("canvas", 512, "Side of our canvas, in pixels.")
SIZE = flags.DEFINE_list("size", ["375", "500"], "Height and width of the pictures.")
GLOBAL_SIZE = flags.DEFINE_integer("global_size", 224, "Side of the two global crops.")
LOCAL_SIZE = flags.DEFINE_integer("local_size", 96, "Side of the local crops.")
LOCAL_NUMBER = flags.DEFINE_integer("local_number", 8, "Local crops of an image.")
IMAGES = flags.DEFINE_integer("images", 32, "Pictures, all of which are used in each round; our batch.")
ROUNDS = flags.DEFINE_integer("rounds", 16, "How often each program is timed.")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(_: list[str]) -> None:
    height, width = map(int, SIZE.value)
    crops = (
        Crops("global", GLOBAL_SIZE.value, (0.25, 1.0), (Policy(blur=1.0), Policy(blur=0.1, solarize=0.2))),
        Crops("local", LOCAL_SIZE.value, (0.05, 0.25), (Policy(blur=0.5),) * LOCAL_NUMBER.value),
    )
    files = [jpeg(natural_noise(height, width, seed)) for seed in range(IMAGES.value)]
    pictures = [decode(file, CANVAS.value) for file in files]
    canvas = np.zeros((len(files), CANVAS.value, CANVAS.value, 3), np.uint8)
    for row, picture in zip(canvas, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    batch = {"image": canvas, "size": np.array([p.shape[:2] for p in pictures]), "index": np.arange(len(files), dtype=np.int32)}
    with jax.set_mesh(sharding.make_mesh()):
        batch = sharding.global_batch(batch)
    make_views = jax.jit(lambda batch: augment(batch, crops, jax.random.key(0), MEAN, STD)).lower(batch).compile()
    programs = {
        "ours, decoding": timed(lambda: [decode(file, CANVAS.value) for file in files]),
        "ours, augmentation": timed(lambda: jax.block_until_ready(make_views(batch))),
    }
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, ", end="")
    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            with open(os.path.join(folder, f"{number}.jpg"), "wb") as target:
                target.write(file)
        if TORCH.value:
            programs |= torchvision(folder)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for each in range(ROUNDS.value + 1):
            for name, program in programs.items():
                measured = program()
                seconds[name] += [measured] if each else []  # the first is slow
    sizes = f"{height} x {width} pixels, {sum(map(len, files)) / len(files) / 1024:.0f} kB"
    print(f"{IMAGES.value} pictures of {sizes}; canvas {CANVAS.value}; 2 x {GLOBAL_SIZE.value} + ", end="")
    print(f"{LOCAL_NUMBER.value} x {LOCAL_SIZE.value}; {ROUNDS.value} rounds; load {os.getloadavg()[0]:.1f}")
    cpu = {name: np.array(values)[:, 1] / len(files) for name, values in seconds.items()}
    for who in dict.fromkeys(name.split(", ")[0] for name in programs):
        cpu[f"{who}, both"] = cpu[f"{who}, decoding"] + cpu[f"{who}, augmentation"]
    for name, values in cpu.items():
        low, middle, high = np.percentile(values * 1e3, (25, 50, 75))
        wall = f"{np.median(np.array(seconds[name])[:, 0]) / len(files) * 1e3:8.2f} ms of the clock" if name in seconds else ""
        print(f"{name:<26} {1e3 / middle:7.1f} images a second of CPU; {middle:.2f} ms [{low:.2f}, {high:.2f}] an image {wall}")
    if TORCH.value:
        for part in ("augmentation", "both"):
            low, middle, high = np.percentile(cpu[f"torchvision, {part}"] / cpu[f"ours, {part}"], (25, 50, 75))
            print(f"torchvision / ours, {part}: {middle:.2f} [{low:.2f}, {high:.2f}]")


def timed(program: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """Runs `program` and returns seconds of the clock and of the CPU, of all threads."""

    def run() -> tuple[float, float]:
        clock, cpu = time.perf_counter(), time.process_time()
        program()
        return time.perf_counter() - clock, time.process_time() - cpu

    return run


def torchvision(folder: str) -> dict[str, Callable[[], tuple[float, float]]]:
    """The programs of `input_torchvision.py`, in its process."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "input_torchvision.py")
    sizes = map(str, (GLOBAL_SIZE.value, LOCAL_SIZE.value, LOCAL_NUMBER.value))
    child = subprocess.Popen(
        [TORCH.value, script, folder, *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    if not (versions := child.stdout.readline()):
        sys.exit(f"{script} did not start: see above")
    print(versions, end="")

    def ask(what: str) -> tuple[float, float]:
        child.stdin.write(what + "\n")
        return tuple(json.loads(child.stdout.readline()))

    return {f"torchvision, {what}": lambda what=what: ask(what) for what in ("decoding", "augmentation")}


if __name__ == "__main__":
    app.run(main)
