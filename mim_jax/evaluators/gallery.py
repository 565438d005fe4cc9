"""The pictures of a run: its crops, what its heads attend to, and which images it finds alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from mim_jax.data.augment import augment, center_crop, denormalize
from mim_jax.evaluators import Monitor, pictures

QUERIES, NEIGHBORS = 8, 8


def crop_picture(batch: Mapping[str, np.ndarray], method: Any, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The first images of a host batch beside all crops that the step makes of them."""
    rows = {name: column[:6] for name, column in batch.items()}
    views = jax.jit(lambda rows: augment(rows, method.crops, jax.random.key(0), mean, std))(rows)
    crops = {group.name: np.asarray(denormalize(views[group.name], mean, std)) for group in method.crops}
    images = [image[:height, :width] for image, (height, width) in zip(rows["image"], rows["size"])]
    return pictures.crop_grid(images, crops)


def attention_picture(monitor: Monitor, method: Any, params: Any) -> Image.Image:
    """The last block's attention for held-out images at twice the evaluation size, for a finer grid of patches."""

    @jax.jit
    def attend(image: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        picture = center_crop(image, size, 2 * monitor.out, monitor.fraction, monitor.mean, monitor.std)
        return method.attention(params, picture), denormalize(picture, monitor.mean, monitor.std)

    attention, images = attend(monitor.test["image"][:4], monitor.test["size"][:4])
    side = round(attention.shape[-1] ** 0.5)
    return pictures.attention_maps(np.asarray(attention), (side, side), np.asarray(images))


def neighbor_picture(monitor: Monitor, params: Any, class_names: Sequence[str] = ()) -> Image.Image:
    """Held-out images and what is nearest to each in the bank, by cosine."""
    bank, queries = monitor.bank, {name: column[:QUERIES] for name, column in monitor.test.items()}
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (monitor.encode(params, b) for b in (queries, bank))]
    nearest = np.argsort(-unit[0] @ unit[1].T, axis=1)[:, :NEIGHBORS]

    def cut(batch: Mapping[str, np.ndarray], row: int) -> np.ndarray:
        height, width = batch["size"][row]
        return batch["image"][row, :height, :width]

    def name(label: int) -> str:
        return class_names[label] if class_names else f"class {label}"

    found = [[cut(bank, row) for row in rows] for rows in nearest]
    shown = [cut(queries, row) for row in range(len(nearest))]
    if not monitor.num_classes:
        return pictures.neighbors(shown, found)
    return pictures.neighbors(
        shown, found, [name(i) for i in queries["label"]], [[name(bank["label"][row]) for row in rows] for rows in nearest]
    )
