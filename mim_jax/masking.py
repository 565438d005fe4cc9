"""Which patches are hidden. A mask is bool [B, crops, N], True where masked, patches row-major.

Masks that are drawn patch by patch are made on the device, by `draw(key, index, crops)`; those of blocks, whose loops no
accelerator likes, on the host (`on_host`), by `draw(seed, positions, crops)`: a function of each example's place in the
stream of data, so that it is the same for any number of hosts and workers. All have static counts.
"""

import dataclasses
import math
import random
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RandomMask:
    """Masks `count` of the `grid` x `grid` squares of each global crop, each square `repeat` x `repeat` patches.

    The number of masked patches is the same in every crop, so all shapes that follow from it are static. Raises ValueError
    where nothing is masked or nothing is left.
    """

    grid: int
    count: int
    repeat: int = 1
    on_host: ClassVar[bool] = False

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

    def examples(self, number: int, crops: int, seed: int = 0) -> np.ndarray:
        """Masks [number, crops, N] for pictures and tests, always the same."""
        return np.asarray(self.draw(jax.random.key(seed), jnp.arange(number), crops))


def blocks(
    rng: random.Random, grid: int, count: float, smallest: float = 16, largest: float | None = None, aspect: float = 0.3
) -> np.ndarray:
    """A mask bool [grid, grid] of rectangles, of `count` patches or a few less (BEiT, algorithm 1).

    Rectangles come one after the other, of an area uniform between `smallest` and what is left to mask (or `largest`), of
    a log-uniform ratio of the sides between `aspect` and its inverse, smaller than the grid, at a uniform place. One that
    masks nothing new, or more than is left, is drawn again, ten times at most; then the mask is as it is. Numbers are drawn
    in the order of the official code.
    """
    mask, masked = np.zeros((grid, grid), bool), 0
    while masked < count:
        left = min(count - masked, largest or count)
        for _ in range(10):
            area = rng.uniform(smallest, left)
            ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= grid or width >= grid:
                continue
            top, start = rng.randint(0, grid - height), rng.randint(0, grid - width)
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


class HostMask:
    """What the masks that the host draws have in common."""

    on_host: ClassVar[bool] = True

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        """A mask bool [N]; the official codes take their random numbers from both."""
        raise NotImplementedError

    def draw(self, seed: int, positions: np.ndarray, crops: int) -> np.ndarray:
        """Masks [B, crops, N] for the examples at these places of the stream, [B]: a function of `seed` and place alone."""
        rngs = [[random.Random(f"{seed}/{position}/{crop}") for crop in range(crops)] for position in positions.tolist()]
        return np.stack([[self.one(rng, np.random.RandomState(rng.getrandbits(32))) for rng in row] for row in rngs])

    def examples(self, number: int, crops: int, seed: int = 0) -> np.ndarray:
        """Masks [number, crops, N] for pictures and tests, always the same."""
        return self.draw(seed, np.arange(number), crops)


@dataclasses.dataclass(frozen=True)
class BlockMask(HostMask):
    """Masks of rectangles, at most `count` of the `grid` x `grid` patches of each global crop, see `blocks`.

    `exact` (BEiT v2): single patches, drawn at random, fill up what is missing. Raises ValueError where nothing is masked or
    nothing is left.
    """

    grid: int
    count: int
    smallest: int = 16
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.count < self.grid**2:
            raise ValueError(f"mask.count={self.count} of {self.grid**2} patches: some must be masked, and some be left")

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        mask = blocks(rng, self.grid, self.count, self.smallest).reshape(-1)
        return topped_up(mask, self.count, numbers) if self.exact else mask


