"""Makes a data set to pretrain on from a heap of images.

  python -m mim_jax.curate --config=curate:demo --workdir=runs/curated
  python -m mim_jax.curate --config=curate --config.uncurated=~/heap --config.curated=~/good --config.embedder=runs/dino \\
    --workdir=runs/curated
  mim_jax --config=mae:demo --config.data.name=curated --config.data.dir=runs/curated --workdir=runs/mae

  --config=NAME:VARIANT    configs/curate.py, whose comments explain its values, or a file of one's own
  --config.KEY=VALUE       changes a value of it
  --workdir=FOLDER         for everything that is made; the same command goes on after a kill, with the same bytes at the end

Writes list.json, the list of images; provenance.parquet, with a row for each image: what has become of it and why; report.html.
"""

import dataclasses
import sys

from absl import flags
from ml_collections import config_flags

from mim_jax import cli
from mim_jax.command import refuse_unknown_keys
from mim_jax.config import load_config
from mim_jax.curate import stages


@dataclasses.dataclass(frozen=True)
class Flags:
    workdir: str


def main(argv: list[str]) -> None:
    with cli.in_one_line("stopped; the same command goes on from there"):
        spec = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "curate")
        rest = [arg for arg in argv if not arg.startswith("--config=")]
        config, found = load_config(spec), flags.FlagValues()
        if "uncurated" not in config:
            raise ValueError(f"--config={spec} is a recipe for training; here it is curate, or a file like configs/curate.py")
        refuse_unknown_keys(rest, config)
        config_flags.DEFINE_config_dict("config", config, flag_values=found, sys_argv=rest)
        given, _ = cli.begin(Flags, rest, __doc__ or "", given=found)
        stages.run(found.config, cli.of_this_machine("workdir", given.workdir, "folder"))


if __name__ == "__main__":
    main(sys.argv)
