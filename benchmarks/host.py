"""Whether the host keeps the devices busy.

    python benchmarks/host.py --part=need [--slice=v5e-8] [--cores=112] [--recipes=dino:vits16,mae:vitb16]
    python benchmarks/host.py --part=steps --config=configs/mae.py:demo [--config.data.canvas=512 ...] [--rounds=5]

need: for each recipe, the images/s that the devices of a host take at 40 % of their peak; how many times as many its cores
decode, if each is as fast as this one; how many times as many the process that trains takes, if an image costs it `--handed`
microseconds (`python benchmarks/input.py --part=parent`); and `data.workers` for twice as many. The devices are computed, not
run. FLOPs are nominal, as XLA counts them.

steps: the time of a train step on a batch that is ready, and on JPEGs that two processes decode meanwhile, in turn in each
round. While a batch is ready, the processes are stopped. Time of the CPU is that of the process that trains alone. The pictures
have 375 x 500 pixels and are noise with the spectrum of natural images.
"""

import contextlib
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import PIL
from absl import app, flags
from pictures import jpeg, natural_noise
from scale import SHOWN
from step import CONFIG, ROUNDS, Step, noise

from mim_jax import dry_run, load_config, make_method, sharding
from mim_jax.config import resolve_target
from mim_jax.data import pipeline, processes
from mim_jax.data.decode import decode
from mim_jax.data.sources import open_source
from mim_jax.stopping import Stop
from mim_jax.topology import H100, TPUS

PART = flags.DEFINE_enum("part", "need", ["need", "steps"], "What is measured.")
SLICE = flags.DEFINE_string("slice", "v5e-8", "The devices of a host.")
CORES = flags.DEFINE_integer("cores", 112, "Cores of a host.")
CORE = flags.DEFINE_float("core", 0, "JPEGs that a core decodes in a second; by default, measured here.")
HANDED = flags.DEFINE_float("handed", 7, "Microseconds that the process that trains spends on an image.")
GOAL = 2.0  # times what is needed
IN_A_ROUND = 5  # steps that are timed
WORKERS = 2


def main(_: list[str]) -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, ", end="")
    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}; load {os.getloadavg()[0]:.1f}")
    need() if PART.value == "need" else steps()


def need() -> None:
    match = re.fullmatch(r"(\w+)-(\d+)", SLICE.value)
    if match is None or match[1] not in TPUS | {"h100": H100}:
        raise SystemExit(f"error: --slice is {SLICE.value}, and must be such as v5e-8 or h100-8")
    chip = (TPUS | {"h100": H100})[match[1]]
    peak = chip.flops * int(match[2]) / chip.cores
    files = [jpeg(natural_noise(375, 500, seed)) for seed in range(16)]
    rates: dict[int, float] = {}
    print(f"{SLICE.value} at {dry_run.USED:.0%} of {peak / 1e12:,.0f} TFLOP/s; {CORES.value} cores; ", end="")
    print(f"{HANDED.value:g} us of the process that trains, which so takes at most {1e6 / HANDED.value:,.0f} images/s\n")
    table(
        "recipe", "canvas", "GFLOP an image", "images/s needed", "GB/s to devices", "a core", "cores needed", "cores", "process"
    )
    table(*["---"] * 9)
    for recipe in SHOWN.value:
        config = load_config(recipe)
        flops = dry_run.step_flops(config, remat="none") / config.data.batch_size
        needed, canvas = dry_run.USED * peak / flops, config.data.canvas
        if canvas not in rates:
            rates[canvas] = CORE.value or max(speed(files, canvas) for _ in range(5))
        rate, bytes_a_second = rates[canvas], needed * 3 * canvas**2
        times = [each / needed for each in (CORES.value * rate, 1e6 / HANDED.value)]
        verdicts = [f"{n:.1f} x" if n >= GOAL else f"**{n:.1f} x**" for n in times]
        figures = f"{flops / 1e9:.1f}", f"{needed:,.0f}", f"{bytes_a_second / 1e9:.1f}", f"{rate:,.0f}"
        table(recipe, str(canvas), *figures, *verdicts, f"{math.ceil(GOAL * needed / rate)}")


def table(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def speed(files: list[bytes], canvas: int) -> float:
    """Files decoded in a second of the CPU."""
    start = time.process_time()
    for file in files:
        decode(file, canvas)
    return len(files) / (time.process_time() - start)


def steps() -> None:
    config = CONFIG.value
    resolve_target(config)
    size, canvas = config.data.batch_size, config.data.canvas
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh()), Stop() as stop:
        for number in range(64):
            Path(folder, f"{number}.jpg").write_bytes(jpeg(natural_noise(375, 500, number)))
        method = make_method(config)
        ready = noise(method, config)
        step = Step(method, config, ready)
        decoded = pipeline.train_batches(
            open_source("folder", folder),
            seed=0,
            batch_size=size,
            canvas=canvas,
            workers=WORKERS,
            masks=method.views.host_masks(0),
            ahead=stop.ahead,
        )
        seconds: dict[str, list[tuple[float, float]]] = {"ready": [], "decoded": []}
        with contextlib.closing(decoded):
            for each in range(ROUNDS.value + 1):
                for _ in range(processes.AHEAD + 2):  # that were decoded before
                    next(decoded)
                found = {"decoded": timed(step, map(sharding.global_batch, decoded))}
                send(signal.SIGSTOP)
                found["ready"] = timed(step, (ready for _ in range(IN_A_ROUND + 1)))
                send(signal.SIGCONT)
                for name, measured in found.items():
                    seconds[name] += [measured] * (each > 0)
    print(f"{config.method}, batch {size}, canvas {canvas}, {WORKERS} processes; {ROUNDS.value} rounds of {IN_A_ROUND} steps")
    clock, cpu = (
        {name: statistics.median(pair[i] for pair in pairs) / IN_A_ROUND for name, pairs in seconds.items()} for i in (0, 1)
    )
    for name in seconds:
        print(
            f"{name:<8} {clock[name] * 1e3:8.1f} ms a step, {size / clock[name]:7.1f} images/s; CPU {cpu[name] * 1e3:8.1f} ms"
        )
    print(f"share of the speed on ready batches: {clock['ready'] / clock['decoded']:.1%}; of the CPU time of the process that")
    print(f"trains, which is what remains where others decode on cores of their own: {cpu['ready'] / cpu['decoded']:.1%}")


def timed(step: Step, batches: Iterable[Any]) -> tuple[float, float]:
    """Seconds of the clock and of this process's CPU for IN_A_ROUND steps, after one that does not count."""
    start = clock = 0.0
    for number, batch in enumerate(batches):
        step.batch = batch
        jax.block_until_ready(step())
        if number == 0:
            clock, start = time.perf_counter(), time.process_time()
        if number == IN_A_ROUND:
            break
    return time.perf_counter() - clock, time.process_time() - start


def send(number: signal.Signals) -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, number)


if __name__ == "__main__":
    app.run(main)
