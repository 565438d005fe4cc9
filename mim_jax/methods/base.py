"""What a method is. Each `methods/<name>.py` has one frozen dataclass with these members and `make(config) -> Method`.

A method holds its paper: which views it needs, its parameters, its loss. The augmentation, optimizer, EMA teacher,
sharding, checkpoints, logging and evaluation are shared, and none of them knows which method it serves.

`views` has one layout for all methods, with the keys that the method declared. B, the batch, is always axis 0 and the
only sharded axis:

    global [B, G, H, W, C] float, local [B, L, h, w, C] float, label [B] int32, index [B] int32,
    mask [B, G, N] bool, True where masked, patches of the global crops row-major,
    target [B, G, H', W', C] float in 0..1, the same crops as a tokenizer or teacher is to see them
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.config import load_config
from mim_jax.data.augment import Crops, augment
from mim_jax.masking import Mask
from mim_jax.optim import Schedule

Params = dict[str, Any]  # part name -> pytree


class Method(Protocol):
    @property
    def crops(self) -> tuple[Crops, ...]:
        """The crops that the device makes of each image. Fixes every static shape."""

    @property
    def mask(self) -> Mask | None:
        """How the patches of the global crops are masked; None for a method without."""

    @property
    def teacher_parts(self) -> tuple[str, ...]:
        """The parts of the parameters that have an EMA copy; () for a method without a teacher."""

    @property
    def fixed(self) -> str:
        """A regex over parameter paths that are never trained (they are saved, shaped and averaged as all others)."""

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The scalars that follow the step; all are logged. The step reads `momentum_teacher`, the loss the others."""

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """(params, extra): trained parameters by part, and the state that gets no gradient (centre, queue; or {})."""

    def frozen(self, key: jax.Array) -> Params:
        """The fixed network that makes the targets, as that part of its own run's state which it needs, under the state's
        names (`{"params": ..., "extra": ...}`); {} for most. Here are first values: `mim_jax.target` loads learned ones."""

    def loss(
        self, params: Params, teacher: Params, frozen: Params, extra: Params, views: Params, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Params, dict[str, jax.Array]]]:
        """The paper: (loss, (new extra, metrics)). Views are finished: nothing is augmented or masked in here."""

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Normalised images [B, H, W, C] -> {"cls": [B, D], "patch": [B, N, D]}; for evaluators and users."""

    @property
    def pictures(self) -> tuple[str, ...]:
        """What can be drawn of this method: names of the members below that it has."""

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        """What the CLS token of the last block attends to: [B, heads, N] over the patches, row-major."""

    def reconstruction(self, params: Params, extra: Params, frozen: Params, views: Params) -> dict[str, jax.Array]:
        """What the model paints of the global crops, under captions: normalised pixels, [B, G, H, W, C] each."""


class Tokenizer(Method, Protocol):
    """A method whose model turns images into visual tokens, the targets of others. Its configs set data.mean to 0 and
    data.std to 1: its global crops are images in 0..1. One that paints has `reconstruction` among its pictures."""

    @property
    def codes(self) -> int:
        """The size of the vocabulary."""

    @property
    def stride(self) -> int:
        """Pixels that a token stands for, a side."""

    def tokens(self, params: Params, extra: Params, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in 0..1 -> int32 [B, N], row-major."""

    def decode(self, params: Params, extra: Params, tokens: jax.Array) -> jax.Array:
        """Tokens [B, N] of square images -> what is painted of them, [B, H, W, 3] in 0..1."""


AUGMENT, LOSS, MASK = range(3)  # streams of randomness; each is a function of (seed, step, stream) and the example's index


def make_views(method: Any, batch: Params, key: jax.Array, data: ml_collections.ConfigDict) -> Params:
    """A host batch -> the views that `method` declares. `data`: the config's section. See `augment` for the batch."""
    views = augment(batch, method.crops, jax.random.fold_in(key, AUGMENT), data.mean, data.std)
    if method.mask and not method.mask.on_host:
        crops = len(method.crops[0].policies)
        views["mask"] = method.mask.draw(jax.random.fold_in(key, MASK), batch["index"], crops)
    return views


def vit_settings(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """What all methods' ViTs take from `config.model`."""
    names = ("patch_size", "img_size", "dim", "depth", "heads", "mlp_ratio", "drop_path_rate", "unroll")
    return {name: model[name] for name in names} | {"dtype": jnp.dtype(model.dtype)}


def learned_section(method: Any) -> str:
    """Where a state has what a method has learned for others to use: in the average of the parameters, if there is one."""
    return "teacher" if method.teacher_parts else "params"


def make_method(config: ml_collections.ConfigDict) -> Any:
    """The method that `config.method` names. Raises ValueError if there is no such file."""
    try:
        module = importlib.import_module(f"mim_jax.methods.{config.method}")
    except ModuleNotFoundError as error:
        if error.name != f"mim_jax.methods.{config.method}":
            raise
        raise ValueError(f"config.method is {config.method!r}, but there is no mim_jax/methods/{config.method}.py") from None
    return module.make(config)


def target_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the network that `config.target` names: what its run had, where there is one, else its file's."""
    saved = Path(config.target.workdir or "") / "config.json"
    if config.target.workdir and saved.is_file():
        return ml_collections.ConfigDict(json.loads(saved.read_text())).lock()
    return load_config(config.target.config)
