"""Runs that are killed, stopped, moved or refused, and go on as if nothing had happened."""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from mim_jax import checkpoint, command, journal, load_config, state, step, train
from mim_jax.checkpoint import Checkpoints, differences, digests, newest, record_digest
from mim_jax.config import leaves
from mim_jax.data import pipeline, sources
from mim_jax.journal import Journal
from mim_jax.learned import load_run
from mim_jax.lock import locked
from mim_jax.methods.base import make_method
from mim_jax.sharding import make_mesh
from mim_jax.state import abstract_state
from mim_jax.stopping import Stopped
from mim_jax.views import Views

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests/tiny.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of 42 images, two of which are bad."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16 + i % 5, 3), np.uint8)).save(folder / f"{i}.png")
    for i in (5, 25):
        (folder / f"{i}_bad.png").write_bytes(b"no image")
    return folder


def rows_of(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, which must all be whole, without the tags that measure time."""
    rows = [json.loads(line) for line in (workdir / journal.FILE).read_text().splitlines()]
    return [{tag: value for tag, value in row.items() if not tag.startswith("perf/")} for row in rows]


def saved_state(workdir: Path, step: int | None = None) -> dict:
    """The state in a checkpoint, the latest by default, read without the code under test."""
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state",)) as manager:
        step = manager.latest_step() if step is None else step
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def saved_record(workdir: Path) -> dict:
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return json.loads((newest / "record/metadata").read_text())


def measured(workdir: Path) -> dict:
    """What a run has set in its config.data."""
    return {key: saved_record(workdir)["config"]["data"][key] for key in ("num_examples", "fingerprint")}


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), jax.tree_util.keystr(path)


def assert_same_run(workdir: Path, uninterrupted: Path, last_step: int):
    rows = rows_of(workdir)
    assert rows == rows_of(uninterrupted)
    assert [row["step"] for row in rows if "train/skipped" in row] == list(range(1, last_step + 1))
    got = saved_state(workdir)
    assert got["step"] == last_step
    assert {"params", "teacher", "opt_state", "extra"} < got.keys()
    assert_same_bits(got, saved_state(uninterrupted))


# Runs as they are started, in processes of their own.

STEPS = 30


class Runs:
    """Starts the same run in any workdir, with what was compiled before."""

    def __init__(self, images: Path, folder: Path):
        self.images, self.folder = images, folder
        self.environment = os.environ | {
            "JAX_ENABLE_COMPILATION_CACHE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir: Path, *overrides: str, **kwargs) -> subprocess.Popen:
        command = [sys.executable, "-m", "mim_jax.main", f"--config={TINY}", f"--workdir={workdir}"]
        command += [f"--config.data.dir={self.images}", f"--config.total={STEPS} steps", "--config.crops.local_crops_number=0"]
        command += ["--config.eval.every=10 steps", *overrides]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True, **kwargs)

    def finish(self, run: subprocess.Popen) -> str:
        _, output = run.communicate(timeout=300)
        assert run.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> Runs:
    return Runs(images, tmp_path_factory.mktemp("runs"))


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in journal.read(workdir)), default=0)


def wait(run: subprocess.Popen, until: Callable[[], bool]) -> None:
    """Looks every few milliseconds, for minutes."""
    for _ in range(60_000):
        if until() or run.poll() is not None:
            return
        time.sleep(0.005)
    raise TimeoutError


@pytest.fixture(scope="module")
def stopped(runs) -> Path:
    """The workdir of the first run of all, which got SIGTERM while its step was compiled."""
    workdir = runs.folder / "stopped"
    run = runs.start(workdir)
    wait(run, lambda: bool(journal.read(workdir)))  # the baselines
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    output = runs.finish(run)
    assert f"stopped after step {saved_state(workdir)['step']} of {STEPS}; the same command goes on from there\n" in output
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(runs, stopped) -> Path:
    workdir = runs.folder / "uninterrupted"
    output = runs.finish(runs.start(workdir))
    assert output.count("bad image") == 2 and "25_bad.png" in output  # each is named once
    return workdir


def test_images_without_labels_are_measured_by_view_retrieval(uninterrupted):
    tags = set().union(*rows_of(uninterrupted))
    assert {"eval/view_retrieval", "eval/view_retrieval_baseline_untrained", "eval/view_retrieval_baseline_pixels"} <= tags
    assert not any("knn" in tag or "probe" in tag for tag in tags)
    report = (uninterrupted / "report.html").read_text()
    assert "no labels" in report and "View retrieval" in report


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_stopped_and_killed_ends_as_one_left_alone(runs, stopped, uninterrupted, kills):
    workdir = shutil.copytree(stopped, runs.folder / f"killed_{kills}")
    killed = 0
    for _ in range(kills):  # one in five while it starts, the others at any moment of a step, a checkpoint or an evaluation
        run = runs.start(workdir)
        if random.random() < 0.2:
            time.sleep(random.uniform(0, 10))
        else:
            steps = last_step(workdir) + random.randint(0, STEPS // kills)
            wait(run, lambda steps=steps: last_step(workdir) > steps)
            time.sleep(random.uniform(0, 0.1))
        run.kill()
        output = run.communicate()[1]
        assert run.returncode in (-signal.SIGKILL, 0), output  # 0: on a fast machine it may get to its end before
        killed += run.returncode != 0
    assert killed
    runs.finish(runs.start(workdir))
    assert_same_run(workdir, uninterrupted, last_step=STEPS)


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_stopped_and_killed_ends_as_one_on_a_disk(runs, uninterrupted, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "environment", runs.environment | os.environ)
    workdir, killed = bucket / "killed", 0
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL):
        run = runs.start(workdir)
        before = max(checkpoint.saved_steps(workdir / "checkpoints"), default=-1)
        wait(run, lambda before=before: max(checkpoint.saved_steps(workdir / "checkpoints"), default=-1) > before + 4)
        time.sleep(random.uniform(0, 0.5))
        run.send_signal(end)
        run.communicate(timeout=300)
        killed += run.returncode == -signal.SIGKILL
    assert killed
    assert f"{workdir} was not left by process {run.pid} on" in runs.finish(runs.start(workdir))
    (tmp_path / journal.FILE).write_bytes((workdir / journal.FILE).read_bytes())
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    assert_same_bits(saved_state(workdir), saved_state(uninterrupted))
    assert "view retrieval" in (workdir / "report.html").read_text().lower()


def test_a_full_disk_is_one_message_and_exit_code_1(runs, stopped):
    workdir = shutil.copytree(stopped, runs.folder / "full")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    run = runs.start(workdir, preexec_fn=limit)
    output = run.communicate(timeout=300)[1]
    assert run.returncode == 1
    assert "mim_jax/train.py" not in output  # no traceback of ours; Orbax's threads may print some of their event loop
    kept = saved_state(stopped)["step"]
    words = f"^error: writing a checkpoint to {workdir}/checkpoints failed: .*The checkpoint of step {kept} is whole"
    assert re.search(words, output, re.MULTILINE)
    assert_same_bits(saved_state(workdir), saved_state(stopped))


# The same loop in this process, compiled once and without real evaluators. Half of the batches are poisoned.

QUICK_STEPS = 12
POISON = 4  # of a batch that holds one of the first so many images, every view is NaN


@pytest.fixture(scope="module")
def patched():
    """Lets `train.run` take a moment."""
    steps, states, make = {}, {}, Views.make

    def poisoned_views(views, batch, key):
        poisoned = jnp.min(batch["index"]) < POISON
        return {name: jnp.where(poisoned, jnp.nan, view) for name, view in make(views, batch, key).items()}

    def training(config):
        """What of the config the step is made of."""
        keys = dict(leaves(checkpoint.as_dict(config)))
        return str({key: value for key, value in keys.items() if key == "total" or not checkpoint.MAY_CHANGE.fullmatch(key)})

    def make_train_step(method, config):
        if training(config) not in steps:
            steps[training(config)] = step.make_train_step(method, config)
        return steps[training(config)]

    def first_state(method, config):
        if training(config) not in states:
            states[training(config)] = state.first_state(method, config)
        return jax.tree.map(jnp.copy, states[training(config)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "make", poisoned_views)
        patch.setattr(train, "make_train_step", make_train_step)
        patch.setattr(train, "first_state", first_state)
        patch.setattr(train, "Evaluation", StubEvaluation)
        patch.setattr(train.sharding, "make_mesh", lambda *args: make_mesh(1, 1, jax.devices()[:1]))
        yield


@pytest.fixture
def quick(images, patched) -> ml_collections.ConfigDict:
    return quick_config(images)


def quick_config(images: Path) -> ml_collections.ConfigDict:
    config = load_config(TINY).unlock()
    config.data.dir = str(images)
    config.total = f"{QUICK_STEPS} steps"
    config.crops.local_crops_number = 0
    config.eval.every = "4 steps"
    return config


@pytest.fixture(scope="module")
def whole(images, patched, tmp_path_factory) -> Path:
    """The workdir of a quick run that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    train.run(quick_config(images), workdir)
    return workdir


@pytest.fixture(scope="module")
def half(images, patched, tmp_path_factory) -> Path:
    """The workdir of a quick run that was stopped in its middle."""
    workdir = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "batch", 6, terminate)
        train.run(quick_config(images), workdir)
    return workdir


