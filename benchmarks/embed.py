"""Images a second of `mim_jax.embed`, from JPEG files to a finished .npz, against the network alone on the same images.

    python benchmarks/embed.py [--dim=384 --depth=12 --heads=6 --patch_size=16 --size=224 --images=256 --rounds=5]

* alone: the jitted network on batches that lie on the devices, as crops of the right size; only "cls" is fetched, at the end;
* embed: reads and decodes the files, crops, encodes, writes the parts and joins them; with its start, in which it looks at 64
  of the images and traces the shapes;
* embed, later: without start and end, by the figure that it prints; needs two batches or more.

They take turns in each round, with the same batches; the first round, which compiles, does not count. Weights are random. On a
CPU the share is also that of the time on its cores, which other work on the machine hardly changes.
"""

import contextlib
import io
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from pictures import jpeg, natural_noise

from mim_jax import sharding
from mim_jax.data.sources import open_source
from mim_jax.embed import embed
from mim_jax.methods.base import Encoder
from mim_jax.models.vit import ViT
from mim_jax.pretrained import Model, load

RUN = flags.DEFINE_string("run", "", "A workdir, in place of random weights.")
DIM = flags.DEFINE_integer("dim", 384, "Width of the network.")
DEPTH = flags.DEFINE_integer("depth", 12, "Blocks.")
HEADS = flags.DEFINE_integer("heads", 6, "Heads.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", 16, "Side of a patch, in pixels.")
SIZE = flags.DEFINE_integer("size", 224, "Side that the network sees, in pixels.")
IMAGES = flags.DEFINE_integer("images", 256, "Pictures, all of which are used in each round.")
PICTURE = flags.DEFINE_list("picture", ["375", "500"], "Height and width of the pictures.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time; by default as embed chooses.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each is timed.")


def random_model() -> Model:
    network = Encoder(
        ViT(PATCH_SIZE.value, SIZE.value, DIM.value, DEPTH.value, HEADS.value, unroll=DEPTH.value),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    return Model(network, jax.jit(network.init_parts)(jax.random.key(0)), SIZE.value, "random weights")


def main(_: list[str]) -> None:
    model, count = load(RUN.value) if RUN.value else random_model(), IMAGES.value
    batch_size = BATCH_SIZE.value or model.batch_size(count, SIZE.value)
    alone = jax.jit(lambda parts, images: model.network.features(parts, images)["cls"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        for seed in range(count):
            (folder / f"{seed:06}.jpg").write_bytes(jpeg(natural_noise(*map(int, PICTURE.value), seed % 64)))
        source = open_source("folder", folder)
        with jax.set_mesh(model.mesh):
            crops = np.random.default_rng(0).random((batch_size, SIZE.value, SIZE.value, 3), np.float32)
            batch = sharding.global_batch({"image": crops})["image"]

        def run_alone() -> None:
            with jax.set_mesh(model.mesh):
                jax.device_get([alone(model.placed, batch) for _ in range(-(-count // batch_size))])

        def run_embed() -> None:
            out = Path(temporary, "features.npz")
            with contextlib.redirect_stderr(io.StringIO()) as told:
                embed(model, source, out, size=SIZE.value, batch_size=batch_size)
            out.unlink()
            if speed := re.search(r"images, ([\d,.]+) images/s", told.getvalue()):
                later.append(count / float(speed[1].replace(",", "")))

        later: list[float] = []
        seconds: dict[str, list[float]] = {"alone": [], "embed": []}
        cpu: dict[str, list[float]] = {"alone": [], "embed": []}
        for number in range(ROUNDS.value + 1):
            for name, program in (("alone", run_alone), ("embed", run_embed)):
                start, start_cpu = time.perf_counter(), time.process_time()
                program()
                seconds[name] += [time.perf_counter() - start] if number else []
                cpu[name] += [time.process_time() - start_cpu] if number else []
    seconds |= {"embed, later": later[1:]} if later else {}
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"{model.description}; {count} pictures, {SIZE.value} px, batches of {batch_size}, {ROUNDS.value} rounds", end="")
    print(f"; load {os.getloadavg()[0]:.1f}")
    for name, values in seconds.items():
        speed, share = (np.percentile(x / np.array(values), (25, 50, 75)) for x in (count, np.array(seconds["alone"])))
        print("{:<13} {:9.1f} images/s [{:.1f}, {:.1f}]".format(name, *speed[[1, 0, 2]]), end="; ")
        print("of alone {:.3f} [{:.3f}, {:.3f}]".format(*share[[1, 0, 2]]))
    if jax.default_backend() == "cpu":
        each, share = 1e3 * np.array(cpu["embed"]) / count, np.array(cpu["alone"]) / np.array(cpu["embed"])
        print(f"on the cores  {np.median(each):9.1f} ms an image", end="; ")
        print(f"of alone {np.median(share):.3f} [{share.min():.3f}, {share.max():.3f}]")


if __name__ == "__main__":
    app.run(main)
