"""Curation: embeddings -> deduplication -> retrieval or balancing -> a list of images to train on (see mim_jax/curate).

    python -m mim_jax.curate --config=curate --config.uncurated=~/heap --config.curated=imagenet2012 \\
      --config.evaluation=imagenet2012@validation --config.embedder=runs/dino --workdir=runs/curated
    mim_jax --config=mae:vitb16 --config.data.name=curated --config.data.dir=runs/curated --workdir=runs/mae

Variant that needs nothing:

    demo   CIFAR-10 with a long tail, copies of its images and test images planted; whitened pixels in place of an embedder
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(variant: str = "web") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Sets: a folder, or a data set as in the recipes, with "@SPLIT" for another split than "train"; several with commas. The
    # workdir of a finished curation is the set of its images.
    config.uncurated = ""
    config.curated = ""
    config.evaluation = ""
    config.data_dir = placeholder(str)  # of TFDS data sets
    config.levels = placeholder(tuple)  # (black, white) of images of more than 8 bits; None: as the network, or measured

    config.embedder = placeholder(str)  # a run's workdir, or a file or folder of weights; None: whitened pixels
    config.heads, config.act = 0, ""  # of a file of weights that does not say it
    config.kind = "cls"  # or "mean" (of the patches), or "cls+mean", joined
    config.block = placeholder(int)  # of the network, after which features are taken, from 1 on; None: the last
    config.whiten = 128  # components of the network's features, made white; 0: the features as they are
    config.size = placeholder(int)  # side, in pixels, that the network sees; None: that of the run

    config.shard_rows = 65_536  # images of a shard: what a kill can lose
    config.workers = 1  # threads of the local engine that work on shards; the devices are all used anyway
    config.engine = "local"  # or "beam": Apache Beam, see docs/curation.md
    config.beam = ml_collections.ConfigDict()
    config.beam.options = ("--runner=FnApiRunner",)  # this one: Beam in this process
    config.beam.shared = False  # the workers of other machines see the workdir, and the images, under the same paths
    config.select = "retrieve"  # or "balance", or "all": only deduplicated

    config.neighbors = ml_collections.ConfigDict()
    config.neighbors.k = 64
    config.neighbors.exact = 2_000_000  # images up to which all pairs are compared; above within cells of a k-means
    config.neighbors.cells = 4096
    config.neighbors.probes = 256  # cells, the nearest, in which the neighbors of an image are looked for
    config.neighbors.sample = 1000  # images of which the recall of the cells is measured

    config.dedup = ml_collections.ConfigDict()
    # How similar neighbors are: by "pixels", over crops and mirror images (mim_jax/curate/alignment.py), or the cosine of their
    # "vectors", which also finds images that are much alike, but no copies. It holds for copies of evaluation images, too.
    config.dedup.by = "pixels"
    # From which on two images are one; None: calibrated. That of vectors belongs to their embedder; by pixels it should be 0.75
    # or more, as smaller similarities are coarse.
    config.dedup.threshold = placeholder(float)
    config.dedup.giant = 0.01  # share of the pool from which on a component is reported as giant
    config.dedup.cut = 0.0  # giant components of a lower edge density are cut; 0: never

    config.leakage = ml_collections.ConfigDict()
    config.leakage.threshold = placeholder(float)  # the same for copies of evaluation images; None: that of dedup

    config.calibrate = ml_collections.ConfigDict()
    # Copies are made of images of the first evaluation or curated set that has at least 1,000; else of the largest set.
    config.calibrate.images = 6000  # fewer make fewer pairs: too few to see rare mistakes
    config.calibrate.precision = 0.99  # of the pairs above the threshold, in the whole pool
    config.calibrate.share = 0.1  # of the pool, images that are supposed to be copies: the fewer, the higher the threshold

    config.retrieve = ml_collections.ConfigDict()
    config.retrieve.by = "image"  # or "cluster"
    config.retrieve.k = placeholder(int)  # nearest of each curated image; None: 4 for sets of a million or more, else 32
    config.retrieve.clusters = 100_000
    config.retrieve.iterations = 20
    config.retrieve.hits = 3  # clusters with more than so many curated images are drawn from
    config.retrieve.per_cluster = 10_000
    config.retrieve.cap = 1_000_000  # images for one curated set, by cluster

    config.balance = ml_collections.ConfigDict()
    config.balance.clusters = (50_000, 5_000, 500)  # of each level, the lowest first
    config.balance.points = (10, 5, 3)  # of each cluster that a round of resampling has
    config.balance.rounds = 10
    config.balance.iterations = 50
    config.balance.images = 1_000_000  # that are chosen

    config.write = ml_collections.ConfigDict()
    # How often an epoch has each image of the curated sets; 0: only what was chosen from the pool. Otherwise images of the pool
    # that are also in a curated set are not chosen: they are in the list already.
    config.write.curated = 1.0

    config.plant = ml_collections.ConfigDict()  # into the first uncurated set; for demonstrations
    config.plant.copies = 0
    config.plant.evaluation = 0  # images of the first evaluation set
    config.plant.imbalance = 1.0  # the largest class over the smallest

    VARIANTS[variant](config)
    return config


def demo(config):
    config.update(uncurated="cifar10@train[:80%]", curated="cifar10@train[98%:]", evaluation="cifar10@test")
    config.plant.update(copies=4000, evaluation=1000, imbalance=10.0)
    config.calibrate.share = 0.19  # 4,000 of 21,241
    config.retrieve.k = 8
    config.balance.update(clusters=(1000, 100), points=(10, 5), rounds=3, iterations=15, images=8000)


VARIANTS = {"web": lambda config: None, "demo": demo}