class StubEvaluation:
    sizes, good, unlabeled, warning = (1, 1), 1, "", ""

    def __init__(self, config, method, source, held_out, on_bad):
        self.method, self.source = method, source

    def baselines(self, state):
        return {"eval/view_retrieval_baseline_untrained": 0.0}

    def scores(self, state):
        return {"eval/view_retrieval": float(jax.nn.sigmoid(state.params["backbone"]["cls_token"].sum()))}

    def few_labels(self, state):
        return {}

    mistakes = similarity = few_labels

    def crop_picture(self):
        return Image.new("RGB", (8, 8))

    def pictures(self, state, target):
        yield "neighbors", Image.new("RGB", (8, 8))


def interrupt(monkeypatch, where: str, number: int, action: Callable[[], None]) -> None:
    """Does `action` once: before the call of that number, from 0, of what `where` names."""
    owner, name = {
        "batch": (train.sharding, "global_batch"),
        "row": (Journal, "write"),
        "baselines": (StubEvaluation, "baselines"),
        "scores": (StubEvaluation, "scores"),
        "compile": (train, "compile_step"),
        "load": (pipeline, "load"),  # of a training batch, by a thread
        "save": (Checkpoints, "save"),
    }[where]
    original, calls = getattr(owner, name), itertools.count()

    def wrapper(*args, **kwargs):
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_later():
    threading.Timer(1, terminate).start()


