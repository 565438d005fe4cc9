"""The program: `python -m mim_jax.main`, or `mim_jax`. It listens to signals before it imports what takes seconds."""

import contextlib
import ctypes
import os

from mim_jax import stopping


def cli() -> None:
    # Before jax is imported, and C++ reads it: when a process dies, the others would tell all that they try.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with stopping.Stop(program=True) as stop:
        one_arena_a_core()
        from mim_jax import command

        command.run(stop)


def one_arena_a_core() -> None:
    """Has glibc spread what threads allocate over one arena for each core, in place of eight, for this process.

    What is free in many arenas grows for a hundred thousand steps, though what is in use does not.
    """
    arena_max = -8  # of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # of another C library
        ctypes.CDLL(None).mallopt(arena_max, os.cpu_count() or 1)


if __name__ == "__main__":
    cli()
