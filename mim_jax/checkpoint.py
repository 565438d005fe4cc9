"""Checkpoints with Orbax: written while the training goes on, whole or not at all; restored onto any number of devices.

A checkpoint holds the state and a record: step, config, versions, devices, numbers of bad images and of skipped steps in a row.
Orbax does not notice a flipped bit, so the record also has a digest of every array and one of itself. Nothing is used whose
digest is another: the checkpoint is set aside, and the one before is taken.
"""

import contextlib
import copy
import errno
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

import mim_jax
from mim_jax import config as configs
from mim_jax import durations, storage
from mim_jax.config import leaves
from mim_jax.sharding import path_name, replicate

# Keys that may change when a run is continued: the numbers of the training do not depend on them (`total` is printed).
MAY_CHANGE = re.compile(
    r"(recipe|total|log_every|max_skipped|resume|init_from|init_parts|(.*\.)?model\.(unroll|remat|microbatches)"
    r"|data\.(dir|workers|eval_split|num_classes)|(eval|checkpoint|mesh)\..*|target\.(config|workdir|weights|family)"
    # Of the frozen target and of the run that this one began with, only what makes the network counts.
    r"|(target\.network|encoder)\.(?!(method|network|model|\w*head|quantizer)\b|data\.(mean|std)$).*)"
)
SAID = {
    "data.fingerprint": " (other images, labels, or another order)",
    "target.fingerprint": " (other parameters of the frozen network)",
}
COMMITTED = "commit_success.txt"  # of Orbax: it is in a checkpoint that is whole
AT_ONCE = 2**30  # bytes that are read back at a time
BEST = {"global": ("eval/knn", "eval/view_retrieval"), "dense": ("eval/patch_retrieval",)}  # the first that is measured counts
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")

Result = TypeVar("Result")


class Damaged(OSError):
    """A checkpoint that cannot be read, or is not what was written."""


