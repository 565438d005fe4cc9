"""Accelerators that this machine does not have, to compile for: TPU slices and NVIDIA H100s, by name.

The compilers come with the extras `plan-tpu` and `plan-gpu`. They need no device, and refuse what does not fit into its memory.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    """What is published of a chip: https://cloud.google.com/tpu/docs, NVIDIA's H100 data sheet."""

    cores: int  # that a name counts for each chip: v5p-64 has 32 chips, v5e-8 has 8
    axes: int  # of the torus
    memory: float  # bytes that a program may use
    flops: float  # peak in a second, in bfloat16
    most: int = 0  # chips of the largest slice, of TPUs


class Slice(NamedTuple):
    """Devices, and what is known of each of them."""

    devices: Sequence[Any]
    chip: Chip


TPUS = {
    "v5p": Chip(2, 3, 95.74 * GIB, 459e12, 6144),
    "v5e": Chip(1, 2, 15.75 * GIB, 197e12, 256),
    "v6e": Chip(1, 2, 31.25 * GIB, 918e12, 256),
}
H100 = Chip(1, 1, 0.75 * 79.1 * GIB, 989e12)  # JAX takes three quarters, see XLA_PYTHON_CLIENT_MEM_FRACTION
H100_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS_A_HOST = 8


def describe(name: str) -> Slice:
    """The slice of a name such as v5e-8, v5p-64, v6e-256 or h100-8.

    Raises ValueError for another name, and where the compiler is not installed. To be called before any device is used.
    """
    match = re.fullmatch(r"(v5p|v5e|v5litepod|v6e|h100)-([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            f"--plan={name} is not known: there are v5e-8, v5e-256, v6e-256, v5p-64, h100-8, h100-256 and such; for CPUs "
            "set JAX_NUM_CPU_DEVICES=8, and give --dry_run"
        )
    kind, number = match[1].replace("v5litepod", "v5e"), int(match[2])
    jax.config.update("jax_platforms", "cpu")  # for the arrays that this process itself has
    if kind == "h100":
        hosts = -(-number // GPUS_A_HOST)
        if hosts > 1 and number % GPUS_A_HOST:
            raise ValueError(f"--plan={name}: more than {GPUS_A_HOST} GPUs must be a multiple of {GPUS_A_HOST}")
        needs("jax_cuda12_plugin", "plan-gpu", name)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100_TARGET, topology=f"1x{hosts}x{number // hosts}"
        )
        return Slice(topology.devices, H100)
    chip = TPUS[kind]
    chips, odd = divmod(number, chip.cores)
    if odd or chips & (chips - 1) or chips > chip.most:
        counted = f", counted as {chip.cores} cores each" if chip.cores > 1 else ""
        raise ValueError(f"--plan={name}: a slice has a power of two of chips{counted}, and at most {chip.most}")
    needs("libtpu", "plan-tpu", name)
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    shape = "x".join(map(str, torus(chips, chip.axes)))
    try:
        topology = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu")
    except Exception as error:  # of the plugin, of many kinds
        locked = "another program on this machine uses the TPU compiler: wait for it"
        why = locked if "lockfile" in str(error) else f"there is no such slice ({kind}:{shape})"
        raise ValueError(f"--plan={name}: {why}") from error
    return Slice(topology.devices, chip)


def needs(module: str, extra: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'--plan={name} needs a compiler that is not installed: pip install "mim_jax[{extra}]"')


def torus(chips: int, axes: int) -> list[int]:
    """The sides of a slice, as equal as powers of two can be, the smallest first: 32 chips are 4 x 8 or 2 x 4 x 4."""
    power = int(math.log2(chips))
    return sorted(2 ** (power // axes + (i < power % axes)) for i in range(axes))
