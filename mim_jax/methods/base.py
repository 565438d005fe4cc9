"""What a method is. Each `methods/<name>.py` has one subclass of `Method` and `make(config) -> Method`.

A method holds its paper: its views, its parameters, its loss. The augmentation, the step, the EMA teacher, sharding,
checkpoints, logging and evaluation are shared, and none of them knows which method it serves.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mim_jax import optim
from mim_jax.config import check
from mim_jax.data.augment import FLIP, Crops, Policy
from mim_jax.masking import NO_MASKS, Masks
from mim_jax.models import vit
from mim_jax.models.heads import LinearHead
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.views import Views

Params = dict[str, Any]  # part name -> pytree
Images = dict[str, jax.Array]  # caption -> normalised images [B, G, H, W, C]


class Network(Protocol):
    """A frozen network that makes the targets of others. It also has one of

        features(parts, images) -> {"cls": [B, D], "patch": [B, N, D]}, with `dim`, the number D,
        tokens(parts, images) -> int32 [B, N], with `codes`, the size of the vocabulary,

    for images [B, H, W, 3] in 0..1, patches row-major, of `stride` pixels a side. A method offers one by `Method.network`; any
    other object with these members is one, too. `learned.load_target` reads its parts from where `config.target` says.
    """

    def init_parts(self, key: jax.Array) -> Params:
        """Initial values of the parts that it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of training; a subclass states what it has beyond these defaults.

    Attributes:
        views: what the loss sees; every shape follows from it.
        target: the frozen network that the targets come from, if there is one.
        schedules: scalars that follow the step; all are logged. The step reads `momentum_teacher`, the loss the others.
            `make_method` adds those of `optim.schedules` that are missing.
        untrained: a regex over parameter paths that are never updated (they are saved, sharded and averaged as all others).
        teacher_parts: the parts of the parameters that have an EMA copy; () for a method without a teacher.
        teacher_first: whether the teacher follows the student before the loss (MoCo v3) or after the student's update (DINO).
        pictures: what can be drawn of it: of "attention", "features", "reconstruction" and "tokens".
        num_classes: of a classifier that it trains, see `class_scores`; 0: there is none.
        own_rates: whether `lr_scales` counts without layer-wise decay, too.
        encoder_part: the part of the parameters that `features` reads, and that another run can begin with.
        optimizer: made from the config by `make_method`.
    """

    views: Views
    target: Any = None  # Network
    schedules: Mapping[str, optim.Schedule] = dataclasses.field(default_factory=dict)
    untrained: str = ""
    teacher_parts: tuple[str, ...] = ()
    teacher_first: bool = False
    pictures: tuple[str, ...] = ()
    num_classes: int = 0
    own_rates: ClassVar[bool] = False
    encoder_part: ClassVar[str] = "backbone"
    optimizer: optax.GradientTransformationExtraArgs = optax.with_extra_args_support(optax.identity())

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """(params, extra): trained parameters by part, and state without gradient (centre, queue; or {})."""
        raise NotImplementedError

    def init_parts(self, key: jax.Array) -> Params:
        """The trained parameters by part: what another run's frozen target reads of this method."""
        return self.init(key)[0]

    def mix(self, views: Params, key: jax.Array) -> Params:
        """Changes finished views before the loss sees them: mixes images, or computes something once for each image."""
        return views

    def loss(
        self, params: Params, teacher: Params, target: Params, extra: Params, views: Params, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Params, dict[str, jax.Array]]]:
        """The paper: (loss, (new extra, metrics)). `target` are the parameters of `self.target`; views are finished."""
        raise NotImplementedError

    def after_update(self, state: Any) -> Any:
        """Changes the new `TrainState` of a step: what is refreshed every so many steps."""
        return state

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Normalised images [B, H, W, C] -> {"cls": [B, D], "patch": [B, N, D]}; for evaluators and users."""
        raise NotImplementedError

    def class_scores(self, params: Params, extra: Params, images: jax.Array) -> jax.Array:
        """Normalised images [B, H, W, C] -> the trained classifier's scores [B, num_classes]."""
        raise NotImplementedError

    def classifier(self, params: Params, extra: Params) -> LinearHead:
        """The trained classifier, for use elsewhere. Raises ValueError if there is none, or it sees several blocks."""
        raise ValueError(f"{type(self).__name__} has no classifier")

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        """The attention of the last block's CLS token, [B, heads, N] over the patches, row-major."""
        raise NotImplementedError

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        """What the model predicts of the global crops, by caption."""
        raise NotImplementedError

    def lr_scales(self, params: Params, decay: float, patch_embed: float) -> Params:
        """The factor of each parameter's learning rate under layer-wise decay; see `ViT.lr_scales`."""
        raise ValueError(f"optim.layer_decay={decay} and optim.patch_embed_lr={patch_embed} need a backbone: set both to 1")

    def network(self) -> Network:
        """The method's trained network, to make targets for others."""
        raise ValueError(f"{type(self).__name__} has no network that could make targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneMethod(Method):
    """A method whose `backbone` is a ViT or a Swin."""

    backbone: Any  # ViT | Swin
    pictures: tuple[str, ...] = ("attention",)

    def encoded(self, params: Params, crops: jax.Array, key: jax.Array | None = None, **options: Any) -> dict[str, jax.Array]:
        """The backbone's output for crops [B, G, H, W, C] of one size, see `ViT`; in training with a `key`, for stochastic
        depth. `options` are those of the backbone's call."""
        rngs, train = ({}, False) if key is None else ({"drop_path": key}, True)
        return self.backbone.apply({"params": params["backbone"]}, [crops], train=train, rngs=rngs, **options)[0]

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        return vit.features(self.backbone, params["backbone"], images)

    def attention(self, params: Params, images: jax.Array) -> jax.Array:
        return vit.last_attention(self.backbone, params["backbone"], images)[:, :, 0, 1 + self.backbone.registers :]

    def lr_scales(self, params: Params, decay: float, patch_embed: float) -> Params:
        other = {part: jax.tree.map(lambda _: 1.0, tree) for part, tree in params.items()}
        return other | {"backbone": self.backbone.lr_scales(params["backbone"], decay, patch_embed)}

    def network(self) -> Network:
        return Encoder(self.backbone, self.views.mean, self.views.std)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A trained backbone as a frozen network."""

    backbone: ViT | Swin
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]

    @property
    def dim(self) -> int:
        return self.backbone.dim

    @property
    def stride(self) -> int:
        return self.backbone.stride

    def init_parts(self, key: jax.Array) -> Params:
        image = jnp.zeros((1, 1, self.backbone.img_size, self.backbone.img_size, len(self.mean)))
        return {"backbone": self.backbone.init(key, [image])["params"]}

    def features(self, parts: Params, images: jax.Array) -> dict[str, jax.Array]:
        images = (images - jnp.array(self.mean)) / jnp.array(self.std)
        return vit.features(self.backbone, parts["backbone"], images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(Method):
    """A method whose model turns images into visual tokens. Its config sets data.mean to 0 and data.std to 1: its global crops
    are images in 0..1. One that can decode has "reconstruction" among its pictures.

    Attributes:
        codes: size of the vocabulary.
        stride: side, in pixels, of the square that a token stands for.

    `parts` below are those of `init_parts`.
    """

    codes: int
    stride: int

    pictures: tuple[str, ...] = ("reconstruction", "tokens")
    encoder_part: ClassVar[str] = "encoder"

    def init_parts(self, key: jax.Array) -> Params:
        """All that the model consists of: the two results of `init` together, as codes may be among `extra`."""
        params, extra = self.init(key)
        return params | extra

    def tokens(self, parts: Params, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in 0..1 -> int32 [B, N], row-major."""
        raise NotImplementedError

    def decode(self, parts: Params, tokens: jax.Array) -> jax.Array:
        """Tokens [B, N] of square images -> the decoded images [B, H, W, 3] in 0..1."""
        raise NotImplementedError

    def reconstruction(self, params: Params, extra: Params, target: Params, views: Params) -> Images:
        images, parts = views["global"], params | extra
        decoded = self.decode(parts, self.tokens(parts, images.reshape(-1, *images.shape[2:])))
        return {"decoded from its tokens": decoded.reshape(images.shape)}

    def network(self) -> Network:
        return self


def vit_settings(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the ViTs of all methods take from `config.model`."""
    names = ("patch_size", "img_size", "dim", "depth", "heads", "mlp_ratio", "drop_path_rate")
    return {name: model[name] for name in names} | {"dtype": jnp.dtype(model.dtype)} | loop_settings(model)


def loop_settings(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """How the loop over the blocks runs."""
    before = {"remat": "none", "microbatches": 1}  # of a run of 0.4, which has no such keys
    return {"unroll": model.unroll} | {name: model.get(name, value) for name, value in before.items()}


def make_views(config: ml_collections.ConfigDict, *crops: Crops, masks: Masks = NO_MASKS) -> Views:
    """Views with the normalisation of the config."""
    return Views(crops, tuple(config.data.mean), tuple(config.data.std), masks)


def global_views(config: ml_collections.ConfigDict, masks: Masks = NO_MASKS, policy: Policy = FLIP, **crops: Any) -> Views:
    """The views of masked image models and tokenizers: global crops of `model.img_size` pixels, by default only flipped."""
    c = config.crops
    policies = (policy,) * c.global_crops_number
    group = Crops("global", config.model.img_size, tuple(c.global_crops_scale), policies, **crops)
    return make_views(config, group, masks=masks)


def make_method(config: ml_collections.ConfigDict) -> Any:
    """The method that `config.method` names, with its optimizer. Raises ValueError for a config that `config.check` or the
    method refuses."""
    check(config)
    method = made(config)
    if config.get("continue_from") and not isinstance(method, BackboneMethod):
        raise ValueError(f"continue_from needs a method with a ViT or Swin, which {config.method} is not: use init_from")
    schedules = optim.schedules(config)
    optimizer = optim.make_optimizer(config, schedules, method)
    return dataclasses.replace(method, optimizer=optimizer, schedules={**schedules, **method.schedules})


def made(config: ml_collections.ConfigDict) -> Any:
    """What `mim_jax/methods/<config.method>.py` makes of a config."""
    try:
        module = importlib.import_module(f"mim_jax.methods.{config.method}")
    except ModuleNotFoundError as error:
        if error.name != f"mim_jax.methods.{config.method}":
            raise
        raise ValueError(f"config.method is {config.method!r}, but there is no mim_jax/methods/{config.method}.py") from None
    return module.make(config)


def make_target(config: ml_collections.ConfigDict, makes: str) -> Any:
    """The frozen network that `config.target` names: the network of a method, or what `mim_jax/models/<network>.py` makes of a
    config that has a key `network` and no `method`. Raises ValueError if it does not make what is wanted, "features" or
    "tokens"."""
    settings = config.target.network
    if "method" in settings:
        network = made(settings).network()
    else:
        network = importlib.import_module(f"mim_jax.models.{settings.network}").make(settings)
    if not hasattr(network, {"features": "dim", "tokens": "codes"}[makes]):
        raise ValueError(f"{config.method} learns from {makes}, which target.config={config.target.config} does not make")
    return network


def patch_features(network: Any, params: Params, crops: jax.Array) -> jax.Array:
    """A frozen network's features of the patches of crops [B, G, H, W, 3] in 0..1: [B, G, N, D], without gradient."""
    patch = network.features(params, crops.reshape(-1, *crops.shape[2:]))["patch"]
    return jax.lax.stop_gradient(patch.reshape(*crops.shape[:2], *patch.shape[1:]))
