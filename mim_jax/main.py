"""python -m mim_jax.main --config=configs/dino.py:demo --workdir=runs/dino [--config.optim.lr=1e-3 ...] [--dry_run]"""

import logging as python_logging
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from mim_jax import dry_run, train
from mim_jax.config import load_config

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a variant after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, pictures and the report go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step, print the plan (parameters, sharding, memory), and stop.")
flags.mark_flag_as_required("config")


def parse(argv: list[str]) -> list[str]:
    """absl's parser; a config that there is not, or a key that it has not, is told in one line."""
    try:
        for spec in re.findall(r"\0--?config[=\0]([^\0]+)", "\0".join(argv)):
            load_config(spec)  # says more clearly than absl what is wrong
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # of ml_collections, which names the nearest key
        sys.exit(f"error: the config has no such key: {' '.join(str(error.args[0].args[0]).split())}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(worth_telling)
    try:
        if DRY_RUN.value:
            print(dry_run.plan(CONFIG.value))
        elif WORKDIR.value:
            train.run(CONFIG.value, WORKDIR.value)
        else:
            raise app.UsageError("--workdir is missing")
    except (OSError, ValueError, train.NotFinite) as error:
        if not raised_here(error):
            raise
        sys.exit(f"error: {error}")


def worth_telling(record: python_logging.LogRecord) -> bool:
    """Not so: Orbax, which logs a failure for every file and thread. It is raised, too, and told once."""
    return record.name != "asyncio" and "/orbax/" not in record.pathname


def raised_here(error: Exception) -> bool:
    """Whether code of this package raised it: then it is written for the user, and a traceback would only hide it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("mim_jax.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
