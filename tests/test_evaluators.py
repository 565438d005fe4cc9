"""Evaluators: k-NN and attention masks against the official numbers, the rest against cases with a known answer."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax.data.augment import Crops, Policy
from mim_jax.evaluators import Monitor, pictures
from mim_jax.evaluators.knn import knn_accuracy, knn_scores, pixel_features, whitened_features
from mim_jax.evaluators.probe import probe_accuracy
from mim_jax.evaluators.retrieval import view_retrieval
from mim_jax.models.layers import painted_in

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden_knn():
    return dict(np.load(GOLDEN / "dino_knn.npz"))


@pytest.mark.parametrize("k", [3, 10, 20, 100])
def test_knn_equals_the_official_percentages(golden_knn, k):
    settings = json.loads((GOLDEN / "dino_knn.json").read_text())
    top1, top5 = knn_accuracy(
        golden_knn["train_features"],
        golden_knn["train_labels"],
        golden_knn["test_features"],
        golden_knn["test_labels"],
        settings["num_classes"],
        k=k,
        temperature=settings["T"],
    )
    assert 100 * top1 == pytest.approx(golden_knn[f"top1_k{k}"], abs=1e-4)
    assert 100 * top5 == pytest.approx(golden_knn[f"top5_k{k}"], abs=1e-4)


def test_knn_scores_are_weighted_votes_whatever_the_scale_and_the_chunk(golden_knn):
    bank, labels = golden_knn["train_features"], golden_knn["train_labels"]
    queries = golden_knn["test_features"][:7]
    scores = knn_scores(3 * bank, labels, 5 * queries, 10, k=4, temperature=0.1, chunk=3)
    similarity = queries @ bank.T
    for query, votes in zip(similarity, np.asarray(scores), strict=True):
        expected = np.zeros(10)
        for neighbor in np.argsort(-query)[:4]:
            expected[labels[neighbor]] += np.exp(query[neighbor] / 0.1)
        np.testing.assert_allclose(votes, expected, rtol=1e-4)


def test_knn_refuses_more_neighbors_than_there_are():
    with pytest.raises(ValueError, match="k = 20 .* bank of 5"):
        knn_scores(jnp.ones((5, 2)), jnp.zeros(5, int), jnp.ones((1, 2)), 2)


def test_pixel_features_ignore_the_level_of_each_channel():
    images = np.random.default_rng(0).integers(0, 100, (4, 6, 5, 3), np.uint8)
    features = pixel_features(images)
    assert features.shape == (4, 90)
    np.testing.assert_allclose(features, pixel_features(images + np.array([10, 50, 90], np.uint8)), atol=1e-4)


def test_whitened_features_are_white_on_the_bank_in_the_order_given():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12)) * np.logspace(0, 1, 12)
    bank, test = rng.normal(size=(400, 12)) @ mixing + 7, rng.normal(size=(30, 12)) @ mixing + 7
    white_bank, white_test = whitened_features(np.concatenate([bank, 0 * bank], axis=1), np.pad(test, ((0, 0), (0, 12))), 12)
    np.testing.assert_allclose(np.cov(white_bank, rowvar=False, bias=True), np.eye(12), atol=1e-2)
    # Whitening turns the Mahalanobis distance into the plain one.
    inverse = np.linalg.inv(np.cov(bank, rowvar=False, bias=True))
    offsets = test - bank[:30]
    expected = np.einsum("nd,de,ne->n", offsets, inverse, offsets)
    np.testing.assert_allclose(np.sum((white_test - white_bank[:30]) ** 2, axis=1), expected, rtol=1e-2)


def test_whitened_features_of_a_constant_direction_stay_finite():
    bank = np.zeros((50, 8), np.float32)
    bank[:, :3] = np.random.default_rng(0).normal(size=(50, 3))
    test = np.ones((4, 8), np.float32)
    for features in whitened_features(bank, test, dims=6):
        assert np.isfinite(features).all() and np.abs(features).max() < 100


def test_probe_separates_what_is_linear_and_scores_chance_on_noise():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, 4))

    def draw(count):
        x = rng.normal(size=(count, 16))
        labels = np.argmax(x @ weights, axis=1)
        return x * np.logspace(-3, 3, 16) + 5, labels

    (bank, bank_labels), (test, labels) = draw(2000), draw(1000)
    assert probe_accuracy(bank, bank_labels, test, labels, 4) > 0.9
    noise = rng.normal(size=bank.shape), rng.normal(size=test.shape)
    assert 0.15 < probe_accuracy(noise[0], bank_labels, noise[1], labels, 4) < 0.4


def test_probe_chooses_its_penalty_on_the_bank():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(440, 400))  # nearly as many dimensions as images: without a penalty the fit is noise
    test = rng.normal(size=(2000, 400))
    bank_labels, labels = (bank[:, 0] > 0).astype(int), (test[:, 0] > 0).astype(int)
    free = probe_accuracy(bank, bank_labels, test, labels, 2, penalties=[1e-8])
    assert probe_accuracy(bank, bank_labels, test, labels, 2, penalties=[1e-8, 1e-1, 1.0]) > free + 0.05


def test_probe_of_constant_features_predicts_the_largest_class():
    labels = np.array([0, 1, 1, 1] * 25)
    assert probe_accuracy(np.ones((100, 3)), labels, np.ones((100, 3)), labels, 2) == 0.75


def test_view_retrieval_knows_equal_views_and_chance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 8)) + 100
    assert view_retrieval(features, features * 1.0, chunk=16) == 1
    shifted = np.roll(features, 1, axis=0)
    assert view_retrieval(features, shifted, chunk=16) == 0
    constant = np.ones((40, 8), np.float32)
    assert view_retrieval(constant, constant) == pytest.approx(1 / 40)


def test_view_retrieval_looks_through_what_all_images_share():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(50, 8))
    scale = np.logspace(0, 4, 8)  # a loud dimension must not drown the others
    noise = rng.normal(size=(2, 50, 8)) * np.where(np.arange(8) == 7, 10.0, 0.05)
    assert view_retrieval((signal + noise[0]) * scale, (signal + noise[1]) * scale) > 0.8


# The monitor, on images whose class is their color


def colored(count, size=8, canvas=12, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(count) % 3).astype(np.int32)
    image = np.zeros((count, canvas, canvas, 3), np.uint8)
    image[:, :size, :size] = rng.integers(0, 120, (count, size, size, 3))
    image[np.arange(count), :size, :size, label] += 120
    return {"image": image, "size": np.full((count, 2), size, np.int32), "label": label}


def color_features(params, images):
    """Mean color as CLS, and each pixel as a patch."""
    patches = images.reshape(images.shape[0], -1, 3)
    return {"cls": patches.mean(axis=1) * params["gain"], "patch": patches * params["patch_gain"]}


def monitor(**changes):
    crops = Crops("global", 6, (0.5, 1.0), (Policy(jitter=0, gray=0, blur=0),) * 2)
    settings = dict(
        method_features=color_features,
        bank=colored(50),
        test=colored(35, seed=1),
        num_classes=3,
        crops=crops,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        out=6,
        batch_size=16,
    )
    return Monitor(**{**settings, **changes})


PARAMS = {"gain": jnp.float32(1), "patch_gain": jnp.float32(0)}


@pytest.fixture(scope="module")
def labeled():
    return monitor()


def test_standardized_knn_forgets_the_scale_of_a_feature():
    """Features of a huge scale that tell nothing hide the others from the cosine, until each is standardised."""

    def noisy(params, images):
        gray = images[:, :3].mean(-1).reshape(len(images), -1)  # of 18 pixels
        return {"cls": jnp.concatenate([1e3 * gray, color_features(PARAMS, images)["cls"]], axis=1)}

    monitors = (monitor(method_features=noisy, standardize=flag) for flag in (False, True))
    plain, standardized = (dict(one.run(None))["eval/knn"] for one in monitors)
    assert standardized > plain + 0.2


def test_monitor_measures_and_names_its_figures(labeled):
    figures = dict(labeled.run(PARAMS))
    assert list(figures) == ["eval/knn", "eval/probe", "eval/view_retrieval", "health/rank", "health/feature_std"]
    assert all(isinstance(value, float) for value in figures.values())
    assert figures["eval/knn"] == 1 and figures["eval/probe"] == 1
    assert 1 < figures["health/rank"] <= 3


def test_monitor_floors_are_the_untrained_encoder_and_pixels(labeled):
    floors = labeled.floors({"gain": jnp.float32(0), "patch_gain": jnp.float32(1)})
    assert set(floors) == {
        "eval/knn_floor_untrained",
        "eval/knn_floor_pixels",
        "eval/knn_floor_whitened",
        "eval/probe_floor_untrained",
        "eval/probe_floor_whitened",
        "eval/view_retrieval_floor_untrained",
        "eval/view_retrieval_floor_pixels",
    }
    assert floors["eval/view_retrieval_floor_untrained"] == pytest.approx(1 / 35)
    assert floors["eval/knn_floor_untrained"] < 0.6  # features are all zero
    assert floors["eval/knn_floor_whitened"] > 0.65  # color is the loudest component
    assert floors["eval/knn_floor_pixels"] < 0.6  # it is exactly what is taken out of these


def test_monitor_without_labels_measures_views_and_health_only():
    unlabeled = monitor(num_classes=0)
    assert set(dict(unlabeled.run(PARAMS))) == {
        "eval/view_retrieval",
        "health/rank",
        "health/feature_std",
    }
    assert set(unlabeled.floors(PARAMS)) == {
        "eval/view_retrieval_floor_untrained",
        "eval/view_retrieval_floor_pixels",
    }


def test_monitor_can_use_patch_tokens():
    blind = {"gain": jnp.float32(0), "patch_gain": jnp.float32(1)}
    assert dict(monitor(tokens="patch").run(blind))["eval/knn"] == 1


def test_monitor_encodes_every_image_once_in_order_with_one_trace():
    traces = []

    def features(params, images):
        traces.append(images.shape)
        return {"cls": images.mean(axis=(1, 2)), "patch": images.reshape(len(images), -1, 3)}

    images = colored(35)
    images["image"][:] = np.arange(35, dtype=np.uint8)[:, None, None, None]
    probe = monitor(method_features=features, test=images, mean=(0, 0, 0), std=(1, 1, 1))
    encoded = probe.encode({}, images)
    np.testing.assert_allclose(encoded[:, 0] * 255, np.arange(35), atol=1e-3)
    first, second = probe.encode_views({})
    np.testing.assert_allclose(first * 255, np.repeat(np.arange(35)[:, None], 3, 1), atol=1e-3)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert len(traces) == 1 and len(set(traces)) == 1


def test_monitor_shows_the_same_views_at_every_call_and_two_different_ones(labeled):
    first, second = labeled.encode_views(PARAMS)
    again, _ = labeled.encode_views(PARAMS)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


# Pictures


def test_attention_threshold_equals_the_official_mask():
    golden = np.load(GOLDEN / "dino_attention_threshold.npz")
    np.testing.assert_array_equal(pictures.attention_threshold(golden["attention"]), golden["mask_060"])
    assert pictures.attention_threshold(golden["attention"], keep=0.1).sum() < golden["mask_060"].sum()


def test_colorize_runs_from_black_to_light_through_purple():
    colors = pictures.colorize(np.array([[-1.0, 0.5, 2.0]]))
    assert colors.tolist() == [[[0, 0, 4], [181, 54, 122], [252, 253, 191]]]
    brightness = pictures.colorize(np.linspace(0, 1, 50)).sum(axis=-1)
    assert (np.diff(brightness.astype(int)) >= 0).all()


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_fit():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(pictures.enlarge(image, 30)), image.repeat(4, 0).repeat(4, 1))
    assert pictures.enlarge(np.zeros((500, 250, 3), np.uint8), 100).size == (50, 100)


def shown(page: Image.Image, image: np.ndarray) -> bool:
    """Whether `image` is somewhere on the page as it is."""
    page_pixels = np.asarray(page)
    windows = np.lib.stride_tricks.sliding_window_view(page_pixels, image.shape)
    return bool((windows[:, :, 0] == image).all(axis=(2, 3, 4)).any())


def test_every_image_is_on_its_page():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 8, 8, 3), np.uint8)
    small = rng.integers(0, 255, (3, 2, 4, 4, 3), np.uint8)
    attention = rng.random((3, 2, 4))
    pages = [
        pictures.image_grid(images, columns=2, side=8, labels=["one", "a very long name for so small an image", "three"]),
        pictures.crop_grid(images, {"global": images[:, None], "local": small}, side=8),
        pictures.attention_maps(attention, (2, 2), images, side=8),
        pictures.neighbors(images, [images[::-1]] * 3, ["a", "b", "c"], [["a", "b", "c"]] * 3, side=8),
    ]
    for page in pages:
        assert all(shown(page, image) for image in images)
    assert all(shown(pages[1], crop) for crop in small.reshape(-1, 4, 4, 3))


def test_neighbors_are_framed_by_whether_they_are_of_the_class_of_the_query():
    image = np.zeros((8, 8, 3), np.uint8)
    page = np.asarray(pictures.neighbors([image], [[image, image]], ["cat"], [["cat", "dog"]], side=8)).reshape(-1, 3)
    for color in (pictures.RIGHT, pictures.WRONG):
        assert (page == color).all(axis=1).sum() == 16 * 16 - 8 * 8
    unlabeled = np.asarray(pictures.neighbors([image], [[image, image]], side=8)).reshape(-1, 3)
    assert not (unlabeled == pictures.RIGHT).all(axis=1).any()


def test_patches_with_equal_features_have_equal_colors():
    """Two kinds of patches, the same two in all images: two colors, wherever they lie."""
    kind = np.random.default_rng(0).integers(0, 2, (3, 4))
    features = np.array([[1.0, 0, 2, 5], [-1.0, 3, 2, 4]])[kind]
    images = np.full((3, 8, 8, 3), 77, np.uint8)
    page = np.asarray(pictures.principal_colors(features, images, columns=3, side=8))
    colors = {tuple(c.tolist()) for c in page.reshape(-1, 3)} - {(77, 77, 77), (255, 255, 255)}
    assert len(colors) == 2 and len({red for red, _, _ in colors}) == 2


def test_patches_that_are_each_others_nearest_are_joined():
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(4, 6))
    order = np.array([2, 0, 3, 1])
    moved = 3.0 * patches[order] + 0.01 * rng.normal(size=(4, 6))  # the length of a feature does not matter
    moved[3] = 2 * moved[2] + moved[3]  # now nearer to patch 3, which has a nearer one: nobody is nearest to patch 1
    here, there, cosines = pictures.mutual_nearest(patches, moved)
    assert {(int(i), int(j)) for i, j in zip(here, there)} == {(2, 0), (0, 1), (3, 2)}
    assert (np.diff(cosines) <= 0).all() and (cosines > 0.99).all()
    views = np.full((1, 2, 8, 8, 3), 90, np.uint8)
    page = np.asarray(pictures.correspondences(np.stack([patches, moved])[None], views, count=1, side=80))
    i, j = here[0], there[0]
    top = 2 * pictures.GAP
    for x, n in ((top, i), (top + 80 + 4 * pictures.GAP, j)):
        assert tuple(page[top + 20 + 40 * (n // 2), x + 20 + 40 * (n % 2)]) == pictures.hsv(0.0)


def test_attention_maps_of_one_image_need_no_batch_axis():
    image, attention = np.full((8, 8, 3), 90, np.uint8), np.random.default_rng(0).random((2, 4))
    one = pictures.attention_maps(attention, (2, 2), image, side=8)
    assert one == pictures.attention_maps(attention[None], (2, 2), image[None], side=8)


def test_masked_patches_are_darkened_and_painted_in():
    """Patch by patch: a 2 x 2 grid whose patches 1 and 2 (row-major) are hidden."""
    images, painted = np.full((1, 8, 8, 3), 10, np.uint8), np.full((1, 8, 8, 3), 200, np.uint8)
    mask = np.array([[False, True, True, False]])
    dark = pictures.darkened(images, mask)[0]
    assert (dark[:4, :4] == 10).all() and (dark[4:, 4:] == 10).all()
    assert (dark[:4, 4:] == pictures.HIDDEN).all() and (dark[4:, :4] == pictures.HIDDEN).all()
    pasted = np.asarray(painted_in(images, painted, mask))
    columns = {"image": images, "masked": dark[None], "painted in": pasted, "all painted": painted}
    page = np.asarray(pictures.reconstructions(columns, side=8))
    rows = np.flatnonzero((page == 10).all(-1).any(1))
    line = page[rows[0]]  # the upper halves of the four
    levels = [int(level) for level, before in zip(line[1:, 0], line[:-1, 0]) if level != before and level != 255]
    assert levels == [10, 10, pictures.HIDDEN, 10, 200, 200]
