"""Our train step against that of the official PyTorch code: equal weights and views, float32, 2 threads, in turns.

    git clone https://github.com/facebookresearch/dino  # or bytedance/ibot, facebookresearch/dinov2, facebookresearch/mae,
                                                        # microsoft/SimMIM, microsoft/unilm (for BEiT)
    python3.11 -m venv official && official/bin/pip install torch torchvision timm attrs
    python benchmarks/against_official.py --method=dino --size=demo --repo=dino --torch=official/bin/python [--rounds=20]

A step is forward, loss, backward, clipping, AdamW and EMA, on views that are ready: nothing is read or augmented. The official
one, made of the clone's modules (official_step.py), runs in a process of its own; with `--compile` there is a third process,
where `torch.compile` has its forward pass and loss. While one works, the others wait. Nothing is timed unless the first losses
agree within 1e-4. Both sides stand in the middle of the recipe's schedules, where nothing is frozen.

Sizes: `demo`, the recipe of that name, batch 64; `vits16`, the recipe for ImageNet-1k with a ViT-S/16 at 224 pixels, batch 8,
and for DINO and iBOT 8 local crops as in DINOv2. Other than in the recipes stochastic depth is 0 on both sides, and

    SimMIM's demo  learns its positions, and its targets are not normalised: the official ViT can do no other
    BEiT's demo    has finished tokens on both sides, drawn at random: the official code has no tokenizer of this kind. In the
                   other size both have DALL-E's, with random weights
    DINOv2's ViT-S has LayerScale 1 at the start: with 1e-5 the class tokens of all images are alike in an untrained network,
                   and KoLeo, the logarithm of their distances, depends on rounding (1.2e-4 of the loss; without it 1e-9)

Runs on Linux alone: peak memory is the largest resident set of a process, with Python, its libraries and the views in it.
"""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mim_jax import convert, make_method, make_train_step, sharding
from mim_jax.config import load_config
from mim_jax.durations import total_steps
from mim_jax.state import first_state

METHOD = flags.DEFINE_enum("method", "dino", ["dino", "ibot", "dinov2", "mae", "simmim", "beit"], "What is compared.")
SIZE = flags.DEFINE_enum("size", "demo", ["demo", "vits16"], "The network, its crops and the batch.")
REPO = flags.DEFINE_string("repo", None, "A clone of the official repository.", required=True)
TORCH = flags.DEFINE_string("torch", None, "A Python that has torch.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 20, "How often each step is timed.")
COMPILE = flags.DEFINE_boolean("compile", False, "Time the official step with torch.compile, too.")
WARM_UP = 3  # steps that are not timed


def main(_: list[str]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # JAX has a thread for each core
    config, load = recipe(), os.getloadavg()[0]
    with jax.set_mesh(sharding.make_mesh(config.mesh.data, config.mesh.fsdp)), tempfile.TemporaryDirectory() as folder:
        method, step = make_method(config), total_steps(config) // 2
        views = noise(method, config)
        if SIZE.value == "demo" and METHOD.value == "beit":
            views["ids"] = np.random.default_rng(1).integers(config.head.vocab_size, size=views["mask"][:, 0].shape)
            method = dataclasses.replace(method, target=FinishedTokens(views["ids"].astype(np.int32)))
        np.savez(f"{folder}/views.npz", **views)
        now = {name: float(schedule(step)) for name, schedule in method.schedules.items()}
        now["upper"] = getattr(method.views.masks, "upper", 0)
        Path(folder, "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort()) | {"now": now}))

        sides: dict[str, Any] = {"official": Official(folder)}
        sides = {"ours": Ours(method, config, views, folder, step), **sides}
        if COMPILE.value:
            sides["compiled"] = Official(folder, "--compile")
        measure(config, sides, load)


def recipe():
    """The recipe of method and size, with what differs from it."""
    named = {"mae": "vitb16", "simmim": "vitb16", "beit": "vitb16"}.get(METHOD.value, "vits16")
    config = load_config(f"{METHOD.value}:{named if SIZE.value == 'vits16' else 'demo'}").unlock()
    config.model.update(drop_path_rate=0.0, dtype="float32")
    if METHOD.value == "beit":
        config.target.network.model.dtype = "float32"  # in bfloat16 some of its tokens are others
    if SIZE.value == "vits16":
        config.data.batch_size = 8
        config.model.update(dim=384, depth=12, heads=6)
        if "local_crops_number" in config.crops:
            config.crops.local_crops_number = 8
        if METHOD.value == "dinov2":
            config.mask.group_size, config.model.layerscale = 8, 1.0
    elif METHOD.value == "simmim":
        config.model.pos, config.loss.norm_target_window = "learned", 0
    return config


def noise(method, config) -> dict[str, np.ndarray]:
    """Finished views, of noise, with masks as the method draws them."""
    rng, size = np.random.default_rng(0), config.data.batch_size
    views = {name: np.zeros(shape.shape, shape.dtype) for name, shape in method.views.shapes(size).items()}
    for group in method.views.crops:
        views[group.name] = rng.standard_normal(views[group.name].shape, np.float32)
    if "target" in views:
        views["target"] = rng.random(views["target"].shape, np.float32)
    return views | method.views.example_masks(size)


@dataclasses.dataclass(frozen=True)
class FinishedTokens:
    """A tokenizer whose work is done."""

    ids: np.ndarray

    def init_parts(self, key):
        return {"ids": jnp.asarray(self.ids)}

    def tokens(self, parts, images):
        return parts["ids"]


class Ours:
    """The train step, from the official side's weights."""

    def __init__(self, method, config, views, folder, step):
        def weights(part, family, like):
            new = convert.from_torch(dict(np.load(f"{folder}/{part}.npz")), family)
            return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), new, {name: like[name] for name in new})

        state = first_state(method, config)
        params = weights("student", config.method, state.params)
        teacher = {part: jax.tree.map(jnp.copy, params[part]) for part in method.teacher_parts}
        self.state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32), params=params, teacher=teacher)
        self.target = method.target.init_parts(jax.random.key(0)) if method.target else {}
        if Path(folder, "tokenizer.npz").exists():
            self.target |= weights("tokenizer", "dalle", self.target)
        self.views = sharding.global_batch({name: x for name, x in views.items() if name != "ids"})
        self.train_step, self.pid, self.idle = make_train_step(method, config), os.getpid(), time.process_time()
        self.versions = f"jax {jax.__version__}, Python {platform.python_version()}"

    def step(self) -> list[float]:
        """[wall seconds, CPU seconds, loss, CPU seconds since the last step]"""
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, metrics = jax.block_until_ready(self.train_step(self.state, self.target, self.views))
        wall, idle, self.idle = time.perf_counter() - wall, cpu - self.idle, time.process_time()
        return [wall, self.idle - cpu, float(metrics["train/loss"]), idle]


