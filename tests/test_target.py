"""The frozen network that targets come from: of another run, trained first if need be, or official weights."""

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import prefixed
from PIL import Image

import mim_jax
from mim_jax import checkpoint, convert, sharding, train, weight_files
from mim_jax.checkpoint import Checkpoints, newest
from mim_jax.config import resolve_target
from mim_jax.learned import abstract_target, load_target
from mim_jax.methods import base
from mim_jax.state import TrainState, first_state
from mim_jax.stopping import Stop


@pytest.fixture
def config(tmp_path):
    """VQ-KD, whose teacher is a run of DINO."""
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    config = mim_jax.load_config("tests/tiny.py:vqkd")
    config.total, config.data.dir, config.target.workdir = "2 steps", str(tmp_path / "images"), str(tmp_path / "dino")
    return config


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), a, b))


@pytest.mark.slow
def test_the_teacher_is_trained_first_and_once(config, tmp_path, capsys):
    state = train.run(config, tmp_path / "vqkd")
    words = f"vqkd needs the dino run in {tmp_path / 'dino'}: training it first"
    assert words in capsys.readouterr().err
    assert int(state.step) == 2 and set(state.params) == {"encoder", "encode_task", "decoder", "decode_task"}
    taken = newest(tmp_path / "vqkd", lambda saved: saved.record["config"]["target"]["fingerprint"])
    assert taken == checkpoint.fingerprint(load_target(mim_jax.make_method(config), config)) and len(taken) == 16
    assert (tmp_path / "dino/report.html").exists() and (tmp_path / "vqkd/report.html").exists()
    assert train.train_target(config, Stop()) is None
    assert words not in capsys.readouterr().err

    method, teacher = mim_jax.make_method(config), mim_jax.load_run(tmp_path / "dino")
    target = load_target(method, config)
    assert same(target["backbone"], teacher.params["backbone"])
    assert not same(target, jax.jit(method.target.init_parts)(jax.random.key(config.seed)))
    saved = newest(tmp_path / "dino", lambda saved: saved)
    student = saved.read({"params": {"backbone": saved.shapes()["params"]["backbone"]}})
    assert not same(target, student["params"]), "the teacher of the run, not its student"


def test_a_run_that_is_continued_does_not_train_another_target(config, tmp_path):
    (tmp_path / "vqkd/checkpoints/1").mkdir(parents=True)
    with pytest.raises((FileNotFoundError, OSError), match="there is no run in .*dino|no checkpoint in"):
        train.run(config, tmp_path / "vqkd")
    assert not (tmp_path / "dino").exists()


@pytest.mark.slow
def test_a_stop_of_the_first_run_stops_both(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "preemption", lambda checkpoints: contextlib.nullcontext(lambda step: step >= 1))
    assert train.run(config, tmp_path / "vqkd").teacher  # DINO's
    assert not (tmp_path / "vqkd").exists()


def test_a_method_depends_on_no_other_file_once_its_config_is_loaded(tmp_path, monkeypatch):
    """Nor on the working directory."""
    config = mim_jax.load_config(str(Path(__file__).with_name("tiny.py")) + ":beit2")
    monkeypatch.chdir(tmp_path)
    method = mim_jax.make_method(config)
    assert method.target.codes == 16 and config.target.network.target.network.method == "dino"


