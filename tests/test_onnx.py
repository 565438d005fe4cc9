"""Encoders as programs: ONNX, run by ONNX Runtime, and jax.export."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import picture
from PIL import Image
from test_layouts import NAMES, of

from mim_jax import export
from mim_jax.methods.base import Encoder
from mim_jax.models.heads import LinearHead
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT

QUICK = {"timm/eva02_clip": 0, "timm/dinov3_plus": 0, "hf/beit": 0, "hf/swin": 0}  # settings of all kinds
OTHER = {"timm/vit_dinov2_reg_swiglu": 2, "timm/eva02_split_subln": 1, "official/beit_pretrain": 1, "timm/dinov3": 2}
SMALL = {"patch_size": 4, "img_size": 18, "dim": 16, "depth": 2, "heads": 2}  # two rows and columns of pixels are cut off
NO_HEAD = LinearHead("cls", {}, {})
BUILT = {  # what no file of the golden ones has
    "sincos": {"pos": "sincos", "cls": False, "registers": 2, "final_norm": False},
    "none": {"pos": "none", "registers": 1, "patch_bias": False, "ffn": "swiglu", "subln": True, "layerscale": 0.5},
    "relative": {"pos": "relative", "pre_norm": True, "k_bias": False, "act": "quick_gelu", "attn_norm": True},
}


def source(network, parts, head=NO_HEAD):
    return export.Source(network, parts, head, None)


def differences(network, parts, size, folder):
    """Of ONNX Runtime's features from ours, relative to the largest, for 1 and 3 images."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    data, config = export.program("onnx", source(network, parts), size)
    (folder / "model.onnx").write_bytes(data)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).random((3, size, size, 3), np.float32)
    wanted = jax.jit(network.features)(parts, images)
    found = []
    for count in (1, 3):
        given = np.ascontiguousarray(images[:count].transpose(0, 3, 1, 2))
        for name, value in zip(("cls", "patch"), session.run(["cls", "patch"], {"images": given})):
            assert list(value.shape) == [count, *config[name][1:]] == list(wanted[name][:count].shape)
            found.append(np.abs(value - wanted[name][:count]).max() / np.abs(wanted[name]).max())
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return found


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_golden_encoders(golden, tmp_path, name):
    weights = of(golden, name)[2]
    assert max(differences(weights.network, weights.parts, weights.settings["img_size"], tmp_path)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER)
def test_another_size(golden, tmp_path, name):
    weights = of(golden, name)[2]
    size = weights.settings["img_size"] + OTHER[name] * weights.settings["patch_size"]
    assert max(differences(weights.network, weights.parts, size, tmp_path)) < 1e-5


def built(net):
    """A network with random parameters, and these."""
    network, rng = Encoder(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), np.random.default_rng(0)
    shapes = jax.eval_shape(network.init_parts, jax.random.key(0))
    return network, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_other_settings(tmp_path, name):
    network, parts = built(ViT(**SMALL | BUILT[name]))
    assert max(differences(network, parts, 18, tmp_path)) < 1e-5
    assert max(differences(network, parts, 24, tmp_path)) < 1e-5


@pytest.mark.slow
def test_windows_of_a_swin(tmp_path, monkeypatch):
    """At another size the map of the first stage has more windows, the last stage has one."""
    network, parts = built(Swin(patch_size=2, img_size=16, dim=16, depths=(2, 4), heads=(2, 4), window=4))
    assert max(differences(network, parts, 16, tmp_path)) < 1e-5
    assert max(differences(network, parts, 32, tmp_path)) < 1e-5
    network, parts = built(Swin(patch_size=2, img_size=8, dim=16, depths=(2, 2), heads=(2, 4), window=4))
    with pytest.raises(ValueError, match="windows would be larger"):
        export.program("onnx", source(network, parts), 16)
    with pytest.raises(ValueError, match="cannot be cut into windows"):
        export.program("onnx", source(network, parts), 10)
    monkeypatch.setattr("mim_jax.onnx_graph.LARGEST", 1000)
    with pytest.raises(ValueError, match="GiB of weights and positions"):
        export.program("onnx", source(network, parts), 8)


@pytest.mark.parametrize("form, needed", [("onnx", "onnxruntime"), ("jax", "flatbuffers")])
def test_the_command(golden, tmp_path, capsys, monkeypatch, form, needed):
    """What it writes, compares and prints; and that it sees other weights."""
    pytest.importorskip(needed)
    weights = of(golden, "official/dino_full")[2]
    weights.save(tmp_path / "ours")
    Image.fromarray(picture(40, 48)).save(tmp_path / "a.png")
    args = ["export", f"--run={tmp_path / 'ours'}", f"--images={tmp_path / 'a.png'}", f"--format={form}"]
    export.main([*args, f"--out={tmp_path / 'out'}"])
    assert "features of 1 images (the images given) differ by at most" in capsys.readouterr().out
    file = tmp_path / "out" / f"model.{form}"
    card = (tmp_path / "out/README.md").read_text()
    settings = json.loads(card.split("```json")[1].split("```")[0])
    assert settings["cls"] == ["batch", 32] and settings["patch"] == ["batch", 16, 32] and f"library_name: {form}" in card
    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    assert export.run_again(form, source(weights.network, weights.parts), images, file) < 1e-5
    other = source(weights.network, jax.tree.map(lambda x: 1.01 * x, weights.parts))
    assert export.run_again(form, other, images, file) > 1e-3
    new = f"--out={tmp_path / 'new'}"
    with pytest.raises(SystemExit, match="size is 33, but must be a multiple of the 8 pixels"):
        export.main([*args, new, "--size=33"])
    with pytest.raises(SystemExit, match="size is for the formats onnx and jax"):
        export.main([*args[:-1], "--format=timm", new, "--size=32"])
    monkeypatch.setitem(sys.modules, needed, None)
    if form == "onnx":
        assert export.run_again(form, other, images, file) is None
        monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit, match="cannot be written without"):
        export.main([*args, new])


def test_scores(golden, tmp_path):
    """Of a classifier with a norm, for greys; and of CLS and the mean, joined."""
    runtime = pytest.importorskip("onnxruntime")
    weights = of(golden, "timm/vit_avg_fcnorm", channels=1)[2]
    images = np.random.default_rng(0).random((3, 32, 32, 1), np.float32)
    one = source(weights.network, weights.parts, weights.head)
    wide = {"kernel": np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32), "bias": np.ones(5, np.float32)}
    for given, classes in ((one, 10), (one._replace(head=LinearHead("cls+mean", {}, wide)), 5)):
        data, config = export.program("onnx", given, 32)
        (tmp_path / "model.onnx").write_bytes(data)
        assert export.run_again("onnx", given, images, tmp_path / "model.onnx") < 1e-5
        assert config["scores"] == ["batch", classes] and config["images"] == ["batch", 1, 32, 32]
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["cls", "patch", "scores"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/dinov3_plus", "hf/beit", "hf/swin"])
def test_programs_of_jax(golden, tmp_path, name):
    """With a free batch, at another size, for platforms that are not here."""
    pytest.importorskip("flatbuffers")
    weights = of(golden, name)[2]
    size = 2 * weights.settings["img_size"]
    weights.save(tmp_path / "ours")
    Image.fromarray(picture(40, 48)).save(tmp_path / "a.png")
    assert export.export(str(tmp_path / "ours"), "jax", tmp_path / "out", size, images=str(tmp_path / "a.png"))[0] < 1e-5
    program = jax.export.deserialize(bytearray((tmp_path / "out/model.jax").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and str(program.in_avals[0].shape) == f"(batch, {size}, {size}, 3)"
