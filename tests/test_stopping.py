"""Signals, without a run (runs that are stopped are in test_resume.py): who listens, what they end, and what they do not."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mim_jax import hosts
from mim_jax.data import pipeline, sources
from mim_jax.sharding import current_mesh, make_mesh
from mim_jax.stopping import AT_ONCE, NOTHING_LOST, SIGNALS, Stop, Stopped

ROOT = Path(__file__).parent.parent


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# In a program's own process, before and while it trains.


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_a_signal_raises(number):
    with pytest.raises(Stopped, match="goes on from there"), Stop():
        send(number)
        time.sleep(1)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_a_signal_ends_the_waiting_and_nothing_else(number):
    ended = threading.Event()
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.training = True
        batches = stop.ahead(i for i in range(3))
        assert next(batches) == 0 and stop.wait(max, 1, 2) == 2 and not stop.requested
        with pytest.raises(Stopped):
            stop.wait(lambda: (time.sleep(0.3), send(number), ended.wait(20)))  # it waits when the signal comes
        assert stop.requested
        for wait in (lambda: stop.wait(ended.set), lambda: next(batches)):
            with pytest.raises(Stopped):
                wait()
        assert not ended.is_set()
    ended.set()
    assert signal.getsignal(number) is before


def test_a_second_control_c_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as error, Stop() as stop:
        stop.training = True
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.requested
        send(signal.SIGINT)
    assert not isinstance(error.value, Stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_thread_raises_is_raised_with_its_place():
    with Stop() as stop, pytest.raises(ValueError, match="invalid literal") as error:
        stop.wait(int, "x")
    assert error.traceback[-1].name == "call"


def test_items_are_made_one_ahead_and_closed():
    made, closed = [], threading.Event()

    def items():
        with contextlib.closing(closed), contextlib.suppress(GeneratorExit):
            for number in itertools.count():
                made.append(number)
                yield number

    closed.close = closed.set
    with Stop() as stop, contextlib.closing(stop.ahead(items())) as ahead:
        assert [next(ahead) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.1)
        assert made == [0, 1, 2, 3]
    assert closed.is_set()


def test_a_thread_works_with_the_mesh_of_the_caller_and_hears_no_signals():
    with Stop() as stop:
        assert stop.wait(current_mesh) is None
        assert set(SIGNALS) <= stop.wait(signal.pthread_sigmask, signal.SIG_BLOCK, [])  # nor do data workers hear them
        with jax.set_mesh(make_mesh(4, 2)):
            assert stop.wait(current_mesh) == make_mesh(4, 2)


def test_outside_of_the_main_thread_nothing_is_listened_to():
    before = signal.getsignal(signal.SIGTERM)

    def run():
        with Stop() as stop:
            assert signal.getsignal(signal.SIGTERM) is before
            found.append((stop.wait(threading.current_thread), *stop.ahead(i for i in range(2))))

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(thread, 0, 1)]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            send(signal.SIGINT)
            assert not stop.requested and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# Of several processes. The others are played here.


@pytest.fixture
def other(monkeypatch):
    """A function: what the other process answers -> nothing. And whether any process has told."""
    told, answer, ended = threading.Event(), [], []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "tell", lambda name: told.set())
    monkeypatch.setattr(hosts, "heard", lambda name, wait_s: told.wait(wait_s))
    monkeypatch.setattr(hosts, "exchange", lambda name, own: [own, *answer])

    def finish(*how):
        ended.append(how)
        raise hosts.Gone("in place of an end")

    monkeypatch.setattr(hosts, "finish", finish)
    yield told, answer, ended
    told.set()
    for thread in threading.enumerate():
        if "_agree" in thread.name:
            thread.join()


def settled(what) -> bool:
    return any(what() or time.sleep(0.01) for _ in range(500))


@pytest.mark.parametrize("number", SIGNALS)
def test_several_processes_end_at_the_call_after_the_last_one(other, number):
    _, answer, _ = other
    answer[:] = [4]
    with Stop() as stop:
        stop.training = True
        assert stop.wait(threading.current_thread) is threading.main_thread()  # in step with the other processes
        assert not stop.reached() and not stop.requested
        send(number)
        assert settled(lambda: stop.requested)
        assert [stop.reached() for _ in range(4)] == [False, False, False, True]
        with pytest.raises(Stopped):
            stop.check()


def test_a_process_hears_of_a_signal_to_another_one(other):
    told, answer, _ = other
    answer[:] = [0]
    with Stop() as stop:
        stop.training = True
        stop.check()
        told.set()
        assert settled(lambda: stop.requested) and stop.reached()


def test_a_program_of_several_ends_at_once_before_all_train(other):
    told, answer, ended = other
    for training, answered in ((True, ~7), (False, 7)):
        told.clear()
        answer[:] = [answered]
        stop = Stop(program=True)
        stop.training = training
        stop.join()
        told.set()
        assert settled(lambda: ended) and ended.pop() == (0, NOTHING_LOST) and not stop.requested


def test_of_several_processes_a_second_control_c_ends_one(other, monkeypatch):
    other[1][:] = [0]
    monkeypatch.setattr("mim_jax.stopping.leave", lambda *how: sys.exit(str(how)))
    with pytest.raises(SystemExit) as left, Stop():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert left.value.code == str((130, AT_ONCE))


# Programs.


def deaf(process: int, how: str) -> bool:
    """Whether it blocks ("SigBlk") or ignores ("SigIgn") both signals."""
    mask = int(Path(f"/proc/{process}/status").read_text().partition(f"{how}:")[2].split()[0], 16)
    return all(mask >> number - 1 & 1 for number in SIGNALS)


PROGRAM = """
import hashlib, sys
from mim_jax.stopping import Stop
with Stop(program=True) as stop:
    stop.training = {training}
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one call of minutes, as a compilation is
"""


@pytest.mark.parametrize(
    ("training", "numbers", "code", "line"),
    [
        (False, [signal.SIGTERM], 0, NOTHING_LOST),
        (False, [signal.SIGINT], 0, NOTHING_LOST),
        (True, [signal.SIGINT, signal.SIGINT], 130, AT_ONCE),
        (True, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130, AT_ONCE),
    ],
)
def test_a_program_ends_during_any_call(training, numbers, code, line):
    command = [sys.executable, "-c", PROGRAM.format(training=training)]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    try:
        for number in numbers:
            program.send_signal(number)
            time.sleep(0.2)  # of two that wait, the kernel chooses the order, and makes one of equal ones
        assert program.communicate(timeout=20)[1] == f"{line}\n"
        assert program.returncode == code
    finally:
        program.kill()


COMPILER = """
import ctypes
from mim_jax.stopping import Stop
with Stop(program=True) as stop:
    stop.release()
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(100)  # no other thread of Python runs
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_was_released_ends_though_nothing_of_python_runs(number):
    program = subprocess.Popen([sys.executable, "-c", COMPILER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    program.send_signal(number)
    try:
        assert program.wait(20) == -number
    finally:
        program.kill()


def test_the_command_listens_before_it_imports_jax():
    code = "import sys, mim_jax.main; print({'jax', 'numpy', 'absl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
    program = subprocess.Popen([sys.executable, "-m", "mim_jax.main", "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while program.poll() is None and not deaf(program.pid, "SigBlk"):
        pass
    program.send_signal(signal.SIGTERM)
    assert program.communicate(timeout=20)[1] == f"{NOTHING_LOST}\n"
    assert program.returncode == 0


# Data workers.


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_only_a_kill_ends_a_worker_and_is_told(images):
    source = sources.open_source("folder", images)
    with Stop() as stop:
        stream = pipeline.train_batches(source, seed=0, batch_size=2, canvas=8, workers=1, ahead=stop.ahead)
        with contextlib.closing(stream):
            next(stream)
            (worker,) = multiprocessing.active_children()
            assert deaf(worker.pid, "SigBlk") and deaf(worker.pid, "SigIgn")  # while it is started, and then
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(OSError, match="a process that reads the data ended by signal 9"):
                list(itertools.islice(stream, 9))


def test_a_worker_that_ends_before_its_next_task_is_told_too(images):
    source = sources.open_source("folder", images)
    with contextlib.closing(pipeline.train_batches(source, seed=0, batch_size=2, canvas=8, workers=1)) as stream:
        next(stream)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(OSError, match="a process that reads the data ended by signal 9"):
            list(itertools.islice(stream, 9))


PARENT = """
import itertools, multiprocessing, time
from mim_jax.data import pipeline, sources
if __name__ == "__main__":
    source = sources.open_source("folder", {images!r})
    stream = pipeline.train_batches(source, seed=0, batch_size=2, canvas=8, workers=2)
    list(itertools.islice(stream, 4))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(images, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(images=str(images)))
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}
    named = shared_memory()
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=pipe, stderr=pipe, text=True)
    workers = [Path(f"/proc/{number}") for number in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.exists() for worker in workers)
    parent.kill()
    for _ in range(500):
        if not any(worker.exists() and "Z (zombie)" not in (worker / "status").read_text() for worker in workers):
            break
        time.sleep(0.01)
    else:
        pytest.fail("workers are alive 5 seconds after their parent")
    parent.communicate()
    assert shared_memory() <= named, "memory that nobody will free"


def shared_memory() -> set[str]:
    """What has a name, but for what Python's own locks and JAX make."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}
