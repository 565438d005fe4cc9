"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mim_jax.checkpoint import of_any_process


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the file `lock` in a workdir, which is made if it is missing; the first process does, for all of a run.

    The lock is the system's (`flock`): it ends with the process that holds it, however that ends, and on NFS it holds for
    other machines, too. On a file system without such locks a line says so, and nothing is held.

    Raises OSError, with the process and the host of the other run, if the workdir is in use or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if problem := of_any_process(take(workdir, stack) if jax.process_index() == 0 else ""):
            raise OSError(problem)
        yield


def take(workdir: Path, stack: contextlib.ExitStack) -> str:
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
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    except OSError as error:
        return f"cannot write to {error.filename or workdir}: {error.strerror}"
    return ""