def control_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise ZeroDivisionError


@pytest.fixture(scope="module")
def poisoned(images) -> list[bool]:
    """Which of the first batches are."""
    source = sources.open_source("folder", images)
    stream = pipeline.train_batches(source, seed=0, batch_size=8, canvas=16, on_bad=lambda *_: None)
    return [batch["index"].min() < POISON for batch in itertools.islice(stream, 60)]


def test_a_skipped_step_is_a_step_and_changes_nothing_else(whole, poisoned):
    rows = [row for row in rows_of(whole) if "train/skipped" in row]
    assert [row["step"] for row in rows] == list(range(1, 1 + QUICK_STEPS))
    assert [row["train/skipped"] for row in rows] == poisoned[:QUICK_STEPS] and 3 < sum(poisoned[:QUICK_STEPS]) < 9
    assert all((row["train/loss"] is None) == row["train/skipped"] for row in rows)
    saved = saved_state(whole)
    assert saved["step"] == QUICK_STEPS and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    assert updates(saved) == QUICK_STEPS - sum(poisoned[:QUICK_STEPS])
    assert [row["step"] for row in rows_of(whole) if "eval/view_retrieval" in row] == [4, 8, 12]


@pytest.mark.parametrize(
    ("where", "number", "action"),
    [("baselines", 0, terminate), ("batch", 3, control_c), ("save", 1, control_c), ("batch", 9, crash)]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [("batch", 0, terminate), ("row", 8, terminate), ("baselines", 0, control_c), ("baselines", 0, crash)]
        + [("row", 2, crash), ("scores", 0, crash), ("scores", 2, crash)]
    ],
)
def test_a_run_interrupted_anywhere_ends_as_one_left_alone(quick, whole, tmp_path, where, number, action):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, where, number, action)
        if action is crash:
            with pytest.raises(ZeroDivisionError):
                train.run(quick, tmp_path)
        elif where == "baselines":
            with pytest.raises(Stopped, match="goes on from there"):
                train.run(quick, tmp_path)
            assert not list((tmp_path / "checkpoints").iterdir())
        else:
            stopped = train.run(quick, tmp_path)
            assert saved_state(tmp_path)["step"] == stopped.step < QUICK_STEPS
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    train.run(quick, tmp_path)
    assert_same_run(tmp_path, whole, QUICK_STEPS)
    assert saved_record(tmp_path) == saved_record(whole)


@pytest.mark.parametrize(
    ("where", "number", "action", "steps"),
    [("compile", 0, control_c, {0}), ("load", 3, terminate_later, set(range(12)))]  # batches are read in no order
    + [pytest.param("scores", 1, terminate, {8}, marks=pytest.mark.slow), ("scores", 2, control_c, {12})],
)
def test_a_run_stops_where_it_would_wait_for_ever(quick, whole, tmp_path, capfd, where, number, action, steps):
    stopped = threading.Event()

    def hang():
        action()
        assert stopped.wait(timeout=20), "the run waits for this"

    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, where, number, hang)
        step = int(train.run(quick, tmp_path).step)
        assert step == saved_state(tmp_path)["step"] and step in steps
    stopped.set()
    assert f"stopped after step {step} of {QUICK_STEPS}; the same command goes on from there\n" in capfd.readouterr().err
    train.run(quick, tmp_path)  # an evaluation that was not finished is made up for
    assert_same_run(tmp_path, whole, QUICK_STEPS)
    assert saved_record(tmp_path) == saved_record(whole)


def test_a_row_of_skipped_steps_is_told_once(quick):
    quick.log_every, lines = "never", []
    log = SimpleNamespace(print=lines.append, write=lambda *_: None, advance=lambda step: setattr(log, "step", step))
    steps = train.StepLog(quick, log, SimpleNamespace(kept=str), 0)
    for number, skipped in enumerate([1, 0, 1, 1, 1, 0, 1, 1], 1):
        steps.add(number, {"train/loss": np.nan, "train/grad_norm": 2.0, "train/skipped": skipped})
    steps.close()
    first = [f"step {step} skipped: loss nan, gradient 2.0" for step in (1, 3, 7)]
    assert lines == [*first[:2], "3 steps in a row skipped, up to step 5", first[2], "2 steps in a row skipped, up to step 8"]


