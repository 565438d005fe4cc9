"""Evaluators: k-NN and attention masks against the official numbers, the rest against cases with a known answer."""

import base64
import contextlib
import dataclasses
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import NamedSharding
from PIL import Image, ImageColor

from mim_jax import health, journal, load_config, make_method, report, sharding, similarity, train
from mim_jax.data import pipeline
from mim_jax.data.augment import Crops, Policy, Target, augment, center_crop
from mim_jax.data.sources import ArraySource
from mim_jax.evaluators import Evaluation, mistakes, pictures, probe
from mim_jax.evaluators.knn import knn_accuracy, knn_scores, pixel_features, whitened_features
from mim_jax.evaluators.probe import probe_accuracy, standardize
from mim_jax.evaluators.retrieval import view_retrieval
from mim_jax.masking import RandomMask
from mim_jax.methods.base import Method, Tokenizer
from mim_jax.models.layers import fill_masked
from mim_jax.state import TrainState, abstract_state
from mim_jax.views import Views

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
        knn_scores(jnp.ones((5, 2)), jnp.zeros(5, int), jnp.ones((1, 2)), 2, 20, 0.07)


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
    penalties = [1e-8, 1e-1, 1.0]
    assert (chosen := probe_accuracy(bank, bank_labels, test, labels, 2, penalties)) > free + 0.05
    # Wrong labels of the queries change no penalty: the one that is best for them is the worst for the bank.
    assert probe_accuracy(bank, bank_labels, test, 1 - labels, 2, penalties) == pytest.approx(1 - chosen)


def test_whitening_and_probe_work_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    bank, test = (rng.normal(size=(count, 12)).astype(np.float32) * np.arange(1, 13) + 5 for count in (500, 90))
    bank_labels, labels = (np.argmax(x[:, :3], axis=1) for x in (bank, test))
    whole = *whitened_features(bank, test, 6), *standardize(bank, test), probe_accuracy(bank, bank_labels, test, labels, 3)
    monkeypatch.setattr(probe, "BLOCK", 64)
    parts = *whitened_features(bank, test, 6), *standardize(bank, test), probe_accuracy(bank, bank_labels, test, labels, 3)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(parts[2], (bank - bank.mean(0)) / bank.std(0), rtol=1e-4, atol=1e-4)


def test_whitening_and_probe_keep_no_copy_of_the_bank_in_double_precision():
    bank, pixels = np.zeros((50_000, 64), np.float32), np.zeros((50_000, 96), np.uint8)
    bank[:, 0] = labels = np.arange(50_000) % 500
    pixels[:, 0] = np.arange(50_000) % 7
    tracemalloc.start()
    probe_accuracy(bank, labels, bank[:9], labels[:9], 500)
    assert tracemalloc.get_traced_memory()[1] < 8 * probe.BLOCK * (64 + 500) * 4  # bytes; one-hot labels alone were 200 MB
    tracemalloc.clear_traces()
    whitened_features(pixels, pixels[:9], dims=2)
    assert tracemalloc.get_traced_memory()[1] < 2 * pixels.nbytes
    tracemalloc.stop()


def test_probe_learns_from_the_whole_bank():
    """Also from the images on which its penalty is chosen, the last fifth, which alone hold one of the classes."""
    labels = np.array([0, 1] * 40 + [2] * 20)
    features = np.eye(3)[labels]
    assert probe_accuracy(features, labels, features[-9:], labels[-9:], 3) == 1


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


# The evaluation, on images whose class is their color


def colored(count, seed=0, description="train", num_classes=3, size=8):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(count) % 3).astype(np.int32)
    image = rng.integers(0, 120, (count, size, size, 3), np.uint8)
    image[np.arange(count), :, :, label] += 120
    return ArraySource(image, label, num_classes, description)


def color_features(params, images):
    """Mean color as CLS, and each pixel as a patch."""
    patches = images.reshape(images.shape[0], -1, 3)
    return {"cls": patches.mean(axis=1) * params["gain"], "patch": patches * params["patch_gain"]}


def noise_features(params, images):
    """Features that two pictures share only if they are equal."""
    noise = jnp.sin(1e3 * images.reshape(len(images), -1))
    return {"cls": noise, "patch": noise[:, None]}


CROPS = Crops("global", 6, (0.5, 1.0), (Policy(jitter=0, gray=0, blur=0),) * 2)
VIEWS = Views((CROPS,), (0.5,) * 3, (0.25,) * 3)


