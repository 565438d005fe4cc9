"""Learned weights: of another run (`config.init_from`, `continue_from`, `target.workdir`) or of a file of official ones.

What a run learned is its EMA teacher, or its parameters if it has no teacher.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from mim_jax import convert, layouts, sharding
from mim_jax.checkpoint import SavedRun, newest
from mim_jax.config import begins_with, kind
from mim_jax.methods.base import Params, made
from mim_jax.models import positions
from mim_jax.sharding import path_name

MAY_LACK = {"mask_token", "norm"}  # what of an encoder one method has and another does not
TABLE = "relative_position_bias_table"
SECTIONS = ("teacher", "params", "extra")  # of a saved state; the first that has a part has what was learned of it


class Run(NamedTuple):
    """A run, to be used: `run.method.features(run.params, images)`."""

    config: ml_collections.ConfigDict
    method: Any
    params: Params  # what was learned, by part
    extra: Params
    step: int
    which: str = ""  # of a run with both: "teacher" or "student"
    versions: Mapping[str, str] = MappingProxyType({})  # of the libraries that it was trained with


def load_run(workdir: str | Path, which: str = "") -> Run:
    """The newest checkpoint in a workdir that is not damaged: of the teacher if there is one, or of `which`, "teacher" or
    "student". Raises FileNotFoundError if there is none, and ValueError for a teacher that the run does not have."""
    if which not in ("", "teacher", "student"):
        raise ValueError(f"which is {which!r}, but must be teacher or student")

    def read(saved: SavedRun) -> Run:
        config = ml_collections.ConfigDict(saved.record["config"]).lock()
        shapes = saved.shapes()
        if which == "teacher" and not shapes["teacher"]:
            raise ValueError(f"{saved.workdir} is a run of {config.method}, which has no teacher")
        sections = {part: "params" if which == "student" else where(shapes, part) for part in shapes["params"]}
        learned, extra = read_parts(saved, sections, shapes), saved.read({"extra": shapes["extra"]})["extra"]
        taken = (which or "teacher") if shapes["teacher"] else ""
        return Run(config, made(config), learned, extra, saved.step, taken, saved.record.get("versions", {}))

    return newest(workdir, read)


def abstract_target(method: Any, config: ml_collections.ConfigDict) -> Params:
    """The shapes of the frozen target's parameters, with their shardings where a mesh is set; {} for a method without."""
    if method.target is None:
        return {}
    shapes = jax.eval_shape(lambda: method.target.init_parts(jax.random.key(0)))
    return sharding.placed(shapes, config.mesh.rules, every_rule=False)


def load_target(method: Any, config: ml_collections.ConfigDict) -> Params:
    """The parameters of the frozen target that `config.target` names, by part; {} for a method without.

    Raises FileNotFoundError if there is no such run or file, and ValueError if none is named or it is of another model.
    """
    wanted = abstract_target(method, config)
    if not wanted:
        return {}
    target = config.target
    if target.weights:
        name = kind(target.network)
        if name in convert.OFFICIAL:
            found = convert.official(target.weights, name)
            lines = [f"official weights of the network {name}, {len(jax.tree.leaves(found))} arrays, none is missing"]
        else:
            found, lines = (weights := layouts.read(target.weights)).parts, weights.lines
        given = {part: found[part] for part in wanted if part in found}
        refuse(misfits(given, wanted), f"the weights in {target.weights} are")
        if jax.process_index() == 0:
            print(f"the target is from {target.weights}; {'; '.join(lines)}", file=sys.stderr)
        return jax.tree.map(lambda a, s: jax.device_put(np.asarray(a, s.dtype), s.sharding), given, wanted)
    if not target.workdir:
        raise ValueError(
            f"{config.method} learns from {target.config}: name its run, --config.target.workdir=..., or a file of weights, "
            "--config.target.weights=FILE"
        )

    def read(saved: SavedRun) -> Params:
        shapes = saved.shapes()
        sections = {part: where(shapes, part) for part in wanted}
        there = {part: shapes[section][part] for part, section in sections.items() if section}
        refuse(misfits(there, wanted), f"the parameters in {saved.path} are")
        return read_parts(saved, sections, dict.fromkeys(SECTIONS, wanted))

    return newest(target.workdir, read)


def begin_with(method: Any, config: ml_collections.ConfigDict, state: Any) -> Any:
    """`state` with what the run `config.init_from` or `config.continue_from` learned, or with the encoder in a file of weights;
    one line on standard error says what was taken.

    Taken is each part that both have (of `config.init_parts`, if it names some). Where only one of the two has a teacher, it is
    filled from the parameters, or fills them; with `config.encoder` (fine-tuning, probing) or `continue_from` the teacher fills
    both. Learned positions are interpolated for another image size, and a table of relative positions that all blocks share is
    copied where each block has one. A mask token and a final norm that only one of the two has are new or dropped. A part of
    another shape (another head) stays new, and so does `extra` then. Raises ValueError if the encoder does not fit, and for
    names in `init_parts` that are not parts of both.
    """
    path = begins_with(config)
    if layouts.is_weights(path):
        return begun(method, config, state, FromFile(path, method))
    return newest(path, lambda saved: begun(method, config, state, saved))