def test_a_finished_run_started_again_prints_its_end(quick, whole, tmp_path, capfd):
    workdir = shutil.copytree(whole, tmp_path / "copy")
    assert_same_bits(train.run(quick, workdir).params, saved_state(whole)["params"])
    assert rows_of(workdir) == rows_of(whole)
    assert str(workdir / "report.html") in capfd.readouterr().err


def test_too_many_skipped_steps_in_a_row_stop_the_run(quick, whole, tmp_path, poisoned, monkeypatch):
    limit = quick.max_skipped = 3
    last = next(i for i in range(limit, QUICK_STEPS) if all(poisoned[i - limit : i]))
    kept = (last - 1) // 2 * 2
    assert last - limit < kept  # in the middle of these steps
    for _ in range(2):  # the same again when it is started again
        with pytest.raises(train.NotFinite, match=f"{limit} steps in a row, up to step {last}\\..*step {kept} is whole"):
            train.run(quick, tmp_path)
        assert saved_state(tmp_path)["step"] == kept
    monkeypatch.setattr(command, "flags", SimpleNamespace(FLAGS=SimpleNamespace(config=quick)))
    monkeypatch.setattr(command, "WORKDIR", SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(command, "DRY_RUN", SimpleNamespace(value=False))
    with pytest.raises(SystemExit, match=f"^error: .* not finite for {limit} steps in a row"):  # a text is exit code 1
        command.main([""])
    quick.max_skipped = 20
    train.run(quick, tmp_path)
    assert_same_run(tmp_path, whole, QUICK_STEPS)


def test_without_evaluation_there_is_none(quick, tmp_path, whole, capfd):
    quick.eval.every = quick.checkpoint.every = quick.log_every = "never"
    train.run(quick, tmp_path)
    assert {tag for row in rows_of(tmp_path) for tag in row} == {"step", "train/loss", "train/grad_norm", "train/skipped"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(QUICK_STEPS)]
    assert_same_bits(saved_state(tmp_path), saved_state(whole))
    assert "report: " in capfd.readouterr().err


# What a run goes on from.


def test_a_checkpoint_of_another_configuration_is_refused(quick, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "copy")
    quick.optim.lr = 1.0
    quick.model.heads = 1
    with pytest.raises(ValueError, match=r"another configuration.*\n  model.heads: 2 -> 1\n  optim.lr: \S+ -> 1.0\n"):
        train.run(quick, workdir)
    assert rows_of(workdir) == rows_of(whole)


def test_other_images_under_the_same_names_are_refused(quick, whole, images, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "copy")
    others = shutil.copytree(images, tmp_path / "others")
    for path in others.glob("[0-9].png"):
        shutil.copy(images / f"1{path.name}", path)
    quick.data.dir = str(others)
    words = r"Then and now: data.fingerprint: '\w{16}' -> '\w{16}' \(other images, labels, or another order\)\. Give"
    with pytest.raises(ValueError, match=words):
        train.run(quick, workdir)
    assert rows_of(workdir) == rows_of(whole)


def test_keys_that_change_no_number_may_differ(quick, whole, half, images, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    quick.data.dir = str(shutil.copytree(images, tmp_path / "elsewhere"))
    quick.eval.every = "5 steps"
    quick.checkpoint.every = "3 steps"
    quick.log_every = "2 steps"
    quick.mesh.fsdp, quick.mesh.data = -1, 1
    train.run(quick, tmp_path / "run")
    assert_same_bits(saved_state(tmp_path / "run"), saved_state(whole))


def test_a_run_goes_on_in_another_workdir(quick, whole, half, tmp_path):
    shutil.copytree(half, tmp_path / "old")
    before = rows_of(tmp_path / "old")
    quick.resume = str(tmp_path / "old")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "batch", 2, terminate)
        train.run(quick, tmp_path / "new")
    train.run(quick, tmp_path / "new")  # from its own checkpoint now
    assert_same_run(tmp_path / "new", whole, QUICK_STEPS)
    assert (tmp_path / "new/pictures/crops.png").exists()
    assert rows_of(tmp_path / "old") == before


def test_a_run_goes_on_from_another_working_directory(quick, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "batch", 6, terminate)
        train.run(quick, "runs/here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.run(quick, "~/runs/here")
    assert_same_run(tmp_path / "runs/here", whole, QUICK_STEPS)
    assert not list((tmp_path / "elsewhere").iterdir())


def updates(saved: dict) -> int:
    """How often Adam has moved, by a stored state."""
    leaves = jax.tree_util.tree_leaves_with_path(saved["opt_state"])
    return max(int(leaf) for path, leaf in leaves if "count" in jax.tree_util.keystr(path))


def test_a_longer_plan_goes_on_with_the_optimizers_state(quick, whole, tmp_path, poisoned, capfd):
    workdir = shutil.copytree(whole, tmp_path / "run")
    quick.total = "14 steps"
    train.run(quick, workdir)
    assert "total: 12 steps -> 14 steps: schedules now end at step 14\n" in capfd.readouterr().err
    rows = rows_of(workdir)
    assert rows[: len(rows_of(whole))] == rows_of(whole)
    assert [row["step"] for row in rows if "train/skipped" in row] == list(range(1, 15))
    assert [row["step"] for row in rows if "eval/view_retrieval" in row] == [4, 8, 12, 14]
    assert saved_state(workdir)["step"] == 14 and updates(saved_state(workdir)) == 14 - sum(poisoned[:14])
    quick.total = "13 steps"
    with pytest.raises(ValueError, match="the checkpoint of step 14 in .* is past the end of this run: total is 13 steps"):
        train.run(quick, workdir)


def edit_records(workdir: Path, change: Callable[[dict], object]) -> None:
    for path in (workdir / "checkpoints").glob("*/record/metadata"):
        record = json.loads(path.read_text())
        change(record)
        record["digest"] = record_digest({key: value for key, value in record.items() if key != "digest"})
        path.write_text(json.dumps(record))


def test_other_versions_and_devices_are_printed_in_one_line(quick, whole, tmp_path, capfd):
    workdir = shutil.copytree(whole, tmp_path / "run")
    now = saved_record(whole)
    assert set(now["versions"]) > {"mim_jax", "jax", "flax", "optax", "orbax-checkpoint", "Python"}
    train.run(quick, workdir)
    assert "changed since" not in capfd.readouterr().err
    edit_records(workdir, lambda record: record.update(devices="2 x TPU", versions=record["versions"] | {"flax": "0.1"}))
    train.run(quick, workdir)
    line = f"changed since the checkpoint: flax 0.1 -> {now['versions']['flax']}, devices 2 x TPU -> {now['devices']}\n"
    assert line in capfd.readouterr().err


def test_a_checkpoint_from_before_0_3_is_refused(quick, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for path in (workdir / "checkpoints").glob("*/record/metadata"):
        record = json.loads(path.read_text())
        del record["digest"], record["arrays"]
        path.write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=f"step {QUICK_STEPS} in {workdir}/checkpoints is from a version of mim_jax before 0.3"
    ):
        train.run(quick, workdir)


def test_a_key_that_a_newer_version_added_has_its_default_in_an_older_record():
    config = load_config("configs/mae.py:demo")
    now, old = checkpoint.as_dict(config), checkpoint.as_dict(config)
    assert differences(old, now) == []
    del old["optim"]["patch_embed_lr"], old["loss"], old["eval"]  # of the skeleton, of the recipe, of no consequence
    assert differences(old, now) == []
    now["optim"]["patch_embed_lr"], now["loss"]["norm_pix_loss"] = 0.5, False
    assert differences(old, now) == [("loss.norm_pix_loss", True, False), ("optim.patch_embed_lr", 1.0, 0.5)]
    now["recipe"] = "no/such.py"
    assert differences(old, now) == [("loss.norm_pix_loss", None, False), ("optim.patch_embed_lr", 1.0, 0.5)]
    now = checkpoint.as_dict(config)
    del now["model"]["dim"]
    assert differences(checkpoint.as_dict(config), now) == [("model.dim", 192, None)]


@pytest.mark.parametrize("key, value, differs", [
    ("seed", 1, True), ("optim.lr", 1e-9, True), ("data.num_examples", 7, True), ("model.depth", 9, True),
    ("data.split", "test", True), ("loss.teacher_temp_warmup", "9 steps", True), ("crops.local_crops_number", 9, True),
    ("target.fingerprint", "0", True), ("data.fingerprint", "0", True),
    ("target.network.model.dim", 9, True), ("target.network.method", "dino", True),
    ("target.network.head.out_dim", 9, True), ("target.network.data.mean", (0, 0, 0), True),
    ("total", "9 steps", False), ("recipe", "other.py", False), ("init_from", "there", False), ("init_parts", ("head",), False),
    ("log_every", "never", False), ("eval.bank", 9, False), ("checkpoint.keep", 9, False), ("mesh.fsdp", 8, False),
    ("data.workers", 3, False), ("data.dir", "there", False), ("model.unroll", 2, False), ("target.workdir", "there", False),
    ("target.config", "other.py", False), ("target.weights", "there.npz", False), ("target.network.optim.lr", 9.0, False),
    ("target.network.data.name", "cifar10", False), ("target.network.model.unroll", 9, False),
    ("target.network.crops.local_crops_number", 9, False),
])  # fmt: skip
def test_keys_that_make_it_another_run(key, value, differs):
    config = load_config(f"{TINY}:distillation")
    old, new = checkpoint.as_dict(config), checkpoint.as_dict(config)
    *sections, name = key.split(".")
    section = functools.reduce(dict.__getitem__, sections, new)
    section[name] = value
    assert bool(differences(old, new)) == bool(differences(new, old)) == differs


def test_a_saved_run_is_read_in_parts(whole):
    saved, want = newest(whole, lambda saved: saved), saved_state(whole)
    assert saved.step == QUICK_STEPS and saved.record.items() < saved_record(whole).items()
    shapes = saved.shapes()
    assert shapes == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {key: want[key] for key in shapes})
    assert shapes.keys() == {"params", "teacher", "extra"}
    part = {"teacher": {"backbone": shapes["teacher"]["backbone"]}}
    assert_same_bits(saved.read(part), {"teacher": {"backbone": want["teacher"]["backbone"]}})


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_run_that_is_not_there_is_named_and_not_made(quick, tmp_path, key):
    quick[key] = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"there is no run in {tmp_path}/nowhere"):
        train.run(quick, tmp_path / "run")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "nowhere/checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint in {tmp_path}/nowhere/checkpoints"):
        train.run(quick, tmp_path / "run")


