"""A storm: kills, signals, damaged checkpoints, full disks, poisoned batches, hostile images and folders, counted.

    python tests/storm.py --seed 0 --scale 1 --out docs/reliability.md
    python tests/storm.py --only flips --number 17      # one trial again; several kinds: --only kills flips

It drives the program in processes of its own, with the tiny methods of tests/tiny.py. A trial follows from the seed, its kind
and its number, up to the moment at which the machine runs it. It falls into one class, the first that fits:

    hang        no end within its time, memory beyond its bound, or a process that is left
    traceback   a traceback is printed
    lost        the run is refused, does not go on, or ends with another exit code than it should
    silent      it ends otherwise than it should, or stops or leaves something out, without a word
    survived    none of these
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/tiny.py"
METHODS = ("dino", "mae", "vqvae", "beit")
STEPS = 8
KEYS = ("total=8 steps", "checkpoint.every=2 steps", "checkpoint.keep=3", "eval.every=4 steps")
PHASES = ("start-up", "baselines", "compilation", "data wait", "training", "evaluation", "commit")
KILLS_OF_A_JOB = 5
TIME = 120  # seconds that a process may take
MEMORY, BOUND = 3 * 2**30, 3 * 2**29  # bytes resident: a process with more is ended; one with more has failed
OUTCOMES = ("survived", "lost", "silent", "traceback", "hang")
PROCESSES = 2  # trials at once
TRACES = ("Traceback (most recent call last)", "Fatal Python error", "Exception ignored in", "Exception in thread")


class Failed(Exception):
    """How a trial has failed: an outcome, and what was seen."""

    def __init__(self, outcome: str, what: str):
        super().__init__(what)
        self.outcome = outcome


@dataclasses.dataclass
class Result:
    number: int
    outcome: str = "survived"
    what: str = ""
    trials: int = 1  # a killed run counts its kills
    phases: Sequence[str] = ()


class Storm:
    """What the trials share: a folder, a seed, pictures, and the run of each method that nothing has interrupted."""

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self.lengths: dict[str, float] = {}
        self.reading = threading.Lock()
        folder.chmod(0o755)
        self.images = folder / "images"
        pictures(self.images, 40)
        (self.images / "bad.png").write_bytes(b"no image")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",  # read only: a kill would tear an entry of the cache
        }

    def rng(self, kind: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(kind.encode()), number])

    def reference(self, method: str) -> Path:
        """The workdir of the run that is left alone. A second one must end as it did, and tells how long a run takes."""
        first, second = (self.folder / f"{method}{i}" for i in (1, 2))
        with self.locks[method]:
            if method not in self.lengths:
                for workdir in (first, second):
                    start = time.monotonic()
                    logs = self.folder / f"output_of_{workdir.name}"
                    run = Run(self, workdir, *self.target(method), method=method, logs=logs, environment={FILL_CACHE: "0"})
                    code, output = run.finish(300)
                    if code or workdir == second and not same_run(self, second, first):
                        raise RuntimeError(f"two runs of {method} that are left alone do not end alike: {output}")
                self.lengths[method] = time.monotonic() - start
        return first

    def target(self, method: str) -> list[str]:
        return [f"target.workdir={self.reference('vqvae')}"] if method == "beit" else []


FILL_CACHE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
STARTED: list[subprocess.Popen] = []


def end_all(number: int, _: Any) -> None:
    """A storm that is stopped leaves no process."""
    for process in STARTED:
        process.kill()
    os._exit(128 + number)


class Run:
    """The program in a process and a session of its own.

    Args:
      keys: "KEY=VALUE" of the config.
      phase: with one of `PHASES`, a marker file appears when the run is there, see storm_child.py.
      logs: folder of its output, by default the one that holds the workdir.
      options: of Popen.
    """

    def __init__(
        self,
        storm: Storm,
        workdir: Path,
        *keys: str,
        method: str = "dino",
        phase: str = "",
        images: Path | None = None,
        logs: Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        prefix: Sequence[str] = (),
        **options: Any,
    ):
        logs = logs or workdir.parent
        logs.mkdir(parents=True, exist_ok=True)
        number = next(i for i in itertools.count() if not (logs / f"output{i}.txt").exists())
        self.log, self.marker = logs / f"output{number}.txt", logs / f"phase{number}"
        self.workdir, self.begun, self.phase = workdir, last_step(workdir), phase
        program = ["-m", "mim_jax.main"]
        if phase:
            program = [str(ROOT / "tests/storm_child.py"), phase, str(self.marker)]
        values = [f"data.dir={storm.images if images is None else images}", *KEYS, *keys]
        command = [*prefix, sys.executable, *program, f"--config={TINY}:{method}", f"--workdir={workdir}"]
        command += [f"--config.{value}" for value in values]
        self.started, self.peak = time.monotonic(), 0
        with self.log.open("wb") as log:
            streams: Any = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=storm.environment | dict(environment), start_new_session=True, **streams, **options
            )
        STARTED.append(self.process)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="backslashreplace")

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits so long, for the end or for a condition. Returns whether the process still runs."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end and not until():
            with contextlib.suppress(OSError, ValueError, IndexError):
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                self.peak = max(self.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
            if self.peak > MEMORY:
                self.kill()
                raise Failed("hang", f"takes {self.peak / 2**30:.1f} GiB")
            time.sleep(0.01)
        return self.process.poll() is None

    def finish(self, seconds: float = TIME) -> tuple[int, str]:
        """(exit code, output) at its end, which must come in time, without a traceback, and leave no process."""
        if self.wait(seconds):
            self.kill()
            raise Failed("hang", f"no end within {seconds} s: {tail(self.output)}")
        self.alone()
        no_traceback(self.output)
        return self.process.returncode, self.output

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def alone(self) -> None:
        """Processes that the run started end by themselves."""
        for _ in range(200):
            if not (left := session(self.process.pid)):
                return
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise Failed("hang", f"{len(left)} processes of it still run after 20 s")

    def reach(self, rng: np.random.Generator) -> bool:
        """Waits for a moment within the phase. Returns whether the process still runs."""
        spans = {"start-up": 2.0, "baselines": 0.4, "compilation": 1.0, "evaluation": 0.4, "commit": 0.1}
        conditions = {
            "compilation": lambda: "resuming" in self.output if self.begun else bool(rows_of(self.workdir)),
            "data wait": lambda: self.marker.exists() and last_step(self.workdir) > self.begun,
            "training": lambda: last_step(self.workdir) > self.begun,
        }
        return self.wait(TIME, conditions.get(self.phase, self.marker.exists)) and self.wait(
            0.2 * (self.phase == "start-up") + rng.uniform(0, spans.get(self.phase, 0.1))
        )


def session(leader: int) -> list[int]:
    """The running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] * (int(number) == leader and state != "Z")
    return found


