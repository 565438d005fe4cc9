"""The stages of curation, from sources to a list of images.

    embed -> order -> pool -> [cells ->] neighbors -> aligned -> components -+-> retrieve or balance -> list, provenance, report
      calibrate ---------------------------------------------------^         |
      leakage ---------------------------------------------------------------+

Each is a function of the results of others and of its settings, see `shards.stage`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from mim_jax import sharding, storage
from mim_jax.config import leaves
from mim_jax.curate import calibration, clusters, components, neighbors, plants, report
from mim_jax.curate.alignment import LOOSE, aligned
from mim_jax.curate.calibration import Known
from mim_jax.curate.embedders import DIMS, Embedder, Network, Pixels
from mim_jax.curate.neighbors import nearest
from mim_jax.curate.shards import (
    PIECE,
    Files,
    Made,
    Memory,
    Result,
    Rows,
    Subset,
    digest_of,
    spans,
    stage,
    threads,
    write_parquet,
)
from mim_jax.data import curated
from mim_jax.data.sources import sample, shown
from mim_jax.journal import named_errors, replacing, write_whole
from mim_jax.lock import locked
from mim_jax.pretrained import load

LEAST = 0.001  # share of the pool that must be left after deduplication,
FEW = 10  # and so many images, or a tenth of fewer than a hundred
ENOUGH = 1000  # images of a curated or evaluation set to calibrate a threshold with; rather than smaller ones the pool is taken
MOST = 1000  # times that an epoch has a curated image
SMALL = 10  # images; a component of fewer is no giant
LARGE = 1_000_000  # curated images from which on a set is large
LEAST_CALIBRATED = 100  # images
TOLD = 2**13  # rows of provenance that are made at a time
FOUND = 0.8  # recall of a calibrated threshold; a smaller one is told
A_CELL = 64  # images for each cell that the cells are learned of


def tell(line: str) -> None:
    print(shown(line), file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images, embedded. Rows are those of the source."""

    how: dict[str, Any]  # see `curated.open_any`
    source: Any
    result: Result
    left_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))  # copies of evaluation images

    @functools.cached_property
    def good(self) -> np.ndarray:
        """int64, the rows of the images that could be read and are not left out."""
        good = self.result.array("good")
        good[self.left_out] = False
        return np.flatnonzero(good)

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(self.result.digest, self.left_out.tolist()) if len(self.left_out) else self.result.digest

    @property
    def known(self) -> Known:
        """What is known of the good ones."""
        return Known(self.digest, *(Subset(self.result.rows(name), self.good) for name in ("vectors", "sketch")))


class Leakage(NamedTuple):
    similarity: np.ndarray  # float32 [pool], to the most similar image of an evaluation set
    place: np.ndarray  # int32 [pool], which one that is
    digest: str


