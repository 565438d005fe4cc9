"""Chooses the demos' settings on validation images, then reads the test images once, over three seeds.

  python benchmarks/demos.py --folder=runs/demos                  all demos: some hours on 2 CPU cores
  python benchmarks/demos.py --folder=runs/demos --demos=mae,dino these, and what they learn from

First each demo of ALTERNATIVES is trained for half of its steps on nine tenths of the training images: as it is, with half and
twice its learning rate, and with its other alternatives. The score is the k-NN accuracy on 5,000 images of the last tenth, seed
0. The best alternative is chosen if it is better by more than two standard errors (0.014). The settings of the other demos were
never chosen by a score. Then all are trained whole, on all training images, with seeds 0, 1 and 2, and scored on all 10,000
test images after the last step. Each run is one command of `mim_jax.main`; finished ones are kept. Where a choice has become
the setting of a demo, the demo as it is has it.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from mim_jax import durations, journal
from mim_jax.compare import Run
from mim_jax.config import load_config

OUT = flags.DEFINE_string("folder", "runs/demos", "Folder of the runs.")
DEMOS = flags.DEFINE_list("demos", None, "Some of the demos; by default all.")

NEEDS = {"dinov2": ("distillation",), "dino": ("eva", "vqkd"), "vqvae": ("beit",), "vqkd": ("beit2",)}  # teacher -> students
NEEDED = {student: teacher for teacher, students in NEEDS.items() for student in students}
SCORED = (
    "dino",
    "ibot",
    "dinov2",
    "distillation",
    "eva",
    "mocov3",
    "masked_patch",
    "mae",
    "simmim",
    "simmim_swin",
    "beit",
    "beit2",
)
ALTERNATIVES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "dino": (),
    "dinov2": (),
    "mocov3": (),
    "ibot": ({"loss.patch_weight": 1.0, "loss.shared_head_teacher": True, "head.patch_out_dim": 0}, {"mask.start": "0 steps"}),
    "simmim": ({"loss.norm_target_window": 0}, {"model.pos": "relative", "model.layerscale": 0.1}),
    "mae": ({"eval.img_size": 32}, {"eval.standardize": False}),
}
STANDARD_ERROR = 0.007
KNN = "eval/knn"


def recipe(demo: str) -> str:
    return "simmim:demo_swin" if demo == "simmim_swin" else f"{demo}:demo"


def alternatives(demo: str) -> list[Mapping[str, Any]]:
    """The demo as it is, with half and twice its learning rate, and those of ALTERNATIVES."""
    rate = load_config(recipe(demo)).optim.lr
    return [{}, {"optim.lr": rate / 2}, {"optim.lr": rate * 2}, *ALTERNATIVES[demo]]


def on_validation_images(out: Path, demo: str, changes: Mapping[str, Any]) -> Run:
    config = load_config(recipe(demo))
    steps = durations.total_steps(config) // 2
    given = {"total": f"{steps} steps", "data.split": "train[:90%]", "data.eval_split": "train[90%:]", "eval.test": 5000}
    given |= {"eval.every": f"{steps} steps", "checkpoint.every": f"{steps} steps"}
    if "mask" in config and "start" in config.mask:
        given["mask.start"] = f"{durations.steps(config, 'mask.start') // 2} steps"
    named = "_".join(f"{key.split('.')[-1]}={value}".replace(" ", "") for key, value in changes.items())
    return Run(out / f"{demo}_half_{named or 'as_it_is'}", recipe(demo), given | dict(changes))


def on_test_images(out: Path, demo: str, seed: int, changes: Mapping[str, Any]) -> Run:
    steps = durations.total_steps(load_config(recipe(demo)))
    given = {"seed": seed, "eval.test": 10_000, "eval.every": f"{steps} steps", "checkpoint.every": f"{steps} steps"}
    if demo in NEEDED:
        given["target.workdir"] = out / f"{NEEDED[demo]}_{seed}"
    return Run(out / f"{demo}_{seed}", recipe(demo), given | dict(changes))


def finish(run: Run) -> dict[str, float]:
    """The latest metrics of a run, which goes on if it is not finished."""
    if not run.finished:
        run.go()
    return journal.history(run.workdir).latest


def with_teachers(demos: tuple[str, ...]) -> Iterator[str]:
    """The demos, each after those that it needs."""
    given: list[str] = []

    def add(demo: str) -> None:
        if demo in NEEDED:
            add(NEEDED[demo])
        if demo not in given:
            given.append(demo)

    for demo in demos:
        add(demo)
    return iter(given)


def choose(out: Path, demo: str) -> Mapping[str, Any]:
    """The changes of a demo that are best on validation images; none if no alternative is clearly better."""
    scores = []
    for changes in alternatives(demo):
        scores.append(finish(on_validation_images(out, demo, changes))[KNN])
        print(f"validation   {recipe(demo):18s} {dict(changes) or 'as it is'!s:60s} k-NN {scores[-1]:.4f}", flush=True)
    best = max(range(len(scores)), key=scores.__getitem__)
    chosen = alternatives(demo)[best] if scores[best] > scores[0] + 2 * STANDARD_ERROR else {}
    print(f"chosen       {recipe(demo):18s} {dict(chosen) or 'as it is'}", flush=True)
    return chosen


def main(_: list[str]) -> None:
    out = Path(OUT.value)
    demos = tuple(with_teachers(tuple(DEMOS.value or SCORED)))
    chosen = {demo: choose(out, demo) if demo in ALTERNATIVES else {} for demo in demos}
    scores: dict[str, list[dict[str, float]]] = {demo: [] for demo in demos}
    for seed in range(3):
        for demo in demos:
            scores[demo].append(finish(on_test_images(out, demo, seed, chosen[demo])))
            print(f"test images  {recipe(demo):18s} seed {seed}  k-NN {scores[demo][-1][KNN]:.4f}", flush=True)
    tags = (KNN, "eval/probe", "eval/view_retrieval")
    print("| demo | " + " | ".join(tag.split("/")[1] for tag in tags) + " |\n| --- |" + " --- |" * len(tags))
    for demo in demos:
        cells = []
        for tag in tags:
            values = [each[tag] for each in scores[demo] if tag in each]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / 3**0.5:.3f}" if values else "")
        print(f"| `{recipe(demo)}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app.run(main)
