"""The discrete VAE (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A): an image as a grid of tokens.

A relaxed sample of each place's distribution over the vocabulary (Gumbel-softmax) is painted; the distributions are held to
the uniform one. `arch` "dalle" is DALL-E's own, whose pixels follow a logit-Laplace distribution, "beit" the small one of
BEiT's code, with the squared error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import health, losses, optim
from mim_jax.data.augment import FLIP, Crops
from mim_jax.masking import Mask
from mim_jax.methods.base import Params
from mim_jax.models import dvae
from mim_jax.models.quantizers import gumbel_softmax


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What the pixels follow: the map of images in 0..1 that the network sees, the loss of what the decoder gives, and the
    image that this stands for."""

    map_pixels: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (decoder's output, mapped pixels) -> mean over pixels and channels
    paint: Callable[[jax.Array], jax.Array]


LOGIT_LAPLACE = Likelihood(dvae.map_pixels, losses.logit_laplace_loss, dvae.dalle_pixels)
SQUARED_ERROR = Likelihood(
    lambda images: 2 * images - 1,
    lambda out, pixels: jnp.mean((out - pixels) ** 2),
    lambda out: jnp.clip((1 + out) / 2, 0, 1),
)


@dataclasses.dataclass(frozen=True)
class Dvae:
    encoder: Any
    decoder: Any
    codes: int
    stride: int
    likelihood: Likelihood
    crops: tuple[Crops, ...]
    schedules: Mapping[str, optim.Schedule]
    mask: Mask | None = None
    fixed: str = ""
    teacher_parts: tuple[str, ...] = ("encoder", "decoder")  # no teacher: the average of the weights is the tokenizer
    pictures: tuple[str, ...] = ("reconstruction", "tokens")

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        encoder_key, decoder_key = jax.random.split(key)
        encoder = self.encoder.init(encoder_key, jnp.zeros((1, self.crops[0].size, self.crops[0].size, 3)))
        decoder = self.decoder.init(decoder_key, jnp.zeros((1, 1, 1, self.codes)))
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, {}

    def frozen(self, key: jax.Array) -> Params:
        return {}

    def loss(self, params, teacher, frozen, extra, views, key, step):
        """The likelihood's loss, a mean over pixels and channels, and the divergence, a mean over the places of a grid: in
        DALL-E's units, nats per image divided by its values, `kl_weight` is beta * places / values (beta / 192 there)."""
        images = views["global"].reshape(-1, *views["global"].shape[2:])
        logits = self.logits(params, images)
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        sample = gumbel_softmax(logits, noise, self.schedules["temperature"](step))
        out = self.decoder.apply({"params": params["decoder"]}, sample)
        error = self.likelihood.loss(out, self.likelihood.map_pixels(images))
        divergence = losses.kl_to_uniform(logits).mean()
        used = jnp.bincount(logits.argmax(-1).reshape(-1), length=self.codes)
        figures = {"train/reconstruction": error, "train/kl": divergence, **health.codebook_figures(used)}
        return error + self.schedules["kl_weight"](step) * divergence, (extra, figures)

    def logits(self, params: Params, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in 0..1 -> [B, h, w, codes]."""
        return self.encoder.apply({"params": params["encoder"]}, self.likelihood.map_pixels(images))

    def tokens(self, params: Params, extra: Params, images: jax.Array) -> jax.Array:
        return self.logits(params, images).argmax(-1).astype(jnp.int32).reshape(len(images), -1)

    def decode(self, params: Params, extra: Params, tokens: jax.Array) -> jax.Array:
        side = round(tokens.shape[-1] ** 0.5)
        sample = jax.nn.one_hot(tokens.reshape(-1, side, side), self.codes)
        return self.likelihood.paint(self.decoder.apply({"params": params["decoder"]}, sample))

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Those of the distributions' logits."""
        logits = self.logits(params, images)
        patch = logits.reshape(len(logits), -1, self.codes)
        return {"cls": patch.mean(1), "patch": patch}

    def reconstruction(self, params: Params, extra: Params, frozen: Params, views: Params) -> dict[str, jax.Array]:
        images = views["global"]
        painted = self.decode(params, extra, self.tokens(params, extra, images.reshape(-1, *images.shape[2:])))
        return {"from its tokens": painted.reshape(images.shape)}


def make(config: ml_collections.ConfigDict) -> Dvae:
    m, o, c, dtype = config.model, config.loss, config.crops, jnp.dtype(config.model.dtype)
    if m.arch == "dalle":
        encoder: Any = dvae.DalleEncoder(m.codes, m.hidden, dtype=dtype)
        decoder: Any = dvae.DalleDecoder(m.codebook_dim, m.hidden, dtype=dtype)
        stride, likelihood = 8, LOGIT_LAPLACE
    elif m.arch == "beit":
        encoder = dvae.DvaeEncoder(m.codes, m.hidden, m.layers, dtype)
        decoder = dvae.DvaeDecoder(m.codebook_dim, m.hidden, m.layers, dtype)
        stride, likelihood = 2**m.layers, SQUARED_ERROR
    else:
        raise ValueError(f'model.arch is {m.arch!r}, but must be "dalle" or "beit"')
    if m.img_size % stride:
        raise ValueError(f"tokens of {stride} pixels do not fill an image of model.img_size={m.img_size}")
    return Dvae(
        encoder=encoder,
        decoder=decoder,
        codes=m.codes,
        stride=stride,
        likelihood=likelihood,
        crops=(Crops("global", m.img_size, tuple(c.global_crops_scale), (FLIP,) * c.global_crops_number),),
        schedules={
            "temperature": optim.cosine_schedule(1.0, o.temperature, optim.duration(config, o, "temperature")),
            "kl_weight": optim.cosine_schedule(0.0, o.kl_weight, optim.duration(config, o, "kl")),
            "momentum_teacher": lambda step: jnp.asarray(config.optim.momentum_teacher),
        },
    )
