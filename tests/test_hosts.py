"""One run of several processes: whole commands on this machine, stopped, killed, resumed and refused; and how they start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_jax import hosts, journal
from mim_jax.checkpoint import saved_steps
from mim_jax.stopping import NOTHING_LOST

ROOT = Path(__file__).parent.parent
DUMPS = ("terminate called", "stack trace", "Traceback", "coordination_service", "F0000")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(48):
        path = folder / f"class_{i % 2}/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 200, (16, 16, 3), np.uint8) + np.uint8(55 * (i % 2))).save(path)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """A command in several processes, each with `devices` devices; what they write goes to files."""

    def __init__(self, folder: Path, images: Path, count: int, *arguments: str, devices: int = 1, workdirs: tuple = ()):
        self.workdir, self.port = folder / "run", free_port()
        workdirs = workdirs or (self.workdir,) * count
        every = ["--config.total=9999 steps", "--config.eval.every=never", "--config.checkpoint.every=8 steps"]
        command = [sys.executable, "-m", "mim_jax.main", f"--config={ROOT}/tests/tiny.py:mae", "--compiled=", *every]
        command += [f"--config.data.dir={images}", f"--coordinator=127.0.0.1:{self.port}", f"--processes={count}", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.errors = [folder / f"{self.port}_{i}.txt" for i in range(count)]
        self.processes = []
        for i in range(count):
            with self.errors[i].open("w") as file:
                own = [*command, f"--workdir={workdirs[i]}", f"--process={i}"]
                process = subprocess.Popen(own, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=file)
                self.processes.append(process)

    def steps(self) -> list[int]:
        return [row["step"] for row in journal.read(self.workdir) if "train/loss" in row]

    def wait_for(self, what) -> None:
        for _ in range(60_000):
            if what() or any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.005)
        assert what(), self.written()

    def finish(self, seconds: float = 600) -> list[int]:
        """Their exit codes."""
        try:
            end = time.monotonic() + seconds
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.written()) from error
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def written(self) -> list[str]:
        return [path.read_text() for path in self.errors]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "stopped", "killed"), [(2, 2, 1, 0), (4, 1, 0, 2)])
def test_a_run_of_several_processes_is_stopped_killed_and_finished(images, tmp_path, count, devices, stopped, killed):
    def start(*arguments: str) -> Run:
        return Run(tmp_path, images, count, f"--config.mesh.fsdp={count}", "--config.mesh.data=-1", *arguments, devices=devices)

    # SIGTERM to one: all save the same step and end well.
    run = start()
    run.wait_for(lambda: len(run.steps()) > 2)
    run.processes[stopped].send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.finish() == [0] * count, run.written()
    took_stop = time.monotonic() - began
    told, *silent = run.written()
    (step,) = re.findall("stopped after step (.*) of 9999; the same command goes on from there", told)
    assert int(step) == run.steps()[-1] and (run.workdir / f"checkpoints/{step}").is_dir()
    assert silent == [""] * (count - 1)

    # kill -9 of one: the others end with one line each.
    run = start()
    run.wait_for(lambda: len(run.steps()) > int(step) + 2)
    run.processes[killed].kill()
    began = time.monotonic()
    codes = run.finish(100)
    took_kill = time.monotonic() - began
    assert codes == [-signal.SIGKILL if i == killed else 1 for i in range(count)], run.written()
    for i, text in enumerate(run.written()):
        assert not any(dump in text for dump in DUMPS), text
        assert text.count(hosts.LOST) == (i != killed), text
        assert i == 0 or text in ("", f"{hosts.LOST}\n")
    assert f"resuming after step {step} of 9999" in run.written()[0]

    # The same command goes on, here to an end. All of them evaluate.
    saved = saved_steps(run.workdir / "checkpoints")[0]
    run = start(f"--config.total={saved + 4} steps", f"--config.eval.every={saved + 4} steps")
    assert run.finish() == [0] * count, run.written()
    told, *silent = run.written()
    assert f"resuming after step {saved} of" in told and "report: " in told and "k-NN" in told
    assert silent == [""] * (count - 1)
    assert run.steps() == list(range(1, saved + 5))
    assert [row["step"] for row in journal.read(run.workdir) if "eval/knn" in row] == [saved + 4]
    assert {"crops.png", "reconstruction.png", "neighbors.png"} <= {path.name for path in (run.workdir / "pictures").iterdir()}
    assert (run.workdir / "report.html").is_file()
    assert not list(run.workdir.glob("checkpoints/*tmp*"))
    print(f"{count} processes: stopped in {took_stop:.1f} s, ended {took_kill:.1f} s after a kill")
    assert took_stop < 10 and took_kill < 60


@pytest.mark.slow
def test_before_all_train_a_signal_ends_all_at_once(images, tmp_path):
    run = Run(tmp_path, images, 2)
    run.wait_for(lambda: "measuring the baselines" in run.written()[0])
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.finish(60) == [0, 0], run.written()
    told, silent = run.written()
    assert told.endswith(f"{NOTHING_LOST}\n") and silent == ""


@pytest.mark.slow
def test_a_workdir_that_one_host_does_not_see_and_two_configs_are_refused(images, tmp_path):
    run = Run(tmp_path, images, 2, workdirs=(tmp_path / "run", tmp_path / "other"))
    assert run.finish(300) == [1, 1], run.written()
    for text in run.written():
        assert text == f"error: {tmp_path}/other of process 1 on {socket.gethostname()} is not the folder of process 0: " + (
            "the workdir must be one that all hosts see, as on NFS\n"
        )
    assert not (tmp_path / "other").exists()
