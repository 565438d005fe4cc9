"""CPU time of an image on the host.

    python benchmarks/input.py --torch=/path/to/python/with/torchvision [--canvas=512]
    python benchmarks/input.py --part=parent [--canvas=512]

augmentation (the default part) is ours against torchvision's transforms, on the same JPEG files:

* ours: JPEG bytes to a canvas, as in the pipeline, on one core; then all crops of DINO's recipe on JAX's devices;
* torchvision: JPEG bytes to a picture, then DINO's transforms of Pillow pictures, in one thread of a process of its own.

The programs take turns in each round, and the process that waits does nothing. Shown are medians and quartiles of the rounds.
Time of the CPU is of all threads; without --torch, only ours is measured. The pictures are noise with the spectrum of natural
images.

parent is what the process that trains does for an image whose batch two other processes make, of pictures that are decoded
already: by Grain's `mp_prefetch`, then by our shared memory. The batch is handed over and dropped, or made
an array of JAX, or copied once in one thread, which stands for a transfer to a device. Time is of all threads of this process.
"""

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
import PIL
from absl import app, flags
from pictures import jpeg, natural_noise

from mim_jax import sharding
from mim_jax.data import pipeline
from mim_jax.data.augment import Crops, Policy, augment
from mim_jax.data.decode import decode
from mim_jax.data.sources import Example

PART = flags.DEFINE_enum("part", "augmentation", ["augmentation", "parent"], "What is measured.")
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
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, ", end="")
    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, grain {grain.__version__}")
    augmentation() if PART.value == "augmentation" else parent()


def augmentation() -> None:
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


class Decoded:
    """A source of pictures that need no decoding."""

    num_classes, classes, description, notes, fingerprint = 0, (), "pictures", (), "0"

    def __init__(self, height: int, width: int):
        self.images = [natural_noise(height, width, seed) for seed in range(16)]

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, row: int) -> Example:
        return Example(self.images[row % len(self.images)], 0)

    def name(self, row: int) -> str:
        return str(row)


def by_grain(source: Decoded, batch: int, canvas: int, workers: int) -> Iterator[pipeline.Batch]:
    rows = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat()
    batches = grain.MapDataset.range(len(rows) // batch).map(
        lambda number: pipeline.load(source, [rows[p] for p in range(number * batch, (number + 1) * batch)], canvas)
    )
    one_at_a_time = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    return iter(one_at_a_time.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def parent() -> None:
    source, size, canvas, workers, number = Decoded(*map(int, SIZE.value)), IMAGES.value, CANVAS.value, 2, 8
    streams = {
        "Grain's": lambda: by_grain(source, size, canvas, workers),
        "ours": lambda: pipeline.train_batches(source, seed=0, batch_size=size, canvas=canvas, workers=workers),
    }
    buffer = np.zeros((size, canvas, canvas, 3), np.uint8)
    uses = {
        "handed over": lambda batch: None,
        "as an array of JAX": lambda batch: jax.block_until_ready(sharding.global_batch(batch)["image"]),
        "copied once": lambda batch: np.copyto(buffer, batch["image"]),
    }
    cpu: dict[tuple[str, str], list[float]] = {(who, use): [] for use in uses for who in streams}
    for who, make in streams.items():
        with contextlib.closing(make()) as stream, jax.set_mesh(sharding.make_mesh()):
            for each in range(ROUNDS.value + 2):
                for use, function in uses.items():
                    start = time.process_time()
                    for _ in range(number):
                        function(next(stream))
                    if each > 1:  # before, memory is new and programs are compiled
                        cpu[who, use].append((time.process_time() - start) / number / size)
                if each in (1, ROUNDS.value + 1):
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
                    print(f"{who}, after round {each + 1}: {peak:,.0f} MiB of memory at the peak")
    print(f"batches of {size} pictures of {' x '.join(SIZE.value)} on a canvas of {canvas}; {ROUNDS.value} rounds of {number}")
    for (who, use), values in cpu.items():
        low, middle, high = np.percentile(np.array(values) * 1e6, (25, 50, 75))
        print(f"{who:<8} {use:<20} {middle:6.1f} us [{low:.1f}, {high:.1f}] an image: {1e6 / middle:9,.0f} images/s at most")


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
