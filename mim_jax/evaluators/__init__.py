"""What the features are worth during training: k-NN, linear probe and view retrieval, each beside its baselines, and pictures;
of a classifier also the accuracy of its head, of a run with `continue_from` also patch retrieval and how far its start is.

Images are read again at every evaluation, batch by batch, and only features are kept: a host holds 4 bytes for each
number of a feature, a device works on `PIXELS` at a time.
"""

import dataclasses
import functools
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from mim_jax import health, similarity
from mim_jax.data import pipeline
from mim_jax.data.augment import augment, center_crop, denormalize
from mim_jax.data.sources import Source
from mim_jax.evaluators import mistakes, pictures
from mim_jax.evaluators.knn import knn_accuracy, pixel_features, whitened_features
from mim_jax.evaluators.probe import probe_accuracy, standardize
from mim_jax.evaluators.retrieval import patch_retrieval, view_retrieval
from mim_jax.methods.base import BackboneMethod, Method
from mim_jax.sharding import global_batch, pin_batch, replicate, share
from mim_jax.state import TrainState

BASELINE_SIZE = 32  # side at which plain pixels are measured, at most: PCA needs the square of the number of values
PIXELS = 2**20  # a device encodes at most so many at a time, or one image
DETAILED = 256  # side of the crops up to which attention and features are drawn at twice their size
IN_0_TO_1 = (0.0,) * 3, (1.0,) * 3  # mean and std of images that are not normalized
K, TEMPERATURE = 20, 0.07  # of the k-NN vote
FEW = (1, 5, 10)  # percent of the bank's labels, for a probe with few labels
SCORES = ("eval/accuracy", "eval/knn", "eval/probe", "eval/view_retrieval", "eval/patch_retrieval")  # shares, 0 to 1
FIXED = 1000  # held-out images at most whose features are compared with those at the start
QUERIES, NEIGHBORS, RECONSTRUCTED, ATTENDED, CROPPED, MISTAKEN = 8, 8, 16, 4, 6, 16  # images on a picture
COMPARED, ROOM = 8, 600_000  # images whose patches are compared in the report, and bytes of their features there, about
MATRIX = 1000  # classes up to which the confusions are drawn

Batch = dict[str, jax.Array]
Arrays = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]  # of the bank and of the held-out images

gather, rank_me, feature_std = jax.jit(replicate), jax.jit(health.rank_me), jax.jit(health.feature_std)
mean_cosine = jax.jit(health.mean_cosine)


def compiled(method: Callable[..., Any]) -> Any:
    """Makes a method a jitted function, compiled once for each object."""
    return functools.cached_property(lambda self: jax.jit(functools.partial(method, self)))