def test_saved_on_8_devices_restored_on_4_and_on_1(quick, tmp_path):
    quick.model.dim = quick.head.hidden_dim = 32
    method = make_method(quick)
    with jax.set_mesh(make_mesh(1, 8)):
        rng = np.random.default_rng(0)
        state = jax.tree.map(
            lambda leaf: jax.device_put(rng.integers(0, 99, leaf.shape).astype(leaf.dtype), leaf.sharding),
            abstract_state(method, quick),
        ).replace(step=jnp.int32(3))
        assert not state.teacher["backbone"]["blocks"]["fc1"]["kernel"].is_fully_replicated
        checkpoints = Checkpoints(tmp_path, quick)
        checkpoints.save(3, state, bad_images=5)
        checkpoints.wait()
    for devices, data, fsdp in ((8, 8, 1), (4, 1, 4), (4, 2, 2), (1, 1, 1)):
        with jax.set_mesh(make_mesh(data, fsdp, jax.devices()[:devices])):
            abstract = abstract_state(method, quick)
            restored, record = Checkpoints(tmp_path, quick).restore(abstract)
        assert record["bad_images"] == 5
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
        assert_same_bits(restored, state)


# Disks.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax leaves behind when it fails
def test_a_torn_checkpoint_gives_way_to_the_one_before(quick, whole, tmp_path):
    """A file of the newest checkpoint, each in turn, is cut or missing: either all is still read, or the one before is."""
    good = {step: saved_state(whole, step) for step in (QUICK_STEPS - 2, QUICK_STEPS)}
    newest = whole / f"checkpoints/{QUICK_STEPS}"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    method, fell_back = make_method(quick), 0
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        abstract = abstract_state(method, quick)
        quick.data.update(measured(whole))
        for number, file in enumerate(files):
            workdir = shutil.copytree(whole, tmp_path / str(number))
            torn = workdir / "checkpoints" / newest.name / file
            if number % 2:
                torn.unlink()
            else:
                os.truncate(torn, torn.stat().st_size // 2)
            state, record = Checkpoints(workdir, quick).restore(abstract)
            assert record["step"] == state.step
            assert_same_bits(state.params, good[int(state.step)]["params"])
            fell_back += state.step < QUICK_STEPS
            shutil.rmtree(workdir)
    assert 0 < fell_back < len(files)  # commit markers, say, are not needed


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(quick, whole, tmp_path):
    """One bit of the newest checkpoint: either nothing changes, or the one before is taken."""
    steps = (QUICK_STEPS - 2, QUICK_STEPS)
    records = {step: json.loads((whole / f"checkpoints/{step}/record/metadata").read_text()) for step in steps}
    good = {step: saved_state(whole, step) for step in steps}
    newest = whole / f"checkpoints/{QUICK_STEPS}"
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    rng, fell_back = random.Random(0), 0
    chosen = rng.choices(files, [path.stat().st_size for path in files], k=15) + [newest / "record/metadata"] * 15
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        abstract = abstract_state(make_method(quick), quick)
        quick.data.update(measured(whole))
        for number, path in enumerate(chosen):
            workdir = shutil.copytree(whole, tmp_path / str(number))
            flip(workdir / path.relative_to(whole), rng.randrange(2**60))
            state, record = Checkpoints(workdir, quick).restore(abstract)
            step = record["step"]
            assert record.items() < records[step].items()
            assert_same_bits(state.params, good[step]["params"])
            assert_same_bits(jax.tree.leaves(state.opt_state), jax.tree.leaves(good[step]["opt_state"]))
            fell_back += step < QUICK_STEPS
            shutil.rmtree(workdir)
    assert fell_back > 20


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "bfloat16", "float16", "int32", "uint32", "float32"])
def test_every_bit_and_every_place_counts_in_a_digest(dtype):
    x = np.arange(12).reshape(2, 3, 2).astype(jnp.dtype(dtype))
    others = [np.swapaxes(x, 0, 2).reshape(x.shape), *(np.roll(x, 1, axis) for axis in range(3))]
    if dtype == "bool":
        others = [x ^ one.reshape(x.shape) for one in np.eye(12, dtype=bool)]
    for place in range(0 if dtype == "bool" else 8 * x.nbytes):
        content = bytearray(x.tobytes())
        content[place // 8] ^= 1 << place % 8
        others.append(np.frombuffer(bytes(content), x.dtype).reshape(x.shape))
    found = [int(digests([each])[0]) for each in (x, *others)]
    assert len(set(found)) == len(found)


def test_digests_of_64_bits_and_of_scalars(x64):
    x = np.arange(6.0).reshape(2, 3)
    others = [np.nextafter(x, 9), x + 2**-40, np.float64(1.0), np.float64(1.0 + 2**-50), np.int64(2**40), np.int64(2**41)]
    found = [int(digest) for digest in digests([x, *others])]
    assert len(set(found)) == len(found)


def test_a_digest_does_not_depend_on_the_sharding():
    mesh = make_mesh(2, 4)
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    specs = (), ("data",), ("fsdp", "data"), (None, "fsdp")
    placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))) for spec in specs]
    with jax.set_mesh(mesh):
        assert len({int(digest) for digest in digests([jnp.asarray(x), *placed])}) == 1


