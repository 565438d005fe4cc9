"""Linear probing: linear classifiers of the frozen features of another run, many of them at once.

The protocols of MAE (CLS, batch normalisation, LARS), of DINO (CLS of the last blocks, SGD), and of DINOv2 and iBOT, which
choose the learning rate and the features among many that are trained over the same forward pass.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.methods.base import BackboneMethod, Params, global_views
from mim_jax.methods.supervised import classes, encoder
from mim_jax.models import vit
from mim_jax.models.heads import BatchNorm, LinearHead
from mim_jax.models.layers import param_dtype
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT

EPS = 1e-6  # of the batch normalisation
MEMORY = 0.99  # of the moving average of the held-out accuracy, a step


class Classifiers(nn.Module):
    """`count` linear classifiers of the same features: [B, D] -> [count, B, num_classes]."""

    num_classes: int
    count: int
    batch_norm: bool  # without scale and bias, before the classifiers (MAE)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.batch_norm:
            x = BatchNorm(eps=EPS, affine=False, name="bn")(x, train)
        shape = self.count, x.shape[-1], self.num_classes
        kernel = self.param("kernel", nn.initializers.normal(0.01), shape, x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (shape[0], shape[2]), x.dtype)
        return jnp.einsum("bd,rdk->rbk", x, kernel) + bias[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(BackboneMethod):
    """Heads are a classifier for each kind of features, and of each kind one for each of the `rates`.

    Attributes:
        kinds: (last blocks whose CLS tokens are concatenated, whether the mean of the patch tokens follows them).
        rates: factors of the learning rate.
        held_out: of so many images one is not learned from. A moving average of each head's accuracy on these is kept in
            `extra`, and the best head is the method's classifier; 0: all images are learned from, and there is one head.
    """

    backbone: ViT | Swin
    classifiers: Classifiers
    kinds: tuple[tuple[int, bool], ...]
    rates: tuple[float, ...]
    held_out: int
    untrained: str = r"^backbone/"
    own_rates: ClassVar[bool] = True

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        backbone_key, *keys = jax.random.split(key, 1 + len(self.kinds))
        image = self.views.zeros()["global"]
        backbone = self.backbone.init(backbone_key, [image])["params"]
        inputs = self.inputs({"backbone": backbone}, image[:, 0])
        made = {name: self.classifiers.init(key, inputs[name]) for name, key in zip(inputs, keys)}
        stats = {name: one["batch_stats"] for name, one in made.items() if "batch_stats" in one}
        heads = {name: one["params"] for name, one in made.items()}
        extra = {"batch_stats": stats, "held_out_accuracy": jnp.zeros(len(self.names))}
        return {"backbone": backbone, "head": {"heads": heads}}, extra

    @property
    def names(self) -> tuple[str, ...]:
        """Of the heads, in the order of `scores`."""
        return tuple(f"{kind_name(*kind)}_{rate:g}" for kind in self.kinds for rate in self.rates)

    def inputs(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Images [B, H, W, C] -> the features of each kind [B, D * (blocks + mean)], at least float32, without gradient."""
        frozen, blocks = jax.lax.stop_gradient(params["backbone"]), max(blocks for blocks, _ in self.kinds)
        if blocks == 1:
            out = vit.features(self.backbone, frozen, images)
            cls, patch = out["cls"][None], out["patch"]
        else:
            tokens = vit.intermediate_layers(self.backbone, frozen, images, blocks)
            cls, patch = tokens[:, :, 0], tokens[-1][:, 1 + self.backbone.registers :]
        found = {}
        for number, mean in self.kinds:
            parts = [*cls[-number:], *([patch.mean(1)] if mean else [])]
            found[kind_name(number, mean)] = jnp.concatenate(parts, axis=-1).astype(param_dtype(cls.dtype))
        return found

    def scores(self, params: Params, stats: Params, images: jax.Array, train: bool = False) -> tuple[jax.Array, Params]:
        """(scores of all heads [heads, B, num_classes], new running statistics of batch normalisation, if any)"""
        found, after = [], Params()
        for name, inputs in self.inputs(params, images).items():
            variables = {"params": params["head"]["heads"][name]} | ({"batch_stats": stats[name]} if name in stats else {})
            scores, updates = self.classifiers.apply(variables, inputs, train, mutable="batch_stats")
            found.append(scores)
            after |= {name: updates["batch_stats"]} if name in stats else {}
        return jnp.concatenate(found), after

    def loss(self, params, teacher, target, extra, views, key, step):
        scores, stats = self.scores(params, extra["batch_stats"], views["global"][:, 0], train=True)
        labels = views["label"]
        learned = (views["index"] % self.held_out != 0) if self.held_out else jnp.ones(labels.shape, bool)
        cross_entropy = -jnp.sum(jax.nn.one_hot(labels, self.num_classes) * jax.nn.log_softmax(scores), axis=-1)
        losses = jnp.sum(cross_entropy * learned, axis=1) / jnp.maximum(learned.sum(), 1)
        right, accuracy = scores.argmax(-1) == labels, extra["held_out_accuracy"]
        metrics = {"train/accuracy": jnp.max(jnp.sum(right & learned, axis=1) / jnp.maximum(learned.sum(), 1))}
        if self.held_out:
            new = jnp.sum(right & ~learned, axis=1) / jnp.maximum(jnp.sum(~learned), 1)
            accuracy = jnp.where(learned.all(), accuracy, MEMORY * accuracy + (1 - MEMORY) * new).astype(accuracy.dtype)
            metrics |= {f"train/held_out_{name}": one for name, one in zip(self.names, accuracy)}
        return jnp.sum(losses), ({"batch_stats": stats, "held_out_accuracy": accuracy}, metrics)

    def class_scores(self, params: Params, extra: Params, images: jax.Array) -> jax.Array:
        """Those of the best head on the held-out images."""
        scores, _ = self.scores(params, extra["batch_stats"], images)
        return scores[jnp.argmax(extra["held_out_accuracy"])]

    def classifier(self, params: Params, extra: Params) -> LinearHead:
        """The best one on the held-out images, with its batch normalisation in its linear layer."""
        kind, place = divmod(int(jnp.argmax(extra["held_out_accuracy"])), len(self.rates))
        blocks, mean = self.kinds[kind]
        if blocks > 1:
            raise ValueError(f"the best classifier sees the last {blocks} blocks: elsewhere it could see one")
        name, has_cls = kind_name(blocks, mean), isinstance(self.backbone, ViT) and self.backbone.cls
        kernel, bias = (params["head"]["heads"][name][each][place] for each in ("kernel", "bias"))
        if name in extra["batch_stats"]:
            stats = extra["batch_stats"][name]["bn"]
            scale = jax.lax.rsqrt(stats["var"] + EPS)
            kernel, bias = scale[:, None] * kernel, bias - (stats["mean"] * scale) @ kernel
        pool = "cls+mean" if mean else "cls" if has_cls else "mean"
        return LinearHead(pool, {}, {"kernel": kernel, "bias": bias})

    def lr_scales(self, params: Params, decay: float, patch_embed: float) -> Params:
        rates = jnp.array(self.rates)
        heads = jax.tree.map(lambda leaf: rates.reshape(-1, *[1] * (leaf.ndim - 1)), params["head"])
        return {"backbone": jax.tree.map(lambda _: 0.0, params["backbone"]), "head": heads}