def tail(output: str, lines: int = 3) -> str:
    return " / ".join(output.strip().splitlines()[-lines:])[-400:]


def no_traceback(output: str) -> None:
    if any(trace in output for trace in TRACES):
        raise Failed("traceback", tail(output))


def one_line(code: int, output: str) -> str:
    """The line of an error of the user; fails if it is not one line, the last, with exit code 1."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    if code != 1 or len(lines) != 1 or output.strip().splitlines()[-1] != lines[0]:
        raise Failed("lost" if lines or output else "silent", f"exit code {code}, not one line of an error: {tail(output)}")
    return lines[0]


def finished(code: int, output: str) -> str:
    if code:
        raise Failed("lost", f"exit code {code}: {tail(output)}")
    return output


def rows_of(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole, without the tags that measure time."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append({tag: value for tag, value in json.loads(line).items() if not tag.startswith("perf/")})
    return rows


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in rows_of(workdir)), default=0)


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


@functools.cache
def read_state(path: Path) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of a checkpoint, read without the code under test."""
    import jax
    import orbax.checkpoint as ocp

    leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().restore(path / "state"))
    return {jax.tree_util.keystr(name): bits(leaf) for name, leaf in leaves}


def bits(leaf: Any) -> tuple:
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def same_run(storm: Storm, workdir: Path, reference: Path) -> bool:
    """Whether a finished run has the rows and the last state of the run left alone; fails with what differs."""
    got, want = rows_of(workdir), rows_of(reference)
    if got != want:
        steps = [row["step"] for row in got], [row["step"] for row in want]
        raise Failed("silent", "figures differ" if steps[0] == steps[1] else f"rows of the steps {steps[0]}, not {steps[1]}")
    if saved_steps(workdir)[-1:] != [STEPS]:
        raise Failed("silent", f"checkpoints of the steps {saved_steps(workdir)} at the end")
    with storm.reading:  # Orbax is asked by one thread at a time
        state, true = read_state(workdir / f"checkpoints/{STEPS}"), read_state(reference / f"checkpoints/{STEPS}")
    if state != true:
        raise Failed("silent", f"the last state differs in {[name for name in true if state.get(name) != true[name]][:3]}")
    return True


def pictures(folder: Path, count: int, seed: int = 0, side: int = 16) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side + i % 5, 3), np.uint8)).save(folder / f"{i}.png")


# Kills. A job is a run that is killed, started again, and at last left to end; after its end another one begins.


def kills(storm: Storm, number: int, folder: Path) -> Result:
    rng, method = storm.rng("kills", number), METHODS[number % 4]
    reference, result = storm.reference(method), Result(number, trials=0, phases=[])
    workers = "data.workers=2" if number % 10 == 4 else "data.workers=0"
    runs = (folder / f"run{i}" for i in itertools.count())
    workdir = next(runs)

    def start(phase: str = "") -> Run:  # every second run of BEiT trains its tokenizer first
        own = [f"target.workdir={workdir}_tokenizer", f"target.network.total={STEPS} steps"]
        target = own if number % 8 == 7 else storm.target(method)
        return Run(storm, workdir, workers, *target, method=method, phase=phase)

    try:
        while result.trials < KILLS_OF_A_JOB:
            begun = bool(rows_of(workdir))
            phase = str(rng.choice([p for p in PHASES if not (begun and p == "baselines")])) if rng.random() < 0.5 else ""
            run = start(phase)
            if run.reach(rng) if phase else run.wait(rng.uniform(0, storm.lengths[method])):
                run.kill()
                result.trials += 1
                result.phases = [*result.phases, phase or "any time"]
                run.alone()
                no_traceback(run.output)
            else:
                finished(*run.finish())
                same_run(storm, workdir, reference)
                workdir = next(runs)
        finished(*start().finish())
        same_run(storm, workdir, reference)
    except Failed as failed:
        result.outcome, result.what, result.trials = failed.outcome, f"{method}: {failed}", max(result.trials, 1)
    return result


# Signals: SIGTERM and Ctrl-C in each phase, and Ctrl-C twice.

SIGNALS = [(phase, number) for phase in PHASES for number in (signal.SIGTERM, signal.SIGINT) for _ in range(5)]


def signals(storm: Storm, number: int, folder: Path, times: int = 1) -> Result:
    phase, sent = SIGNALS[number] if times == 1 else (PHASES[number % len(PHASES)], signal.SIGINT)
    rng, method = storm.rng("signals" if times == 1 else "twice", number), METHODS[number % 3]
    reference = storm.reference(method)
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if phase == "compilation" else {}
    for attempt in range(5):
        workdir = folder / f"run{attempt}"
        run = Run(storm, workdir, method=method, phase=phase, environment=environment)
        if not run.reach(rng):
            finished(*run.finish())
            continue
        for _ in range(times):
            run.process.send_signal(sent)
            time.sleep(0.05)
        code, output = run.finish(60)
        if code == 0 and "report: " in output:  # the signal came too late
            continue
        break
    else:
        raise Failed("lost", f"five runs ended before the signal: {method}, {phase}")
    what = f"{method}, {sent.name} in {phase}, {run.begun}: exit code {code}: {tail(output)}"
    if times == 1 and "goes on from there" not in output:
        raise Failed("silent" if code <= 0 else "lost", what)
    if code if times == 1 else code < 0:
        raise Failed("lost", what)
    finished(*Run(storm, workdir, method=method).finish())
    same_run(storm, workdir, reference)
    return Result(number)


def twice(storm: Storm, number: int, folder: Path) -> Result:
    return signals(storm, number, folder, times=2)


# Damaged checkpoints: most trials restore a copy in one process, a sample goes through the whole program.