class SavedRun:
    """A checkpoint of a run, to read; nothing is changed there. See `newest`. What cannot be read raises Damaged."""

    def __init__(self, path: Path):
        self.path, self.step, self.workdir = path, int(path.name), path.parent.parent
        self.description = f"step {self.step} in {self.workdir}"

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """step, config, versions, devices, bad_images, skipped; arrays: path -> [dtype, shape, digest]."""
        with self._named_errors():
            record = json.loads((self.path / "record/metadata").read_text())
            if "digest" in record or "arrays" in record:
                if record.pop("digest", None) != record_digest(record) or record["step"] != self.step:
                    raise ValueError("the record is not what was written")
                return record
        raise ValueError(
            f"the checkpoint of step {self.step} in {self.path.parent} is from a version of mim_jax before 0.3: "
            "finish that run with that version, or give another workdir"
        )

    def shapes(self) -> dict[str, dict[str, Any]]:
        """{"params", "teacher" or "extra": {part: tree of jax.ShapeDtypeStruct}}"""
        with self._named_errors():
            tree = ocp.PyTreeCheckpointHandler().metadata(self.path / "state").tree
            shapes = {path_name(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            if shapes != {path: shape for path, (_, shape, _) in self.record["arrays"].items()}:
                raise ValueError("the names or shapes of its arrays are not what was written")
        sections = {name: tree[name] for name in ("params", "teacher", "extra")}
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sections)

    def read(self, abstract: Any) -> Any:
        """The state or a part of it, with the dtypes and shardings of `abstract` (without sharding: NumPy arrays).

        Leaves that are `ocp.PLACEHOLDER` are not read. Every array is compared with its digest.
        """
        arrays = self.record["arrays"]

        def as_saved(path: tuple, leaf: Any) -> Any:
            if leaf is ocp.PLACEHOLDER:
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(arrays[path_name(path)][0]), sharding=leaf.sharding)

        with self._named_errors():
            wanted = jax.tree.map_with_path(as_saved, abstract)
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True)
            # Not by its Checkpointer, where a process that fails leaves the others waiting.
            read = ocp.PyTreeCheckpointHandler().restore(self.path / "state", args=args)
            for path, found in described(read).items():
                if found != arrays[path]:
                    raise ValueError(f"{path} is not what was written")
        return jax.tree.map(lambda x, leaf: x if x is ocp.PLACEHOLDER else x.astype(leaf.dtype), read, abstract)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Damaged:
            raise
        except Exception as error:  # of any type that Orbax and TensorStore raise
            raise Damaged(f"step {self.step} is damaged: {brief(error)}") from error


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints that a run writes to `workdir/checkpoints`. The newest `checkpoint.keep` are kept, and those of the steps
    in `best`: kind of score in BEST -> [step, score].

    Raises OSError, naming the folder, when it cannot be written or has no room for another checkpoint.
    """

    def __init__(self, workdir: str | Path, config: ml_collections.ConfigDict):
        self.workdir, self.config = absolute(workdir), config
        self.folder = self.workdir / "checkpoints"
        self.written: tuple[int, Any] | None = None  # the last step saved here, and its state as shapes
        self.read_back: int | None = None  # the last step that was read after it had been written
        self.best: dict[str, list[Any]] = {}
        options = ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True, create=False)
        try:
            if not storage.remote(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder, os.W_OK):
                    raise OSError(errno.EACCES, "it cannot be written to")
            self.plain = without_wildcards(self.folder)
            self.manager = ocp.CheckpointManager(self.plain, options=options, item_names=("state", "record"))
        except Exception as error:
            if storage.remote(self.folder):
                raise OSError(f"cannot keep checkpoints in {self.folder}: {storage.reason(error)}") from error
            if not isinstance(error, OSError):
                raise
            raise OSError(error.errno, f"cannot keep checkpoints: {error.strerror}", str(self.folder)) from error

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # after `wait` nothing can fail; without it, an earlier error is on its way
            self.manager.close()
        if self.plain != self.folder:
            self.plain.unlink(missing_ok=True)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint, oldest first, is kept: Orbax asks after each save."""
        best, before = {step for step, _ in self.best.values()}, len(checkpoints) - (self.config.checkpoint.keep or math.inf)
        return [i >= before or checkpoint.step in best for i, checkpoint in enumerate(checkpoints)]

    def is_best(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether a score of this step, which is to be saved then, is the best so far of its kind."""
        scores = {kind: [figures[tag] for tag in tags if tag in figures] for kind, tags in BEST.items()}
        before = {kind: score for kind, (_, score) in self.best.items()}
        best = {kind: [step, found[0]] for kind, found in scores.items() if found and found[0] > before.get(kind, -1.0)}
        self.best = self.best | best
        return bool(best)

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, record) of the newest checkpoint that is whole, see `restore`. Later ones are set aside: they are renamed,
        and the run will save these steps again."""
        state, record = restore(self.workdir, abstract, self.config)
        self.best = record.get("best", {})
        for later in saved_steps(self.folder):
            if later > record["step"] and jax.process_index() == 0:
                names = (f"unreadable_{later}" + f"_{i}" * (i > 0) for i in itertools.count())
                aside = next(name for name in names if not (self.folder / name).exists())
                (self.folder / str(later)).rename(self.folder / aside)
                print(f"step {later} is set aside: it is now {self.folder / aside}", file=sys.stderr)
        multihost_utils.sync_global_devices("set aside")
        self.manager.reload()
        return state, record

    def save(self, step: int, state: Any, **record: Any) -> None:
        """Begins to write and returns; later steps do not change what is written. The first checkpoint is waited for and
        read back. Raises the error of an earlier save."""
        if step == self.manager.latest_step():
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        with self._named_errors():
            free = math.inf if storage.remote(self.folder) else shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise OSError(
                f"no room for a checkpoint in {self.folder}: {free / 2**20:,.0f} MiB are free and "
                f"{1.2 * needed / 2**20:,.0f} are needed. {self.kept()}"
            )
        record |= {"step": step, "config": as_dict(self.config), "versions": versions(), "devices": devices()}
        record |= {"best": self.best} if self.best else {}
        record["arrays"] = described(state)
        record["digest"] = record_digest(record)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self.written = step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        with self._named_errors():
            self.manager.save(step, args=args, force=True)
        if self.read_back is None:
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk and the newest checkpoint has been read back; raises what went wrong."""
        with self._named_errors():
            self.manager.wait_until_finished()
        if self.written is None or self.read_back == self.written[0]:
            return
        step, abstract = self.written
        leaves, structure = jax.tree.flatten(abstract)
        ends = np.cumsum([leaf.size * leaf.dtype.itemsize for leaf in leaves]) // AT_ONCE
        for group in sorted(set(ends)):  # or the device would hold the state twice
            part = [leaf if end == group else ocp.PLACEHOLDER for leaf, end in zip(leaves, ends)]
            try:
                SavedRun(self.folder / str(step)).read(jax.tree.unflatten(structure, part))
            except Damaged as error:
                raise OSError(f"a checkpoint was written to {self.folder}, but cannot be read back: {error}") from error
        self.read_back = step

    def kept(self) -> str:
        """A sentence for error messages: which checkpoint is safe."""
        with contextlib.suppress(Exception):  # of a save that is under way: another error is reported now
            self.manager.wait_until_finished()
        if not (storage.remote(self.folder) or self.folder.is_dir()):
            return "The folder was removed."
        steps = saved_steps(self.folder)
        return f"The checkpoint of step {steps[0]} is whole." if steps else "No checkpoint was written yet."

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns any exception of Orbax and TensorStore into one OSError."""
        try:
            yield
        except Exception as error:
            raise OSError(f"writing a checkpoint to {self.folder} failed: {brief(error)}. {self.kept()}") from error


def newest(workdir: str | Path, read: Callable[[SavedRun], Result]) -> Result:
    """What `read` returns for the newest checkpoint of a run that is not damaged. A line tells of those that are. Instead of a
    workdir, one checkpoint can be given: workdir/checkpoints/STEP.

    Raises FileNotFoundError when the workdir has no run or the run has no checkpoint, and Damaged when all are damaged.
    """
    one = absolute(workdir)
    folder = one.parent if is_checkpoint(one) else one / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run in {folder.parent}: it has no folder checkpoints")
    if not (steps := [int(one.name)] if folder == one.parent else saved_steps(folder)):
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    problems: list[str] = []
    for step in steps:
        try:
            result, problem = read(SavedRun(folder / str(step))), ""
        except Damaged as error:
            problem = str(error)
        if not (problem := of_any_process(problem)):
            if problems and jax.process_index() == 0:
                print(f"checkpoints in {folder}: {'; '.join(problems)}; step {step} is taken", file=sys.stderr)
            return result
        problems.append(problem)
    raise Damaged(f"no checkpoint in {folder} can be read: {'; '.join(problems)}")


def restore(workdir: str | Path, abstract: Any, config: ml_collections.ConfigDict) -> tuple[Any, dict[str, Any]]:
    """(state, record) of the newest checkpoint in a workdir that is not damaged, with the shapes and shardings of `abstract`.

    Raises ValueError, naming the keys, for a checkpoint of another configuration, and Damaged when none can be read.
    """

    def read(saved: SavedRun) -> tuple[Any, dict[str, Any]]:
        if problem := mismatch(saved.record, config):
            raise ValueError(f"the checkpoint of step {saved.step} in {saved.path.parent} {problem}")
        state = saved.read(abstract)
        if int(state.step) != saved.step:
            raise Damaged(f"step {saved.step} is damaged: it holds the state of step {state.step}")
        return state, saved.record

    return newest(workdir, read)


@jax.jit
def digests(arrays: list[jax.Array]) -> list[jax.Array]:
    """A number, uint32, for each array: another one if any bit of it changes. It does not depend on the sharding.

    The sum, modulo 2**32, of a bijection of each word of 32 bits, which is another one at each place.
    """

    def digest(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)  # [..., 2] of numbers of 64 bits
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(words.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        words = (words + place * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
        words = (words ^ (words >> 15)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(words ^ (words >> 13), dtype=jnp.uint32)

    return replicate([digest(jnp.asarray(x)) for x in arrays])


def described(tree: Any) -> dict[str, list[Any]]:
    """path -> [dtype, shape, digest] of the arrays in a tree, as JSON has it."""
    arrays = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree) if x is not ocp.PLACEHOLDER}
    found = zip(arrays.items(), jax.device_get(digests(list(arrays.values()))), strict=True)
    return {path: [x.dtype.name, list(x.shape), f"{digest:08x}"] for (path, x), digest in found}


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record, which does not have it itself, as JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def of_any_process(problem: str) -> str:
    """The problem of the first process that has one, in all processes; "" if none has. All must call it."""
    if jax.process_count() == 1:
        return problem
    text = np.zeros(500, np.uint8)
    given = np.frombuffer(problem.encode()[:500], np.uint8)
    text[: len(given)] = given
    found = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(text)]
    return next(filter(None, found), "")


def without_wildcards(folder: Path) -> Path:
    """The folder, under another name if its own has wildcards: Orbax looks for files by patterns that begin with it."""
    if storage.remote(folder) or glob.escape(str(folder)) == str(folder):
        return folder
    link = Path(tempfile.gettempdir()) / f"mim_jax-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):  # of an earlier start, or of another process
        link.symlink_to(folder)
    return link


def mismatch(record: dict[str, Any], config: ml_collections.ConfigDict) -> str:
    """Why the run of `config` cannot continue the checkpoint of `record`; "" when it can."""
    if differing := differences(record["config"], as_dict(config)):
        changed = [f"{key}: {old!r} -> {new!r}" + SAID.get(key, "") for key, old, new in differing]
        lines = f" {changed[0]}. " if len(changed) == 1 else "".join(f"\n  {line}" for line in changed) + "\n"
        advice = "Give another workdir, or start a new run from these parameters with --config.init_from."
        return f"is of another configuration. Then and now:{lines}{advice}"
    if record["step"] > durations.total_steps(config):
        return f"is past the end of this run: total is {config.total}"
    return ""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two configs, as JSON, describe different trainings.

    A key that `old` lacks, because a newer version added it, has its default there: that of the skeleton of all configs, or
    else that of the recipe `new["recipe"]`.
    """
    old, new = dict(leaves(old)), dict(leaves(new))
    if new.keys() - old.keys():
        defaults = dict(leaves(as_dict(configs.skeleton())))
        with contextlib.suppress(OSError, ValueError):  # the file may have gone
            defaults = dict(leaves(as_dict(configs.load_config(new.get("recipe") or "")))) | defaults
        old = {key: defaults[key] for key in new if key in defaults} | old
    return [
        (key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not MAY_CHANGE.fullmatch(key)
        and not (key == "continue_from" and old.get(key) and new.get(key))  # only whether there is one counts
    ]


def changes(record: dict[str, Any], config: ml_collections.ConfigDict) -> list[str]:
    """What a run that continues the checkpoint of `record` prints: a changed total, and changed versions or devices."""
    lines, then = [], record["config"]["total"]
    if then != config.total:
        lines.append(f"total: {then} -> {config.total}: schedules now end at step {durations.total_steps(config):,}")
    old, new = record["versions"] | {"devices": record["devices"]}, versions() | {"devices": devices()}
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    return lines + ([f"changed since the checkpoint: {', '.join(changed)}"] if changed else [])


def versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"mim_jax": mim_jax.__version__, **libraries, "Python": platform.python_version()}


def devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def absolute(path: str | Path) -> Path:
    """The absolute path of a workdir, or its address, see `storage.absolute`. Raises ValueError for one that Orbax refuses."""
    if str(path).startswith("s3://"):
        raise ValueError(f"{path} cannot have checkpoints: Orbax keeps them at gs:// and on disks, not at s3://")
    return storage.absolute(path)


def is_checkpoint(path: Path) -> bool:
    """Whether it is one checkpoint of a run, as Orbax names them."""
    return path.parent.name == "checkpoints" and path.name.isdecimal() and (path / "record").is_dir()


def saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, newest first; [] without the folder. Orbax renames a checkpoint to its
    step at the end; at an address, where that takes a while, it writes the file COMMITTED to it."""
    steps = [path for path in (folder.iterdir() if folder.is_dir() else ()) if re.fullmatch("0|[1-9][0-9]*", path.name)]
    whole = (path for path in steps if not storage.remote(folder) or (path / COMMITTED).exists())
    return sorted((int(path.name) for path in whole), reverse=True)


def finished(workdir: Path, config: ml_collections.ConfigDict) -> bool:
    """Whether the run of this config has a checkpoint of its last step."""
    return max(saved_steps(workdir / "checkpoints"), default=0) >= durations.total_steps(config)


def brief(error: Exception) -> str:
    """An error of Orbax or TensorStore without its specification of the array, a page long."""
    return re.split(r" \[tensorstore_spec| See full TensorStore|\n", f"{type(error).__name__}: {error}")[0]


def as_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """As JSON has it: tuples are lists."""
    return json.loads(config.to_json_best_effort())


def fingerprint(tree: Any) -> str:
    """16 hex digits that depend on every array in a tree; "" if it has none."""
    arrays = described(tree)
    return record_digest(arrays)[:16] if arrays else ""


def _end_leak() -> None:
    """TensorStore (0.1.86, the newest) never frees a list or dict that it makes of JSON. Orbax asks it for its metrics twice a
    save, and for the spec of the folder once for each array: 54 KB for a save of 60 arrays. The metrics are only logged; the
    spec is the same for all arrays of a save."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
    to_json, made = ts.KvStore.Spec.to_json, dict[str, Any]()

    def once(spec: ts.KvStore.Spec, include_defaults: bool = False) -> Any:
        key = f"{include_defaults} {spec!r}"
        if key not in made:
            if len(made) == 100:
                made.clear()
            made[key] = to_json(spec, include_defaults)
        return copy.deepcopy(made[key])

    ts.KvStore.Spec.to_json = once  # type: ignore[method-assign, assignment]


_end_leak()
