"""Configs: a Python file with `get_config(variant)`, on the same skeleton for every method; the check of their values."""

import json
import math
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from mim_jax import durations, storage
from mim_jax.sharding import current_mesh

PACKAGED = next(path / "configs" for path in Path(__file__).parents if (path / "configs").is_dir())


def load_config(spec: str) -> ml_collections.ConfigDict:
    """The locked config of "dino:demo" or "configs/dino.py:demo", a name or a file and a variant, which may be left out.

    A path that is no file is looked for among the configs that come with mim_jax. `config.recipe` is the spec, and
    `config.target.network` is filled in, see `resolve_target`. Raises FileNotFoundError for the file and ValueError for the
    variant; the messages list those that exist.
    """
    file = config_file(spec)
    _, _, variant = spec.partition(":")
    module = runpy.run_path(str(file))
    if variant and "VARIANTS" in module and variant not in module["VARIANTS"]:
        raise ValueError(f"{file} has no variant {variant!r}, only {', '.join(module['VARIANTS'])}")
    config = module["get_config"](variant) if variant else module["get_config"]()
    config.recipe = recipe(spec)
    resolve_target(config)
    return config.lock()


def config_file(spec: str) -> Path:
    """The file of a spec as in `load_config`. Raises FileNotFoundError."""
    file = Path(spec.partition(":")[0]).expanduser()
    if file.suffix == ".py" and file.is_file():
        return file.absolute()
    packaged = PACKAGED / f"{file.stem}.py"
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".py") and packaged.is_file():
        return packaged
    names = ", ".join(sorted(path.stem for path in PACKAGED.glob("*.py")))
    raise FileNotFoundError(f"there is no config file {file.absolute()}; mim_jax comes with {names}")


def recipe(spec: str) -> str:
    """One name for a config, however it was named: that of a packaged one, else the absolute path; with its variant."""
    file, (_, colon, variant) = config_file(spec), spec.partition(":")
    return (file.stem if file.parent == PACKAGED else str(file)) + colon + variant


def resolve_target(config: ml_collections.ConfigDict) -> None:
    """Fills in `config.target.network`, the config of the network that the targets come from: that of the run in
    `target.workdir`, if there is one, else `target.config`; but that of the encoder in the file `target.weights`, if this is
    not an official file of `target.config`, see `convert.OFFICIAL`. Paths become absolute. Without `config.target`: nothing.

    What the command line changed of `target.network` is kept, unless `target.config` was changed too.
    """
    target = config.get("target")
    if target is None:
        return
    with target.unlocked():
        for key in ("workdir", "weights"):
            target[key] = absolute(target[key])
        saved = storage.absolute(target.workdir or "") / "config.json"
        if target.workdir and saved.is_file():
            target.network = ml_collections.ConfigDict(json.loads(saved.read_text()))
            resolve_target(target.network)
            target.config = target.network.get("recipe", target.config)
            return
        target.config = recipe(target.config)
        if target.network.get("recipe") != target.config:
            target.network = load_config(target.config).unlock()
        if target.weights and not is_official(target):
            target.network = imported(target.weights)


def kind(network: ml_collections.ConfigDict) -> str:
    """The method whose network a config describes, or the network that is of no method."""
    return network.get("method") or network.get("network") or ""


def is_official(target: ml_collections.ConfigDict) -> bool:
    """Whether `target.weights` is to be read as an official file of the network of `target.config`."""
    from mim_jax import convert  # which needs models, and they this file

    name = kind(target.network)
    if name not in convert.OFFICIAL:
        return False
    has_encoder = name in ("clip", "dinov2")  # which may be in a file of another layout, or without heads
    return not has_encoder or convert.recognised(convert.arrays_of(target.weights), name) is not None


OF_BACKBONE = ("arch", "patch_size", "dim", "depth", "depths", "heads", "window", "mlp_ratio", "pos", "layerscale")


def begins_with(config: ml_collections.ConfigDict) -> str:
    """The run or file of weights that a run begins with, in `config.init_from` or `config.continue_from`; "": from scratch."""
    return config.get("init_from") or config.get("continue_from") or ""


