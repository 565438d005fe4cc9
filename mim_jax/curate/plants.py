"""Known copies of images: to calibrate with, and to count what the pipeline finds of them."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from mim_jax.data.decode import BadImage, Levels, decode
from mim_jax.data.sources import Example, fingerprint

CANVAS = 512  # in pixels; what a copy is made of
ORIGINAL = -1


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(30, 96)))
    return Image.open(file).convert("RGB")


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """At least half of the area, of any shape."""
    area = rng.uniform(0.5, 0.95)
    side = area ** rng.uniform(0, 1)  # of the width; that of the height is area / side
    width, height = (max(1, round(x * part)) for x, part in zip(image.size, (side, area / side)))
    left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.size, (width, height)))
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Either side by a factor of its own, 0.5 to 1.5."""
    width, height = (max(1, round(x * rng.uniform(0.5, 1.5))) for x in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A word over it, a fifth as high as the image."""
    image = image.copy()
    font = ImageFont.load_default(size=max(6, image.height // 5))
    place = rng.uniform(0, image.width / 2), rng.uniform(0, image.height * 0.8)
    ImageDraw.Draw(image).text(place, "copy", tuple(rng.integers(0, 256, 3).tolist()), font)
    return image


def color(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation by a factor of their own, 0.6 to 1.4."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(float(rng.uniform(0.6, 1.4)))
    return image


KINDS = {"jpeg": jpeg, "crop": crop, "resize": resize, "flip": flip, "text": text, "color": color}


def copied(image: np.ndarray, kind: str, seed: Sequence[int]) -> np.ndarray:
    """A copy of an image uint8 [h, w, 3], a function of the arguments."""
    return np.asarray(KINDS[kind](Image.fromarray(image), np.random.Generator(np.random.PCG64(list(seed)))))


def _copied(image: bytes | np.ndarray, kind: str, seed: Sequence[int], levels: Levels | None = None) -> np.ndarray:
    """Of an image as a source has it. Raises OSError for a bad one, as sources do."""
    try:
        return copied(decode(image, CANVAS, levels), kind, seed)
    except BadImage as error:
        raise OSError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Planted:
    """A source with some of the rows of another one, copies of these, and copies of evaluation images.

    Row i is a copy of the kind `kinds[i]` (of KINDS; "": the image itself) of row `rows[i]` of the pool, or of the
    evaluation set where `foreign[i]`.
    """

    pool: Any
    evaluation: Any
    rows: np.ndarray
    foreign: np.ndarray
    kinds: Sequence[str]
    seed: int
    description: str
    notes: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        return self.pool.num_classes

    @property
    def classes(self) -> Sequence[str]:
        return self.pool.classes

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self, self.description + self.pool.fingerprint, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        image, label = (self.evaluation if self.foreign[row] else self.pool)[int(self.rows[row])]
        return Example(_copied(image, self.kinds[row], (self.seed, row)) if self.kinds[row] else image, label)

    def name(self, row: int) -> str:
        of = (self.evaluation if self.foreign[row] else self.pool).name(int(self.rows[row]))
        kind = "the same as" if self.foreign[row] and not self.kinds[row] else f"a {self.kinds[row]} copy of"
        return f"{kind} {of}" if self.kinds[row] or self.foreign[row] else of


def planted(pool: Any, evaluation: Any, settings: Mapping[str, Any]) -> Planted:
    """A pool with what `settings` (config.plant, and a seed) ask for: `imbalance`, by how much the smallest class is smaller
    than the largest one; `copies` of its images; `evaluation` images of the evaluation set, half of them unchanged. Raises
    ValueError for more evaluation images than there are."""
    if settings["evaluation"] > (there := 0 if evaluation is None else len(evaluation)):
        raise ValueError(f"plant.evaluation is {settings['evaluation']:,}, but there are {there:,} evaluation images")
    imbalance, seed = settings["imbalance"], settings["seed"]
    rng, count = np.random.Generator(np.random.PCG64(seed)), len(pool)
    rows = np.arange(count)
    if imbalance > 1:
        labels = np.array([pool[row].label for row in range(count)])
        rows = np.flatnonzero(rng.random(count) < imbalance ** -(labels / max(1, pool.num_classes - 1)))
    names = list(KINDS)
    of = rows[(rng.random(settings["copies"]) * len(rows)).astype(int)]
    leaked = np.argsort(rng.random(there))[: settings["evaluation"]]
    kinds = [""] * len(rows) + [names[i % len(names)] for i in range(len(of))]
    kinds += [names[i // 2 % len(names)] if i % 2 else "" for i in range(len(leaked))]
    foreign = np.repeat([False, True], [len(rows) + len(of), len(leaked)])
    what = f"imbalance {imbalance:g}, {len(of):,} copies, {len(leaked):,} images of the evaluation set"
    everything = np.concatenate([rows, of, leaked]).astype(np.int64)
    return Planted(pool, evaluation, everything, foreign, kinds, seed, f"{pool.description}, planted: {what}")


@dataclasses.dataclass(frozen=True)
class Copies:
    """Images of a source, at the even rows, each followed by a copy of it."""

    source: Any
    rows: np.ndarray
    seed: int
    levels: Levels | None  # see `decode.decode`
    kinds: Sequence[str] = tuple(KINDS)  # of the copies, in turn

    def kind(self, pair: int) -> str:
        return self.kinds[pair % len(self.kinds)]

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, row: int) -> Example:
        pair, copy = divmod(row, 2)
        image = self.source[int(self.rows[pair])].image
        return Example(_copied(image, self.kind(pair), (self.seed, pair), self.levels) if copy else image, -1)

    def name(self, row: int) -> str:
        return self.source.name(int(self.rows[row // 2]))
