"""Which patches are hidden. A mask is bool [B, crops, N], True where masked, patches row-major.

Masks that are drawn patch by patch are made on the device. Those of blocks, whose loops no accelerator likes, are made on
the host (`HostMasks`) as a function of each example's position in the stream of data, so they do not depend on the number of
hosts and workers. All have static counts. Grids are (rows, columns).
"""

import dataclasses
import math
import random
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]  # (rows, columns) of patches


class Masks:
    """The masks of a method; this class stands for a method without. Subclasses draw on the device or on the host."""

    on_host: ClassVar[bool] = False

    def shapes(self, crops: int) -> dict[str, tuple[int, ...]]:
        """The shape of each mask of one example, by its name among the views."""
        return {}

    def draw(self, key: jax.Array, index: jax.Array, crops: int) -> dict[str, jax.Array]:
        """On the device, for the examples `index` [B]: a function of `key` and each example's index alone."""
        return {}

    def draw_on_host(self, seed: int, positions: np.ndarray, crops: int) -> dict[str, np.ndarray]:
        """On the host, for the examples at these positions of the stream, [B]: a function of `seed` and position alone."""
        return {}

    def examples(self, number: int, crops: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Masks of `number` examples for pictures and tests: always the same."""
        if self.on_host:
            return self.draw_on_host(seed, np.arange(number), crops)
        drawn = self.draw(jax.random.key(seed), jnp.arange(number), crops)
        return {name: np.asarray(mask) for name, mask in drawn.items()}


NO_MASKS = Masks()


class PatchMasks(Masks):
    """One mask, named "mask", for each global crop."""

    grid: Grid

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    def shapes(self, crops: int) -> dict[str, tuple[int, ...]]:
        return {"mask": (crops, self.patches)}


@dataclasses.dataclass(frozen=True)
class RandomMask(PatchMasks):
    """Masks `count` squares of each global crop; a square is `square` x `square` patches.

    The number of masked patches is the same in every crop, so all shapes that follow from it are static. Raises ValueError
    if squares do not fill the grid, if nothing is masked or if nothing is left.
    """

    grid: Grid
    count: int
    square: int = 1

    def __post_init__(self) -> None:
        if any(side % self.square for side in self.grid):
            raise ValueError(f"squares of {self.square} patches do not fill a grid of {self.grid} patches")
        if not 0 < self.count < math.prod(self.squares):
            raise ValueError(
                f"mask.ratio would mask {self.count} of {math.prod(self.squares)} squares: "
                "at least one must be masked and at least one left"
            )

    @property
    def squares(self) -> Grid:
        """(rows, columns) of squares."""
        rows, columns = self.grid
        return rows // self.square, columns // self.square

    @property
    def visible(self) -> int:
        """Patches of a crop that are not masked."""
        return (math.prod(self.squares) - self.count) * self.square**2

    def draw(self, key: jax.Array, index: jax.Array, crops: int) -> dict[str, jax.Array]:
        def noise(index: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, index), (crops, math.prod(self.squares)))

        return {"mask": self.of_order(jnp.argsort(jax.vmap(noise)(index), axis=-1))}

    def of_order(self, order: jax.Array) -> jax.Array:
        """The masks [..., N] of the squares that come first in `order`, a permutation of the squares, [..., squares]."""
        masked = (jnp.argsort(order, axis=-1) < self.count).reshape(*order.shape[:-1], *self.squares)
        patches = jnp.repeat(jnp.repeat(masked, self.square, axis=-2), self.square, axis=-1)
        return patches.reshape(*order.shape[:-1], -1)


def blocks(
    rng: random.Random, grid: Grid, count: float, smallest: float = 16, largest: float | None = None, aspect: float = 0.3
) -> np.ndarray:
    """A mask bool [rows, columns] of rectangles, of `count` patches or a few less (BEiT, algorithm 1).

    Rectangles come one after the other, of an area uniform between `smallest` and what is left to mask (or `largest`), of
    a log-uniform ratio of the sides between `aspect` and its inverse, smaller than the grid, at a uniform place. One that
    masks nothing new, or more than is left, is drawn again, ten times at most; then the mask is as it is. Numbers are drawn
    in the order of the official code.
    """
    (rows, columns), mask, masked = grid, np.zeros(grid, bool), 0
    while masked < count:
        left = min(count - masked, largest or count)
        for _ in range(10):
            area = rng.uniform(smallest, left)
            ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= rows or width >= columns:
                continue
            top, start = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = mask[top : top + height, start : start + width]
            new = height * width - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                masked += new
                break
        else:
            break
    return mask


def topped_up(mask: np.ndarray, count: int, numbers: np.random.RandomState) -> np.ndarray:
    """A mask bool [N] with more single patches, drawn at random, until `count` are masked."""
    if missing := count - mask.sum():
        mask[numbers.choice(np.flatnonzero(~mask), missing, replace=False)] = True
    return mask


class HostMasks(PatchMasks):
    """Masks that the host draws crop by crop."""

    on_host: ClassVar[bool] = True

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        """A mask bool [N]; the official codes take their random numbers from both."""
        raise NotImplementedError

    def draw_on_host(self, seed: int, positions: np.ndarray, crops: int) -> dict[str, np.ndarray]:
        rngs = [[random.Random(f"{seed}/{position}/{crop}") for crop in range(crops)] for position in positions.tolist()]
        masks = [[self.one(rng, np.random.RandomState(rng.getrandbits(32))) for rng in row] for row in rngs]
        return {"mask": np.stack(masks)}


@dataclasses.dataclass(frozen=True)
class BlockMask(HostMasks):
    """Masks of rectangles, at most `count` patches of each global crop, see `blocks`.

    `exact` (BEiT v2): single patches, drawn at random, fill up what is missing. Raises ValueError if nothing is masked or
    nothing is left, or if rectangles of `smallest` patches and more leave much of `count` unmasked on so small a grid.
    """

    grid: Grid
    count: int
    smallest: int = 16
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.count < self.patches:
            raise ValueError(f"mask.count={self.count} of {self.patches} patches: some must be masked, and some be left")
        if self.exact:
            return
        masked = np.mean([blocks(random.Random(seed), self.grid, self.count, self.smallest).sum() for seed in range(32)])
        if masked < 0.75 * self.count:
            raise ValueError(
                f"mask.smallest={self.smallest}: with blocks of so many patches only {masked:.1f} of mask.count={self.count} "
                f"can be masked on a grid of {self.grid[0]} x {self.grid[1]} patches; take smaller blocks"
            )

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        mask = blocks(rng, self.grid, self.count, self.smallest).reshape(-1)
        return topped_up(mask, self.count, numbers) if self.exact else mask


@dataclasses.dataclass(frozen=True)
class RatioMask(HostMasks):
    """iBOT's masks: for each global crop a share of the patches is drawn, then which they are (Zhou et al. 2022, section 3.1).

    One of `ratios`, each (mean, half-width) of a uniform distribution, is chosen. `shape` "block": rectangles of a ninth of
    the grid at least, see `blocks`; "random": single patches. A crop may have no masked patch, and none has one before
    position `start` of the stream. Numbers are drawn in the order of the official code. Raises ValueError for an unknown
    shape and for ratios outside 0..1 or all of which mask nothing.
    """

    grid: Grid
    ratios: tuple[tuple[float, float], ...]
    shape: str = "block"
    start: int = 0

    def __post_init__(self) -> None:
        if self.shape not in ("block", "random"):
            raise ValueError(f'mask.shape is {self.shape!r}, but must be "block" or "random"')
        if not all(0 <= half <= mean and mean + half < 1 for mean, half in self.ratios) or self.count < 1:
            raise ValueError(
                f"mask.ratios={self.ratios}: each must be (mean, half-width) within 0 and 1, and one must mask a patch"
            )

    @property
    def count(self) -> int:
        """The largest number of masked patches of a crop."""
        return int(max(mean + half for mean, half in self.ratios) * self.patches)

    def draw_on_host(self, seed: int, positions: np.ndarray, crops: int) -> dict[str, np.ndarray]:
        return {"mask": super().draw_on_host(seed, positions, crops)["mask"] & (positions >= self.start)[:, None, None]}

    def examples(self, number: int, crops: int, seed: int = 0) -> dict[str, np.ndarray]:
        return self.draw_on_host(seed, self.start + np.arange(number), crops)

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        drawn = [rng.uniform(mean - half, mean + half) if half > 0 else mean for mean, half in self.ratios]
        high = (rng.choice(drawn) if len(drawn) > 1 else drawn[0]) * self.patches
        if self.shape == "block":
            return blocks(rng, self.grid, high, smallest=(min(self.grid) // 3) ** 2).reshape(-1)
        mask = np.arange(self.patches) >= self.patches - int(high)
        numbers.shuffle(mask)
        return mask


@dataclasses.dataclass(frozen=True)
class GroupMask(PatchMasks):
    """DINOv2's masks: of the global crops of a group of images the share `probability` is masked, the i-th of n of them by a
    share of its patches that is uniform in the i-th part of `ratio` (Oquab et al. 2024, appendix B).

    A group is `group_size` examples that follow each other in the stream: in the official code the batch of one GPU. `upper`
    patches of a group are masked at most; with `exact` always so many, the shares being the ends of the parts and single
    patches filling up what rectangles leave. Numbers are drawn in the order of the official code; crops come crop by crop
    there. Raises ValueError if no patch would be masked or a crop would be masked whole.
    """

    grid: Grid
    group_size: int
    crops: int
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    exact: bool = False
    on_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.upper < 1 or not 0 <= self.ratio[0] <= self.ratio[1] < 1 or not self.probability <= 1:
            raise ValueError(
                f"mask.ratio={self.ratio} and mask.probability={self.probability} mask no patch, or all of a crop: the first "
                "must be (low, high) with 0 <= low <= high < 1, the second within 0 and 1"
            )

    @property
    def bounds(self) -> np.ndarray:
        """The parts of `ratio`, from one of the masked crops to the next."""
        return np.linspace(*self.ratio, int(self.group_size * self.crops * self.probability) + 1)

    @property
    def upper(self) -> int:
        return sum(int(self.patches * high) for high in self.bounds[1:])

    def draw_on_host(self, seed: int, positions: np.ndarray, crops: int) -> dict[str, np.ndarray]:
        numbers = np.unique(positions // self.group_size)
        groups = {number: self.group(random.Random(f"{seed}/{number}")) for number in numbers.tolist()}
        masks = [groups[at // self.group_size][at % self.group_size] for at in positions.tolist()]
        return {"mask": np.stack(masks)[:, :crops]}

    def group(self, rng: random.Random) -> np.ndarray:
        """The masks of a group, [group_size, crops, N]."""
        parts = zip(self.bounds, self.bounds[1:])
        masks = [self.one(rng, int(self.patches * (b if self.exact else rng.uniform(a, b)))) for a, b in parts]
        masks += [np.zeros(self.patches, bool)] * (self.group_size * self.crops - len(masks))
        rng.shuffle(masks)
        return np.stack(masks).reshape(self.crops, self.group_size, -1).swapaxes(0, 1)

    def one(self, rng: random.Random, count: int) -> np.ndarray:
        """A mask bool [N] of `count` patches, or, if not `exact`, a few less."""
        mask = blocks(rng, self.grid, count, smallest=4, largest=0.5 * self.patches).reshape(-1)
        return topped_up(mask, count, np.random.RandomState(rng.getrandbits(32))) if self.exact else mask
