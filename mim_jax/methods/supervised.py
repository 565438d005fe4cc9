"""Supervised training of a classifier: from scratch (DeiT, Touvron et al. 2021; the baseline of MAE), or fine-tuning of what
another run has learned, as MAE, BEiT, SimMIM and iBOT do it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.config import begins_with
from mim_jax.data import mixing
from mim_jax.data.rand_augment import rand_augment
from mim_jax.methods.base import BackboneMethod, Params, global_views, loop_settings, made, vit_settings
from mim_jax.models.heads import Classifier, LinearHead
from mim_jax.models.layers import LayerNorm, param_dtype
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(BackboneMethod):
    backbone: ViT | Swin
    head: Classifier
    pool: str  # "cls", or "mean": of the patch tokens
    label_smoothing: float
    magnitude: float  # of RandAugment; 0: none
    erasing: float
    mixup: float
    cutmix: float

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, head_key = jax.random.split(key)
        out, backbone = self.backbone.init_with_output(backbone_key, [self.views.zeros()["global"]])
        head = self.head.init(head_key, self.pooled(out[0]))
        return {"backbone": backbone["params"], "head": head["params"]}, {}

    def mix(self, views: Params, key: jax.Array) -> Params:
        """RandAugment, random erasing, smoothing of the labels, mixup or cutmix; "target_label" [B, K] takes the place of the
        labels."""
        augment_key, erasing_key, mixing_key = jax.random.split(key, 3)
        images, targets = views["global"][:, 0], self.targets(views)
        if self.magnitude:
            levels = rand_augment(self.views.denormalize(images), self.magnitude, augment_key)
            images = ((levels / 255 - jnp.array(self.views.mean)) / jnp.array(self.views.std)).astype(images.dtype)
        if self.erasing:
            images = mixing.erase(images, self.erasing, erasing_key)
        if self.mixup or self.cutmix:
            images, targets = mixing.mix(images, targets, self.mixup, self.cutmix, mixing_key)
        rest = {name: view for name, view in views.items() if name != "label"}
        return rest | {"global": images[:, None], "target_label": targets}

    def targets(self, views: Params) -> jax.Array:
        """The probabilities of the classes that the loss wants, [B, num_classes]."""
        if "target_label" in views:
            return views["target_label"]
        sure = jax.nn.one_hot(views["label"], self.num_classes, dtype=views["global"].dtype)
        return (1 - self.label_smoothing) * sure + self.label_smoothing / self.num_classes

    def loss(self, params, teacher, target, extra, views, key, step):
        out = self.encoded(params, views["global"], key)
        logits, targets = self.logits(params, out), self.targets(views)
        loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))
        right = jnp.mean(logits.argmax(-1) == targets.argmax(-1), dtype=loss.dtype)
        return loss, (extra, {"train/accuracy": right})

    def pooled(self, out: dict[str, jax.Array]) -> jax.Array:
        """The backbone's output for one crop of each image -> [B, D]."""
        return out["patch"][:, 0].mean(1) if self.pool == "mean" else out["cls"][:, 0]

    def logits(self, params: Params, out: dict[str, jax.Array]) -> jax.Array:
        """The backbone's output for one crop of each image -> [B, num_classes], at least float32."""
        logits = self.head.apply({"params": params["head"]}, self.pooled(out))
        return logits.astype(param_dtype(logits.dtype))

    def class_scores(self, params: Params, extra: Params, images: jax.Array) -> jax.Array:
        return self.logits(params, self.encoded(params, images[:, None]))

    def classifier(self, params: Params, extra: Params) -> LinearHead:
        return LinearHead(self.pool, params["head"].get("fc_norm", {}), params["head"]["linear"])

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """As of other methods, but "cls" is what the linear layer sees, [B, D]: after mean pooling and its norm, if so."""
        out = self.encoded(params, images[:, None])
        pooled = self.pooled(out)
        if self.head.norm:
            pooled = LayerNorm(self.head.dtype).apply({"params": params["head"]["fc_norm"]}, pooled)
        return {"cls": pooled, "patch": out["patch"][:, 0]}


def make(config: ml_collections.ConfigDict) -> Supervised:
    """Raises ValueError for images without labels, a Swin's CLS token, and an odd batch that is to be mixed."""
    m, a, data = config.model, config.augment, config.data
    backbone = encoder(config)
    of_norm = "layer" if m.pool == "mean" and isinstance(backbone, ViT) else ""  # a Swin's own norm is before the mean
    if isinstance(backbone, ViT):
        if backbone.pos == "relative":
            backbone = backbone.clone(pos="relative_each")
        elif config.encoder and backbone.pos.startswith("sincos"):
            backbone = backbone.clone(pos="learned", pos_offset=0.0)
        backbone = backbone.clone(final_norm=m.pool == "cls")
    elif m.pool == "cls":
        raise ValueError('model.pool is "cls", but a Swin has no CLS token: set it to "mean"')
    if (a.mixup or a.cutmix) and data.batch_size % 2:
        raise ValueError(f"data.batch_size is {data.batch_size}, but must be even: images are mixed in pairs")
    averaged = config.optim.momentum_teacher > 0
    return Supervised(
        views=global_views(config),
        backbone=backbone,
        head=Classifier(classes(config), of_norm, dtype=jnp.dtype(m.dtype)),
        pool=m.pool,
        num_classes=data.num_classes,
        label_smoothing=config.loss.label_smoothing,
        magnitude=a.magnitude,
        erasing=a.erasing,
        mixup=a.mixup,
        cutmix=a.cutmix,
        teacher_parts=("backbone", "head") if averaged else (),
        pictures=("attention",) if isinstance(backbone, ViT) else (),
    )


def classes(config: ml_collections.ConfigDict) -> int:
    """The number of classes. Raises ValueError for images without labels, and for several views of an image."""
    if (views := config.crops.global_crops_number) != 1:
        raise ValueError(f"crops.global_crops_number is {views}, but {config.method} learns from one view of an image")
    if not config.data.num_classes:
        raise ValueError(f"{config.method} learns from labels, but the images of {config.data.name} have none")
    return config.data.num_classes


def encoder(config: ml_collections.ConfigDict) -> ViT | Swin:
    """The backbone of the run that `config.encoder` is of, without mask token, at the image size, drop-path rate and dtype of
    `config.model`; without such a run a ViT by `config.model`. Raises ValueError for a run without a backbone."""
    m = config.model
    if not config.encoder:
        xavier = jax.nn.initializers.xavier_uniform()  # as MAE's: it suits networks of any width
        return ViT(**vit_settings(m), pos=m.pos, layerscale=m.layerscale, kernel_init=xavier, patch_init=xavier)
    backbone = getattr(made(config.encoder), "backbone", None)
    if not isinstance(backbone, (ViT, Swin)):
        raise ValueError(f"{begins_with(config)} is a run of {config.encoder.method}, which has no ViT or Swin backbone")
    now = {name: m[name] for name in ("img_size", "drop_path_rate")} | {"dtype": jnp.dtype(m.dtype)} | loop_settings(m)
    of_pretraining = {"drop_path_group": 0, "patch_grad": 1.0} if isinstance(backbone, ViT) else {}
    return backbone.clone(**now, **of_pretraining, mask_token=False)
