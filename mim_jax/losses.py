"""The papers' equations as pure functions of global batches: a plain mean over the batch axis is the global mean."""

import math

import jax
import jax.numpy as jnp


def dino_teacher(logits: jax.Array, center: jax.Array, temp: jax.Array) -> jax.Array:
    """The targets: centred, sharpened and without gradient, [B, G, K] -> [B, G, K] (DINO, section 3.1)."""
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temp))


def dino_loss(student_log_probs: jax.Array, teacher_probs: jax.Array) -> jax.Array:
    """The cross-entropy of each student crop with each teacher crop but itself, averaged (DINO, equation 3).

    Args:
      student_log_probs: [B, V, K], log softmax of all crops, the G global ones first.
      teacher_probs: [B, G, K].
    """
    cross_entropy = -jnp.einsum("bgk,bvk->gv", teacher_probs, student_log_probs) / len(teacher_probs)
    n_global, n_crops = cross_entropy.shape
    others = 1 - jnp.eye(n_global, n_crops, dtype=cross_entropy.dtype)
    return jnp.sum(cross_entropy * others) / jnp.sum(others)


def update_center(center: jax.Array, teacher_logits: jax.Array, momentum: float) -> jax.Array:
    """The moving average of the teacher's logits over images and global crops (DINO, equation 4). center: [1, K]."""
    mean = teacher_logits.reshape(-1, center.shape[-1]).mean(0, keepdims=True)
    return momentum * center + (1 - momentum) * jax.lax.stop_gradient(mean)


def patch_loss(student_log_probs: jax.Array, teacher_probs: jax.Array, weight: jax.Array, crops: int) -> jax.Array:
    """The cross-entropy of masked patches with what the teacher makes of them unmasked (iBOT, equation 2).

    Args:
      student_log_probs, teacher_probs: [..., K].
      weight: [...], 1 for a masked patch: the sum that the paper has; or one over the masked patches of its crop: the mean
        over them, as the official codes do. 0 for patches that are not masked.
      crops: all global crops of the batch, those without a masked patch too, over which the mean is.
    """
    cross_entropy = -jnp.einsum("...k,...k->...", teacher_probs, student_log_probs)
    return jnp.sum(cross_entropy * weight) / crops


def sinkhorn_knopp(logits: jax.Array, temp: jax.Array, weight: jax.Array | None = None, iterations: int = 3) -> jax.Array:
    """Targets that use all prototypes alike: [..., K] -> probabilities [..., K] without gradient (SwAV; DINOv2, section 4).

    All rows of the batch are balanced together. `weight` [...] is 0 for rows that only fill a buffer: they get no
    probability and count for nothing. Computed in float32 at least; the largest logit is subtracted, which changes nothing.
    """
    dtype = jnp.promote_types(jnp.float32, logits.dtype)
    x = jax.lax.stop_gradient(logits).astype(dtype).reshape(-1, logits.shape[-1]) / temp
    weight = jnp.ones(len(x), dtype) if weight is None else weight.reshape(-1).astype(dtype)
    x = jnp.where(weight[:, None] > 0, x, -jnp.inf)
    largest = x.max()  # -inf where no row counts
    q, rows, tiny = jnp.exp(x - jnp.where(jnp.isfinite(largest), largest, 0)), weight.sum(), jnp.finfo(dtype).tiny
    for _ in range(iterations):
        q = q / jnp.maximum(q.sum(axis=0, keepdims=True) * q.shape[1], tiny)
        q = q / jnp.maximum(q.sum(axis=1, keepdims=True) * rows, tiny)
    return (q * rows).reshape(logits.shape)


