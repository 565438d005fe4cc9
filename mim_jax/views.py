"""What goes into a loss: the crops and masks of each image. One specification, from which all shapes follow.

Finished views have one layout for all methods. B, the batch, is always axis 0 and the only sharded axis:

    global [B, G, H, W, C] float, local [B, L, h, w, C] float, label [B] int32, index [B] int32,
    mask [B, G, N] bool, True where masked, patches of the global crops row-major; or masks of other names, [B, G * m, N] where
    each crop has m of a name in a row (`Masks.shapes`),
    target [B, G, H', W', C] float in 0..1, the same crops as a tokenizer or teacher is to see them,
    target_label [B, K] float in the place of the labels, where `Method.mix` has mixed or smoothed them
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.data.augment import Crops, augment, denormalize
from mim_jax.masking import NO_MASKS, Masks

AUGMENT, LOSS, MASK, MIX = range(4)  # streams of randomness; each is a function of (seed, step, stream), and of an index

M = TypeVar("M", bound=Masks, covariant=True)
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Views(Generic[M]):
    """The views that a method needs.

    `crops`: groups of crops that the device makes of each image, the global ones first. `masks`: which patches of the global
    crops are hidden. `mean` and `std` normalise the crops, per channel, for pixels in 0..1.
    """

    crops: tuple[Crops, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: M = NO_MASKS  # type: ignore[assignment]

    @property
    def global_crops(self) -> int:
        return len(self.crops[0].policies)

    def make(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """A host batch (see `batch_shapes`) -> finished views; a function of `key` and each example's index alone."""
        views = augment(batch, self.crops, jax.random.fold_in(key, AUGMENT), self.mean, self.std)
        return views | self.masks.draw(jax.random.fold_in(key, MASK), batch["index"], self.global_crops)

    def host_masks(self, seed: int) -> Callable[[np.ndarray], dict[str, np.ndarray]] | None:
        """What the pipeline draws: positions in the stream [b] -> masks by name; None where the device draws them."""
        if not self.masks.on_host:
            return None
        return functools.partial(self.masks.draw_on_host, seed, crops=self.global_crops)

    def example_masks(self, number: int, crops: int | None = None) -> dict[str, np.ndarray]:
        """Masks of `number` examples for pictures and tests, always the same; {} for a method without."""
        return self.masks.examples(number, self.global_crops if crops is None else crops)

    def batch_shapes(self, batch_size: int, canvas: int) -> Shapes:
        """What the pipeline yields: `image` uint8 [B, S, S, 3], `size`, `label`, `index`, and masks drawn on the host."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((canvas, canvas, 3), np.uint8), "size": ((2,), np.int32)}
        shapes |= self._shared(self.masks.on_host)
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def shapes(self, batch_size: int) -> Shapes:
        """The finished views."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for group in self.crops:
            shapes[group.name] = (len(group.policies), group.size, group.size, 3), np.float32
            if group.target:
                shapes["target"] = (len(group.policies), group.target.size, group.target.size, 3), np.float32
        shapes |= self._shared(True)
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def zeros(self, batch_size: int = 1) -> dict[str, jax.Array]:
        """Finished views of zeros, from which parameters get their shapes."""
        return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.shapes(batch_size).items()}

    def denormalize(self, images: jax.Array) -> jax.Array:
        """Normalised images [..., H, W, 3] -> uint8."""
        return denormalize(images, self.mean, self.std)

    def _shared(self, masks: bool) -> dict[str, tuple[tuple[int, ...], Any]]:
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((), np.int32), "index": ((), np.int32)}
        return shapes | {name: (s, np.bool_) for name, s in self.masks.shapes(self.global_crops).items() if masks}
