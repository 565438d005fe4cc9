"""One run at a time in a workdir: the first on a disk, the last at an address."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mim_jax import storage
from mim_jax.checkpoint import of_any_process

SEEN = 15  # s after which a file of one host is seen by all


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds the file `lock` in a workdir, which is made if it is missing; the first process does, for all of a run.

    The lock is the system's (`flock`): it ends with the process that holds it, however that ends, and on NFS it holds for
    other machines, too. On a file system without such locks a line says so, and nothing is held.

    At an address, where nothing tells whether a process still lives, the run that began last has the workdir. What this yields
    raises OSError for an earlier one, which is to call it before it writes; elsewhere it does nothing.

    Raises OSError, with the process and the host of the other run, if the workdir is in use or cannot be written, and if
    another process of this run does not see the lock: its host has another folder of that name.
    """
    mine = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"

    def held() -> None:
        try:
            there = (workdir / "lock").read_text()
        except Exception as error:
            raise OSError(f"cannot read {workdir}/lock: {storage.reason(error)}") from error
        if there != mine:
            raise OSError(f"{workdir} is in use by another run, which began later: {there.strip()}")

    with contextlib.ExitStack() as stack:
        taking = take_over if storage.remote(workdir) else take
        if problem := of_any_process(taking(workdir, mine, stack) if jax.process_index() == 0 else ""):
            raise OSError(problem)
        if jax.process_count() > 1 and (problem := of_any_process(unseen(workdir))):
            raise OSError(problem)
        yield held if storage.remote(workdir) else lambda: None


def unseen(workdir: Path) -> str:
    """That this process does not see the lock that the first one has taken; "" if it does. All must call it."""
    own = np.zeros(500, np.uint8)
    if jax.process_index() == 0:
        written = (workdir / "lock").read_bytes()
        own[: len(written)] = np.frombuffer(written, np.uint8)
    want = multihost_utils.broadcast_one_to_all(own).tobytes().rstrip(b"\0")
    for _ in range(round(10 * SEEN)):
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_bytes() == want:
                return ""
        time.sleep(0.1)
    who = f"process {jax.process_index()} on {socket.gethostname()}"
    return f"{workdir} of {who} is not the folder of process 0: the workdir must be one that all hosts see, as on NFS"


def take(workdir: Path, mine: str, stack: contextlib.ExitStack) -> str:
    """Takes the lock, which is given back when the stack is closed; or returns why it cannot be taken."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((workdir / "lock").open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return f"{workdir} is in use by another run: {file.read().strip() or 'an unknown process'}"
        except OSError as error:
            print(f"{workdir} cannot be locked ({error.strerror}): take care that one run uses it at a time", file=sys.stderr)
        file.truncate(0)
        file.write(mine)
        file.flush()
        os.fsync(file.fileno())  # other hosts of this run look for it
    except OSError as error:
        return f"cannot write to {error.filename or workdir}: {error.strerror}"
    return ""


def take_over(workdir: Path, mine: str, stack: contextlib.ExitStack) -> str:
    """Names this run in the `lock` of an address, until the stack is closed; returns why it cannot be written."""
    lock = workdir / "lock"
    try:
        if lock.exists():
            other = lock.read_text().strip()
            print(f"{workdir} was not left by {other}; if it still runs, it ends when it next writes", file=sys.stderr)
        lock.write_text(mine)
    except Exception as error:
        return f"cannot write to {workdir}: {storage.reason(error)}"

    def leave() -> None:
        with contextlib.suppress(Exception):  # what ends the run is told
            if lock.read_text() == mine:
                lock.unlink()

    stack.callback(leave)
    return ""