def koleo(features: jax.Array, group_size: int, eps: float = 1e-8) -> jax.Array:
    """The Kozachenko-Leonenko entropy estimate, which spreads features [B, D] (DINOv2, section 4; Sablayrolles et al. 2019).

    The mean of -log of each one's distance to its nearest neighbour, of unit length, among the `group_size` in a row that it
    is one of: in the official code those of one GPU.
    """
    x = features.astype(jnp.promote_types(jnp.float32, features.dtype)).reshape(-1, group_size, features.shape[-1])
    x = x / jnp.maximum(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps**2)), eps)
    products = jnp.einsum("gad,gbd->gab", x, x, precision="highest")
    nearest = jnp.argmax(jnp.where(jnp.eye(group_size, dtype=bool), -1.0, products), axis=-1)
    neighbor = jnp.take_along_axis(x, nearest[..., None], axis=1)
    distance = jnp.sqrt(jnp.sum((x - neighbor + eps) ** 2, axis=-1))
    return -jnp.mean(jnp.log(distance + eps))


def normalized_patches(patches: jax.Array, eps: float = 1e-6) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(patches less their mean over their std, mean, std), each patch [..., P] by itself (MAE, section 3.3).

    The variance is the unbiased one and eps is added to it, as in the official code.
    """
    mean = patches.mean(-1, keepdims=True)
    std = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + eps)
    return (patches - mean) / std, mean, std


def mae_loss(pred: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean squared error of the masked patches: pred and target [..., N, P], mask bool [..., N] (MAE, section 3.3)."""
    error = jnp.mean((pred - target) ** 2, axis=-1)
    return jnp.sum(error * mask) / jnp.sum(mask)


def simmim_loss(pred: jax.Array, target: jax.Array, mask: jax.Array, channels: int = 3) -> jax.Array:
    """The mean absolute error of the masked pixels (SimMIM, equation 1): pred and target [..., N, P], mask bool [..., N].

    As in the official code, 1e-5 is added to the number of masked pixels.
    """
    error = jnp.sum(jnp.abs(pred - target) * mask[..., None])
    return error / (jnp.sum(mask) * (pred.shape[-1] // channels) + 1e-5) / channels


def locally_normalized(images: jax.Array, window: int, eps: float = 1e-6) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(images less their mean over their std, mean, std) within a square window around each pixel, images [..., H, W, C].

    The window is odd, has the pixels of the image alone, and takes each channel by itself; the variance is the unbiased
    one, not below 0, and eps is added to it (the normalised targets of SimMIM's later code).
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
    """The mean cross-entropy of the positions whose `weight` is True: logits [..., K], targets int and weight [...].

    The mean is over all masked patches of the batch, so an image with more of them weighs more (BEiT, equation 2).
    """
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weight) / jnp.sum(weight)


def cosine_distance(pred: jax.Array, target: jax.Array, weight: jax.Array | None = None, eps: float = 1e-12) -> jax.Array:
    """1 less the mean cosine of vectors [..., D], of those alone whose `weight` [...] is True (BEiT v2, equation 2)."""
    products = jnp.sum(pred * target, axis=-1)
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), eps**2)) for x in (pred, target)]
    return 1 - jnp.average(products / (lengths[0] * lengths[1]), weights=weight)


def commitment_loss(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The mean squared distance of vectors to their codes, both [..., D]; z alone gets gradient (VQ-VAE, equation 3)."""
    return jnp.mean((z - jax.lax.stop_gradient(codes)) ** 2)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || uniform) over the last axis, in nats: [..., K] -> [...] (DALL-E, section 2.1)."""
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) + math.log(logits.shape[-1])


def logit_laplace_loss(stats: jax.Array, pixels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of values in (0, 1), [..., C], in nats (DALL-E, appendix A.3, equation 2).

    `stats` [..., 2 * C] are the location and the log of the scale of each value's logit.
    """
    location, log_scale = jnp.split(stats, 2, axis=-1)
    logit = jnp.log(pixels) - jnp.log1p(-pixels)
    jacobian = jnp.log(pixels) + jnp.log1p(-pixels)
    return jnp.mean(jnp.abs(logit - location) * jnp.exp(-log_scale) + log_scale + math.log(2) + jacobian)
