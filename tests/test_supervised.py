"""Supervised training, fine-tuning and linear probing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, prefixed, relative_error
from PIL import Image

import mim_jax
from mim_jax import convert, learned, optim, train
from mim_jax.checkpoint import Checkpoints
from mim_jax.config import resolve_encoder
from mim_jax.data import mixing
from mim_jax.methods.base import make_method
from mim_jax.models.positions import interpolate_bias_table, interpolate_positions
from mim_jax.sharding import path_name
from mim_jax.state import abstract_state, first_state


def tuned_from(variant, method="supervised", pool="mean", **model):
    """The tiny config of a method whose encoder is that of another tiny config, here without its weights."""
    config, encoder = (mim_jax.load_config(f"tests/tiny.py:{name}") for name in (method, variant))
    config.data.num_examples = encoder.data.num_examples = 64
    config.data.num_classes = 5
    encoder.model.update(model)
    with config.unlocked():
        config.encoder = encoder.unlock()
        config.model.patch_size = encoder.model.get("patch_size", 4)
        if method == "supervised":
            config.model.pool = pool
    return config


# Against the official code


@pytest.mark.parametrize("pool, dtype", [("gp", "float64"), ("cls", "float64"), ("gp", "float32")])
def test_scores_of_a_fine_tuned_mae(golden, pool, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    arrays, meta = golden("mae_finetune_vit")
    c = meta["config"]
    model = dict(img_size=c["img_size"], patch_size=c["patch_size"], dim=c["embed_dim"], depth=c["depth"], heads=c["num_heads"])
    config = tuned_from("mae", pool={"gp": "mean"}.get(pool, pool), **model)
    config.data.num_classes, config.model.dtype, config.model.img_size = c["num_classes"], dtype, c["img_size"]
    compare(make_method(config), prefixed(arrays, f"w_{pool}/"), "mae", arrays["in/imgs"], prefixed(arrays, f"out_{pool}/"))


def test_scores_of_a_fine_tuned_beit(golden, x64):
    arrays, _ = golden("beit_finetune_vit")
    config = tuned_from("beit", dim=32, depth=2, heads=2, layerscale=0.1)
    config.model.dtype = "float64"
    compare(make_method(config), prefixed(arrays, "w/"), "beit", arrays["in/imgs"], prefixed(arrays, "out/"))


def compare(method, weights, family, images, want):
    params, fresh = convert.from_torch(weights, family), jax.eval_shape(method.init, jax.random.key(0))[0]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    images = channels_last(images)
    wide = method.backbone.dtype == jnp.float64
    if wide:
        params, images = double(params), images.astype(float)
    limit = 1e-12 if wide else 1e-5
    scores = jax.jit(method.class_scores)(params, {}, images)
    assert relative_error(scores, want["logits"]) < limit
    assert relative_error(jax.jit(method.features)(params, images)["cls"], want["features"]) < limit


def test_the_head_of_maes_linear_probe(golden, x64):
    arrays, _ = golden("mae_finetune_vit")
    config = tuned_from("mae", "linear")
    config.probe.update(blocks=(1,), mean_patch=(False,), rates=(1.0,), batch_norm=True, held_out=0)
    head = make_method(config).classifiers
    features = jnp.asarray(arrays["lp/features"])
    stats = head.init(jax.random.key(0), features)["batch_stats"]
    params = {"kernel": jnp.asarray(arrays["lp/w"].T)[None], "bias": jnp.asarray(arrays["lp/b"])[None]}
    logits, updates = head.apply({"params": params, "batch_stats": stats}, features, True, mutable="batch_stats")
    np.testing.assert_allclose(logits[0], arrays["lp/logits_train"], atol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["bn"]["var"], arrays["lp/running_var_after"], atol=1e-12)
    np.testing.assert_allclose(head.apply({"params": params} | updates, features)[0], arrays["lp/logits_eval"], atol=1e-12)


# From a run


def saved_run(workdir, variant):
    """(method, state) of a run of random numbers, which is saved to `workdir`."""
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.data.num_examples = 64
    method = make_method(config)
    state = random_state(method, config, seed=1)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    (workdir / "config.json").write_text(config.to_json_best_effort())
    return method, state


def random_state(method, config, seed=0):
    """A state that nothing was compiled for."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_state(method, config))


def begun(workdir, variant, **changes):
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.init_from, config.data.num_examples, config.data.num_classes = str(workdir), 64, 5
    resolve_encoder(config)
    config.update_from_flattened_dict(changes)
    method = make_method(config)
    return config, method, learned.begin_with(method, config, random_state(method, config))