def evaluation(method=color_features, source=None, held_out=None, views=VIEWS, **settings):
    """Of a method, or of what has these features and views."""
    data = {"canvas": 12, "levels": None, "max_pixels": 2**26}
    config = ml_collections.ConfigDict({"seed": 0, "data": data, "model": {"img_size": 6}})
    config.eval = {"bank": 50, "test": 35, "batch_size": 16, "img_size": None, "resize": 1.0, "tokens": "cls"}
    config.eval.standardize = False
    config.eval.update(settings)
    source, held_out = source or colored(50), held_out or colored(35, seed=1, description="test")
    if not isinstance(method, Method):
        method = SimpleNamespace(features=method, views=views, pictures=(), num_classes=0)
    return Evaluation(config, method, source, held_out)


def test_a_divided_source_that_has_images_several_times():
    class Twice(type(colored(60))):
        def name(self, row):
            return f"image {row // 2}"

    made = evaluation(source=(source := Twice(**vars(colored(60)))), held_out=source)
    bank, test = ({row // 2 for row in rows.tolist()} for rows in (made.bank_rows, made.test_rows))
    assert len(made.test_rows) == 12 and len(made.bank_rows) > 30 and not bank & test


def state_of(gain, patch_gain=0.0, **changes):
    params = {"gain": jnp.float32(gain), "patch_gain": jnp.float32(patch_gain)}
    return TrainState(jnp.int32(0), params, {}, (), {}).replace(**changes)


SEES, BLIND = state_of(1), state_of(0, 1)
WITHOUT_LABELS = {"eval/view_retrieval", "eval/view_retrieval_error", "health/rank", "health/feature_std"}


@pytest.fixture(scope="module")
def labeled():
    return evaluation()


def test_standardized_knn_forgets_the_scale_of_a_feature():
    """Features of a huge scale that tell nothing hide the others from the cosine, until each is standardized."""

    def noisy(params, images):
        gray = images[:, :3].mean(-1).reshape(len(images), -1)  # of 18 pixels
        return {"cls": jnp.concatenate([1e3 * gray, color_features(params, images)["cls"]], axis=1)}

    plain, standardized = (evaluation(noisy, standardize=flag).scores(SEES)["eval/knn"] for flag in (False, True))
    assert standardized > plain + 0.2


def test_scores_and_their_names(labeled):
    scores = labeled.scores(SEES)
    shares, health_ = ["eval/knn", "eval/probe", "eval/view_retrieval"], ["health/rank", "health/feature_std"]
    assert list(scores) == [*shares, *(f"{share}_error" for share in shares), *health_]
    assert all(isinstance(value, float) for value in scores.values())
    assert scores["eval/knn"] == 1 and scores["eval/probe"] == 1
    assert 1 < scores["health/rank"] <= 3
    assert labeled.sizes == (50, 35)


def test_baselines_are_the_untrained_encoder_and_pixels(labeled):
    baselines = labeled.baselines(BLIND)
    assert set(baselines) == {
        "eval/knn_baseline_untrained",
        "eval/knn_baseline_pixels",
        "eval/knn_baseline_whitened",
        "eval/probe_baseline_untrained",
        "eval/probe_baseline_whitened",
        "eval/view_retrieval_baseline_untrained",
        "eval/view_retrieval_baseline_pixels",
    }
    assert baselines["eval/view_retrieval_baseline_untrained"] == pytest.approx(1 / 35)
    assert baselines["eval/knn_baseline_untrained"] < 0.6  # features are all zero
    assert baselines["eval/knn_baseline_whitened"] > 0.65  # color is the loudest component
    assert baselines["eval/knn_baseline_pixels"] < 0.6  # it is exactly what is taken out of these


def test_images_without_labels_measure_views_and_health_only():
    unlabeled = evaluation(source=colored(50, num_classes=0))
    assert set(unlabeled.scores(SEES)) == WITHOUT_LABELS and not unlabeled.few_labels(SEES) and not unlabeled.mistakes(SEES)
    assert set(unlabeled.baselines(SEES)) == {
        "eval/view_retrieval_baseline_untrained",
        "eval/view_retrieval_baseline_pixels",
    }


def test_labels_are_compared_only_where_they_are_the_same():
    def sourced(classes, count=50, description="train"):
        return dataclasses.replace(colored(count, description=description, num_classes=len(classes)), classes=classes)

    for classes, others, why in (
        ("abc", "", "the training images have 3 classes (a, b, c, ...), the held-out images no labels"),
        ("abc", "xyz", "the training images have 3 classes (a, b, c, ...), the held-out images 3 classes (x, y, z, ...)"),
        ("", "abc", "the training images have no labels, the held-out images 3 classes (a, b, c, ...)"),
        ("", "", "the images have no labels"),
    ):
        compared = evaluation(source=sourced(classes), held_out=sourced(others, 35, "test"))
        assert compared.unlabeled == f"no k-NN and no probe: {why}"
        assert compared.num_classes == 0
        if others == "xyz":
            assert set(compared.scores(SEES)) == WITHOUT_LABELS
            assert all("view_retrieval" in name for name in compared.baselines(SEES))
    assert not evaluation(source=sourced("abc"), held_out=sourced("abc", 35, "test")).unlabeled
    assert not evaluation(source=sourced("abc")).unlabeled  # names of one of them only


def test_too_few_images_say_how_many_are_needed():
    few = colored(4)
    with pytest.raises(ValueError, match="4 images are too few to be evaluated on, 5 are needed"):
        evaluation(source=few, held_out=few)


def test_knn_asks_20_neighbors_at_the_temperature_of_dino(monkeypatch):
    """As the published scores do; or all of a smaller bank."""
    asked = []
    monkeypatch.setattr("mim_jax.evaluators.knn_accuracy", lambda *args: (asked.append(args[4:]), (0.0, 0.0))[1])
    for bank in (50, 9):
        evaluation(bank=bank).scores(SEES)
    assert asked == [(3, 20, 0.07), (3, 9, 0.07)]


def test_patch_tokens():
    assert evaluation(tokens="patch").scores(BLIND)["eval/knn"] == 1


def test_the_teacher_is_evaluated_where_there_is_one(labeled):
    student, teacher = {"gain": jnp.float32(0), "patch_gain": jnp.float32(0)}, SEES.params
    for measure in (labeled.scores, labeled.baselines):
        assert measure(state_of(0, params=student, teacher=teacher)) == measure(SEES) != measure(state_of(0))
    drawn = dict(labeled.pictures(state_of(0, params=student, teacher=teacher), {}))["neighbors"]
    assert drawn == dict(labeled.pictures(SEES, {}))["neighbors"]


def test_neither_an_image_nor_a_view_is_compared_with_itself():
    """Features of noise find nothing: labels are drawn at random, and two views of an image have nothing in common."""
    source = colored(300, description="all")
    source = dataclasses.replace(source, labels=np.random.default_rng(5).integers(0, 3, 300).astype(np.int32))
    one = evaluation(noise_features, source=source, held_out=source, bank=200, test=60)
    scores = one.scores(SEES)
    assert scores["eval/knn"] < 0.6 and scores["eval/view_retrieval"] < 0.2


def test_one_split_is_divided_and_two_are_not():
    source = colored(300, description="all")
    one = evaluation(source=source, held_out=source, bank=1000, test=100)
    assert one.sizes == (240, 60)
    assert sorted([*one.bank_rows, *one.test_rows]) == list(range(300))
    np.testing.assert_array_equal(one.test_rows, pipeline.choose(source, 300, 0)[:60])
    two = evaluation(source=source, held_out=colored(300, description="other"), bank=1000, test=100)
    assert two.sizes == (300, 100)


def test_the_rows_are_those_of_the_published_scores():
    assert pipeline.choose(range(50_000), 5, 0).tolist() == [32006, 13422, 49000, 16814, 29790]
    assert len(set(pipeline.choose(range(300), 100, 1).tolist())) == 100
    assert pipeline.choose(range(300), 100, 1).tolist() != pipeline.choose(range(300), 100, 2).tolist()
    assert sorted(pipeline.choose(range(70), 1000, 0).tolist()) == list(range(70))


@pytest.mark.parametrize("mesh", [False, True])
def test_every_image_is_encoded_once_in_order_with_one_trace(mesh):
    traces = []

    def features(params, images):
        traces.append(images.shape)
        return {"cls": images.mean(axis=(1, 2)), "patch": images.reshape(len(images), -1, 3)}

    source, held_out = colored(50), colored(35, description="test")
    for images in (source.images, held_out.images):
        images[:] = np.arange(len(images), dtype=np.uint8)[:, None, None, None]
    one = evaluation(features, source, held_out)
    with jax.set_mesh(sharding.make_mesh()) if mesh else contextlib.nullcontext():
        for _ in range(2):
            bank, test = one.encode(SEES)
    for found, rows in ((bank, one.bank_rows), (test, one.test_rows)):
        for name in found.keys() - {"label"}:
            np.testing.assert_allclose((found[name] * 0.25 + 0.5) * 255, np.repeat(rows[:, None], 3, 1), atol=1e-3)
    np.testing.assert_array_equal(test["label"], held_out.labels[one.test_rows])
    assert traces == [(16, 6, 6, 3)]


def all_pixels(params, images):
    return {"cls": images.reshape(len(images), -1)}


def test_pictures_are_cut_from_the_middle_and_views_follow_seed_and_place():
    """The views are the same at every call: those of the published scores."""
    one = evaluation(all_pixels, resize=0.5)
    images = one.held_out.images[one.test_rows]
    batch = {"image": images, "size": np.full((35, 2), 8), "index": np.arange(35)}
    views = augment(batch, [CROPS], jax.random.key(0), VIEWS.mean, VIEWS.std)["global"].reshape(35, 2, -1)
    middle = center_crop(images, batch["size"], 6, 0.5, VIEWS.mean, VIEWS.std).reshape(35, -1)
    for _ in range(2):
        test = one.encode(SEES)[1]
        for got, want in ((test["features"], middle), (test["view_1"], views[:, 0]), (test["view_2"], views[:, 1])):
            # Compiled for another batch size, additions have another order: a value on the edge gets the level beside.
            assert np.mean(np.abs(got - want) > 1e-5) < 0.01
    assert np.abs(test["view_1"] - test["view_2"]).max() > 0.1


def test_pixels_of_small_crops_are_as_they_are_and_large_ones_are_reduced():
    """The views of view retrieval, too: PCA and retrieval never see more than 32 x 32 pixels."""
    bank, test = evaluation(all_pixels).encode(SEES, pixels=True)
    for images, features in (("pixels", "features"), ("pixels_1", "view_1"), ("pixels_2", "view_2")):
        assert test[images].dtype == np.uint8
        np.testing.assert_allclose(test[images].reshape(35, -1), (test[features] * 0.25 + 0.5) * 255, atol=1e-3)
    large = dataclasses.replace(VIEWS, crops=(dataclasses.replace(CROPS, size=64),))
    bank, test = evaluation(views=large, img_size=48, bank=9, test=5).encode(SEES, pixels=True)
    assert bank["pixels"].shape == (9, 32, 32, 3)
    assert test["pixels"].shape == test["pixels_1"].shape == test["pixels_2"].shape == (5, 32, 32, 3)
    color = test["pixels_2"].mean(axis=(1, 2))
    np.testing.assert_allclose(color, (test["view_2"] * 0.25 + 0.5) * 255, atol=2)


def test_a_bad_image_is_replaced_with_its_label_and_on_the_picture(monkeypatch):
    class Holey(ArraySource):
        def __getitem__(self, row):
            if row % 7 == 0:
                raise OSError("no such file")
            return super().__getitem__(row)

    source = Holey(**vars(colored(50)))
    monkeypatch.setattr(pipeline, "ArraySource", str)  # so that images are read one by one
    one, shown = evaluation(source=source), {}
    assert one.scores(SEES)["eval/probe"] == 1
    monkeypatch.setattr(pictures, "neighbors", lambda *args: shown.update(found=args[1]))
    list(one.pictures(SEES, {}))
    good = [image.tolist() for row, image in enumerate(source.images) if row % 7]
    assert all(image.tolist() in good for row in shown["found"] for image in row)


def test_too_few_images_to_divide():
    source = colored(4)
    with pytest.raises(ValueError, match="train: 4 images are too few"):
        evaluation(source=source, held_out=source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Tokenizer):
    """Has all pictures; patches of 2 x 2 pixels."""

    codes: int = 4
    stride: int = 2
    pictures: tuple[str, ...] = ("attention", "features", "reconstruction", "tokens")

    def features(self, params, images):
        patch = images[:, ::2, ::2].reshape(len(images), -1, 3) * params["gain"]
        return {"cls": patch.mean(axis=1), "patch": patch}

    def attention(self, params, images):
        return jnp.abs(self.features(params, images)["patch"][..., :2]).transpose(0, 2, 1)

    def tokens(self, parts, images):
        return jnp.abs(images[:, ::2, ::2, 0] * parts["gain"] + parts["shift"]).reshape(len(images), -1).astype(jnp.int32) % 4

    def reconstruction(self, params, extra, target, views):
        gray = views["global"].mean(axis=-1, keepdims=True) * params["gain"] * target["gain"]
        assert views["target"].shape[2] == 4 and views["mask"].shape[1:] == (1, 9)
        return {"z gray": jnp.broadcast_to(gray, views["global"].shape), "a half": views["global"] / 2}


@pytest.fixture(scope="module")
def everything():
    views = dataclasses.replace(VIEWS, crops=(dataclasses.replace(CROPS, target=Target(4)),), masks=RandomMask((3, 3), 4))
    return evaluation(Everything(views=views), dataclasses.replace(colored(50), classes=("red", "green", "blue")))


def test_nothing_is_compiled_after_the_first_evaluation(everything, caplog):
    def evaluate(gain):
        state = state_of(gain, extra={"shift": jnp.float32(1)})
        return everything.scores(state), dict(everything.pictures(state, {"gain": jnp.float32(1)}))

    with jax.set_mesh(sharding.make_mesh()), jax.log_compiles():
        scores, drawn = evaluate(1.0)
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        again, redrawn = evaluate(0.5)
        assert "ompil" not in caplog.text
    names = ["reconstruction", "tokens", "attention", "features", "correspondences", "neighbors"]
    assert list(drawn) == list(redrawn) == names
    assert drawn["reconstruction"] != redrawn["reconstruction"]


def test_similarity_of_patches_in_the_report(everything, tmp_path):
    """Products of the kept numbers are cosines of the patches of the images shown; the page has all of it."""
    state = state_of(2, extra={"shift": jnp.float32(1)})
    found = everything.similarity(state)
    assert (found["grid"], len(found["images"])) == (6, 8) and len(json.dumps(found)) < 100_000
    numbers = np.frombuffer(base64.b64decode(found["features"]), np.int8).reshape(-1, found["dim"]).astype(int)
    shown = [Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) for address in found["images"]]
    colors = np.stack([np.asarray(image)[::2, ::2] for image in shown]).reshape(-1, 3) / 127.5 - 1  # twice the features
    unit = colors / np.linalg.norm(colors, axis=1, keepdims=True)
    assert np.median(np.abs(numbers @ numbers.T / found["scale"] ** 2 - unit @ unit.T)) < 0.02 and found["error"] < 0.02
    (tmp_path / "pictures").mkdir()
    (tmp_path / report.SIMILARITY).write_text(json.dumps(found))
    page = report.write_report(
        tmp_path, journal.History(), title="", config="", verdict=health.verdict({}), facts={}
    ).read_text()
    assert page.count('class="field"') == 8 and found["features"] in page and similarity.SCRIPT in page
    assert not evaluation().similarity(state)  # a method that shows no features


def test_pictures_show_what_the_state_makes_of_the_held_out_images(everything, monkeypatch):
    """Each column of the reconstruction in the method's order, all tokens of all images, each image with its own masks."""
    shown = {}
    for name in ("reconstructions", "usage", "attention_maps", "neighbors", "crop_grid"):
        monkeypatch.setattr(pictures, name, lambda *args, name=name: shown.update({name: args}))
    state = state_of(2, extra={"shift": jnp.float32(1)})
    list(everything.pictures(state, {"gain": jnp.float32(0.5)}))
    images = everything.held_out.images[everything.test_rows]
    (columns,) = shown["reconstructions"]
    assert list(columns) == ["image", "mask", "z gray", "a half"]
    mask = everything.method.views.example_masks(16, 1)["mask"][:, 0]
    np.testing.assert_array_equal(columns["mask"], pictures.darkened(columns["image"], mask))
    gray = np.asarray(columns["image"], float).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(columns["z gray"], np.broadcast_to(gray, columns["image"].shape), atol=1)
    assert shown["usage"][0].sum() == 35 * 9 and len(shown["usage"][0]) == 4
    attention, grid, attended = shown["attention_maps"]
    assert attention.shape == (4, 2, 36) and grid == (6, 6) and attended.shape == (4, 12, 12, 3)
    queries, found, names, found_names = shown["neighbors"]
    np.testing.assert_array_equal(queries, images[:8])
    assert names == [row[0] for row in found_names]  # the nearest has the color of the query
    bank = everything.source.images.tolist()
    for image, name in zip(found[3], found_names[3], strict=True):
        row = bank.index(image.tolist())
        assert everything.source.classes[everything.source.labels[row]] == name
    everything.crop_picture()
    originals, crops = shown["crop_grid"]
    np.testing.assert_array_equal(originals, everything.source.images[everything.bank_rows[:6]])
    assert {name: crop.shape for name, crop in crops.items()} == {"global": (6, 2, 6, 6, 3), "mask": (6, 2, 6, 6, 3)}


# Classifiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colors(Method):
    """Its head's scores are the mean color, black for further classes, and a bias."""

    views: Views = VIEWS
    num_classes: int = 3

    def features(self, params, images):
        return color_features(params, images)

    def class_scores(self, params, extra, images):
        color = images.mean(axis=(1, 2)) * params["gain"]
        return jnp.pad(color, ((0, 0), (0, self.num_classes - 3))) + extra["bias"]


def classifier(gain, bias, **changes):
    return state_of(gain, extra={"bias": jnp.array(bias, jnp.float32)}, **changes)


KNOWS, FIRST = classifier(1, [0, 0, 0]), classifier(0.01, [1, 0, 0])  # the second calls everything red


def named(count=50, seed=0, description="train"):
    return dataclasses.replace(colored(count, seed, description), classes=("red", "green", "blue"))


@pytest.fixture(scope="module")
def classifies():
    """Held out are 20 red, 10 green and 5 blue images."""
    source, held_out = named(100), named(105, 1, "test")
    rows = np.concatenate([np.flatnonzero(held_out.labels == label)[:count] for label, count in enumerate((20, 10, 5))])
    held_out = dataclasses.replace(held_out, images=held_out.images[rows], labels=held_out.labels[rows])
    return evaluation(Colors(), source, held_out, bank=100)


def test_the_head_is_measured_on_held_out_images(classifies):
    scores = classifies.scores(KNOWS)
    assert scores["eval/accuracy"] == scores["eval/accuracy_class_mean"] == scores["eval/accuracy_worst_class"] == 1
    assert scores["eval/accuracy_error"] == 0 and "eval/accuracy_top5" not in scores
    scores = classifies.scores(FIRST)
    assert scores["eval/accuracy"] == pytest.approx(20 / 35) and scores["eval/accuracy_class_mean"] == pytest.approx(1 / 3)
    assert scores["eval/accuracy_error"] == pytest.approx(np.sqrt(20 / 35 * 15 / 35 / 35))
    assert scores["eval/accuracy_worst_class"] == 0


def test_the_head_of_the_teacher_is_measured_where_there_is_one(classifies):
    state = classifier(0, [0, 0, 0], teacher=KNOWS.params)
    assert classifies.scores(state)["eval/accuracy"] == 1 > classifies.scores(classifier(0, [0, 0, 0]))["eval/accuracy"]


def test_baselines_of_a_head_are_the_largest_class_and_the_untrained_head(classifies):
    baselines = classifies.baselines(classifier(0, [0, 1, 0]))
    assert baselines["eval/accuracy_baseline_majority"] == pytest.approx(20 / 35)  # of the held-out images, not of the bank
    assert baselines["eval/accuracy_baseline_untrained"] == pytest.approx(10 / 35)


def test_the_five_best_classes_of_more_than_five():
    many = evaluation(Colors(num_classes=7), colored(50, num_classes=7), colored(35, 1, "test", 7))
    scores = many.scores(classifier(0, [1, 0, 0, 5, 4, 3, 2]))  # red is the fifth
    reds = np.mean(many.held_out.labels == 0)
    assert scores["eval/accuracy"] == 0 and scores["eval/accuracy_top5"] == pytest.approx(reds)


def test_errors_count_the_images_that_could_be_read(monkeypatch):
    class Holey(ArraySource):
        def __getitem__(self, row):
            if row % 7 == 0:
                raise OSError("no such file")
            return super().__getitem__(row)

    monkeypatch.setattr(pipeline, "ArraySource", str)  # so that images are read one by one
    one = evaluation(Colors(), named(), Holey(**vars(named(35, 1, "test"))))
    scores = one.scores(FIRST)
    assert one.good == 30
    for tag in ("accuracy", "knn", "probe", "view_retrieval"):
        share = scores[f"eval/{tag}"]
        assert scores[f"eval/{tag}_error"] == pytest.approx(np.sqrt(share * (1 - share) / 30))
    assert scores["eval/accuracy"] not in (0, 1)


def test_a_head_is_measured_only_with_labels_of_its_classes():
    with pytest.raises(ValueError, match="the method has 4 classes, but train has 3"):
        evaluation(Colors(num_classes=4))
    unlabeled = evaluation(Colors(), held_out=colored(35, 1, "test", num_classes=0))
    assert unlabeled.unlabeled.startswith("no k-NN, no probe and no accuracy: the training images have 3 classes")
    assert set(unlabeled.scores(KNOWS)) == WITHOUT_LABELS
    assert [name for name, _ in unlabeled.pictures(KNOWS, {})] == ["neighbors"]


def test_a_head_that_is_measured_on_its_training_images_says_so(classifies):
    source = named(100)
    assert "on images that are trained on" in evaluation(Colors(), source, source).warning
    assert not classifies.warning and not evaluation(source=source, held_out=source).warning


def test_held_out_images_of_unknown_label_are_wrong_and_of_no_class():
    held_out = named(35, 1, "test")
    held_out = dataclasses.replace(held_out, labels=np.where(np.arange(35) < 5, -1, held_out.labels))
    one = evaluation(Colors(), named(), held_out)
    scores = one.scores(KNOWS)
    assert scores["eval/accuracy"] == pytest.approx(30 / 35) and scores["eval/accuracy_class_mean"] == 1
    assert sum(images for _, _, images in one.mistakes(KNOWS)["classes"]) == 30
    assert [name for name, _ in one.pictures(KNOWS, {})] == ["neighbors", "confusion"]  # no mistakes


def test_a_probe_with_few_labels(classifies, monkeypatch):
    bank, test = classifies.encode(KNOWS)
    figures = classifies.few_labels(KNOWS)
    assert list(figures) == ["eval/probe_5_percent", "eval/probe_10_percent"]  # 1 % is one image, fewer than classes
    for tag, count in (("eval/probe_5_percent", 5), ("eval/probe_10_percent", 10)):
        few = bank["features"][:count], bank["label"][:count]
        assert figures[tag] == probe_accuracy(*few, test["features"], test["label"], 3)
    classifies.scores(FIRST)
    monkeypatch.setattr(classifies, "encode", None)  # the features are those of the scores
    assert list(classifies.few_labels(FIRST)) == list(figures)


def test_confusions_and_mistakes_are_drawn(classifies, monkeypatch):
    shown = {}
    for name in ("confusion", "mistakes"):
        monkeypatch.setattr(pictures, name, lambda *args, name=name: shown.update({name: args}))
    classifies.scores(FIRST)
    assert [name for name, _ in classifies.pictures(FIRST, {})] == ["neighbors", "confusion", "mistakes"]
    counts, names = shown["confusion"]
    assert counts.tolist() == [[20, 0, 0], [10, 0, 0], [5, 0, 0]] and names == ["red", "green", "blue"]
    images, truths, answers = shown["mistakes"]
    rows = [row for row in classifies.test_rows if classifies.held_out.labels[row]]
    np.testing.assert_array_equal(images, classifies.held_out.images[rows])
    assert truths == [names[classifies.held_out.labels[row]] for row in rows] and answers == ["red"] * 15


def test_an_evaluation_of_a_classifier_on_the_page_and_in_the_last_lines(classifies, tmp_path):
    state = classifier(0.1, [1, 0, 0])
    for last in (False, True):
        figures, drawn, beside = train.evaluate(classifies, state, {}, last)
        assert ("eval/probe_10_percent" in figures) == last
    assert list(beside) == [report.MISTAKES]
    found = beside[report.MISTAKES]
    assert found["classes"][0] == ["green", figures["eval/accuracy_worst_class"], 10]
    assert found["pairs"][0][:2] == ["green", "red"] and found["pairs"][0][3] == 10
    with journal.Journal(tmp_path, 10) as log:
        log.write(0, classifies.baselines(FIRST))
        log.write(10, figures | {"eval/accuracy": 0.625, "eval/accuracy_error": 0.012})
        for name, picture in drawn:
            log.picture(10, name, picture)
        log.save(report.MISTAKES, json.dumps(found).encode())
        verdict = health.verdict(log.history.latest, images=1000)
        page = report.write_report(tmp_path, log.history, title="", config="", verdict=verdict, facts={}).read_text()
        lines = train.scores(log.history.latest).splitlines()
    assert lines[0] == "accuracy        0.625 (0.012)  baselines: untrained 0.571, majority 0.571"
    assert [line[:15].rstrip() for line in lines[1:]] == ["k-NN", "linear probe", "view retrieval"]
    assert verdict.status == "healthy" and "accuracy 0.625 (majority 0.571)" in verdict.sentence
    for text in (
        '<p class="value">0.625 <small>± 0.012</small></p>', "<b>0.571</b> largest class", "<h3>Confusions</h3>",
        "<h3>Mistakes</h3>", "<td>10 %</td>", "<td>green</td><td>red</td><td>10 of 10</td>", "<h3>Worst classes</h3>",
    ):  # fmt: skip
        assert text in page
    assert "<td>1 %</td>" not in page and "eval/accuracy_error" not in page


def test_classes_and_pairs_in_order():
    labels, answers = np.array([0, 0, 0, 0, 1, 1, 3, 3, 3]), np.array([0, 0, 0, 3, 0, 0, 0, 0, 3])
    accuracy, images = mistakes.class_accuracy(labels, answers, 4)
    np.testing.assert_allclose(accuracy, [3 / 4, 0, np.nan, 1 / 3])
    assert images.tolist() == [4, 2, 0, 3]
    assert mistakes.confusion(labels, answers, 4).tolist() == [[3, 0, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 1]]
    assert mistakes.summary(labels, answers, list("abcd")) == {
        "classes": [["b", 0.0, 2], ["d", 1 / 3, 3], ["a", 0.75, 4]],
        "pairs": [["b", "a", 2, 2], ["d", "a", 2, 3], ["a", "d", 1, 4]],
    }
    assert mistakes.confused_pairs(labels, labels) == []
    several = np.arange(400) % 20
    assert len(mistakes.summary(several, (several + 1) % 20, list(map(str, range(20))))["pairs"]) == mistakes.SHOWN


def test_a_confusion_matrix_is_drawn_by_row():
    counts = np.array([[8, 0, 2], [0, 0, 0], [0, 0, 50]])
    page = np.asarray(pictures.confusion(counts, ["cat", "dog", "a name that is much too long"]))
    cell = 48
    top, left = np.argwhere((page == pictures.colorize(np.sqrt(0.8))).all(-1))[0]
    for row, column, color in (
        (0, 1, pictures.colorize(np.array(0.0))), (0, 2, pictures.colorize(np.sqrt(0.2))), (1, 0, pictures.HIDDEN),
        (1, 2, pictures.HIDDEN), (2, 0, pictures.colorize(np.array(0.0))), (2, 2, pictures.colorize(np.array(1.0))),
    ):  # fmt: skip
        assert (page[top + row * cell + 2, left + column * cell + 2] == color).all()
    many = pictures.confusion(np.eye(500, dtype=int), list(map(str, range(500))))
    assert 500 < many.width < 600


# Memory, of what is compiled for ImageNet: 50,000 + 10,000 images of 518 px


def device_bytes(lowered):
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@dataclasses.dataclass
class Unread:
    """A source of which only the length is asked."""

    description: str
    count: int

    def __len__(self):
        return self.count


@pytest.mark.slow
def test_evaluation_of_a_large_vit_at_518_px_takes_less_than_2_gib_of_a_device_beyond_the_model():
    config = load_config("dinov2:vitl14_518")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        method = make_method(config)
        one = Evaluation(config, method, Unread("train", 1_281_167), Unread("validation", 50_000))
        assert one.sizes == (50_000, 10_000)
        params = {"backbone": abstract_state(method, config).teacher["backbone"]}
        model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        size = one.batch_size(50_000, 518)
        assert size == 8 * 3

        def rows(shape, dtype):
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=NamedSharding(mesh, sharding.BATCH))

        batch = {name: rows(x.shape[1:], x.dtype) for name, x in method.views.batch_shapes(1, config.data.canvas).items()}
        batch["place"], images = rows((), jnp.int32), rows((518, 518, 3), jnp.float32)
        programs = [one._picture.lower(batch), one._views.lower(batch), one._small_view.lower(images)]
        held = sum(map(device_bytes, programs))  # as if they lay there together
        for program in (one._features.lower(params, images), one._attention.lower(params, batch)):
            assert device_bytes(program) - model + held < 2**30