def damage_by_flip(path: Path, rng: np.random.Generator) -> str:
    """Flips a bit of a checkpoint: of any file, of the record, or anywhere by size, at equal shares."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = np.array([file.stat().st_size for file in files])
    shares = [np.full(len(files), 1 / len(files)), sizes / sizes.sum()]
    record = np.array(["record" in str(file.relative_to(path)) for file in files], float)
    shares.append(record * sizes / (record * sizes).sum())
    file = files[rng.choice(len(files), p=shares[rng.integers(3)])]
    content = bytearray(file.read_bytes())
    place, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {file.relative_to(path)} flipped"


CUTS = ("deleted", "emptied", "cut in half", "filled with zeros")


def damage_by_cut(path: Path, rng: np.random.Generator, number: int) -> str:
    """Damages one file or folder of a checkpoint, each in turn."""
    files = sorted(file for file in path.rglob("*"))
    file = files[number // len(CUTS) % len(files)]
    how = CUTS[number % len(CUTS)]
    if file.is_dir():
        shutil.rmtree(file)
        return f"folder {file.relative_to(path)} deleted"
    size = file.stat().st_size
    if how == "deleted":
        file.unlink()
    elif how == "filled with zeros":
        file.write_bytes(bytes(size))
    else:
        os.truncate(file, 0 if how == "emptied" else int(size * rng.uniform(0.3, 0.7)))
    return f"{file.relative_to(path)} {how}"


def damage(kind: str, path: Path, rng: np.random.Generator, number: int) -> str:
    return damage_by_cut(path, rng, number) if "cuts" in kind else damage_by_flip(path, rng)


def damaged_command(kind: str, storm: Storm, number: int, folder: Path) -> Result:
    """The whole program goes on from the checkpoint before the last, damaged; the last one is not there."""
    method = METHODS[number % 4]
    reference = storm.reference(method)
    workdir = shutil.copytree(reference, folder / "run")
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    what = damage(kind, workdir / f"checkpoints/{STEPS - 2}", storm.rng(kind, number), number)
    try:
        output = finished(*Run(storm, workdir, *storm.target(method), method=method).finish())
        if f"resuming after step {STEPS - 2} " not in output and "set aside" not in output and "cannot be read" not in output:
            raise Failed("silent", f"an earlier step was taken without a word: {tail(output, 9)}")
        same_run(storm, workdir, reference)
    except Failed as failed:
        raise Failed(failed.outcome, f"{method}, {what}: {failed}") from None
    return Result(number)


flips_command = functools.partial(damaged_command, "flips_command")
cuts_command = functools.partial(damaged_command, "cuts_command")


def restores(spec: dict) -> Iterator[tuple[int, str, str]]:
    """Trials of `flips` and `cuts` in one process: (number, outcome, what). The library restores a damaged copy."""
    import jax
    import ml_collections

    from mim_jax.checkpoint import Checkpoints
    from mim_jax.methods.base import make_method
    from mim_jax.sharding import make_mesh
    from mim_jax.state import abstract_state

    storm = Storm(spec["seed"], Path(spec["folder"]))

    @functools.cache
    def known(method: str) -> tuple:
        """(config, shapes, {step: (bits of its state, record)}) of the run left alone."""
        workdir = Path(spec["references"][method])
        config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
        abstract, true = abstract_state(make_method(config), config), {}
        for step in saved_steps(workdir)[-2:]:
            with tempfile.TemporaryDirectory(dir=storm.folder) as copy:
                shutil.copytree(workdir / f"checkpoints/{step}", Path(copy) / f"checkpoints/{step}")
                with Checkpoints(copy, config) as checkpoints:
                    state, record = checkpoints.restore(abstract)
                assert int(state.step) == step and set(map(bits, jax.tree.leaves(state))) == set(
                    read_state(workdir / f"checkpoints/{step}").values()
                )
                true[step] = [bits(leaf) for leaf in jax.tree.leaves(state)], json.dumps(record, sort_keys=True)
        return config, abstract, true

    def trial(number: int, folder: Path) -> tuple[str, str]:
        config, abstract, true = known(method := METHODS[number % 4])
        shutil.copytree(Path(spec["references"][method]) / "checkpoints", folder / "checkpoints")
        what = f"{method}, " + damage(spec["kind"], folder / f"checkpoints/{STEPS}", storm.rng(spec["kind"], number), number)
        try:
            with stderr_to(folder / "told"), Checkpoints(folder, config) as checkpoints:
                state, record = checkpoints.restore(abstract)
        except Exception as error:
            return "lost", f"{what}: refused: {type(error).__name__}: {str(error)[:200]}"
        words = (folder / "told").read_text()
        step = int(state.step)
        if step not in true:
            return "silent", f"{what}: the state says step {step}"
        leaves, true_record = true[step]
        if leaves != [bits(leaf) for leaf in jax.tree.leaves(state)]:
            return "silent", f"{what}: wrong numbers"
        if json.dumps(record, sort_keys=True) != true_record:
            return "silent", f"{what}: a wrong record"
        if step != STEPS and "set aside" not in words and "cannot be read" not in words:
            return "silent", f"{what}: step {step} was taken without a word"
        return "survived", what

    with jax.set_mesh(make_mesh(1, 1)):
        for number in spec["numbers"]:
            folder = storm.folder / f"{spec['kind']}_{number}"
            outcome, what = trial(number, folder)
            if outcome == "survived":
                shutil.rmtree(folder)
            yield number, outcome, what


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes to a file."""
    before = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


# Full disks.

SHARES = (0.05, 0.35, 0.65, 0.95)  # of what a finished run takes


