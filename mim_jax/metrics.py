"""What a run tells while it goes: metrics.jsonl, TensorBoard events, a progress bar, a stopwatch. First process only.

Tags: `train/...`, `health/...`, `eval/...`, `perf/...`.
"""

import builtins
import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm.auto import tqdm

FILE = "metrics.jsonl"


class Writer:
    """Writes figures to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

    metrics.jsonl holds one JSON object a line: `step` and tags as keys. A value that is not finite is written as null
    (JSON has no NaN; pandas reads it as NaN). Lines are handed to the system whole and at once: a killed process loses
    none.

    A run that resumes from step s goes on after the last line of step s: later lines, and one torn by the kill, are cut
    off, so that every step is there once. For this to hold, write what belongs to step s before saving its checkpoint.

    TensorBoard's file is written here and now, too, instead of by `SummaryWriter`'s thread: that one dies unheard of a
    full disk, and the run then waits for it forever.

    Raises:
        OSError: naming the path, when something cannot be written (full disk, no permission).
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        """`resume_step`: the checkpoint's step; None starts over, forgetting what an earlier run wrote here."""
        self.path = Path(workdir) / FILE
        self._lines: TextIO | None = None
        if jax.process_index() != 0:
            return
        with _named_errors(self.path):
            board = Path(workdir) / "tensorboard"
            board.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read(workdir) if resume_step is not None and row["step"] <= resume_step]
            draft = self.path.with_suffix(".tmp")
            draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
            draft.replace(self.path)
            self._lines = self.path.open("a", buffering=1)
            self._events = EventsWriter(str(board / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
            # TensorBoard hides what older files say about this step and later ones.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(0 if resume_step is None else resume_step + 1, session_log=start)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line. `values`: tag -> number or array of one element (which is fetched from its device)."""
        if self._lines is None:
            return
        figures = {tag: float(value) for tag, value in values.items()}
        with _named_errors(self.path):
            finite = {tag: value if math.isfinite(value) else None for tag, value in figures.items()}
            self._lines.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
            scalars = [summary.scalar(tag, value).value[0] for tag, value in finite.items() if value is not None]
            self._event(step, summary=summary_pb2.Summary(value=scalars))

    def picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """Shows a picture in TensorBoard and keeps the latest as `workdir/pictures/{tag}.png`, for the report."""
        if self._lines is None:
            return
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG")
        path = self.path.parent / "pictures" / f"{tag}.png"
        with _named_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            draft.write_bytes(encoded.getvalue())
            draft.replace(path)
            image = summary_pb2.Summary.Image(
                height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
            )
            self._event(step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=image)]))

    def text(self, name: str, text: str) -> None:
        """Keeps a text as `workdir/{name}`."""
        if self._lines is None:
            return
        with _named_errors(self.path.parent / name):
            (self.path.parent / name).write_text(text)

    def close(self) -> None:
        if self._lines is not None:
            with _named_errors(self.path):
                self._lines.close()
                self._events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, step: int, **what: Any) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=int(step), **what))
        self._events.flush()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl` in order ([] if there is none); one that is not whole is left out."""
    path = Path(workdir) / FILE
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def latest(workdir: str | os.PathLike) -> dict[str, Any]:
    """The last value of every tag, and of `step`, in `workdir/metrics.jsonl`; None where that was not finite."""
    return {tag: value for row in read(workdir) for tag, value in row.items()}


def inherit(old: str | os.PathLike, new: str | os.PathLike) -> None:
    """Copies what the run in one workdir has told to another workdir, where it goes on. First process only."""
    if jax.process_index() != 0:
        return
    with _named_errors(Path(new)):
        shutil.copy(Path(old) / FILE, Path(new) / FILE)
        shutil.copytree(Path(old) / "pictures", Path(new) / "pictures", dirs_exist_ok=True)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write the run's figures: {error.strerror}", str(path)) from error


class Progress:
    """A bar on a terminal or in a notebook; elsewhere (a log file) one line for each `report`."""

    # tag -> how it is shown.
    SHOWN: Mapping[str, Callable[[float], str]] = {
        "train/loss": lambda value: f"loss {value:.4f}",
        "perf/images_per_s": lambda value: f"{value:,.0f} images/s",
        "eval/knn": lambda value: f"k-NN {value:.3f}",
        "eval/view_retrieval": lambda value: f"view retrieval {value:.3f}",
    }

    def __init__(self, total_steps: int, start: int = 0, file: TextIO | None = None):
        """`start`: steps done before (a resumed run). `file`: where to write, standard error by default."""
        self.total, self.step, self._shown = total_steps, start, dict[str, float]()
        self._file = sys.stderr if file is None else file
        self._began: tuple[int, float] | None = None
        self._active = jax.process_index() == 0
        self._bar = None
        if self._active and (self._file.isatty() or hasattr(builtins, "__IPYTHON__")):
            layout = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
            self._bar = tqdm(total=total_steps, initial=start, file=self._file, dynamic_ncols=True, bar_format=layout)

    def advance(self, step: int) -> None:
        """`step` steps are done. Waits for nothing; call it at every step."""
        if self._began is None:  # the first step is compilation
            self._began = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def report(self, values: Mapping[str, Any]) -> None:
        """Shows the latest figures: what of `values` belongs here, beside what was shown before of other tags."""
        self._shown.update({tag: float(values[tag]) for tag in self.SHOWN if tag in values})
        told = [show(self._shown[tag]) for tag, show in self.SHOWN.items() if tag in self._shown]
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(told))
        else:
            self.say(" | ".join([f"step {self.step}/{self.total}", *told, f"ETA {self._eta()}"]))

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._active:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eta(self) -> str:
        if self._began is None or self.step <= self._began[0]:
            return "?"
        seconds = (time.monotonic() - self._began[1]) / (self.step - self._began[0]) * (self.total - self.step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Stopwatch:
    """Images per second of training alone: compilation and evaluation run under `with stopwatch.paused():`.

    Steps run ahead of the host: wait for one (fetch its loss) before `lap`, and before and inside a pause.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._images, self._since = 0, clock()

    def count(self, images: int) -> None:
        """`images` (of the global batch) were trained on."""
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - start

    def lap(self) -> float | None:
        """Images per second since the last lap, None if there were none; starts the next lap."""
        now = self._clock()
        seconds, images = now - self._since, self._images
        self._images, self._since = 0, now
        return images / seconds if images and seconds > 0 else None
