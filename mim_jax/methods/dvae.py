"""The discrete VAE (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A): an image as a grid of tokens.

A relaxed sample of each place's distribution over the vocabulary (Gumbel-softmax) is decoded; a KL term pulls the
distributions to the uniform one. `arch` "dalle" is DALL-E's own model, whose pixels follow a logit-Laplace distribution,
"beit" the small one of BEiT's code, with the squared error.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import durations, health, losses, optim
from mim_jax.methods.base import Params, Tokenizer, global_views
from mim_jax.models import dvae
from mim_jax.models.quantizers import gumbel_softmax


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The distribution of the pixels."""

    map_pixels: Callable[[jax.Array], jax.Array]  # images in 0..1 -> what the network sees
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (decoder's output, mapped pixels) -> mean over pixels and channels
    image: Callable[[jax.Array], jax.Array]  # decoder's output -> image in 0..1


LOGIT_LAPLACE = Likelihood(dvae.map_pixels, losses.logit_laplace_loss, dvae.dalle_pixels)
SQUARED_ERROR = Likelihood(
    lambda images: 2 * images - 1,
    lambda out, pixels: jnp.mean((out - pixels) ** 2),
    lambda out: jnp.clip((1 + out) / 2, 0, 1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dvae(Tokenizer):
    encoder: Any
    decoder: Any
    likelihood: Likelihood
    teacher_parts: tuple[str, ...] = ("encoder", "decoder")  # no teacher: the average of the weights is the tokenizer

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        encoder_key, decoder_key = jax.random.split(key)
        encoder = self.encoder.init(encoder_key, self.views.zeros()["global"][0, :1])
        decoder = self.decoder.init(decoder_key, jnp.zeros((1, 1, 1, self.codes)))
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, {}

    def loss(self, params, teacher, target, extra, views, key, step):
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

    def tokens(self, parts: Params, images: jax.Array) -> jax.Array:
        return self.logits(parts, images).argmax(-1).astype(jnp.int32).reshape(len(images), -1)

    def decode(self, parts: Params, tokens: jax.Array) -> jax.Array:
        side = math.isqrt(tokens.shape[-1])
        sample = jax.nn.one_hot(tokens.reshape(-1, side, side), self.codes)
        return self.likelihood.image(self.decoder.apply({"params": parts["decoder"]}, sample))

    def features(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Those of the distributions' logits."""
        logits = self.logits(params, images)
        patch = logits.reshape(len(logits), -1, self.codes)
        return {"cls": patch.mean(1), "patch": patch}


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
        views=global_views(config),
        schedules={
            "temperature": optim.cosine_schedule(1.0, o.temperature, durations.steps(config, "loss.temperature_decay")),
            "kl_weight": optim.cosine_schedule(0.0, o.kl_weight, durations.steps(config, "loss.kl_warmup")),
            "momentum_teacher": lambda step: jnp.asarray(config.optim.momentum_teacher),
        },
    )
