"""One run of several processes: whole commands on this machine, stopped, killed, resumed and refused; and how they start."""

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
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import multihost_utils
from two_processes import write_images

from mim_jax import hosts, journal, load_config, lock, stopping
from mim_jax.checkpoint import saved_steps
from mim_jax.stopping import NOTHING_LOST

ROOT = Path(__file__).parent.parent
DUMPS = ("terminate called", "stack trace", "Traceback", "coordination_service", "F0000")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def without_jax() -> dict[str, str]:
    """The environment, without what jax has set there for C++."""
    return {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}


class Run:
    """A command in several processes, each with `devices` devices; what they write goes to files."""

    def __init__(self, folder: Path, images: Path, count: int, *arguments: str, devices: int = 1, workdirs: tuple = ()):
        self.workdir, self.port = folder / "run", free_port()
        workdirs = workdirs or (self.workdir,) * count
        every = ["--config.total=9999 steps", "--config.eval.every=never", "--config.checkpoint.every=8 steps"]
        command = [sys.executable, "-m", "mim_jax.main", f"--config={ROOT}/tests/tiny.py:mae", "--compiled=", *every]
        command += [f"--config.data.dir={images}", f"--coordinator=127.0.0.1:{self.port}", f"--processes={count}", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
        self.errors = [folder / f"{self.port}_{i}.txt" for i in range(count)]
        self.processes = []
        for i in range(count):
            with self.errors[i].open("w") as file:
                own = [*command, f"--workdir={workdirs[i]}", f"--process={i}"]
                process = subprocess.Popen(own, env=without_jax() | environment, stdout=subprocess.DEVNULL, stderr=file)
                self.processes.append(process)

    def steps(self) -> list[int]:
        return [row["step"] for row in journal.read(self.workdir) if "train/loss" in row]

    def wait_for(self, what) -> None:
        for _ in range(60_000):
            if what() or any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.005)
        assert what(), self.written()

    def finish(self, seconds: float = 1800) -> list[int]:
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


# How a process finds the others. None of them is there.

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
ONE_A_NODE = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TPU = {"agent-worker-number": "3", "worker-network-endpoints": "a:b:127.0.0.1,a:b:10.0.0.2", "tpu-env": "A: 'b'"}


@pytest.fixture
def start(monkeypatch):
    """A function: environment, arguments of `hosts.start` -> whether there are several, and the arguments of `connect`."""
    for name in [name for name in os.environ if re.match("SLURM|OMPI|KUBERNETES|JOB_COMPL|TPU_|JAX_COORDINATOR", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    found = []
    monkeypatch.setattr(hosts, "connect", lambda *how: found.append(how))

    def started(environment, *arguments):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return hosts.start(*arguments), *found

    return started


@pytest.mark.parametrize(
    ("environment", "arguments", "want"),
    [
        ({}, (), (False,)),
        (POD, (), (False,)),  # not of a job
        (SLURM, (), (True, ("node007:61441", 16, 11, [3]))),
        (SLURM | ONE_A_NODE, (), (True, ("node007:61441", 2, 1, None))),  # with all devices of its host
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (), (False,)),
        (SLURM, (None, 1, None), (False,)),
        (SLURM, ("here:99", 2, 0), (True, ("here:99", 2, 0, None))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "here:99"}, (), (True, ("here:99", 16, 11, [3]))),
        (MPI, (), (True, ("10.96.0.1:62624", 2, 1, [0]))),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (), (True, ("10.96.0.1:62624", 2, 1, None))),
    ],
)
def test_processes_are_found_where_the_cluster_tells_them(start, environment, arguments, want):
    assert start(environment, *arguments) == want
    assert "kubernetes" not in sys.modules


def test_a_cloud_tpu_tells_its_processes(start, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (TPU[key], 200))
    assert start({}) == (True, ("127.0.0.1:8482", 2, 3, None))


