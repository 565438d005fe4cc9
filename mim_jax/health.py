"""Is the run healthy? Metrics that show a collapse before the accuracy does, and a verdict in one sentence.

In self-distillation the head assigns each crop to K prototypes by a softmax. There are two forms of collapse (DINO, section
5.3): all images get the same uniform assignment (no sharpening), or all images are assigned to one prototype (no centering).
In both, the assignment carries no information about the image, and KL(teacher || student) goes to 0 while the loss looks
converged. A third form shows in the features: they shrink to one direction or one point (dimensional collapse).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

# Mutual information of image and prototype, in nats, below which all assignments count as the same. A small DINO model on
# CIFAR-10 without sharpening is at 0.04 after 45 steps and at 0.02 after 60; a healthy one passes 0.4 by step 300.
SAME_ASSIGNMENT = 0.05
# Effective number of prototypes that a batch uses, below which nearly all images are assigned to the same one. Without
# centering the same model is below 2 after 20 steps.
FEW_PROTOTYPES = 3.0
# Codebook perplexity, as a share of the number of codes, below which a tokenizer has collapsed to a few codes.
FEW_CODES = 0.1
# Entropy, as a share of ln K, above which assignments that are all the same are called uniform.
UNIFORM = 0.95
# `feature_std` below which all features count as equal.
SAME_FEATURES = 0.01
# RankMe below which features count as collapsed to one direction; 1 is a line through the origin.
ONE_DIRECTION = 1.5
# Share of the run before which equal assignments are no collapse yet: most runs pass through them in the first steps.
EARLY = 0.1
# Held-out images below which nothing is judged: a score of fewer has a standard error of 0.03 and more, and few features span
# few directions in any case.
ENOUGH_IMAGES = 200
# Standard errors by which two scores must differ to count as better or worse.
ERRORS = 2.0
# Share of the run after which features should score higher than those of the untrained encoder.
LATE = 0.5


def assignment_figures(teacher: jax.Array, student_log: jax.Array, center: jax.Array | None = None) -> dict[str, jax.Array]:
    """Metrics of the prototype assignments of one batch, for use inside the step. Entropies are in nats, 0 to ln K.

    Args:
        teacher: probabilities [..., K], after centering and sharpening.
        student_log: log-probabilities [..., K] of the student, in the order of the teacher's that they are to match.
        center: the teacher's center, [..., K].

    Returns:
        Scalars f32: `health/teacher_entropy` and `health/student_entropy` (means over all assignments), `health/kl` (mean
        KL(teacher || student)), `health/prototype_usage` (exp(entropy of the mean assignment) / K: 1 if the batch uses all
        prototypes equally, 1 / K if it uses one), `health/mutual_information` (mutual information of crop and prototype:
        entropy of the mean assignment minus mean entropy; 0 if all assignments are the same, at most the logarithm of their
        number), and `health/center_norm` if `center` is given.
    """
    teacher, student_log = teacher.astype(jnp.float32), student_log.astype(jnp.float32)
    num_prototypes = teacher.shape[-1]
    mean_assignment = teacher.reshape(-1, num_prototypes).mean(axis=0)
    cross_entropy = -jnp.sum(teacher * student_log, axis=-1).mean()
    teacher_entropy = _entropy(teacher).mean()
    mean_assignment_entropy = _entropy(mean_assignment)
    figures = {
        "health/teacher_entropy": teacher_entropy,
        "health/student_entropy": -jnp.sum(jnp.exp(student_log) * student_log, axis=-1).mean(),
        "health/kl": cross_entropy - teacher_entropy,
        "health/prototype_usage": jnp.exp(mean_assignment_entropy) / num_prototypes,
        "health/mutual_information": mean_assignment_entropy - teacher_entropy,
    }
    if center is not None:
        figures["health/center_norm"] = jnp.linalg.norm(center.astype(jnp.float32))
    return figures


def codebook_figures(counts: jax.Array) -> dict[str, jax.Array]:
    """Codebook usage from the counts of the codes, [K], in a batch or as a moving average.

    Returns:
        Scalars f32: `health/codebook_perplexity` (exp of the entropy of the codes' frequencies: K if all are equal) and
        `health/codebook_usage` (share of codes in use: those with a frequency above 0.01 / K).
    """
    share = counts.astype(jnp.float32) / jnp.maximum(counts.sum(), 1e-12)
    used = share > 0.01 / len(counts)
    return {"health/codebook_perplexity": jnp.exp(_entropy(share)), "health/codebook_usage": used.mean()}


def rank_me(features: Array, eps: float = 1e-7) -> jax.Array:
    """Effective rank of features [N, D]: exp of the entropy of their singular values, between 1 and min(N, D).

    RankMe, Garrido et al. 2023, equation 1. The features are not centered.
    """
    singular = jnp.linalg.svd(jnp.asarray(features, jnp.float32), compute_uv=False)
    share = singular / jnp.maximum(singular.sum(), eps) + eps
    return jnp.exp(-jnp.sum(share * jnp.log(share)))


def feature_std(features: Array) -> jax.Array:
    """Spread of features [N, D]: the std over images of the L2-normalized features, averaged over D, times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if all are equal (SimSiam, Chen and He 2021, section 4.1).
    """
    features = jnp.asarray(features, jnp.float32)
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return unit.std(axis=0).mean() * math.sqrt(features.shape[-1])


def mean_cosine(features: Array, others: Array) -> jax.Array:
    """Mean over images of the cosine of their features [N, D] and others of the same images; 1: the same directions."""
    features, others = (jnp.asarray(x, jnp.float32) for x in (features, others))
    lengths = jnp.linalg.norm(features, axis=-1) * jnp.linalg.norm(others, axis=-1)
    return jnp.mean(jnp.sum(features * others, axis=-1) / jnp.maximum(lengths, 1e-12))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`status` is "healthy", "too early", "too few images", "mixed", "not learning", "forgetting", "collapsing" or "broken";
    `sentence` gives the reason."""

    status: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.status}: {self.sentence}"