class FromFile:
    """The encoder in a file of weights, as a `SavedRun`. Raises ValueError if `method` computes something else with it, or
    normalises images in another way than the file says."""

    def __init__(self, path: str, method: Any):
        weights = layouts.read(path)
        self.path, self.parts = path, weights.parts
        there: Any = weights.network.backbone
        here: Any = getattr(method, method.encoder_part, None)
        names = "heads act rotary rotary_period bilinear attn_norm window".split()
        differ = [f"{n}: {getattr(there, n)} there, {getattr(here, n)} here" for n in names if differs(there, here, n)]
        refuse(differ, f"the encoder in {path} is")
        if differs(there, here, "norm_eps"):
            command = f"python -m mim_jax.convert {path} --eps={here.norm_eps:g} --out=DIR"
            raise ValueError(
                f"the norms of the encoder in {path} have epsilon {there.norm_eps:g}, those of this method {here.norm_eps:g}: "
                f"to take it with that, name the folder DIR that `{command}` writes"
            )
        colors = {name: (getattr(weights, name), getattr(method.views, name)) for name in ("mean", "std")}
        colors = {name: pair for name, pair in colors.items() if not np.allclose(*pair, atol=1e-4)}
        told = [f"{name} {in_words(theirs)} there, {in_words(ours)} here" for name, (theirs, ours) in colors.items()]
        if colors and not any("no configuration says it" in line for line in weights.lines):
            flags = " ".join(f'--config.data.{name}="({in_words(theirs)})"' for name, (theirs, _) in colors.items())
            raise ValueError(f"the encoder in {path} is for other images, {'; '.join(told)}: set {flags}")
        names = "pos_offset antialias".split()
        told += [f"{n} {getattr(there, n)} there, {getattr(here, n)} here" for n in names if differs(there, here, n)]
        self.description = "; ".join([path, *weights.lines, *told])

    def shapes(self) -> dict[str, Params]:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.parts)
        return {"params": shapes, "teacher": {}, "extra": {}}

    def read(self, abstract: dict[str, Params]) -> dict[str, Params]:
        def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
            array = functools.reduce(lambda tree, key: tree[key.key], path, self.parts)
            return jax.device_put(np.asarray(array, leaf.dtype), leaf.sharding)

        return {"params": jax.tree.map_with_path(placed, abstract["params"])}


def in_words(color: Sequence[float]) -> str:
    return ", ".join(f"{x:.6g}" for x in color)


def differs(there: Any, here: Any, name: str) -> bool:
    return hasattr(there, name) and hasattr(here, name) and getattr(there, name) != getattr(here, name)