def can_mount() -> bool:
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def disk(storm: Storm, number: int, folder: Path) -> Result:
    """A run meets a full disk, and goes on when there is room."""
    rng, method = storm.rng("disk", number), METHODS[number % 3]
    reference, share = storm.reference(method), SHARES[number % 4]
    sizes = [file.stat().st_size for file in reference.rglob("*") if file.is_file()]
    mounted, options = can_mount(), {}
    place = folder / "disk"
    place.mkdir()
    if mounted:  # files take whole pages of 4 KiB
        size = int(rng.uniform(0.8, 1) * share * sum(-(-size // 4096) * 4096 for size in sizes)) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    else:
        size = int(rng.uniform(0.8, 1) * share * max(sizes))
        options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    what = f"{method}, {size / 2**20:.2f} MiB, {share:.0%} of the run"
    try:
        workdir = place / "run"
        code, output = Run(storm, workdir, method=method, logs=folder, **options).finish()
        if code == 0:
            same_run(storm, workdir, reference)
            return Result(number, what=f"{what}: it fitted")
        one_line(code, output)
        kept = saved_steps(workdir)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=256m", place], check=True)
        output = finished(*Run(storm, workdir, method=method, logs=folder).finish())
        if kept and f"resuming after step {kept[-1]} " not in output:
            raise Failed("lost", f"the checkpoint of step {kept[-1]} was not used: {tail(output, 9)}")
        same_run(storm, workdir, reference)
    except Failed as failed:
        raise Failed(failed.outcome, f"{what}: {failed}") from None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=False)
    return Result(number)


# Poisoned batches: what is not finite must leave the state as it was, to the bit.

POISONS = (
    *(f"{what} in {where} of a view" for where in ("one value", "all values") for what in ("nan", "inf", "-inf", "huge")),
    *(f"{what} in the loss" for what in ("nan", "inf", "-inf")),
    *(f"{what} in {where}" for where in ("one gradient", "all gradients") for what in ("nan", "inf", "-inf", "huge")),
    *(f"{what} in {where}" for where in ("one update", "all updates") for what in ("nan", "inf", "-inf")),
    *(f"nan in the {where}" for where in ("teacher", "extra", "optimizer's averages")),
    "no poison",
)  # fmt: skip
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38, "no": 0.0}
DTYPES = ("float32", "bfloat16", "float16")
POISONED = [(method, dtype, i) for method in ("dino", "vqvae") for dtype in DTYPES for i in range(len(POISONS))]


def poisons(spec: dict) -> Iterator[tuple[int, str, str]]:
    """Trials of `poison` in one process: (number, outcome, what)."""
    import jax
    import jax.numpy as jnp
    import optax

    from mim_jax import init_state, load_config, make_method, make_train_step
    from mim_jax.sharding import make_mesh

    def put(tree: Any, value: Any, place: Any, hit: Any, everywhere: Any) -> Any:
        """A tree with `value` at a place in 0..1 of one of its leaves of floats, or everywhere, if `hit`."""
        leaves, structure = jax.tree.flatten(tree)
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and leaf.size]
        for number, i in enumerate(floats):
            leaf = leaves[i]
            here = everywhere | (jnp.int32(place * len(floats)) == number)
            spots = everywhere | (jnp.arange(leaf.size) == jnp.int32(place * leaf.size)).reshape(leaf.shape)
            value_here = jnp.clip(value, -0.9 * jnp.finfo(leaf.dtype).max, 0.9 * jnp.finfo(leaf.dtype).max)
            value_here = jnp.where(jnp.isfinite(value), value_here, value).astype(leaf.dtype)
            leaves[i] = jnp.where(hit & here & spots, value_here, leaf)
        return jax.tree.unflatten(structure, leaves)

    @functools.lru_cache(maxsize=1)
    def known(name: str, dtype: str) -> tuple:
        """(step, state, views) of a method whose parts look at views["poison"], the number of a poison."""
        config = load_config(f"{TINY}:{name}").unlock()
        config.total, config.seed = "8 steps", spec["seed"]
        config.optim.freeze_last_layer = "0 steps"
        if "dtype" in config.model:
            config.model.dtype = dtype
        method, now = make_method(config), {}
        mix, loss, after, optimizer = method.mix, method.loss, method.after_update, method.optimizer

        def where(words: str) -> dict[str, Any]:
            """For `put`: whether the poison of this batch is one of `words`, and what it is."""
            numbers = [i for i, text in enumerate(POISONS) if words in text]
            everywhere = jnp.isin(now["poison"], jnp.array([i for i, text in enumerate(POISONS) if " all " in text]))
            return dict(
                value=now["value"], place=now["place"], hit=jnp.isin(now["poison"], jnp.array(numbers)), everywhere=everywhere
            )

        @jax.custom_vjp
        def poisoned_gradient(params, how):
            return params

        poisoned_gradient.defvjp(
            lambda params, how: (params, how),
            lambda how, gradient: (put(gradient, **how), jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0)
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.zeros_like(x), how)),
        )  # fmt: skip

        def new_mix(views, key):
            now.update({word: views[word] for word in ("poison", "place", "value")})
            views = {word: views[word] for word in views if word not in now}
            return mix(put(views, **where("of a view")), key)

        def new_loss(params, *rest):
            value, rest = loss(poisoned_gradient(params, where("gradient")), *rest)
            return put(value, **where("in the loss")), rest

        def update(*args, **kwargs):
            updates, state = optimizer.update(*args, **kwargs)
            return put(updates, **where("update")), put(state, **where("averages"))

        def new_after(state):
            state = after(state)
            return dataclasses.replace(
                state, teacher=put(state.teacher, **where("teacher")), extra=put(state.extra, **where("extra"))
            )

        for key, value in {"mix": new_mix, "loss": new_loss, "after_update": new_after}.items():
            object.__setattr__(method, key, value)
        object.__setattr__(method, "optimizer", optax.GradientTransformationExtraArgs(optimizer.init, update))
        rng, canvas = np.random.default_rng(0), config.data.canvas
        shapes = method.views.batch_shapes(8, canvas)
        batch = {word: np.zeros(shape.shape, shape.dtype) for word, shape in shapes.items()}
        batch |= {"image": rng.integers(0, 256, batch["image"].shape, np.uint8), "size": batch["size"] + canvas}
        batch |= method.views.example_masks(8) if method.views.masks.on_host else {}
        views = jax.jit(lambda batch: method.views.make(batch, jax.random.key(0)))(batch)
        return make_train_step(method, config), jax.device_get(init_state(method, config)[0]), views

    def trial(number: int) -> tuple[str, str]:
        name, dtype, poison = POISONED[number]
        step, before, views = known(name, dtype)
        text, rng = POISONS[poison], np.random.default_rng([spec["seed"], number])
        value = VALUES[text.split()[0]]
        extras = {"poison": jnp.int32(poison), "place": jnp.float32(rng.uniform(0, 0.999)), "value": jnp.float32(value)}
        after, metrics = jax.device_get(step(jax.tree.map(jnp.array, before), {}, views | extras))
        what, skipped = f"{name} in {dtype}, {text}", bool(metrics["train/skipped"])
        old, new = ([bits(leaf) for leaf in jax.tree.leaves(dataclasses.replace(s, step=0))] for s in (before, after))
        same = old == new and int(after.step) == int(before.step) + 1
        finite = all(np.isfinite(leaf.astype(np.float64)).all() for leaf in jax.tree.leaves(after))
        if ("nan" in text or "inf" in text) and not skipped and old != new and not finite:
            return "silent", f"{what}: the state is not finite"
        if skipped and not same:
            return "silent", f"{what}: the state has changed, though the step was skipped"
        if not finite:
            return "silent", f"{what}: the state is not finite"
        if text == "no poison" and (skipped or old == new):
            return "lost", f"{what}: a good step was skipped"
        return "survived", what

    with jax.set_mesh(make_mesh(1, 1)):
        for number in spec["numbers"]:
            outcome, what = trial(number)
            yield number, outcome, what