@dataclasses.dataclass
class Curation:
    """All that a run knows; what the report and the provenance are made of.

    The pool are the different images of all uncurated sets: exact copies are one, and the number of an image is its place in
    the order of the hashes. `where` is the place of a row in all uncurated sets, one after the other.
    """

    config: ml_collections.ConfigDict
    embedder: Any
    uncurated: list[Images]
    curated: list[Images]
    evaluation: list[Images]
    member: np.ndarray  # int32 [all rows], the number of each in the pool; -1: bad
    origin: np.ndarray  # int64 [pool], where the first of each is
    keys: np.ndarray  # uint64 [pool], the first 8 bytes of the hash
    pool: Rows  # int16 [pool, D]
    found: Result  # neighbors, and how similar by `dedup.by`
    threshold: float
    leakage_threshold: float
    curve: calibration.Curve | None
    labels: np.ndarray  # int32 [pool], component
    giants: list[components.Component]
    cut: bool
    leaks: list[np.ndarray]  # similarity to the most similar image of each evaluation set, float32 [pool]
    resembled: list[np.ndarray]  # which one that is, int32 [pool], among the good ones
    doubled: np.ndarray  # bool [pool], in one component with an image that is also in a curated set of the list
    candidates: np.ndarray  # int64, representatives that are neither copies of evaluation images nor doubled
    chosen: np.ndarray  # int64, numbers in the pool
    why: dict[str, Any]  # how they were chosen: for the report

    @property
    def hit(self) -> np.ndarray:
        """bool [pool], whether an image is a copy of an evaluation image."""
        hits = [leak >= self.leakage_threshold for leak in self.leaks]
        return np.any(hits, axis=0) if hits else np.zeros(len(self.labels), bool)

    @property
    def leaked(self) -> np.ndarray:
        """bool [pool], whether the component of an image has such a copy."""
        dropped = np.zeros(len(self.labels), bool)
        dropped[self.labels[self.hit]] = True
        return dropped[self.labels]

    def places(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The uncurated sets of some places `where`, and the rows in them."""
        starts = np.cumsum([0] + [len(images.source) for images in self.uncurated])
        at = np.searchsorted(starts, where, "right") - 1
        return at, where - starts[at]


def run(config: ml_collections.ConfigDict, workdir: Path) -> Curation:
    """The whole pipeline; what is finished in the workdir is used again.

    Raises ValueError and OSError, with one line for the user, for bad settings, sources without a readable image, an embedder
    that is not that of the workdir, and thresholds that leave nothing. Finished stages stay.
    """
    check(config)
    engine = opened_engine(config)
    with locked(workdir), jax.set_mesh(sharding.make_mesh(devices=jax.local_devices())):
        return Stages(config, workdir, engine).run()


def opened_engine(config: ml_collections.ConfigDict) -> Any:
    """What has the shards of the stages made. Raises ValueError for Beam if it is missing or refuses its options."""
    if config.engine == "local":
        return functools.partial(threads, config.workers)
    if importlib.util.find_spec("apache_beam") is None:
        raise ValueError("engine is 'beam', but Apache Beam is not installed: pip install 'mim_jax[beam]'")
    from mim_jax.curate.beam import Beam

    return Beam(config.beam.options, config.beam.shared)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first value that cannot be."""
    values = dict(leaves(config))

    def wrong(key: str, must: str) -> ValueError:
        return ValueError(f"{key} is {values[key]!r}, but must be {must}")

    if not sets(config.uncurated, None):
        raise ValueError("uncurated is missing: --config.uncurated=FOLDER, or a data set such as cifar10")
    words = {"engine": ("local", "beam"), "select": ("retrieve", "balance", "all"), "retrieve.by": ("image", "cluster")}
    words |= {"kind": ("cls", "mean", "cls+mean"), "dedup.by": ("pixels", "vectors")}
    for key, allowed in words.items():
        if values[key] not in allowed:
            raise wrong(key, " or ".join(allowed))
    if config.select == "retrieve" and not sets(config.curated, None):
        raise ValueError('curated is missing: --config.curated=FOLDER, or --config.select="balance" or "all" without')
    for key in ("dedup.threshold", "leakage.threshold", "dedup.giant", "calibrate.precision", "calibrate.share", "dedup.cut"):
        if values[key] is not None and not 0 <= values[key] <= 1:
            raise wrong(key, "in [0, 1]")
    counts = {"shard_rows", "neighbors.k", "neighbors.cells", "neighbors.probes", "neighbors.sample"}
    counts |= {"retrieve.k", "retrieve.clusters", "balance.images", "calibrate.images", "workers", "block"}
    counts |= {"retrieve.cap", "retrieve.per_cluster", "balance.clusters", "balance.points"}
    for key, value in values.items():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, (int, float)) and not isinstance(each, bool) and not 0 <= each < float("inf"):
                raise wrong(key, "in [0, inf)")
            if key in counts and each is not None and each < 1:
                raise wrong(key, "1 or more")
    if not config.calibrate.share:
        raise wrong("calibrate.share", "in (0, 1]")
    for key in ("block", "size"):
        if values[key] is not None and not config.embedder:
            raise ValueError(f"{key} is {values[key]!r}, but there is no embedder whose {key} it could be")
    if config.seed >= 2**63:
        raise wrong("seed", "below 2**63")
    if config.write.curated > MOST:
        raise wrong("write.curated", f"at most {MOST:,}")
    if config.levels is not None and not (len(config.levels) == 2 and config.levels[0] < config.levels[1]):
        raise wrong("levels", "(black, white) with black below white")
    if not config.balance.clusters or not all(isinstance(each, int) for each in config.balance.clusters):
        raise wrong("balance.clusters", "numbers of clusters, such as (5000, 500)")
    if len(config.balance.clusters) != len(config.balance.points):
        raise wrong("balance.points", f"one number for each of balance.clusters={tuple(config.balance.clusters)}")


def sets(text: str, data_dir: str | None) -> list[dict[str, Any]]:
    """How the sets in "~/heap, cifar10@test" are opened, see `curated.open_any`."""

    def is_folder(name: str) -> bool:
        return bool(name) and not storage.remote(name) and storage.absolute(name).is_dir()

    found = []
    for each in [text] if is_folder(text) else filter(None, (part.strip() for part in text.split(","))):
        name, at, split = each.rpartition("@")
        if is_folder(each) or not at:
            name, split = each, "train"
        if not name:
            raise ValueError(f"{each!r} is no set: a folder, or a data set such as cifar10@test")
        folder = name[0] in "./~" or "://" in name or is_folder(name)
        if folder and not storage.remote(name) and not is_folder(name):
            raise FileNotFoundError(f"There is no folder {shown(str(storage.absolute(name)))}")
        place = str(storage.absolute(name)) if folder else data_dir
        if folder:
            name = "curated" if (storage.absolute(name) / curated.LIST).exists() else "folder"
        found.append({"name": name, "dir": place, "split": split, "plant": None})
    return found


