"""Encoders in the layouts of other libraries. benchmarks/peers.py loads such folders with these libraries."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from pictures import picture
from PIL import Image

import mim_jax
from mim_jax import convert, export, layouts, weight_files
from mim_jax.checkpoint import Checkpoints
from mim_jax.layouts import Told
from mim_jax.methods.base import make_method
from mim_jax.models.heads import LinearHead
from mim_jax.state import abstract_state

WRITTEN = {  # a golden model: the layouts that have a place for it
    "timm/vit_dinov2_reg_swiglu": "timm hf",
    "timm/dinov3": "timm hf",
    "timm/dinov3_plus": "timm hf",
    "timm/eva02_clip": "timm",
    "timm/vit_clip_quick_gelu": "timm hf",
    "timm/vit_no_qkv_bias_clsless": "timm",
    "timm/beit_shared": "timm hf",
    "timm/vit_avg_fcnorm": "timm hf",
    "timm/eva02_split_subln": "timm",
    "hf/beit": "hf",
    "hf/swin": "timm hf",
    "hf/vit": "hf",
    "official/dino_full": "timm hf",
    "official/eva_mim": "timm hf",
    "official/ibot_backbone": "timm hf",
    "official/dinov2_reg_backbone": "timm hf",
    "official/simmim_vit": "timm hf",
    "official/eva02_mim": "timm",
    "official/beit_finetuned": "timm hf",
}
SETTINGS = "patch_size img_size dim depth depths heads norm_eps act rotary rotary_period cls pre_norm window final_norm"


def read(golden, name, **told):
    arrays, meta = golden(f"weights/{name}")
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    config = meta.get("config") if "/official" not in f"/{name}" else {}
    return layouts.encoder(state, config, Told(heads=meta.get("heads") or 0, **told))


def source(weights):
    return export.Source(weights.network, weights.parts, weights.head._replace(linear={}), None)


@pytest.mark.parametrize("name, form", [(name, form) for name in WRITTEN for form in ("timm", "hf")])
def test_the_same_encoder_comes_back(golden, tmp_path, name, form):
    """All settings that change what is computed, and every tensor but the mask token and what has no effect."""
    weights = read(golden, name)
    if form not in WRITTEN[name]:
        with pytest.raises(ValueError, match="epsilon|no model without CLS"):
            export.written("", form, tmp_path / "theirs", source=source(weights))
        return
    export.written("", form, tmp_path / "theirs", source=source(weights))
    again = layouts.read(tmp_path / "theirs")
    assert again.mean == weights.mean and again.std == weights.std
    for key in SETTINGS.split():
        assert again.settings.get(key) == weights.settings.get(key), key
    assert (again.head.pool, again.head.norm.keys()) == (weights.head.pool, weights.head.norm.keys())
    ours, theirs = (dict(w.parts["backbone"]) | {"norm of the mean": w.head.norm} for w in (weights, again))
    for tree in (ours, theirs):
        tree.pop("mask_token", None)
        tree["blocks"] = {k: v for k, v in tree["blocks"].items() if not k.startswith("gamma")} if "blocks" in tree else {}
        tree["qkv bias"] = query_and_value_bias(tree["blocks"])
    if (
        weights.settings.get("registers") and form == "timm" and "pos_embed" in ours
    ):  # where the position of CLS is a part of the token
        ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
        ours["pos_embed"] = ours["pos_embed"] * (np.arange(ours["pos_embed"].shape[1]) > 0)[:, None]
    if not weights.settings.get("cls", True):
        ours["pos_embed"] = ours["pos_embed"] * (np.arange(ours["pos_embed"].shape[1]) > 0)[:, None]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def query_and_value_bias(blocks):
    """Taken out of the blocks. One layout has them alone, another in one tensor with that of the keys, which has no effect."""
    if "qkv" not in blocks:
        return None
    blocks["qkv"], bias = dict(blocks["qkv"]), [blocks.pop("q_bias", None), blocks.pop("v_bias", None)]
    return bias if bias[0] is not None else np.split(blocks["qkv"].pop("bias"), 3, axis=-1)[::2]


CLASSIFIERS = {  # of what; the layouts that have a place for it
    "timm/vit_avg_fcnorm": ("mean", "timm hf"),
    "timm/vit_augreg_head": ("cls", "timm hf"),
    "timm/swin": ("mean", "timm hf"),
    "official/beit_finetuned": ("mean", "timm hf"),
    "hf/vit_classifier": ("cls", "hf"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_comes_back(golden, tmp_path, name):
    """It is read, computes the scores that the library computed, and goes out and in again, with the names of its classes."""
    weights, (arrays, _) = read(golden, name), golden(f"weights/{name}")
    if name == "timm/swin":  # it has none
        kernel = np.random.default_rng(0).normal(size=(32, 10)).astype(np.float32)
        weights = weights._replace(head=LinearHead("mean", {}, {"kernel": kernel, "bias": kernel[0]}))
    names = tuple(f"class {i}" for i in range(weights.head.classes))
    given = export.source_of(saved(weights, tmp_path), with_head=True)
    given = given._replace(head=given.head._replace(labels=names))
    assert given.head.pool == CLASSIFIERS[name][0]
    assert name == "timm/swin" or f"classifier of {len(names)} classes" in " ".join(weights.lines)
    pixels = (arrays["in/native"].astype(np.float32).transpose(0, 2, 3, 1) - 127.5) / 64
    images = (pixels * np.array(weights.std) + np.array(weights.mean)).astype(np.float32)
    scores = jax.jit(given.outputs)(given.parameters, images)["scores"]
    if "out/native/logits" in arrays:
        np.testing.assert_allclose(scores, arrays["out/native/logits"], atol=2e-5)
    for form in CLASSIFIERS[name][1].split():
        export.written("", form, tmp_path / form, source=given)
        again = layouts.read(tmp_path / form)
        want, got = given.head, again.head
        kernel = want.linear["kernel"]
        if got.pool == "cls+mean":  # DINOv2's
            kernel = np.concatenate([kernel, 0 * kernel])
        np.testing.assert_allclose(got.linear["kernel"], kernel)
        np.testing.assert_allclose(got.linear["bias"], want.linear["bias"])
        assert got.labels == names and jax.tree.all(jax.tree.map(np.array_equal, got.norm, want.norm))


def saved(weights, folder):
    weights.save(folder / "ours")
    return str(folder / "ours")


def test_features_of_a_folder(golden, tmp_path):
    """What the command compares; and that it sees another tensor."""
    weights = read(golden, "official/dino_full")
    folder = saved(weights, tmp_path)
    Image.fromarray(picture(40, 48)).save(tmp_path / "a.png")
    found, what = export.export(folder, "timm", tmp_path / "theirs", images=str(tmp_path / "a.png"))
    assert found < 1e-6 and what == "features of 1 images (the images given)"
    arrays = dict(weight_files.read(tmp_path / "theirs/model.safetensors"))
    arrays["blocks.1.mlp.fc2.bias"] = 2 * arrays["blocks.1.mlp.fc2.bias"]
    (tmp_path / "theirs/model.safetensors").write_bytes(weight_files.safetensors(arrays))
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    assert export.compared(source(weights), images, tmp_path / "theirs") > 1e-3
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224" and config["pretrained_cfg"]["mean"] == list(weights.mean)
    with pytest.raises(ValueError, match="there is no classifier in"):
        export.export(folder, "timm", tmp_path / "x", with_head=True)
    with pytest.raises(ValueError, match="bad image|none of the images"):
        export.export(folder, "timm", tmp_path / "x", images=str(tmp_path / "theirs/config.json"))


def test_images_that_are_not_there(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_JAX_CACHE", str(tmp_path))
    seen = export.pictures(source(read(golden, "official/dino_full", channels=2)), 32)
    assert seen.images.shape == (4, 32, 32, 2) and "random ones, as there are no others (no real images" in seen.what


def made_run(folder, variant, **changes):
    """(workdir, method, state) of a run of random parameters whose data are a folder of pictures of two classes."""
    for i in range(4):
        (folder / f"data/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(20, 24, seed=i)).save(folder / f"data/{'ab'[i % 2]}/{i}.png")
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.data.update(num_examples=64, num_classes=2, dir=str(folder / "data"))
    config.update_from_flattened_dict(changes)
    method, rng = make_method(config), np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), abstract_state(method, config))
    checkpoints = Checkpoints(folder, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    (folder / "config.json").write_text(config.to_json_best_effort())
    return str(folder), method, state


@pytest.mark.parametrize(
    "variant, changes, form",
    [
        ("supervised", {}, "hf"),
        pytest.param("supervised", {"model.pool": "cls"}, "timm", marks=pytest.mark.slow),
        ("linear", {"probe.blocks": (1,), "probe.batch_norm": True, "probe.mean_patch": (True,)}, "hf"),
    ],
)
def test_the_classifier_of_a_run(tmp_path, capsys, variant, changes, form):
    """It scores as the run's own, on its own images, and knows its classes by name."""
    workdir, method, state = made_run(tmp_path, variant, **changes | {"model.dtype": "float32"})
    out = tmp_path / "out"
    export.main(["export", f"--run={workdir}", f"--format={form}", f"--out={out}", "--head"])
    said = capsys.readouterr().out
    assert "features and scores of 4 images (" in said and "data" in said
    given, again = export.source_of(workdir, True), export.source_of(str(out), True)
    images = jnp.asarray(np.random.default_rng(0).random((3, 16, 16, 3), np.float32))
    learned = state.teacher or state.params
    normalised = (images - jnp.array(method.views.mean)) / jnp.array(method.views.std)
    want = method.class_scores(learned, state.extra, normalised)
    got = [one.outputs(one.parameters, images)["scores"] for one in (given, again)]
    for scores in got:
        np.testing.assert_allclose(scores, want, atol=1e-4 * np.abs(want).max())
    config = json.loads((out / "config.json").read_text())
    assert again.head.labels == ("a", "b") == tuple(config.get("label_names") or config["id2label"].values())
    assert "pipeline_tag: image-classification" in (out / "README.md").read_text()


