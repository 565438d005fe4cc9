"""The papers' losses and targets as pure functions of the global batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mim_jax.sharding import replicate


def dino_teacher(logits: jax.Array, center: jax.Array, temp: jax.Array) -> jax.Array:
    """The teacher's probabilities, centred and sharpened, without gradient: [B, G, K] -> [B, G, K] (DINO, section 3.1)."""
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temp))


def dino_loss(student_log_probs: jax.Array, teacher_probs: jax.Array) -> jax.Array:
    """The mean cross-entropy over all pairs of a teacher crop and another student crop (DINO, equation 3).

    student_log_probs [B, V, K] are of all crops, the G global ones first; teacher_probs [B, G, K].
    """
    cross_entropy = -jnp.einsum("bgk,bvk->gv", teacher_probs, student_log_probs) / len(teacher_probs)
    n_global, n_crops = cross_entropy.shape
    others = 1 - jnp.eye(n_global, n_crops, dtype=cross_entropy.dtype)
    return jnp.sum(cross_entropy * others) / jnp.sum(others)


def update_center(center: jax.Array, teacher_logits: jax.Array, momentum: float) -> jax.Array:
    """The moving average [1, K] of the teacher's mean logits over images and global crops (DINO, equation 4)."""
    mean = teacher_logits.reshape(-1, center.shape[-1]).mean(0, keepdims=True)
    return momentum * center + (1 - momentum) * jax.lax.stop_gradient(mean)


def patch_loss(student_log_probs: jax.Array, teacher_probs: jax.Array, weight: jax.Array, crops: int) -> jax.Array:
    """The cross-entropy of masked patches between student and teacher, a mean over crops (iBOT, equation 2).

    Args:
        student_log_probs, teacher_probs: [..., K].
        weight: [...], 0 for patches that are not masked. For masked ones 1 (the paper's sum over the patches of a crop), or one
            over their number in the crop (the official codes' mean).
        crops: the number of global crops in the batch, including those without masked patches.
    """
    cross_entropy = -jnp.einsum("...k,...k->...", teacher_probs, student_log_probs)
    return jnp.sum(cross_entropy * weight) / crops


def sinkhorn_knopp(logits: jax.Array, temp: jax.Array, weight: jax.Array | None = None, iterations: int = 3) -> jax.Array:
    """Targets that use all prototypes equally: logits [..., K] -> probabilities [..., K] without gradient, at least float32.

    All rows of the batch are balanced together; `weight` [...] is 0 for padding rows. Source: SwAV; DINOv2, section 4.
    """
    weight = jnp.ones(logits.shape[:-1]) if weight is None else weight
    bias = sinkhorn_bias(lambda rows: rows, logits[None], weight[None], temp, iterations)
    return jax.lax.stop_gradient(jax.nn.softmax(logits / temp + bias)) * (weight > 0)[..., None]


def sinkhorn_bias(
    logits_of: Callable[[Any], jax.Array],
    pieces: Any,
    weight: jax.Array,
    temp: jax.Array,
    iterations: int = 3,
    unroll: int = 1,
) -> jax.Array:
    """What Sinkhorn-Knopp adds to the logits of each prototype: the balanced targets are softmax(logits / temp + bias).

    The batch comes in pieces, so that not all its logits need be in memory at once: `logits_of` maps a piece, which is a slice
    of `pieces` along the first axis, to logits [..., K]; `weight` [pieces, ...] is 0 for padding rows. An iteration of the loop
    over the pieces has `unroll` of them. Returns [K].
    """
    shape = jax.eval_shape(logits_of, jax.tree.map(lambda x: x[0], pieces))
    dtype = jnp.promote_types(jnp.float32, shape.dtype)

    def log_sums(bias: jax.Array | None) -> jax.Array:
        """The logarithm of each prototype's sum over all rows: of exp(logits / temp), or of the rows' probabilities."""

        def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
            rows, weight = piece
            x = logits_of(rows).reshape(-1, shape.shape[-1]).astype(dtype) / temp
            x = x if bias is None else jax.nn.log_softmax(x + bias)
            x = jnp.where(weight.reshape(-1, 1) > 0, x, -jnp.inf)
            return jnp.logaddexp(total, jax.nn.logsumexp(x, axis=0)), None

        total, _ = jax.lax.scan(add, jnp.full(shape.shape[-1], -jnp.inf, dtype), (pieces, weight), unroll=unroll)
        return jnp.where(jnp.isfinite(total), total, 0)  # not finite: all rows are padding

    bias = -log_sums(None)
    for _ in range(iterations - 1):
        bias -= log_sums(bias)
    return jax.lax.stop_gradient(bias)


