"""An encoder from a file of weights (`mim_jax.layouts`): others begin with it, probe it or learn from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections

from mim_jax.methods.base import BackboneMethod, make_views
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(BackboneMethod):
    pictures: tuple[str, ...] = ()


def backbone(settings: dict[str, Any]) -> ViT | Swin:
    """From the settings of a `ViT`, or of a `Swin`, which has several `depths`."""
    return (Swin if "depths" in settings else ViT)(**settings)


def make(config: ml_collections.ConfigDict) -> Imported:
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.model.items()}
    return Imported(views=make_views(config), backbone=backbone(settings | {"dtype": jnp.float32}))
