"""The placement of arrays: the mesh, rules -> shardings, host batches -> global arrays.

One mesh with the axes `("data", "fsdp")`. Both carry the batch; parameters are replicated over `data` and, by rule,
sharded over `fsdp`. Losses are written for the global batch, so nothing else in the code base mentions a device.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
BATCH = P(AXES)  # axis 0 of everything that has a batch

Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data * fsdp` devices; one of the two may be -1: the remaining devices.

    Raises ValueError when the devices cannot be divided so. The axis type is Auto: jax's default, Explicit, refuses
    Linen modules.
    """
    devices = jax.devices() if devices is None else devices
    n, given = len(devices), (data, fsdp)
    if data == -1 and fsdp > 0:
        data = n // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = n // data
    if min(data, fsdp) < 1 or data * fsdp != n:
        raise ValueError(f"mesh.data={given[0]} x mesh.fsdp={given[1]} cannot be made of the {n} devices that there are")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def current_mesh() -> Mesh | None:
    """The mesh given to `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def platform() -> str:
    """Where the program that is being made will run: "cpu", "gpu" or "tpu". The mesh says it, which may be of devices that this
    machine does not have; without a mesh it is JAX's default."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_count() -> int:
    """How many devices the batch is spread over, also inside a jitted function; without a mesh 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def pin_batch(x: jax.Array) -> jax.Array:
    """Hold `x` [B, ...] to the batch axes; without a mesh, `x` itself. Under FSDP it makes XLA move weights, not tokens."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def of_each_device(run: Callable[..., Any], *batch: Any, whole: Any = ()) -> Any:
    """`run(*batch, *whole)` on each device's part of the `batch`, axis 0 of these arrays and of the results: for kernels that
    XLA cannot cut. A batch that the devices do not divide is run whole on each of them. The gradients of `whole`, arrays that
    each device has, are summed over devices in their own dtype."""
    if jax.sharding.get_abstract_mesh().empty:
        return run(*batch, *whole)
    part = P() if len(batch[0]) % device_count() else BATCH
    specs = (part,) * len(batch) + (P(),) * len(whole)
    return jax.shard_map(run, in_specs=specs, out_specs=part, check_vma=False)(*batch, *whole)


def replicate(tree: Any) -> Any:
    """Inside a jitted function: arrays whole on every device; without a mesh, the tree itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, P())


def path_name(path: tuple) -> str:
    """`params/backbone/blocks/qkv/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def shardings(tree: Any, rules: Rules, mesh: Mesh, every_rule: bool = True) -> Any:
    """A NamedSharding for every leaf of `tree` (arrays or shapes), by the first rule whose regex is found in its path.

    Rules: `(regex, spec)`, a spec naming a mesh axis or None for each array axis. No rule: replicated. An axis that its
    mesh axes do not divide is replicated instead (`table` marks it). Raises ValueError for a rule that is longer than the
    array that it matches and, with `every_rule`, for one that matches no leaf.
    """
    unused = {pattern for pattern, _ in rules}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                if len(spec) > leaf.ndim:
                    raise ValueError(f"sharding rule {pattern!r} has {len(spec)} axes, but {name} has {leaf.ndim}")
                kept = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape)]
                return NamedSharding(mesh, P(*kept))
        return NamedSharding(mesh, P())

    places = jax.tree_util.tree_map_with_path(place, tree)
    if unused and every_rule:
        raise ValueError(f"sharding rules that match no array: {sorted(unused)}")
    return places


def placed(shapes: Any, rules: Rules, every_rule: bool = True) -> Any:
    """`ShapeDtypeStruct`s with the shardings of the rules, where a mesh is set."""
    mesh = current_mesh()
    if mesh is None:
        return shapes
    places = shardings(shapes, rules, mesh, every_rule)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def table(tree: Any, rules: Rules, mesh: Mesh) -> str:
    """The sharding table as text: one line for every distinct placement, widest arrays first."""
    places = shardings(tree, rules, mesh, every_rule=False)
    groups: dict[str, list[tuple[str, int]]] = {}
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places)):
        wanted = next((spec for pattern, spec in rules if re.search(pattern, path_name(path))), ())
        kept = tuple(sharding.spec)
        note = " (indivisible: replicated)" if any(a and a != b for a, b in zip(wanted, kept)) else ""
        groups.setdefault(f"{tuple(kept)}{note}" if any(kept) or note else "replicated", []).append(
            (path_name(path), leaf.size * np.dtype(leaf.dtype).itemsize)
        )
    lines = [f"mesh: {' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"]
    for spec, leaves in sorted(groups.items(), key=lambda item: -sum(size for _, size in item[1])):
        total = sum(size for _, size in leaves)
        biggest = max(leaves, key=lambda leaf: leaf[1])[0]
        lines.append(f"  {spec:<44} {len(leaves):>4} arrays  {total / 2**20:>9.1f} MiB  largest: {biggest}")
    return "\n".join(lines)


def global_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's `share` -> global arrays over the batch axes (without a mesh: plain device arrays)."""
    mesh = current_mesh()
    if mesh is None:
        return jax.device_put(batch)
    size = len(next(iter(batch.values()))) * mesh.size // len(mesh.local_devices)
    place, held = NamedSharding(mesh, BATCH), share(size)

    def of_device(index: tuple[slice, ...], value: np.ndarray) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        first = int(np.searchsorted(held, start))
        return value[first : first + stop - start]

    return {
        key: jax.make_array_from_callback((size, *value.shape[1:]), place, functools.partial(of_device, value=value))
        for key, value in batch.items()
    }


def share(size: int) -> np.ndarray:
    """The rows of a global batch of `size` that this process's devices hold, int [b], in order.

    The rows lie on the devices in the order of the mesh. On a torus this is not the order of the processes, so what a process
    holds may be several pieces.
    """
    mesh = current_mesh()
    if mesh is None:
        return np.arange(size)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in places.values() if index]))
