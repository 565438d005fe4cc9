"""Which block of a network, and how many white components, find copies best: before a heap is embedded.

    python benchmarks/copies.py --embedder=vits14.safetensors [--size=98] [--uncurated=~/heap] [--images=1200] [--fitted=2000]

Of `images` images of the second half of the set copies are made as for the calibration of `mim_jax.curate`; the features are
made white for `fitted` images of the first half. For each block, and the features as they are or white, the table has what a
threshold finds that is right for 99 % of the pairs in a pool of `--pool` images, of which a tenth are copies.
"""

import numpy as np
from absl import app, flags
from PIL import Image

import mim_jax
from mim_jax.curate import calibration, embedders, plants
from mim_jax.curate.calibration import DHASH, Pairs
from mim_jax.data import pipeline
from mim_jax.data.decode import decode
from mim_jax.data.sources import open_source, sample
from mim_jax.evaluators.knn import normalize, whitening

EMBEDDER = flags.DEFINE_string("embedder", None, "A run's workdir, or a file or folder of weights; by default pixels.")
SIZE = flags.DEFINE_integer("size", None, "Side, in pixels, that the network sees.")
UNCURATED = flags.DEFINE_string("uncurated", "cifar10", "A folder of images, or cifar10.")
IMAGES = flags.DEFINE_integer("images", 1200, "Images that are copied.")
FITTED = flags.DEFINE_integer("fitted", 2000, "Images that a whitening is of.")
POOL = flags.DEFINE_integer("pool", 20_000, "Images of the pool that the threshold is for.")
AT_A_TIME = 512


def features(images: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """By name: of each kind and block."""
    if EMBEDDER.value is None:
        return [("pixels", np.concatenate([embedders.Pixels.of_image(image) for image in images]))]
    model = mim_jax.load(EMBEDDER.value, resize=1.0)
    depth, side = model.depth, model.checked(SIZE.value, 1)
    scaled = np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in images])
    found: dict[str, list[np.ndarray]] = {"cls": [], "mean": []}
    for start in range(0, len(scaled), AT_A_TIME):  # the features of all patches are large
        made = model.features(scaled[start : start + AT_A_TIME], side, depth)
        for kind, parts in found.items():
            parts.append(made[kind])
    split = {kind: np.split(np.concatenate(parts), depth, axis=1) for kind, parts in found.items()}
    return [(f"{kind}, block {block + 1}", part) for kind, parts in split.items() for block, part in enumerate(parts)]


def main(_: list[str]) -> None:
    folder = UNCURATED.value != "cifar10"
    first, second = (
        open_source("folder" if folder else "cifar10", UNCURATED.value if folder else None, f"train[{part}]")
        for part in (":50%", "50%:")
    )
    levels = pipeline.survey(second, plants.CANVAS).levels

    calibrate = mim_jax.load_config("curate").calibrate
    copies = plants.Copies(second, np.array(sample(second, IMAGES.value)), 0, levels)
    pairs = [decode(copies[row].image, plants.CANVAS, levels) for row in range(len(copies))]
    kinds = [copies.kind(pair) for pair in range(len(pairs) // 2)]
    fit = [decode(first[row].image, plants.CANVAS, levels) for row in sample(first, FITTED.value)]
    hashes = np.array([embedders.dhash(image) for image in pairs[::2]], np.uint64)
    far = embedders.dhash_distance(hashes[:, None], hashes) > DHASH
    columns = ("features", "components", "threshold", "recall", *plants.KINDS)
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for name, found in features(fit + pairs):
        bank, rest = found[: len(fit)], found[len(fit) :]
        for dims in (0, 64, 128, 384):
            if dims > bank.shape[1]:
                continue
            mean, basis = whitening(bank, dims) if dims else (0, np.eye(bank.shape[1]))
            moved = np.asarray(normalize((rest - mean) @ basis))
            similarity = moved[1::2] @ moved[0::2].T
            factor = POOL.value / (2 * calibrate.share * len(kinds))
            curve = calibration.curve(Pairs(np.diagonal(similarity), [similarity[far]]), kinds, factor)
            try:
                at = curve.lowest(calibrate.precision)
                values = [curve.recall[at], *(curve.by_kind[kind][at] for kind in plants.KINDS)]
                told = [f"{curve.thresholds[at]:g}", *(f"{value:.3f}" for value in values)]
            except ValueError:
                told = ["none"] + [""] * (len(columns) - 3)
            print(f"| {name} | {dims or 'as they are'} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
