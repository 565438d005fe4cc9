"""The plan of a run without running it: nothing is allocated, and images are counted at most."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview

from mim_jax import sharding
from mim_jax.config import resolve_encoder, resolve_target
from mim_jax.data.sources import open_splits
from mim_jax.durations import steps_per_epoch, total_steps
from mim_jax.learned import abstract_target
from mim_jax.methods.base import make_method
from mim_jax.state import abstract_state
from mim_jax.step import make_train_step
from mim_jax.topology import Slice, describe

# (model.remat, model.microbatches), the fastest first: what is computed again is 0, a part of, 1 and 2 forward passes
WAYS = (("none", 1), ("dots", 1), ("full", 1), ("full", 4), ("full", 16))
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
MARGIN = 0.95  # of the estimate of how many images would fit
USED = 0.4  # share of the peak that a good step reaches: an assumption


class TooLarge(ValueError):
    """The compiler says that the program does not fit into the memory of a device."""


class Program(NamedTuple):
    """A compiled train step, and the shapes that it was compiled for."""

    compiled: jax.stages.Compiled
    state: Any
    target: Any

    @property
    def memory(self) -> Any:
        """What the compiler says of the memory of a device, in bytes."""
        return self.compiled.memory_analysis()

    @property
    def peak(self) -> int:
        """Bytes of memory that a device needs."""
        of_arrays = self.memory.argument_size_in_bytes + self.memory.output_size_in_bytes - self.memory.alias_size_in_bytes
        return of_arrays + self.memory.temp_size_in_bytes


def compile_step(config: ml_collections.ConfigDict) -> Program:
    """The real train step, for the mesh that is set. Raises TooLarge."""
    method = make_method(config)
    state, target = abstract_state(method, config), abstract_target(method, config)
    try:
        compiled = make_train_step(method, config).lower(state, target, abstract_batch(method, config)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = r"([\d.]+[KMG])"  # of both kinds of message that TPU compilers have
        match = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", str(error))
        sizes = [each for each in match.groups() if each] if match else []
        raise TooLarge("needs {} of {}".format(*sizes) if sizes else "does not fit") from error
    return Program(compiled, state, target)


def resolve_remat(config: ml_collections.ConfigDict, memory: float | None = None) -> tuple[str, Program | None]:
    """Sets `model.remat`, where it is "auto", and `model.microbatches` to the fastest way that fits into the memory of a
    device. Returns a line that says so, "" where it is not, and the program if one was compiled. `memory` is in bytes, by
    default that of the devices of the mesh; where they tell none, all fits.

    Compiles the step once for each way that it tries. Raises ValueError if none fits.
    """
    if config.model.get("remat") != "auto":
        return "", None
    if memory is None:
        mesh = sharding.current_mesh()
        device = mesh.local_devices[0] if mesh else jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit")
    if not memory:
        config.model.remat = "none"
        return "model.remat is none: the devices do not tell how much memory they have", None
    tried, given = list[str](), config.model.get("microbatches", 1)
    for remat, microbatches in dict.fromkeys((remat, max(given, least)) for remat, least in WAYS):
        config.model.update(remat=remat, microbatches=microbatches)
        way = remat if microbatches == 1 else f"{remat} with model.microbatches={microbatches}"
        try:
            program = compile_step(config)
        except TooLarge as error:
            tried.append(f"{way} {error}")
            continue
        except ValueError:
            if microbatches == given:
                raise
            break  # the batch cannot be divided so
        if program.peak <= memory:
            before = "".join(f"; {each}" for each in tried)
            return f"model.remat is {way}: {program.peak / 2**30:.2f} of {memory / 2**30:.2f} GiB a device{before}", program
        tried.append(f"{way} needs {program.peak / 2**30:.2f} GiB")
    raise ValueError(
        f"the step does not fit into the {memory / 2**30:.2f} GiB of a device with any model.remat "
        f"({', '.join(tried)}): take more devices, a smaller data.batch_size, or mesh.fsdp"
    )


def plan(config: ml_collections.ConfigDict, topology: str = "") -> str:
    """Compiles the real train step for the devices that there are, or for those of `topology`, and says what it will need.

    Simulated devices are enough: with `JAX_NUM_CPU_DEVICES=8` a laptop plans for eight. Of a topology, see `describe`, there
    need be no device at all. Raises ValueError for a bad config or topology, and if the step does not fit.
    """
    slice_ = describe(topology) if topology else None
    resolve_target(config)
    resolve_encoder(config)
    if config.data.dir and config.data.name != "cifar10":  # which would be fetched
        source, _ = open_splits(config.data.name, config.data.dir, config.data.split, config.data.eval_split)
        config.data.num_examples, config.data.num_classes = len(source), source.num_classes
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slice_ and slice_.devices)
    with jax.set_mesh(mesh):
        make_method(config)  # bad values are refused before anything is compiled
        chosen, program = resolve_remat(config, slice_ and slice_.chip.memory)
        try:
            program = program or compile_step(config)
            if slice_ and program.peak > slice_.chip.memory:
                raise TooLarge(f"needs {program.peak / 2**30:.2f} of {slice_.chip.memory / 2**30:.2f} GiB")
        except TooLarge as error:
            advice = "--config.model.remat=auto, a smaller data.batch_size, mesh.fsdp or more devices"
            raise ValueError(f"the step {error} for each of {mesh.size} devices ({topology}): try {advice}") from error
        return "\n".join([*of_run(config, program, mesh), chosen, *of_program(config, program, mesh, slice_)])


def of_run(config: ml_collections.ConfigDict, program: Program, mesh: jax.sharding.Mesh) -> Sequence[str]:
    """What is trained, and where it lies."""
    state, target, total = program.state, program.target, total_steps(config)
    return [
        parameter_overview.get_parameter_overview(state.params, include_stats=False),
        sharding.table(state, config.mesh.rules, mesh),
        *([f"frozen target\n{sharding.table(target, config.mesh.rules, mesh)}"] if target else []),
        "",
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, global batch {config.data.batch_size}, {total:,} steps "
        f"({total / steps_per_epoch(config):,.1f} epochs)",
    ]


def of_program(
    config: ml_collections.ConfigDict, program: Program, mesh: jax.sharding.Mesh, slice_: Slice | None
) -> Sequence[str]:
    """Memory, communication and arithmetic of a step."""
    state, memory, text = program.state, program.memory, program.compiled.as_text() or ""
    trees = {"parameters": state.params, "teacher": state.teacher, "optimizer": state.opt_state}
    trees |= {"frozen target": program.target}
    lines = ["per device:", *(f"  {name:<15} {device_bytes(tree) / 2**20:>10,.1f} MiB" for name, tree in trees.items() if tree)]
    lines += [f"  temporary       {memory.temp_size_in_bytes / 2**20:>10,.1f} MiB"]
    lines += [
        f"  peak            {program.peak / 2**20:>10,.1f} MiB   (as compiled for {'them' if slice_ else 'this machine'})"
    ]
    lines += [f"  state donated   {donated(text):>10,} arrays of {len(jax.tree.leaves(state)):,}"]
    if slice_:
        each = config.data.batch_size // mesh.size
        room = slice_.chip.memory - program.peak
        more = int(MARGIN * each * (1 + room / max(memory.temp_size_in_bytes, 1)))
        lines += [
            f"  fits: {program.peak / 2**30:.2f} of {slice_.chip.memory / 2**30:.2f} GiB; "
            f"about {max(each, more)} images a device would fit, and it has {each}"
        ]
    lines += ["largest buffers:"]
    lines += [f"  {size / 2**20:>10,.1f} MiB  {shape}  {name}" for size, shape, name in buffers(text)]
    lines += ["sent between devices in a step:" if mesh.size > 1 else ""]
    for (name, dtype), (count, size) in communication(text).items():
        lines.append(f"  {count:>4} {name:<18} {dtype:<5} {size / 2**20:>10,.1f} MiB")
    nominal = step_flops(config, remat="none")
    again = config.model.get("remat", "none") != "none" or config.model.get("microbatches", 1) > 1
    executed = step_flops(config) if again else nominal
    lines += [
        f"FLOPs per step: {nominal:.3e} in all, {nominal / mesh.size:.3e} per device, "
        f"{nominal / config.data.batch_size / 1e9:,.2f} GFLOP per image"
        + f"; with what is computed again {executed / nominal - 1:.0%} more"
        * (executed > nominal)
    ]
    if slice_:
        seconds = executed / mesh.size / (USED * slice_.chip.flops)
        lines.append(
            f"at {USED:.0%} of the peak of {slice_.chip.flops / 1e12:.0f} TFLOP/s, an assumption: "
            f"{seconds * 1e3:,.3g} ms a step, {config.data.batch_size / seconds:,.0f} images/s"
        )
    return list(filter(None, lines))


def buffers(program: str, count: int = 3) -> list[tuple[int, str, str]]:
    """(bytes, shape, name of the operation) of the largest results in a compiled program's text, which a device has in memory,
    each shape once. They do not all live at a time."""
    fused = set(re.findall(r" fusion\(.*? calls=(%[\w.-]+)", program))  # whose own values are never whole
    found, inside = dict[str, tuple[int, str, str]](), False
    for line in program.splitlines():
        if line.endswith("{"):
            inside = line.split(maxsplit=1)[0] in fused
        match = re.match(r" +(?:ROOT )?%?[\w.-]+ = ([a-z]+\d+\[([\d,]+)\])\S* ([\w-]+)\(", line)
        if match is None or inside or match[3] in ("parameter", "get-tuple-element", "bitcast", "broadcast", "constant"):
            continue
        size = math.prod(map(int, match[2].split(","))) * bits(match[1]) // 8
        name = re.search(r'op_name="[^"]*?/?([^/"]+/[^/"]+)"', line)
        found.setdefault(match[1], (size, match[1], name[1] if name else match[3]))
    return sorted(found.values(), reverse=True)[:count]


def donated(program: str) -> int:
    """How many arguments a compiled program's text gives the memory of to a result."""
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry_computation_layout", program)
    return len(re.findall(r"\{[\d, ]*\}: \(", aliases[1])) if aliases else 0