def test_what_was_written_is_read_back(quick, tmp_path, monkeypatch):
    """After the first checkpoint and at the end: a disk that lies ends the run, and not its next start."""
    finished = ocp.CheckpointManager.wait_until_finished

    def lying(manager):
        finished(manager)
        if (damaged := tmp_path / f"checkpoints/{lies}/state").is_dir():
            flip(max(damaged.glob("d/*"), key=lambda path: path.stat().st_size), 8 * 1000)

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", lying)
    for lies in (2, QUICK_STEPS):
        words = f"written to {tmp_path}/checkpoints, but cannot be read back: step {lies} is damaged"
        with pytest.raises(OSError, match=words):
            train.run(quick, tmp_path)
        assert not (tmp_path / f"checkpoints/{lies + 2}").exists()


def test_figures_that_are_damaged_or_gone_are_told(quick, whole, tmp_path, capfd):
    workdir = shutil.copytree(whole, tmp_path / "run")
    lines = (workdir / journal.FILE).read_text().splitlines(keepends=True)
    (workdir / journal.FILE).write_text("".join([*lines[:3], lines[3].replace("{", "[", 1), *lines[4:], '{"step": 12, "cut']))
    train.run(quick, workdir)
    assert f"{workdir}/metrics.jsonl: 1 damaged lines are left out, such as '[" in capfd.readouterr().err
    (workdir / journal.FILE).unlink()
    train.run(quick, workdir)
    assert f"there is no {workdir}/metrics.jsonl: the figures up to step 12 are lost" in capfd.readouterr().err