@pytest.mark.parametrize("variant, method, changes, said", [
    ("mae", "supervised", {"model.img_size": 24},
     "; interpolated: backbone/pos_embed; dropped: decoder, backbone/norm; new: head"),
    ("dino", "supervised", {"model.pool": "cls"}, "; dropped: head; new: head"),
    ("beit", "supervised", {"model.img_size": 24},
     "; interpolated: backbone/relative_position_bias_table; copied to each block: backbone/relative_position_bias_table; "
     "dropped: head, backbone/mask_token, backbone/norm; new: head"),
    pytest.param("simmim_swin", "supervised", {}, "; dropped: decoder, backbone/mask_token; new: head", marks=pytest.mark.slow),
    ("beit", "linear", {"probe.blocks": (1, 2)}, "; dropped: head, backbone/mask_token; new: head, extra"),
])  # fmt: skip
def test_a_backbone_of_a_run(variant, method, changes, said, tmp_path, capsys):
    source, there = saved_run(tmp_path, variant)
    config, method, here = begun(tmp_path, method, **changes)
    section, words = ("teacher" if there.teacher else "params"), capsys.readouterr().err
    from_teacher = " from teacher" * bool(there.teacher)
    teacher = f", teacher/backbone{' from params' * (not there.teacher)}" * bool(here.teacher)
    assert words == f"initialised from step 5 in {tmp_path}: params/backbone{from_teacher}{teacher}{said}\n"
    for name in ("patch_size", "dim", "depth", "heads"):
        assert config.model.get(name) == config.encoder.model.get(name)
    assert config.model.dtype == "float32" and config.model.get("pos", "") == config.encoder.model.get("pos", "")

    old, new = getattr(there, section)["backbone"], here.params["backbone"]
    if here.teacher:
        assert jax.tree.all(jax.tree.map(np.array_equal, here.teacher["backbone"], new))
    same = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(old)}
    for path, leaf in jax.tree.leaves_with_path(new):
        name = path_name(path)
        if name == "blocks/relative_position_bias_table":
            table = old["relative_position_bias_table"]
            want = interpolate_bias_table(table, (4, 4), (6, 6), cls=True)
            np.testing.assert_allclose(leaf, np.stack([want] * 2), atol=1e-6)
        elif name == "pos_embed" and variant == "mae":
            np.testing.assert_allclose(leaf, interpolate_positions(old["pos_embed"], 6, 6, offset=0.0), atol=1e-6)
        else:
            np.testing.assert_array_equal(leaf, same[name], err_msg=name)
    if variant == "dino":  # nothing of the backbone has changed
        images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
        got = jax.jit(method.features)(here.params, images)["cls"]
        np.testing.assert_allclose(got, jax.jit(source.features)(there.teacher, images)["cls"], atol=1e-6)


