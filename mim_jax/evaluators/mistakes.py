"""What a classifier gets wrong: accuracy by class, and which class it takes for which."""

from typing import Any

import numpy as np

SHOWN = 10  # classes and pairs in a report


def class_accuracy(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(accuracy, images) of each class, [num_classes]; the accuracy of a class without images is NaN."""
    images = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[labels == predicted], minlength=num_classes)
    return np.where(images > 0, right / np.maximum(images, 1), np.nan), images


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (row) were taken for each class (column), int [num_classes, num_classes]."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """(class, the class that it was taken for, images), of the pairs with most images. Makes no matrix of many classes."""
    wrong = labels != predicted
    pairs, images = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-images, kind="stable")[:SHOWN]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(images[i])) for i in order]


def summary(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> dict[str, list[list[Any]]]:
    """For the report: `classes`, the worst ones, as [name, accuracy, images], and `pairs`, those confused most, as
    [name, taken for, images, images of the first class]."""
    accuracy, images = class_accuracy(labels, predicted, len(names))
    measured = np.flatnonzero(images)
    worst = measured[np.lexsort((-images[measured], accuracy[measured]))][:SHOWN]
    return {
        "classes": [[names[i], float(accuracy[i]), int(images[i])] for i in worst],
        "pairs": [[names[i], names[j], count, int(images[i])] for i, j, count in confused_pairs(labels, predicted)],
    }