class Official:
    """The official step, in a process of its own."""

    def __init__(self, folder, *options):
        self.log = Path(folder, "log" + "".join(options))
        command = [TORCH.value, str(Path(__file__).with_name("official_step.py")), METHOD.value, REPO.value, folder, *options]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True)
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ""}, **pipes)
        self.pid = self.process.pid
        self.versions = "torch {}, Python {}".format(*self.answer())

    def answer(self) -> list[Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", self.log.read_text(), re.MULTILINE)
        raise RuntimeError(errors[-1] if errors else f"the official process stopped: {self.process.wait()}")

    def step(self) -> list[float]:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()


def measure(config, sides: dict[str, Any], load: float) -> None:
    first = {}
    for name in list(sides):
        try:
            first[name] = sides[name].step()[2]
        except RuntimeError as error:
            if name != "compiled":
                raise
            print(f"torch.compile fails here: {error}")
            del sides[name]
    print("first losses: " + ", ".join(f"{name} {loss:.7g}" for name, loss in first.items()))
    if not all(abs(loss - first["ours"]) <= 1e-4 * abs(first["ours"]) for loss in first.values()):
        sys.exit("they differ by more than 1e-4: nothing is timed")

    for _ in range(WARM_UP - 1):
        for side in sides.values():
            side.step()
    start = {name: peak_memory(side.pid) for name, side in sides.items()}
    for side in sides.values():
        Path(f"/proc/{side.pid}/clear_refs").write_text("5")  # the peak is counted anew
    rounds = [{name: side.step() for name, side in sides.items()} for _ in range(ROUNDS.value)]

    batch, side = config.data.batch_size, config.model.img_size
    versions = ", ".join(dict.fromkeys(side.versions for side in sides.values()))
    print(f"{config.recipe}, width {config.model.dim}, {side} pixels, batch {batch}; {versions}")
    print(f"load average at the start {load:.1f}; {ROUNDS.value} rounds, medians")
    memory = {}
    for name, side in sides.items():
        wall, cpu, loss, idle = (list(column) for column in zip(*(each[name] for each in rounds)))
        memory[name], median = peak_memory(side.pid), statistics.median(wall)
        used = (
            f"CPU {statistics.median(cpu) * 1e3:,.0f} ms, {sum(cpu) / sum(wall) / 2:.0%} of 2 cores, waiting {sum(idle):.2f} s"
        )
        peak = f"peak {memory[name]:,.0f} MiB ({start[name]:,.0f} at the start)"
        print(f"{name:<9}{median * 1e3:9,.1f} ms {batch / median:8,.1f} images/s; {used}; {peak}; last loss {loss[-1]:.5g}")
    cells = [f"{METHOD.value}, {SIZE.value}, {batch}"]
    for name in [name for name in sides if name != "ours"]:
        for column, kind in enumerate(("wall", "CPU")):
            cells.append(ratio([each[name][column] / each["ours"][column] for each in rounds]))
            print(f"{name} / ours, {kind} time, round by round: {cells[-1]}")
    cells += [""] * (5 - len(cells)) + [f"{memory['ours'] / memory['official']:.2f}"]
    print("| method, size, batch | official / ours: wall | CPU | compiled / ours: wall | CPU | memory, ours / official |")
    print("| " + " | ".join(cells) + " |")


def ratio(numbers: list[float]) -> str:
    low, _, high = statistics.quantiles(numbers, n=4)
    return f"{statistics.median(numbers):.2f} [{low:.2f}, {high:.2f}]"


def peak_memory(pid: int) -> float:
    """MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


if __name__ == "__main__":
    app.run(main)