def communication(program: str) -> dict[tuple[str, str], tuple[int, int]]:
    """{(collective, dtype): (number, bytes of the results)} of a compiled program's text. What is in a loop counts once."""
    numbers, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, results in collectives(program):
        for dtype, elements in results:
            sizes[name, dtype] += elements * bits(dtype) // 8
        numbers.update({(name, dtype) for dtype, _ in results})
    return {key: (numbers[key], sizes[key]) for key in sorted(sizes)}


def collectives(program: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """(operation, [(dtype, elements) of each result]) of what a compiled program's text sends between devices.

    A "ring" is a collective-permute of a TPU's product under FSDP: while it multiplies, the compiler passes the parts of a
    kernel round (an all-gather), or those of its gradient (a reduce-scatter), one device further each time. A "halo" is one of
    columns of a gradient at the border between two devices: a TPU scatters blocks that are wider than the parts of the devices.
    """
    for shapes, name, start, rest in re.findall(rf"= (\(*[a-z]+\d*\[.*?) ({COLLECTIVES})(-start)?\((.*)", program):
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
            sources, targets = (sorted(re.findall(side, pairs[1])) for side in (r"\{(\d+),", r",(\d+)"))
            name = "ring" if sources == targets and re.search(r'op_name="[^"]*/dot_general"', rest) else name
            name = "halo" if name == "collective-permute" and scattered(program, rest[: rest.index(")")]) else name
        results = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
        if start and name in ("ring", "halo", "all-gather", "collective-permute"):  # operands, results, and u32[] of its own
            results = [each for each in results if each != ("u32", "")]
            results = results[len(results) // 2 :]
        yield name, [(dtype, math.prod(int(n) for n in sides.split(",") if n)) for dtype, sides in results]


def scattered(program: str, name: str) -> bool:
    """Whether a value in a compiled program's text is a slice of what a reduce-scatter has made."""
    of = re.search(rf"{re.escape(name)} = \S+ slice\((%[\w.-]+)\)", program)
    return bool(of and re.search(rf"{re.escape(of[1])} = .*(reduce-scatter\(|calls=%all-reduce-scatter)", program))


def bits(dtype: str) -> int:
    return int(match[1]) if (match := re.search(r"(\d+)", dtype)) else 8


def abstract_batch(method: Any, config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the pipeline yields, over the batch axes of the mesh if there is one."""
    mesh = sharding.current_mesh()
    place = None if mesh is None else jax.sharding.NamedSharding(mesh, sharding.BATCH)
    shapes = method.views.batch_shapes(config.data.batch_size, config.data.canvas)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for name, s in shapes.items()}


def step_flops(
    config: ml_collections.ConfigDict, make: Callable[[ml_collections.ConfigDict], Any] = make_method, remat: str = ""
) -> float:
    """Floating-point operations of a step over the global batch, as XLA counts them before it optimizes; with another
    `model.remat`, and no microbatches, if one is given.

    XLA counts the body of a loop once, however often it runs: so the blocks are unrolled first. It is asked for a CPU's
    program: of an accelerator's fused kernels it knows nothing.
    """
    config = config.copy_and_resolve_references()
    if "unroll" in config.model:
        config.model.unroll = 1000
        if remat:
            config.model.update(remat=remat, microbatches=1)
    with jax.set_mesh(sharding.make_mesh(1, 1, jax.local_devices(backend="cpu")[:1])):
        method = make(config)
        args = abstract_state(method, config), abstract_target(method, config), abstract_batch(method, config)
        cost: Any = make_train_step(method, config).lower(*args).cost_analysis()
    return cost["flops"]


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
