"""The speed of the train step, where its time goes, and how near it is to this machine's matrix products.

    python benchmarks/step.py --config=configs/dino.py:demo [--config.data.batch_size=64 ...] [--rounds=20]

All programs are timed in turn in each round, on a batch of noise; medians are printed. The machine's own rate is that of a
square matrix product in the step's dtype, timed in the same rounds. Nothing is evaluated, logged or read from disk.

What a method saves is shown against the plain form of the same step, in time and in FLOPs. For MAE: with mask tokens in the
encoder (the paper's table 1c), which then sees all patches. For DINOv2: with heads on all patches, of which the masked ones
are taken, and with stochastic depth that computes all rows and zeroes some.
"""

import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mim_jax import dry_run, make_method, make_train_step, sharding
from mim_jax.config import resolve_target
from mim_jax.learned import abstract_target
from mim_jax.methods.dinov2 import Dinov2
from mim_jax.methods.mae import Mae
from mim_jax.state import first_state

CONFIG = config_flags.DEFINE_config_file("config", "configs/dino.py:demo", "Config file, with a variant after a colon.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "How often each program is timed.")


def main(_: list[str]) -> None:
    config = CONFIG.value
    resolve_target(config)
    with jax.set_mesh(sharding.make_mesh(config.mesh.data, config.mesh.fsdp)):
        measure(config)


def measure(config) -> None:
    method, key = make_method(config), jax.random.key(0)
    batch = noise(method, config)
    step = Step(method, config, batch)

    def loss(params, state, views):
        return method.loss(params, state.teacher, step.target, state.extra, views, key, state.step)

    make_views = jax.jit(lambda batch: method.mix(method.views.make(batch, key), key))
    forward = jax.jit(lambda state, views: loss(state.params, state, views))
    gradient = jax.jit(lambda state, views: jax.value_and_grad(loss, has_aux=True)(state.params, state, views))
    views = make_views(batch)
    side, dtype = (8192, "bfloat16") if jax.default_backend() != "cpu" else (2048, "float32")
    square = jax.random.normal(key, (side, side), dtype)
    product = jax.jit(lambda a: a @ a)

    programs = {
        "step": step,
        "augmentation": lambda: make_views(batch),
        "forward": lambda: forward(step.state, views),
        "gradient": lambda: gradient(step.state, views),
        "product": lambda: product(square),
    }
    plain = PLAIN.get(config.method, {})
    programs |= {name: Step(make(config), config, batch) for name, make in plain.items()}
    times = {name: statistics.median(seconds) for name, seconds in interleaved(programs, ROUNDS.value).items()}
    images, flops = config.data.batch_size, dry_run.step_flops(config)
    rate, machine = flops / times["step"], 2 * side**3 / times["product"]
    parts = {
        "augmentation": times["augmentation"],
        "forward": times["forward"],
        "backward": times["gradient"] - times["forward"],
        "optimizer, EMA": times["step"] - times["augmentation"] - times["gradient"],
    }
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}")
    print(f"step         {times['step'] * 1e3:9.1f} ms   {images / times['step']:,.0f} images/s, batch {images}")
    share = f"{rate / machine:.0%} of this machine's {machine / 1e9:,.1f} ({dtype} product of {side} x {side})"
    print(f"achieved     {rate / 1e9:9.1f} GFLOP/s   {share}")
    print(f"compilation  {step.compile_s:9.1f} s")
    print(f"memory       {peak_memory() / 2**20:9,.0f} MiB at the peak")
    print("where the time goes (each part compiled alone; the last is what remains):")
    for name, seconds in parts.items():
        print(f"  {name:<15} {seconds * 1e3:9.1f} ms   {seconds / times['step']:.0%}")
    for name, make in plain.items():
        more, seconds = dry_run.step_flops(config, make) / flops, times[name]
        print(f"{name:<32} {seconds * 1e3:9.1f} ms: {seconds / times['step']:.2f} x the time, {more:.2f} x the FLOPs")


class Step:
    """The train step, on one batch, from the state where it stopped; a frozen target has random weights."""

    def __init__(self, method, config, batch):
        self.batch, self.state = batch, first_state(method, config)
        places = jax.tree.map(lambda s: s.sharding, abstract_target(method, config))
        self.target = jax.jit(method.target.init_parts, out_shardings=places)(jax.random.key(0)) if method.target else {}
        start = time.perf_counter()
        self.compiled = make_train_step(method, config).lower(self.state, self.target, batch).compile()
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> jax.Array:
        self.state, metrics = self.compiled(self.state, self.target, self.batch)
        return metrics["train/loss"]


class MaskTokensInEncoder(Mae):
    def predict(self, params, views, key=None):
        out = self.backbone.apply({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
        return self.decoder.apply({"params": params["decoder"]}, **out, mask=np.zeros(views["mask"].shape, bool))


class HeadsOnAllPatches(Dinov2):
    def heads(self, params, cls, patch, places):
        in_a_group = patch.size // patch.shape[-1] // len(places)
        all_places = np.broadcast_to(np.arange(in_a_group), (len(places), in_a_group))
        cls, logits = super().heads(params, cls, patch, all_places)
        return cls, jax.numpy.take_along_axis(logits, places[..., None], axis=1)


def variant(kind: type | None = None, **backbone: Any) -> Callable:
    """config -> its method as a `kind`, with other settings of its backbone."""

    def make(config):
        method = make_method(config)
        fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        return (kind or type(method))(**fields | {"backbone": method.backbone.clone(**backbone)})

    return make


PLAIN = {
    "mae": {"with mask tokens in the encoder": variant(MaskTokensInEncoder, mask_token=True)},
    "dinov2": {"with heads on all patches": variant(HeadsOnAllPatches), "with all rows computed": variant(drop_path_group=0)},
}


def noise(method, config) -> dict[str, jax.Array]:
    """A batch of noise, laid out as the pipeline's."""
    rng, size, canvas = np.random.default_rng(0), config.data.batch_size, config.data.canvas
    batch = {name: np.zeros(s.shape, s.dtype) for name, s in method.views.batch_shapes(size, canvas).items()}
    batch |= {"image": rng.integers(0, 256, batch["image"].shape, np.uint8), "index": np.arange(size, dtype=np.int32)}
    batch["size"] += canvas
    return sharding.global_batch(batch | (method.views.example_masks(size) if method.views.masks.on_host else {}))


def interleaved(programs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round. In a round all programs run in turn; two rounds come first and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory() -> int:
    """Bytes: the device's own figure where it has one, else the process's largest resident set."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    app.run(main)
