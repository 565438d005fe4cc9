"""One of the two processes of a run: `python tests/two_processes.py PORT INDEX` prints what it saw as JSON."""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import mim_jax
from mim_jax import sharding
from mim_jax.data import pipeline
from mim_jax.data.sources import ArraySource

STEPS, BATCH, MESH = 5, 16, (2, 2)


def train() -> dict[str, list]:
    """Five steps through pipeline and step, on two processes of two devices or one of four."""
    config = mim_jax.load_config(str(Path(__file__).with_name("tiny.py")))
    config.data.update(num_examples=48, batch_size=BATCH)
    config.model.depth = 1
    config.head.nlayers = 1
    config.crops.local_crops_number = 0
    config.mesh.update(data=MESH[0], fsdp=MESH[1])
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
    batches = pipeline.train_batches(
        ArraySource(images, np.zeros(48, int), num_classes=1),
        seed=0,
        batch_size=BATCH,
        canvas=16,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    losses, rows = [], []
    with jax.set_mesh(sharding.make_mesh(*MESH, jax.devices()[:4])):
        method = mim_jax.make_method(config)
        state, frozen = mim_jax.init_state(method, config)
        train_step = mim_jax.make_train_step(method, config)
        for _ in range(STEPS):
            batch = next(batches)
            rows.append(batch["index"].tolist())
            state, metrics = train_step(state, frozen, sharding.global_batch(batch))
            losses.append(float(metrics["train/loss"]))
    return {"losses": losses, "rows": rows}


def canary() -> None:
    """Gloo has given wrong sums before (jax #40830); then no later figure would mean anything."""
    with jax.set_mesh(sharding.make_mesh(*MESH)):
        local = np.arange(8, dtype=np.float32) + 8 * jax.process_index()
        whole = sharding.global_batch({"x": local})["x"]
        replicated = jax.sharding.PartitionSpec()
        total, turned = jax.jit(lambda x: (x.sum(), x[::-1]), out_shardings=replicated)(whole)
    assert total == 120 and np.array_equal(turned, np.arange(16)[::-1]), "gloo's collectives are wrong on this machine"


def main(port: int, index: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=60)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
    canary()
    print(json.dumps(train()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
