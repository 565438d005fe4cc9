"""Weighted k-nearest-neighbor classification of frozen features, and the baselines that a score is compared with.

The classifier is DINO's (`eval_knn.py`, `knn_classifier`): cosine similarity, the k nearest rows of a labeled bank,
votes weighted by exp(similarity / temperature). A score means little without the size of its bank and the score of plain
pixels: `pixel_features` and `whitened_features` are those baselines. On CIFAR-10 with the first
5,000 training images as bank and all 10,000 test images: pixels 0.353, whitened pixels 0.425 (a random bank: 0.34, 0.42).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # type: ignore[import-untyped]

from mim_jax.evaluators.probe import blocks

Array = jax.Array | np.ndarray


def normalize(x: Array, eps: float = 1e-12) -> jax.Array:
    """Scales the rows of `x` [..., D] to unit length (rows shorter than `eps` stay short, as in PyTorch)."""
    x = jnp.asarray(x)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), eps)


@partial(jax.jit, static_argnames=("num_classes", "k", "chunk"))
def knn_scores(
    bank_features: Array,
    bank_labels: Array,
    features: Array,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 500,
) -> jax.Array:
    """Votes of the `k` nearest neighbors for each class.

    Args:
        bank_features: [N, D], any scale; rows are L2-normalized here.
        bank_labels: int [N], 0 <= label < `num_classes`.
        features: queries [M, D].
        num_classes: C.
        k: number of neighbors, at most N.
        temperature: a vote weighs exp(cosine / temperature).
        chunk: queries compared at a time: memory is `chunk * N` floats, whatever M.

    Returns:
        Votes [M, C], not normalized.

    Raises:
        ValueError: `k` is larger than the bank.
    """
    if k > len(bank_features):
        raise ValueError(f"k = {k} neighbors were asked of a bank of {len(bank_features)} images.")
    bank = normalize(bank_features)

    def vote(query: jax.Array) -> jax.Array:
        similarity, nearest = jax.lax.top_k(bank @ query, k)
        return jnp.zeros(num_classes, similarity.dtype).at[bank_labels[nearest]].add(jnp.exp(similarity / temperature))

    return jax.lax.map(vote, normalize(features), batch_size=chunk)


def knn_accuracy(
    bank_features: Array,
    bank_labels: Array,
    features: Array,
    labels: Array,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    top: Sequence[int] = (1, 5),
) -> tuple[float, ...]:
    """Share (0 to 1) of the queries [M, D] whose label [M] is among the first n classes, for each n in `top`.

    As in DINO, n is at most `k`: with 3 neighbors "top-5" is top-3. Other arguments as in `knn_scores`.
    """
    scores = knn_scores(bank_features, bank_labels, features, num_classes, k, temperature)
    ranking = jnp.argsort(-scores, axis=-1, stable=True)
    hit = ranking == jnp.asarray(labels)[:, None]
    return tuple(float(hit[:, : min(n, k)].any(axis=-1).mean()) for n in top)


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Flattened pixels of uint8 or float `images` [B, H, W, C], each channel of each image centered: [B, H*W*C] f32."""
    pixels = np.array(images, np.float32)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    return pixels.reshape(len(pixels), -1)


def whitened_features(bank: np.ndarray, test: np.ndarray, dims: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """PCA-whitened versions of two sets of features (for the baseline: of flattened pixels).

    Args:
        bank: uint8 or float [N, F]; mean, principal components and their variances are measured on it alone.
        test: [M, F].
        dims: components kept, at most what the bank supports (N - 1 and F).

    Returns:
        `bank` and `test` in the whitened basis, [N, dims] and [M, dims] f32.
    """
    count, width = bank.shape
    dims = min(dims, count - 1, width)
    mean = bank.mean(axis=0, dtype=np.float32)
    covariance = sum((rows - mean).T @ (rows - mean) for (rows,) in blocks(bank)) / count
    variance, basis = scipy.linalg.eigh(covariance, subset_by_index=(width - dims, width - 1))
    # Directions in which the bank does not vary (black borders) carry no information and must not be amplified.
    basis *= np.where(variance > 1e-6 * variance.max(), variance, np.inf) ** -0.5
    white = [np.concatenate([(rows - mean) @ basis for (rows,) in blocks(features)]) for features in (bank, test)]
    return white[0].astype(np.float32), white[1].astype(np.float32)
