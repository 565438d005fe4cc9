"""The time that digests of the state take at a save, against the time of a step.

    python benchmarks/digests.py [--rounds=20]

For each recipe a step, the digests, and a step followed by them are timed in turn in each round; medians are printed. The
share is that of the digests in the time of all steps from one save to the next. A large recipe runs with a small batch here:
with its own a step takes longer, the digests do not, and the share is smaller.
"""

import platform
import statistics

import jax
from absl import app
from step import ROUNDS, Step, interleaved, noise

from mim_jax import load_config, make_method, sharding
from mim_jax.checkpoint import digests
from mim_jax.durations import interval

RECIPES = {"dino:demo": None, "dino:vits16": 4}  # and the batch, None: its own


def main(_: list[str]) -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}")
    print("recipe        state     batch   save every      step   digests    both   share")
    for recipe, batch_size in RECIPES.items():
        config = load_config(recipe).unlock()
        every = interval(config, "checkpoint.every")  # with the recipe's own batch
        config.data.batch_size = batch_size or config.data.batch_size
        with jax.set_mesh(sharding.make_mesh()):
            method = make_method(config)
            step = Step(method, config, noise(method, config))

            def both(step=step):
                loss = step()
                return loss, digests(jax.tree.leaves(step.state))

            programs = {"step": step, "digests": lambda step=step: digests(jax.tree.leaves(step.state)), "both": both}
            times = {name: statistics.median(seconds) for name, seconds in interleaved(programs, ROUNDS.value).items()}
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(step.state)) / 2**20
        share = times["digests"] / (every * times["step"])
        print(
            f"{recipe:<12}{size:5.0f} MiB {config.data.batch_size:8} {every:6,} steps "
            + "".join(f"{times[name] * 1e3:7.1f} ms" for name in programs)
            + f"{share:8.3%}"
        )


if __name__ == "__main__":
    app.run(main)