def begun(method: Any, config: ml_collections.ConfigDict, state: Any, saved: Any) -> Any:
    """As `begin_with`, with this `SavedRun` or `FromFile`."""
    shapes = saved.shapes()
    here = {name: getattr(state, name) for name in SECTIONS}
    both = [part for part in state.params if part in shapes["params"]]
    if unknown := set(config.init_parts or ()) - set(both):
        raise ValueError(f"init_parts names {sorted(unknown)}, but {saved.path} and this model have in common only {both}")

    pairs: list[tuple[str, str, str]] = []  # (our section, part, their section)
    wrong: dict[str, str] = {}
    for part in config.init_parts or both:
        there = shapes["params"][part]
        ours = laid_out(state.params[part], there)
        found = misfits({part: shared(there, ours)}, {part: shared(ours, there)}, loose=positions.LEARNED)
        if part == method.encoder_part:
            refuse(found, f"the parameters in {saved.path} are")
        if found:
            wrong[part] = f" ({found[0]})"
        elif part in state.teacher:
            student = where(shapes, part) if "encoder" in config or config.continue_from else "params"
            pairs += [("params", part, student), ("teacher", part, where(shapes, part))]
        else:
            pairs.append(("params", part, where(shapes, part)))
    new = [part + wrong.get(part, "") for part in state.params if ("params", part) not in {pair[:2] for pair in pairs}]
    taken_parts = [part for section, part, _ in pairs if section == "params"]
    fresh, dropped = list[str](), [part for part in shapes["params"] if part not in taken_parts]
    for part in taken_parts:
        ours, there = (MAY_LACK & set(tree) for tree in (state.params[part], shapes["params"][part]))
        fresh += [f"{part}/{name}" for name in sorted(ours - there)]
        dropped += [f"{part}/{name}" for name in sorted(there - ours)]
    if not new and not misfits(shapes["extra"], state.extra):
        pairs += [("extra", part, "extra") for part in state.extra]
    elif state.extra:
        new.append("extra")

    fitted, copied = dict[str, None](), dict[str, None]()
    encoder = getattr(method, method.encoder_part, None)
    offset, antialias = getattr(encoder, "pos_offset", 0.1), getattr(encoder, "antialias", False)

    def fit(path: Any, there: jax.Array, ours: jax.Array) -> jax.Array:
        name = path_name(path)
        if there.shape == ours.shape:
            return there
        if getattr(encoder, "pos", "").startswith("sincos") and name.endswith("pos_embed"):
            return ours  # positions that are never trained: those of this size
        if there.ndim < ours.ndim:
            copied[name] = None
        if there.shape != ours.shape[-there.ndim :]:
            fitted[name] = None
        table = functools.partial(positions.fit_positions, name.rpartition("/")[2], shape=ours.shape)
        resize = functools.partial(table, offset=offset, antialias=antialias)
        return jax.jit(resize, out_shardings=ours.sharding)(there)

    for section in SECTIONS:
        sections = {part: theirs for ours, part, theirs in pairs if ours == section}
        ours = {part: laid_out(here[section][part], shapes[theirs][part]) for part, theirs in sections.items()}
        there = {part: shared(shapes[theirs][part], ours[part]) for part, theirs in sections.items()}
        ours = {part: shared(tree, there[part]) for part, tree in ours.items()}
        wanted = {part: jax.tree.map(as_saved, ours[part], there[part]) for part in sections}
        read = jax.tree.map_with_path(fit, read_parts(saved, sections, dict.fromkeys(SECTIONS, wanted)), ours)
        here[section] = here[section] | {
            part: here[section][part] | laid_out(tree, here[section][part]) if isinstance(tree, dict) else tree
            for part, tree in read.items()
        }
    if jax.process_index() == 0:
        taken = [f"{ours}/{part}{f' from {theirs}' * (ours != theirs)}" for ours, part, theirs in pairs]
        text = f"initialised from {saved.description}: {', '.join(taken)}"
        more = {"interpolated": fitted, "copied to each block": copied, "dropped": dropped, "new": new + fresh}
        text += "".join(f"; {what}: {', '.join(names)}" for what, names in more.items() if names)
        print(text, file=sys.stderr)
    return dataclasses.replace(state, **here)


def shared(tree: Any, other: Any) -> Any:
    """A part without the mask token and the final norm that the other does not have, so that the two fit."""
    if not isinstance(tree, dict):
        return tree
    return {name: leaf for name, leaf in tree.items() if name not in MAY_LACK or name in other}


def laid_out(tree: Any, other: Any) -> Any:
    """A part with its table of relative positions where the other has it: at the top, for all blocks, or in the blocks."""
    if not isinstance(tree, dict) or not isinstance(other, dict) or "blocks" not in tree or "blocks" not in other:
        return tree
    if TABLE in other and TABLE in tree["blocks"]:
        blocks = dict(tree["blocks"])
        return tree | {TABLE: blocks.pop(TABLE), "blocks": blocks}
    if TABLE in other["blocks"] and TABLE in tree:
        rest = {name: leaf for name, leaf in tree.items() if name != TABLE}
        return rest | {"blocks": tree["blocks"] | {TABLE: tree[TABLE]}}
    return tree


def where(shapes: dict[str, Params], part: str) -> str:
    """The section of a saved state that has what was learned of a part; "" if none has it."""
    return next((section for section in SECTIONS if part in shapes[section]), "")


def read_parts(saved: SavedRun, sections: dict[str, str], wanted: dict[str, Params]) -> Params:
    """{part: arrays}, each from its section, in the shapes and shardings of `wanted[section][part]`."""
    abstract: dict[str, Params] = {}
    for part, section in sections.items():
        abstract.setdefault(section, {})[part] = wanted[section][part]
    read = saved.read(abstract) if abstract else {}
    return {part: read[section][part] for part, section in sections.items()}


def as_saved(here: jax.Array, there: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An array as it is to be read: one of another shape (positions) in that shape, whole on each device."""
    place = here.sharding
    if here.shape != there.shape and isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(there.shape, here.dtype, sharding=place)


def misfits(there: Params, here: Params, loose: str = "(?!)") -> list[str]:
    """The arrays of two trees that are not in both, or not of one shape; paths with the regex `loose` may differ in shape."""
    have, want = (
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (there, here)
    )
    return [
        f"{path}: {have.get(path, 'missing')} -> {want.get(path, 'missing')}"
        for path in sorted(have.keys() | want.keys())
        if have.get(path) != want.get(path) and not (path in have and path in want and re.search(loose, path))
    ]


def refuse(misfits: list[str], what: str) -> None:
    """Raises ValueError if there are misfits. `what`: "the parameters are"."""
    if misfits:
        more = f"; and {len(misfits) - 3} others" * (len(misfits) > 3)
        raise ValueError(f"{what} of another model. There and here: {'; '.join(misfits[:3])}{more}")
