"""What a run writes while it goes on: figures, progress, pictures, texts. Only the first process writes.

Tags of figures: `train/...`, `health/...`, `eval/...`, `perf/...`, `data/...`.
"""

import builtins
import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import jax
from PIL import Image
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm.auto import tqdm

from mim_jax import storage

FILE = "metrics.jsonl"
AT_START = "features_at_start.npz"  # of a run with `continue_from`
POINTS = 300  # of a curve at most; even
EVERY = 60.0  # seconds after which what is new is written to an address

# tag -> how the progress shows it
SHOWN: Mapping[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {value:.4f}",
    "perf/images_per_s": lambda value: f"{value:,.0f} images/s",
    "eval/accuracy": lambda value: f"accuracy {value:.3f}",
    "eval/knn": lambda value: f"k-NN {value:.3f}",
    "eval/view_retrieval": lambda value: f"view retrieval {value:.3f}",
}


class Curve:
    """A series of any length in bounded memory: at most POINTS points and an open one at the end.

    Each point is the mean of `size` neighbors; the open one is the mean of those that came after. When all points are taken,
    neighbors are merged and the size doubles, so all points have the same weight at any time.
    """

    def __init__(self) -> None:
        self.size = 1
        self._whole: list[tuple[float, float]] = []
        self._open = (0, 0.0, 0.0)  # how many, sum of x, sum of y

    def add(self, x: float, y: float) -> None:
        if len(self._whole) == POINTS:
            pairs = zip(self._whole[::2], self._whole[1::2], strict=True)
            self._whole, self.size = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs], 2 * self.size
        count, sum_x, sum_y = self._open
        self._open = count + 1, sum_x + x, sum_y + y
        if count + 1 == self.size:
            self._whole.append(self._mean())
            self._open = (0, 0.0, 0.0)

    def points(self) -> list[tuple[float, float]]:
        return [*self._whole, self._mean()] if self._open[0] else list(self._whole)

    def _mean(self) -> tuple[float, float]:
        count, sum_x, sum_y = self._open
        return sum_x / count, sum_y / count


