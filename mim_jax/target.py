"""The fixed network that a method's targets come from (a tokenizer, a teacher): of another run, or official weights.

`config.target` says which: `config` is that network's config file; `workdir` its run, which is trained first if it is not
learned yet; `weights` in its place a `.npz` of official arrays, {state-dict key: array}, of the converter's `family`.
"""

import zipfile
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mim_jax import convert, sharding
from mim_jax.checkpoint import Checkpoints, check_shapes
from mim_jax.methods.base import target_config
from mim_jax.optim import total_steps


def abstract_frozen(method: Any) -> Any:
    """The shapes of `method.frozen`, whole on every device."""
    shapes = jax.eval_shape(method.frozen, jax.random.key(0))
    mesh = sharding.current_mesh()
    placed = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes)


def is_learned(config: ml_collections.ConfigDict) -> bool:
    """Whether the run that the targets come from is at its end; so too where there is nothing to train."""
    target = config.get("target")
    if target is None or target.weights or not target.workdir:
        return True
    first = target_config(config)
    try:
        return (Checkpoints(target.workdir, first, own=False).latest() or 0) >= total_steps(first)
    except FileNotFoundError:
        return False


def load_frozen(method: Any, config: ml_collections.ConfigDict) -> Any:
    """What `config.target` names, laid out as `method.frozen`; {} for a method without.

    Raises FileNotFoundError where there is no such run or file, and ValueError where none is named or it is of another model.
    """
    abstract = abstract_frozen(method)
    if not abstract:
        return {}
    target = config.target
    if target.workdir and not target.weights:
        return Checkpoints(target.workdir, config, own=False).restore_parts(abstract)
    if not target.weights:
        raise ValueError(
            f"{config.method} learns from {target.config}: name its run, --config.target.workdir=..., or official weights, "
            "--config.target.weights=file.npz --config.target.family=..."
        )
    if not Path(target.weights).is_file():
        raise FileNotFoundError(f"there is no file {target.weights} (config.target.weights)")
    try:
        with np.load(target.weights) as arrays:
            named = dict(arrays)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{target.weights} is no .npz file of named arrays: {error}") from error
    parts = convert.from_torch(named, target.family)
    given = {s: {name: parts.get(name, {}) for name in wanted} for s, wanted in abstract.items()}
    check_shapes(given, abstract, f"the weights in {target.weights}")
    return jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), given, abstract)
