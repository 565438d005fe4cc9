"""Which patches are hidden. A mask is bool [B, crops, N], True where masked, patches row-major."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RandomMask:
    """Masks `count` of the `grid` x `grid` squares of each global crop, each square `repeat` x `repeat` patches.

    The number of masked patches is the same in every crop, so all shapes that follow from it are static. Raises ValueError
    where nothing is masked or nothing is left.
    """

    grid: int
    count: int
    repeat: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.count < self.grid**2:
            raise ValueError(f"mask.ratio would mask {self.count} of {self.grid**2} squares: there must be some, and some left")

    @property
    def visible(self) -> int:
        """Patches of a crop that are not masked."""
        return (self.grid**2 - self.count) * self.repeat**2

    def draw(self, key: jax.Array, index: jax.Array, crops: int) -> jax.Array:
        """Masks [B, crops, N] for the examples `index` [B]: a function of `key` and each example's index alone."""

        def noise(index: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, index), (crops, self.grid**2))

        return self.of_order(jnp.argsort(jax.vmap(noise)(index), axis=-1))

    def of_order(self, order: jax.Array) -> jax.Array:
        """The masks [..., N] of the squares that come first in `order`, a permutation of the squares, [..., grid ** 2]."""
        masked = (jnp.argsort(order, axis=-1) < self.count).reshape(*order.shape[:-1], self.grid, self.grid)
        patches = jnp.repeat(jnp.repeat(masked, self.repeat, axis=-2), self.repeat, axis=-1)
        return patches.reshape(*order.shape[:-1], -1)