def kind_name(blocks: int, mean: bool) -> str:
    return f"last{blocks}" + "_mean" * mean


def make(config: ml_collections.ConfigDict) -> Linear:
    """Raises ValueError for images without labels, for more blocks than the encoder has, and for a `config.probe` without
    heads, with a head twice, or with several that nothing chooses among."""
    p, backbone = config.probe, encoder(config)
    for key in ("blocks", "mean_patch", "rates"):
        if not p[key] or len(set(p[key])) < len(p[key]):
            raise ValueError(f"probe.{key} is {tuple(p[key])}, but must have values, each once")
    if p.held_out == 1:
        raise ValueError("probe.held_out is 1: no image would be learned from; 10 holds out one of ten, 0 none")
    if not p.held_out and (heads := len(p.blocks) * len(p.mean_patch) * len(p.rates)) > 1:
        raise ValueError(f"probe.held_out is 0: images that are not learned from must choose among {heads} heads, such as 10")
    kinds = tuple((blocks, mean) for blocks in p.blocks for mean in p.mean_patch)
    if max(p.blocks) > (1 if isinstance(backbone, Swin) else backbone.depth):
        raise ValueError(f"probe.blocks is {p.blocks}, but of this encoder at most {getattr(backbone, 'depth', 1)} can be used")
    count = classes(config)
    return Linear(
        views=global_views(config, interpolation=config.crops.interpolation),
        backbone=backbone,
        classifiers=Classifiers(count, len(p.rates), p.batch_norm),
        num_classes=count,
        kinds=kinds,
        rates=tuple(p.rates),
        held_out=p.held_out,
        pictures=("attention",) if isinstance(backbone, ViT) else (),
    )
