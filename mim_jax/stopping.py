"""SIGTERM and Ctrl-C end a run with no step lost, whatever it is doing.

Until training begins nothing is lost if the program just ends. From then on, a signal lets the step in flight finish, and the
loop saves. It must not wait for longer than that, but a compilation is a single call of minutes, and a batch may never come. So
other threads do what may take long (`Stop.wait`, `Stop.ahead`), and the loop waits for them or for a signal. What they were
doing is then of no use any more. Nothing is ever raised in the midst of the loop's own work.

Imports nothing that takes long: the command line listens before it imports jax.
"""

import contextlib
import itertools
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTHING_LOST = "stopped; no step is lost, and the same command goes on from there"
UNANSWERED = "a signal to stop was not answered by all processes; the same command goes on from the last checkpoint"
AT_ONCE = "stopped at once; the same command goes on from the last checkpoint"

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A signal has ended what was being waited for, or a run that had not begun to train."""


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Listens to SIGTERM and SIGINT (Ctrl-C).

    Before training, they raise Stopped in the main thread. Once `training` is set, they set `requested` and end the waiting
    in `wait` and `ahead`; a second SIGINT raises KeyboardInterrupt.

    Args:
        program: for the command line: before training, the program ends at once, with exit code 0 and a line; a second
            SIGINT ends it with exit code 130. Both work during any call.

    Outside of the main thread, where Python has no signals, nothing is listened to.

    Of several processes, each tells the others of a signal. They compute in step, so `wait` and `ahead` are not ended: all
    agree on one call of `reached`, at which they end. If one of them does not train yet, all end at once. The second SIGINT
    ends a process with exit code 130.
    """

    training = requested = False
    numbers = itertools.count()

    def __init__(self, program: bool = False):
        self.program = program
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # its `put` may be called while a signal interrupts a `get`
        self._interrupted = self._threads = False
        self._before: dict[int, Any] = {}
        self._name = ""  # by which several processes know this object
        self._listener: threading.Thread | None = None
        self._agreeing = threading.Lock()
        self._calls, self._last = 0, math.inf  # of `reached`

    def __enter__(self) -> "Stop":
        self._threads = True
        if not self.program:
            self.join()
        if threading.current_thread() is not threading.main_thread():
            self._threads = False
            return self
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup, `command &`
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        if self.program:
            # Blocked in all threads and processes that are started from now on, and waited for by one.
            signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
            threading.Thread(target=self._watch, args=(wanted,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._name = ""
        if self._listener is not None:
            self._listener.join()  # Python's own end and a thread that waits in C++ do not go together

    def release(self) -> None:
        """From here on signals end the program as if it did not listen. For a plan, which loses nothing: compilers for other
        devices let no thread of Python run until they are done."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)

    def join(self) -> None:
        """Listens to the other processes, too, where there are several."""
        from mim_jax import hosts

        if hosts.several():
            self._threads, self._name = False, f"stop {next(self.numbers)}"
            self._listener = threading.Thread(target=self._agree, args=(self._name,), daemon=True)
            self._listener.start()

    def _agree(self, name: str) -> None:
        from mim_jax import hosts

        try:
            while not hosts.heard(name, 1):
                if not self._name:
                    return
            with self._agreeing:  # no step begins before all have answered
                places = hosts.exchange(name, self._calls if self.training else ~self._calls)
                if min(places) < 0 and self.program:
                    hosts.finish(0, NOTHING_LOST if hosts.first() else "")
                self.requested, self._last = True, 1 + max(max(place, ~place) for place in places)
        except hosts.Gone as error:
            if hosts.overdue(error):
                hosts.finish(1, f"error: {UNANSWERED}")

    def reached(self) -> bool:
        """Whether to end here, where nothing is half done. Several processes call it equally often."""
        if not self._name:
            return self.requested
        with self._agreeing:
            self._calls += 1
            return self._calls >= self._last

    def check(self) -> None:
        """In the midst of a long computation of several processes: raises Stopped where they have agreed to end."""
        if self._name and self.reached():
            raise Stopped(NOTHING_LOST)

    def wait(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, called in a thread, with the mesh of this one. Raises Stopped as soon as a stop is requested."""
        import jax

        mesh = jax.sharding.get_mesh()

        def call() -> T:
            with contextlib.nullcontext() if mesh.empty or not self._threads else jax.set_mesh(mesh):
                return function(*args)

        return next(self.ahead(call() for _ in range(1)))

    def ahead(self, items: Generator[T, None, None]) -> Iterator[T]:
        """The items, each made by a thread while the one before is used. Raises Stopped as soon as a stop is requested."""
        if not self._threads:
            yield from items
            return
        if self.requested:
            raise Stopped(NOTHING_LOST)
        inbox, wanted = queue.SimpleQueue[Any](), threading.Semaphore(0)

        def make() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # here and in what is started here, such as data workers
            try:
                with contextlib.closing(items):
                    for item in items:
                        inbox.put([item])
                        del item  # its memory is not held here while it is used
                        wanted.acquire()
                        if closed:
                            return
                inbox.put(StopIteration())
            except BaseException as error:
                inbox.put(error)

        closed, thread = False, threading.Thread(target=make, daemon=True)
        thread.start()
        try:
            while True:
                made = self._next(inbox)
                if isinstance(made, StopIteration):
                    return
                if isinstance(made, BaseException):
                    raise made
                wanted.release()
                yield made.pop()
        finally:
            closed, self._inbox = True, queue.SimpleQueue()  # the next item is of no use
            wanted.release()
            if not self.requested:
                thread.join(timeout=10)  # Python's own end and a thread that ends data workers do not go together

    def _next(self, inbox: queue.SimpleQueue[Any]) -> Any:
        """Waits for what `ahead` has made, [item] or an exception."""
        self._inbox = inbox  # before the question, so that a signal after it is in the inbox
        found = None if self.requested else inbox.get()
        if found is None:
            raise Stopped(NOTHING_LOST)
        return found

    def _handle(self, number: int, _: object) -> None:
        """Also called by a thread, for a program."""
        again = self._interrupted and number == signal.SIGINT
        self._interrupted = self._interrupted or number == signal.SIGINT
        if again and (self.program or self._name):
            leave(130, AT_ONCE)
        elif again:
            raise KeyboardInterrupt
        elif self._name:
            from mim_jax import hosts

            return hosts.tell(self._name)
        self.requested = True
        self._inbox.put(None)
        if self.program and not self.training:
            leave(0, NOTHING_LOST)
        elif not self.training:
            raise Stopped(NOTHING_LOST)

    def _watch(self, wanted: list[signal.Signals]) -> None:
        while True:
            self._handle(signal.sigwait(wanted), None)


def leave(code: int, line: str = "") -> NoReturn:
    """Ends the program at once: other threads may still compile, wait for a file, or wait for a disk that fails."""
    sys.stdout.flush()
    if line:
        start = "\n" if sys.stderr.isatty() else ""  # after a bar of progress, or ^C
        os.write(2, f"{start}{line}\n".encode())  # whatever the main thread is printing
    os._exit(code)