def test_a_classifier_of_several_blocks_is_refused(tmp_path):
    workdir, method, _ = made_run(tmp_path, "linear", **{"probe.blocks": (2,)})
    with pytest.raises(ValueError, match="sees the last 2 blocks"):
        export.source_of(workdir, True)
    assert export.source_of(workdir).head.pool == "cls"


def test_official_names_of_a_run(tmp_path):
    config = mim_jax.load_config("tests/tiny.py:dinov2")
    config.data.num_examples = 64
    method, rng = make_method(config), np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_state(method, config))
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    assert export.export(str(tmp_path), "official", tmp_path / "out") == (0, "all tensors")
    assert export.export(str(tmp_path), "official", tmp_path / "student", which="student") == (0, "all tensors")
    student = weight_files.read(tmp_path / "student/model.safetensors")
    again = convert.from_torch(student, "dinov2")
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, dict(state.params)))
    arrays = weight_files.read(tmp_path / "out/model.safetensors")
    again = convert.from_torch(arrays, "dinov2")
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, dict(state.teacher)))
    assert "* method: dinov2" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="official names are written for runs"):
        export.export(str(GOLDEN / "weights/backbone.npz"), "official", tmp_path / "x")


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    """Of a run, or of another project: before any work."""
    monkeypatch.setattr(export, "source_of", None)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit, match=f"^error: {tmp_path} is not empty; give --out a new folder$"):
        export.main(["export", "--run=runs/dino", "--format=timm", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="^error: .*README.md is a file; give --out a new folder$"):
        export.main(["export", "--run=runs/dino", "--format=timm", f"--out={tmp_path}/README.md"])
    with pytest.raises(ValueError, match="is not empty"):
        export.written("runs/dino", "timm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and (tmp_path / "README.md").read_text() == "mine"


def test_the_student_of_one_checkpoint(tmp_path, capsys):
    """Its tensors; what is seen of images; and in README.md how it was made, with the scores of that step."""
    workdir, _, state = made_run(tmp_path / "run", "dino", **{"eval.resize": 0.75})
    rows = [{"step": step, "eval/knn": step / 10, "eval/probe": None} for step in (3, 5, 9)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = f"{workdir}/checkpoints/5"
    for which in ("student", "teacher"):
        words = ["export", f"--run={checkpoint}", "--format=hf", f"--out={tmp_path}/{which}", f"--which={which}"]
        export.main(words)
        captured = capsys.readouterr()
        assert f"step 5 of 6 steps, the {which}" in captured.err and "differ by at most" in captured.out
        learned = (state.params if which == "student" else state.teacher)["backbone"]
        again = layouts.read(tmp_path / which).parts["backbone"]
        np.testing.assert_array_equal(again["blocks"]["fc1"]["kernel"], learned["blocks"]["fc1"]["kernel"])
        card = (tmp_path / which / "README.md").read_text()
        assert f"tiny.py:dino), data: folder, step 5 of 6 steps, the {which}\n" in card and "* eval/knn: 0.5\n" in card
        assert "eval/probe" not in card and f"jax {jax.__version__}" in card
        assert f"mim_jax {mim_jax.__version__}: `python -m mim_jax.export --run={checkpoint} --format=hf" in card
        model = mim_jax.load(checkpoint, which=which)
        assert model.description.endswith(f", the {which}") and model.resize == 0.75
        assert np.array_equal(model.parts["backbone"]["norm"]["scale"], learned["norm"]["scale"])
    processor = json.loads((tmp_path / "student/preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 21} and processor["crop_size"] == {"height": 16, "width": 16}
    assert processor["do_center_crop"] and layouts.read(tmp_path / "student").seen.crop == 0.75
    for form in ("timm", "safetensors"):
        export.written(workdir, form, tmp_path / form)
        assert mim_jax.load(tmp_path / form).resize == 0.75
    with pytest.raises(ValueError, match="is no run: only runs have a teacher"):
        export.export(str(tmp_path / "timm"), "hf", tmp_path / "x", which="teacher")


@pytest.mark.parametrize("form", ["timm", "hf", "safetensors"])
def test_a_folder_sees_what_the_run_sees(tmp_path, form):
    """Of larger images, too, which are reduced when they are decoded."""
    workdir, _, _ = made_run(tmp_path / "run", "dino", **{"eval.resize": 0.75, "data.canvas": 24})
    export.export(workdir, form, tmp_path / "out")
    assert not list(tmp_path.glob("*unchecked*"))
    assert "reduces larger images to 24 x 24" in (tmp_path / "out/README.md").read_text()
    found, want = (mim_jax.load(path).features([picture(200, 130)])["patch"] for path in (tmp_path / "out", workdir))
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_run_is_told_nothing(tmp_path):
    workdir, _, _ = made_run(tmp_path, "dino")
    with pytest.raises(ValueError, match="heads and nonsense cannot be given for a run"):
        mim_jax.load(workdir, heads=7, nonsense=1)
    assert mim_jax.load(workdir, levels=(0, 4095)).levels == (0, 4095)
    with pytest.raises(ValueError, match="levels is .* with black below white"):
        mim_jax.load(workdir, levels=(1, 0))


def test_what_is_not_compared_is_not_there(tmp_path, monkeypatch):
    workdir, _, _ = made_run(tmp_path / "run", "dino")
    monkeypatch.setattr(export, "compared", lambda *_: 0.5)
    with pytest.raises(ValueError, match="differ by 5.0e-01 of the largest, more than 0.0001: nothing is written"):
        export.export(workdir, "timm", tmp_path / "new/out")
    assert not list((tmp_path / "new").iterdir())


def test_a_run_without_a_teacher(tmp_path):
    workdir, _, _ = made_run(tmp_path, "mae")
    with pytest.raises(ValueError, match="is a run of mae, which has no teacher"):
        mim_jax.load_run(workdir, "teacher")
    assert mim_jax.load_run(workdir, "student").which == ""


def test_the_licence_goes_along(golden, tmp_path, capsys):
    """Of a file, and of what a run began with."""
    line = "the released weights of MAE are CC BY-NC 4.0"
    weights = read(golden, "official/mae_full")
    folder = saved(weights, tmp_path)
    assert line in weights.lines
    for form in ("hf", "safetensors"):
        given = export.source_of(folder)
        export.written(folder, form, tmp_path / form, source=given)
        assert f"* {line}\n" in (tmp_path / form / "README.md").read_text()
    assert line in layouts.read(tmp_path / "safetensors").lines
    (tmp_path / "first").mkdir()
    first = mim_jax.load_config("tests/tiny.py:mae")
    first.init_from = folder
    (tmp_path / "first/config.json").write_text(first.to_json_best_effort())
    workdir, _, _ = made_run(tmp_path / "second", "mae", init_from=str(tmp_path / "first"))
    assert export.origins(mim_jax.load_run(workdir)) == [
        f"it began with {tmp_path}/first, whose licence holds for this, too",
        f"it began with {folder}, whose licence holds for this, too ({line})",
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_our_own_layout_holds_every_encoder(golden, tmp_path, name):
    weights = read(golden, name)
    export.written("", "safetensors", tmp_path, source=source(weights))
    again = layouts.read(tmp_path)
    assert again.network == weights.network
    jax.tree.map(np.testing.assert_array_equal, again.parts, weights.parts)


def test_files_whose_header_begins_as_a_pickle_does(tmp_path):
    """The length of a header may have 0x80 as its first byte."""
    for extra in range(0, 256, 8):
        arrays = {"x" * (1 + extra): np.arange(6, dtype=np.float32).reshape(2, 3)}
        (tmp_path / "a.safetensors").write_bytes(weight_files.safetensors(arrays))
        read = weight_files.read(tmp_path / "a.safetensors")
        np.testing.assert_array_equal(read[next(iter(arrays))], next(iter(arrays.values())))