def test_a_frozen_target_is_cut_over_the_devices(config):
    config.mesh.update(data=1, fsdp=8)
    with jax.set_mesh(sharding.make_mesh(1, 8)):
        method = mim_jax.make_method(config)
        target = abstract_target(method, config)
    kernel = target["backbone"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 8
    assert target["backbone"]["pos_embed"].sharding.is_fully_replicated


def test_the_target_is_the_teacher_of_its_run_and_what_else_the_run_has(config, tmp_path):
    """Parts that have no average are the parameters, or what was learned without a gradient."""
    config.target.workdir = str(tmp_path)
    sections = {name: {"w": jnp.full(2, i, jnp.float32)} for i, name in enumerate(("student", "teacher", "head", "extra"))}
    params = {"backbone": sections["student"], "head": sections["head"]}
    extra = {"quantizer": sections["extra"]}
    state = TrainState(jnp.int32(7), params, {"backbone": sections["teacher"]}, jnp.zeros(()), extra)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(7, state)
    checkpoints.wait()
    network = SimpleNamespace(init_parts=lambda key: {part: {"w": jnp.zeros(2)} for part in (*params, *extra)})
    found = load_target(SimpleNamespace(target=network), config)
    assert same(found, {"backbone": sections["teacher"], "head": sections["head"], "quantizer": sections["extra"]})


def test_a_frozen_encoder_normalizes_images_as_in_its_training(monkeypatch):
    monkeypatch.setattr(base.vit, "features", lambda backbone, params, images: {"patch": images, "params": params})
    encoder = base.Encoder(backbone=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    found = encoder.features({"backbone": "weights"}, jnp.full((1, 2, 2, 3), 0.6))
    np.testing.assert_allclose(found["patch"][0, 0, 0], [1, 1.6, 1.5], rtol=1e-5)
    assert found["params"] == "weights"


class Colors:
    """A frozen network that is no method: the mean color of each patch."""

    dim, stride = 3, 4

    def init_parts(self, key):
        return {"gain": jnp.ones(3)}

    def features(self, params, images):
        patches = images.reshape(len(images), images.shape[1] // 4, 4, images.shape[2] // 4, 4, 3).mean((2, 4))
        return {"cls": patches.mean((1, 2)), "patch": patches.reshape(len(images), -1, 3) * params["gain"]}


def test_a_network_that_is_no_method(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mim_jax.models.colors", SimpleNamespace(make=lambda config: Colors()))
    config.target.update(config=str(tmp_path / "colors.py"), workdir=None)
    (tmp_path / "colors.py").write_text("import ml_collections\n\ndef get_config():\n"
                                        "    return ml_collections.ConfigDict({'network': 'colors'})\n")  # fmt: skip
    resolve_target(config)
    method = mim_jax.make_method(config)
    state, views = first_state(method, config), method.views.zeros(4)
    loss, _ = method.loss(state.params, {}, method.target.init_parts(None), state.extra, views, jax.random.key(0), 0)
    assert np.isfinite(loss)


def test_official_weights(config, tmp_path, capsys):
    """Of an encoder, whose number of heads stands beside them."""
    method = mim_jax.make_method(config)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    params = method.target.init_parts(jax.random.key(7))
    np.savez(tmp_path / "dino.npz", **convert.to_torch(params, "dino"))
    config.target.update(workdir=None, weights=str(tmp_path / "dino.npz"))
    assert same(load_target(method, config), params)
    assert f"the target is from {tmp_path}/dino.npz; recognised: " in capsys.readouterr().err
    resolve_target(config)
    assert config.target.network.method == "imported" and config.target.network.model.dim == 16

    larger = mim_jax.load_config("tests/tiny.py:dino")
    larger.model.img_size = 24
    larger.crops.update(global_crops_size=24)
    params, _ = mim_jax.make_method(larger).init(jax.random.key(7))
    np.savez(tmp_path / "dino.npz", **convert.to_torch({"backbone": params["backbone"]}, "dino"))
    with pytest.raises(ValueError, match=re.escape("backbone/pos_embed: (1, 10, 16) -> (1, 5, 16)")):
        load_target(method, config)


def test_a_file_with_heads_keeps_the_network_of_its_recipe(tmp_path):
    """A distillation learns from DINOv2's heads, too. Without them the file is one of an encoder like others."""
    config = mim_jax.load_config("tests/tiny.py:distillation")
    method = mim_jax.make_method(config)
    params = method.target.init_parts(jax.random.key(7))
    arrays = {f"teacher.{name}": array for name, array in convert.to_torch(params, "dinov2").items()}
    np.savez(tmp_path / "dinov2.npz", **arrays, **{"student.dino_head.mlp.0.weight": np.zeros(3)})
    config.target.update(workdir=None, weights=str(tmp_path / "dinov2.npz"))
    resolve_target(config)
    assert config.target.network.method == "dinov2" and same(load_target(method, config), params)


def test_dalles_tokenizer_from_its_published_weights(golden, tmp_path):
    """The tokens of a fixed tokenizer of BEiT are those of the official encoder."""
    arrays, _ = golden("dvae_dalle")
    encoder, decoder = (prefixed(arrays, f"w_{part}/") for part in ("enc", "dec"))
    weights = {f"encoder.{key}": a for key, a in encoder.items()} | {f"decoder.{key}": a for key, a in decoder.items()}
    named = {f"model.{key}": array for key, array in weights.items()}
    (tmp_path / "dalle.safetensors").write_bytes(weight_files.safetensors(named))
    tokenizer = mim_jax.load_config("configs/dvae.py:dalle")
    tokenizer.model.update(img_size=32, hidden=8, codes=32, codebook_dim=16, dtype="float32")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/config.json").write_text(tokenizer.to_json_best_effort())
    config = mim_jax.load_config("tests/tiny.py:beit")
    config.update_from_flattened_dict({"head.vocab_size": 32, "crops.target_size": 32})
    config.target.update(workdir=str(tmp_path / "tokenizer"), weights=str(tmp_path / "dalle.safetensors"))
    resolve_target(config)
    method = mim_jax.make_method(config)
    target = load_target(method, config)
    images = np.moveaxis(arrays["in/image01"], 1, -1)
    np.testing.assert_array_equal(method.tokens(target, images[:, None]).reshape(2, 4, 4), arrays["out/indices"])
    painted = method.target.decode(target, arrays["out/indices"].reshape(2, 16))
    assert painted.shape == (2, 32, 32, 3) and 0 <= painted.min() and painted.max() <= 1


def test_what_is_missing_is_named(config, tmp_path):
    method = mim_jax.make_method(config)
    with pytest.raises(FileNotFoundError, match="there is no run in .*dino"):
        load_target(method, config)
    config.target.workdir = None
    with pytest.raises(ValueError, match="vqkd learns from .*tiny.py:dino: name its run, --config.target.workdir"):
        load_target(method, config)
    config.target.weights = "no/such.npz"
    with pytest.raises(FileNotFoundError, match="there is no file .*no/such.npz"):
        load_target(method, config)
    (tmp_path / "broken.npz").write_bytes(b"no arrays")
    config.target.weights = str(tmp_path / "broken.npz")
    with pytest.raises(ValueError, match="broken.npz cannot be read: "):
        load_target(method, config)
    tokenized = mim_jax.load_config("tests/tiny.py:beit2")
    tokenized.target.weights = str(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz has no vqkd weights of the network vqkd"):
        load_target(mim_jax.make_method(tokenized), tokenized)


@pytest.mark.parametrize("key, value, message", [
    ("head.vocab_size", 20, "the tokenizer of config.target has 16 tokens, but head.vocab_size is 20"),
    ("crops.target_size", 24, "24 pixels has 6 tokens a side (of 4 pixels), but the model's image has 4 patches a side"),
    ("crops.target_size", 18, "18 pixels has 4.5 tokens a side"),
    ("mask.count", 16, "mask.count=16 of 16 patches"),
    ("model.early_layers", 2, "model.early_layers=2 must be between 0 and model.depth=2"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_refused(key, value, message):
    config = mim_jax.load_config("tests/tiny.py:beit2")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        mim_jax.make_method(config)


@pytest.mark.parametrize(("name", "target", "makes"), [("vqkd", "vqvae", "features"), ("beit", "dino", "tokens")])
def test_a_target_of_another_kind_is_refused(name, target, makes):
    config = mim_jax.load_config(f"tests/tiny.py:{name}")
    config.target.config = f"{target}:demo"
    resolve_target(config)
    with pytest.raises(ValueError, match=f"{name} learns from {makes}, which target.config={target}:demo does not make"):
        mim_jax.make_method(config)
