"""The plan of a run without running it: nothing is allocated and no data is read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview

from mim_jax import sharding
from mim_jax.config import resolve_encoder, resolve_target
from mim_jax.durations import steps_per_epoch, total_steps
from mim_jax.learned import abstract_target
from mim_jax.methods.base import make_method
from mim_jax.state import abstract_state
from mim_jax.step import make_train_step


def plan(config: ml_collections.ConfigDict) -> str:
    """Compiles the real train step for the available devices and says what it will need.

    Simulated devices are enough: with `JAX_NUM_CPU_DEVICES=8` a laptop plans for eight.
    """
    resolve_target(config)
    resolve_encoder(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    with jax.set_mesh(mesh):
        method = make_method(config)
        state, target = abstract_state(method, config), abstract_target(method, config)
        args = state, target, abstract_batch(method, config)
        memory: Any = make_train_step(method, config).lower(*args).compile().memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes
        flops, total = step_flops(config), total_steps(config)
        trees = {"parameters": state.params, "teacher": state.teacher, "optimizer": state.opt_state, "frozen target": target}
        return "\n".join(
            [
                parameter_overview.get_parameter_overview(state.params, include_stats=False),
                sharding.table(state, config.mesh.rules, mesh),
                *([f"frozen target\n{sharding.table(target, config.mesh.rules, mesh)}"] if target else []),
                "",
                f"{mesh.size} x {mesh.devices.flat[0].device_kind}, global batch {config.data.batch_size}, {total:,} steps "
                f"({total / steps_per_epoch(config):,.1f} epochs)",
                "per device:",
                *(f"  {name:<15} {device_bytes(tree) / 2**20:>10,.1f} MiB" for name, tree in trees.items() if tree),
                f"  peak            {peak / 2**20:>10,.1f} MiB   (as compiled for this machine)",
                f"  state donated   {memory.alias_size_in_bytes / 2**20:>10,.1f} MiB of {device_bytes(state) / 2**20:,.1f}",
                f"FLOPs per step: {flops:.3e} in all, {flops / mesh.size:.3e} per device, "
                f"{flops / config.data.batch_size / 1e9:,.2f} GFLOP per image",
            ]
        )


def abstract_batch(method: Any, config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the pipeline yields, over the batch axes of the mesh if there is one."""
    mesh = sharding.current_mesh()
    place = None if mesh is None else jax.sharding.NamedSharding(mesh, sharding.BATCH)
    shapes = method.views.batch_shapes(config.data.batch_size, config.data.canvas)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for name, s in shapes.items()}


def step_flops(config: ml_collections.ConfigDict, make: Callable[[ml_collections.ConfigDict], Any] = make_method) -> float:
    """Floating-point operations of a step over the global batch, as XLA counts them before it optimizes.

    XLA counts the body of a loop once, however often it runs: so the blocks are unrolled first.
    """
    config = config.copy_and_resolve_references()
    if "unroll" in config.model:
        config.model.unroll = 1000
    method = make(config)
    args = abstract_state(method, config), abstract_target(method, config), abstract_batch(method, config)
    cost: Any = make_train_step(method, config).lower(*args).cost_analysis()
    return cost["flops"]


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
