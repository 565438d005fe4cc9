"""Configs: durations, what is refused and how, where they are found, and the network that targets come from."""

import json
import math
import re
import runpy
from pathlib import Path

import jax
import ml_collections
import pytest

from mim_jax import config as configs
from mim_jax import durations, load_config
from mim_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
TINY = f"{ROOT}/tests/tiny.py"
VARIANTS = [
    f"{path.stem}:{variant}"
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("clip", "curate")  # a frozen network, and what makes data sets
    for variant in runpy.run_path(str(path))["VARIANTS"]
]


# Durations


def config_with(**keys):
    data = {"batch_size": 100, "num_examples": 1050}
    return ml_collections.ConfigDict({"data": data, "optim": {}, "total": None} | keys)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0 steps", 0), ("1 step", 1), ("3500 steps", 3500), ("1_000_000 steps", 1_000_000), ("7steps", 7),
        ("1 epoch", 10), ("2.5 epochs", 25), ("0.04 epochs", 0), ("0.06 epochs", 1),
        ("1000 examples", 10), ("1_099 examples", 10), ("1 example", 0),
    ],
)  # fmt: skip
def test_durations_in_steps(text, steps):
    assert durations.steps(config_with(optim={"warmup": text}), "optim.warmup") == steps


@pytest.mark.parametrize(
    "value",
    ["", "10", "-1 steps", "1.5 steps", "1.5 examples", "nan steps", "inf epochs", "5 days", "never", "1 2 steps", 10, None]
    + ["5_ steps", "99999999999999 epochs"],
)
def test_what_is_no_duration_is_refused_with_its_key(value):
    told = re.escape(f'optim.warmup is {value!r}, but must be a duration with its unit: "500 steps"'.replace("'", '"'))
    with pytest.raises(ValueError, match=told):
        durations.steps(config_with(optim={"warmup": value}), "optim.warmup")


def test_intervals():
    def every(value):
        return durations.interval(config_with(eval={"every": value}), "eval.every")

    assert (every("never"), every("0 steps"), every("0.0 epochs"), every("20 steps")) == (None, None, None, 20)
    with pytest.raises(ValueError, match='eval.every is "0.01 epochs", but must be at least one step, or "never"'):
        every("0.01 epochs")
    with pytest.raises(ValueError, match='eval.every is "often", .* or "never"'):
        every("often")


def test_totals_and_tuples_of_durations():
    assert durations.total_steps(config_with(total="3 epochs")) == 30
    for none in ("0 steps", "99 examples"):
        with pytest.raises(ValueError, match=f'total is "{none}", but must be at least one step'):
            durations.total_steps(config_with(total=none))
    decays = config_with(optim={"decay_at": ("5 epochs", "70 steps")})
    assert durations.steps_of_each(decays, "optim.decay_at") == (50, 70)
    with pytest.raises(ValueError, match='optim.decay_at is "5 epochs", but must be a tuple'):
        durations.steps_of_each(config_with(optim={"decay_at": "5 epochs"}), "optim.decay_at")
    with pytest.raises(ValueError, match="num_examples"):
        durations.total_steps(config_with(total="1 epoch", data={"batch_size": 4, "num_examples": 0}))


