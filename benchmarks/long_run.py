"""Memory over a long run: steps of a tiny MAE in the real loop, with evaluations and checkpoints going on.

    python benchmarks/long_run.py [--steps=100000]

Prints every 1,000 steps the process's resident memory, and what glibc has allocated and not freed; at the end the slopes of
both by least squares, without the first tenth. What is resident swings by 20 MB, as free memory lies in between. Linux only.
"""

import ctypes
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from PIL import Image

from mim_jax import journal, load_config, train
from mim_jax.main import one_arena_a_core

STEPS = flags.DEFINE_integer("steps", 100_000, "Length of the run.")
EVERY = 1000
ROOT = Path(__file__).parent.parent


def main(_: list[str]) -> None:
    one_arena_a_core()
    logging.set_verbosity(logging.WARNING)
    memory: list[tuple[float, float]] = []  # MB resident and in use, after EVERY, 2 * EVERY, ... steps
    make_train_step, start = train.make_train_step, time.perf_counter()

    def watched(method, config):
        train_step, calls = make_train_step(method, config), 0

        def step(*args):
            nonlocal calls
            calls += 1
            if calls % EVERY == 0:
                memory.append((resident(), in_use()))
                told = "{:8.1f} MB resident, {:8.1f} MB in use".format(*memory[-1])
                print(f"step {calls:7,} {told} {time.perf_counter() - start:6.0f} s", flush=True)
            return train_step(*args)

        step.lower = train_step.lower
        return step

    train.make_train_step = watched
    with tempfile.TemporaryDirectory() as folder:
        images, rng = Path(folder) / "images", np.random.default_rng(0)
        images.mkdir()
        for number in range(40):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(images / f"{number}.png")
        config = load_config(f"{ROOT}/tests/tiny.py:mae").unlock()
        config.total, config.data.dir = f"{STEPS.value} steps", str(images)
        config.log_every, config.checkpoint.every, config.eval.every = "10 steps", "500 steps", "2000 steps"
        train.run(config, Path(folder) / "run")
        rows = len(journal.read(Path(folder) / "run"))
    seconds, later = time.perf_counter() - start, memory[len(memory) // 10 :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{STEPS.value:,} steps, {rows:,} rows, {seconds:,.0f} s, at most {peak:,.0f} MB")
    for name, values in zip(("resident", "in use"), zip(*later)):
        (slope, _), covariance = np.polyfit(np.arange(len(values)), values, 1, cov=True)
        error = covariance[0, 0] ** 0.5
        print(f"slope of {name}: {slope:+.3f} ({error:.3f}) MB per {EVERY:,} steps, after the first {STEPS.value // 10:,}")


def resident() -> float:
    """MB of this process. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in "arena free_chunks fast maps mapped top fast_free uordblks free keep".split()
    ]


def in_use() -> float:
    """MB that glibc has allocated and not freed, in all arenas."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    return mallinfo().uordblks / 2**20


if __name__ == "__main__":
    app.run(main)