class Stages:
    """The stages, in a workdir."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, engine: Any):
        self.config, self.workdir, self.engine = config, workdir, engine
        self.stage = functools.partial(stage, workdir, engine=engine, tell=tell)
        self.whole = functools.partial(stage, workdir, tell=tell)  # is one shard, and made here

    def run(self) -> Curation:
        config = self.config
        plain = [sets(config[name], config.data_dir) for name in ("uncurated", "curated", "evaluation")]
        if any(config.plant[key] for key in ("copies", "evaluation")) or config.plant.imbalance > 1:
            plant = config.plant.to_dict() | {"seed": config.seed, "held_out": plain[2][0] if plain[2] else None}
            plain[0][0] |= {"plant": plant}
        opened = [[(how, curated.open_any(how)) for how in hows] for hows in plain]
        self.embedder = self.opened_embedder(opened[0][0][1])
        uncurated, wanted, evaluation = ([self.embed(how, source) for how, source in each] for each in opened)

        order = self.order(uncurated)
        member, origin, keys = (order.array(name) for name in ("member", "origin", "keys"))
        pool = self.pool(uncurated, order, origin)
        known = Known(pool.digest, pool.rows("vectors"), pool.rows("sketch"))
        found = self.aligned(self.neighbors(pool), known)
        # Images that were chosen with care have fewer copies of each other. But few images tell little.
        clean = max([*evaluation, *wanted, *uncurated], key=lambda images: min(len(images.good), ENOUGH))
        curve, threshold = self.threshold(clean, known)
        joined = self.components(found, len(origin), threshold)
        labels, about = joined.array("label"), joined.abouts[0]
        leaks = [self.leakage(known, images.known) for images in evaluation]
        leak_threshold = threshold if config.leakage.threshold is None else config.leakage.threshold
        wanted = [self.without_leaks(images, evaluation, leak_threshold) for images in wanted]
        doubled = np.isin(labels, labels[also_curated(uncurated, wanted, origin, keys)] if config.write.curated else [])
        giants = [components.Component(*each) for each in about["giants"]]
        state = Curation(
            config, self.embedder, uncurated, wanted, evaluation, member, origin, keys, known.vectors, found, threshold,
            leak_threshold, curve, labels, giants, about["cut"], [each.similarity for each in leaks],
            [each.place for each in leaks], doubled,
            np.zeros(0, np.int64), np.zeros(0, np.int64), {},
        )  # fmt: skip
        for label, size, density in giants:
            (at,), (row,) = state.places(origin[[label]])
            hint = "it was cut" if state.cut else "see dedup.cut, or raise dedup.threshold"
            what = f"{size:,} of {len(origin):,} images, edge density {density:.3f}"
            tell(f"a giant component: {what}, with {uncurated[at].source.name(int(row))}; {hint}")
        state.candidates = np.flatnonzero((labels == np.arange(len(labels))) & ~state.leaked & ~doubled)
        self.refuse_nothing(state)
        inputs = [joined.digest, pool.digest, *(each.digest for each in leaks), digest_of(leak_threshold)]
        if doubled.any():
            inputs += [images.digest for images in wanted]
        choose = {"retrieve": self.retrieve, "balance": self.balance, "all": self.all}[config.select]
        state.chosen, state.why = choose(state, inputs)
        self.write(state)
        return state

    # Embed

    def opened_embedder(self, source: Any) -> Any:
        """Raises ValueError if the workdir has vectors of another one."""
        config, file = self.config, self.workdir / "embedder.json"
        if config.embedder:
            model = load(storage.absolute(config.embedder), heads=config.heads, act=config.act, levels=config.levels)
            plain: Embedder = Network(model, config.kind, config.size, config.block)
        else:
            plain = Pixels(config.levels)
        dims = config.whiten if config.embedder else DIMS
        made = self.projected(plain, source, dims) if dims else plain
        now = {"dimensions": made.dims, "description": made.description, "identity": made.identity}
        if file.exists() and (before := json.loads(file.read_text())) != json.loads(json.dumps(now)):
            raise ValueError(
                f"{self.workdir} has vectors of another embedder, or of another version of it: {before['description']}, of "
                f"{before['dimensions']} dimensions; now it is {made.description}, of {made.dims}. Thresholds and vectors of "
                "two cannot be mixed: give another --workdir"
            )
        with named_errors(file):
            write_whole(file, json.dumps(now, indent=1).encode())
        return made

    def projected(self, plain: Embedder, source: Any, dims: int) -> Embedder:
        """The embedder, with components for images such as those of the first source that this workdir had: so images can be
        added."""

        def make(_: int) -> Made:
            mean, basis = plain.basis(source, dims)
            return Made({"mean": mean, "basis": basis}, about={"of": shown(source.description)})

        result = self.whole("basis", 1, [], {"embedder": plain.identity, "dims": dims}, [0], make)
        if (of := result.abouts[0]["of"]) != shown(source.description):
            tell(f"the components of the features are those that this workdir had before, for {of}")
        return plain.projected((result.array("mean"), result.array("basis")))

    def embed(self, how: dict[str, Any], source: Any) -> Images:
        levels, lines = self.embedder.levels(source)
        for line in (*source.notes, *lines):
            tell(line)
        result = self.embedded(source, f"{source.fingerprint}{getattr(source, 'sizes', '')}", levels)
        images = Images(how, source, result)
        if not len(images.good):
            why = next(filter(None, result.column("bad")))
            raise ValueError(f"none of the {len(source):,} images of {source.description} can be read: {why}")
        if bad := len(source) - len(images.good):
            tell(f"{bad:,} of {len(source):,} images are bad, such as {next(filter(None, result.column('bad')))}")
        return images

    def embedded(self, source: Any, fingerprint: str, levels: Any) -> Result:
        embedder = self.embedder
        rows = max(1, self.config.shard_rows // embedder.batch_size) * embedder.batch_size

        def make(span: tuple[int, int]) -> Made:
            parts = list(embedder.batches(source, levels, *span))
            vectors, labels, sha256, dhash, sketches = (np.concatenate([part[i] for part in parts]) for i in range(5))
            bad = [why for part in parts for why in part.bad]
            good = np.array([not why for why in bad])
            records = {
                "row": np.arange(*span),
                "label": labels,
                "dhash": dhash,
                "bad": bad,
            }
            return Made({"vectors": vectors, "sha256": sha256, "sketch": sketches, "good": good}, records)

        settings = {"levels": levels, "embedder": embedder.identity}
        return self.stage("embed", 3, [fingerprint], settings, spans(len(source), rows), make)

    # Deduplicate

    def order(self, uncurated: Sequence[Images]) -> Result:
        """The different images in the order of their hashes."""

        def make(_: int) -> Made:
            sha256, total = all_of(uncurated, "sha256"), all_of(uncurated, "good")
            rows = np.flatnonzero(total.read(0, len(total)))
            heads = [sha256.take(rows[slice(*span)])[:, :8].view(">u8") for span in spans(len(rows), PIECE)]
            keys = np.concatenate(heads, dtype=np.uint64)[:, 0]
            del heads
            by = np.argsort(keys, kind="stable")  # of exact copies the first comes first
            keys, rows = keys[by], rows[by]
            del by
            # Only where the first 8 bytes agree are the others looked at, in pieces that end where these change.
            new = np.concatenate([[True], keys[1:] != keys[:-1]])
            tied = np.flatnonzero(~new | ~np.append(new[1:], True))
            begins = np.flatnonzero(new[tied])
            for part in np.split(tied, begins[np.flatnonzero(np.diff(begins // PIECE)) + 1]):
                words = sha256.take(rows[part]).view(">u8")
                inside = np.lexsort(words.T[::-1])
                rows[part], words = rows[part][inside], words[inside]
                new[part[1:]] = (words[1:] != words[:-1]).any(axis=1)
            member = np.full(len(total), -1, np.int32)
            member[rows] = np.cumsum(new) - 1
            return Made({"member": member, "origin": rows[new], "keys": keys[new]})

        return self.whole("order", 1, [images.result.digest for images in uncurated], {}, [0], make)

    def pool(self, uncurated: Sequence[Images], order: Result, origin: np.ndarray) -> Result:
        """The vectors and sketches of the different images, in their order."""
        everything = {name: all_of(uncurated, name) for name in ("vectors", "sketch")}

        def make(span: tuple[int, int]) -> Made:
            return Made({name: rows.take(origin[slice(*span)]) for name, rows in everything.items()})

        inputs = [order.digest, *(images.result.digest for images in uncurated)]
        return self.stage("pool", 2, inputs, {}, spans(len(origin), self.config.shard_rows), make)

    def neighbors(self, pool: Result) -> Result:
        """Arrays query, ids and similarity: of the image `query` the k nearest others."""
        config, rows = self.config.neighbors, pool.rows("vectors")
        count, k = rows.shape[0], min(config.k, rows.shape[0] - 1)
        if count < 2:
            raise ValueError(f"the pool has {count} different image: there is nothing to curate")
        if count <= config.exact:

            def exact(span: tuple[int, int]) -> Made:
                query = np.arange(*span, dtype=np.int32)
                found = nearest(rows.read(*span), rows, k, own=query)
                return Made({"query": query, "ids": found.ids, "similarity": found.similarity})

            return self.stage("neighbors", 1, [pool.digest], {"k": k}, spans(count, self.config.shard_rows), exact)
        centroids, own = self.cells(pool)
        cells, probes = len(centroids), min(config.probes, len(centroids))
        found = neighbors.cells(own.array("cell"), cells)

        def within(span: tuple[int, int]) -> Made:
            query = found.members[slice(*span)]  # cell by cell: so a shard reads few cells
            probed, _ = clusters.assign(Memory(rows.take(query)), centroids, probes)
            near, products = neighbors.within_cells(rows, found, query, probed, k)
            about = {"products": products}
            return Made({"query": query, "ids": near.ids, "similarity": near.similarity}, about=about)

        settings = {"k": k, "probes": probes}
        shards = spans(count, self.config.shard_rows)
        result = self.stage("neighbors", 2, [pool.digest, own.digest], settings, shards, within)

        def measure(_: int) -> Made:
            places = np.unique(np.linspace(0, count - 1, config.sample).astype(np.int64))
            recall = neighbors.recall(rows, result.rows("query").take(places), result.rows("ids").take(places), k)
            products = sum(about["products"] for about in result.abouts) + count * cells
            return Made({}, about={"recall": recall, "products": products, "of": count * count})

        measured = self.whole("recall", 2, [result.digest, pool.digest], {"sample": config.sample}, [0], measure).abouts[0]
        fewer = measured["of"] / measured["products"]
        tell(f"recall@{k} of the cells: {measured['recall']:.4f}, with {fewer:.1f} times fewer products")
        return result

    def cells(self, pool: Result) -> tuple[np.ndarray, Result]:
        """The centroids of the cells, and the nearest of each image as an array cell."""
        config, rows = self.config, pool.rows("vectors")
        count = min(config.neighbors.cells, rows.shape[0])
        learned = np.sort(clusters.order(np.arange(rows.shape[0], dtype=np.uint64), config.seed)[: A_CELL * count])
        settings = {"cells": count, "seed": config.seed, "a_cell": A_CELL}

        def learn(_: int) -> Made:
            with self.resumed("cells", pool.digest, settings) as kept:
                return Made({"centroids": clusters.kmeans(Subset(rows, learned), count, 10, config.seed, **kept).centroids})

        centroids = self.whole("cells", 1, [pool.digest], settings, [0], learn)

        learned_cells = centroids.array("centroids")

        def make(span: tuple[int, int]) -> Made:
            return Made({"cell": clusters.assign(Memory(rows.read(*span)), learned_cells)[0][:, 0]})

        shards = spans(rows.shape[0], config.shard_rows)
        return learned_cells, self.stage("assigned", 1, [pool.digest, centroids.digest], {}, shards, make)

    def aligned(self, found: Result, pool: Known) -> Result:
        """The same neighbors, with their similarity by `dedup.by`."""
        if self.config.dedup.by == "vectors":
            return found

        def make(span: tuple[int, int]) -> Made:
            query, ids = (found.rows(name).read(*span) for name in ("query", "ids"))
            similarity = aligned(pool.sketches.take(query), pool.sketches, ids)
            return Made({"query": query, "ids": ids, "similarity": similarity})

        shards = spans(found.rows("ids").shape[0], self.config.shard_rows)
        return self.stage("aligned", 2, [found.digest, pool.digest], {}, shards, make)

    def resumed(self, *of: Any) -> "Kept":
        return Kept(self.workdir / f"kmeans-{digest_of(*of)}")

    def threshold(self, images: Images, pool: Known) -> tuple[calibration.Curve | None, float]:
        """The given one, or the one that copies of some of these images lead to, in the pool."""
        config = self.config
        if config.dedup.threshold is not None:
            return None, config.dedup.threshold
        rows = images.good[sample(images.good, config.calibrate.images)]
        if len(rows) < LEAST_CALIBRATED:
            raise ValueError(
                f"{len(rows):,} images are too few to calibrate a threshold with, {LEAST_CALIBRATED} are needed: give "
                "dedup.threshold"
            )
        levels, _ = self.embedder.levels(images.source)
        source = plants.Copies(images.source, rows, config.seed, levels)
        fingerprint = digest_of(images.result.digest, config.seed, rows.tolist(), "copies", 2)
        embedded = self.embedded(source, fingerprint, levels)
        good = np.logical_and(*embedded.array("good").reshape(-1, 2).T)
        kinds = [source.kind(pair) for pair in np.flatnonzero(good).tolist()]
        vectors, sketches = (embedded.array(name) for name in ("vectors", "sketch"))
        ours, copies = (
            Known(embedded.digest, *(Memory(each[side::2][good]) for each in (vectors, sketches))) for side in (0, 1)
        )
        if config.dedup.by == "pixels":
            pairs = calibration.by_pixels(ours, copies, pool.vectors, config.neighbors.k)
        else:
            dhash = np.array(list(embedded.column("dhash")), np.uint64)[::2][good]
            pairs = calibration.by_vectors(ours, copies, dhash)
        # The pool has share * count pairs of an image and its copy, the sample one for each row; and count**2 / 2 other pairs.
        factor = len(pool) / (2 * config.calibrate.share * max(1, len(kinds)))
        curve = calibration.curve(pairs, kinds, factor, LOOSE if config.dedup.by == "pixels" else 0.0)
        place = curve.lowest(config.calibrate.precision)
        threshold = float(curve.thresholds[place])
        found = f"precision {curve.precision[place]:.4f}, recall {curve.recall[place]:.4f}"
        tell(f"calibrated threshold {threshold:g}: {found}, with copies of {len(kinds):,} of {images.source.description}")
        if pairs.alike:
            resemble = f"they resemble each other by {calibration.AGREE:g} or more, and may be copies of each other"
            tell(f"calibration: {pairs.alike:,} pairs of images are left out: {resemble}")
        if curve.recall[place] < FOUND:
            tell("calibration: many copies are missed, as images look as much alike as copies do; dedup.threshold sets another")
        return curve, threshold

    def components(self, found: Result, count: int, threshold: float) -> Result:
        dedup, k = self.config.dedup, found.rows("ids").shape[1]
        least = max(SMALL, round(dedup.giant * count))

        def make(_: int) -> Made:
            labels = self.labels(found, count, threshold)
            giants = components.largest(labels, components.above(edges_of(found), threshold), k, least)
            is_cut = bool(dedup.cut and any(each.density < dedup.cut for each in giants))
            if is_cut:
                labels = components.cut(labels, lambda: edges_of(found), threshold, k, least, dedup.cut)
            return Made({"label": labels}, about={"giants": [list(each) for each in giants], "cut": is_cut})

        settings = {"threshold": threshold, "giant": dedup.giant, "cut": dedup.cut}
        result = self.whole("components", 1, [found.digest], settings, [0], make)
        for folder in self.workdir.glob("stars-*"):
            shutil.rmtree(folder)
        return result

    def labels(self, found: Result, count: int, threshold: float) -> np.ndarray:
        """The components of the graph of similar pairs."""
        if self.config.engine == "local":
            return components.components(count, components.above(edges_of(found), threshold))

        def pairs(i: int) -> np.ndarray:
            return components.packed(components.above(edges_of(found, [i]), threshold))

        return self.engine.components(self.stage, found, pairs, {"threshold": threshold}, count, self.config.shard_rows)

    def leakage(self, pool: Known, evaluation: Known) -> "Leakage":
        """Of each image the most similar one of an evaluation set.

        By pixels both are cut: each one for its nearest of the other set. So of more than `neighbors.k` images that are parts
        of one evaluation image not all may be found."""
        by, k, rows = self.config.dedup.by, self.config.neighbors.k, self.config.shard_rows

        def compared(one: Known, other: Known, span: tuple[int, int], k: int) -> tuple[np.ndarray, np.ndarray]:
            found = nearest(one.vectors.read(*span), other.vectors, k)
            if by == "vectors":
                return found
            return found.ids, aligned(one.sketches.read(*span), other.sketches, found.ids)

        def to_evaluation(span: tuple[int, int]) -> Made:
            ids, similarity = compared(pool, evaluation, span, 1 if by == "vectors" else k)
            best = (np.arange(len(ids)), similarity.argmax(axis=1))
            return Made({"similarity": similarity[best], "place": ids[best]})

        def from_evaluation(span: tuple[int, int]) -> Made:
            ids, similarity = compared(evaluation, pool, span, k)
            return Made({"ids": ids, "similarity": similarity})

        inputs, settings = [pool.digest, evaluation.digest], {"by": by} | ({"k": k} if by == "pixels" else {})
        made = self.stage("leakage", 3, inputs, settings, spans(len(pool), rows), to_evaluation)
        similarity, place = made.array("similarity"), made.array("place")
        if by == "vectors":
            return Leakage(similarity, place, made.digest)
        back = self.stage("leakage_back", 2, inputs, settings, spans(len(evaluation), rows), from_evaluation)
        there = back.array("ids") != neighbors.NONE
        ids, found, of = back.array("ids")[there], back.array("similarity")[there], np.nonzero(there)[0].astype(np.int32)
        np.maximum.at(similarity, ids, found)
        better = (found == similarity[ids]) & (found > made.array("similarity")[ids])
        place[ids[better]] = of[better]
        return Leakage(similarity, place, digest_of(made.digest, back.digest))

    def without_leaks(self, wanted: Images, evaluation: Sequence[Images], threshold: float) -> Images:
        """A curated set without copies of evaluation images, which it says. Raises ValueError if nothing is left."""
        hit = np.zeros(len(wanted.good), bool)
        for images in evaluation:
            hit |= self.leakage(wanted.known, images.known).similarity >= threshold
        if not hit.any():
            return wanted
        rows, what = wanted.good[hit], wanted.source.description
        if hit.all():
            raise ValueError(f"all images of {what} are copies of evaluation images, at leakage.threshold={threshold:g}")
        example = wanted.source.name(int(rows[0]))
        tell(f"{len(rows):,} of {len(hit):,} images of {what} are left out: copies of evaluation images, such as {example}")
        return dataclasses.replace(wanted, left_out=rows)

    def refuse_nothing(self, state: Curation) -> None:
        count, left = len(state.labels), len(state.candidates)
        if left >= max(LEAST * count, min(FEW, count / 10)):
            return
        parts = len(np.unique(state.labels))
        raise ValueError(
            f"only {left:,} of {count:,} images would be left: at dedup.threshold={state.threshold:g} they are {parts:,} "
            f"components, {int(state.leaked.sum()):,} images go with evaluation images at "
            f"leakage.threshold={state.leakage_threshold:g}, {int(state.doubled.sum()):,} with images that a curated set has, "
            "too. Raise the thresholds, dedup.threshold and leakage.threshold"
        )

    # Choose

    def all(self, state: Curation, inputs: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        return state.candidates, {}

    def retrieve(self, state: Curation, inputs: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """What the curated sets ask for."""
        config, found = self.config.retrieve, list[Any]()
        if config.by == "image":
            candidates, asked = Subset(state.pool, state.candidates), np.zeros(len(state.candidates), bool)
            for images in state.curated:
                k = config.k or (4 if len(images.good) >= LARGE else 32)
                result = self.by_image(images, candidates, inputs, min(k, len(state.candidates)))
                for span in spans(len(images.good), PIECE):
                    asked[result.rows("ids").read(*span)] = True
                found.append((images, result))
            return state.candidates[asked], {"retrieved": found}
        made = self.clustered(state, inputs, min(config.clusters, len(state.candidates)))
        near, sizes = made.array("nearest"), np.bincount(made.array("nearest"), minlength=made.rows("centroids").shape[0])
        keys = state.keys[state.candidates]
        hits = []
        for images in state.curated:
            hit, _ = clusters.assign(images.known.vectors, made.array("centroids"))
            hits.append(np.bincount(hit[:, 0], minlength=len(sizes)))
            take = np.where(hits[-1] > config.hits, np.minimum(sizes, config.per_cluster), 0)
            rows = clusters.drawn(near, take, keys, self.config.seed)
            found.append(np.sort(rows[clusters.order(keys[rows], self.config.seed + 1)][: config.cap]))
        chosen = state.candidates[np.unique(np.concatenate(found))]
        if not len(chosen):
            raise ValueError(
                f"no cluster has more than retrieve.hits={config.hits} curated images: lower it, or retrieve.clusters"
            )
        return chosen, {"sizes": sizes, "hits": hits}

    def by_image(self, images: Images, candidates: Rows, inputs: list[str], k: int) -> Result:
        vectors = images.known.vectors

        def make(span: tuple[int, int]) -> Made:
            found = nearest(vectors.read(*span), candidates, k)
            return Made({"ids": found.ids, "similarity": found.similarity})

        shards = spans(len(images.good), self.config.shard_rows)
        return self.stage("retrieve", 1, [*inputs, images.digest], {"k": k}, shards, make)

    def clustered(self, state: Curation, inputs: list[str], count: int) -> Result:
        """Arrays centroids, and nearest of each candidate."""
        settings = {"clusters": count, "iterations": self.config.retrieve.iterations, "seed": self.config.seed}

        def make(_: int) -> Made:
            with self.resumed("clusters", inputs, settings) as kept:
                rows = Subset(state.pool, state.candidates)
                made = clusters.kmeans(rows, count, settings["iterations"], settings["seed"], **kept)
            return Made({"centroids": made.centroids, "nearest": made.nearest})

        return self.whole("clusters", 1, inputs, settings, [0], make)

    def balance(self, state: Curation, inputs: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """As many images as asked for, evenly from the branches of a tree of clusters."""
        config, rows = self.config.balance, Subset(state.pool, state.candidates)
        settings = {key: config[key] for key in ("clusters", "points", "rounds", "iterations")} | {"seed": self.config.seed}
        settings = json.loads(json.dumps(settings))
        if config.clusters[0] > len(state.candidates):
            count = len(state.candidates)
            fewer = tuple(max(1, each * count // (10 * config.clusters[0])) for each in config.clusters)
            left = f"balance.clusters[0] is {config.clusters[0]:,}, but {count:,} images are left"
            raise ValueError(f'{left}: ask for fewer clusters, such as --config.balance.clusters="{fewer}"')

        def step(level: int, number: int, make: clusters.Make) -> clusters.Clusters:
            def shard(_: int) -> Made:
                with self.resumed(inputs, settings, level, number) as kept:
                    made = make(kept)
                return Made({"centroids": made.centroids, "nearest": made.nearest, "similarity": made.similarity})

            at = {"level": level, "round": number}
            found = self.whole("balance", 1, inputs, settings | at, [0], shard)
            return clusters.Clusters(*(found.array(name) for name in ("centroids", "nearest", "similarity")))

        found = clusters.hierarchy(
            rows, config.clusters, config.iterations, config.rounds, config.points, self.config.seed, step
        )
        keys = state.keys[state.candidates]
        chosen = clusters.balanced(found, config.images, keys, self.config.seed)
        after = np.bincount(found[0].nearest[chosen], minlength=len(found[0].centroids))
        return state.candidates[chosen], {"sizes": found[0].sizes, "after": after}

    # Write

    def write(self, state: Curation) -> None:
        """list.json and its rows, provenance.parquet, report.html: each is replaced at once, the list last."""
        page = report.page(state).encode(errors="backslashreplace")
        rows = listed(state)
        content = io.BytesIO()
        np.save(content, rows)
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        file = f"rows-{digest[:16]}.npy"
        everything = state.uncurated + (state.curated if self.config.write.curated else [])
        about = {
            "sources": [images.how | {"fingerprint": images.source.fingerprint} for images in everything],
            "file": file,
            "sha256": digest,
            "held_out": state.evaluation[0].how if state.evaluation else None,
        }
        with named_errors(self.workdir), contextlib.ExitStack() as drafts:
            # All are written before the first takes the place of an older one: the list is the last.
            listing, reported = (drafts.enter_context(replacing(self.workdir / name)) for name in (curated.LIST, "report.html"))
            told, array = (drafts.enter_context(replacing(self.workdir / name)) for name in ("provenance.parquet", file))
            listing.write(json.dumps(about, indent=1).encode())
            reported.write(page)
            write_parquet(told, provenance(state))
            array.write(content.getvalue())
            for draft in (listing, reported, told, array):
                draft.flush()
        with named_errors(self.workdir):
            for old in self.workdir.glob("rows-*.npy"):
                if old.name != file:
                    old.unlink()
        weight, more = self.config.write.curated, len(rows) - len(state.chosen)
        times = "" if weight == 1 else f", each {weight:g} times in an epoch"
        curated_ones = f"; in the list also {more:,} curated ones{times}" if more else ""
        tell(f"chosen: {len(state.chosen):,} of {len(state.member):,} images{curated_ones}")
        tell(f"train on them: mim_jax --config=NAME --config.data.name=curated --config.data.dir={self.workdir}")
        tell(f"report: {self.workdir / 'report.html'}")


class Kept:
    """The centroids of a k-means after its last iteration, in a folder that is removed when the k-means is done."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> dict[str, Any]:
        """`begin` and `keep` of `clusters.kmeans`."""
        files = sorted(self.folder.glob("*.npy"))
        begin = (int(files[-1].stem), np.load(files[-1])) if files else None
        return {"begin": begin, "keep": self.keep}

    def keep(self, iteration: int, centroids: np.ndarray) -> None:
        content = io.BytesIO()
        np.save(content, centroids)
        with named_errors(self.folder):
            write_whole(self.folder / f"{iteration:06}.npy", content.getvalue())
            for file in sorted(self.folder.glob("*.npy"))[:-1]:
                file.unlink()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)