def test_a_total_of_the_command_line_replaces_the_recipe_s():
    config = load_config("dino:demo")
    config.total = "2 epochs"
    assert durations.total_steps(config) == 2 * (50_000 // 64)


def test_compressed_schedules_are_those_of_the_long_run():
    long, short = load_config("dinov2:vitl14"), load_config("dinov2:vitl14_518")
    share = durations.total_steps(short) / durations.total_steps(long)
    for key in ("optim.warmup", "optim.freeze_last_layer", "loss.teacher_temp_warmup"):
        assert durations.steps(short, key) == round(share * durations.steps(long, key)) > 0


# Values


@pytest.mark.parametrize("spec", VARIANTS)
def test_every_recipe_is_accepted_on_8_devices(spec):
    with jax.set_mesh(make_mesh()):
        configs.check(load_config(spec))


INF, NAN = math.inf, math.nan
REFUSED = [
    # Numbers that are none, or below 0
    ("dino", "optim.lr", NAN, "must be in [0, 10]"),
    ("dino", "optim.lr", -1e-3, "must be in [0, 10]"),
    ("dino", "optim.lr", 30.0, "must be in [0, 10]"),
    ("dino", "optim.min_lr", INF, "must be in [0, 10]"),
    ("simmim", "optim.warmup_lr", -1e-6, "must be in [0, 10]"),
    ("dino", "optim.weight_decay", -0.05, "must be in [0, inf)"),
    ("dino", "optim.weight_decay_end", INF, "must be in [0, inf)"),
    ("dino", "optim.clip_grad", -1.0, "must be in [0, inf)"),
    ("dino", "optim.clip_grad", NAN, "must be in [0, inf)"),
    ("dino", "optim.eps", 0.0, "must be in (0, inf)"),
    ("dino", "loss.student_temp", 0.0, "must be in (0, inf)"),
    ("dino", "loss.teacher_temp", -0.04, "must be in (0, inf)"),
    ("dvae", "loss.temperature", 0.0, "must be in (0, inf)"),
    ("dvae", "loss.kl_weight", -1.0, "must be in [0, inf)"),
    ("dinov2", "loss.koleo_weight", NAN, "must be in [0, inf)"),
    ("dinov2", "model.layerscale", -1.0, "must be in [0, inf)"),
    ("dino", "crops.blur_radius", (0.1, NAN), "each must be in [0, inf)"),
    ("beit", "crops.color_jitter", -0.4, "must be in [0, inf)"),
    ("dino", "data.workers", -1, "must be in [0, inf)"),
    ("dino", "seed", -1, "must be in [0, 4294967296)"),
    # Rates, momenta, shares
    ("dino", "model.drop_path_rate", 2.0, "must be in [0, 1)"),
    ("dino", "model.drop_path_rate", 1.0, "must be in [0, 1)"),
    ("dino", "model.drop_path_rate", -0.1, "must be in [0, 1)"),
    ("dino", "optim.beta1", 1.0, "must be in [0, 1)"),
    ("dino", "optim.beta2", 1.5, "must be in [0, 1)"),
    ("dino", "optim.momentum_teacher", 1.2, "must be in [0, 1]"),
    ("dino", "loss.center_momentum", -0.1, "must be in [0, 1]"),
    ("vqvae", "quantizer.decay", 1.1, "must be in [0, 1]"),
    ("dino", "optim.layer_decay", 0.0, "must be in (0, 1]"),
    ("mae", "mask.ratio", 1.5, "must be in [0, 1]"),
    ("dinov2", "mask.ratio", (0.5, 0.1), "must be (low, high)"),
    ("dinov2", "mask.probability", -0.5, "must be in [0, 1]"),
    ("ibot", "mask.ratios", ((0.0, 0.0), (1.3, 0.2)), "each must be in [0, 1]"),
    ("dino", "eval.resize", 0.0, "must be in (0, 1]"),
    ("dino", "crops.global_crops_scale", (0.5, 1.2), "each must be in (0, 1]"),
    ("dino", "crops.local_crops_scale", (0.6, 0.2), "must be (low, high)"),
    ("dino", "crops.local_crops_scale", (0.6,), "must be (low, high)"),
    ("dino", "crops.local_crops_scale", ("a", "b"), "each must be in (0, 1]"),
    ("dino", "data.levels", (5, 5), "must be (black, white), two numbers, the first below the second"),
    ("dino", "data.levels", (1, 2, 3), "must be (black, white)"),
    ("dino", "data.levels", (0, float("inf")), "each must be in (-inf, inf)"),
    ("dino", "data.levels", (float("nan"), 1.0), "each must be in (-inf, inf)"),
    ("dino", "data.levels", ("a", "b"), "each must be in (-inf, inf)"),
    # Counts
    ("dino", "data.max_pixels", 0, "must be in [1, inf)"),
    ("dino", "data.canvas", 0, "must be in [1, inf)"),
    ("dino", "data.batch_size", 0, "must be in [1, inf)"),
    ("dino", "eval.bank", 0, "must be in [1, inf)"),
    ("dino", "eval.batch_size", 0, "must be in [1, inf)"),
    ("dino", "checkpoint.keep", -1, "must be in [0, inf)"),
    ("dino", "max_skipped", 0, "must be in [1, inf)"),
    ("dino", "mesh.fsdp", -2, "must be in [-1, inf)"),
    ("dino", "model.depth", 0, "must be in [1, inf)"),
    ("dino", "head.out_dim", 0, "must be in [1, inf)"),
    ("dino", "crops.local_crops_number", -1, "must be in [0, inf)"),
    ("dino", "crops.global_crops_number", 0, "must be in [1, inf)"),
    ("beit", "mask.count", 0, "must be in [1, inf)"),
    ("beit", "mask.smallest", 7, "must be at most mask.count=6"),
    ("dinov2", "mask.group_size", 3, "must be a multiple of mask.group_size=3"),
    # What must divide what
    ("dino", "model.heads", 3, "3 does not divide 16"),
    ("mae", "decoder.heads", 3, "3 does not divide 16"),
    ("simmim_swin", "model.heads", (2, 5), "5 does not divide 16"),
    ("dino", "crops.local_crops_size", 20, "must be a multiple of 8 pixels"),
    ("dino", "crops.local_crops_size", 4, "must be a multiple of 8 pixels"),
    ("dinov2", "crops.global_crops_size", 18, "must be a multiple of 4 pixels"),
    ("mae", "model.img_size", 18, "must be a multiple of 4 pixels"),
    ("mae", "eval.img_size", 2, "must be a multiple of 4 pixels"),
    ("simmim_swin", "model.img_size", 20, "must be a multiple of 8 pixels"),
    # Means of 0..255
    ("dino", "data.mean", (123.675, 116.28, 103.53), "each must be in [0, 1]: divide levels of 0..255 by 255"),
    ("dino", "data.std", (58.395, 57.12, 57.375), "each must be in (0, 1]: divide levels of 0..255 by 255"),
    ("dino", "data.std", (0.0, 0.2, 0.2), "each must be in (0, 1]"),
    ("dino", "data.mean", (0.5, 0.5), "must be three numbers"),
    # Words
    ("dino", "model.dtype", "float31", 'must be "bfloat16" or "float16" or "float32" or "float64"'),
    ("dinov2", "model.ffn", "swiglue", 'must be "mlp" or "swiglu"'),
    ("dino", "optim.name", "adam", 'must be "adamw" or "lars" or "sgd"'),
    ("dino", "optim.schedule", "cosine", 'must be "dino" or "mae" or "timm_cosine" or "timm_multistep"'),
    ("dino", "optim.clip_per", "layer", 'must be "model" or "part" or "parameter"'),
    ("dino", "optim.freeze_last_layer_by", "rate", 'must be "update" or "lr"'),
    ("dino", "eval.tokens", "mean", 'must be "cls" or "patch"'),
    ("ibot", "mask.shape", "blocks", 'must be "block" or "random"'),
    ("beit", "crops.target_interpolation", "nearest", 'must be "bicubic" or "bilinear" or "lanczos"'),
    # Durations
    ("dino", "total", "6", 'must be a duration with its unit: "500 steps"'),
    ("dino", "total", "0 epochs", "must be at least one step"),
    ("dino", "optim.warmup", "-1 epochs", "must be a duration"),
    ("dino", "optim.freeze_last_layer", "never", "must be a duration"),
    ("dino", "loss.teacher_temp_warmup", "30", "must be a duration"),
    ("ibot", "mask.start", "soon", "must be a duration"),
    ("dvae", "loss.kl_warmup", "5", "must be a duration"),
    ("simmim", "optim.decay_at", ("700",), "must be a duration"),
    ("dino", "eval.every", "0", 'or "never"'),
    ("dino", "checkpoint.every", "-1 steps", 'or "never"'),
    ("dino", "log_every", "1e-3 epochs", 'or "never"'),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "key", "value", "must"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_refused_in_one_line(variant, key, value, must):
    config = load_config(f"{TINY}:{variant}").unlock()
    configs.check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError) as error:
        configs.check(config)
    told = str(error.value)
    assert told.startswith("data.batch_size is 8" if key == "mask.group_size" else f"{key} is ") and "\n" not in told
    assert must in told


def test_patches_of_14_do_not_fill_96_pixels():
    config = load_config("dinov2:vitl14")
    config.crops.local_crops_size = 96
    with pytest.raises(ValueError, match="crops.local_crops_size is 96, but must be a multiple of 14 pixels"):
        configs.check(config)


def test_the_heads_of_each_stage_of_a_swin_divide_its_width():
    """Which doubles from stage to stage: 16 heads divide the 16 channels of the second."""
    config = load_config(f"{TINY}:simmim_swin")
    config.model.heads = (8, 16)
    configs.check(config)


def test_batches_are_divided_by_the_devices():
    config = load_config(TINY)
    config.data.batch_size = 12
    configs.check(config)
    with jax.set_mesh(make_mesh(2, 4)):
        with pytest.raises(ValueError, match="data.batch_size is 12, but must be a multiple of the 8 devices"):
            configs.check(config)
        config.data.batch_size, config.eval.batch_size = 16, 4
        with pytest.raises(ValueError, match="eval.batch_size is 4, but must be a multiple of the 8 devices"):
            configs.check(config)


def test_unused_local_crops_may_have_any_size():
    config = load_config(TINY)
    config.crops.update(local_crops_number=0, local_crops_size=5)
    configs.check(config)


# Where configs are


@pytest.mark.parametrize("spec", ["dino:demo", "dino.py:demo", "configs/dino.py:demo", f"{ROOT}/configs/dino.py:demo"])
def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    config = load_config(spec)
    assert (config.method, config.total, config.recipe) == ("dino", "3500 steps", "dino:demo")
    assert config.is_locked


def test_a_file_of_the_folder_comes_before_the_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/dino.py").write_text(
        "import mim_jax\ndef get_config():\n config = mim_jax.load_config('dino:demo').unlock(); config.seed = 7; return config"
    )
    assert load_config("configs/dino.py").seed == 7