@pytest.mark.parametrize("variant, changes, message", [
    ("vqvae", {}, "is a run of vqvae, which has no ViT or Swin backbone"),
    ("simmim_swin", {"model.pool": "cls"}, 'model.pool is "cls", but a Swin has no CLS token'),
    ("mae", {"data.batch_size": 7}, "data.batch_size is 7, but must be even: images are mixed in pairs"),
    ("mae", {"data.num_classes": 0}, "supervised learns from labels, but the images of folder have none"),
    ("mae", {"model.pool": "max"}, 'model.pool is "max", but must be "cls" or "mean"'),
    ("mae", {"crops.global_crops_number": 2}, "crops.global_crops_number is 2, but supervised learns from one view"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_refused(variant, changes, message):
    config = tuned_from(variant)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        make_method(config)


def test_a_run_that_is_not_there_or_not_resolved(tmp_path):
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.init_from, config.data.num_examples = str(tmp_path), 64
    with pytest.raises(ValueError, match="init_from was changed to .*: call mim_jax.config.resolve_encoder"):
        make_method(config)
    with pytest.raises(FileNotFoundError, match="there is neither a run nor a file of weights in"):
        resolve_encoder(config)


@pytest.mark.slow
def test_a_run_that_is_fine_tuned_from_another(tmp_path, capsys):
    (tmp_path / "mae").mkdir()
    saved_run(tmp_path / "mae", "mae")
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.init_from, config.data.dir, config.total = str(tmp_path / "mae"), str(tmp_path / "images"), "2 steps"
    config.data.workers, config.eval.every, config.augment.magnitude = 0, "never", 0.0
    state = train.run(config, tmp_path / "tuned")
    assert capsys.readouterr().err.count("initialised from step 5 in") == 1 and int(state.step) == 2
    run = mim_jax.load_run(tmp_path / "tuned")
    assert run.config.data.num_classes == 2 and run.config.encoder.method == "mae" and run.params.keys() == {"backbone", "head"}
    assert jax.eval_shape(run.method.class_scores, run.params, run.extra, jnp.zeros((3, 16, 16, 3))).shape == (3, 2)


def test_images_without_labels_are_refused(tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "one.png")
    config = mim_jax.load_config("tests/tiny.py:linear")
    config.data.dir, config.data.workers = str(tmp_path), 0
    with pytest.raises(ValueError, match="linear learns from labels, but the images of folder have none"):
        train.run(config, tmp_path / "run")


def test_a_run_that_goes_on_needs_the_other_no_more(tmp_path):
    """Its own config has kept that of the run in init_from, which may be moved or deleted."""
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae/config.json").write_text(mim_jax.load_config("tests/tiny.py:mae").to_json_best_effort())
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.init_from = str(tmp_path / "mae")
    resolve_encoder(config)
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    (tmp_path / "mae/config.json").unlink()
    again = mim_jax.load_config("tests/tiny.py:supervised")
    again.init_from = config.init_from
    with pytest.raises(FileNotFoundError, match="there is neither a run nor a file of weights in .*mae"):
        resolve_encoder(again)
    resolve_encoder(again, tmp_path)
    assert again.encoder.method == "mae" and again.model == config.model


def test_images_are_normalised_as_in_the_run(tmp_path):
    run = mim_jax.load_config("tests/tiny.py:beit")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(run.to_json_best_effort())))
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.init_from = str(tmp_path)
    resolve_encoder(config)
    assert config.data.mean == (0.5, 0.5, 0.5) and config.is_locked


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.dim", 48, "model.dim is 48, but that of .* is 16: leave it out"),
        ("data.mean", (0.1, 0.2, 0.3), r"data.mean is \(0.1, 0.2, 0.3\), but that of .* is \(0.5, 0.5, 0.5\): leave it out"),
    ],
)
def test_another_backbone_than_the_one_of_the_run_is_refused(tmp_path, key, value, message):
    (tmp_path / "config.json").write_text(mim_jax.load_config("tests/tiny.py:beit").to_json_best_effort())
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.init_from = str(tmp_path)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        resolve_encoder(config)
    config.update_from_flattened_dict({key: {"model.dim": 16, "data.mean": (0.5, 0.5, 0.5)}[key]})  # as it is there
    resolve_encoder(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, r"probe.blocks is \(\), but must have values, each once"),
        ({"rates": (0.5, 0.5)}, r"probe.rates is \(0.5, 0.5\), but must have values, each once"),
        ({"held_out": 1}, "probe.held_out is 1: no image would be learned from"),
        (
            {"held_out": 0, "rates": (0.5, 1.0)},
            "probe.held_out is 0: images that are not learned from must choose among 8 heads",
        ),
    ],
)
def test_heads_that_cannot_learn_or_be_chosen_are_refused(changes, message):
    config = mim_jax.load_config("tests/tiny.py:linear")
    config.data.update(num_examples=64, num_classes=3)
    config.probe.update(changes)
    with pytest.raises(ValueError, match=message):
        make_method(config)


# Mixing


IMAGES = jnp.broadcast_to(jnp.arange(64.0)[:, None, None, None], (64, 16, 16, 3))  # image i has the value i
TARGETS = jnp.eye(64)


def test_mixup():
    shares = []
    for seed in range(60):
        images, targets = jax.jit(mixing.mix, static_argnums=(2, 3))(IMAGES, TARGETS, 0.8, 0.0, jax.random.key(seed))
        share = float(targets[0, 0])
        np.testing.assert_allclose(targets, share * np.eye(64) + (1 - share) * np.eye(64)[np.arange(64) ^ 1], atol=1e-6)
        places = np.arange(64)
        want = share * places + (1 - share) * (places ^ 1)
        np.testing.assert_allclose(images, np.broadcast_to(want[:, None, None, None], images.shape), atol=1e-4)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.12 and abs(np.std(shares) - (1 / (4 * 2.6)) ** 0.5) < 0.08  # of Beta(0.8, 0.8)


def test_cutmix_pastes_one_rectangle_and_mixes_labels_by_its_area():
    for seed in range(20):
        images, targets = jax.jit(mixing.mix, static_argnums=(2, 3))(IMAGES, TARGETS, 0.0, 1.0, jax.random.key(seed))
        pasted = np.asarray(images[0, :, :, 0] == 1)
        assert set(np.unique(images[0])) <= {0, 1} and np.array_equal(images[1, :, :, 0] == 0, pasted)
        assert pasted.sum() == pasted.any(0).sum() * pasted.any(1).sum()  # a rectangle
        np.testing.assert_allclose(targets[0, :2], [1 - pasted.mean(), pasted.mean()], atol=1e-6)