class History:
    """What the report shows of the figures so far, in bounded memory: the last value and the curve of each tag.

    `latest`: tag (and `step`) -> last value, None where it was not finite; `steps`: tag -> the step of that value.
    `curves`: tag -> Curve of its finite values.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.steps: dict[str, int] = {}
        self.curves: dict[str, Curve] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """`row`: a line of metrics.jsonl."""
        self.latest |= row
        self.steps |= dict.fromkeys(row, row["step"])
        for tag, value in row.items():
            if tag != "step" and value is not None:
                self.curves.setdefault(tag, Curve()).add(row["step"], value)


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Writes a run's figures to `workdir/metrics.jsonl` and `workdir/tensorboard`, and its progress to standard error.

    metrics.jsonl has one JSON object a line: `step`, and tags as keys. A value that is not finite is written as null (JSON
    has no NaN; pandas reads null as NaN). Each line is written at once and whole: a killed process loses none.

    A run that resumes after step s drops the lines of later steps, and one that a kill cut short. So each step is logged
    exactly once, provided that the figures of a step are written before its checkpoint.

    At an address, where nothing can be appended to, lines are kept for up to EVERY seconds: call `flush` before a checkpoint.

    `history` is what metrics.jsonl holds, as the report needs it: no row is read again while the run goes on.

    Progress is a bar on a terminal or in a notebook, and one line for each `show` elsewhere.

    Raises:
        OSError: naming the path, when something cannot be written (full disk, no permission).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        batch_size: int = 1,
        resume_step: int | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        held: Callable[[], None] = lambda: None,
    ):
        """`resume_step`: of the checkpoint; None drops what an earlier run wrote here. `file`: in place of standard error.
        `held`: called before lines are written to an address; raises OSError if the workdir is another run's by now."""
        self.workdir, self.total, self.batch_size = storage.absolute(workdir), total_steps, batch_size
        self.step, self._held, self._at_once = resume_step or 0, held, not storage.remote(self.workdir)
        self._clock, self._file = clock, sys.stderr if file is None else file
        self._start: tuple[int, float] | None = None  # (step, time) after the first step of this process, which compiles
        self._lap: tuple[int, float] | None = None  # the same at the last `images_per_s`, moved on by pauses
        self._shown: dict[str, float] = {}
        self._bar = None
        self.history = History()
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self.path = self.workdir / FILE
        with named_errors(self.path):
            board = self.workdir / "tensorboard"
            lost, there = list[str](), storage.parts(self.path)
            for part in there or [self.path]:
                with replacing(part) as draft:
                    for row in rows_of(part, lost.append) if there and resume_step is not None else ():
                        if row["step"] <= self.step:
                            draft.write(json.dumps(row).encode() + b"\n")
                            self.history.add(row)
            if self._at_once:
                board.mkdir(parents=True, exist_ok=True)
            self._lines: Any = self.path.open("a", buffering=1) if self._at_once else storage.Parts(self.path)
            self._written = clock()
            # Written directly: the thread of tensorboardX's SummaryWriter dies of a full disk, and the run then waits for ever.
            self._events = EventsWriter(str(board / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
            # TensorBoard hides what older files hold from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(0 if resume_step is None else resume_step + 1, session_log=start)
        if lost:
            self.print(f"{self.path}: {len(lost):,} damaged lines are left out, such as {lost[0][:60]!r}")
        elif resume_step and not there:
            self.print(f"there is no {self.path}: the figures up to step {resume_step:,} are lost")
        if self._file.isatty() or hasattr(builtins, "__IPYTHON__"):
            layout = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
            self._bar = tqdm(total=total_steps, initial=self.step, file=self._file, dynamic_ncols=True, bar_format=layout)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Appends one line. `figures`: tag -> number or array of one element."""
        if not self._active:
            return
        values = {tag: float(value) for tag, value in figures.items()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        row = {"step": int(step), **finite}
        with named_errors(self.path):
            if self._at_once and not os.fstat(self._lines.fileno()).st_nlink:
                raise OSError(errno.ENOENT, "it was removed")
            self._lines.write(json.dumps(row, allow_nan=False) + "\n")
            self.history.add(row)
            scalars = [summary.scalar(tag, value).value[0] for tag, value in finite.items() if value is not None]
            self._event(step, summary=summary_pb2.Summary(value=scalars))
        if not self._at_once and self._clock() - self._written > EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes what has not been written yet to an address. On a disk all is there at once."""
        if self._active and not self._at_once:
            self._held()
            with named_errors(self.path):
                self._lines.flush()
                self._events.flush()
            self._written = self._clock()

    def picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """Shows a picture in TensorBoard and keeps the latest as `workdir/pictures/{tag}.png`, for the report."""
        if not self._active:
            return
        file = io.BytesIO()
        picture.save(file, format="PNG")
        png, (width, height) = file.getvalue(), picture.size
        self.save(f"pictures/{tag}.png", png)
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        with named_errors(self.path):
            self._event(step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=image)]))

    def save(self, name: str, content: bytes) -> None:
        """Writes `workdir/{name}`, whole or not at all."""
        if self._active:
            with named_errors(self.workdir / name):
                write_whole(self.workdir / name, content)

    def advance(self, step: int) -> None:
        """`step` steps are finished. Call it at every step."""
        if self._start is None:
            self._start = self._lap = step, self._clock()
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def images_per_s(self) -> float | None:
        """Training images per second since the last call, without pauses; None for the first step, which is compilation."""
        if self._lap is None or self.step == self._lap[0]:
            return None
        (step, since), now = self._lap, self._clock()
        self._lap = self.step, now
        return (self.step - step) * self.batch_size / max(now - since, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of an evaluation or a checkpoint out of `images_per_s`. Wait for the last step first."""
        start = self._clock()
        try:
            yield
        finally:
            if self._lap is not None:
                self._lap = self._lap[0], self._lap[1] + self._clock() - start

    def show(self, figures: Mapping[str, Any]) -> None:
        """Shows the progress with those of `figures` that are in SHOWN, beside the latest of the others."""
        self._shown.update({tag: float(figures[tag]) for tag in SHOWN if tag in figures})
        shown = [write(self._shown[tag]) for tag, write in SHOWN.items() if tag in self._shown]
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(shown))
        else:
            self.print(" | ".join([f"step {self.step}/{self.total}", *shown, f"ETA {self._eta()}"]))

    def print(self, text: str) -> None:
        """Prints a line without breaking the bar. What the output cannot encode is written as an escape."""
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._active:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self.flush()
        if self._active:
            with named_errors(self.path):
                self._lines.close()
                self._events.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, step: int, **what: Any) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=int(step), **what))
        if self._at_once:
            self._events.flush()

    def _eta(self) -> str:
        if self._start is None or self.step <= self._start[0]:
            return "?"
        seconds = (self._clock() - self._start[1]) / (self.step - self._start[0]) * (self.total - self.step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rows(workdir: str | os.PathLike, on_bad: Callable[[str], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl` in order (none without the file), one at a time. A line that is not whole, or that
    is no row of numbers, is left out; `on_bad` is called with it."""
    for part in storage.parts(storage.absolute(workdir) / FILE):
        yield from rows_of(part, on_bad)


def rows_of(part: Path, on_bad: Callable[[str], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """As `rows`, of one file."""
    with part.open("rb") as file:
        for line in file:
            text = line.decode(errors="replace")
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_figure, row.values())):
                yield row
            elif text.endswith("\n"):  # not cut short by a kill
                on_bad(text)


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All rows of `workdir/metrics.jsonl`, see `rows`, for a notebook."""
    return list(rows(workdir))


def history(workdir: str | os.PathLike) -> History:
    """Of the rows of `workdir/metrics.jsonl`, which are read once."""
    found = History()
    for row in rows(workdir):
        found.add(row)
    return found


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def inherit(old: Path, new: Path) -> None:
    """Copies figures, pictures and features at the start of a run to the workdir where it goes on. First process only."""
    if jax.process_index() == 0:
        with named_errors(new):
            if there := storage.parts(old / FILE):
                write_whole(new / FILE, b"".join(part.read_bytes() for part in there))
            if (old / AT_START).is_file():
                write_whole(new / AT_START, (old / AT_START).read_bytes())
            for picture in (old / "pictures").glob("*"):
                write_whole(new / "pictures" / picture.name, picture.read_bytes())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A draft of a file, which takes the file's place at the end of the block, whole and on the disk: neither a kill nor a
    crash of the machine leaves half of the file. An error leaves the old one; what a kill leaves of a draft, the next one
    overwrites. At an address a file is written in one piece anyway."""
    if storage.remote(path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file at once, see `replacing`."""
    with replacing(path) as file:
        file.write(content)


def fresh_folder(path: str | os.PathLike) -> None:
    """Raises ValueError if files written to this folder could replace others: if it is not empty, or no folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give --out a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; give --out a new folder")


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Names the path in the OSError of anything that cannot be written."""
    try:
        yield
    except Exception as error:
        if storage.remote(path):
            raise OSError(f"cannot write {path}: {storage.reason(error)}") from error
        if not isinstance(error, OSError):
            raise
        if error.errno is None:  # NumPy's, of an array that was not written whole
            raise OSError(errno.ENOSPC, f"cannot write: {error}; is the disk full?", str(path)) from error
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


class _Records:
    """Writes TensorBoard's records to an address, see `Parts`. Those of tensorboardX write all of a file for each record."""

    @staticmethod
    def open(path: str) -> storage.Parts:
        return storage.Parts(storage.absolute(path))

    @staticmethod
    def directory_check(path: str) -> None:
        pass


for scheme in storage.PACKAGES:
    record_writer.register_writer_factory(scheme, _Records)