@pytest.mark.parametrize("spec", ["diino:demo", "configs/none.py", "elsewhere/dino.py", "dino.yaml"])
def test_a_missing_config_lists_those_that_exist(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    path = spec.removesuffix(":demo")
    told = f"no config file {tmp_path}/{path}; mim_jax comes with beit, .*, dino, .*vqvae$"
    with pytest.raises(FileNotFoundError, match=told):
        load_config(spec)


def test_an_unknown_variant_lists_those_that_exist():
    with pytest.raises(ValueError, match="has no variant 'vit', only vitb16, vitl16, vith14, demo"):
        load_config("mae:vit")


# The network that targets come from


def test_target_is_resolved_when_the_config_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("beit2:demo")
    assert config.target.workdir == f"{tmp_path}/runs/vqkd"
    assert config.target.network.method == "vqkd"
    assert config.target.network.target.network.to_dict() == load_config("dino:demo").to_dict()
    before = config.to_dict()
    monkeypatch.chdir("/")
    configs.resolve_target(config)
    assert config.to_dict() == before


def test_another_target_of_the_command_line_is_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("beit:demo")
    config.target.network.model.hidden = 33
    config.target.update(workdir="~/mine", weights="file.npz")
    monkeypatch.setenv("HOME", "/some/home")
    configs.resolve_target(config)
    assert config.target.network.model.hidden == 33  # a change of the network itself is kept
    assert (config.target.workdir, config.target.weights) == ("/some/home/mine", f"{tmp_path}/file.npz")
    config.target.config = "configs/dvae.py:demo"
    configs.resolve_target(config)
    assert config.target.network.method == "dvae"
    config.target.config = "dvae:dem"
    with pytest.raises(ValueError, match="no variant 'dem'"):
        configs.resolve_target(config)


def test_target_is_what_its_run_was_made_with(tmp_path):
    first = load_config("vqvae:demo")
    first.model.hidden = 48
    (tmp_path / "config.json").write_text(json.dumps(first.to_dict()))
    config = load_config("beit:demo")
    config.target.update(workdir=str(tmp_path), config="no/such.py")
    configs.resolve_target(config)
    assert config.target.network.model.hidden == 48
    assert config.is_locked


@pytest.mark.parametrize("key, value", [("model.dtype", "foo"), ("model.heads", 5), ("model.drop_path_rate", 2.0)])
def test_the_network_of_a_target_is_checked_too(key, value):
    config = load_config("vqkd:demo")
    config.update_from_flattened_dict({f"target.network.{key}": value})
    with pytest.raises(ValueError, match=f"^target.network.{key} is "):
        configs.check(config)
