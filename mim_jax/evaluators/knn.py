"""Weighted k-nearest-neighbor classification of frozen features, and the pixel features of its baselines.

The classifier is DINO's (`eval_knn.py`, `knn_classifier`): the k nearest rows of a labeled bank by cosine similarity, with
votes weighted by exp(similarity / temperature).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # type: ignore[import-untyped]

from mim_jax.evaluators.probe import blocks

Array = jax.Array | np.ndarray


def normalize(x: Array, eps: float = 1e-12) -> jax.Array:
    """The rows of `x` [..., D] scaled to unit length; rows shorter than `eps` are divided by `eps`, as in PyTorch."""
    x = jnp.asarray(x)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), eps)


@partial(jax.jit, static_argnames=("num_classes", "k", "chunk"))
def knn_scores(
    bank_features: Array, bank_labels: Array, features: Array, num_classes: int, k: int, temperature: float, chunk: int = 500
) -> jax.Array:
    """The votes [M, num_classes], not normalized, of the `k` nearest of bank_features [N, D] for each of features [M, D].

    bank_labels int [N]. `chunk` queries are compared at a time, in `chunk * N` floats. Raises ValueError if `k` exceeds N.
    """
    if k > len(bank_features):
        raise ValueError(f"k = {k} neighbors were asked of a bank of {len(bank_features)} images.")
    bank = normalize(bank_features)

    def vote(query: jax.Array) -> jax.Array:
        similarity, nearest = jax.lax.top_k(bank @ query, k)
        return jnp.zeros(num_classes, similarity.dtype).at[bank_labels[nearest]].add(jnp.exp(similarity / temperature))

    return jax.lax.map(vote, normalize(features), batch_size=chunk)


def knn_accuracy(
    bank_features: Array, bank_labels: Array, features: Array, labels: Array, num_classes: int, k: int, temperature: float
) -> tuple[float, float]:
    """Shares (0 to 1) of the features [M, D] whose label [M] is the first, or among the first min(5, k), of the classes by
    `knn_scores`."""
    scores = knn_scores(bank_features, bank_labels, features, num_classes, k, temperature)
    ranking = jnp.argsort(-scores, axis=-1, stable=True)
    hit = ranking == jnp.asarray(labels)[:, None]
    return float(hit[:, 0].mean()), float(hit[:, : min(5, k)].any(axis=-1).mean())


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Flattened pixels of images [B, H, W, C], centered in each channel of each image: [B, H * W * C] float32."""
    pixels = np.array(images, np.float32)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    return pixels.reshape(len(pixels), -1)


def whitened_features(bank: np.ndarray, test: np.ndarray, dims: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """PCA-whitened bank [N, F] and test [M, F], float32, by the statistics of the bank: [N, dims] and [M, dims]."""
    mean, basis = whitening(bank, dims)
    white = [np.concatenate([(rows - mean) @ basis for (rows,) in blocks(features)]) for features in (bank, test)]
    return white[0].astype(np.float32), white[1].astype(np.float32)


def whitening(bank: np.ndarray, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean [F] of a bank [N, F], and a basis [F, dims] in which its rows less the mean are white.

    There are fewer components if the bank has fewer, N - 1 or F.
    """
    count, width = bank.shape
    dims = min(dims, count - 1, width)
    mean = bank.mean(axis=0, dtype=np.float32)
    covariance = sum((rows - mean).T @ (rows - mean) for (rows,) in blocks(bank)) / count
    variance, basis = scipy.linalg.eigh(covariance, subset_by_index=(width - dims, width - 1))
    # directions in which the bank does not vary (black borders) must not be amplified
    basis *= np.where(variance > 1e-6 * variance.max(), variance, np.inf) ** -0.5
    return mean, basis
