"""Trains a vision transformer without labels.

  mim_jax --config=dino:demo --workdir=runs/dino
  mim_jax --config=dino:demo --config.total="20 epochs" --config.data.name=folder --config.data.dir=~/images --workdir=runs/mine
  mim_jax --config=mae:vitb16 --config.mesh.fsdp=8 --config.model.remat=auto --plan=v5e-8

  --config=NAME:VARIANT    a recipe, or a file of one: my/recipe.py:variant
  --config.KEY=VALUE       changes a value of it
  --workdir=FOLDER         for metrics, checkpoints, pictures and the report; a run that is there is continued; may be at
                           gs://BUCKET/FOLDER
  --dry_run, --plan=v5e-8  prints the plan (parameters, sharding, memory), of the devices here or of others, and stops
  --compiled=FOLDER        for compiled programs, so that the next start is fast; "": none; default: ~/.cache/mim_jax/compiled
  --coordinator=HOST:PORT --processes=N --process=I   one run on several hosts, where no cluster tells them to jax
"""

import difflib
import functools
import logging as python_logging
import re
import runpy
import sys
import textwrap
import traceback
import warnings
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mim_jax import compiled, dry_run, hosts, train
from mim_jax.cli import raised_here
from mim_jax.config import PACKAGED, absolute, leaves, load_config
from mim_jax.data.sources import user_cache
from mim_jax.stopping import Stop, leave

