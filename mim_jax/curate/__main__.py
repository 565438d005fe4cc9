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

import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from mim_jax import compiled, storage
from mim_jax.command import raised_here, refuse_unknown_keys
from mim_jax.config import load_config
from mim_jax.curate import stages
from mim_jax.data.sources import user_cache
from mim_jax.stopping import leave

EXAMPLE = "python -m mim_jax.curate --config=curate:demo --workdir=runs/curated"


def main(argv: list[str]) -> None:
    if {"-h", "-help", "--help"} & set(argv):
        print(__doc__)
        return
    logging.set_verbosity(logging.WARNING)
    try:
        given = flags.FlagValues()
        flags.DEFINE_string("workdir", "", "", flag_values=given)
        spec = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "curate")
        rest = [arg for arg in argv if not arg.startswith("--config=")]
        config = load_config(spec)
        refuse_unknown_keys(rest, config)
        config_flags.DEFINE_config_dict("config", config, flag_values=given, sys_argv=rest)
        if more := given(rest)[1:]:
            sys.exit(f"error: not understood: {' '.join(more)}")
        if not given.workdir:
            sys.exit(f"error: --workdir is missing, for example {EXAMPLE}")
        if storage.remote(given.workdir):
            sys.exit(f"error: --workdir is {given.workdir}, but must be a folder of this machine")
        compiled.keep(user_cache() / "compiled")
        stages.run(given.config, Path(given.workdir).expanduser().absolute())
    except KeyboardInterrupt:
        leave(130, "stopped; the same command goes on from there")
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (OSError, ValueError) as error:
        if not raised_here(error):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv)