WORK = {"flips": restores, "cuts": restores, "poison": poisons}
SILENCE = 240  # seconds within which a trial in a shared process must end


def together(kind: str, storm: Storm, numbers: Sequence[int]) -> Iterator[Result]:
    """Many trials in one process, which is started anew after one that ends it or takes too long."""
    todo = list(numbers)
    names = dict.fromkeys(METHODS[number % 4] for number in numbers) if kind != "poison" else ()
    spec: dict[str, Any] = {"work": kind, "kind": kind, "seed": storm.seed, "folder": str(storm.folder / kind)}
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        spec["references"] = dict(zip(names, map(str, pool.map(storm.reference, names))))
    (storm.folder / kind).mkdir()
    while todo:
        command = [sys.executable, __file__, "--child", json.dumps(spec | {"numbers": todo})]
        with (storm.folder / f"{kind}.txt").open("a") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=storm.environment | {FILL_CACHE: "0"}, stdout=subprocess.PIPE, stderr=log, text=True
            )
        STARTED.append(process)
        while todo:
            watch = threading.Timer(SILENCE, process.kill)
            watch.start()
            line = process.stdout.readline()
            in_time = watch.is_alive()
            watch.cancel()
            if not line:
                break
            number, outcome, what = json.loads(line)
            todo.remove(number)
            yield Result(number, outcome, what)
        process.wait()
        if todo:
            what = f"it ended the process: {tail((storm.folder / f'{kind}.txt').read_text(), 8)}"
            yield Result(todo.pop(0), *(("traceback", what) if in_time else ("hang", f"no end within {SILENCE} s")))


# Hostile images, each among 24 good ones.