def edges_of(found: Result, shards: Sequence[int] | None = None) -> Iterator[components.Edges]:
    """Of a result of `Stages.neighbors`, shard by shard."""
    for i in range(found.manifest["shards"]) if shards is None else shards:
        query, ids, similarity = (np.load(found.folder / f"{i:06}.{name}.npy") for name in ("query", "ids", "similarity"))
        there = ids != neighbors.NONE
        yield np.broadcast_to(query[:, None], ids.shape)[there], ids[there], similarity[there]


def listed(state: Curation) -> np.ndarray:
    """The rows of the list, `curated.ROW`, by source and row."""

    def rows(source: np.ndarray | int, row: np.ndarray, weight: float) -> np.ndarray:
        made = np.zeros(len(row), curated.ROW)
        made["source"], made["row"], made["weight"] = source, row, weight
        made["draw"] = (clusters.mixed(row.astype(np.uint64), state.config.seed) >> np.uint64(40)) / 2.0**24
        return made

    chosen = np.sort(state.origin[state.chosen])
    found = [rows(*state.places(chosen[slice(*span)]), 1.0) for span in spans(len(chosen), PIECE)]
    weight = state.config.write.curated
    for i, images in enumerate(state.curated if weight else []):
        found += [rows(len(state.uncurated) + i, images.good[slice(*span)], weight) for span in spans(len(images.good), PIECE)]
    return np.concatenate(found)


