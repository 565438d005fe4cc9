"""Configs: a Python file with `get_config(variant)`, on the same skeleton for every method."""

import runpy
from pathlib import Path

import ml_collections
from ml_collections.config_dict import placeholder


def load_config(spec: str) -> ml_collections.ConfigDict:
    """The locked config of `"configs/dino.py"` or, with a variant, `"configs/dino.py:demo"`, as `--config` reads it.

    Raises FileNotFoundError for the file and ValueError, which names those that there are, for the variant.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    module = runpy.run_path(path)
    if variant and "VARIANTS" in module and variant not in module["VARIANTS"]:
        raise ValueError(f"{path} has no variant {variant!r}, only {', '.join(module['VARIANTS'])}")
    return (module["get_config"](variant) if variant else module["get_config"]()).lock()


def skeleton() -> ml_collections.ConfigDict:
    """What the configs of all methods have: data (ImageNet-1k), optimizer, evaluation, checkpoints, mesh."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.total = placeholder(str)  # this and all durations: "3500 steps", "800 epochs" or "1_000_000 examples"

    config.data = ml_collections.ConfigDict()
    config.data.name = "imagenet2012"  # "cifar10", "folder", or any data set that TFDS has prepared
    config.data.dir = placeholder(str)  # TFDS directory, or the folder
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.data.num_examples = 1_281_167  # main.py puts in what the source really has
    config.data.batch_size = 1024  # global
    config.data.canvas = 320  # images are decoded to fit a square of this size, in pixels
    config.data.workers = 8  # decoding processes on each host
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.model = ml_collections.ConfigDict()
    config.model.img_size = 224
    config.model.mlp_ratio = 4.0
    config.model.drop_path_rate = 0.0
    config.model.dtype = "bfloat16"
    config.model.unroll = 1  # blocks a loop iteration holds: larger compiles longer

    config.crops = ml_collections.ConfigDict()
    config.crops.global_crops_number = 1

    config.optim = ml_collections.ConfigDict()
    config.optim.name = "adamw"
    config.optim.schedule = "dino"  # of the learning rate: see mim_jax/optim.py
    config.optim.lr_batch_size = 256  # that lr is for; 0: whatever data.batch_size
    config.optim.lr_batch_power = 1.0  # lr is scaled by (data.batch_size / lr_batch_size) ** this
    config.optim.min_lr = 0.0
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = 0.05
    config.optim.weight_decay_end = 0.05
    config.optim.not_decayed = r"(bias|scale|gamma_\d)$"  # a regex over parameter paths
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip_grad = 0.0  # L2 norm; 0: never
    config.optim.clip_per = "model"  # or "parameter", or "part": backbone, head, ...
    config.optim.layer_decay = 1.0
    config.optim.patch_embed_lr = 1.0  # a factor
    config.optim.freeze_last_layer = "0 steps"
    config.optim.freeze_last_layer_by = "update"  # or "lr": only the rate is 0, Adam's averages move

    config.eval = ml_collections.ConfigDict()
    config.eval.every = "10 epochs"  # or "never"
    config.eval.bank = 50_000  # images of the training split that vote
    config.eval.test = 10_000
    config.eval.batch_size = 256
    config.eval.img_size = placeholder(int)  # of the pictures it is measured on; None: model.img_size
    config.eval.resize = 0.875  # side of the central square, as a share of the image's short side
    config.eval.tokens = "cls"  # or "patch": the mean of the patch tokens
    config.eval.standardize = False  # for the k-NN: each feature less its mean over its std on the bank

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = "1 epoch"
    config.checkpoint.keep = 2

    config.log_every = "50 steps"
    config.max_skipped = 20  # stop after so many steps in a row whose loss or gradient is not finite

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.rules = (  # the first regex found in an array's path says which of its axes are cut, and how
        (r"blocks/.*/kernel$", (None, None, "fsdp")),
        (r"patch_embed/kernel$", (None, None, None, "fsdp")),
    )

    config.init_from = placeholder(str)  # a run's workdir: start from what it learned, at whatever image size
    config.init_parts = ()  # the parts of it that are taken, ("backbone",); none named: all
    config.resume = placeholder(str)  # a run's workdir: continue it here
    return config


def on_cifar10(config: ml_collections.ConfigDict) -> None:
    """Turns a recipe into one for CIFAR-10 and a laptop."""
    config.data.update(name="cifar10", eval_split="test", num_examples=50_000, canvas=32, workers=0)
    config.model.update(img_size=32, dtype="float32")
    config.eval.update(every="500 steps", bank=5000, test=2000, resize=1.0)
    config.checkpoint.every = "500 steps"
    config.log_every = "25 steps"


def hours_on_cifar10(config: ml_collections.ConfigDict, total: str) -> None:
    """Turns the demo of DINO or a method that follows it into a longer run of a wider network."""
    config.total = total
    config.model.update(dim=128, heads=4, init_std=0.09)
    config.optim.update(lr=6e-3, warmup="500 steps", weight_decay_end=0.4)
    config.optim.update(freeze_last_layer="500 steps", momentum_teacher=0.99)
    config.eval.update(every="2500 steps", test=10_000, img_size=64)
    config.checkpoint.every = "2500 steps"
    config.log_every = "100 steps"


def learns_from(config: ml_collections.ConfigDict, path: str, family: str) -> None:
    """Adds the section of the fixed network, a tokenizer or teacher, that the targets come from: see mim_jax/target.py."""
    config.target = ml_collections.ConfigDict()
    config.target.config = path
    config.target.workdir = placeholder(str)
    config.target.weights = placeholder(str)
    config.target.family = family
