"""Processes that fill batches, in memory that they share with this one: here an image costs next to nothing.

The memory has slots of one batch each. All processes work on the same batch, each on a piece of its rows at a time, which it
takes from a pipe: whoever is free takes the next one. A slot is used again when nobody holds an array of its batch any more, so
its pages are made once, and there are as many slots as batches are held at a time.

Nothing has a name: memory and pipes are gone with the processes, however these end. The memory is not that of /dev/shm, which
is small in many containers.
"""

import atexit
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import selectors
import signal
import struct
import sys
import tempfile
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import numpy as np

AHEAD = 4  # batches that are worked on or wait to be fetched
PIECE, PIECES = 32, 512  # rows of a piece at most; pieces of a batch at most, so that the pipe holds those of all
TASK = struct.Struct("<qii")  # the number of the batch, its slot, the first row of the piece; read and written in one go
ALIGNED = 64  # bytes: arrays that begin at multiples of it are used by JAX as they are

Batch = dict[str, np.ndarray]
Make = Callable[[int, slice, Batch], Batch]


class Memory:
    """Slots of a batch with the keys, dtypes and shapes (but for the first axis) of `like`, and `rows` rows."""

    def __init__(self, like: Batch, rows: int, fd: int | None = None):
        self.fields, self.size, self.slots = {}, 0, dict[int, mmap.mmap]()
        for name, value in like.items():
            shape = (rows, *value.shape[1:])
            self.fields[name] = self.size, shape, value.dtype
            self.size += -(-math.prod(shape) * value.dtype.itemsize // ALIGNED) * ALIGNED
        self.size = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.fd = anonymous() if fd is None else fd
        self.like, self.rows = like, rows

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that is being started."""
        return _received, ({name: value[:0] for name, value in self.like.items()}, self.rows, reduction.DupFd(self.fd))

    def close(self) -> None:
        """The arrays stay."""
        os.close(self.fd)

    def arrays(self, slot: int, free: Callable[[], object] | None = None) -> Batch:
        """The batch in a slot; `free` is called when nobody holds an array of it any more."""
        if slot not in self.slots:
            start = slot * self.size
            if os.fstat(self.fd).st_size < start + self.size:
                os.ftruncate(self.fd, start + self.size)
            self.slots[slot] = mmap.mmap(self.fd, self.size, offset=start)
        whole = np.ndarray(self.size, np.uint8, self.slots[slot])  # which all views of it hold
        if free:
            weakref.finalize(whole, free).atexit = False
        views = {}
        for name, (start, shape, dtype) in self.fields.items():
            views[name] = whole[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return views


def _received(like: Batch, rows: int, fd: Any) -> Memory:
    return Memory(like, rows, fd.detach())


def anonymous() -> int:
    """The descriptor of a file in memory that has no name (on other systems than Linux: in a folder for temporary files)."""
    if sys.platform == "linux":
        return os.memfd_create("batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def batches(make: Make, like: Batch, rows: int, start: int, workers: int, threads: int = 1) -> Generator[Batch, None, None]:
    """The batches start, start + 1, ... of `rows` rows, endlessly.

    Args:
      make: (number of the batch, its rows, room) -> these rows as arrays with the keys of `like`; what it writes into those of
        `room` is not copied.
      like: a batch of any number of rows.
      workers, threads: processes, and threads of each, for rows that take a while to come.

    Raises what `make` raises, as soon as the batch would be next; OSError if a process is killed.
    """
    memory, piece = Memory(like, rows), max(min(-(-rows // workers), PIECE), -(-rows // PIECES))
    context, selector = multiprocessing.get_context("spawn"), selectors.DefaultSelector()
    processes: dict[Connection, Any] = {}

    def end() -> None:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()
        processes.clear()

    atexit.register(end)  # before multiprocessing's own end, which waits for processes that no SIGTERM ends
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()  # later, it would unblock the signals that are blocked here and so in the processes
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    tasks, queue = context.Pipe(duplex=False)
    function = cloudpickle.dumps(make)
    try:
        for _ in range(workers):
            results, theirs = context.Pipe(duplex=False)
            work = function, memory, piece, threads, tasks, theirs
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()
            processes[results] = process
            selector.register(results, selectors.EVENT_READ)
        tasks.close()
        firsts, ahead = range(0, rows, piece), deque[int]()  # the slots of the batches that are worked on
        left, errors, free = dict[int, int](), dict[int, Exception](), deque[int]()
        numbers, slots = itertools.count(start), itertools.count()
        while True:
            while len(ahead) < AHEAD:
                slot, number = free.popleft() if free else next(slots), next(numbers)
                memory.arrays(slot)
                ahead.append(slot)
                left[slot] = len(firsts)
                with contextlib.suppress(BrokenPipeError):  # no process is left: what they sent last says why
                    for first in firsts:
                        os.write(queue.fileno(), TASK.pack(number, slot, first))
            while left[ahead[0]]:
                for key, _ in selector.select():
                    slot, error = _received_from(key.fileobj, processes)
                    left[slot] -= 1
                    if error:
                        errors.setdefault(slot, error)
            slot = ahead.popleft()
            if slot in errors:
                raise errors[slot]
            yield memory.arrays(slot, functools.partial(free.append, slot))
    finally:
        end()
        atexit.unregister(end)
        memory.close()
        selector.close()


def _received_from(results: Any, processes: dict[Connection, Any]) -> tuple[int, Exception | None]:
    try:
        return results.recv()
    except (EOFError, OSError) as error:
        process = processes[results]
        process.join()
        number = process.exitcode
        code = "by signal 9, as systems do when memory is used up" if number == -9 else f"with exit code {number}"
        raise OSError(f"a process that reads the data ended {code}; data.workers is the number of them") from error


def _sendable(error: Exception) -> Exception:
    try:
        reduction.ForkingPickler.dumps(error)
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _work(make: bytes, memory: Memory, piece: int, threads: int, tasks: Connection, results: Connection) -> None:
    """A process: it ends with its parent, however that ends, and not by a Ctrl-C, which all processes get."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sending = threading.Lock()

    def fill(function: Make) -> None:
        while task := os.read(tasks.fileno(), TASK.size):
            number, slot, first = TASK.unpack(task)
            rows, failed = slice(first, first + piece), None
            try:
                room = {name: value[rows] for name, value in memory.arrays(slot).items()}
                for name, value in function(number, rows, room).items():
                    if value is not room[name]:
                        room[name][...] = value
            except Exception as error:
                error.add_note(traceback.format_exc())
                failed = _sendable(error)
            with sending:
                results.send((slot, failed))

    function = cloudpickle.loads(make)
    for _ in range(threads):
        threading.Thread(target=fill, args=(function,), daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