def all_of(uncurated: Sequence[Images], name: str) -> Files:
    """An array of the rows of all these sets, one after the other."""
    return Files([file for images in uncurated for file in images.result.rows(name).files])


def asked_by(state: Curation) -> tuple[np.ndarray, np.ndarray]:
    """Of each image of the pool a curated image that it is nearest to, of those that it was retrieved for: the set, int16
    [pool], -1 if it was retrieved for none, and the place among the good ones, int32 [pool]. Of equal ones the first."""
    best = np.full(len(state.labels), -np.inf, np.float32)
    sets, places = np.full(len(best), -1, np.int16), np.zeros(len(best), np.int32)
    for number, (images, result) in enumerate(state.why.get("retrieved", ())):
        for start, stop in spans(len(images.good), PIECE):
            ids = state.candidates[result.rows("ids").read(start, stop)]
            similarity = result.rows("similarity").read(start, stop)
            before = best[ids]
            np.maximum.at(best, ids, similarity)
            place, rank = np.nonzero((similarity > before) & (similarity == best[ids]))
            asked = ids[place, rank][::-1]  # of those that are set several times the last one stays
            sets[asked], places[asked] = number, start + place[::-1]
    return sets, places


def also_curated(uncurated: Sequence[Images], wanted: Sequence[Images], origin: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The numbers in the pool of images that are in a curated set, too, with the same pixels."""
    sha256, there = all_of(uncurated, "sha256"), set[bytes]()
    for images in wanted:
        there |= {each.tobytes() for each in Subset(images.result.rows("sha256"), images.good).read(0, len(images.good))}
    begins = np.array([int.from_bytes(each[:8]) for each in there], np.uint64)
    parts = [start + np.flatnonzero(np.isin(keys[start:stop], begins)) for start, stop in spans(len(keys), PIECE)]
    maybe = np.concatenate([np.zeros(0, np.int64), *parts])
    return maybe[[each.tobytes() in there for each in sha256.take(origin[maybe])]] if len(maybe) else maybe


def provenance(state: Curation) -> Iterator[dict[str, list[Any]]]:
    """A row for each image of the uncurated sets, in parts: which it is, and what has become of it and why."""
    import pyarrow

    sizes = np.bincount(state.labels, minlength=len(state.labels)).astype(np.int32)
    most, in_set = None, np.zeros(len(state.labels), np.int16)
    for number, leak in enumerate(state.leaks):  # of equal ones the first
        in_set[leak > (-np.inf if most is None else most)] = number
        most = leak if most is None else np.maximum(most, leak)
    candidate, chosen, leaked = (np.zeros(len(state.labels), bool) for _ in range(3))
    candidate[state.candidates], chosen[state.chosen], leaked[:] = True, True, state.leaked
    hit = state.hit
    reasons = np.array(  # the first that holds
        ["bad image", "copy of an evaluation image", "in one component with such a copy", "exact copy of another image"]
        + ["also in a curated set, or in one component with such", "near-duplicate of another image", "not chosen", "chosen"]
    )
    sha256, (asked, place) = all_of(state.uncurated, "sha256"), asked_by(state)

    def asking(m: int) -> str:
        if asked[m] < 0:
            return ""
        images = state.curated[asked[m]]
        return images.source.name(int(images.good[place[m]]))

    def resembling(m: int) -> str:
        if m < 0 or not hit[m]:  # without evaluation sets none is hit
            return ""
        images, places = state.evaluation[in_set[m]], state.resembled[in_set[m]]
        return images.source.name(int(images.good[places[m]]))

    def part(images: Images, table: Any, first_row: int, start: int) -> dict[str, list[Any]]:
        count = len(table)
        member, where = state.member[start : start + count], np.arange(start, start + count)
        there = np.maximum(member, 0)
        copy, doubled = state.origin[there] != where, state.doubled[there]
        holds = [member < 0, hit[there], leaked[there], copy, doubled, ~candidate[there], ~chosen[there]]
        fate = reasons[np.select(holds, list(range(len(holds))), len(holds))]
        label = state.labels[there]
        first = sha256.take(state.origin[label])
        return {
            "set": [shown(images.source.description)] * count,
            "row": list(range(first_row, first_row + count)),
            "name": [images.source.name(row) for row in range(first_row, first_row + count)],
            "label": table["label"].to_pylist(),
            "sha256": [each.tobytes().hex() for each in sha256.read(start, start + count)],
            "dhash": [f"{each:016x}" for each in table["dhash"].to_pylist()],
            "why_bad": table["bad"].to_pylist(),
            "component": [each.tobytes().hex() if m >= 0 else "" for each, m in zip(first, member.tolist())],
            "component_size": np.where(member < 0, 0, sizes[label]).tolist(),
            "evaluation_similarity": [None] * count
            if most is None
            else pyarrow.array(most[there].astype(np.float64), mask=member < 0),
            "evaluation_image": [resembling(m) for m in member.tolist()],
            "fate": fate.tolist(),
            "asked_by": [asking(m) if told == "chosen" else "" for m, told in zip(member.tolist(), fate.tolist())],
        }

    start = 0
    for images in state.uncurated:
        row = 0
        for table in images.result.tables("label", "dhash", "bad"):
            for first, end in spans(len(table), TOLD):  # as lists of Python they are large
                yield part(images, table.slice(first, end - first), row + first, start + first)
            row, start = row + len(table), start + len(table)
