"""Bad images of all processes of a run: how many there were, and which."""

import collections

import jax
import numpy as np

from mim_jax.data.pipeline import NAMED
from mim_jax.journal import Journal
from mim_jax.sharding import global_batch, replicate

BYTES = 1024  # of names that a process tells the others at a time
LONGEST = 255  # bytes of a name; of a longer one the others are told the end


class BadImages:
    """Counts every bad image that was replaced, in all processes. The first process prints each name once.

    A process tells the others its count and its new names when `share` or `total` is called, in one small array. Names that
    find no room there go with the next call.
    """

    def __init__(self, log: Journal, before: int = 0):
        """`before`: how many were counted before this process began."""
        self._log, self._named, self._news = log, set[str](), collections.deque[bytes]()
        self.own = before if jax.process_index() == 0 else 0  # of the batches that this process has been given
        self._names: jax.Array | None = None  # what the last `share` brought, when it has arrived

    def count(self, row: int, name: str) -> None:
        """An image was replaced by another one: `on_bad` of the training."""
        self.own += 1
        self.name(row, name)

    def name(self, row: int, name: str) -> None:
        """The same without counting: `on_bad` of the evaluation, which reads the same images again and again."""
        if name in self._named or len(self._named) > NAMED:
            return
        self._named.add(name)
        if len(self._named) > NAMED:
            self._log.print(f"more than {NAMED:,} images are bad; further ones are counted but not named")
        elif jax.process_index() == 0:
            self._log.print(f"bad image, replaced by another one: {name}")
        else:
            encoded = name.encode(errors="backslashreplace")
            self._news.append(encoded if len(encoded) <= LONGEST else b"..." + encoded[3 - LONGEST :])

    def share(self, own: int) -> jax.Array | int:
        """The count of all processes, each giving its `own`, at the same steps; waits for no device.

        The names of the others are printed at the next call.
        """
        if jax.process_count() == 1:
            return own
        self._print_names()
        counts = np.zeros(jax.local_device_count(), np.int32)
        names = np.zeros((len(counts), BYTES), np.uint8)
        counts[0] = own
        told = b""
        while self._news and len(told) + len(self._news[0]) < BYTES:
            told += self._news.popleft() + b"\0"
        names[0, : len(told)] = np.frombuffer(told, np.uint8)
        total, self._names = _gather(global_batch({"counts": counts, "names": names}))
        return total

    def total(self, own: int) -> int:
        """As `share`; prints all names that the processes have told."""
        total = int(self.share(own))
        self._print_names()
        return total

    def _print_names(self) -> None:
        if self._names is not None and jax.process_index() == 0:
            for name in np.asarray(self._names).tobytes().split(b"\0"):
                if name:
                    self.name(-1, name.decode(errors="replace"))
        self._names = None


@jax.jit
def _gather(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return replicate((batch["counts"].sum(), batch["names"]))
