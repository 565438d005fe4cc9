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


def ibot_patch_loss(
    student_log_probs: jax.Array, teacher_probs: jax.Array, weight: jax.Array, per_image: bool = True
) -> jax.Array:
    """The cross-entropy of masked patches with what the teacher makes of them unmasked (iBOT, equation 2).

    Args:
      student_log_probs, teacher_probs: [B, G, M, K], of M patches of each global crop.
      weight: bool [B, G, M], False for those that are not masked.
      per_image: as in the official code, each crop's mean over its masked patches, averaged over all crops, those without a
        masked patch too; else the sum over masked patches, averaged over crops, as the paper has it.
    """
    cross_entropy = -jnp.einsum("bgmk,bgmk->bgm", teacher_probs, student_log_probs)
    total = jnp.sum(cross_entropy * weight, axis=-1)
    return jnp.mean(total / jnp.maximum(jnp.sum(weight, axis=-1), 1) if per_image else total)


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


def cosine_distance(pred: jax.Array, target: jax.Array, eps: float = 1e-12) -> jax.Array:
    """1 less the mean cosine of vectors [..., D] (BEiT v2, equation 2)."""
    products = jnp.sum(pred * target, axis=-1)
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), eps**2)) for x in (pred, target)]
    return 1 - jnp.mean(products / (lengths[0] * lengths[1]))


def commitment_loss(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The mean squared distance of vectors to their codes, both [..., D]; z alone gets gradient (VQ-VAE, equation 3)."""
    return jnp.mean((z - jax.lax.stop_gradient(codes)) ** 2)


def codebook_loss(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The same number, but the codes alone get gradient (VQ-VAE, equation 3)."""
    return commitment_loss(codes, z)


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
