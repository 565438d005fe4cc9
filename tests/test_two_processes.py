"""A run on two processes is the run of one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import two_processes

from mim_jax import journal, train
from mim_jax.lock import locked
from mim_jax.sharding import make_mesh

BAD = (3, 20, 37)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """48 images of two classes, for training and for tests. Three are bad."""
    folder = two_processes.write_images(tmp_path_factory.mktemp("images"))
    for i in BAD:
        (folder / f"class_{i % 2}/{i}.png").write_text("no image")
    return folder


def start(images: Path, workdir: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(two_processes.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    command = [sys.executable, script, str(port)]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([*command, str(i), images, workdir], env=environment, stdout=pipe, stderr=pipe, text=True)
        for i in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What each has written to standard output and standard error."""
    try:
        written = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in written)
        return written
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_run_as_one(images, tmp_path, monkeypatch):
    processes = start(images, tmp_path / "two")
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *mesh: make_mesh(*mesh, jax.devices()[:4]))
    alone = two_processes.run(str(images), str(tmp_path / "one"))
    (first, progress), (second, silence) = finish(processes)

    shares = [json.loads(output.splitlines()[-1]) for output in (first, second)]
    assert [ours + theirs for ours, theirs in zip(*shares)] == alone and len(alone) == two_processes.STEPS
    assert "report: " in progress and "k-NN" in progress and "step " not in silence
    assert [progress.count(f"replaced by another one: {images}/class_{i % 2}/{i}.png") for i in BAD] == [1, 1, 1]
    assert "bad image" not in silence

    rows, want = journal.read(tmp_path / "two"), journal.read(tmp_path / "one")
    assert [row["step"] for row in rows] == [row["step"] for row in want]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 1 + two_processes.STEPS))
    assert rows[-2]["data/bad_images"] >= 2 * len(BAD)  # in both processes; that all are counted is seen below
    for ours, theirs in zip(rows, want):
        assert ours.keys() == theirs.keys()
        for tag in ours:
            if not tag.startswith("perf/"):
                np.testing.assert_allclose(ours[tag], theirs[tag], rtol=1e-4, atol=1e-6, err_msg=f"{tag} at {ours['step']}")

    files = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").glob("*")}
    assert {str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").glob("*")} == files
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1  # one process writes
    assert {path.name for path in (tmp_path / "two/checkpoints").iterdir()} == {"4", "6"}


@pytest.mark.slow
def test_control_c_in_one_process_is_a_sigterm_that_stops_both_at_one_step(images, tmp_path):
    processes = start(images, tmp_path)
    for _ in range(60_000):
        if (tmp_path / "config.json").exists() or processes[0].poll() is not None:
            break
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGINT)
    (_, progress), _ = finish(processes)
    stopped = re.search(f"stopped after step (.) of {two_processes.STEPS}", progress)
    assert stopped and [path.name for path in (tmp_path / "checkpoints").iterdir()] == [stopped[1]]
    assert f"resuming after step {stopped[1]}" in finish(start(images, tmp_path))[0][1]
    steps = [row["step"] for row in journal.read(tmp_path) if "train/loss" in row]
    assert steps == list(range(1, 1 + two_processes.STEPS))


@pytest.mark.slow
def test_damage_and_a_lock_are_seen_by_both(images, tmp_path):
    finish(start(images, tmp_path))
    for damage in (b"damaged", b""):  # an array of other numbers or that cannot be read; no record
        newest = tmp_path / f"checkpoints/{two_processes.STEPS}"
        if damage:
            path = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] + damage + content[len(content) // 2 + len(damage) :])
        else:
            (newest / "record/metadata").unlink()
        (_, progress), _ = finish(start(images, tmp_path))
        assert f"step {two_processes.STEPS} is damaged" in progress and "step 4 is taken" in progress
        assert f"resuming after step 4 of {two_processes.STEPS}" in progress
    with locked(tmp_path):
        processes = start(images, tmp_path)
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all("is in use by another run" in error for error in errors)


@pytest.mark.slow
def test_two_processes_run_in_a_bucket_as_on_a_disk(images, bucket, tmp_path):
    workdir = bucket / "two"
    (_, progress), (_, silence) = finish(start(images, workdir))
    finish(start(images, tmp_path))
    assert "report: gs://bucket/two/report.html" in progress and "step " not in silence
    figures = lambda at: [{tag: row[tag] for tag in row if "perf/" not in tag} for row in journal.read(at)]  # noqa: E731
    assert figures(workdir) == figures(tmp_path)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "6"}
    digests = [json.loads((at / "checkpoints/6/record/metadata").read_text())["arrays"] for at in (workdir, tmp_path)]
    assert digests[0] == digests[1]
    _, progress = finish(start(images, workdir))[0]
    assert f"resuming after step {two_processes.STEPS}" in progress
