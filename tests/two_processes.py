"""One of the processes of a run: `python tests/two_processes.py PORT INDEX IMAGES WORKDIR` prints its rows as JSON."""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from PIL import Image

import mim_jax
from mim_jax import sharding, train

MESH, STEPS = (2, 2), 6


def write_images(folder: Path) -> Path:
    """48 images of two classes, for training and for tests."""
    rng = np.random.default_rng(0)
    for i in range(48):
        path = folder / f"class_{i % 2}/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 200, (16, 16, 3), np.uint8) + np.uint8(55 * (i % 2))).save(path)
    return folder


def run(images: str, workdir: str) -> list[list[int]]:
    """A whole run. Returns the rows of the images that this process trained on, step by step."""
    config = mim_jax.load_config(str(Path(__file__).with_name("tiny.py"))).unlock()
    config.total = f"{STEPS} steps"
    config.data.update(dir=images, batch_size=16)
    config.model.depth = 1
    config.head.nlayers = 1
    config.crops.local_crops_number = 0
    config.mesh.update(data=MESH[0], fsdp=MESH[1])
    rows, global_batch = [], sharding.global_batch

    def recorded(batch):
        if "index" in batch and "place" not in batch:  # of the training
            rows.append(batch["index"].tolist())
        return global_batch(batch)

    sharding.global_batch = recorded
    try:
        train.run(config, workdir)
    finally:
        sharding.global_batch = global_batch
    return rows


def canary() -> None:
    """Gloo has given wrong sums before (jax #40830); then no later figure would mean anything."""
    with jax.set_mesh(sharding.make_mesh(*MESH)):
        local = np.arange(8, dtype=np.float32) + 8 * jax.process_index()
        whole = sharding.global_batch({"x": local})["x"]
        replicated = jax.sharding.PartitionSpec()
        total, turned = jax.jit(lambda x: (x.sum(), x[::-1]), out_shardings=replicated)(whole)
    assert total == 120 and np.array_equal(turned, np.arange(16)[::-1]), "gloo's collectives are wrong on this machine"


def interleaved() -> None:
    """On a torus the devices of a mesh are not in the order of the processes; the rows of a batch are in order all the same."""
    devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(MESH)
    with jax.set_mesh(jax.sharding.Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        rows = sharding.share(16)
        assert rows.tolist() == [row + 4 * jax.process_index() for row in (0, 1, 2, 3, 8, 9, 10, 11)]
        whole = sharding.global_batch({"x": rows})["x"]
        together = jax.jit(lambda x: x + 0, out_shardings=jax.sharding.PartitionSpec())(whole)
    assert np.array_equal(together, np.arange(16))


def main(port: str, index: str, images: str, workdir: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index), initialization_timeout=60)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
    canary()
    interleaved()
    print(json.dumps(run(images, workdir)))


if __name__ == "__main__":
    main(*sys.argv[1:])
