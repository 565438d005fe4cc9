"""Durations in a config: a number and its unit, "3500 steps", "800 epochs" or "1_000_000 examples"."""

import math
import re
from typing import Any

import ml_collections

FORM = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?) *(step|epoch|example)s?")


def steps_per_epoch(config: ml_collections.ConfigDict) -> int:
    """Full batches in one pass over the data. Raises ValueError where `data.num_examples` is not known."""
    if not config.data.num_examples:
        raise ValueError("durations in epochs need config.data.num_examples, the number of training images")
    return max(config.data.num_examples // config.data.batch_size, 1)


def steps(config: ml_collections.ConfigDict, key: str) -> int:
    """The duration at `key`, such as "optim.warmup", in steps. Raises ValueError, which names the key, if it is none."""
    return _steps(config, key, _value(config, key))


def steps_of_each(config: ml_collections.ConfigDict, key: str) -> tuple[int, ...]:
    """The durations in the tuple at `key`, in steps."""
    value = _value(config, key)
    if isinstance(value, str):
        raise ValueError(f'{key} is "{value}", but must be a tuple of durations, such as ("700 epochs",)')
    return tuple(_steps(config, key, each) for each in value)


def interval(config: ml_collections.ConfigDict, key: str) -> int | None:
    """The interval at `key` in steps; None for "never" (and for 0). Raises ValueError for less than one step."""
    value = _value(config, key)
    if value == "never":
        return None
    every = _steps(config, key, value, ' or "never"')
    if not every and re.search("[1-9]", value):
        raise ValueError(f'{key} is "{value}", but must be at least one step, or "never"')
    return every or None


def total_steps(config: ml_collections.ConfigDict) -> int:
    """The steps of the whole run. Raises ValueError for less than one."""
    if total := steps(config, "total"):
        return total
    raise ValueError(f'total is "{config.total}", but must be at least one step')


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
    for name in key.split("."):
        if name not in config:
            raise ValueError(f"the config has no {key}")
        config = config[name]
    return config


def _steps(config: ml_collections.ConfigDict, key: str, value: Any, more: str = "") -> int:
    match = FORM.fullmatch(value) if isinstance(value, str) else None
    number = float(match[1]) if match else math.nan
    if match and match[2] == "epoch" and number < 2**31 / steps_per_epoch(config):  # steps are int32
        return round(number * steps_per_epoch(config))
    if match and match[2] != "epoch" and number < 2**31 and number == int(number):
        return int(number) // (config.data.batch_size if match[2] == "example" else 1)
    given = f'"{value}"' if isinstance(value, str) else repr(value)
    raise ValueError(f'{key} is {given}, but must be a duration with its unit: "500 steps", "10 epochs", "1000 examples"{more}')
