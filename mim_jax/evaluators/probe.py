"""A linear probe of frozen features in closed form: ridge regression on one-hot labels."""

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 4096  # rows converted to float64 at a time


def blocks(*columns: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Consecutive blocks of `BLOCK` rows of all columns."""
    for start in range(0, len(columns[0]), BLOCK):
        yield tuple(column[start : start + BLOCK] for column in columns)


def location_scale(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of each dimension of `features` [N, D], float64. The std of a constant dimension is infinite."""
    mean = features.mean(axis=0, dtype=np.float64)
    std = np.sqrt(sum(np.square(rows - mean).sum(axis=0) for (rows,) in blocks(features)) / len(features))
    return mean, np.where(std > 1e-6 * (np.abs(mean) + std.max()), std, np.inf)


def standardize(bank: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets of features, [N, D] and [M, D], standardized by the bank's mean and std, float32; constant dimensions are 0."""
    mean, std = (x.astype(np.float32) for x in location_scale(bank))
    return (bank - mean) / std, (test - mean) / std


def probe_accuracy(
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float] = tuple(10.0 ** np.arange(-4, 3)),
) -> float:
    """Accuracy (0 to 1) on features [M, D] of a linear classifier trained on the bank [N, D].

    The classifier is least squares on one-hot labels with an L2 penalty, relative to a feature's mean square. The penalty is
    chosen on the last fifth of the bank, which must be in random order; then the classifier is fitted to the bank.
    """
    mean, std = location_scale(bank_features)
    split = len(bank_features) - len(bank_features) // 5
    fitted, chosen_on = ((bank_features[part], bank_labels[part]) for part in (slice(split), slice(split, None)))

    def moments(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The sum of z z^T over the images; z is an image's features, its one-hot label and 1."""
        total = np.zeros((len(mean) + num_classes + 1,) * 2)
        for rows, classes in blocks(features, labels):
            z = np.concatenate([(rows - mean) / std, np.eye(num_classes)[classes], np.ones((len(rows), 1))], axis=1)
            total += z.T @ z
        return total

    def fit(moments: np.ndarray, penalties: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
        second, first = moments[:-1, :-1] / moments[-1, -1], moments[-1, :-1] / moments[-1, -1]
        covariance, (center, bias) = second - np.outer(first, first), np.split(first, [len(mean)])
        eigenvalues, basis = np.linalg.eigh(covariance[: len(mean), : len(mean)])
        projected = basis.T @ covariance[: len(mean), len(mean) :]
        weights = [basis @ (projected / (np.maximum(eigenvalues, 0)[:, None] + penalty)) for penalty in penalties]
        return [(weight, bias - center @ weight) for weight in weights]

    def accuracy(features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
        found = [np.argmax((rows - mean) / std @ weight + bias, axis=1) for (rows,) in blocks(features)]
        return float(np.mean(np.concatenate(found) == labels))

    seen = moments(*fitted)
    scores = [accuracy(*chosen_on, *trial) for trial in fit(seen, penalties)]
    (classifier,) = fit(seen + moments(*chosen_on), [penalties[int(np.argmax(scores))]])
    return accuracy(features, labels, *classifier)