@pytest.mark.parametrize("width", [1536, 3072])  # of a ViT-g's features, and of pixels
def test_comparing_60_000_features_takes_less_than_2_gib_of_a_device(width):
    bank, test = (jax.ShapeDtypeStruct((count, width), jnp.float32) for count in (50_000, 10_000))
    labels = jax.ShapeDtypeStruct((50_000,), jnp.int32)
    assert device_bytes(knn_scores.lower(bank, labels, test, 1000, 20, 0.07)) < 1.75 * 2**30
    assert device_bytes(view_retrieval.lower(test, test)) < 2**30
    assert width > 2048 or device_bytes(jax.jit(health.rank_me).lower(test)) < 2**30


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
        pictures.crop_grid(images, {"global": images[:, None], "local": small}, side=8),
        pictures.attention_maps(attention, (2, 2), images, side=8),
        pictures.neighbors(images, [images[::-1]] * 3, ["a", "b", "c"], [["a", "b", "c"]] * 3, side=8),
        pictures.mistakes(images, ["a", "b", "c"], ["b", "c", "a"], columns=2, side=8),
    ]
    for page in pages:
        assert all(shown(page, image) for image in images)
    assert all(shown(pages[0], crop) for crop in small.reshape(-1, 4, 4, 3))


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
        assert tuple(page[top + 20 + 40 * (n // 2), x + 20 + 40 * (n % 2)]) == ImageColor.getrgb("hsv(0, 85%, 95%)")


def test_attention_maps_of_one_image_need_no_batch_axis():
    image, attention = np.full((8, 8, 3), 90, np.uint8), np.random.default_rng(0).random((2, 4))
    one = pictures.attention_maps(attention, (2, 2), image, side=8)
    assert one == pictures.attention_maps(attention[None], (2, 2), image[None], side=8)


def test_masked_patches_are_darkened_and_filled():
    """Patch by patch: a 2 x 2 grid whose patches 1 and 2 (row-major) are hidden."""
    images, predicted = np.full((1, 8, 8, 3), 10, np.uint8), np.full((1, 8, 8, 3), 200, np.uint8)
    mask = np.array([[False, True, True, False]])
    dark = pictures.darkened(images, mask)[0]
    assert (dark[:4, :4] == 10).all() and (dark[4:, 4:] == 10).all()
    assert (dark[:4, 4:] == pictures.HIDDEN).all() and (dark[4:, :4] == pictures.HIDDEN).all()
    filled = np.asarray(fill_masked(images, predicted, mask))
    columns = {"image": images, "masked": dark[None], "masked predicted": filled, "all predicted": predicted}
    page = np.asarray(pictures.reconstructions(columns, side=8))
    rows = np.flatnonzero((page == 10).all(-1).any(1))
    line = page[rows[0]]  # the upper halves of the four
    levels = [int(level) for level, before in zip(line[1:, 0], line[:-1, 0]) if level != before and level != 255]
    assert levels == [10, 10, pictures.HIDDEN, 10, 200, 200]
