"""Configs: a Python file with `get_config(variant)`, the same skeleton for every method."""

import runpy
from pathlib import Path

import ml_collections


def load_config(spec: str) -> ml_collections.ConfigDict:
    """The locked config of `"configs/dino.py"` or, with a variant, `"configs/dino.py:demo"`, as `--config` reads it.

    Raises FileNotFoundError for the file and ValueError, which names those that there are, for the variant.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    module = runpy.run_path(path)
    if variant and "VARIANTS" in module and variant not in module["VARIANTS"]:
        raise ValueError(f"{path} has no variant {variant!r}, only {', '.join(module['VARIANTS'])}")
    return (module["get_config"](variant) if variant else module["get_config"]()).lock()
