"""The pictures of a run: its crops, what its heads attend to, and which images it finds alike."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from mim_jax.data.augment import augment, center_crop, denormalize
from mim_jax.evaluators import Monitor, pictures
from mim_jax.methods.base import make_views
from mim_jax.sharding import everywhere
from mim_jax.state import TrainState

QUERIES, NEIGHBORS, RECONSTRUCTED = 8, 8, 16


def crop_picture(batch: Mapping[str, np.ndarray], method: Any, data: ml_collections.ConfigDict) -> Image.Image:
    """The first images of a host batch beside all crops that the step makes of them, and the masks on them."""
    rows = {name: column[:6] for name, column in batch.items()}
    if method.mask and method.mask.on_host:
        rows["mask"] = method.mask.examples(len(rows["image"]), len(method.crops[0].policies))
    views = jax.jit(lambda rows: everywhere(make_views(method, rows, jax.random.key(0), data)))(rows)
    crops = {group.name: np.asarray(denormalize(views[group.name], data.mean, data.std)) for group in method.crops}
    if "mask" in views:
        crops["masked"] = pictures.darkened(crops["global"], np.asarray(views["mask"]))
    images = [image[:height, :width] for image, (height, width) in zip(rows["image"], rows["size"])]
    return pictures.crop_grid(images, crops)


def evaluation_pictures(
    monitor: Monitor, method: Any, state: TrainState, frozen: Any, class_names: Sequence[str]
) -> Iterator[tuple[str, Image.Image]]:
    """(name, picture) of all that there is to see of a model: what the method declares, and its neighbors."""
    params = state.teacher or state.params
    if "reconstruction" in method.pictures:
        yield "reconstruction", reconstruction_picture(monitor, method, params, state.extra, frozen)
    if "tokens" in method.pictures:
        yield "tokens", codebook_picture(monitor, method, params, state.extra)
    if "attention" in method.pictures:
        yield "attention", attention_picture(monitor, method, params)
    if "features" in method.pictures:
        yield "features", feature_picture(monitor, method, params)
        yield "correspondences", correspondence_picture(monitor, method, params)
    yield "neighbors", neighbor_picture(monitor, params, class_names)


def reconstruction_picture(monitor: Monitor, method: Any, params: Any, extra: Any, frozen: Any) -> Image.Image:
    """Held-out images, what the masks leave of them, and what the model makes of that; the same images and masks always."""
    rows = {name: column[:RECONSTRUCTED] for name, column in monitor.test.items()}
    masks = {"mask": method.mask.examples(len(rows["image"]), 1)} if method.mask else {}
    group, names = monitor.crops, list[str]()

    @jax.jit
    def reconstruct(params: Any, extra: Any, frozen: Any, image: jax.Array, size: jax.Array) -> list[jax.Array]:
        picture = center_crop(image, size, group.size, monitor.fraction, monitor.mean, monitor.std)[:, None]
        views = {"global": picture, **masks}
        if group.target:
            views["target"] = center_crop(image, size, group.target.size, monitor.fraction, (0,) * 3, (1,) * 3)[:, None]
        painted = method.reconstruction(params, extra, frozen, views)
        names[:] = painted  # in the order that the method gives; jit sorts what comes out of a dict
        return everywhere([denormalize(x, monitor.mean, monitor.std)[:, 0] for x in (picture, *painted.values())])

    image, *painted = jax.device_get(reconstruct(params, extra, frozen, rows["image"], rows["size"]))
    shown = {"image": image} | ({"masked": pictures.darkened(image, masks["mask"][:, 0])} if masks else {})
    return pictures.reconstructions(shown | dict(zip(names, painted, strict=True)))


def codebook_picture(monitor: Monitor, method: Any, params: Any, extra: Any) -> Image.Image:
    """How often a tokenizer uses each of its codes for the held-out images."""

    @jax.jit
    def counts(params: Any, extra: Any, image: jax.Array, size: jax.Array) -> jax.Array:
        picture = center_crop(image, size, monitor.crops.size, monitor.fraction, monitor.mean, monitor.std)
        return everywhere(jnp.bincount(method.tokens(params, extra, picture).reshape(-1), length=method.codes))

    step, total = monitor.batch_size, np.zeros(method.codes, int)
    for start in range(0, len(monitor.test["image"]), step):
        rows = (monitor.test[name][start : start + step] for name in ("image", "size"))
        total += np.asarray(counts(params, extra, *rows))
    return pictures.usage(total)


def attention_picture(monitor: Monitor, method: Any, params: Any) -> Image.Image:
    """The last block's attention for held-out images at twice the size of the crops, for a finer grid of patches."""

    @jax.jit
    def attend(image: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        picture = center_crop(image, size, 2 * monitor.crops.size, monitor.fraction, monitor.mean, monitor.std)
        return everywhere((method.attention(params, picture), denormalize(picture, monitor.mean, monitor.std)))

    attention, images = attend(monitor.test["image"][:4], monitor.test["size"][:4])
    side = round(attention.shape[-1] ** 0.5)
    return pictures.attention_maps(np.asarray(attention), (side, side), np.asarray(images))


def feature_picture(monitor: Monitor, method: Any, params: Any) -> Image.Image:
    """The patch features of held-out images at twice the size of the crops, as colors."""

    @jax.jit
    def encode(image: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        picture = center_crop(image, size, 2 * monitor.crops.size, monitor.fraction, monitor.mean, monitor.std)
        return everywhere((method.features(params, picture)["patch"], denormalize(picture, monitor.mean, monitor.std)))

    features, images = encode(monitor.test["image"][:RECONSTRUCTED], monitor.test["size"][:RECONSTRUCTED])
    return pictures.principal_colors(np.asarray(features), np.asarray(images))


def correspondence_picture(monitor: Monitor, method: Any, params: Any) -> Image.Image:
    """Patches of two views of held-out images that are alike; the views are those of the training at twice the size."""
    group = dataclasses.replace(monitor.crops, size=2 * monitor.crops.size)
    rows = {name: monitor.test[name][:QUERIES] for name in ("image", "size")}
    rows["index"] = np.arange(len(rows["image"]), dtype=np.int32)

    @jax.jit
    def encode(rows: Any) -> tuple[jax.Array, jax.Array]:
        views = augment(rows, (group,), jax.random.key(0), monitor.mean, monitor.std)[group.name][:, :2]
        patch = method.features(params, views.reshape(-1, *views.shape[2:]))["patch"]
        return everywhere((patch.reshape(*views.shape[:2], *patch.shape[1:]), denormalize(views, monitor.mean, monitor.std)))

    features, views = encode(rows)
    return pictures.correspondences(np.asarray(features), np.asarray(views))


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
