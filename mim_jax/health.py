"""Is the run healthy? Figures that show a collapse before the accuracy does, and a verdict in one plain sentence.

Self-distillation can cheat in two ways (DINO, section 5.3): all images get the same vote spread over all prototypes (no
sharpening), or all images vote for one prototype (no centering). In both, and in all between, the teacher's vote tells
nothing about the image, and KL(teacher || student) goes to 0 while the loss looks settled. A third way is seen in the
features: they shrink to one direction or one point (dimensional collapse).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

# Nats below which a vote tells nothing about the image. A small DINO model on CIFAR-10 without sharpening is at 0.04
# after 45 steps and at 0.02 after 60; one that trains well passes 0.4 by step 300.
SAME_VOTE = 0.05
# Prototypes in use by a whole batch, below which nearly all images vote for the same. Without centering the same model is
# below 2 after 20 steps.
FEW_PROTOTYPES = 3.0
# Share of the codebook below which its perplexity means that a tokenizer has collapsed to a few codes.
FEW_CODES = 0.1
# Share of ln K from which votes that are all the same are called uniform.
UNIFORM = 0.95
# Features of unit length whose spread is below this share of the possible one are equal for all practical purposes.
SAME_FEATURES = 0.01
# RankMe of 1 is a line through the origin.
ONE_DIRECTION = 1.5
# Share of the run before which equal votes need not be a collapse: most runs pass through them after the first steps.
EARLY = 0.1
# Share of the run after which features should tell images apart better than those of the untrained encoder.
LATE = 0.5


def vote_figures(teacher: jax.Array, student_log: jax.Array, center: jax.Array | None = None) -> dict[str, jax.Array]:
    """Figures of one batch of votes, to be called inside the step. Entropies are in nats, between 0 and ln K.

    Args:
        teacher: probabilities [..., K], after centering and sharpening.
        student_log: log-probabilities [..., K] of the student, each beside the teacher's that it is to match.
        center: the teacher's center, [..., K].

    Returns:
        Scalars f32: `health/teacher_entropy`, `health/student_entropy` (means over all votes), `health/kl` (mean
        KL(teacher || student)), `health/prototype_usage` (exp(entropy of the mean vote) / K: 1 when the batch as a
        whole uses all prototypes alike, 1 / K when it uses one), `health/vote_information` (nats that a vote tells
        about the image: entropy of the mean vote less mean entropy of the votes; 0 when all votes are the same, at most
        ln of the number of votes), and `health/center_norm` if `center` is given.
    """
    teacher, student_log = teacher.astype(jnp.float32), student_log.astype(jnp.float32)
    num_prototypes = teacher.shape[-1]
    mean_vote = teacher.reshape(-1, num_prototypes).mean(axis=0)
    cross_entropy = -jnp.sum(teacher * student_log, axis=-1).mean()
    teacher_entropy = _entropy(teacher).mean()
    mean_vote_entropy = _entropy(mean_vote)
    figures = {
        "health/teacher_entropy": teacher_entropy,
        "health/student_entropy": -jnp.sum(jnp.exp(student_log) * student_log, axis=-1).mean(),
        "health/kl": cross_entropy - teacher_entropy,
        "health/prototype_usage": jnp.exp(mean_vote_entropy) / num_prototypes,
        "health/vote_information": mean_vote_entropy - teacher_entropy,
    }
    if center is not None:
        figures["health/center_norm"] = jnp.linalg.norm(center.astype(jnp.float32))
    return figures


def codebook_figures(counts: jax.Array) -> dict[str, jax.Array]:
    """How a tokenizer uses its codes, from how often it used each, [K] (in a batch, or on a moving average).

    Returns:
        Scalars f32: `health/codebook_perplexity` (exp of the entropy of their shares: K when all are used alike) and
        `health/codebook_usage` (the share of codes in use: of those with more than a hundredth of an equal share).
    """
    share = counts.astype(jnp.float32) / jnp.maximum(counts.sum(), 1e-12)
    used = share > 0.01 / len(counts)
    return {"health/codebook_perplexity": jnp.exp(_entropy(share)), "health/codebook_usage": used.mean()}


def rank_me(features: Array, eps: float = 1e-7) -> jax.Array:
    """Effective rank of features [N, D]: exp of the entropy of their singular values, between 1 and min(N, D).

    RankMe, Garrido et al. 2023, equation 1; features are taken as they are, not centered.
    """
    singular = jnp.linalg.svd(jnp.asarray(features, jnp.float32), compute_uv=False)
    share = singular / jnp.maximum(singular.sum(), eps) + eps
    return jnp.exp(-jnp.sum(share * jnp.log(share)))


def feature_std(features: Array) -> jax.Array:
    """Spread of features [N, D]: the std over images of the L2-normalized features, averaged over D, times sqrt(D).

    1 for directions spread evenly over the sphere, 0 when all images have the same (SimSiam, Chen and He 2021, section
    4.1).
    """
    features = jnp.asarray(features, jnp.float32)
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return unit.std(axis=0).mean() * math.sqrt(features.shape[-1])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`status` is "healthy", "too early", "not learning", "collapsing" or "broken"; `sentence` says why."""

    status: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.status}: {self.sentence}"