def koleo(features: jax.Array, group_size: int, eps: float = 1e-8) -> jax.Array:
    """The KoLeo regulariser, which spreads features [B, D] (DINOv2, section 4; Sablayrolles et al. 2019).

    The mean of -log of the distance of normalised features to their nearest neighbour. Neighbours are looked for in groups of
    `group_size` consecutive features: in the official code those of one GPU.
    """
    x = features.astype(jnp.promote_types(jnp.float32, features.dtype)).reshape(-1, group_size, features.shape[-1])
    x = x / jnp.maximum(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps**2)), eps)
    products = jnp.einsum("gad,gbd->gab", x, x, precision="highest")
    nearest = jnp.argmax(jnp.where(jnp.eye(group_size, dtype=bool), -1.0, products), axis=-1)
    neighbor = jnp.take_along_axis(x, nearest[..., None], axis=1)
    distance = jnp.sqrt(jnp.sum((x - neighbor + eps) ** 2, axis=-1))
    return -jnp.mean(jnp.log(distance + eps))


def normalized_patches(patches: jax.Array, eps: float = 1e-6) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised patches, mean, std), each patch [..., P] by itself (MAE, section 3.3).

    The variance is unbiased, and eps is added to it, as in the official code.
    """
    mean = patches.mean(-1, keepdims=True)
    std = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + eps)
    return (patches - mean) / std, mean, std


def mae_loss(pred: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean squared error of masked patches: pred and target [..., N, P], mask bool [..., N] (MAE, section 3.3)."""
    error = jnp.mean((pred - target) ** 2, axis=-1)
    return jnp.sum(error * mask) / jnp.sum(mask)


def simmim_loss(pred: jax.Array, target: jax.Array, mask: jax.Array, channels: int = 3) -> jax.Array:
    """The mean absolute error of masked pixels: pred and target [..., N, P], mask bool [..., N] (SimMIM, equation 1).

    1e-5 is added to the number of masked pixels, as in the official code.
    """
    error = jnp.sum(jnp.abs(pred - target) * mask[..., None])
    return error / (jnp.sum(mask) * (pred.shape[-1] // channels) + 1e-5) / channels


def locally_normalized(images: jax.Array, window: int, eps: float = 1e-6) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised images, mean, std) by the mean and std of a square window around each pixel; images [..., H, W, C].

    The side `window` is odd; pixels outside the image are left out; channels are independent. The variance is unbiased and at
    least 0, and eps is added to it. Source: the normalised targets of SimMIM's later code.
    """
    near = [jnp.abs(jnp.subtract.outer(jnp.arange(n), jnp.arange(n))) <= window // 2 for n in images.shape[-3:-1]]
    rows, columns = (n.astype(images.dtype) for n in near)
    count = (rows.sum(1)[:, None] * columns.sum(1))[..., None]

    def local_mean(x: jax.Array) -> jax.Array:
        return jnp.einsum("rh,cw,...hwd->...rcd", rows, columns, x, precision="highest") / count

    mean = local_mean(images)
    variance = (local_mean(images**2) - mean**2) * count / (count - 1)
    std = jnp.sqrt(jnp.maximum(variance, 0) + eps)
    return (images - mean) / std, mean, std


def masked_cross_entropy(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean cross-entropy over all positions with `weight` True: logits [..., K], targets int and weight [...].

    A mean over the masked patches of the batch, so an image with more of them weighs more (BEiT, equation 2).
    """
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weight) / jnp.sum(weight)


def cosine_distance(pred: jax.Array, target: jax.Array, weight: jax.Array | None = None, eps: float = 1e-12) -> jax.Array:
    """One minus the mean cosine similarity of vectors [..., D], of those with `weight` [...] True (BEiT v2, equation 2)."""
    products = jnp.sum(pred * target, axis=-1)
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), eps**2)) for x in (pred, target)]
    return 1 - jnp.average(products / (lengths[0] * lengths[1]), weights=weight)


def info_nce(queries: jax.Array, keys: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(loss, share of queries whose own key is the nearest) of queries and keys [B, D], row i of which are of one image.

    The mean cross-entropy of finding a query's own key among the B keys by their cosine, times twice the temperature (MoCo v3,
    equation 1 and algorithm 1). Keys have no gradient.
    """
    keys = jax.lax.stop_gradient(keys)
    q, k = (x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24)) for x in (queries, keys))
    logits = jnp.matmul(q, replicate(k).T, precision="highest") / temperature
    own = jnp.sum(q * k, axis=-1) / temperature
    loss = 2 * temperature * jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)
    return loss, jnp.mean(logits.argmax(-1) == jnp.arange(len(logits)), dtype=loss.dtype)


def commitment_loss(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The mean squared error between vectors and their codes, [..., D]; only z gets a gradient (VQ-VAE, equation 3)."""
    return jnp.mean((z - jax.lax.stop_gradient(codes)) ** 2)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || uniform) over the last axis, in nats: [..., K] -> [...] (DALL-E, section 2.1)."""
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) + math.log(logits.shape[-1])


def logit_laplace_loss(stats: jax.Array, pixels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood, in nats, of values in (0, 1), [..., C] (DALL-E, appendix A.3, equation 2).

    `stats` [..., 2 * C] are the location and the log scale of the Laplace distribution of each value's logit.
    """
    location, log_scale = jnp.split(stats, 2, axis=-1)
    logit = jnp.log(pixels) - jnp.log1p(-pixels)
    jacobian = jnp.log(pixels) + jnp.log1p(-pixels)
    return jnp.mean(jnp.abs(logit - location) * jnp.exp(-log_scale) + log_scale + math.log(2) + jacobian)
