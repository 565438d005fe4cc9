"""Continuing from weights with care, and without: DINO's demo from runs of `mim_jax.compare` on CIFAR-10.

  python -m mim_jax.compare --out=runs/compare --methods=mae,dino
  python benchmarks/continuing.py --starts=runs/compare --folder=runs/continuing

For each start and seed (--seeds=3) there are two runs of equally many steps. With care (`continue_from`) the backbone is frozen
for a fifth of them, and its learning rate grows for two fifths, with layer-wise decay. Without (`init_from`) it is the recipe's
at once. MAE's runs have no head of DINO's, DINO's have all of it. Scores are of 5,000 validation images, of a tenth of the
training images that neither the starts nor these runs learn from, with a bank of 5,000 others; the features are those that the
start was measured by. Each run is one command of `mim_jax.main`; finished ones are kept.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from mim_jax import journal
from mim_jax.compare import Run
from mim_jax.config import OF_BACKBONE, load_config

STARTS = flags.DEFINE_string("starts", "runs/compare", "Folder of the runs that are continued, NAME_SEED.")
NAMES = flags.DEFINE_list("names", ["mae", "dino"], "Their names.")
OUT = flags.DEFINE_string("folder", "runs/continuing", "Folder of the new runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Of each name.")
STEPS = flags.DEFINE_integer("steps", 500, "Steps of each run.")

RECIPE = "dino:demo"
KEYS = {"with care": "continue_from", "at once": "init_from"}
COLUMNS = ("start", *KEYS, "with care - start", "at once - start", "cosine", "patch retrieval: start", "with care")


def made(start: Path, key: str, seed: int) -> Run:
    """The run that begins with another one, in `config.init_from` or `config.continue_from`."""
    there, steps = json.loads((start / "config.json").read_text()), STEPS.value
    names = [name for name in OF_BACKBONE if name in there["model"] and name in load_config(RECIPE).model]
    given: dict[str, Any] = {f"model.{name}": there["model"][name] for name in names}
    given |= {f"eval.{name}": there["eval"][name] for name in ("tokens", "standardize", "img_size") if there["eval"][name]}
    given |= {"model.unroll": there["model"]["depth"], "seed": seed, key: start, "total": f"{steps} steps"}
    given |= {"data.split": "train[:90%]", "data.eval_split": "train[90%:]", "eval.bank": 5000, "eval.test": 5000}
    given |= {"eval.every": f"{-(-steps // 2)} steps", "checkpoint.every": f"{steps} steps"}
    given |= {"continued.frozen": f"{steps // 5} steps", "continued.ramp": f"{2 * steps // 5} steps"}
    return Run(Path(OUT.value) / f"{start.name}_{key}", RECIPE, given)


def measured(start: Path, seed: int) -> list[float]:
    """The figures of COLUMNS."""
    latest = {}
    for name, key in KEYS.items():
        run = made(start, key, seed)
        if not run.finished:
            run.go()
        latest[name] = journal.history(run.workdir).latest
    careful, scores = latest["with care"], [figures["eval/knn"] for figures in latest.values()]
    before = careful["eval/knn_baseline_start"]
    patches = [careful[f"eval/patch_retrieval{which}"] for which in ("_baseline_start", "")]
    return [before, *scores, *(score - before for score in scores), careful["health/start_cosine"], *patches]


def line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    print(line("k-NN of", COLUMNS) + "\n" + line("---", ["---"] * len(COLUMNS)), flush=True)
    for name in NAMES.value:
        rows = []
        for seed in range(SEEDS.value):
            rows.append(measured(Path(STARTS.value) / f"{name}_{seed}", seed))
            print(line(f"{name}, seed {seed}", [f"{value:.3f}" for value in rows[-1]]), flush=True)
        if len(rows) > 1:
            both = [(statistics.mean(values), statistics.stdev(values) / len(rows) ** 0.5) for values in zip(*rows)]
            print(line(f"{name}, mean", [f"{mean:.3f} ± {error:.3f}" for mean, error in both]), flush=True)


if __name__ == "__main__":
    app.run(main)
