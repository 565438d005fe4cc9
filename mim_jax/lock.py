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

from mim_jax import storage
from mim_jax.checkpoint import of_any_process


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds the file `lock` in a workdir, which is made if it is missing; the first process does, for all of a run.

    The lock is the system's (`flock`): it ends with the process that holds it, however that ends, and on NFS it holds for
    other machines, too. On a file system without such locks a line says so, and nothing is held.

    At an address, where nothing tells whether a process still lives, the run that began last has the workdir. What this yields
    raises OSError for an earlier one, which is to call it before it writes; elsewhere it does nothing.

    Raises OSError, with the process and the host of the other run, if the workdir is in use or cannot be written.
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
        yield held if storage.remote(workdir) else lambda: None


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
