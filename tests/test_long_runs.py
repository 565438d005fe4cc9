"""What a long run must not do: grow with its saves, or lose sight of bad images, here or on another host."""

import gc
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import get_config

from mim_jax import bad_images, checkpoint, sharding
from mim_jax.bad_images import BadImages
from mim_jax.data import pipeline
from mim_jax.journal import Journal


@pytest.mark.slow
def test_saves_do_not_add_up_in_memory(tmp_path):
    state = {str(number): jnp.zeros(1) for number in range(50)}
    with checkpoint.Checkpoints(tmp_path, get_config("mae")) as checkpoints:

        def blocks(steps: range) -> int:
            for step in steps:
                checkpoints.save(step, state)
                checkpoints.wait()
            gc.collect()
            return sys.getallocatedblocks()

        before = blocks(range(1, 4))
        assert blocks(range(4, 8)) - before < 4 * 250  # with the leak of TensorStore 500 a save


def test_a_bad_image_is_named_once_and_counted_each_time(tmp_path):
    file = io.StringIO()
    with Journal(tmp_path, 10, file=file) as log:
        bad = BadImages(log, before=5)
        for name in ("a.png", "b.png", "a.png"):
            bad.count(0, name)
        for name in ("a.png", "c.png", "c.png"):  # of an evaluation
            bad.name(0, name)
    assert bad.share(bad.own) == bad.total(bad.own) == 5 + 3
    assert file.getvalue() == "".join(f"bad image, replaced by another one: {name}.png\n" for name in "abc")


def test_names_of_bad_images_are_bounded(tmp_path, caplog):
    file, many = io.StringIO(), pipeline.NAMED + 50
    with Journal(tmp_path, 10, file=file) as log:
        bad, logged = BadImages(log), pipeline.log_once()
        for number in range(2 * many):
            bad.count(0, f"{number % many}.png")
            logged(number % many, f"{number % many}.png")
    assert bad.total(bad.own) == 2 * many
    told = file.getvalue().splitlines()
    assert len(told) == pipeline.NAMED + 1 and "counted but not named" in told[-1]
    assert len(caplog.messages) == pipeline.NAMED


@pytest.mark.parametrize("mesh", [(4, 2), (1, 8)])
def test_the_first_process_names_and_counts_the_bad_images_of_all(tmp_path, monkeypatch, mesh):
    """Two processes in one: the rows that the other one sends are kept, and put before those of the first one."""
    file, sent, inbox = io.StringIO(), [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)

    def together(batch):
        sent.append(batch)
        other = inbox.pop() if inbox else {key: np.zeros_like(value) for key, value in batch.items()}
        return sharding.global_batch({key: np.concatenate([other[key], value]) for key, value in batch.items()})

    monkeypatch.setattr(bad_images, "global_batch", together)
    names = ["a/1.png", "b/caf\u00e9.png", "c/" + "long" * 100 + "/2.png", *(f"{number:0250}.png" for number in range(8))]
    with jax.set_mesh(sharding.make_mesh(*mesh)), Journal(tmp_path, 10, file=file) as log:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: 1)
            other = BadImages(log, before=7)
            for name in names:
                other.count(0, name)
            for _ in range(4):
                other.share(other.own)
        first = BadImages(log, before=7)
        first.count(0, "a/1.png")
        exchanged, sent[:] = sent[:], []
        for batch in exchanged:
            inbox.append(batch)
            total = first.share(first.own)
        first.total(first.own)  # prints what the last exchange brought
    assert int(total) == 7 + 1 + len(names)
    told = [line.removeprefix("bad image, replaced by another one: ") for line in file.getvalue().splitlines()]
    long = told.pop(2)
    assert long.startswith("...") and long.endswith("longlong/2.png") and len(long) == bad_images.LONGEST
    assert told == ["a/1.png", "b/caf\u00e9.png", *(f"{number:0250}.png" for number in range(8))]