def verdict(
    figures: Mapping[str, float | None], num_prototypes: int | None = None, progress: float = 1.0, codes: int | None = None
) -> Verdict:
    """Judges a run by its latest figures; what is not among them is not judged.

    Args:
        figures: tag -> latest value (None or NaN: not finite), as logged: those of `vote_figures`, `health/rank`,
            `health/feature_std`, `train/loss`, `eval/view_retrieval`, `eval/knn` and their `..._baseline_untrained`.
        num_prototypes: K, needed for the entropies.
        progress: share of the run that is done, 0 to 1.
        codes: of a tokenizer, which is judged by their use and not by its features.
    """
    lost = [tag for tag, value in figures.items() if value is None or not math.isfinite(value)]
    if lost:
        return Verdict("broken", f"{', '.join(sorted(lost))} {'is' if len(lost) == 1 else 'are'} not finite.")

    known = {tag.removeprefix("health/"): float(value) for tag, value in figures.items() if value is not None}
    signs = []
    std, rank = known.get("feature_std"), known.get("rank")
    if std is not None:
        signs.append(f"feature std {std:.2f}")
        if std < SAME_FEATURES:
            return Verdict("collapsing", f"feature std {std:.2g}: all images have the same features.")
    if rank is not None:
        signs.append(f"feature rank {rank:.1f}")
        if rank < ONE_DIRECTION:
            return Verdict("collapsing", f"feature rank {rank:.2f}: all features lie along one direction.")

    if num_prototypes and "teacher_entropy" in known:
        share = known["teacher_entropy"] / math.log(num_prototypes)
        used, information = known["prototype_usage"] * num_prototypes, known["vote_information"]
        votes = f"teacher entropy {share:.0%} of uniform, {used:.0f} of {num_prototypes} prototypes in use"
        votes += f", a vote tells {information:.2g} nats about its image"
        if information < SAME_VOTE or used < FEW_PROTOTYPES:
            if progress < EARLY:
                return Verdict("too early", f"{votes}; {progress:.0%} of the run is done.")
            if used < FEW_PROTOTYPES:
                reason = "all images vote for the same prototype (is the teacher centered?)"
            elif share > UNIFORM:
                reason = "all images get the same uniform vote (is the teacher's temperature low enough?)"
            else:
                reason = "all images get the same vote"
            return Verdict("collapsing", f"{votes}: {reason}.")
        signs = [votes, f"KL to the student {known['kl']:.2g} nats", *signs]

    if codes and "codebook_perplexity" in known:
        told = f"codebook perplexity {known['codebook_perplexity']:.0f} of {codes}"
        told += f", {known['codebook_usage']:.0%} of the codes in use"
        if known["codebook_perplexity"] >= FEW_CODES * codes:
            return Verdict("healthy", f"{', '.join([told, *signs])}.")
        if progress < EARLY:
            return Verdict("too early", f"{told}; {progress:.0%} of the run is done.")
        return Verdict("collapsing", f"{told}: the others stand for nothing.")

    compared = []
    for name, what in (("eval/view_retrieval", "view retrieval"), ("eval/knn", "k-NN")):
        value, baseline = known.get(name), known.get(f"{name}_baseline_untrained")
        if value is not None and baseline is not None:
            compared.append((value > baseline, f"{what} {value:.3f} (untrained {baseline:.3f})"))
    if compared and not any(better for better, _ in compared):
        told = ", ".join(text for _, text in compared)
        if progress < LATE:
            return Verdict("too early", f"no better than untrained yet: {told}; {progress:.0%} of the run is done.")
        return Verdict("not learning", f"no better than the untrained encoder: {told}.")
    signs += [text for _, text in compared]
    if not signs:
        return Verdict("too early", "nothing has been measured yet.")
    return Verdict("healthy", f"{', '.join(signs)}.")


def _entropy(probabilities: jax.Array) -> jax.Array:
    return -jax.scipy.special.xlogy(probabilities, probabilities).sum(axis=-1)
