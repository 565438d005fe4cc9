"""Checkpoints with Orbax: written beside the training, whole or not at all, restored onto any number of devices.

A checkpoint holds the state and a record: the config, and where the data stream stands. Nothing else makes a run.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging

from mim_jax.sharding import path_name

# What may differ between a checkpoint and the run that goes on from it: it changes no number of the training.
FREE = {"eval", "checkpoint", "mesh", "init_from", "resume", "log_every_steps", "max_skipped"}
FREE |= {"data.dir", "data.workers", "data.eval_split", "model.unroll"}


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    Raises:
      FileNotFoundError: where checkpoints of another run are to be read, and there are none.
      OSError: naming the folder, where it cannot be written or has no room for another checkpoint, or where no
        checkpoint in it can be read.
      ValueError: where a checkpoint is of another configuration; names the keys that differ.
    """

    def __init__(self, workdir: str | Path, config: ml_collections.ConfigDict, own: bool = True):
        """`own`: to be written, too. Nothing is changed in another run's workdir."""
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.config = config
        if not own and not self.folder.is_dir():
            raise FileNotFoundError(f"there is no run in {workdir}: it has no folder {self.folder}")
        keep = config.checkpoint.keep if own else None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=own, create=False)
        try:
            if own:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "record"))
        except OSError as error:
            raise OSError(error.errno, f"cannot keep checkpoints: {error.strerror}", str(self.folder)) from error
        if not own and self.latest() is None:
            raise FileNotFoundError(f"there is no checkpoint in {self.folder}")

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any, **record: Any) -> None:
        """Begins to write `state` and returns; the copy is safe from later steps. An earlier failure is raised here."""
        if step == self.latest():
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise OSError(
                f"no room for a checkpoint in {self.folder}: {free / 2**20:,.0f} MiB are free and "
                f"{1.2 * needed / 2**20:,.0f} are needed. {self.kept()}"
            )
        record |= {"step": step, "config": json.loads(self.config.to_json_best_effort())}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        with self.named_errors():
            self.manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what went wrong meanwhile."""
        with self.named_errors():
            self.manager.wait_until_finished()

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, record) of the latest checkpoint that can be read; one that a crash of the machine has torn cannot.

        `abstract` has the shapes and the shardings that are wanted.
        """
        errors = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                record = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
                differing = differences(record["config"], json.loads(self.config.to_json_best_effort()))
                if not differing:
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                    return self.manager.restore(step, args=args).state, record
            except Exception as error:  # whatever Orbax and TensorStore make of broken files
                logging.warning("The checkpoint of step %d in %s cannot be read: %s", step, self.folder, error)
                errors[step] = error
                continue
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} is of another configuration. Then and now:\n  "
                + "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in differing)
                + "\nGive another workdir, or start a new run from these parameters with --config.init_from."
            )
        raise OSError(f"no checkpoint in {self.folder} can be read: {errors}")

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, those that could not be read: the run will save these steps again."""
        for later in self.manager.all_steps():
            if later > step and jax.process_index() == 0:
                (self.folder / str(later)).rename(self.folder / f"unreadable_{later}")
        self.manager.reload()

    def restore_parts(self, abstract: dict[str, dict[str, Any]], loose: str = "(?!)") -> Any:
        """Parts of the state alone, `{"params": {part: ...}}` or others, whatever else the configuration was. Arrays whose
        paths match the regex `loose` come in the shapes that they have there, whole on each device.

        Raises ValueError naming the other arrays of these parts that are missing, unexpected or of another shape.
        """
        path = self.folder / str(self.latest()) / "state"
        checkpointer = ocp.PyTreeCheckpointer()
        saved = checkpointer.metadata(path).item_metadata.tree
        saved = {section: {part: saved[section].get(part, {}) for part in parts} for section, parts in abstract.items()}

        there = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}

        def as_saved(path: Any, here: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = there.get(path_name(path), here.shape)
            if shape == here.shape or not re.search(loose, path_name(path)):
                return here
            whole = here.sharding and jax.sharding.NamedSharding(here.sharding.mesh, jax.sharding.PartitionSpec())
            return jax.ShapeDtypeStruct(shape, here.dtype, sharding=whole)

        abstract = jax.tree.map_with_path(as_saved, abstract)
        check_shapes(saved, abstract, f"the parameters in {self.folder}")
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=True)
        return checkpointer.restore(path, args=args)

    def reached_preemption(self, step: int) -> bool:
        """Whether any process of the run was told to stop; all must ask at the same steps."""
        return self.manager.reached_preemption(step)

    def close(self) -> None:
        """After `wait` there is nothing left to fail; without it, something else has, which is to be told."""
        with contextlib.suppress(Exception):
            self.manager.close()

    def kept(self) -> str:
        """A sentence for error messages: what is safe."""
        with contextlib.suppress(Exception):  # of a save under way: the error that is told now is another
            self.manager.wait_until_finished()
        self.manager.reload()
        step = self.latest()
        return "No checkpoint was written yet." if step is None else f"The checkpoint of step {step} is whole."

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Whatever Orbax and TensorStore throw when a file cannot be written becomes one OSError that says what to do."""
        try:
            yield
        except Exception as error:
            raise OSError(f"writing a checkpoint to {self.folder} failed: {error}. {self.kept()}") from error


def check_shapes(given: Any, wanted: Any, what: str) -> None:
    """Raises ValueError naming the arrays of two trees that are not in both, or not of one shape."""
    have, want = (
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (given, wanted)
    )
    wrong = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
    if wrong:
        raise ValueError(
            f"{what} are of another model. There and here:\n  "
            + "\n  ".join(f"{path}: {have.get(path, 'missing')} -> {want.get(path, 'missing')}" for path in wrong)
        )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of the entries that make it another run."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if name in FREE:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{name}.")
        elif a != b:
            out.append((name, a, b))
    return out