def gradient(side: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


def sixteen_bits(scale: int) -> Image.Image:
    return Image.fromarray((np.arange(256, dtype=np.uint16) * scale).reshape(16, 16))


def truncated(path: Path) -> None:
    gradient(64).save(path, "JPEG")
    os.truncate(path, path.stat().st_size // 2)


def bomb(path: Path) -> None:
    Image.new("1", (25_000, 25_000)).save(path, "PNG")


def sparse(path: Path) -> None:
    gradient().save(path, "JPEG")
    os.truncate(path, 3 * 2**30)


def bad_sum(path: Path) -> None:
    gradient().save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[45] ^= 255
    path.write_bytes(content)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as at, contextlib.chdir(path.parent):
        at.bind(path.name)


def saved(image: Callable[[], Image.Image], kind: str, **settings: Any) -> Callable[[Path], None]:
    return lambda path: image().save(path, kind, **settings)


def pages(path: Path) -> None:
    gradient().save(path, "TIFF", save_all=True, append_images=[gradient(), gradient()])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n{ } loop\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
# name -> (file, what makes it, what the output must match or "" if the image is a good one)
IMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a FIFO": ("hostile.png", os.mkfifo, "hostile"),
    "a link to /dev/zero": ("hostile.png", lambda path: path.symlink_to("/dev/zero"), "hostile"),
    "a link to /dev/random": ("hostile.jpg", lambda path: path.symlink_to("/dev/random"), "hostile"),
    "a socket": ("hostile.png", socket_at, "hostile"),
    "a link to nothing": ("hostile.png", lambda path: path.symlink_to("nothing"), "hostile"),
    "a link to itself": ("hostile.png", lambda path: path.symlink_to(path.name), "hostile"),
    "a folder named as an image": ("hostile.png", Path.mkdir, ""),
    "a sparse file of 3 GiB": ("hostile.jpg", sparse, "hostile"),
    "an empty file": ("hostile.png", Path.touch, "hostile"),
    "a text": ("hostile.jpg", lambda path: path.write_text("no image"), "hostile"),
    "zeros": ("hostile.png", lambda path: path.write_bytes(bytes(2**20)), "hostile"),
    "an EPS that loops": ("hostile.png", lambda path: path.write_bytes(EPS), "hostile"),
    "an SVG": ("hostile.png", lambda path: path.write_bytes(SVG), "hostile"),
    "a PDF": ("hostile.jpg", saved(gradient, "PDF"), "hostile"),
    "a truncated JPEG": ("hostile.jpg", truncated, "hostile"),
    "a PNG of 625 megapixels": ("hostile.png", bomb, "hostile"),
    "a PNG with a bad sum": ("hostile.png", bad_sum, "hostile"),
    "a TIFF of three pages": ("hostile.tif", pages, "pages?|frames?"),
    "grey of 12 bits": ("hostile.png", saved(lambda: sixteen_bits(16), "PNG"), "more than 8 bits|hostile"),
    "grey of 32 bits": ("hostile.tif", saved(lambda: sixteen_bits(16).convert("I"), "TIFF"), "more than 8 bits|hostile"),
    "grey of floats with NaN": (
        "hostile.tif", saved(lambda: Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"), "hostile"
    ),
    "CMYK": ("hostile.jpg", saved(lambda: gradient().convert("CMYK"), "JPEG"), ""),
    "one bit": ("hostile.png", saved(lambda: gradient().convert("1"), "PNG"), ""),
    "a palette with transparency": ("hostile.png", saved(lambda: gradient().convert("P"), "PNG", transparency=0), ""),
    "broken EXIF": ("hostile.jpg", saved(gradient, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), ""),
    "one pixel": ("hostile.png", saved(lambda: gradient(1), "PNG"), ""),
    "20,000 by 1 pixels": ("hostile.png", saved(lambda: Image.new("RGB", (20_000, 1), "red"), "PNG"), ""),
    "control characters in its name": ("hostile\x1b]0;x\x07\r\n.png", Path.touch, "hostile"),
    "a name that is no UTF-8": (b"hostile\xff\xfe.png".decode(errors="surrogateescape"), Path.touch, "hostile"),
    "a name of markup": ("hostile<script>alert(1)<&script>.png", Path.touch, "hostile"),
}  # fmt: skip


def images(storm: Storm, number: int, folder: Path) -> Result:
    what = list(IMAGES)[number]
    name, make, words = IMAGES[what]
    data = folder / "images"
    pictures(data, 24)
    make(data / name)
    try:
        output = within_memory(storm, folder, data, "total=4 steps")
        if words and not re.search(words, output.replace(str(data), "")):
            raise Failed("silent", f"nothing was said of it: {tail(output, 9)}")
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output):
            raise Failed("silent", "control characters were printed")
    except Failed as failed:
        raise Failed(failed.outcome, f"{what}: {failed}") from None
    return Result(number)


def within_memory(storm: Storm, folder: Path, data: Path, *keys: str, error: bool = False, **options: Any) -> str:
    """The output of a run that ends well (`error`: that may end in one line) and takes no more memory than it should."""
    environment = {FILL_CACHE: "0"} | options.pop("environment", {})
    run = Run(storm, folder / "run", *keys, images=data, environment=environment, **options)
    code, output = run.finish()
    if run.peak > BOUND:
        raise Failed("hang", f"took {run.peak / 2**30:.1f} GiB")
    if code and error:
        return one_line(code, output)
    return finished(code, output)


# Hostile folders: what makes one, and what must be found in it.


@dataclasses.dataclass
class Found:
    """What must be read: numbers of images and classes, and a pattern that the output must have or must not have."""

    images: int = -1
    classes: int = -1
    words: str = ""
    never: str = ""
    error: bool = False  # one line of an error is right, too
    keys: Sequence[str] = ()


def classes(root: Path, *names: str, count: int = 10) -> None:
    for number, name in enumerate(names):
        pictures(root / name, count, seed=number + zlib.crc32(str(root).encode()) % 1000)


def link(path: Path, to: str) -> None:
    path.symlink_to(to)


def each(*steps: Any) -> None:
    """Evaluates its arguments in order: several statements for a lambda."""


NO_SCORE = r"k-NN\s+\d\.\d{3}"
FOLDERS: dict[str, tuple[Callable[[Path], Any], Found]] = {
    "a class called train": (lambda r: classes(r, "bus", "car", "train"), Found(30, 3)),
    "a class called test": (lambda r: classes(r, "exam", "quiz", "test"), Found(30, 3, error=True)),
    "Train and Test": (lambda r: each(classes(r / "Train", "a", "b"), classes(r / "Test", "a", "b", count=4)), Found(20, 2)),
    "training and testing": (
        lambda r: each(classes(r / "training", "a", "b"), classes(r / "testing", "a", "b", count=4)), Found(20, 2, error=True)),
    "train and valid": (
        lambda r: each(classes(r / "train", "a", "b"), classes(r / "valid", "a", "b", count=4)), Found(20, 2)),
    "train and a flat test": (
        lambda r: each(classes(r / "train", "a", "b"), pictures(r / "test", 8, 99)),
        Found(20, 2, words="label|class", never=NO_SCORE, keys=["data.eval_split=test"], error=True)),
    "test with other classes": (
        lambda r: each(classes(r / "train", "a", "b"), classes(r / "test", "c", "d", count=4)),
        Found(20, words="label|class", never=NO_SCORE, keys=["data.eval_split=test"], error=True)),
    "test with one class": (
        lambda r: each(classes(r / "train", "a", "b"), classes(r / "test", "a", count=8)),
        Found(20, words="label|class", never=NO_SCORE, keys=["data.eval_split=test"], error=True)),
    "a link to its parent": (lambda r: each(classes(r, "a", "b"), link(r / "a/back", "..")), Found(20, 2)),
    "two links to each other": (
        lambda r: each(classes(r, "a", "b"), link(r / "a/b", "../b"), link(r / "b/a", "../a")), Found(20, 2)),
    "a link to a sibling": (lambda r: each(classes(r, "a", "b"), link(r / "c", "a")), Found(20, 2)),
    "two links to the root": (lambda r: each(classes(r, "a"), link(r / "a/x", ".."), link(r / "a/y", "..")), Found(10)),
    "one stray picture": (lambda r: each(classes(r, "a", "b"), pictures(r, 1, 99)), Found(classes=2)),
    "one folder around all": (lambda r: classes(r / "pictures", "a", "b"), Found(20, 2)),
    "__MACOSX and empty folders": (
        lambda r: each(classes(r, "a", "b"), (r / "__MACOSX/a").mkdir(parents=True),
                       (r / "__MACOSX/a/._0.png").write_bytes(b"x"), (r / "none").mkdir()), Found(20, 2)),
    "a folder without permission": (
        lambda r: each(classes(r, "a", "b"), (r / "b").chmod(0)), Found(words="b|permission", error=True)),
    "a file without permission": (
        lambda r: each(classes(r, "a", "b"), (r / "b/0.png").chmod(0)), Found(words="0.png|permission")),
    "no images": (lambda r: r.mkdir(), Found(words="[Nn]o images", error=True)),
    "texts only": (lambda r: each(r.mkdir(), (r / "a.txt").touch()), Found(words="[Nn]o images", error=True)),
    "no folder": (lambda r: None, Found(words="no folder", error=True)),
    "a file, not a folder": (lambda r: r.write_text("x"), Found(words="folder", error=True)),
    "three images": (lambda r: pictures(r, 3), Found(words="few", error=True)),
    "only bad images": (
        lambda r: each(r.mkdir(), *((r / f"{i}.png").touch() for i in range(20))), Found(words="bad", error=True)),
    "a misspelt split": (
        lambda r: classes(r / "train", "a", "b"), Found(words="tset", error=True, keys=["data.split=tset"])),
    "a split where there are none": (
        lambda r: classes(r, "a", "b"), Found(words="tset", error=True, keys=["data.eval_split=tset"])),
    "a part of a split": (
        lambda r: classes(r / "train", "a", "b"), Found(words=r"train\[:50%\]", error=True, keys=["data.split=train[:50%]"])),
    "endings that Pillow reads": (
        lambda r: each(pictures(r, 20), gradient().save(r / "x.jfif", "JPEG"), gradient().save(r / "y.tga")), Found(22)),
    "a data set called CIFAR10": (lambda r: r.mkdir(), Found(words="cifar10", error=True, keys=["data.name=CIFAR10"])),
    "a data set called imagefolder": (
        lambda r: pictures(r, 20), Found(words="data.name=folder|'folder'", error=True, keys=["data.name=imagefolder"])),
    "all constant": (
        lambda r: each(r.mkdir(), *(Image.new("RGB", (16, 16), "grey").save(r / f"{i}.png") for i in range(30))),
        Found(30, words="constant")),
    "all of 12 bits": (
        lambda r: each(r.mkdir(), *(sixteen_bits(15 + i % 2).save(r / f"{i}.png") for i in range(30))),
        Found(30, words="levels")),
    "floats from 0 to 1000": (
        lambda r: each(r.mkdir(), *(Image.fromarray(np.float32(sixteen_bits(4))).save(r / f"{i}.tif") for i in range(30))),
        Found(30, words="levels")),
    "the workdir in the data": (lambda r: classes(r, "a", "b"), Found(20, 2)),
}  # fmt: skip


def folders(storm: Storm, number: int, folder: Path) -> Result:
    what = list(FOLDERS)[number]
    make, found = FOLDERS[what]
    data, options = folder / "images", {}
    make(data)
    if "permission" in what and os.geteuid() == 0:  # root may read all
        options = {"prefix": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]}
    elsewhere = data / "runs" if what == "the workdir in the data" else folder
    try:
        for _ in range(2 if elsewhere == data / "runs" else 1):
            keys = ["total=4 steps", *found.keys]
            output = within_memory(storm, elsewhere, data, *keys, error=found.error, logs=folder, **options)
            if elsewhere == data / "runs":
                shutil.move(elsewhere / "run", elsewhere / "before")  # another run sees the first one's pictures
        complaint = complaints(output, found, str(folder))
        if complaint:
            raise Failed("silent", f"{complaint}: {tail(output, 99)}")
    except Failed as failed:
        raise Failed(failed.outcome, f"{what}: {failed}") from None
    finally:
        if (data / "b").is_dir():
            (data / "b").chmod(0o755)
    return Result(number)