def test_a_process_that_finds_no_others_is_not_a_run_on_its_own(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    for environment in (POD | {"JOB_COMPLETION_INDEX": "1"}, {"OMPI_COMM_WORLD_RANK": "1"}):  # the second: Open MPI 5
        with pytest.raises(OSError, match=r"this is process 1 of a job in which jax does not find the others: install jax"):
            start(environment)


def test_a_cluster_that_tells_nonsense_is_refused_in_one_line(start):
    with pytest.raises(OSError, match=r"the cluster does not tell which process this is: invalid literal .*; --coordinator="):
        start(SLURM | {"SLURM_PROCID": "first"})


def test_the_program_keeps_cplusplus_from_talking_before_jax_is_imported():
    program = "import os, sys\nfrom mim_jax import main\nassert 'jax' not in sys.modules\nsys.argv[1:] = ['--help']\n"
    program += "try:\n    main.cli()\nexcept SystemExit:\n    print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    for given, want in ((None, "3"), ("0", "0")):
        environment = without_jax() | ({"TF_CPP_MIN_LOG_LEVEL": given} if given else {})
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == want, result.stderr


class Store:
    """In place of the client of jax's coordination service."""

    def __init__(self, **values: str):
        self.values = values

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.values:
            raise hosts.Gone("DEADLINE_EXCEEDED: as in jax")
        return self.values[key]


@pytest.mark.parametrize("own, told", [(0, {"processes/1": "3"}), (1, {"processes/0": "2"})])
def test_a_process_that_was_told_another_number_of_processes_is_refused(monkeypatch, own, told):
    store = Store(**told)
    monkeypatch.setattr(hosts, "client", lambda: store)
    monkeypatch.setattr(hosts.distributed.global_state, "process_id", own)
    with pytest.raises(ValueError, match="process 0 was started with processes=2, process 1 with 3"):
        hosts.check_count(2 if own == 0 else 3)
    store.values |= {"processes/0": "2", "processes/1": "2"}
    hosts.check_count(2)


def test_a_process_that_does_not_answer_a_signal_ends_the_run(monkeypatch):
    ended = []
    monkeypatch.setattr(hosts, "heard", lambda *_: True)
    monkeypatch.setattr(hosts, "client", lambda: Store())
    monkeypatch.setattr(hosts.distributed.global_state, "num_processes", 2)
    monkeypatch.setattr(hosts, "finish", lambda *how: ended.append(how))
    stopping.Stop()._agree("stop 0")
    assert ended == [(1, f"error: {stopping.UNANSWERED}")]


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"process 0 cannot listen at port {port}, of coordinator 127.0.0.1:{port}: Addr"):
            hosts.connect(f"127.0.0.1:{port}", 2, 0)


@pytest.fixture
def second(monkeypatch):
    """This process is the second of two. A function: what the first one tells -> nothing."""

    def tells(array):
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda own: array)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for module in (hosts, lock):
        monkeypatch.setattr(module, "of_any_process", lambda problem: problem)
    return tells


def test_a_workdir_that_is_another_one_is_told(second, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SEEN", 0.1)
    second(np.frombuffer(b"process 1 on first\n" + bytes(100), np.uint8))
    for content in (None, "process 1 on second\n"):
        if content:
            (tmp_path / "lock").write_text(content)
        with pytest.raises(OSError, match=f"{tmp_path} of process 1 on .* is not the folder of process 0: the workdir must be"):
            with lock.locked(tmp_path):
                pass
    (tmp_path / "lock").write_text("process 1 on first\n")
    with lock.locked(tmp_path):
        pass


def test_another_config_is_told(second, monkeypatch):
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda own: first.append(own) or own)
    first, config = [], load_config("mae:demo").unlock()
    hosts.check_same(config)
    second(first[0])
    config.data.dir, config.data.workers = "elsewhere", 3
    hosts.check_same(config)
    config.optim.lr = 9.0
    with pytest.raises(ValueError, match="process 1 on .* has optim.lr=9.0: not as process 0"):
        hosts.check_same(config)


# Whole commands.


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
    run = Run(tmp_path, images, 2, "--config.eval.every=9999 steps")
    run.wait_for(lambda: "measuring the baselines" in run.written()[0])
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.finish(60) == [0, 0], run.written()
    told, silent = run.written()
    assert told.endswith(f"{NOTHING_LOST}\n") and silent == ""


ALONE = """
import sys
from mim_jax import hosts
hosts.TIME_LIMIT = 3
try:
    hosts.connect(sys.argv[1], 2, int(sys.argv[2]))
except OSError as error:  # as in the command line
    hosts.fail(error, f"error: {error}")
"""


@pytest.mark.slow
def test_one_that_is_alone_gives_up_in_one_line():
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    for process, host in ((0, "127.0.0.1"), (1, "127.0.0.1"), (1, "no.such.host.invalid")):
        coordinator = f"{host}:{free_port()}"
        command = [sys.executable, "-c", ALONE, coordinator, str(process)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert result.stderr == f"error: process {process} of 2 could not meet the others at {coordinator} within 3 s\n"
        assert result.returncode == 1


@pytest.mark.slow
def test_a_workdir_that_one_host_does_not_see_and_two_configs_are_refused(images, tmp_path):
    run = Run(tmp_path, images, 2, workdirs=(tmp_path / "run", tmp_path / "other"))
    assert run.finish(300) == [1, 1], run.written()
    for text in run.written():
        assert text == f"error: {tmp_path}/other of process 1 on {socket.gethostname()} is not the folder of process 0: " + (
            "the workdir must be one that all hosts see, as on NFS\n"
        )
    assert not (tmp_path / "other").exists()