def resolve_encoder(config: ml_collections.ConfigDict, workdir: str | Path = "") -> None:
    """Fills in `config.encoder`, where there is such a section, with the config of the run that it `begins_with`, whose
    backbone is fine-tuned or probed. What describes this backbone in `config.model`, and the mean and std of the images, become
    those of the run. Without one: nothing. A run that goes on in `workdir` has kept the config, and needs the other
    no more. Raises FileNotFoundError if there is no such run, and ValueError if the config asks for another backbone or other
    mean and std, by values that are not those of its recipe.
    """
    if "encoder" not in config or not begins_with(config):
        return
    key = "init_from" if config.init_from else "continue_from"
    config[key] = absolute(config[key])
    there, own = storage.absolute(config[key]), storage.absolute(workdir or ".") / "config.json"
    saved = (there.parents[1] if there.parent.name == "checkpoints" else there) / "config.json"  # of one of its checkpoints
    kept = json.loads(own.read_text()) if workdir and own.is_file() else {}
    if kept.get(key) == config[key] and kept.get("encoder"):
        encoder = ml_collections.ConfigDict(kept["encoder"])
    elif run := of_run(saved):
        encoder = ml_collections.ConfigDict(run)
    else:
        encoder = imported(config[key])
    model, recipe = encoder.get("model", {}), load_config(config.recipe) if config.get("recipe") else config
    theirs = {f"model.{name}": model.get(name) for name in OF_BACKBONE}
    theirs |= {"data.mean": tuple(encoder.data.mean), "data.std": tuple(encoder.data.std)}
    for name, value in theirs.items():
        section, name = name.split(".")
        asked = config[section].get(name)
        if asked != recipe[section].get(name) and asked != value:
            raise ValueError(f"{section}.{name} is {asked}, but that of {config[key]} is {value}: leave it out")
    with config.unlocked():
        config.encoder = encoder
        for name in OF_BACKBONE:
            if name in config.model:
                del config.model[name]
            if name in model:
                config.model[name] = model[name]
        config.data.mean, config.data.std = theirs["data.mean"], theirs["data.std"]


def of_run(file: Path) -> dict[str, Any]:
    """The config that a run has written to its `config.json`; {} if the file is missing, damaged or of another program."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and {"method", "optim", "data"} <= found.keys() else {}


def imported(path: str) -> ml_collections.ConfigDict:
    """The config of the encoder in a file of weights. Raises FileNotFoundError if there is none, and ValueError as
    `layouts.read`."""
    from mim_jax import layouts  # which needs models, and they this file

    if not layouts.is_weights(path):
        raise FileNotFoundError(f"there is neither a run nor a file of weights in {path}")
    weights = layouts.read(path)
    data = {"mean": weights.mean, "std": weights.std}
    return ml_collections.ConfigDict({"method": "imported", "model": weights.settings, "data": data})


def absolute(path: str | None) -> str | None:
    """The absolute path, `~` expanded; an address such as gs://bucket/folder as it is."""
    return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))