@dataclasses.dataclass(frozen=True)
class RatioMask(HostMask):
    """iBOT's masks: for each global crop a share of the patches is drawn, then which they are (Zhou et al. 2022, section 3.1).

    One of `ratios`, each (mean, half-width) of a uniform distribution, is chosen. `shape` "block": rectangles of a ninth of
    the grid at least, see `blocks`; "random": single patches. A crop may have no masked patch, and none has one before the
    place `start` of the stream. Numbers are drawn in the order of the official code. Raises ValueError for ratios that cannot
    be.
    """

    grid: int
    ratios: tuple[tuple[float, float], ...]
    shape: str = "block"
    start: int = 0

    def __post_init__(self) -> None:
        if self.shape not in ("block", "random"):
            raise ValueError(f'mask.shape is {self.shape!r}, but must be "block" or "random"')
        if not all(half <= mean and mean + half < 1 for mean, half in self.ratios) or self.count < 1:
            raise ValueError(f"mask.ratios={self.ratios}: each is (mean, half-width) within 0 and 1, and one masks a patch")

    @property
    def count(self) -> int:
        """Patches that are masked at most."""
        return int(max(mean + half for mean, half in self.ratios) * self.grid**2)

    def draw(self, seed: int, positions: np.ndarray, crops: int) -> np.ndarray:
        return super().draw(seed, positions, crops) & (positions >= self.start)[:, None, None]

    def examples(self, number: int, crops: int, seed: int = 0) -> np.ndarray:
        return self.draw(seed, self.start + np.arange(number), crops)

    def one(self, rng: random.Random, numbers: np.random.RandomState) -> np.ndarray:
        drawn = [rng.uniform(mean - half, mean + half) if half > 0 else mean for mean, half in self.ratios]
        high = (rng.choice(drawn) if len(drawn) > 1 else drawn[0]) * self.grid**2
        if self.shape == "block":
            return blocks(rng, self.grid, high, smallest=(self.grid // 3) ** 2).reshape(-1)
        mask = np.arange(self.grid**2) >= self.grid**2 - int(high)
        numbers.shuffle(mask)
        return mask


@dataclasses.dataclass(frozen=True)
class GroupMask:
    """DINOv2's masks: of the global crops of a group of images the share `probability` is masked, the i-th of n of them by a
    share of its patches that is uniform in the i-th part of `ratio` (Oquab et al. 2024, appendix B).

    A group is `group_size` examples that follow each other in the stream: in the official code the batch of one GPU. `upper`
    patches of a group are masked at most; with `exact` always so many, the shares being the ends of the parts and single
    patches filling up what rectangles leave. Numbers are drawn in the order of the official code; crops come crop by crop
    there. Raises ValueError where no patch would be masked.
    """

    grid: int
    group_size: int
    crops: int
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    exact: bool = False
    on_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.upper < 1 or not 0 <= self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"mask.ratio={self.ratio} and mask.probability={self.probability} mask no patch, or all of a crop")

    @property
    def bounds(self) -> np.ndarray:
        """The parts of `ratio`, from one of the masked crops to the next."""
        return np.linspace(*self.ratio, int(self.group_size * self.crops * self.probability) + 1)

    @property
    def upper(self) -> int:
        return sum(int(self.grid**2 * high) for high in self.bounds[1:])

    def draw(self, seed: int, positions: np.ndarray, crops: int) -> np.ndarray:
        """Masks [B, crops, N] for the examples at these places of the stream, [B]: a function of `seed` and place alone."""
        numbers = np.unique(positions // self.group_size)
        groups = {number: self.group(random.Random(f"{seed}/{number}")) for number in numbers.tolist()}
        return np.stack([groups[at // self.group_size][at % self.group_size] for at in positions.tolist()])

    def group(self, rng: random.Random) -> np.ndarray:
        """The masks of a group, [group_size, crops, N]."""
        parts = zip(self.bounds, self.bounds[1:])
        masks = [self.one(rng, int(self.grid**2 * (b if self.exact else rng.uniform(a, b)))) for a, b in parts]
        masks += [np.zeros(self.grid**2, bool)] * (self.group_size * self.crops - len(masks))
        rng.shuffle(masks)
        return np.stack(masks).reshape(self.crops, self.group_size, -1).swapaxes(0, 1)

    def one(self, rng: random.Random, count: int) -> np.ndarray:
        """A mask bool [N] of `count` patches, or, if not `exact`, a few less."""
        mask = blocks(rng, self.grid, count, smallest=4, largest=0.5 * self.grid**2).reshape(-1)
        return topped_up(mask, count, np.random.RandomState(rng.getrandbits(32))) if self.exact else mask

    def examples(self, number: int, crops: int, seed: int = 0) -> np.ndarray:
        """Masks [number, crops, N] for pictures and tests, always the same."""
        return self.draw(seed, np.arange(number), self.crops)[:, :crops]


Mask = RandomMask | BlockMask | RatioMask | GroupMask
