"""Checkpoints with Orbax: written while the training goes on, whole or not at all; restored onto any number of devices.

A checkpoint holds the state and a record: step, config, versions, devices, numbers of bad images and of skipped steps in a row.
"""

import contextlib
import copy
import functools
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from jax.experimental import multihost_utils

import mim_jax
from mim_jax import config as configs
from mim_jax import durations
from mim_jax.config import leaves

# Keys that may change when a run is continued: the numbers of the training do not depend on them (`total` is printed).
MAY_CHANGE = re.compile(
    r"(recipe|total|log_every|max_skipped|resume|init_from|init_parts|(.*\.)?model\.unroll|data\.(dir|workers|eval_split)"
    r"|(eval|checkpoint|mesh)\..*|target\.(config|workdir|weights)"
    # Of the frozen target, only what makes the network counts.
    r"|target\.network\.(?!(method|network|model|\w*head|quantizer)\b|data\.(mean|std)$).*)"
)
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


class SavedRun:
    """The newest checkpoint of the run in a workdir, to read; nothing is changed there.

    Raises FileNotFoundError when the workdir has no run or the run has no checkpoint.
    """

    def __init__(self, workdir: str | Path):
        self.folder = absolute(workdir) / "checkpoints"
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no run in {self.folder.parent}: it has no folder checkpoints")
        if not (steps := saved_steps(self.folder)):
            raise FileNotFoundError(f"there is no checkpoint in {self.folder}")
        self.step = steps[0]
        self.path = self.folder / str(self.step)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """step, config, versions, devices, bad_images, skipped."""
        with self._named_errors():
            return read_record(self.path)

    def shapes(self) -> dict[str, dict[str, Any]]:
        """{"params", "teacher" or "extra": {part: tree of jax.ShapeDtypeStruct}}"""
        with self._named_errors():
            tree = ocp.PyTreeCheckpointer().metadata(self.path / "state").item_metadata.tree
        sections = {name: tree[name] for name in ("params", "teacher", "extra")}
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sections)

    def read(self, abstract: Any) -> Any:
        """A part of the tree of `shapes`, with the dtypes and shardings of `abstract` (without sharding: NumPy arrays)."""
        with self._named_errors():
            return read_arrays(self.path, abstract, partial=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type that Orbax and TensorStore raise
            raise OSError(f"the checkpoint of step {self.step} in {self.folder} cannot be read: {brief(error)}") from error


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints that a run writes to `workdir/checkpoints`.

    Raises OSError, naming the folder, when it cannot be written or has no room for another checkpoint.
    """

    def __init__(self, workdir: str | Path, config: ml_collections.ConfigDict):
        self.folder, self.config = absolute(workdir) / "checkpoints", config
        options = ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, cleanup_tmp_directories=True, create=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "record"))
        except OSError as error:
            raise OSError(error.errno, f"cannot keep checkpoints: {error.strerror}", str(self.folder)) from error

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # after `wait` nothing can fail; without it, an earlier error is on its way
            self.manager.close()

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, record) of the newest checkpoint that can be read, see `restore`. Later ones are set aside: they are
        renamed, and the run will save these steps again."""
        state, record = restore(self.folder, abstract, self.config)
        for later in saved_steps(self.folder):
            if later > record["step"] and jax.process_index() == 0:
                (self.folder / str(later)).rename(self.folder / f"unreadable_{later}")
        multihost_utils.sync_global_devices("set aside")
        self.manager.reload()
        return state, record

    def save(self, step: int, state: Any, **record: Any) -> None:
        """Begins to write and returns; later steps do not change what is written. Raises the error of an earlier save."""
        if step == self.manager.latest_step():
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise OSError(
                f"no room for a checkpoint in {self.folder}: {free / 2**20:,.0f} MiB are free and "
                f"{1.2 * needed / 2**20:,.0f} are needed. {self.kept()}"
            )
        record |= {"step": step, "config": as_dict(self.config), "versions": versions(), "devices": devices()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        with self._named_errors():
            self.manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong."""
        with self._named_errors():
            self.manager.wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        """Whether any process of the run got SIGTERM; all processes must ask at the same steps."""
        return self.manager.reached_preemption(step)

    def kept(self) -> str:
        """A sentence for error messages: which checkpoint is safe."""
        with contextlib.suppress(Exception):  # of a save that is under way: another error is reported now
            self.manager.wait_until_finished()
        steps = saved_steps(self.folder)
        return f"The checkpoint of step {steps[0]} is whole." if steps else "No checkpoint was written yet."

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns any exception of Orbax and TensorStore into one OSError."""
        try:
            yield
        except Exception as error:
            raise OSError(f"writing a checkpoint to {self.folder} failed: {brief(error)}. {self.kept()}") from error


def restore(folder: Path, abstract: Any, config: ml_collections.ConfigDict) -> tuple[Any, dict[str, Any]]:
    """(state, record) of the newest checkpoint in `folder` that can be read (a crash of the machine can tear one), with the
    shapes and shardings of `abstract`.

    Raises ValueError, naming the keys, for a checkpoint of another configuration, and OSError when none can be read.
    """
    errors = []
    for step in saved_steps(folder):
        try:
            record = read_record(folder / str(step))
            problem = mismatch(record, config)
            if not problem:
                return read_arrays(folder / str(step), abstract), record
        except Exception as error:  # of any type that Orbax and TensorStore raise
            logging.warning("The checkpoint of step %d in %s cannot be read: %s", step, folder, brief(error))
            errors.append(f"step {step}: {brief(error)}")
            continue
        raise ValueError(f"the checkpoint of step {step} in {folder} {problem}")
    raise OSError(f"no checkpoint in {folder} can be read: {'; '.join(errors)}")


def mismatch(record: dict[str, Any], config: ml_collections.ConfigDict) -> str:
    """Why the run of `config` cannot continue the checkpoint of `record`; "" when it can."""
    if "versions" not in record:
        return "is from a version of mim_jax before 0.2: finish that run with that version, or give another workdir"
    if differing := differences(record["config"], as_dict(config)):
        lines = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in differing)
        advice = "Give another workdir, or start a new run from these parameters with --config.init_from."
        return f"is of another configuration. Then and now:\n{lines}\n{advice}"
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
        if old.get(key) != new.get(key) and not MAY_CHANGE.fullmatch(key)
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
    return Path(path).expanduser().absolute()


def saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, newest first; [] without the folder. Orbax renames a checkpoint to its
    step at the end."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def read_record(path: Path) -> dict[str, Any]:
    return json.loads((path / "record/metadata").read_text())


def read_arrays(path: Path, abstract: Any, partial: bool = False) -> Any:
    """The state of the checkpoint in the folder `path`, or a part of it, with the dtypes and shardings of `abstract`."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=partial)
    return ocp.PyTreeCheckpointer().restore(path / "state", args=args)


def brief(error: Exception) -> str:
    """An error of Orbax or TensorStore without its specification of the array, a page long."""
    return re.split(r" \[tensorstore_spec| See full TensorStore|\n", f"{type(error).__name__}: {error}")[0]


def as_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """As JSON has it: tuples are lists."""
    return json.loads(config.to_json_best_effort())


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