def verdict(
    figures: Mapping[str, float | None],
    num_prototypes: int | None = None,
    progress: float = 1.0,
    codes: int | None = None,
    images: int | None = None,
) -> Verdict:
    """Judges a run by its latest metrics. Criteria whose metrics are missing are skipped.

    Args:
        figures: tag -> latest logged value (None or NaN: not finite). Read are the tags of `assignment_figures` and
            `codebook_figures`, `health/rank`, `health/feature_std`, `eval/view_retrieval`, `eval/knn` and their
            `..._baseline_untrained`, and `eval/accuracy` and its `..._baseline_majority`. A classifier is judged by these
            two alone: its features may be frozen, or have few directions. A value of any tag that is not finite makes the
            run "broken". A run that continues from other weights has `..._baseline_start` instead of `..._untrained`, also of
            `eval/patch_retrieval`, and `health/start_cosine`: it is healthy if these scores are kept, and "forgetting" if not.
        num_prototypes: K, needed for the entropies.
        progress: share of the run that is done, 0 to 1.
        codes: size of a tokenizer's codebook. A tokenizer is judged by its codebook usage, not by its features.
        images: number of held-out images that were measured on. Below ENOUGH_IMAGES nothing but "broken" is said. None:
            enough, and scores have no error.
    """
    lost = [tag for tag, value in figures.items() if value is None or not math.isfinite(value)]
    if lost:
        return Verdict("broken", f"{', '.join(sorted(lost))} {'is' if len(lost) == 1 else 'are'} not finite.")

    known = {tag.removeprefix("health/"): float(value) for tag, value in figures.items() if value is not None}
    std, rank = known.get("feature_std"), known.get("rank")
    features = [] if std is None else [f"feature std {std:.2f}"]
    features += [] if rank is None else [f"feature rank {rank:.1f}"]
    features += [f"cosine to the features at the start {known['start_cosine']:.3f}"] if "start_cosine" in known else []
    assignments = usage = ""
    if num_prototypes and "teacher_entropy" in known:
        share = known["teacher_entropy"] / math.log(num_prototypes)
        used, information = known["prototype_usage"] * num_prototypes, known["mutual_information"]
        assignments = f"teacher entropy {share:.0%} of uniform, {used:.0f} of {num_prototypes} prototypes in use"
        assignments += f", mutual information of image and prototype {information:.2g} nats"
        features = [assignments, f"KL(teacher || student) {known['kl']:.2g} nats", *features]
    if codes and "codebook_perplexity" in known:
        usage = f"codebook perplexity {known['codebook_perplexity']:.0f} of {codes}"
        usage += f", {known['codebook_usage']:.0%} of the codes in use"
        features = [usage, *features]
    compared = []  # (clearly better, clearly worse, text)
    judged, other, those = {"eval/view_retrieval": "view retrieval", "eval/knn": "k-NN"}, "untrained", "the untrained encoder"
    classifies = "eval/accuracy" in known
    continued = not classifies and any(tag.endswith("_baseline_start") for tag in known)
    if continued:
        judged, other, those = judged | {"eval/patch_retrieval": "patch retrieval"}, "start", "the start"
    if classifies:
        judged, other, those = {"eval/accuracy": "accuracy"}, "majority", "the largest class"
    for tag, what in judged.items():
        value, baseline = known.get(tag), known.get(f"{tag}_baseline_{other}")
        if value is not None and baseline is not None:
            error = ERRORS * math.sqrt((value * (1 - value) + baseline * (1 - baseline)) / images) if images else 0.0
            text = f"{what} {value:.3f} ({other} {baseline:.3f})"
            compared.append((value > baseline + error, value < baseline - error, text))
    signs = features + [text for _, _, text in compared]

    if not signs:
        return Verdict("too early", "nothing has been measured yet.")
    if images is not None and images < ENOUGH_IMAGES:
        few = f"a verdict needs {ENOUGH_IMAGES} held-out images, these are {images}. Measured: "
        return Verdict("too few images", f"{few}{', '.join(signs)}.")
    if std is not None and std < SAME_FEATURES and not classifies:
        return Verdict("collapsing", f"feature std {std:.2g}: all images have the same features.")
    if rank is not None and rank < ONE_DIRECTION and not classifies:
        return Verdict("collapsing", f"feature rank {rank:.2f}: all features lie along one direction.")
    if assignments and (information < SAME_ASSIGNMENT or used < FEW_PROTOTYPES):
        if progress < EARLY:
            return Verdict("too early", f"{assignments}; {progress:.0%} of the run is done.")
        if used < FEW_PROTOTYPES:
            reason = "all images are assigned to the same prototype (is the teacher centered?)"
        elif share > UNIFORM:
            reason = "all images get the same uniform assignment (is the teacher's temperature low enough?)"
        else:
            reason = "all images get the same assignment"
        return Verdict("collapsing", f"{assignments}: {reason}.")
    if usage:
        if known["codebook_perplexity"] >= FEW_CODES * (codes or 0):
            return Verdict("healthy", f"{', '.join(features)}.")
        if progress < EARLY:
            return Verdict("too early", f"{usage}; {progress:.0%} of the run is done.")
        return Verdict("collapsing", f"{usage}: most codes are unused.")

    better, worse = ([row for row in compared if row[which]] for which in (0, 1))
    scores = ", ".join(text for _, _, text in compared)
    kept = continued and not worse
    if compared and not kept and (worse or not better) and progress < LATE:
        return Verdict("too early", f"not clearly better than {those} yet: {scores}; {progress:.0%} of the run is done.")
    if worse and not better and continued:
        return Verdict("forgetting", f"worse than {those}: {', '.join(signs)}.")
    if compared and not kept and not better:
        return Verdict("not learning", f"not clearly better than {those}: {scores}.")
    if worse:
        fell, rose = (" and ".join(text for _, _, text in group) for group in (worse, better))
        return Verdict("mixed", f"better than {those} in {rose}, but worse in {fell}.")
    return Verdict("healthy", f"{', '.join(signs)}.")


def _entropy(probabilities: jax.Array) -> jax.Array:
    return -jax.scipy.special.xlogy(probabilities, probabilities).sum(axis=-1)