EXAMPLE = "mim_jax --config=dino:demo --workdir=runs/dino"
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
PLAN = flags.DEFINE_string("plan", "", "Devices to plan for, which need not be here: v5e-8, v5p-64, v6e-256, h100-8.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
COMPILED = flags.DEFINE_string("compiled", None, "Folder of compiled programs; empty: none are kept.")

# Other words for keys, and those of earlier versions.
RENAMED = (
    (r"(eval|checkpoint)\.(\w+_)?(steps|epochs|examples|iterations)", r"\1.every"),
    (r"(.*\.)?((num|max|total|train)_)?(steps|epochs|examples|iterations)", "total"),
    (r"loss\.warmup_teacher_temp_epochs", "loss.teacher_temp_warmup"),
    (r"optim\.decay_(steps|epochs)", "optim.decay_at"),
    (r"loss\.temperature_(steps|epochs)", "loss.temperature_decay"),
    (r"loss\.kl_(steps|epochs)", "loss.kl_warmup"),
)
FROZEN = "config.target.config"
KINDS = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple, '(0.2, 1.0)'"}


def run(stop: Stop) -> None:
    """The whole command, as it is in `sys.argv`."""
    app.run(functools.partial(main, stop=stop), flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """Defines the flag of the config that is asked for, and parses all flags. Exits with one line for what is wrong."""
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(argv):
        print(__doc__, "Recipes:", sep="\n")
        for path in sorted(PACKAGED.glob("*.py")):
            module = runpy.run_path(str(path))
            config = module["get_config"]()
            if "model" not in config:  # of another command
                continue
            frozen = "" if "method" in config else f" (for {FROZEN})"
            variants = ", ".join(module["VARIANTS"]) + frozen
            print(textwrap.fill(variants, 128, initial_indent=f"  {path.stem:14}", subsequent_indent=" " * 16))
        sys.exit()
    spec, rest, arguments = "", list[str](), iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            spec = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    if not spec:
        sys.exit(f"error: --config is missing, for example {EXAMPLE}")
    try:
        config = load_config(spec)
        if "method" not in config:
            other = f"a frozen network that others learn from: --{FROZEN}={spec}"
            other = other if "model" in config else "for python -m mim_jax.curate, which makes data sets"
            raise ValueError(f"{spec} is no method but {other}")
        refuse_unknown_keys(rest, config)
        config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
        return flags.FLAGS(rest)
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.(\S+?)=(.*?): ", str(error), re.DOTALL)
        if match is None:
            sys.exit(f"error: {error}")
        section, _, key = match[1].rpartition(".")
        kind = (config[section] if section else config).get_type(key)
        sys.exit(f'error: {match[1]} is "{match[2]}", but must be {KINDS.get(kind, kind.__name__)}')
    except (IndexError, TypeError) as error:  # of ml_collections
        sys.exit(f"error: a value on the command line does not fit its key: {error}")
    except (OSError, ValueError, flags.Error) as error:
        if isinstance(error, (OSError, ValueError)) and not raised_here(error):
            raise
        sys.exit(f"error: {error}")


def refuse_unknown_keys(arguments: list[str], config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, with what may have been meant, for `--config.KEY` of a key that the config does not have."""
    keys = [key for key, _ in leaves(config)]
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=\[]+)(\[.*\])?(=(.*))?", argument)
        if match is None or (key := match[2]) in keys:
            continue
        offered = [each for each in keys if each.startswith("target.network.") == key.startswith("target.network.")]
        if inside := [each for each in offered if each.startswith(f"{key}.")]:
            raise ValueError(f"{key} is a section of the config, with {', '.join(inside)}")
        if now := renamed(key, offered):
            unit = re.search("steps|epochs|examples", key)
            example = f'--config.{now[0]}="{match[5] or 10} {unit[0] if unit else "steps"}"'
            raise ValueError(f"the config has no key {key}; it is {' or '.join(now)}, with a unit: {example}")
        likeness = {each: max(alike(key, each), alike(last(key), last(each))) for each in offered}
        best = sorted(likeness, key=likeness.__getitem__, reverse=True)[:3]
        near = [each for each in best if likeness[each] > max(0.6, likeness[best[0]] - 0.1)]
        raise ValueError(f"the config has no key {key}" + f"; did you mean {' or '.join(near)}?" * bool(near))


def renamed(key: str, keys: list[str]) -> list[str]:
    """What a key of a duration without a unit is now: the one of the table, or those of its name less the unit."""
    found = [match.expand(now) for pattern, now in RENAMED if (match := re.fullmatch(pattern, key))]
    if now := [each for each in found if each in keys]:
        return now[:1]
    name = re.sub("_(steps|epochs|examples)$", "", key)
    return [] if name == key else [each for each in keys if each == name] or [each for each in keys if last(each) == last(name)]


def alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def last(key: str) -> str:
    return key.rpartition(".")[2]


def main(argv: list[str], stop: Stop | None = None) -> None:
    if len(argv) > 1:
        sys.exit(f"error: not understood: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(worth_logging)
    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # of a process that cleans up after data workers
    config = flags.FLAGS.config
    if "://" in (COMPILED.value or ""):
        sys.exit(f"error: --compiled is {COMPILED.value}, but must be a folder of this machine")
    if COMPILED.value != "" and not PLAN.value:  # JAX cannot read a program for devices that are not here
        compiled.keep(Path(COMPILED.value or user_cache() / "compiled").expanduser().absolute())
    config.data.dir = absolute(config.data.dir)
    for key in ("init_from", "continue_from", "resume"):
        config[key] = absolute(config[key])
    try:
        if not (DRY_RUN.value or PLAN.value or WORKDIR.value):
            sys.exit(f"error: --workdir is missing, for example {EXAMPLE}")
        if not PLAN.value and hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value) and stop:
            stop.join()
        if PLAN.value and stop:
            stop.release()
        if DRY_RUN.value or PLAN.value:
            print(dry_run.plan(config, PLAN.value))
        else:
            train.run(config, str(absolute(WORKDIR.value)), stop)
    except Exception as error:
        expected = isinstance(error, (OSError, ValueError, train.NotFinite)) and raised_here(error)
        if hosts.several():
            hosts.fail(error, f"error: {error}" if expected else traceback.format_exc())
        if not expected:
            raise
        if stop:
            leave(1, f"error: {error}")
        sys.exit(f"error: {error}")
    if hosts.several():
        hosts.finish(0)
    if stop and stop.requested:
        leave(0)


def worth_logging(record: python_logging.LogRecord) -> bool:
    """False for Orbax and gcsfs, which log a failure for every file and thread. It is raised, too, and reported once."""
    return record.name not in ("asyncio", "gcsfs") and "/orbax/" not in record.pathname


def unraisable(what: Any) -> None:
    """Passes on all but what Orbax leaves behind of a read or write that failed: the error itself is raised, too."""
    code = getattr(what.object, "cr_code", None)
    if not (code and "/orbax/" in code.co_filename) and str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)
