"""Health metrics and verdicts on assignments and features that are healthy or collapsed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import health

K = 64


def votes(logits, temperature=0.1):
    return jax.nn.softmax(logits / temperature), jax.nn.log_softmax(logits / temperature)


def test_assignment_figures_of_known_votes():
    uniform, one = jnp.full((2, 5, K), 1 / K), jax.nn.one_hot(jnp.zeros((2, 5), int), K)
    figures = health.assignment_figures(uniform, jnp.log(uniform), center=jnp.array([3.0, 4.0]))
    assert figures["health/teacher_entropy"] == pytest.approx(math.log(K), rel=1e-5)
    assert figures["health/student_entropy"] == pytest.approx(math.log(K), rel=1e-5)
    assert figures["health/kl"] == pytest.approx(0, abs=1e-5)
    assert figures["health/prototype_usage"] == pytest.approx(1, rel=1e-5)
    assert figures["health/mutual_information"] == pytest.approx(0, abs=1e-5)
    assert figures["health/center_norm"] == pytest.approx(5)

    figures = health.assignment_figures(one, jnp.log(uniform))
    assert figures["health/teacher_entropy"] == 0
    assert figures["health/kl"] == pytest.approx(math.log(K), rel=1e-5)
    assert figures["health/prototype_usage"] == pytest.approx(1 / K)
    assert "health/center_norm" not in figures

    different = jax.nn.one_hot(jnp.arange(16), K)  # 16 images, each with a prototype of its own
    figures = health.assignment_figures(different, jnp.log(uniform[0, 0]))
    assert figures["health/prototype_usage"] == pytest.approx(16 / K)
    assert figures["health/mutual_information"] == pytest.approx(math.log(16), rel=1e-5)


def test_kl_is_that_of_the_pairs():
    rng = np.random.default_rng(0)
    teacher, _ = votes(rng.normal(size=(7, K)), 1.0)
    student, log_student = votes(rng.normal(size=(7, K)), 1.0)
    expected = np.mean(np.sum(np.asarray(teacher) * np.log(np.asarray(teacher) / np.asarray(student)), axis=-1))
    assert health.assignment_figures(teacher, log_student)["health/kl"] == pytest.approx(expected, rel=1e-4)


def test_rank_me_counts_directions():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    rows, _ = np.linalg.qr(rng.normal(size=(200, 5)))
    assert health.rank_me(rows @ basis[:5]) == pytest.approx(5, rel=1e-3)
    assert health.rank_me(np.outer(rng.normal(size=200), basis[0])) == pytest.approx(1, abs=1e-3)
    assert np.isfinite(health.rank_me(np.zeros((10, 4))))


def test_feature_std_is_one_on_the_sphere_and_zero_at_a_point():
    rng = np.random.default_rng(0)
    assert health.feature_std(rng.normal(size=(4000, 64)) * 9) == pytest.approx(1, abs=0.02)
    assert health.feature_std(np.outer(rng.uniform(1, 5, 100), np.ones(64))) == pytest.approx(0, abs=1e-4)


# Verdicts


def figures_of(teacher_logits, student_logits=None, **more):
    teacher, _ = votes(teacher_logits, 0.04)
    _, student_log = votes(teacher_logits if student_logits is None else student_logits, 0.1)
    return {tag: float(value) for tag, value in health.assignment_figures(teacher, student_log).items()} | more


HEALTHY = {"health/rank": 20.0, "health/feature_std": 0.6, "train/loss": 3.0}


def logits(images=256, spread=0.1, seed=0):
    return spread * np.random.default_rng(seed).normal(size=(images, K))


def test_assignments_that_differ_between_images_are_healthy():
    verdict = health.verdict(figures_of(logits(), logits(seed=1)) | HEALTHY, K)
    assert verdict.status == "healthy"
    assert "of uniform" in verdict.sentence and f"of {K} prototypes" in verdict.sentence and "rank 20" in verdict.sentence


def test_uniform_assignments_are_a_collapse_unless_the_run_has_just_begun():
    flat = figures_of(logits(spread=0.001)) | HEALTHY
    verdict = health.verdict(flat, K)
    assert verdict.status == "collapsing"
    assert "teacher entropy 100% of uniform" in verdict.sentence and "same uniform assignment" in verdict.sentence
    assert health.verdict(flat, K, progress=0.01).status == "too early"


def test_one_prototype_for_all_images_is_a_collapse():
    same = logits(spread=0.01)
    same[:, 3] += 1
    verdict = health.verdict(figures_of(same) | HEALTHY, K)
    assert verdict.status == "collapsing" and "same prototype" in verdict.sentence
    # As certain, but each image has its own prototype: healthy.
    own = logits(spread=0.01)
    own[np.arange(256), np.arange(256) % K] += 1
    assert health.verdict(figures_of(own) | HEALTHY, K).status == "healthy"


def test_one_broad_assignment_for_all_images_is_a_collapse():
    same = np.broadcast_to(logits(images=1), (256, K))
    figures = figures_of(same)
    assert 0.2 < figures["health/teacher_entropy"] / math.log(K) < 0.9
    verdict = health.verdict(figures | HEALTHY, K)
    assert verdict.status == "collapsing" and "all images get the same assignment." in verdict.sentence


@pytest.mark.parametrize(
    "figures, reason",
    [({"health/feature_std": 0.002}, "same features"), ({"health/rank": 1.05}, "one direction")],
)
def test_shrunken_features_are_a_collapse(figures, reason):
    verdict = health.verdict(figures_of(logits()) | HEALTHY | figures, K)
    assert verdict.status == "collapsing" and reason in verdict.sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_that_is_not_finite_is_named_at_any_time(value):
    verdict = health.verdict(HEALTHY | {"train/loss": value}, K, progress=0.0)
    assert verdict.status == "broken" and "train/loss" in verdict.sentence


def test_no_better_than_untrained_is_not_learning():
    figures = HEALTHY | {
        "eval/knn": 0.25,
        "eval/knn_baseline_untrained": 0.27,
        "eval/view_retrieval": 0.04,
        "eval/view_retrieval_baseline_untrained": 0.05,
    }
    assert health.verdict(figures).status == "not learning"
    assert health.verdict(figures, progress=0.2).status == "too early"
    figures["eval/view_retrieval"] = 0.05
    assert health.verdict(figures | {"eval/knn": 0.28}).status == "healthy"
    # within the error of so few images
    assert health.verdict(figures | {"eval/knn": 0.28}, images=2000).status == "not learning"
    assert health.verdict(figures | {"eval/knn": 0.32}, images=2000).status == "healthy"


def test_worse_than_untrained_in_one_score_is_not_healthy():
    figures = HEALTHY | {
        "eval/knn": 0.20,
        "eval/knn_baseline_untrained": 0.27,
        "eval/view_retrieval": 0.2,
        "eval/view_retrieval_baseline_untrained": 0.05,
    }
    verdict = health.verdict(figures, images=2000)
    assert verdict.status == "mixed"
    assert "better than the untrained encoder in view retrieval 0.200 (untrained 0.050)" in verdict.sentence
    assert "worse in k-NN 0.200 (untrained 0.270)" in verdict.sentence
    assert health.verdict(figures, progress=0.2, images=2000).status == "too early"
    assert health.verdict(figures | {"eval/knn": 0.26}, images=2000).status == "healthy"  # within the error


@pytest.mark.parametrize("codes", [None, 64])
def test_too_few_held_out_images_give_no_verdict(codes):
    collapsed = {"health/rank": 1.05, "health/feature_std": 0.002, "eval/knn": 0.2, "eval/knn_baseline_untrained": 0.4}
    collapsed |= {name: float(value) for name, value in health.codebook_figures(np.float32(np.eye(64)[3])).items()}
    for figures in (collapsed, collapsed | HEALTHY):
        verdict = health.verdict(figures, codes=codes, images=health.ENOUGH_IMAGES - 1)
        assert verdict.status == "too few images" and "a verdict needs 200 held-out images, these are 199" in verdict.sentence
        assert "k-NN 0.200 (untrained 0.400)" in verdict.sentence and "collaps" not in verdict.sentence
    assert health.verdict(collapsed, codes=codes, images=health.ENOUGH_IMAGES).status == "collapsing"
    assert health.verdict(collapsed | {"train/loss": math.nan}, images=5).status == "broken"


@pytest.mark.parametrize("counts, status", [(np.ones(64), "healthy"), (np.eye(64)[3], "collapsing")])
def test_a_tokenizer_is_judged_by_the_use_of_its_codes(counts, status):
    figures = {name: float(value) for name, value in health.codebook_figures(np.float32(counts)).items()}
    assert figures["health/codebook_perplexity"] == pytest.approx(counts.sum(), rel=1e-5)
    assert figures["health/codebook_usage"] == counts.sum() / 64
    # a tokenizer's features need not be better than those of the untrained encoder
    verdict = health.verdict(figures | {"eval/knn": 0.2, "eval/knn_baseline_untrained": 0.3}, codes=64)
    assert verdict.status == status and f"codebook perplexity {counts.sum():.0f} of 64" in verdict.sentence


def test_a_classifier_is_judged_by_its_accuracy():
    """Not by its features: they may be frozen, and those of two classes lie along one direction."""
    figures = {"health/rank": 1.05, "health/feature_std": 0.002, "eval/knn": 0.4, "eval/knn_baseline_untrained": 0.4}
    figures |= {"eval/accuracy": 0.6, "eval/accuracy_baseline_majority": 0.5, "eval/accuracy_baseline_untrained": 0.3}
    verdict = health.verdict(figures, images=2000)
    assert verdict.status == "healthy" and "accuracy 0.600 (majority 0.500)" in verdict.sentence
    poor = figures | {"eval/accuracy": 0.51}  # within the error
    assert health.verdict(poor, progress=0.2, images=2000).status == "too early"
    verdict = health.verdict(poor, images=2000)
    assert verdict.status == "not learning" and "not clearly better than the largest class" in verdict.sentence


def test_nothing_measured_is_too_early():
    assert health.verdict({}, K).status == "too early"
