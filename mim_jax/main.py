"""python -m mim_jax.main --config=configs/dino.py:demo --workdir=runs/dino [--config.optim.lr=1e-3 ...] [--dry_run]"""

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a variant after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, pictures and the report go.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step, print the plan (parameters, sharding, memory), and stop.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    from mim_jax import dry_run, train  # after the flags: a wrong one is told without waiting for jax

    logging.set_verbosity(logging.WARNING)
    if DRY_RUN.value:
        print(dry_run.plan(CONFIG.value))
        return
    if not WORKDIR.value:
        raise app.UsageError("--workdir is missing")
    train.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
