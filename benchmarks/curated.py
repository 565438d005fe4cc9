"""Pretraining on curated images, and on as many random images of the same pool.

  python -m mim_jax.curate --config=curate:demo --config.write.curated=0 --workdir=runs/curated
  python benchmarks/curated.py --list=runs/curated --folder=runs/pretrained

Each recipe of --recipes is trained with three seeds on the list of curate:demo, and on equally many images that are drawn anew
for each seed from its planted pool (a long tail, copies, test images). All runs have the same number of steps. The k-NN
accuracy is that of all 10,000 test images of CIFAR-10, after the last step, with a bank of 5,000 training images that are in
no list.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import mim_jax
from mim_jax.compare import Run
from mim_jax.data import curated
from mim_jax.data.sources import open_source
from mim_jax.evaluators.knn import knn_accuracy
from mim_jax.evaluators.probe import standardize

LIST = flags.DEFINE_string("list", "runs/curated", "Folder of curate:demo.")
OUT = flags.DEFINE_string("folder", "runs/pretrained", "Folder of the runs.")
RECIPES = flags.DEFINE_list("recipes", ["mae:demo", "dino:demo"], "Recipes for CIFAR-10.")
STEPS = flags.DEFINE_integer("steps", 1562, "Steps of each run.")
SEEDS = 3
BANK, TEST = "train[80%:90%]", "test"


def random_list(of: Path, seed: int, to: Path) -> Path:
    """A folder with a list of equally many rows of the first source of the list `of`."""
    about = json.loads((of / curated.LIST).read_text())
    rows, pool = np.load(of / about["file"]), curated.open_any(about["sources"][0])
    rows["source"], rows["row"] = 0, np.sort(np.random.default_rng(seed).permutation(len(pool))[: len(rows)])
    to.mkdir(parents=True, exist_ok=True)
    np.save(to / "rows.npy", rows)
    about |= {"file": "rows.npy", "sha256": hashlib.sha256((to / "rows.npy").read_bytes()).hexdigest()}
    (to / curated.LIST).write_text(json.dumps(about))
    return to


def images_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    examples = list(open_source("cifar10", None, split))
    return np.stack([example.image for example in examples]), np.array([example.label for example in examples])


def score(workdir: Path, images: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    model, settings = mim_jax.load(workdir), json.loads((workdir / "config.json").read_text())["eval"]
    kind = {"cls": "cls", "patch": "mean"}[settings["tokens"]]
    bank, test = (model.features(images[split][0])[kind] for split in (BANK, TEST))
    if settings["standardize"]:
        bank, test = standardize(bank, test)
    return knn_accuracy(bank, images[BANK][1], test, images[TEST][1], 10, 20, 0.07)[0]


def main(_: list[str]) -> None:
    images, out, of = {split: images_of(split) for split in (BANK, TEST)}, Path(OUT.value), Path(LIST.value)
    print("| | curated | random | difference |\n| --- | --- | --- | --- |", flush=True)
    for recipe in RECIPES.value:
        rows: list[list[float]] = []
        for seed in range(SEEDS):
            lists = {"curated": of, "random": random_list(of, seed, out / f"random_{seed}")}
            rows.append([])
            for name, folder in lists.items():
                changes: dict[str, Any] = {"data.name": "curated", "data.dir": str(folder.resolve()), "seed": seed}
                changes |= {"total": f"{STEPS.value} steps", "eval.every": "never", "checkpoint.every": f"{STEPS.value} steps"}
                run = Run(out / f"{recipe.split(':')[0]}_{name}_{seed}", recipe, changes)
                if not run.finished:
                    run.go()
                rows[-1].append(score(run.workdir, images))
            rows[-1].append(rows[-1][0] - rows[-1][1])
            print(f"| {recipe}, seed {seed} | {' | '.join(f'{value:.3f}' for value in rows[-1])} |", flush=True)
        means = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x) / SEEDS**0.5:.3f}" for x in zip(*rows)]
        print(f"| {recipe}, mean | {' | '.join(means)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
