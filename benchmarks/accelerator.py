"""What an accelerator computes and how fast, within eight minutes: one command on a bare machine (accelerator.sh).

    python benchmarks/accelerator.py [--parts=device,numbers,...] [--batch=256,256,64] [--out=FOLDER] [--small]

    device          its rate for a matrix product
    numbers         losses and gradients of the three recipes with two blocks, on it and on the CPU
    attention       of the ViTs, which is cuDNN's on GPUs, and the plain one: numbers and time at odd and even lengths
    augmentation    the levels of the views on it and on the CPU
    dino, mae, dinov2   the train step of dino:vits16, mae:vitl16 and dinov2:vitl16: compilation, memory against the plan,
                        speed on batches that are ready and on JPEGs that are decoded

Each part is a process of its own. It has seconds of its own (BUDGET), and those that the parts before it have left over. One
that fails or is too slow ends with a line, and the next begins. What is known is appended, line by line, to
FOLDER/DATE-accelerator.md.

Shares of the peak count floating-point operations in two ways. Nominal: as if nothing was computed again, and as if stochastic
depth computed all rows. Executed: those of the program. XLA counts both before it optimizes, with the blocks unrolled.

--small takes the recipes for CIFAR-10 and few steps, to try this out on a CPU.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from step import Step, interleaved, noise, peak_memory, variant

from mim_jax import dry_run, load_config, make_method, sharding
from mim_jax.checkpoint import devices, versions
from mim_jax.data import pipeline
from mim_jax.data.sources import open_source
from mim_jax.models.layers import attention
from mim_jax.state import first_state
from mim_jax.stopping import Stop
from mim_jax.topology import GIB, H100

RECIPES = {"dino": "dino:vits16", "mae": "mae:vitl16", "dinov2": "dinov2:vitl16"}
GOALS = {"dino": 0.24, "mae": 0.4, "dinov2": 0.4}  # nominal share of the peak
BUDGET = {"device": 30, "numbers": 80, "attention": 50, "augmentation": 40, "dino": 80, "mae": 80, "dinov2": 100}  # seconds
SMALL_BUDGET = 900  # seconds of each part

PARTS = flags.DEFINE_list("parts", list(BUDGET), "What is measured, in this order.")
BATCH = flags.DEFINE_list("batch", ["256", "256", "64"], "Images for each device: of dino, mae and dinov2.")
REMAT = flags.DEFINE_string("remat", "auto", "model.remat of the steps.")
SECONDS = flags.DEFINE_float("seconds", 8, "How long each step is timed.")
OUT = flags.DEFINE_string("out", str(Path(__file__).with_name("results")), "Folder of the results.")
SMALL = flags.DEFINE_bool("small", False, "The recipes for CIFAR-10 and few steps.")
PART = flags.DEFINE_string("part", "", "Of a process that was started for a part.")
FOLDER = flags.DEFINE_string("folder", "", "Of all parts: pictures, compiled programs and the device's rate.")


def main(_: list[str]) -> None:
    if PART.value == "flops":
        count_flops()
    elif PART.value:
        part = {"device": device, "numbers": numbers, "attention": attentions, "augmentation": augmentation}
        part.get(PART.value, recipe_step)()
    else:
        everything()


def everything() -> None:
    """Runs the parts, each in a process, and writes what they print."""
    if unknown := set(PARTS.value) - set(BUDGET):
        sys.exit(f"error: --parts names {', '.join(sorted(unknown))}, but there are {', '.join(BUDGET)}")
    Path(OUT.value).mkdir(parents=True, exist_ok=True)
    file = Path(OUT.value) / f"{datetime.date.today()}-accelerator.md"
    with file.open("a") as results, tempfile.TemporaryDirectory() as folder:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=results, flush=True)

        pictures = [Path(__file__).with_name("pictures.py"), f"{folder}/pictures", "64" if SMALL.value else "512"]
        made = subprocess.Popen([sys.executable, *pictures])
        command = shlex.join(["python", "benchmarks/accelerator.py", *sys.argv[1:]])
        write(f"# {datetime.datetime.now():%Y-%m-%d %H:%M}: `{command}`\n")
        start = until = time.monotonic()
        for part in PARTS.value:
            until += SMALL_BUDGET if SMALL.value else BUDGET[part]
            if part not in ("device", "numbers", "attention"):
                made.wait()
            write(f"## {part}\n")
            write(run_part(part, folder, until - time.monotonic(), write))
        write(f"{time.monotonic() - start:.0f} s in all\n")
    print(f"results: {file}")


def run_part(part: str, folder: str, seconds: float, write: Callable[[str], None]) -> str:
    """Writes what a part prints; returns how it ended."""
    begun, log = time.monotonic(), Path(folder, f"{part}.log")
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}", f"--folder={folder}"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))  # its workers, too
    timer.start()
    try:
        for line in process.stdout:
            write(line.rstrip("\n"))
        process.wait()
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    took = time.monotonic() - begun
    if process.returncode == 0:
        return f"\n{took:.0f} s\n"
    if took >= seconds:
        return f"\n**{part} was ended after {took:.0f} s: its time was over**\n"
    text = log.read_text()
    print(text[-3000:], file=sys.stderr)
    told = re.findall(r"^[\w.]+(?:Error|Exception|Exit|Interrupt)\b.*", text, re.MULTILINE)
    return f"\n**{part} failed after {took:.0f} s: {told[-1][:500] if told else f'exit code {process.returncode}'}**\n"


def table(*columns: str) -> None:
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def recipe(name: str) -> Any:
    """The config of a recipe, at our batch."""
    config = load_config(f"{name}:demo" if SMALL.value else RECIPES[name]).unlock()
    config.data.batch_size = 64 if SMALL.value else int(BATCH.value[list(RECIPES).index(name)]) * jax.device_count()
    config.model.remat = REMAT.value
    return grouped(config)


def grouped(config: Any) -> Any:
    """With groups that the batch of each device can be divided into."""
    if "group_size" in config.get("mask", {}):
        each = config.data.batch_size // jax.device_count()
        config.mask.group_size = math.gcd(each, config.mask.group_size)
    return config


def mesh_of(platform: str) -> jax.sharding.Mesh:
    """One device: the accelerator, or the CPU."""
    return sharding.make_mesh(1, 1, (jax.local_devices(backend="cpu") if platform == "cpu" else jax.local_devices())[:1])


def difference(ours: Any, exact: Any) -> float:
    """The norm of the difference of two trees over that of the second."""
    pairs = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in zip(jax.tree.leaves(ours), jax.tree.leaves(exact))]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))


def device() -> None:
    """What it is, and its rate for a product of two square matrices in bfloat16."""
    found = jax.devices()[0]
    version = getattr(found.client, "platform_version", "").replace("\n", ", ")
    limit = (found.memory_stats() or {}).get("bytes_limit")
    print(f"{devices()}, {os.cpu_count()} CPU cores, {version}; " + ", ".join(f"{k} {v}" for k, v in versions().items()) + "  ")
    print(f"memory that JAX may use: {f'{limit / GIB:.2f} GiB' if limit else 'not told'}  ")
    print(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', 'none')}  ", flush=True)
    side = 1024 if SMALL.value else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    seconds = np.median(interleaved({"product": lambda: product(square)}, 3 if SMALL.value else 50)["product"])
    Path(FOLDER.value, "rate").write_text(str(rate := 2 * side**3 / float(seconds)))
    print(f"product of two bfloat16 matrices of {side} x {side}: {rate / 1e12:,.1f} TFLOP/s")


def numbers() -> None:
    """Losses and gradients, against float32 on the CPU."""
    print("Losses and gradients (norm of the difference over the norm) against the CPU's in float32; 8 images, 2 blocks.")
    print("In float32 an accelerator's products may have fewer bits, unless `highest` is asked for.\n")
    ways = {
        "cpu, float32": ("cpu", "float32", "highest"),
        "cpu, bfloat16": ("cpu", "bfloat16", None),
        "device, float32, highest": ("device", "float32", "highest"),
        "device, float32": ("device", "float32", None),
        "device, bfloat16": ("device", "bfloat16", None),
    }
    table("recipe", "where", "loss", "difference", "gradient's")
    for name in RECIPES:
        config = two_blocks(name)
        with jax.set_mesh(mesh_of("cpu")):
            method = make_method(config)
            views = jax.jit(method.views.make)(noise(method, config), jax.random.key(1))
            start = jax.device_get((first_state(method, config), views))
        with ThreadPoolExecutor() as pool:  # they compile side by side
            made = dict(zip(ways, pool.map(lambda way, c=config, s=start: loss_and_gradient(c, *s, *way), ways.values())))
        exact, gradient = made["cpu, float32"]
        for where, (loss, gradients) in made.items():
            row(name, where, f"{loss:.7g}", f"{abs(loss - exact) / abs(exact):.1e}", f"{difference(gradients, gradient):.1e}")


def two_blocks(name: str) -> Any:
    config = recipe(name)
    config.data.batch_size = 8
    config.model.update(depth=2, remat="none")
    if "decoder" in config:
        config.decoder.depth = 1
    for head in ("head", "ibot_head"):
        if head in config:
            config[head].out_dim = 1024
    if name == "dinov2":
        # with 1e-5, the class tokens of an untrained network are alike, and the logarithm of their distances is of rounding
        config.mask.group_size, config.model.layerscale = 8, 1.0
    return config


def loss_and_gradient(config, state, views, platform: str, dtype: str, precision: str | None) -> tuple[float, Any]:
    config = config.copy_and_resolve_references()
    config.model.dtype = dtype
    mesh = mesh_of(platform)
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        method = make_method(config)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state, views = jax.device_put((state, views), place)

        def loss(params):
            return method.loss(params, state.teacher, {}, state.extra, views, jax.random.key(2), state.step)[0]

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(state.params))


def attentions() -> None:
    """The attention of `layers.py` and the plain one."""
    print(
        "Differences from float32 (norm over norm): of the output, and of the gradient that differs most; the time of both.\n"
    )
    table("tokens", "bias", "output", "plain's", "gradient", "plain's", "ms", "plain's ms")
    heads, images = (2, 2) if SMALL.value else (16, 128)
    for length, has_bias in ((37, False), (50, False), (196, False), (197, False), (257, False), (196, True), (197, True)):
        try:
            row(str(length), "yes" if has_bias else "no", *compare_attention(images, length, heads, has_bias))
        except Exception as error:  # of one length: the others are measured
            row(str(length), "yes" if has_bias else "no", f"{type(error).__name__}: {str(error).splitlines()[0]}", *[""] * 5)


def compare_attention(images: int, length: int, heads: int, has_bias: bool) -> list[str]:
    keys, shape = jax.random.split(jax.random.key(length), 5), (images, length, heads, 64)
    q, k, v, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    bias = jax.random.normal(keys[4], (1, heads, length, length), jnp.bfloat16) if has_bias else None

    def plain(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias, implementation="xla")

    def both(function: Callable, precision: str | None = None) -> Callable:
        @jax.jit
        def run(q, k, v, bias, dy):
            with jax.default_matmul_precision(precision):
                out, gradient = jax.vjp(function, q, k, v, bias)
                return out, gradient(dy)

        return run

    def cast(x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)

    args = (q, k, v, bias, dy)
    with jax.set_mesh(mesh_of("device")):
        exact = jax.device_get(both(plain, "highest")(*cast(args)))
        programs = {"ours": both(attention), "plain": both(plain)}
        errors = []
        for program in programs.values():
            out, gradients = jax.device_get(program(*args))
            worst = max(difference(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact[1])))
            errors.append((difference(out, exact[0]), worst))
        times = interleaved({name: lambda f=f: f(*args) for name, f in programs.items()}, 2 if SMALL.value else 20)
    cells = [f"{error:.1e}" for pair in zip(*errors) for error in pair]
    return cells + [f"{np.median(seconds) * 1e3:.3f}" for seconds in times.values()]


def augmentation() -> None:
    """Levels, from the device and from the CPU."""
    print("Levels of 0 to 255 of the crops of pictures: how many differ from the CPU's, and by how much at most.\n")
    table("recipe", "views", "differ", "at most", "masks")
    source = open_source("folder", f"{FOLDER.value}/pictures")
    for name in RECIPES:
        config, views = two_blocks(name), {}
        method = make_method(config)
        batch = pipeline.load(source, range(8), config.data.canvas)
        batch = {key: batch[key] for key in ("image", "size", "label", "index")}
        batch |= method.views.example_masks(8) if method.views.masks.on_host else {}
        for platform in ("cpu", "device"):
            with jax.set_mesh(mesh_of(platform)):
                made = jax.jit(method.views.make)(sharding.global_batch(batch), jax.random.key(0))
                views[platform] = jax.device_get(made)
        same = all(np.array_equal(value, views["cpu"][key]) for key, value in views["device"].items() if "mask" in key)
        for group in method.views.crops:
            ours, exact = (np.asarray(method.views.denormalize(views[where][group.name]), int) for where in ("device", "cpu"))
            gap = np.abs(ours - exact)
            row(name, group.name, f"{np.mean(gap > 0):.1e}", str(gap.max()), "the same" if same else "**others**")


def recipe_step() -> None:
    """The whole step of a recipe. Each line is printed as soon as it is known."""
    name, config = PART.value, recipe(PART.value)
    counted = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--part=flops", f"--parts={name}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    jax.config.update("jax_compilation_cache_dir", f"{FOLDER.value}/compiled-{name}")
    seconds, batch_size = SECONDS.value, config.data.batch_size
    print(f"{config.recipe}, batch {batch_size}, {config.model.dtype}\n")
    table("", "", "goal")
    with jax.set_mesh(sharding.make_mesh()), Stop() as stop:
        start = time.perf_counter()
        chosen = dry_run.resolve_remat(config)[0] or f"model.remat is {config.model.remat}, as it was asked for"
        row("memory", chosen, "")
        planned = dry_run.compile_step(config).peak
        row("choice of model.remat, compilation", f"{time.perf_counter() - start:.1f} s", "60 s for one program")

        method = make_method(config)
        ready = noise(method, config)
        step = Step(method, config, ready)
        row("compilation from the cache", f"{step.compile_s:.1f} s", "5 s")
        each, number = timed(step, itertools.repeat(ready), seconds, warm_up=3)
        rate = batch_size / each
        row("step, batches ready", f"**{each * 1e3:,.1f} ms, {rate:,.1f} images/s**, mean of {number}", "")
        used = peak_memory()
        if jax.devices()[0].memory_stats():
            row(
                "memory at the peak",
                f"{used / GIB:.2f} GiB, planned {planned / GIB:.2f}: **{used / planned:.2f} x**",
                "0.9 to 1.1 x",
            )
        else:
            row("memory at the peak", f"{used / GIB:.2f} GiB, of this process; planned for the step {planned / GIB:.2f}", "")

        nominal, executed = flops_an_image(counted, config)
        row("FLOPs an image", f"nominal {nominal / 1e9:,.1f} G, executed {executed / 1e9:,.1f} G", "")
        for what, peak in peaks().items():
            shares = [f"{kind} {rate * flops / peak:.1%}" for kind, flops in (("nominal", nominal), ("executed", executed))]
            row(f"share of {what}", f"**{shares[0]}**, {shares[1]}", f"nominal {GOALS[name]:.0%}" if "peak" in what else "")

        workers = min(16, os.cpu_count() or 1)
        host = pipeline.train_batches(
            open_source("folder", f"{FOLDER.value}/pictures"),
            seed=0,
            batch_size=batch_size,
            canvas=config.data.canvas,
            workers=workers,
            masks=method.views.host_masks(0),
            ahead=stop.ahead,
        )
        times = []
        for _ in range(2 * workers + (4 if SMALL.value else 24)):  # the first ones are made at once
            next(host)
            times.append(time.perf_counter())
        alone = batch_size * (len(times) - 1 - 2 * workers) / (times[-1] - times[2 * workers])
        told = f"{alone:,.1f} images/s, {workers} processes, canvas {config.data.canvas}"
        row("decoding alone", told, f"{2 * rate:,.0f}, twice the step's")
        each, number = timed(step, map(sharding.global_batch, host), seconds, warm_up=2 * workers)
        share = batch_size / each / rate
        row("step, JPEGs decoded", f"**{each * 1e3:,.1f} ms, {batch_size / each:,.1f} images/s**, mean of {number}", "")
        row("share of the speed on ready batches", f"**{share:.1%}**", "95 %")
        host.close()


def timed(step: Step, batches: Iterator[Any], seconds: float, warm_up: int) -> tuple[float, int]:
    """(seconds a step, steps that were timed). As in training, each step is waited for while the next one runs."""
    last, ends = None, []
    for batch in batches:
        step.batch = batch
        loss = step()
        jax.block_until_ready(last)
        last = loss
        ends.append(time.perf_counter())
        if len(ends) > warm_up + 2 and ends[-1] - ends[warm_up] > seconds:
            break
    if not np.isfinite(float(loss)):
        raise FloatingPointError(f"the loss is {loss}")
    number = len(ends) - 1 - warm_up
    return (ends[-1] - ends[warm_up]) / number, number


def count_flops() -> None:
    """Prints those of an image: nominal ones, and executed ones without `model.remat`. In a process beside the others: it takes
    a while."""
    config = recipe(PARTS.value[0])
    nominal = executed = dry_run.step_flops(config, remat="none")
    if config.method == "dinov2":
        nominal = dry_run.step_flops(config, variant(drop_path_group=0), remat="none")
    print(json.dumps([nominal / config.data.batch_size, executed / config.data.batch_size]))


def flops_an_image(counted: subprocess.Popen, config: Any) -> tuple[float, float]:
    nominal, executed = json.loads(counted.communicate()[0])
    if config.model.remat != "none":
        executed = dry_run.step_flops(config) / config.data.batch_size
    return nominal, executed


def peaks() -> dict[str, float]:
    """FLOP/s of all devices: what is published, and what `device` measured."""
    found, file = {}, Path(FOLDER.value, "rate")
    if re.search("H[12]00", jax.devices()[0].device_kind):
        found[f"the peak ({H100.flops / 1e12:.0f} TFLOP/s)"] = H100.flops * jax.device_count()
    if file.is_file():
        rate = float(file.read_text())
        found[f"a matrix product's rate ({rate / 1e12:,.1f} TFLOP/s)"] = rate * jax.device_count()
    return found


if __name__ == "__main__":
    app.run(main)