def test_half_of_the_batches_are_cut():
    mix = jax.jit(lambda key: mixing.mix(IMAGES, TARGETS, 0.8, 1.0, key)[0])
    mixed = [np.asarray(mix(jax.random.key(seed))[0]) for seed in range(60)]
    assert 18 <= sum(set(np.unique(image)) <= {0, 1} for image in mixed) <= 42


def test_erasing_fills_rectangles_of_a_quarter_of_the_images():
    images = jnp.full((512, 24, 16, 3), 100.0)
    erased = jax.jit(mixing.erase, static_argnums=1)(images, 0.25, jax.random.key(0))
    gone = np.asarray(erased != 100).all(-1)
    assert np.array_equal(gone, np.asarray(erased != 100).any(-1))
    count = gone.any((1, 2))
    assert 0.18 < count.mean() < 0.32
    for one in gone[count]:
        assert one.sum() == one.any(0).sum() * one.any(1).sum()
    share = gone[count].mean((1, 2))
    assert 0.01 < share.min() and share.max() < 0.36 and abs(share.mean() - 0.175) < 0.03
    noise = np.asarray(erased)[gone]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_labels_are_smoothed():
    config = mim_jax.load_config("tests/tiny.py:supervised")
    config.data.update(num_examples=64, num_classes=5)
    method = make_method(config)
    targets = method.targets({"label": jnp.array([3, 0]), "global": jnp.zeros((2, 1, 16, 16, 3))})
    np.testing.assert_allclose(targets, [[0.02, 0.02, 0.02, 0.92, 0.02], [0.92, 0.02, 0.02, 0.02, 0.02]], atol=1e-6)


# Training


def test_the_average_has_a_constant_momentum():
    config = mim_jax.load_config("supervised:vitb16")
    momentum = optim.schedules(config)["momentum_teacher"]
    np.testing.assert_allclose([momentum(0), momentum(90_000)], 0.9999, rtol=1e-6)


def test_heads_learn_at_their_own_rates_and_the_best_on_held_out_images_is_used():
    config = mim_jax.load_config("tests/tiny.py:linear")
    config.data.update(num_examples=64, num_classes=3, batch_size=32)
    config.probe.update(rates=(0.0, 1.0), held_out=4)
    config.optim.update(lr=0.1, warmup="0 steps", lr_batch_size=0)
    method = make_method(config)
    assert method.names == ("last1_0", "last1_1", "last1_mean_0", "last1_mean_1") + tuple(
        name.replace("last1", "last2") for name in ("last1_0", "last1_1", "last1_mean_0", "last1_mean_1")
    )
    state = first_state(method, config)
    colors = np.random.default_rng(0).normal(size=(32, 1, 1, 1, 3)).astype(np.float32)
    views = {"global": np.broadcast_to(4 * colors, (32, 1, 16, 16, 3)), "index": np.arange(32, dtype=np.int32)}
    views["label"] = colors.reshape(32, 3).argmax(1).astype(np.int32)
    step, before = mim_jax.make_train_step(method, config), jax.device_get(state.params)
    for _ in range(30):
        state, metrics = step(state, {}, views)
    after = jax.device_get(state.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before["backbone"], after["backbone"]))
    for kind, head in after["head"]["heads"].items():
        same = before["head"]["heads"][kind]["kernel"] == head["kernel"]
        assert same[0].all() and not same[1].any()
    held_out = np.asarray(state.extra["held_out_accuracy"])
    assert held_out[1::2].max() > held_out[::2].max()
    np.testing.assert_allclose(metrics["train/held_out_last1_1"], held_out[1], rtol=1e-5)
    scores = jax.jit(method.class_scores)(state.params, state.extra, views["global"][:, 0])
    everything, _ = method.scores(state.params, {}, views["global"][:, 0])
    np.testing.assert_allclose(scores, everything[held_out.argmax()], atol=1e-5)
    assert np.mean(scores.argmax(-1) == views["label"]) > 0.8


def test_held_out_images_are_not_learned_from():
    config = mim_jax.load_config("tests/tiny.py:linear")
    config.data.update(num_examples=64, num_classes=3)
    config.probe.update(held_out=4)
    method = make_method(config)
    params, extra = jax.jit(method.init)(jax.random.key(0))
    views = {"global": jax.random.normal(jax.random.key(1), (8, 1, 16, 16, 3)), "index": jnp.arange(8)}
    loss = jax.jit(lambda label: method.loss(params, {}, {}, extra, views | {"label": label}, None, 0)[0])
    first = loss(jnp.zeros(8, int))
    assert loss(jnp.array([1, 0, 0, 0, 2, 0, 0, 0])) == first != loss(jnp.array([0, 1, 0, 0, 0, 0, 0, 0]))
