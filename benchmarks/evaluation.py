"""Memory and time of an evaluation without the encoder: images come from a generator, features are a projection of the pixels.

    python benchmarks/evaluation.py [--bank=50000 --test=10000 --width=1024 --canvas=48 --size=32]

It is measured with a tenth of the images and with all of them; the difference of the two peaks is the memory that grows with
the number of images. On a CPU the peak includes the arrays of host and device.
"""

import dataclasses
import functools
import resource
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mim_jax import load_config, make_method, sharding
from mim_jax.data.sources import Example
from mim_jax.evaluators import Evaluation
from mim_jax.methods.base import Method
from mim_jax.state import TrainState

BANK = flags.DEFINE_integer("bank", 50_000, "Images in the bank.")
TEST = flags.DEFINE_integer("test", 10_000, "Held-out images.")
WIDTH = flags.DEFINE_integer("width", 1024, "Dimension of a feature.")
CANVAS = flags.DEFINE_integer("canvas", 48, "Side of the images, in pixels.")
SIZE = flags.DEFINE_integer("size", 32, "Side of evaluated images and crops, in pixels.")


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of noise, generated when they are read."""

    description: str
    side: int
    count: int
    num_classes: int = 1000
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        return self.description

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Example:
        rng = np.random.default_rng(row)
        return Example(rng.integers(0, 256, (self.side, self.side, 3), np.uint8), row % self.num_classes)

    def name(self, row: int) -> str:
        return f"row {row}"


class Projection(Method):
    def features(self, params, images):
        return {"cls": images.reshape(len(images), -1) @ params["kernel"]}


def main(_: list[str]) -> None:
    config = load_config("dino:demo").unlock()
    config.data.canvas, config.model.img_size, config.crops.global_crops_size = CANVAS.value, SIZE.value, SIZE.value
    kernel = np.random.default_rng(0).normal(size=(3 * SIZE.value**2, WIDTH.value)).astype(np.float32)
    with jax.set_mesh(sharding.make_mesh()):
        method = Projection(views=make_method(config).views)
        state = TrainState(jnp.int32(0), params={"kernel": jnp.asarray(kernel)}, teacher={}, opt_state=(), extra={})
        for share in (10, 1):
            config.eval.update(bank=BANK.value // share, test=TEST.value // share)
            sources = (Noise(split, CANVAS.value, BANK.value) for split in ("train", "test"))
            evaluation = Evaluation(config, method, *sources)
            print("{:,} + {:,} images".format(*evaluation.sizes), flush=True)
            neighbors = functools.partial(evaluation.pictures, target={})
            measures = {"baselines": evaluation.baselines, "scores": evaluation.scores, "neighbors": neighbors}
            for name, measure in measures.items():
                start = time.perf_counter()
                dict(measure(state))  # pictures are drawn when they are asked for
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                print(f"  {name:<10} {time.perf_counter() - start:7.1f} s, peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    app.run(main)