def test_only_whole_numbers_are_steps(tmp_path):
    for name in ("3", "0", "12", "07", "²", "5.orbax-checkpoint-tmp", "unreadable_4"):
        (tmp_path / name).mkdir()
    assert checkpoint.saved_steps(tmp_path) == [12, 3, 0]


def test_wildcards_in_a_path_are_letters(quick, whole, tmp_path):
    workdir = tmp_path / "lr=[1e-3] *?"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "batch", 6, terminate)
        train.run(quick, workdir)
    train.run(quick, workdir)
    assert_same_run(workdir, whole, QUICK_STEPS)


def test_a_run_goes_on_past_a_torn_checkpoint(quick, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / f"checkpoints/{QUICK_STEPS + 2}.orbax-checkpoint-tmp-5").mkdir()
    shutil.rmtree(workdir / f"checkpoints/{QUICK_STEPS}/state/d")
    shutil.rmtree(workdir / f"checkpoints/{QUICK_STEPS}/state/ocdbt.process_0")
    train.run(quick, workdir)
    assert_same_run(workdir, whole, QUICK_STEPS)
    left = {str(QUICK_STEPS - 2), str(QUICK_STEPS), f"unreadable_{QUICK_STEPS}"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == left
    shutil.rmtree(workdir / f"checkpoints/{QUICK_STEPS}/state")
    train.run(quick, workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == left | {f"unreadable_{QUICK_STEPS}_1"}


def test_no_checkpoint_that_can_be_read_is_an_error(quick, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for path in (workdir / "checkpoints").glob("*/record/metadata"):
        path.unlink()
    why = "step 12 is damaged: FileNotFoundError.*step 10 is damaged"
    with pytest.raises(OSError, match=f"no checkpoint in {workdir}/checkpoints can be read: {why}"):
        train.run(quick, workdir)
    assert len(list((workdir / "checkpoints").iterdir())) == 2  # nothing is deleted where nothing can replace it


def test_a_workdir_that_cannot_be_written_is_named(quick, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "locked/lock").mkdir(parents=True)
    for workdir, named in (("file/run", "file/run"), ("file", "file"), ("/proc/run", "/proc/run"), ("locked", "locked/lock")):
        with pytest.raises(OSError, match=f"cannot write to {tmp_path / named}: "):
            train.run(quick, tmp_path / workdir)
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(OSError, match=f"cannot keep checkpoints: it cannot be written to: '{tmp_path}/run/checkpoints'"):
        train.run(quick, tmp_path / "run")
    with pytest.raises(ValueError, match="s3://bucket/run cannot have checkpoints"):
        train.run(quick, "s3://bucket/run")


def test_a_run_in_a_bucket_ends_as_one_on_a_disk(quick, whole, bucket, tmp_path, capfd):
    workdir = bucket / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        interrupt(patch, "batch", 9, crash)
        train.run(quick, str(workdir))
    (workdir / "checkpoints/10/state/manifest.ocdbt").write_bytes(b"begun, and ended by a kill")
    assert checkpoint.saved_steps(workdir / "checkpoints") == [8, 6]
    damaged = next(file for file in (workdir / "checkpoints/8/state/d").iterdir())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    train.run(quick, str(workdir))
    assert "step 8 is set aside: it is now gs://bucket/run/checkpoints/unreadable_8" in capfd.readouterr().err
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "12", "unreadable_8"]
    (tmp_path / journal.FILE).write_bytes((workdir / journal.FILE).read_bytes())
    assert rows_of(tmp_path) == rows_of(whole)
    assert_same_bits(saved_state(workdir), saved_state(whole))
    assert saved_record(workdir) == saved_record(whole)
    there, here = load_run(str(workdir)), load_run(whole)
    assert there.step == QUICK_STEPS
    assert_same_bits(there.params, here.params)


def test_a_second_run_in_a_workdir_is_refused(quick, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    with locked(workdir):
        with pytest.raises(OSError, match=f"{workdir} is in use by another run: process {os.getpid()} on .*, since 20"):
            train.run(quick, workdir)
        code = f"from mim_jax.lock import locked; from pathlib import Path\nwith locked(Path({str(workdir)!r})): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1 and f"in use by another run: process {os.getpid()} on" in other.stderr
    assert_same_run(workdir, whole, QUICK_STEPS)
    assert (workdir / "lock").exists()
    train.run(quick, workdir)  # what a run leaves behind, however it ended, locks nothing


def test_without_locks_a_run_says_so(quick, whole, tmp_path, monkeypatch, capfd):
    workdir = shutil.copytree(whole, tmp_path / "run")

    def no_locks(file, how):
        raise OSError(errno.ENOTSUP, "Not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    train.run(quick, workdir)
    assert f"{workdir} cannot be locked (Not supported): take care that one run uses it at a time\n" in capfd.readouterr().err


def test_a_workdir_that_was_removed_is_one_line(quick, tmp_path, monkeypatch):
    interrupt(monkeypatch, "batch", 3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(OSError, match=f"cannot write: it was removed: '{tmp_path}/run/metrics.jsonl'"):
        train.run(quick, tmp_path / "run")


def test_too_little_room_for_a_checkpoint_is_told_before_it_is_begun(quick, whole, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    interrupt(monkeypatch, "batch", 7, lambda: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000)))
    with pytest.raises(OSError, match=f"no room for a checkpoint in {tmp_path}.*step 6 is whole"):
        train.run(quick, tmp_path)
    monkeypatch.undo()
    train.run(quick, tmp_path)
    assert_same_run(tmp_path, whole, QUICK_STEPS)


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Longer files cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "message"),
    [(4000, "writing a checkpoint to {}/checkpoints failed"), (500, "cannot write: .*{}/metrics.jsonl")],
    ids=["checkpoint", "figures"],
)
def test_a_full_disk_is_named_and_harms_no_checkpoint(quick, whole, tmp_path, size, message):
    quick.eval.every = "100 steps"
    quick.log_every = "100 steps" if size == 4000 else "1 step"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "batch", 6, terminate)
        train.run(quick, tmp_path)
    before = saved_state(tmp_path)
    with files_limited_to(size), pytest.raises(OSError, match=message.format(tmp_path)) as error:
        train.run(quick, tmp_path)
    if size == 4000:
        assert f"The checkpoint of step {before['step']} is whole" in str(error.value)
    assert_same_bits(saved_state(tmp_path), before)
    quick.log_every = "1 step"
    train.run(quick, tmp_path)
    assert_same_bits(saved_state(tmp_path), saved_state(whole))
