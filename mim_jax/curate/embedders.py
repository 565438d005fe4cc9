"""What makes vectors of images: a trained network, or, where none is given, pixels. Images are hashed on the way."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from mim_jax import checkpoint
from mim_jax.curate.neighbors import quantized
from mim_jax.data import pipeline
from mim_jax.data.decode import BadImage, Levels, decode
from mim_jax.data.sources import Example
from mim_jax.evaluators.knn import pixel_features, whitening
from mim_jax.pretrained import Model, Readable

CANVAS, SIDE, DIMS, FITTED = 64, 12, 64, 4096  # of pixels: decoded to fit, then scaled to; components; images they are of


class Batch(NamedTuple):
    """Of b images in a row."""

    vectors: np.ndarray  # int16 [b, D], see `neighbors.quantized`
    labels: np.ndarray  # int32 [b], -1 if unknown
    sha256: np.ndarray  # uint8 [b, 32], of the pixels as they were decoded
    dhash: np.ndarray  # uint64 [b]
    bad: list[str]  # why an image is bad, "" for good ones


class Hashed(Readable):
    """A source whose images are decoded and hashed; `hashes` has those of the rows that were read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.hashes: dict[int, tuple[bytes, int]] = {}

    def __getitem__(self, row: int) -> Example:
        example = super().__getitem__(row)
        image = np.asarray(example.image)
        self.hashes[row] = pixel_hash(image), dhash(image)
        return example

    def batch(self, rows: range, features: np.ndarray, labels: np.ndarray) -> Batch:
        hashes = [self.hashes.pop(row) for row in rows]
        bad = [self.bad.pop(row, "") for row in rows]
        features = features[: len(rows)].astype(np.float64)
        bad = [why or "" if np.isfinite(x).all() else "its features are not finite" for why, x in zip(bad, features)]
        vectors = quantized(features)
        vectors[[bool(why) for why in bad]] = 0
        digests = np.frombuffer(b"".join(digest for digest, _ in hashes), np.uint8).reshape(-1, 32)
        return Batch(vectors, labels[: len(rows)], digests, np.array([each for _, each in hashes], np.uint64), bad)


def pixel_hash(image: np.ndarray) -> bytes:
    return hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).digest()


def dhash(image: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 places of the image is darker than its right neighbor, row by row (N. Krawetz)."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes())


def dhash_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ, uint8 [N, M], of hashes uint64 [N] and [M]; of one image as it is, or mirrored if that is nearer."""
    bits = np.unpackbits(other.astype(">u8")[:, None].view(np.uint8), axis=1).reshape(-1, 8, 8)
    mirrored = np.packbits(1 - bits[:, :, ::-1], axis=2).reshape(-1, 8).view(">u8")[:, 0].astype(np.uint64)
    return np.minimum(*(np.bitwise_count(one[:, None] ^ each) for each in (other, mirrored)))


class Network:
    """A trained network as an embedder. Batches have one size, whatever is embedded, so that no row depends on its batch."""

    def __init__(self, model: Model, kind: str, size: int | None):
        if kind not in ("cls", "mean", "cls+mean"):
            raise ValueError(f'kind is "{kind}", but must be "cls", "mean" or "cls+mean"')
        self.model, self.kinds, self.size = model, kind.split("+"), model.checked(size, 1)
        self.batch_size = model.batch_size(2**30, self.size)
        self.dims = sum(shape[-1] for shape in model.shapes(self.kinds, self.size, 1))
        self.description = f"{model.description}, {kind}, {self.size} pixels"
        self.identity = [checkpoint.fingerprint(model.parts), kind, self.size, model.resize, model.canvas_of(self.size)]

    def levels(self, source: Any) -> tuple[Levels | None, Sequence[str]]:
        found = pipeline.survey(source, self.model.canvas_of(self.size), self.model.levels, self.model.max_pixels)
        return found.levels, found.lines

    def batches(self, source: Any, levels: Levels | None, start: int, stop: int) -> Iterator[Batch]:
        """Of the rows start..stop-1; `start` is a multiple of the batch size."""
        model = self.model
        readable = Hashed(source, model.canvas_of(self.size), levels, model.max_pixels)
        rows = np.arange(start, stop, dtype=np.int32)
        with jax.set_mesh(model.mesh):
            stream = model.stream(readable, rows, self.kinds, self.size, 1, self.batch_size)
            for first, batch in zip(range(start, stop, self.batch_size), stream, strict=True):
                features = np.concatenate([batch[kind] for kind in self.kinds], axis=-1)
                yield readable.batch(range(first, min(first + self.batch_size, stop)), features, batch["label"])


class Pixels:
    """The whitened pixels of an image and its mirror image, small. No network: it tells copies from others, not kinds."""

    batch_size = 256

    def __init__(self, source: Any):
        """The whitening is that of a sample of `source`."""
        rows = np.unique(np.linspace(0, len(source) - 1, FITTED).astype(int)).tolist()
        found = []
        for row in rows:
            try:
                found.append(self.raw(decode(source[row].image, CANVAS, (0, 255))))
            except (BadImage, OSError):
                continue
        if len(found) < 2:
            raise ValueError(f"{source.description}: fewer than two of {len(rows)} sampled images can be read")
        bank = np.concatenate(found)
        # Of as many components as images all images would be equally far from each other.
        self.mean, self.basis = whitening(bank, min(DIMS, len(bank) // 8 or 1))
        self.dims = self.basis.shape[1]
        self.description = f"whitened pixels, {SIDE} x {SIDE}, {self.dims} components"
        self.identity = ["pixels", 1, CANVAS, SIDE, hashlib.sha256(bank.tobytes()).hexdigest()[:16]]

    @staticmethod
    def raw(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        pixels = np.asarray(small, np.float32)[None]
        return pixel_features((pixels + pixels[:, :, ::-1]) / 2)

    def levels(self, source: Any) -> tuple[Levels | None, Sequence[str]]:
        found = pipeline.survey(source, CANVAS)
        return found.levels, found.lines

    def batches(self, source: Any, levels: Levels | None, start: int, stop: int) -> Iterator[Batch]:
        readable = Hashed(source, CANVAS, levels, 2**27)
        for first in range(start, stop, self.batch_size):
            rows = range(first, min(first + self.batch_size, stop))
            examples = [readable[row] for row in rows]
            raw = np.concatenate([self.raw(np.asarray(example.image)) for example in examples])
            padded = np.concatenate([raw, np.zeros((self.batch_size - len(raw), raw.shape[1]), np.float32)])
            labels = np.array([example.label for example in examples], np.int32)
            yield readable.batch(rows, (padded - self.mean) @ self.basis, labels)
