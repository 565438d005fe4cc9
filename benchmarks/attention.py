"""Memory of attention and its gradient on a TPU that is not there: the plain product against the fused kernel.

    python benchmarks/attention.py        needs the extra plan-tpu; half a minute on 2 CPU cores

The lengths from which the fused kernel takes less are `mim_jax.models.layers.LONG`. Nothing is run, so nothing is timed.
"""

import jax
import jax.numpy as jnp

from mim_jax import sharding, topology
from mim_jax.models import layers

SHAPES = ((128, 197, 6), (128, 261, 6), (16, 512, 16), (16, 530, 24), (128, 785, 6), (16, 1370, 16), (2, 3000, 16))


def temporaries(devices: list[jax.Device], shape: tuple[int, int, int], longest: int) -> float:
    """GiB a device, for [images a device, tokens, heads] of width 64, with the fused kernel from `longest` tokens on."""
    layers.LONG = longest
    images, tokens, heads = shape
    mesh = sharding.make_mesh(-1, 1, devices)
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        x = jax.ShapeDtypeStruct((images * mesh.size, tokens, heads, 64), jnp.bfloat16, sharding=place)
        step = jax.grad(lambda q, k, v: (layers.attention(q, k, v).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(step).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes / topology.GIB


def main() -> None:
    devices = topology.describe("v5e-8").devices
    print(f"jax {jax.__version__}, v5e-8 as compiled, bfloat16\n\n| images a device, tokens, heads | plain, GiB | fused, GiB |")
    print("| --- | --- | --- |")
    for shape in SHAPES:
        plain, fused = (temporaries(list(devices), shape, longest) for longest in (10**9, 0))
        print(f"| {', '.join(map(str, shape))} | {plain:.2f} | {fused:.2f} |", flush=True)


if __name__ == "__main__":
    main()
