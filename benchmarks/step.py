"""Time of the train step and of its parts, and its FLOP/s as a share of those of a matrix product on the same machine.

    python benchmarks/step.py --config=configs/dino.py:demo [--config.data.batch_size=64 ...] [--rounds=20]

All programs are timed in turn in each round, on noise images; medians are printed. The reference is a square matrix product in
the step's dtype, timed in the same rounds. Nothing is evaluated, logged or read from disk.

For two methods, the step is compared with a simpler one that saves no computation. MAE: with mask tokens in the encoder (table
1c of the paper), so that the encoder processes all patches. DINOv2: with heads on all patches, of which the masked ones are
selected afterwards; and with stochastic depth that computes all rows and zeroes some.
"""

import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mim_jax import dry_run, make_method, make_train_step, sharding
from mim_jax.methods.base import make_views
from mim_jax.methods.dinov2 import Dinov2
from mim_jax.methods.mae import Mae
from mim_jax.state import first_state

CONFIG = config_flags.DEFINE_config_file("config", "configs/dino.py:demo", "Config file, with a variant after a colon.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "How often each program is timed.")


def main(_: list[str]) -> None:
    config = CONFIG.value
    with jax.set_mesh(sharding.make_mesh(config.mesh.data, config.mesh.fsdp)):
        measure(config)


def measure(config) -> None:
    method, key = make_method(config), jax.random.key(0)
    batch = noise(method, config)
    step = Step(method, config, batch)

    def loss(params, state, views):
        return method.loss(params, state.teacher, step.frozen, state.extra, views, key, state.step)

    views_of = jax.jit(lambda batch: make_views(method, batch, key, config.data))
    forward = jax.jit(lambda state, views: loss(state.params, state, views))
    gradient = jax.jit(lambda state, views: jax.value_and_grad(loss, has_aux=True)(state.params, state, views))
    views = views_of(batch)
    side, dtype = (8192, "bfloat16") if jax.default_backend() != "cpu" else (2048, "float32")
    square = jax.random.normal(key, (side, side), dtype)
    product = jax.jit(lambda a: a @ a)

    programs = {
        "step": step,
        "augmentation": lambda: views_of(batch),
        "forward": lambda: forward(step.state, views),
        "gradient": lambda: gradient(step.state, views),
        "product": lambda: product(square),
    }
    programs |= {name: Step(plain(config), config, batch) for name, plain in PLAIN.get(config.method, {}).items()}
    times = interleaved(programs, ROUNDS.value)
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
    for name, plain in PLAIN.get(config.method, {}).items():
        more, seconds = dry_run.step_flops(config, plain) / flops, times[name]
        print(f"{name:<32} {seconds * 1e3:9.1f} ms: {seconds / times['step']:.2f} x the time, {more:.2f} x the FLOPs")


class Step:
    """A compiled train step with its state, always on the same batch."""

    def __init__(self, method, config, batch):
        self.batch = batch
        self.state, self.frozen = first_state(method, config), jax.jit(method.frozen)(jax.random.key(0))
        start = time.perf_counter()
        self.compiled = make_train_step(method, config).lower(self.state, self.frozen, batch).compile()
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> jax.Array:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return metrics["train/loss"]


class MaskTokensInEncoder(Mae):
    def predict(self, params, views, key=None):
        out = self.backbone.apply({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
        return self.decoder.apply({"params": params["decoder"]}, **out, mask=np.zeros(views["mask"].shape, bool))


def with_mask_tokens(config) -> MaskTokensInEncoder:
    method = make_method(config)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return MaskTokensInEncoder(**fields | {"backbone": method.backbone.clone(mask_token=True)})


class HeadsOnAllPatches(Dinov2):
    def heads(self, params, cls, patch, places):
        in_a_group = patch.size // patch.shape[-1] // len(places)
        everywhere = np.broadcast_to(np.arange(in_a_group), (len(places), in_a_group))
        cls, logits = super().heads(params, cls, patch, everywhere)
        return cls, jax.numpy.take_along_axis(logits, places[..., None], axis=1)


def with_heads_on_all_patches(config) -> HeadsOnAllPatches:
    method = make_method(config)
    return HeadsOnAllPatches(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


def with_all_rows(config) -> Dinov2:
    method = make_method(config)
    return dataclasses.replace(method, backbone=method.backbone.clone(drop_path_group=0))


PLAIN = {
    "mae": {"with mask tokens in the encoder": with_mask_tokens},
    "dinov2": {"with heads on all patches": with_heads_on_all_patches, "with all rows computed": with_all_rows},
}


def noise(method, config) -> dict[str, jax.Array]:
    """A batch of noise in the format of the pipeline."""
    rng = np.random.default_rng(0)
    b, canvas = config.data.batch_size, config.data.canvas
    batch = {
        "image": rng.integers(0, 256, (b, canvas, canvas, 3), np.uint8),
        "size": np.full((b, 2), canvas, np.int32),
        "label": np.zeros(b, np.int32),
        "index": np.arange(b, dtype=np.int32),
    }
    if method.mask and method.mask.on_host:
        batch["mask"] = method.mask.examples(b, len(method.crops[0].policies))
    return sharding.global_batch(batch)


def interleaved(programs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each program, run in turn in each round. The first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory() -> int:
    """Peak memory in bytes: of the device if it reports one, else the maximum resident set size of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    app.run(main)
