"""What the features are worth while they are learned: k-NN, linear probe, view retrieval, each beside its floors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import health
from mim_jax.data.augment import Crops, augment, center_crop
from mim_jax.evaluators.knn import knn_accuracy, pixel_features, whitened_features
from mim_jax.evaluators.probe import probe_accuracy, standardize
from mim_jax.evaluators.retrieval import view_retrieval
from mim_jax.sharding import everywhere, pin_batch

Batch = Mapping[str, np.ndarray]

# Pixel floors of larger pictures are measured at this size: PCA needs the square of the number of values.
FLOOR_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Measures an encoder on the same images again and again. All processes call it alike; each gets the same figures.

    Attributes:
        method_features: `(params, images [B, H, W, 3] normalized) -> {"cls": [B, D], "patch": [B, N, D]}`.
        bank: `image` uint8 [N, S, S, 3], `size` int [N, 2], `label` int [N]: what k-NN and probe learn from.
        test: the same for the M held-out images on which everything is measured.
        num_classes: 0 for images without labels: then only view retrieval and health are measured.
        crops: the crops whose first two are the views of view retrieval.
        mean, std: per channel.
        out, fraction: the evaluation picture, see `center_crop`.
        tokens: "cls", or "patch" for the mean of the patch tokens.
        standardize: whether the k-NN sees each feature less its mean over its std on the bank, as the probe does.
        k, temperature: of the k-NN vote. `k` is cut to the size of the bank.
        batch_size: images encoded at a time.
        seed: of the views.
    """

    method_features: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    bank: Batch
    test: Batch
    num_classes: int
    crops: Crops
    mean: Sequence[float]
    std: Sequence[float]
    out: int
    fraction: float = 1.0
    tokens: str = "cls"
    standardize: bool = False
    k: int = 20
    temperature: float = 0.07
    batch_size: int = 256
    seed: int = 0

    def run(self, params: Any) -> Iterator[tuple[str, float]]:
        """Yields (tag, value): `eval/knn`, `eval/knn_top5`, `eval/probe`, `eval/view_retrieval` (shares, 0 to 1),
        `health/rank` and `health/feature_std` (of the held-out images' features)."""
        test = self.encode(params, self.test)
        if self.num_classes:
            bank = self.encode(params, self.bank)
            knn = self._knn(*(standardize(bank, test) if self.standardize else (bank, test)))
            yield "eval/knn", knn[0]
            if self.num_classes > 5:
                yield "eval/knn_top5", knn[1]
            yield "eval/probe", self._probe(bank, test)
        yield "eval/view_retrieval", float(view_retrieval(*self.encode_views(params)))
        yield "health/rank", float(health.rank_me(test))
        yield "health/feature_std", float(health.feature_std(test))

    def floors(self, untrained_params: Any) -> dict[str, float]:
        """What no learning scores on the same images; to be measured once per run.

        `..._floor_untrained` is the encoder before its first step, `..._floor_pixels` are plain pixels, and
        `..._floor_whitened` are PCA-whitened pixels, the one to beat.
        """
        untrained = dict(self.run(untrained_params))
        measured = ("eval/knn", "eval/probe", "eval/view_retrieval")
        floors = {f"{tag}_floor_untrained": untrained[tag] for tag in measured if tag in untrained}
        if self.num_classes:
            bank, test = self._pixels(self.bank), self._pixels(self.test)
            floors["eval/knn_floor_pixels"] = self._knn(pixel_features(bank), pixel_features(test))[0]
            whitened = whitened_features(bank.reshape(len(bank), -1), test.reshape(len(test), -1))
            floors["eval/knn_floor_whitened"] = self._knn(*whitened)[0]
            floors["eval/probe_floor_whitened"] = self._probe(*whitened)
        views = self._batched(lambda batch: self._views(batch).reshape(len(batch["image"]), 2, -1), self.test)
        floors["eval/view_retrieval_floor_pixels"] = float(view_retrieval(views[:, 0], views[:, 1]))
        return floors

    def encode(self, params: Any, batch: Batch) -> np.ndarray:
        """Features [N, D] of the evaluation pictures of N images (`image`, `size`)."""
        return self._batched(lambda rows: self._encode(params, self._picture(rows["image"], rows["size"])), batch)

    def encode_views(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features of two random crops of each held-out image, [M, D] each. The crops are the same at every call."""

        def two_crops(rows: Batch) -> np.ndarray:
            views = self._views(rows)
            return np.stack([self._encode(params, views[:, i]) for i in range(2)], axis=1)

        features = self._batched(two_crops, self.test)
        return features[:, 0], features[:, 1]

    def _knn(self, bank: np.ndarray, test: np.ndarray) -> tuple[float, ...]:
        k = min(self.k, len(bank))
        return knn_accuracy(bank, self.bank["label"], test, self.test["label"], self.num_classes, k, self.temperature)

    def _probe(self, bank: np.ndarray, test: np.ndarray) -> float:
        return probe_accuracy(bank, self.bank["label"], test, self.test["label"], self.num_classes)

    def _pixels(self, batch: Batch) -> np.ndarray:
        size = min(self.out, FLOOR_SIZE)
        crop = jax.jit(lambda rows: center_crop(rows["image"], rows["size"], size, self.fraction, (0, 0, 0), (1, 1, 1)))
        return self._batched(crop, batch)

    def _batched(self, function: Callable[[Batch], Any], batch: Batch) -> np.ndarray:
        """`function` over slices of one size, so that it is traced once; the last slice is filled up, and cut."""
        count = len(batch["image"])
        size = -(-min(self.batch_size, count) // jax.device_count()) * jax.device_count()
        columns = {"image": batch["image"], "size": batch["size"], "index": np.arange(count, dtype=np.int32)}
        results = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            results.append(np.asarray(function({name: column[rows] for name, column in columns.items()})))
        return np.concatenate(results)[:count]

    @cached_property
    def _picture(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda image, size: center_crop(image, size, self.out, self.fraction, self.mean, self.std))

    @cached_property
    def _views(self) -> Callable[[Batch], jax.Array]:
        crops = dataclasses.replace(self.crops, policies=(self.crops.policies * 2)[:2])
        key = jax.random.key(self.seed)
        return jax.jit(lambda rows: augment(rows, [crops], key, self.mean, self.std)[crops.name])

    @cached_property
    def _encode(self) -> Callable[[Any, jax.Array], jax.Array]:
        def encode(params: Any, images: jax.Array) -> jax.Array:
            features = self.method_features(params, pin_batch(images))
            chosen = features["cls"] if self.tokens == "cls" else features["patch"].mean(axis=1)
            return everywhere(chosen.astype(jnp.float32))  # all processes compute with all rows afterwards

        return jax.jit(encode)
