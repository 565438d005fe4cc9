"""What a run writes while it goes on: figures, progress, pictures, texts. Only the first process writes.

Tags of figures: `train/...`, `health/...`, `eval/...`, `perf/...`, `data/...`.
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

# tag -> how the progress shows it
SHOWN: Mapping[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {value:.4f}",
    "perf/images_per_s": lambda value: f"{value:,.0f} images/s",
    "eval/knn": lambda value: f"k-NN {value:.3f}",
    "eval/view_retrieval": lambda value: f"view retrieval {value:.3f}",
}


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Writes a run's figures to `workdir/metrics.jsonl` and `workdir/tensorboard`, and its progress to standard error.

    metrics.jsonl has one JSON object a line: `step`, and tags as keys. A value that is not finite is written as null (JSON
    has no NaN; pandas reads null as NaN). Each line is written at once and whole: a killed process loses none.

    A run that resumes after step s drops the lines of later steps, and one that a kill cut short. So each step is logged
    exactly once, provided that the figures of a step are written before its checkpoint.

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
    ):
        """`resume_step`: of the checkpoint; None drops what an earlier run wrote here. `file`: in place of standard error."""
        self.workdir, self.total, self.batch_size, self.step = Path(workdir), total_steps, batch_size, resume_step or 0
        self._clock, self._file = clock, sys.stderr if file is None else file
        self._start: tuple[int, float] | None = None  # (step, time) after the first step of this process, which compiles
        self._lap: tuple[int, float] | None = None  # the same at the last `images_per_s`, moved on by pauses
        self._shown: dict[str, float] = {}
        self._bar = None
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self.path = self.workdir / FILE
        with named_errors(self.path):
            board = self.workdir / "tensorboard"
            board.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read(workdir) if resume_step is not None and row["step"] <= resume_step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self._lines = self.path.open("a", buffering=1)
            # Written directly: the thread of tensorboardX's SummaryWriter dies of a full disk, and the run then waits for ever.
            self._events = EventsWriter(str(board / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
            # TensorBoard hides what older files hold from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(0 if resume_step is None else resume_step + 1, session_log=start)
        if self._file.isatty() or hasattr(builtins, "__IPYTHON__"):
            layout = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
            self._bar = tqdm(total=total_steps, initial=self.step, file=self._file, dynamic_ncols=True, bar_format=layout)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Appends one line. `figures`: tag -> number or array of one element."""
        if not self._active:
            return
        values = {tag: float(value) for tag, value in figures.items()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with named_errors(self.path):
            self._lines.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
            scalars = [summary.scalar(tag, value).value[0] for tag, value in finite.items() if value is not None]
            self._event(step, summary=summary_pb2.Summary(value=scalars))

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
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._active:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._active:
            with named_errors(self.path):
                self._lines.close()
                self._events.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, step: int, **what: Any) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=int(step), **what))
        self._events.flush()

    def _eta(self) -> str:
        if self._start is None or self.step <= self._start[0]:
            return "?"
        seconds = (self._clock() - self._start[1]) / (self.step - self._start[0]) * (self.total - self.step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl` in order ([] without the file); a line that is not whole is left out."""
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
    """The last value of every tag, and of `step`, in `workdir/metrics.jsonl`; None where it was not finite."""
    return {tag: value for row in read(workdir) for tag, value in row.items()}


def inherit(old: Path, new: Path) -> None:
    """Copies figures and pictures of a run to the workdir where it goes on. First process only."""
    if jax.process_index() == 0:
        with named_errors(new):
            shutil.copy(old / FILE, new / FILE)
            shutil.copytree(old / "pictures", new / "pictures", dirs_exist_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file at once: a reader, or a run that is killed here, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_bytes(content)
    draft.replace(path)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Names the path in the OSError of anything that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
