"""What makes vectors of images: a trained network, or, where none is given, pixels. Images are hashed on the way."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
from PIL import Image

from mim_jax import checkpoint
from mim_jax.curate import plants
from mim_jax.curate.alignment import sketch
from mim_jax.curate.neighbors import quantized
from mim_jax.data import pipeline
from mim_jax.data.decode import Levels
from mim_jax.data.sources import Example, sample
from mim_jax.evaluators.knn import pixel_features, whitening
from mim_jax.pretrained import Model, Readable

CANVAS, SIDE, DIMS = 64, 6, 24  # of pixels: decoded to fit, then scaled to; components
EDGES, PLACES = 32, 4  # of edges: scaled to; places along each axis
RAW = 3 * (SIDE**2 + PLACES**2)
FITTED = 4096  # images that a basis is of
NOISE = 1e-3  # of the mean variance of crops, in all directions
EDGE = 60.0  # levels; what an edge of one standard deviation counts


class Batch(NamedTuple):
    """Of b images in a row."""

    vectors: np.ndarray  # int16 [b, D], see `neighbors.quantized`
    labels: np.ndarray  # int32 [b], -1 if unknown
    sha256: np.ndarray  # uint8 [b, 32], of the pixels as they were decoded
    dhash: np.ndarray  # uint64 [b]
    sketches: np.ndarray  # uint8 [b, SIDE, SIDE], see `alignment.sketch`
    bad: list[str]  # why an image is bad, "" for good ones


class Hashed(Readable):
    """A source whose images are decoded, hashed and sketched; `seen` has this of the rows that were read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: dict[int, tuple[bytes, int, np.ndarray]] = {}

    def __getitem__(self, row: int) -> Example:
        example = super().__getitem__(row)
        image = np.asarray(example.image)
        self.seen[row] = pixel_hash(image), dhash(image), sketch(image)
        return example

    def batch(self, rows: range, features: np.ndarray, labels: np.ndarray) -> Batch:
        digests, hashes, sketches = zip(*(self.seen.pop(row) for row in rows))
        bad = [self.bad.pop(row, "") for row in rows]
        features = features[: len(rows)].astype(np.float64)
        bad = [why or "" if np.isfinite(x).all() else "its features are not finite" for why, x in zip(bad, features)]
        vectors = quantized(features)
        vectors[[bool(why) for why in bad]] = 0
        sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        return Batch(vectors, labels[: len(rows)], sha256, np.array(hashes, np.uint64), np.stack(sketches), bad)


def pixel_hash(image: np.ndarray) -> bytes:
    return hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).digest()