# What the numbers at a key, given by a regex, must be; of several the first holds.
NUMBERS = (
    (r"mesh\.(data|fsdp)", "[-1, inf)"),
    (r"seed", f"[0, {2**32})"),
    (r"data\.mean", "[0, 1]"),
    (r"data\.std", "(0, 1]"),
    (r"data\.levels", "(-inf, inf)"),
    (r"data\.(batch_size|canvas|max_pixels)|eval\.(bank|test|batch_size|img_size)|max_skipped", "[1, inf)"),
    (r"model\.(img_size|patch_size|dim|depths?|heads|window|hidden|layers|codes|codebook_dim|\w+_depth)", "[1, inf)"),
    (r"model\.(unroll|microbatches)", "[1, inf)"),
    (r"head\.patch_out_dim", "[0, inf)"),
    (r"\w+\.(dim|depth|heads|codes)|(ibot_)?head\.(\w+_dim|vocab_size|nlayers)", "[1, inf)"),
    (r"crops\.(\w+_size|global_crops_number)|probe\.blocks|mask\.(group_size|mask_patch_size|count|smallest)", "[1, inf)"),
    (r"loss\.koleo_groups", "[1, inf)"),
    (r"model\.drop_path_rate|optim\.(beta\d|momentum)", "[0, 1)"),
    (r"model\.(mlp_ratio|init_std)|optim\.eps|loss\.\w*temp(erature)?", "(0, inf)"),
    (r"augment\.magnitude", "[0, 10]"),
    (r"augment\.erasing|loss\.label_smoothing", "[0, 1]"),
    (r"crops\.\w+_scale|eval\.resize|optim\.decay_rate|\w+\.layer_decay", "(0, 1]"),
    (r"optim\.((min|warmup)_)?lr", "[0, 10]"),  # 3 is that of MoCo v3's linear probe
    (r"optim\.momentum_teacher(_end)?|loss\.\w+_momentum|quantizer\.decay", "[0, 1]"),
    (r"mask\.(ratios?|probability)|optim\.lr_batch_power", "[0, 1]"),
    (r".*", "[0, inf)"),
)
RANGES = r"crops\.(\w+_scale|blur_radius)|mask\.ratio"  # keys whose tuples are (low, high)
WORDS = {
    "model.dtype": ("bfloat16", "float16", "float32", "float64"),
    "model.ffn": ("mlp", "swiglu", "swiglu_eva"),
    "model.pos": ("learned", "sincos", "sincos_row_first", "relative", "relative_each", "none"),
    "model.act": ("gelu", "quick_gelu"),
    "model.pool": ("cls", "mean"),
    "model.remat": ("none", "dots", "full", "auto"),
    "mask.shape": ("block", "random"),
    "crops.interpolation": ("bicubic", "bilinear", "lanczos"),
    "crops.target_interpolation": ("bicubic", "bilinear", "lanczos"),
    "loss.centering": ("centering", "sinkhorn_knopp"),
    "optim.name": ("adamw", "lars", "sgd"),
    "optim.schedule": ("dino", "mae", "timm_cosine", "timm_multistep"),
    "optim.clip_per": ("model", "part", "parameter"),
    "optim.freeze_last_layer_by": ("update", "lr"),
    "eval.tokens": ("cls", "patch"),
}
DURATIONS = ("optim.warmup", "optim.freeze_last_layer", "mask.start") + tuple(
    f"loss.{name}" for name in ("teacher_temp_warmup", "temperature_decay", "kl_warmup")
)
INTERVALS = ("eval.every", "checkpoint.every", "log_every")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first value that cannot be, with its key and what it must be.

    Of keys alone; what only a method knows is checked where it is made. Under a mesh batches must be divisible by its devices,
    and the images of a device by `mask.group_size`: a group that several devices had to work on would be slow.
    """
    values = dict(leaves(config))

    def wrong(key: str, must: str) -> ValueError:
        value = values[key]
        return ValueError(f"{key} is " + (f'"{value}"' if isinstance(value, str) else f"{value}") + f", but {must}")

    for key, value in values.items():
        several, found = isinstance(value, (tuple, list)), list(flat(value))
        name = re.sub(r"^(encoder\.|target\.network\.)+", "", key)
        pattern, interval = next(pair for pair in NUMBERS if re.fullmatch(pair[0], name))
        real = [x for x in found if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if name in WORDS and value not in WORDS[name]:
            raise wrong(key, "must be " + " or ".join(f'"{word}"' for word in WORDS[name]))
        if not all(within(x, interval) for x in real) or (several and pattern != ".*" and len(real) < len(found)):
            hint = ": divide levels of 0..255 by 255" if name in ("data.mean", "data.std") else ""
            raise wrong(key, f"{'each ' * several}must be in {interval}{hint}")
        if name in ("data.mean", "data.std") and len(real) != 3:
            raise wrong(key, "must be three numbers, of red, green and blue")
        if name == "data.levels" and several and (len(real) != 2 or real[0] >= real[1]):
            raise wrong(key, "must be (black, white), two numbers, the first below the second")
        if re.fullmatch(RANGES, name) and several and (len(real) != 2 or real[0] > real[1]):
            raise wrong(key, "must be (low, high)")

    if "target" in config and config.target.network.get("recipe", config.target.config) != config.target.config:
        raise ValueError(f"target.config was changed to {config.target.config}: call mim_jax.config.resolve_target(config)")
    if (begin := begins_with(config)) and not config.get("encoder", True):
        key = "init_from" if config.init_from else "continue_from"
        raise ValueError(f"{key} was changed to {begin}: call mim_jax.config.resolve_encoder(config)")
    total = durations.total_steps(config)
    if config.get("continue_from"):
        if config.init_from:
            raise ValueError("init_from and continue_from are both given, but a run begins with one of them")
        durations.steps(config, "continued.ramp")
        if durations.steps(config, "continued.frozen") >= total:
            frozen = config.continued.frozen
            raise ValueError(f'continued.frozen is "{frozen}", but must be shorter than the run, {total} steps')
    for key in DURATIONS:
        if key in values:
            durations.steps(config, key)
    for key in INTERVALS:
        durations.interval(config, key)
    if "optim.decay_at" in values:
        durations.steps_of_each(config, "optim.decay_at")

    for key in [key for key in values if key.endswith(".heads")]:
        for stage, heads in enumerate(flat(values[key])):  # a Swin doubles its width from stage to stage
            if (width := values[key.removesuffix("heads") + "dim"] * 2**stage) % heads:
                raise wrong(key, f"must divide the width: {heads} does not divide {width}")
    if patch := values.get("model.patch_size"):
        stride = patch * 2 ** (len(values.get("model.depths", (1,))) - 1)
        unused = () if values.get("crops.local_crops_number", 1) else ("crops.local_crops_size",)
        for key in ("model.img_size", "eval.img_size", "crops.global_crops_size", "crops.local_crops_size"):
            if (values.get(key) or 0) % stride and key not in unused:
                raise wrong(key, f"must be a multiple of {stride} pixels, the model's patches (model.patch_size={patch})")
    if values.get("mask.smallest", 0) > values.get("mask.count", math.inf):
        raise wrong("mask.smallest", f"must be at most mask.count={values['mask.count']}")
    if values["data.batch_size"] % (group := values.get("mask.group_size", 1)):
        raise wrong("data.batch_size", f"must be a multiple of mask.group_size={group}")
    if values["data.batch_size"] // group % values.get("loss.koleo_groups", 1):
        raise wrong("loss.koleo_groups", f"must divide the {values['data.batch_size'] // group} groups of a batch")
    if not all(isinstance(rule, (tuple, list)) and len(rule) == 2 for rule in values["mesh.rules"]):
        raise wrong("mesh.rules", "must be pairs of a regex and a tuple of mesh axes")
    mesh = current_mesh()
    for key in ("data.batch_size", "eval.batch_size"):
        if mesh and values[key] % mesh.size:
            raise wrong(key, f"must be a multiple of the {mesh.size} devices")
    if mesh and (each := values["data.batch_size"] // mesh.size) % group:
        fits = math.gcd(each, group)
        raise wrong(
            "mask.group_size", f"must divide the {each} images of the batch that each of {mesh.size} devices has: {fits}"
        )
    if (each := values["data.batch_size"] // (mesh.size if mesh else 1) // group) % values.get("model.microbatches", 1):
        what = "images" if group == 1 else f"groups of {group} images"
        raise wrong("model.microbatches", f"must divide the {each} {what} of the batch that each device has")


def leaves(config: ml_collections.ConfigDict | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a config, or in what JSON has made of one; the keys of sections joined by dots."""
    for key, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, dict)):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flat(value: Any) -> Iterator[Any]:
    """A value itself, or what is in a tuple and its tuples."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from flat(each)
    else:
        yield value


def within(number: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; no interval has NaN or infinity."""
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def skeleton() -> ml_collections.ConfigDict:
    """What the configs of all methods have: data (ImageNet-1k), optimizer, evaluation, checkpoints, mesh."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.total = placeholder(str)  # this and all durations: "3500 steps", "800 epochs" or "1_000_000 examples"
    for section in ("data", "model", "crops", "optim", "eval", "checkpoint", "mesh", "continued"):
        config[section] = {}

    config.data.name = "imagenet2012"  # "cifar10", "folder", or any data set that TFDS has prepared
    config.data.dir = placeholder(str)  # TFDS directory, or the folder
    config.data.split = "train"  # or a slice, in the syntax of TFDS: "train[:90%]" to train, "train[90%:]" to choose by
    config.data.eval_split = "validation"
    config.data.num_examples = 1_281_167  # a run sets these three to what its source has
    config.data.num_classes = 1000
    config.data.fingerprint = placeholder(str)  # of names, labels and some images: see mim_jax/data/sources.py
    config.data.batch_size = 1024  # global
    config.data.canvas = 512  # images are decoded to fit a square of this size, in pixels; most of ImageNet keep their own
    config.data.levels = placeholder(tuple)  # (black, white) of images of more than 8 bits; None: measured at the start
    config.data.max_pixels = 89_478_485  # larger images are refused; decoding takes up to 8 bytes of memory for each
    config.data.workers = placeholder(int)  # processes that decode, of each process; None: half as many as cores; 0: threads
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.model.img_size = 224
    config.model.mlp_ratio = 4.0
    config.model.drop_path_rate = 0.0
    config.model.dtype = "bfloat16"
    config.model.unroll = 1  # blocks a loop iteration holds: larger compiles longer
    config.model.remat = "none"  # what is computed again in the backward pass, to save memory: "none", "dots", "full", "auto"
    config.model.microbatches = 1  # parts of the batch that go through the blocks one after another, and twice, to save memory

    config.crops.global_crops_number = 1

    config.optim.name = "adamw"  # or "lars", "sgd"
    config.optim.schedule = "dino"  # of the learning rate: see mim_jax/optim.py
    config.optim.lr_batch_size = 256  # the batch size that lr refers to; 0: lr is not scaled
    config.optim.lr_batch_power = 1.0  # lr is scaled by (data.batch_size / lr_batch_size) ** this
    config.optim.min_lr = 0.0
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = 0.05
    config.optim.weight_decay_end = 0.05
    config.optim.no_decay = ()  # names of parameters without weight decay
    config.optim.decay_vectors = False  # True: vectors (biases, scales), too, have weight decay
    config.optim.momentum = 0.9  # of "lars" and "sgd"; the others are of "adamw"
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip_grad = 0.0  # L2 norm; 0: never
    config.optim.clip_per = "model"  # or "parameter", or "part": backbone, head, ...
    config.optim.layer_decay = 1.0
    config.optim.patch_embed_lr = 1.0  # a factor
    config.optim.freeze_last_layer = "0 steps"
    config.optim.freeze_last_layer_by = "update"  # or "lr": only the rate is 0, Adam's averages move

    config.eval.every = "10 epochs"  # or "never"
    config.eval.bank = 50_000  # images in the k-NN bank, of the training split
    config.eval.test = 10_000
    config.eval.batch_size = 256
    config.eval.img_size = placeholder(int)  # of the pictures it is measured on; None: model.img_size
    config.eval.resize = 0.875  # side of the central square, as a share of the image's short side
    config.eval.tokens = "cls"  # or "patch": the mean of the patch tokens
    config.eval.standardize = False  # for the k-NN: each feature less its mean over its std on the bank

    config.checkpoint.every = "1 epoch"
    config.checkpoint.keep = 2  # 0: all
    config.log_every = "50 steps"
    config.max_skipped = 20  # stop after so many steps in a row whose loss or gradient is not finite

    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.rules = (  # the first regex found in an array's path says which of its axes are cut, and how
        (r"blocks/.*/kernel$", (None, None, "fsdp")),
        (r"patch_embed/kernel$", (None, None, None, "fsdp")),
    )

    config.init_from = placeholder(str)  # a run's workdir: start from what it learned, at any image size
    config.init_parts = ()  # the parts of it that are taken, ("backbone",); none named: all
    config.continue_from = placeholder(str)  # instead of init_from: start from it with care, by `continued`
    config.continued.frozen = "1 epoch"  # the backbone stays as it is, and the heads learn
    config.continued.ramp = "5 epochs"  # then its learning rate grows from 0 to what it would be
    config.continued.layer_decay = 0.75  # if smaller than optim.layer_decay, it takes its place
    config.resume = placeholder(str)  # a run's workdir: continue it here
    return config


def on_cifar10(config: ml_collections.ConfigDict) -> None:
    """Turns a recipe into one for CIFAR-10 and a laptop."""
    config.data.update(name="cifar10", eval_split="test", num_examples=50_000, canvas=32, workers=0)
    config.model.update(img_size=32, dtype="float32")
    config.eval.update(every="500 steps", bank=5000, test=2000, resize=1.0)
    config.checkpoint.every = "500 steps"
    config.log_every = "25 steps"
    config.continued.update(frozen="100 steps", ramp="200 steps")


def hours_on_cifar10(config: ml_collections.ConfigDict, total: str) -> None:
    """Turns the demo of DINO or a method that follows it into a longer run of a wider network."""
    config.total = total
    config.model.update(dim=128, heads=4, init_std=0.09)
    config.optim.update(lr=6e-3, warmup="500 steps", freeze_last_layer="500 steps", weight_decay_end=0.4, momentum_teacher=0.99)
    config.eval.update(every="2500 steps", test=10_000, img_size=64)
    config.checkpoint.every = "2500 steps"
    config.log_every = "100 steps"


def learns_from(config: ml_collections.ConfigDict, path: str) -> None:
    """Adds the section of the frozen network, a tokenizer or teacher, that the targets come from."""
    config.target = {"config": path, "network": {}}  # network: filled in when the config is loaded
    config.target.workdir = placeholder(str)
    config.target.weights = placeholder(str)