def complaints(output: str, found: Found, folder: str) -> str:
    """What is wrong with what a run says of its data; "" if nothing is."""
    if found.words and not re.search(found.words, output.replace(folder, "")):
        return f"nothing of {found.words!r} is said"
    if found.never and re.search(found.never, output):
        return "a score of nothing"
    if output.startswith("error: "):
        return ""
    read = re.search(r"\(([\d,]+) image", output)
    labels = re.search(r"([\d,]+) classes", output)
    if found.images >= 0 and (not read or int(read[1].replace(",", "")) != found.images):
        return f"{read and read[1]} images and not {found.images}"
    if found.classes >= 0 and (int(labels[1]) if labels else 0) != found.classes:
        return f"{labels[1] if labels else 0} classes and not {found.classes}"
    return ""


# Workdirs: two runs in one, one that is removed, names, and what changes behind a run.


def two_runs(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    first = Run(storm, folder / "run", phase="data wait")
    first.reach(rng)
    try:
        line = one_line(*Run(storm, folder / "run").finish())
    finally:
        first.kill()
    if "is in use" not in line:
        raise Failed("lost", line)
    finished(*Run(storm, folder / "run").finish())
    same_run(storm, folder / "run", storm.reference("dino"))


def two_at_once(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    runs = [Run(storm, folder / "run") for _ in range(2)]
    ends = [run.finish() for run in runs]
    refused = [end for end in ends if end[0]]
    if len(refused) != 1 or "is in use" not in one_line(*refused[0]):
        raise Failed("silent" if not refused else "lost", f"exit codes {[code for code, _ in ends]}")
    same_run(storm, folder / "run", storm.reference("dino"))


def removed(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    run = Run(storm, folder / "runs/run", phase=("evaluation", "commit")[int(rng.integers(2))], logs=folder)
    run.reach(rng)
    shutil.rmtree(folder / "runs/run", ignore_errors=True)
    one_line(*run.finish())


def named(name: str) -> Callable[[Storm, Path, np.random.Generator], None]:
    def trial(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
        code, output = Run(storm, folder / name, logs=folder).finish()
        if code:
            one_line(code, output)
            return
        finished(*Run(storm, folder / name, logs=folder).finish())
        same_run(storm, folder / name, storm.reference("dino"))

    return trial


def keep_none(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    code, output = Run(storm, folder / "run", "checkpoint.keep=0").finish()
    if not code:
        same_run(storm, folder / "run", storm.reference("dino"))
    else:
        one_line(code, output)


def other_images(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    shutil.copytree(storm.images, folder / "images")
    run = Run(storm, folder / "run", phase="evaluation", images=folder / "images")
    run.reach(rng)
    run.kill()
    for number in rng.choice(40, 20, replace=False):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"images/{number}.png")
    code, output = Run(storm, folder / "run", images=folder / "images").finish()
    if code:
        one_line(code, output)
    elif not re.search("other images|images.* (changed|differ|are other)|fingerprint", output):
        raise Failed("silent", f"other images behind a run that goes on: {tail(output, 9)}")


def moved_images(storm: Storm, folder: Path, rng: np.random.Generator) -> None:
    run = Run(storm, folder / "run", phase="evaluation")
    run.reach(rng)
    run.kill()
    shutil.copytree(storm.images, folder / "elsewhere/images")
    finished(*Run(storm, folder / "run", images=folder / "elsewhere/images").finish())
    same_run(storm, folder / "run", storm.reference("dino"))


WORKDIRS: dict[str, Callable[[Storm, Path, np.random.Generator], None]] = {
    "a second run": two_runs,
    "two runs at once": two_at_once,
    "a workdir that is removed": removed,
    "checkpoint.keep=0": keep_none,
    "other images behind a run": other_images,
    "the same images elsewhere": moved_images,
    **{f"a workdir called {name!r}": named(name) for name in ("a[1]", "a*", "a?b", "{x}", "a b", "ä%20#", "-a", "a:b", "a\nb")},
}


def workdirs(storm: Storm, number: int, folder: Path) -> Result:
    what = list(WORKDIRS)[number % len(WORKDIRS)]
    try:
        WORKDIRS[what](storm, folder, storm.rng("workdirs", number))
    except Failed as failed:
        raise Failed(failed.outcome, f"{what}: {failed}") from None
    return Result(number)


# All together.


@dataclasses.dataclass
class Kind:
    """What is tried: a function for each number, or None where many trials share a process; how many jobs at scale 1."""

    words: str
    trial: Callable[[Storm, int, Path], Result] | None
    jobs: int
    seconds: float  # of a job, about, on one of two cores


KINDS = {
    "kills": Kind("kill -9, at any time and aimed at each phase", kills, 200 // KILLS_OF_A_JOB, 32),
    "signals": Kind("SIGTERM and Ctrl-C in each phase", signals, len(SIGNALS), 13),
    "twice": Kind("Ctrl-C twice within 50 ms", twice, len(PHASES), 13),
    "flips": Kind("one bit of a checkpoint flipped, restored", None, 1000, 0.15),
    "flips_command": Kind("the same, the run goes on", flips_command, 20, 6),
    "cuts": Kind("a file of a checkpoint deleted, emptied, cut or zeroed, restored", None, 400, 0.15),
    "cuts_command": Kind("the same, the run goes on", cuts_command, 20, 6),
    "disk": Kind("a full disk, of four sizes", disk, 16, 12),
    "poison": Kind("NaN, infinite and huge values in a step, three dtypes", None, len(POISONED), 0.3),
    "images": Kind("a hostile image among good ones", images, len(IMAGES), 6),
    "folders": Kind("a hostile folder", folders, len(FOLDERS), 7),
    "workdirs": Kind("workdirs shared, removed, oddly named; images that change", workdirs, len(WORKDIRS), 14),
}


def run_kind(name: str, storm: Storm, numbers: Sequence[int]) -> list[Result]:
    kind = KINDS[name]
    if kind.trial is None:
        return list(shown(name, together(name, storm, numbers)))

    def job(number: int) -> Result:
        folder = storm.folder / f"{name}_{number}"
        folder.mkdir()
        try:
            result = kind.trial(storm, number, folder)
        except Failed as failed:
            result = Result(number, failed.outcome, str(failed))
        except Exception:  # of the storm itself: told as a failure
            result = Result(number, "lost", f"the storm failed: {traceback.format_exc()}")
        if result.outcome == "survived":
            shutil.rmtree(folder, ignore_errors=True)
        return result

    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        return list(shown(name, pool.map(job, numbers)))


def shown(name: str, results: Iterator[Result]) -> Iterator[Result]:
    for result in results:
        if result.outcome != "survived":
            print(f"  {name} {result.number}: {result.outcome}: {' '.join(result.what.split())}", file=sys.stderr, flush=True)
        yield result


def count(results: Sequence[Result]) -> dict[str, int]:
    """Trials and outcomes. Of a run that was killed several times and went wrong, each kill counts as failed."""
    trials = {outcome: sum(r.trials for r in results if r.outcome == outcome) for outcome in OUTCOMES}
    return {"trials": sum(trials.values())} | trials


COLUMNS = {name: name for name in ("trials", *OUTCOMES)} | {"traceback": "tracebacks", "hang": "hangs"}
BEGIN, END = "<!-- storm: begin -->", "<!-- storm: end -->"


def row(name: str, numbers: dict[str, int], seconds: float) -> str:
    cells = [f"`{name}`", KINDS[name].words, *(f"{numbers[c]:,}" for c in COLUMNS), f"{seconds / 60:.1f}"]
    return "| " + " | ".join(cells) + " |"


def table(old: str, new: dict[str, str], seed: int) -> str:
    """The table with these rows; kinds that were not run now keep their row of `old`."""
    rows = {line.split("`")[1]: line for line in old.splitlines() if line.startswith("| `")} | new
    names = ["kind", "what", *COLUMNS.values(), "minutes"]
    lines = ["| " + " | ".join(names) + " |", "| --- | --- |" + " ---: |" * (len(names) - 2)]
    lines += [rows[name] for name in KINDS if name in rows]
    cells = [[float(cell.replace(",", "")) for cell in line.split("|")[3:-1]] for line in lines[2:]]
    *sums, minutes = map(sum, zip(*cells))
    lines.append("| all | | " + " | ".join(f"{number:,.0f}" for number in sums) + f" | {minutes:.1f} |")
    return "\n".join([f"Seed {seed}; {facts()}.", "", *lines])


def replace_table(file: Path, new: dict[str, str], seed: int) -> None:
    before, _, rest = file.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n{table(old, new, seed)}\n{END}{after}")


def facts() -> str:
    from mim_jax import checkpoint

    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.versions().items())
    return f"{datetime.date.today()}, {os.cpu_count()} CPU cores, {checkpoint.devices()}; {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds")
    parser.add_argument("--number", type=int, help="this trial alone")
    parser.add_argument("--out", type=Path, help="a file whose table is replaced, between two marker lines")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[0] = str(ROOT)
    if args.child:  # a process that trials share
        spec = json.loads(args.child)
        for number, outcome, what in WORK[spec["work"]](spec):
            print(json.dumps([number, outcome, what]), flush=True)
        return 0
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_all)
    warnings.filterwarnings("ignore", "Sharding info not provided", UserWarning)  # of a state that is read to be compared
    storm = Storm(args.seed, Path(tempfile.mkdtemp(prefix="storm")).resolve())
    plan = {}
    for name in args.only:
        jobs = KINDS[name].jobs
        chosen = storm.rng(name, -1 % 2**32).permutation(jobs)[: max(1, round(jobs * min(args.scale, 1)))]
        plan[name] = sorted(chosen.tolist()) if args.number is None else [args.number]
    shares = {name: len(numbers) * KINDS[name].seconds for name, numbers in plan.items()}
    estimate = sum(s if KINDS[name].trial is None else s / PROCESSES for name, s in shares.items()) + 60
    print(f"about {estimate / 60:.0f} minutes; in {storm.folder}", file=sys.stderr, flush=True)
    rows, bad = dict[str, str](), 0
    for name, numbers in plan.items():
        start = time.monotonic()
        results = run_kind(name, storm, numbers)
        counts, seconds = count(results), time.monotonic() - start
        rows[name] = row(name, counts, seconds)
        bad += counts["trials"] - counts["survived"]
        words = ", ".join(f"{COLUMNS[c]} {number}" for c, number in counts.items())
        aims = collections.Counter(phase for result in results for phase in result.phases)
        words += f"; aimed at: {', '.join(f'{phase} {number}' for phase, number in aims.most_common())}" if aims else ""
        print(f"{name}: {words}; {seconds:.0f} s", file=sys.stderr, flush=True)
        if args.out:
            replace_table(args.out, rows, args.seed)
    print(table("", rows, args.seed))
    if bad:
        print(f"{bad} trials have failed; what they left is in {storm.folder}", file=sys.stderr)
    else:
        shutil.rmtree(storm.folder)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