def dhash(image: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 places of the image is darker than its right neighbor, row by row (N. Krawetz)."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes())


def dhash_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ, uint8, of hashes uint64 [..., M] and [M]; of one image as it is, or mirrored if that is nearer."""
    bits = np.unpackbits(other.astype(">u8")[:, None].view(np.uint8), axis=1).reshape(-1, 8, 8)
    mirrored = np.packbits(1 - bits[:, :, ::-1], axis=2).reshape(-1, 8).view(">u8")[:, 0].astype(np.uint64)
    return np.minimum(*(np.bitwise_count(one ^ each) for each in (other, mirrored)))


class Embedder:
    """Makes vectors of images. Batches have one size, whatever is embedded, so that no row depends on its batch."""

    batch_size: int
    canvas: int  # side, in pixels, of what images are decoded to
    given: Levels | None  # of images of more than 8 bits; None: measured
    max_pixels: int
    dims: int  # of a vector
    description: str
    identity: list[Any]  # what the vectors depend on besides the images, as JSON
    components: tuple[np.ndarray, np.ndarray] | None = None  # see `basis`
    kind_of_components = "white components"

    def raw(self, readable: Hashed, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features float32 [b, D] of the rows, not white, and labels, batch by batch; the last one is padded."""
        raise NotImplementedError

    def levels(self, source: Any) -> tuple[Levels | None, Sequence[str]]:
        found = pipeline.survey(source, self.canvas, self.given, self.max_pixels)
        return found.levels, found.lines

    def batches(self, source: Any, levels: Levels | None, start: int, stop: int) -> Iterator[Batch]:
        """Of the rows start..stop-1; `start` is a multiple of the batch size."""
        readable = Hashed(source, self.canvas, levels, self.max_pixels)
        made = self.raw(readable, np.arange(start, stop, dtype=np.int32))
        for first, (features, labels) in zip(range(start, stop, self.batch_size), made, strict=True):
            if self.components is not None:
                features = (features - self.components[0]) @ self.components[1]
            yield readable.batch(range(first, min(first + self.batch_size, stop)), features, labels)

    def basis(self, source: Any, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the basis in which the features of FITTED images of a source are white, see `knn.whitening`. Of few
        images there are fewer components: of as many as images all images would be equally far from each other.

        Raises ValueError if there are fewer than two good images.
        """
        rows = np.array(sample(source, FITTED), np.int32)
        bank, good = self.features(source, self.levels(source)[0], rows)
        return whitening(bank[good], min(dims, self.enough(source, good)))

    def features(self, source: Any, levels: Levels | None, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some rows, before `projected`: float32 [n, D], and which of them are good."""
        readable = Hashed(source, self.canvas, levels, self.max_pixels)
        found = np.concatenate([features for features, _ in self.raw(readable, rows)])[: len(rows)]
        return found, np.isfinite(found).all(axis=1) & ~np.isin(rows, [*readable.bad])

    def enough(self, source: Any, good: np.ndarray) -> int:
        """For how many components there are images enough."""
        if len(good) < 2:
            raise ValueError(f"{source.description}: one image is too few")
        if good.sum() < 2:
            raise ValueError(f"{source.description}: fewer than two of {len(good)} sampled images can be read")
        return int(good.sum()) // 8 or 1

    def projected(self, basis: tuple[np.ndarray, np.ndarray]) -> "Embedder":
        """With the components of a result of `basis`."""
        made = copy.copy(self)
        made.components, made.dims = basis, basis[1].shape[1]
        made.description = f"{self.description}, {made.dims} {self.kind_of_components}"
        made.identity = [*self.identity, [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in basis]]
        return made


class Network(Embedder):
    """A trained network. Its features are those of `kind` after block `block`, 1 being the first; by default after the last."""

    def __init__(self, model: Model, kind: str, size: int | None = None, block: int | None = None):
        if block is not None and not 1 <= block <= model.depth:
            raise ValueError(f"block is {block}, but of this network 1 to {model.depth} can be used")
        self.model, self.kinds, self.layers = model, kind.split("+"), 1 if block is None else model.depth + 1 - block
        self.size = model.checked(size, self.layers)
        self.canvas, self.given, self.max_pixels = model.canvas_of(self.size), model.levels, model.max_pixels
        self.batch_size = model.batch_size(2**30, self.size)
        self.widths = [shape[-1] for shape in model.shapes(self.kinds, self.size, 1)]
        self.dims = sum(self.widths)
        after = "" if block is None else f" after block {block}"
        self.description = f"{model.description}, {kind}{after}, {self.size} pixels"
        self.identity = [checkpoint.fingerprint(model.parts), kind, self.size, model.resize, self.canvas, self.layers]

    def raw(self, readable: Hashed, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with jax.set_mesh(self.model.mesh):
            for batch in self.model.stream(readable, rows, self.kinds, self.size, self.layers, self.batch_size):
                parts = [batch[kind][:, :width] for kind, width in zip(self.kinds, self.widths)]  # of the oldest block
                yield np.concatenate(parts, axis=-1), batch["label"]


class Pixels(Embedder):
    """Colors and edges of an image and its mirror image, as they are in crops, too. No network: it finds copies, not kinds."""

    batch_size, canvas, max_pixels, dims = 256, CANVAS, 2**27, RAW
    kind_of_components = "components in which crops agree"
    description = f"pixels, {SIDE} x {SIDE}, and edges, {PLACES} x {PLACES}"

    def __init__(self, given: Levels | None = None):
        self.given, self.identity = given, ["pixels", 5, CANVAS, SIDE, EDGES, PLACES]

    def basis(self, source: Any, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the basis of Fisher's discriminants of crops: the components in which images differ most, in units of
        how much crops differ from their images. FITTED images and a crop of each are looked at. Other copies differ less."""
        rows = np.array(sample(source, FITTED), np.int32)
        levels, _ = self.levels(source)
        pairs = plants.Copies(source, rows, 0, levels, ("crop",))
        found, good = self.features(pairs, levels, np.arange(len(pairs), dtype=np.int32))
        good = np.logical_and(*good.reshape(-1, 2).T)
        dims = min(dims, self.enough(source, good))
        images, copies = found.reshape(-1, 2, RAW)[good].astype(np.float64).transpose(1, 0, 2)
        mean, apart = images.mean(axis=0), images - copies
        within = apart.T @ apart / len(images)
        within += (NOISE * np.trace(within) / RAW + 1e-6) * np.eye(RAW)  # also if all images are of one color
        _, basis = scipy.linalg.eigh(np.cov(images.T, bias=True), within, subset_by_index=(RAW - dims, RAW - 1))
        return mean, basis

    def raw(self, readable: Hashed, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), self.batch_size):
            examples = [readable[int(row)] for row in rows[start : start + self.batch_size]]
            features = np.zeros((self.batch_size, RAW), np.float32)
            features[: len(examples)] = np.concatenate([self.of_image(np.asarray(example.image)) for example in examples])
            yield features, np.array([example.label for example in examples], np.int32)

    @staticmethod
    def of_image(image: np.ndarray) -> np.ndarray:
        """Float32 [1, RAW]: the small image, and at each place the mean differences of gray to the right, down, and to either
        side down, as shares of its standard deviation (plus 10 levels). All is the mean with the mirror image."""
        small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)[None]
        gray = np.asarray(Image.fromarray(image).convert("L").resize((EDGES, EDGES), Image.Resampling.BOX), np.float32)
        right, down = (np.diff(gray, axis=axis, append=np.take(gray, [-1], axis)) for axis in (1, 0))
        places = np.stack([np.abs(right), np.abs(down), np.abs(right + down) + np.abs(right - down)])
        edges = places.reshape(3, PLACES, EDGES // PLACES, PLACES, EDGES // PLACES).mean(axis=(2, 4))
        edges *= EDGE / (gray.std() + 10)
        pixels, edges = (small + small[:, :, ::-1]) / 2, (edges + edges[..., ::-1]) / 2
        return np.concatenate([pixel_features(pixels), edges.reshape(1, -1)], axis=1)
