"""Encoders in the layouts of other libraries. benchmarks/peers.py loads such folders with these libraries."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

import mim_jax
from mim_jax import convert, export, layouts, weight_files
from mim_jax.checkpoint import Checkpoints
from mim_jax.layouts import Told
from mim_jax.methods.base import make_method
from mim_jax.state import abstract_state

WRITTEN = {  # a golden model: the layouts that have a place for it
    "timm/vit_dinov2_reg_swiglu": "timm transformers",
    "timm/dinov3": "timm",
    "timm/dinov3_plus": "timm",
    "timm/eva02_clip": "timm",
    "timm/vit_clip_quick_gelu": "timm",
    "timm/vit_no_qkv_bias_clsless": "timm",
    "timm/beit_shared": "timm transformers",
    "hf/swin": "timm transformers",
    "hf/vit": "transformers",
    "official/dino_full": "timm transformers",
    "official/ibot_backbone": "timm transformers",
    "official/dinov2_reg_backbone": "timm transformers",
    "official/simmim_vit": "timm transformers",
    "official/eva02_mim": "timm",
    "official/beit_finetuned": "",
}


def read(golden, name):
    arrays, meta = golden(f"weights/{name}")
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    return layouts.encoder(
        state, meta.get("config") if "/official" not in f"/{name}" else {}, Told(heads=meta.get("heads") or 0)
    )


@pytest.mark.parametrize("name, form", [(name, form) for name in WRITTEN for form in ("timm", "transformers")])
def test_the_same_encoder_comes_back(golden, tmp_path, name, form):
    """All settings that change what is computed, and every tensor but the mask token."""
    weights = read(golden, name)
    weights.save(tmp_path / "ours")
    if form not in WRITTEN[name]:
        with pytest.raises(ValueError, match="epsilon|no model class|no final norm"):
            export.written(str(tmp_path / "ours"), form, tmp_path / "theirs")
        return
    export.written(str(tmp_path / "ours"), form, tmp_path / "theirs")
    again = layouts.read(tmp_path / "theirs")
    assert again.mean == weights.mean and again.std == weights.std
    for key in "patch_size img_size dim depth depths heads norm_eps act rotary rotary_period cls pre_norm window".split():
        assert again.settings.get(key) == weights.settings.get(key), key
    ours, theirs = (dict(w.parts["backbone"]) for w in (weights, again))
    for tree in (ours, theirs):
        tree.pop("mask_token", None)
        tree["blocks"] = {k: v for k, v in tree["blocks"].items() if not k.startswith("gamma")} if "blocks" in tree else {}
    if (
        weights.settings.get("registers") and form == "timm" and "pos_embed" in ours
    ):  # where the position of CLS is a part of the token
        ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
        ours["pos_embed"] = ours["pos_embed"] * (np.arange(ours["pos_embed"].shape[1]) > 0)[:, None]
    if not weights.settings.get("cls", True):
        ours["pos_embed"] = ours["pos_embed"] * (np.arange(ours["pos_embed"].shape[1]) > 0)[:, None]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_features_of_a_folder(golden, tmp_path):
    """What the command compares; and that it sees another tensor."""
    weights = read(golden, "official/dino_full")
    weights.save(tmp_path / "ours")
    assert export.export(str(tmp_path / "ours"), "timm", tmp_path / "theirs") < 1e-6
    arrays = dict(weight_files.read(tmp_path / "theirs/model.safetensors"))
    arrays["blocks.1.mlp.fc2.bias"] = 2 * arrays["blocks.1.mlp.fc2.bias"]
    export.write_safetensors(tmp_path / "theirs/model.safetensors", arrays)
    assert export.compared(weights.network, weights.parts, tmp_path / "theirs") > 1e-3
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224" and config["pretrained_cfg"]["mean"] == list(weights.mean)


def test_official_names_of_a_run(tmp_path):
    config = mim_jax.load_config("tests/tiny.py:dinov2")
    config.data.num_examples = 64
    method, rng = make_method(config), np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_state(method, config))
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    assert export.export(str(tmp_path), "official", tmp_path / "out") == 0
    arrays = weight_files.read(tmp_path / "out/model.safetensors")
    again = convert.from_torch(arrays, "dinov2")
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, dict(state.teacher)))
    assert "Method: dinov2" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="official names are written for runs"):
        export.export(str(GOLDEN / "weights/backbone.npz"), "official", tmp_path / "x")


def test_files_whose_header_begins_as_a_pickle_does(tmp_path):
    """The length of a header may have 0x80 as its first byte."""
    for extra in range(0, 256, 8):
        arrays = {"x" * (1 + extra): np.arange(6, dtype=np.float32).reshape(2, 3)}
        export.write_safetensors(tmp_path / "a.safetensors", arrays)
        read = weight_files.read(tmp_path / "a.safetensors")
        np.testing.assert_array_equal(read[next(iter(arrays))], next(iter(arrays.values())))