class Evaluation:
    """Measures an encoder on the same images again and again. All processes call it alike; each gets the same results.

    The encoder is the teacher of the state, where there is one.

    Args:
        config: reads `eval`, `seed`, `data.canvas` and `model.img_size`.
        source: images that k-NN and probe learn from; `eval.bank` of them are chosen by the seed.
        held_out: images on which everything is measured; `eval.test` of them. If it is the same split as `source`, the
            split is divided: at most a fifth is measured on, and these images are not in the bank.
        on_bad: called with (row, name) for each bad image, at every evaluation; by default, each is logged once.

    k-NN and probe are measured where both have labels of the same classes, and so is the accuracy of a method with
    `num_classes`; `unlabeled` says why they are not, or is empty. Raises ValueError for too few images, and for a method with
    another number of classes.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        method: Method,
        source: Source,
        held_out: Source,
        on_bad: pipeline.OnBad | None = None,
    ):
        self.config, self.method, self.source, self.held_out = config.eval, method, source, held_out
        self.tokenizer: Any = method  # where "tokens" are among the pictures
        self.seed, self.canvas, self.size = config.seed, config.data.canvas, config.eval.img_size or config.model.img_size
        self.decoding = dict(levels=config.data.levels, max_pixels=config.data.max_pixels)
        bank, test = config.eval.bank, config.eval.test
        if held_out.description == source.description:
            test = min(test, len(source) // 5)
            self.test_rows, rest = np.split(pipeline.choose(source, bank + test, self.seed), [test])
            names = {source.name(int(row)) for row in self.test_rows}  # a list of images may have one several times
            self.bank_rows = rest[[source.name(int(row)) not in names for row in rest]]
        else:
            self.bank_rows, self.test_rows = (pipeline.choose(s, n, self.seed) for s, n in ((source, bank), (held_out, test)))
        if not all(self.sizes):
            raise ValueError(f"{source.description}: {len(source)} images are too few to be evaluated on, 5 are needed")
        if method.num_classes and self.num_classes not in (0, method.num_classes):
            raise ValueError(f"the method has {method.num_classes} classes, but {source.description} has {self.num_classes}")
        crop = method.views.crops[0].size
        self.detail = 2 * crop if crop <= DETAILED else crop
        self.on_bad = on_bad or pipeline.log_once()
        self.check: Callable[[], None] = lambda: None  # called before each batch; what it raises ends the evaluation
        self.good = len(self.test_rows)  # held-out images that could be read, once they have been
        self.encoded: tuple[Any, Arrays, Arrays] | None = None  # of the last state, by its `step`
        self.continued = bool(config.get("continue_from"))
        self.start: np.ndarray | None = None  # features before the first step; of a run with `continue_from`

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of images in the bank and in the test set."""
        return len(self.bank_rows), len(self.test_rows)

    @property
    def num_classes(self) -> int:
        """Of the labels, if the training and the held-out images have the same ones, else 0. Names may be missing of one."""
        both = self.source, self.held_out
        count, names = {source.num_classes for source in both}, {tuple(source.classes) for source in both}
        return count.pop() if len(count) == 1 and len(names - {()}) < 2 else 0

    @property
    def classes(self) -> list[str]:
        """Their names."""
        return list(self.source.classes or self.held_out.classes) or [f"class {i}" for i in range(self.num_classes)]

    @property
    def classifies(self) -> bool:
        """Whether the method has a head whose accuracy can be measured."""
        return bool(self.method.num_classes and self.num_classes)

    @property
    def warning(self) -> str:
        """That the accuracy of a classifier is measured on images that it trains on, in one line; empty if it is not."""
        if not self.classifies or self.held_out.description != self.source.description:
            return ""
        return (
            "the accuracy is that on images that are trained on; for held-out ones set "
            '--config.data.split="train[:90%]" --config.data.eval_split="train[90%:]"'
        )

    @property
    def unlabeled(self) -> str:
        """Why there is no k-NN and no probe, in one line; empty if they are measured."""
        if self.num_classes:
            return ""
        without = "no k-NN, no probe and no accuracy" if self.method.num_classes else "no k-NN and no probe"
        if not self.source.num_classes and not self.held_out.num_classes:
            return f"{without}: the images have no labels"
        train, test = (
            f"{s.num_classes} classes ({', '.join([*s.classes[:3], '...'])})" if s.num_classes else "no labels"
            for s in (self.source, self.held_out)
        )
        return f"{without}: the training images have {train}, the held-out images {test}"

    def scores(self, state: TrainState) -> dict[str, float]:
        """`eval/knn`, `eval/knn_top5`, `eval/probe` (of images with labels), `eval/view_retrieval` (shares, 0 to 1), their
        standard errors `..._error`, `health/rank` and `health/feature_std` (of the held-out images' features).

        Of a classifier also `eval/accuracy`, `eval/accuracy_top5` (of more than 5 classes), `eval/accuracy_class_mean` and
        `eval/accuracy_worst_class` (of the accuracies by class). Of a run with `continue_from` also `eval/patch_retrieval` and
        `health/start_cosine`, the mean cosine to the features before the first step, of at most FIXED held-out images.
        """
        bank, test = self.encode(state)
        self.encoded = state.step, bank, test
        return self._scores(bank, test)

    def few_labels(self, state: TrainState) -> dict[str, float]:
        """`eval/probe_1_percent`, `..._5_percent`, `..._10_percent`: the probe with so many of the bank's labels, the first in
        its random order. A share with fewer than 5 images, or with fewer images than classes, is left out."""
        bank, test = self.last(state)
        figures = {}
        for percent in FEW if self.num_classes else ():
            count = len(bank["label"]) * percent // 100
            if count >= max(5, self.num_classes):
                features = bank["features"][:count], test["features"]
                figures[f"eval/probe_{percent}_percent"] = self._probe(features, (bank["label"][:count], test["label"]))
        return figures

    def mistakes(self, state: TrainState) -> dict[str, list[list[Any]]]:
        """The worst classes and the most confused pairs of a classifier, see `mistakes.summary`; {} of another method."""
        if not self.classifies:
            return {}
        return mistakes.summary(*self._answers(self.last(state)[1]), self.classes)

    def similarity(self, state: TrainState) -> dict[str, Any]:
        """For the report: some held-out images, as addresses, and what `similarity.data` makes of their patch features; {} of a
        method without a backbone."""
        if not isinstance(self.method, BackboneMethod) and "features" not in self.method.pictures:
            return {}
        function = functools.partial(self._patches, state.learned)
        found = self._stream(self.held_out, self.test_rows[:RECONSTRUCTED], function, self.detail)
        patch, images = (found[name][:COMPARED] for name in ("patch", "images"))
        grid = round(patch.shape[1] ** 0.5)
        data, _ = similarity.data(patch.astype(np.float32), grid, ROOM, pictures.MAGMA)
        return data | {"images": [similarity.uri(image) for image in images]}

    def last(self, state: TrainState) -> tuple[Arrays, Arrays]:
        """As `encode`, which is called only if this state is not the one that `scores` was called with."""
        if self.encoded is None or self.encoded[0] is not state.step:
            self.encoded = state.step, *self.encode(state)
        return self.encoded[1:]

    def baselines(self, state: TrainState) -> dict[str, float]:
        """The same scores without any learning; to be measured once a run, before its first step.

        `..._baseline_untrained` is the encoder of `state` (`..._baseline_start` in a run with `continue_from`, where it has
        learned), `..._baseline_pixels` are plain pixels, and
        `..._baseline_whitened` are PCA-whitened pixels, the one to beat. Pixels are those of pictures and views that are
        reduced to `BASELINE_SIZE`, where they are larger. Of a classifier, `eval/accuracy_baseline_majority` is the share of
        the most frequent class among the held-out images: no constant answer is right more often.
        """
        bank, test = self.encode(state, pixels=True)
        scores = self._scores(bank, test)
        first = "start" if self.continued else "untrained"
        self.start = test["features"][:FIXED].copy() if self.continued else None
        baselines = {f"{tag}_baseline_{first}": scores[tag] for tag in SCORES if tag in scores}
        if self.classifies:
            counts = np.bincount(self._answers(test)[0], minlength=self.num_classes)
            baselines["eval/accuracy_baseline_majority"] = float(counts.max() / len(test["label"]))
        labels, pixels = (bank["label"], test["label"]), (bank["pixels"], test["pixels"])
        if self.num_classes:
            baselines["eval/knn_baseline_pixels"] = self._knn((pixel_features(pixels[0]), pixel_features(pixels[1])), labels)[0]
            whitened = whitened_features(pixels[0].reshape(len(labels[0]), -1), pixels[1].reshape(len(labels[1]), -1))
            baselines["eval/knn_baseline_whitened"] = self._knn(whitened, labels)[0]
            baselines["eval/probe_baseline_whitened"] = self._probe(whitened, labels)
        views = (test[name].reshape(len(test[name]), -1).astype(np.float32) for name in ("pixels_1", "pixels_2"))
        baselines["eval/view_retrieval_baseline_pixels"] = float(view_retrieval(*views))
        return baselines

    @property
    def _measured(self) -> str:
        """What the features at the start depend on, besides the weights."""
        rows = ",".join(map(str, self.test_rows[:FIXED]))
        return f"{self.held_out.fingerprint} {self.size} {self.config.resize} {self.config.tokens} {rows}"

    def start_file(self) -> bytes:
        """The features at the start, once the baselines have been measured, for `open_start` of a run that goes on."""
        file = io.BytesIO()
        np.savez(file, features=np.asarray(self.start), measured=self._measured)
        return file.getvalue()

    def open_start(self, file: Path) -> str:
        """Reads what `start_file` has given. Returns why it cannot be used, in one line; "" if it can."""
        try:
            with np.load(io.BytesIO(file.read_bytes())) as saved:
                if saved["measured"] == self._measured:
                    self.start = saved["features"]
                    return ""
                reason = "other images or settings of eval"
        except Exception as error:  # of broken bytes NumPy raises almost anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the cosine to the features at the start is no longer measured: {file} cannot be used ({reason})"

    def encode(self, state: TrainState, pixels: bool = False) -> tuple[Arrays, Arrays]:
        """(bank, test): `features` [N, D] float32 and `label` [N] int32; of the test also those of two random crops
        that are the same at every call, `view_1` and `view_2`, and of a classifier the `ranking` of the best 5 classes, int32
        [N, 5] or fewer; with `pixels` also small pictures of them all, uint8."""
        params = state.learned

        def bank(batch: Batch) -> Batch:
            found = {"label": batch["label"], "features": self._features(params, self._picture(batch))}
            return found | ({"pixels": self._small(batch)} if pixels else {})

        def test(batch: Batch) -> Batch:
            found = bank(batch) | {"index": batch["index"]}
            if self.classifies:
                found["ranking"] = self._ranking(params, state.extra, self._picture(batch))
            if self.continued:
                found["patch_retrieval"] = self._patch_retrieval(params, batch)
            for i, view in enumerate(self._views(batch), 1):
                found[f"view_{i}"] = self._features(params, view)
                found |= {f"pixels_{i}": self._small_view(view)} if pixels else {}
            return found

        side = max(self.size, self.method.views.crops[0].size)
        of_bank = self._stream(self.source, self.bank_rows, bank, side)
        of_test = self._stream(self.held_out, self.test_rows, test, side)
        self.good = len(np.unique(of_test.pop("index")))
        return of_bank, of_test

    def batch_size(self, count: int, side: int) -> int:
        """How many of `count` pictures of `side` are encoded at a time: a multiple of the number of devices."""
        each = -(-min(self.config.batch_size, count) // jax.device_count())
        return jax.device_count() * min(each, max(1, PIXELS // side**2))

    def _answers(self, test: Arrays) -> Pair:
        """(label, the head's answer) of the held-out images whose label is known."""
        known = test["label"] >= 0
        return test["label"][known], test["ranking"][known, 0]

    def _scores(self, bank: Arrays, test: Arrays) -> dict[str, float]:
        scores: dict[str, float] = {}
        labels, features = (bank["label"], test["label"]), (bank["features"], test["features"])
        if self.classifies:
            hit = test["ranking"] == labels[1][:, None]
            scores["eval/accuracy"] = float(hit[:, 0].mean())
            scores |= {"eval/accuracy_top5": float(hit.any(axis=1).mean())} if self.num_classes > 5 else {}
            by_class = mistakes.class_accuracy(*self._answers(test), self.num_classes)[0]
            scores["eval/accuracy_class_mean"] = float(np.nanmean(by_class))
            scores["eval/accuracy_worst_class"] = float(np.nanmin(by_class))
        if self.num_classes:
            top1, top5 = self._knn(standardize(*features) if self.config.standardize else features, labels)
            scores |= {"eval/knn": top1} | ({"eval/knn_top5": top5} if self.num_classes > 5 else {})
            scores["eval/probe"] = self._probe(features, labels)
        scores["eval/view_retrieval"] = float(view_retrieval(test["view_1"], test["view_2"]))
        if self.continued:
            scores["eval/patch_retrieval"] = float(test["patch_retrieval"].mean())
        if self.start is not None:
            scores["health/start_cosine"] = float(mean_cosine(test["features"][:FIXED], self.start))
        shares = [(tag, scores[tag]) for tag in SCORES if tag in scores]
        scores |= {f"{tag}_error": math.sqrt(share * (1 - share) / self.good) for tag, share in shares}
        scores["health/rank"] = float(rank_me(test["features"]))
        scores["health/feature_std"] = float(feature_std(test["features"]))
        return scores

    def _knn(self, features: Pair, labels: Pair) -> tuple[float, float]:
        k = min(K, len(features[0]))
        return knn_accuracy(features[0], labels[0], features[1], labels[1], self.num_classes, k, TEMPERATURE)

    def _probe(self, features: Pair, labels: Pair) -> float:
        return probe_accuracy(features[0], labels[0], features[1], labels[1], self.num_classes)

    def _stream(self, source: Source, rows: np.ndarray, function: Callable[[Batch], Batch], side: int) -> Arrays:
        """`function(batch)` [B, ...] of the images at `rows`, which it turns into pictures of `side`: arrays [N, ...]."""
        size = self.batch_size(len(rows), side)
        results: Arrays = OrderedDict()
        parts = (self.bank_rows, self.source), (self.test_rows, self.held_out)
        among = next(part for part, of in parts if of is source and np.isin(rows, part).all())
        options = self.decoding | {"among": among, "share": share(size)}
        stream = pipeline.eval_batches(source, rows, canvas=self.canvas, batch_size=size, on_bad=self.on_bad, **options)
        for start, batch in zip(range(0, len(rows), size), stream, strict=True):
            self.check()
            for name, part in jax.device_get(gather(OrderedDict(function(global_batch(batch))))).items():
                if not start:
                    results[name] = np.empty((len(rows), *part.shape[1:]), part.dtype)
                results[name][start : start + size] = part[: len(rows) - start]
        return results

    def _center(self, batch: Batch, side: int, normalized: bool = True, share: float = 1.0) -> jax.Array:
        mean, std = (self.method.views.mean, self.method.views.std) if normalized else IN_0_TO_1
        return center_crop(batch["image"], batch["size"], side, share * self.config.resize, mean, std)

    def _random_views(self, batch: Batch, key: jax.Array, side: int) -> jax.Array:
        """Two random global crops of each image [B, 2, side, side, 3], by its place and `key`."""
        views = self.method.views
        group = dataclasses.replace(views.crops[0], size=side, policies=(views.crops[0].policies * 2)[:2])
        return augment(batch | {"index": batch["place"]}, [group], key, views.mean, views.std)[group.name]

    @compiled
    def _picture(self, batch: Batch) -> jax.Array:
        return self._center(batch, self.size)

    @compiled
    def _views(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        views = self._random_views(batch, jax.random.key(self.seed), self.method.views.crops[0].size)
        return views[:, 0], views[:, 1]

    @compiled
    def _features(self, params: Any, images: jax.Array) -> jax.Array:
        features = self.method.features(params, pin_batch(images))
        chosen = features["cls"] if self.config.tokens == "cls" else features["patch"].mean(axis=1)
        return chosen.astype(jnp.float32)

    @compiled
    def _patch_retrieval(self, params: Any, batch: Batch) -> jax.Array:
        whole, half = self._center(batch, self.size), self._center(batch, self.size, share=0.5)[:, :, ::-1]
        return patch_retrieval(*(self.method.features(params, pin_batch(images))["patch"] for images in (whole, half)))

    @compiled
    def _ranking(self, params: Any, extra: Any, images: jax.Array) -> jax.Array:
        scores = self.method.class_scores(params, extra, pin_batch(images))
        return jax.lax.top_k(scores, min(5, self.num_classes))[1]

    @compiled
    def _small(self, batch: Batch) -> jax.Array:
        return denormalize(self._center(batch, min(self.size, BASELINE_SIZE), normalized=False), *IN_0_TO_1)

    @compiled
    def _small_view(self, view: jax.Array) -> jax.Array:
        side, image = view.shape[1], self.method.views.denormalize(view)
        size = jnp.full((len(image), 2), side)
        return denormalize(center_crop(image, size, min(side, BASELINE_SIZE), 1.0, *IN_0_TO_1), *IN_0_TO_1)

    # Pictures

    def crop_picture(self) -> Image.Image:
        """The first images of the bank beside all crops and masks that the step makes of them."""
        views, rows = self.method.views, self.bank_rows[:CROPPED]
        crops = self._stream(self.source, rows, self._crops, max(group.size for group in views.crops))
        masked = {}
        for name, mask in views.example_masks(len(rows)).items():
            images = crops["global"].repeat(mask.shape[1] // views.global_crops, axis=1)
            masked[name] = pictures.darkened(images, mask)
        return pictures.crop_grid(self._images(self.source, rows), crops | masked)

    def pictures(self, state: TrainState, target: Any) -> Iterator[tuple[str, Image.Image]]:
        """(name, picture) of what the method declares, of the nearest neighbors of held-out images, and of a classifier's
        confusions and mistakes."""
        wanted, params = self.method.pictures, state.learned
        crop, detail = self.method.views.crops[0].size, self.detail

        def held_out(number: int | None, side: int, function: Callable[..., Batch], *args: Any) -> Arrays:
            return self._stream(self.held_out, self.test_rows[:number], functools.partial(function, *args), side)

        if "reconstruction" in wanted:
            masks = self.method.views.example_masks(min(RECONSTRUCTED, len(self.test_rows)), 1)
            columns = held_out(RECONSTRUCTED, crop, self._reconstruction, params, state.extra, target, masks)
            image = {"image": columns.pop("image")}
            masked = {name: pictures.darkened(image["image"], mask[:, 0]) for name, mask in masks.items()}
            yield "reconstruction", pictures.reconstructions(image | masked | columns)
        if "tokens" in wanted:
            tokens = held_out(None, crop, self._tokens, params, state.extra)["tokens"]
            yield "tokens", pictures.usage(np.bincount(tokens.reshape(-1), minlength=self.tokenizer.codes))
        if "attention" in wanted:
            found = held_out(ATTENDED, detail, self._attention, params)
            grid = (round(found["attention"].shape[-1] ** 0.5),) * 2
            yield "attention", pictures.attention_maps(found["attention"], grid, found["images"])
        if "features" in wanted:
            found = held_out(RECONSTRUCTED, detail, self._patches, params)
            yield "features", pictures.principal_colors(found["patch"], found["images"])
            found = held_out(QUERIES, detail, self._patches_of_views, params)
            yield "correspondences", pictures.correspondences(found["patch"], found["images"])
        yield "neighbors", self._neighbors(state)
        if self.classifies:
            yield from self._mistakes(state)

    def _neighbors(self, state: TrainState) -> Image.Image:
        """Held-out images and those of the bank that are nearest to each, by cosine."""
        bank, test = self.last(state)
        queries, others = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (test["features"][:QUERIES], bank["features"]))
        nearest = np.argsort(-queries @ others.T, axis=1)[:, :NEIGHBORS]
        images = self._images(self.source, self.bank_rows[nearest.reshape(-1)])
        found = [images[start : start + nearest.shape[1]] for start in range(0, len(images), nearest.shape[1])]
        shown = self._images(self.held_out, self.test_rows[:QUERIES])
        if not self.num_classes:
            return pictures.neighbors(shown, found)
        names = self.classes
        found_names = [[names[label] for label in labels] for labels in bank["label"][nearest]]
        return pictures.neighbors(shown, found, [names[label] for label in test["label"][:QUERIES]], found_names)

    def _mistakes(self, state: TrainState) -> Iterator[tuple[str, Image.Image]]:
        test, names = self.last(state)[1], self.classes
        if len(names) <= MATRIX:
            yield "confusion", pictures.confusion(mistakes.confusion(*self._answers(test), len(names)), names)
        labels, answers = test["label"], test["ranking"][:, 0]
        wrong = np.flatnonzero((labels != answers) & (labels >= 0))[:MISTAKEN]
        if len(wrong):
            images = self._images(self.held_out, self.test_rows[wrong])
            truths, taken_for = ([names[i] for i in found[wrong]] for found in (labels, answers))
            yield "mistakes", pictures.mistakes(images, truths, taken_for)

    def _images(self, source: Source, rows: np.ndarray) -> list[np.ndarray]:
        found = self._stream(source, rows, lambda batch: {name: batch[name] for name in ("image", "size")}, self.canvas)
        return [image[:height, :width] for image, (height, width) in zip(found["image"], found["size"])]

    @compiled
    def _crops(self, batch: Batch) -> Batch:
        made = self.method.views.make(batch, jax.random.key(0))
        return OrderedDict((g.name, self.method.views.denormalize(made[g.name])) for g in self.method.views.crops)

    @compiled
    def _reconstruction(self, params: Any, extra: Any, target: Any, masks: Batch, batch: Batch) -> Batch:
        """The images, and what the model makes of what the masks leave of them, in the method's order."""
        group = self.method.views.crops[0]
        views = {name: mask[batch["place"]] for name, mask in masks.items()}
        views["global"] = self._center(batch, group.size)[:, None]
        if group.target:
            views["target"] = self._center(batch, group.target.size, normalized=False)[:, None]
        columns = {"image": views["global"], **self.method.reconstruction(params, extra, target, views)}
        return OrderedDict((caption, self.method.views.denormalize(images)[:, 0]) for caption, images in columns.items())

    @compiled
    def _tokens(self, params: Any, extra: Any, batch: Batch) -> Batch:
        return {"tokens": self.tokenizer.tokens(params | extra, self._center(batch, self.method.views.crops[0].size))}

    @compiled
    def _attention(self, params: Any, batch: Batch) -> Batch:
        images = self._center(batch, self.detail)
        return {"attention": self.method.attention(params, images), "images": self.method.views.denormalize(images)}

    @compiled
    def _patches(self, params: Any, batch: Batch) -> Batch:
        images = self._center(batch, self.detail)
        return {"patch": self.method.features(params, images)["patch"], "images": self.method.views.denormalize(images)}

    @compiled
    def _patches_of_views(self, params: Any, batch: Batch) -> Batch:
        images = self._random_views(batch, jax.random.key(0), self.detail)
        patch = self.method.features(params, images.reshape(-1, *images.shape[2:]))["patch"]
        patch = patch.reshape(*images.shape[:2], *patch.shape[1:])
        return {"patch": patch, "images": self.method.views.denormalize(images)}
