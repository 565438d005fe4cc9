"""Perceptual hashes on the planted pool of curate:demo, beside the pipeline: what each finds of the copies.

    python -m mim_jax.curate --config=curate:demo --workdir=runs/curated
    python benchmarks/duplicates.py --workdir=runs/curated [--tools=imagehash,imagededup]

The second needs the tools: `pip install ImageHash imagededup`. The 64-bit hashes of all images of the pool are compared, pairs
of at most so many different bits are joined, and the components are judged as those of the pipeline are.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from mim_jax import load_config
from mim_jax.curate import components, report, stages
from mim_jax.curate.embedders import CANVAS
from mim_jax.data.decode import decode

WORKDIR = flags.DEFINE_string("workdir", "runs/curated", "Of curate:demo, finished.")
TOOLS = flags.DEFINE_list("tools", ["imagehash", "imagededup"], "Packages.")
THRESHOLDS = (0.85, 0.875, 0.9, 0.925, 0.95)
BITS = (0, 2, 4, 6, 8, 10)  # 10 is imagededup's default
BLOCK = 1024


def hashes(tool: str) -> dict[str, Callable[[Image.Image], int]]:
    """By its name, what makes the 64 bits of an image."""
    if tool == "imagehash":
        import imagehash

        def bits(function: Callable) -> Callable[[Image.Image], int]:
            return lambda image: int(str(function(image)), 16)

        return {name: bits(getattr(imagehash, name)) for name in ("phash", "dhash", "average_hash", "whash")}
    from imagededup import methods

    def text(method: type) -> Callable[[Image.Image], int]:
        made = method(verbose=False)
        return lambda image: int(made.encode_image(image_array=np.asarray(image)), 16)

    return {name: text(getattr(methods, name)) for name in ("PHash", "DHash", "AHash", "WHash")}


def alike(found: np.ndarray, most: int) -> Iterator[components.Edges]:
    """Pairs of hashes uint64 [N] that differ in at most `most` bits."""
    for start in range(0, len(found), BLOCK):
        distance = np.bitwise_count(found[start : start + BLOCK, None] ^ found)
        first, second = np.nonzero(distance <= most)
        yield (first + start).astype(np.int32), second.astype(np.int32), np.ones(len(first), np.float32)


def told(name: str, figures: dict[str, float]) -> None:
    kinds = ", ".join(f"{key.split(', ')[1]} {value:.3f}" for key, value in figures.items() if key.startswith("recall, "))
    print(f"{name}: recall {figures['recall']:.3f}, precision {figures['precision']:.3f} ({kinds})", flush=True)


def main(_: list[str]) -> None:
    state = stages.run(load_config("curate:demo"), Path(WORKDIR.value))
    count, none = len(state.labels), [np.full(len(state.labels), -np.inf, np.float32)]  # no image is dropped as leaked

    def judge(name: str, edges: Iterable[components.Edges]) -> None:
        labels = components.components(count, edges)
        told(name, report.planted_found(dataclasses.replace(state, labels=labels, leaks=none)))

    for threshold in (state.threshold, *THRESHOLDS):
        edges = components.above(stages.edges_of(state.found), threshold)
        judge(f"{report.similarity(state)} of at least {threshold:g}", edges)
    source = state.uncurated[0].source
    images = [Image.fromarray(decode(source[int(row)].image, CANVAS)) for row in state.origin]
    for tool in TOOLS.value:
        for name, function in hashes(tool).items():
            found = np.array([function(image) for image in images], np.uint64)
            for bits in BITS:
                judge(f"{tool} {version(tool)} {name}, at most {bits} bits", alike(found, bits))


if __name__ == "__main__":
    app.run(main)
