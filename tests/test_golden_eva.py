"""EVA, EVA-02 and CLIP's vision tower held against numbers of the official PyTorch code (baaivision/EVA at 5623d08)."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, follow_four_steps, official, prefixed, relative_error

import mim_jax
from mim_jax import convert
from mim_jax.config import resolve_target
from mim_jax.learned import load_target
from mim_jax.models import clip, vit
from mim_jax.models.positions import interpolate_positions, rotary_angles
from mim_jax.models.vit import masked_first

VARIANTS = {"eva_mim": "g14", "eva02_mim": "b", "eva_train_steps": "g14"}
FROZEN = {"params": {}, "extra": {}}


@pytest.fixture
def config_of(monkeypatch):
    """A function: the config of a stored case, whose teacher gives the stored features: its images are the features."""

    def of(name, meta, dtype="float64"):
        c = meta["config"]
        config = mim_jax.load_config(f"configs/eva.py:{VARIANTS[name]}")
        config.model.update(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["depth"], heads=c["heads"])
        config.model.update(dtype=dtype, drop_path_rate=0.0, patch_grad=0.1 if c.get("stop_grad_conv1") else 1.0)
        if config.model.arch == "eva01":
            config.model.mlp_ratio = 4.0
        config.mask.update(count=12, smallest=2)
        features = lambda parts, images: {"patch": images.reshape(len(images), -1, images.shape[-1])}  # noqa: E731
        teacher = types.SimpleNamespace(stride=1, dim=c["target_dim"], features=features, init_parts=lambda key: {})
        monkeypatch.setattr("mim_jax.methods.eva.make_target", lambda *_: teacher)
        return config

    return of


def views_of(images, mask, features, dtype=float):
    mask, side = jnp.asarray(mask, bool).reshape(len(images), 1, -1), math.isqrt(mask[0].size)
    features = jnp.asarray(features, dtype).reshape(len(images), 1, side, side, -1)
    return {"global": channels_last(images)[:, None].astype(dtype), "mask": mask, "target": features}


@pytest.mark.parametrize("name", ["eva_mim", "eva02_mim"])
def test_eva(golden, config_of, x64, name):
    arrays, meta = golden(name)
    method = mim_jax.make_method(config_of(name, meta))
    params = double(convert.from_torch(prefixed(arrays, "w/"), "eva"))
    views = views_of(arrays["in/imgs"], arrays["in/mask"], arrays["in/targets_all"])
    if "out/features" in arrays:
        backbone = jax.jit(method.backbone.apply)
        out = backbone({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
        tokens = np.concatenate([out["cls"], out["patch"][:, 0]], 1)
        np.testing.assert_allclose(tokens, arrays["out/features"], atol=1e-12)
    places, weight = masked_first(views["mask"], method.views.masks.count)
    predictions = jax.jit(method.predict)(params, views, places)
    np.testing.assert_allclose(predictions[weight], arrays["out/pred_masked"], atol=1e-12)

    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, (_, figures)), grads = gradient(params, {}, FROZEN, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-12)
    if "out/cosine" in arrays:
        np.testing.assert_allclose(loss, -arrays["out/cosine"].mean(), rtol=1e-12)
    units = arrays["in/targets_all"][arrays["in/mask"]]
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    np.testing.assert_allclose(figures["train/constant_cosine"], (units @ units.mean(0)).mean() ** 0.5, rtol=1e-12)
    grads, stored = official(grads, "eva"), prefixed(arrays, "grad/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-10, key


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_fewer_digits(golden, config_of, dtype, error):
    arrays, meta = golden("eva02_mim")
    method = mim_jax.make_method(config_of("eva02_mim", meta, dtype))
    params = convert.from_torch(prefixed(arrays, "w/"), "eva")
    views = views_of(arrays["in/imgs"], arrays["in/mask"], arrays["in/targets_all"], np.float32)
    places, weight = masked_first(views["mask"], method.views.masks.count)
    predictions = jax.jit(method.predict)(params, views, places)
    assert predictions.dtype == jnp.float32
    assert relative_error(predictions[weight], arrays["out/pred_masked"]) < error


def test_four_training_steps(golden, config_of, x64):
    arrays, meta = golden("eva_train_steps")
    config, o, s = config_of("eva_train_steps", meta), meta["optimizer"], meta["schedule"]
    config.data.update(batch_size=meta["config"]["batch"], num_examples=meta["config"]["batch"] * s["iters_per_epoch"])
    config.total = f"{s['epochs']} epochs"
    config.optim.update(lr=s["lr"], min_lr=s["min_lr"], clip_grad=o["clip_grad_norm"], warmup=f"{s['warmup_epochs']} epochs")

    def views(method, step):
        return views_of(*(arrays[f"in/{name}_step{step}"] for name in ("imgs", "mask", "targets")))

    follow_four_steps(config, "eva", arrays, views, FROZEN)


# Rotary positions


def test_rotary_angles(golden):
    arrays, _ = golden("eva02_mim")
    side = math.isqrt(len(arrays["out/rope_cos"]))
    angles = rotary_angles(arrays["out/rope_cos"].shape[1], (side, side), side)
    np.testing.assert_allclose(np.cos(angles), arrays["out/rope_cos"], atol=1e-12)
    np.testing.assert_allclose(np.sin(angles), arrays["out/rope_sin"], atol=1e-12)


def test_rotary_angles_of_another_grid():
    """Stretched to the grid of the pre-training, rows before columns."""
    angles = rotary_angles(8, (2, 6), 3).reshape(2, 6, 8)
    np.testing.assert_allclose(angles[:, 0, 0], [0, 1.5])
    np.testing.assert_allclose(angles[0, :, 4], [0, 0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(angles[1, 2], np.array([1.5, 1.5, 0.015, 0.015, 1, 1, 0.01, 0.01]))
    with pytest.raises(ValueError, match="heads of width 6 cannot have rotary positions"):
        rotary_angles(6, (2, 2), 2)


def test_images_of_another_size(golden, config_of, x64):
    """Learned positions are interpolated, rotary ones stretched: as in a model of that size whose positions were so before."""
    arrays, meta = golden("eva02_mim")
    vit = mim_jax.make_method(config_of("eva02_mim", meta)).backbone
    params = double(convert.from_torch(prefixed(arrays, "w/"), "eva"))["backbone"]
    image = jax.random.normal(jax.random.key(0), (1, 1, 24, 24, 3), jnp.float64)
    larger = params | {"pos_embed": interpolate_positions(params["pos_embed"], 6, 6, offset=0.0)}
    given = (vit, params), (vit.clone(img_size=24), larger), (vit.clone(rotary=6), params)
    got, want, unstretched = (jax.jit(m.apply)({"params": p}, [image])[0]["patch"] for m, p in given)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert relative_error(unstretched, want) > 1e-4


# First values


def kernels(blocks, *names):
    return [np.asarray(blocks[name]["kernel"]) for name in names]


def test_first_values_of_eva01(config_of, golden):
    _, meta = golden("eva_mim")
    config = config_of("eva_mim", meta)
    config.model.update(dim=64, depth=3, dtype="float32")
    params, _ = jax.jit(mim_jax.make_method(config).init)(jax.random.key(0))
    backbone, std = params["backbone"], 0.015
    for value in (*kernels(backbone["blocks"], "qkv", "fc1"), backbone["pos_embed"], params["head"]["linear"]["kernel"]):
        assert 0.97 * std < np.abs(value).max() <= 1.0001 * std
    for kernel in kernels(backbone["blocks"], "proj", "fc2"):
        for i, block in enumerate(kernel):
            bound = std / math.sqrt(2 * (i + 1))
            assert 0.97 * bound < np.abs(block).max() <= 1.0001 * bound
    assert not np.any(backbone["patch_embed"]["bias"])


@pytest.mark.parametrize("subln", [True, False])
def test_first_values_of_eva02(config_of, golden, subln):
    _, meta = golden("eva02_mim")
    config = config_of("eva02_mim", meta)
    config.model.update(dim=64, depth=3, dtype="float32", subln=subln)
    params, _ = jax.jit(mim_jax.make_method(config).init)(jax.random.key(0))
    backbone, blocks, scale = params["backbone"], params["backbone"]["blocks"], math.sqrt(math.log(6)) if subln else 1
    width = int(64 * 8 / 3)
    shapes = {"q_proj": (64, 64, 1), "k_proj": (64, 64, 1), "v_proj": (64, 64, scale), "proj": (64, 64, scale)}
    shapes |= {"w1": (64, width, scale), "w2": (64, width, scale), "w3": (width, 64, scale)}
    if not subln:
        shapes = {"qkv": (64, 192, 1), "proj": (64, 64, 1), "w12": (64, 2 * width, 1), "w3": (width, 64, 1)}
    assert {name for name, value in blocks.items() if isinstance(value, dict) and "kernel" in value} == set(shapes)
    for name, (inputs, outputs, factor) in shapes.items():
        assert blocks[name]["kernel"].shape == (3, inputs, outputs)
        np.testing.assert_allclose(blocks[name]["kernel"].std(), factor * math.sqrt(2 / (inputs + outputs)), rtol=0.03)
    bound = math.sqrt(6 / (64 + 3 * config.model.patch_size**2))
    assert 0.97 * bound < np.abs(backbone["patch_embed"]["kernel"]).max() <= bound
    assert 0.9 * 0.02 < np.abs(backbone["pos_embed"]).max() <= 1.0001 * 0.02
    assert np.any(backbone["patch_embed"]["bias"]) and not np.any(blocks["proj"]["bias"])


# Names


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(golden, name):
    arrays, _ = golden(name)
    weights = {key: value for key, value in prefixed(arrays, "w/").items() if "rope.freqs" not in key}
    params = convert.from_torch(prefixed(arrays, "w/"), "eva")
    back = convert.to_torch(params, "eva")
    assert back.keys() == weights.keys()
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)
    encoder = {key: value for key, value in weights.items() if not key.startswith(("lm_head", "mask_token"))}
    assert convert.to_torch(convert.from_torch(encoder, "eva"), "eva").keys() == encoder.keys()


def test_names_without_subln(golden, config_of):
    _, meta = golden("eva02_mim")
    config = config_of("eva02_mim", meta)
    config.model.update(subln=False, dtype="float32")
    params, _ = jax.jit(mim_jax.make_method(config).init)(jax.random.key(0))
    arrays = convert.to_torch(params, "eva")
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.w12.weight", "blocks.1.mlp.w3.bias"} <= arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(arrays, "eva"), params)


# CLIP


@pytest.fixture
def tower(golden):
    """(arrays, official weights, the tower's config)"""
    arrays, meta = golden("clip_vision")
    c, config = meta["config"], mim_jax.load_config("configs/clip.py:b16").unlock()
    config.model.update(img_size=c["image"], patch_size=c["patch"], dim=c["width"], depth=c["layers"], heads=c["heads"])
    config.model.update(mlp_ratio=c["mlp"] / c["width"], out_dim=c["out"], dtype="float64")
    return arrays, prefixed(arrays, "w_openai/"), config


def test_clip(tower, x64):
    arrays, weights, config = tower
    network = clip.make(config)
    parts = double(convert.from_torch(weights, "clip"))
    images = channels_last(arrays["in/pixel_values"]).astype(float) * jnp.array(clip.STD) + jnp.array(clip.MEAN)
    out = jax.jit(network.features)(parts, images)
    np.testing.assert_allclose(out["patch"], arrays["out/patch_targets_eva"], atol=1e-6)  # its softmax is in float32
    np.testing.assert_allclose(out["cls"], arrays["out/image_embeds"], atol=1e-6)
    assert (network.dim, network.stride) == (out["patch"].shape[-1], config.model.patch_size)

    wide = jax.random.normal(jax.random.key(0), (1, 24, 24, 3), jnp.float64)
    vision, visual = network.vision, parts["visual"]
    larger = visual | {"pos_embed": interpolate_positions(visual["pos_embed"], 6, 6, offset=0.0)}
    run = jax.jit(vit.features, static_argnums=0)
    want, got = run(vision.clone(img_size=24), larger, wide), run(vision, visual, wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)
    assert jax.eval_shape(network.features, parts, wide[:, :8])["patch"].shape == (1, 12, network.dim)


def test_a_method_learns_from_clip(tower, tmp_path):
    """Official weights in a file, the whole model's, with its text tower."""
    _, weights, config = tower
    config.model.dtype = "float32"
    text = {"transformer.resblocks.0.ln_1.weight": 8, "token_embedding.weight": 8, "logit_scale": 1, "positional_embedding": 8}
    whole = {f"visual.{key}": value for key, value in weights.items()} | {key: np.ones(n) for key, n in text.items()}
    np.savez(tmp_path / "clip.npz", **whole)
    eva = mim_jax.load_config("tests/tiny.py:eva")
    eva.target.update(config="clip:b16", weights=str(tmp_path / "clip.npz"))
    resolve_target(eva)
    eva.target.network.model.update(config.model)
    method = mim_jax.make_method(eva)
    target = load_target(method, eva)
    jax.tree.map(np.testing.assert_array_equal, target, convert.from_torch(weights, "clip"))
    views = method.views.zeros(2) | method.views.example_masks(2)
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    assert params["head"]["linear"]["kernel"].shape == (16, method.target.dim)
    loss, _ = jax.eval_shape(method.loss, params, {}, target, {}, views, jax.random.key(0), jnp.int32(0))
    assert loss.shape == ()


@pytest.mark.parametrize("before", ["", "visual."])
def test_names_of_clip(tower, before):
    _, weights, _ = tower
    back = convert.to_torch(convert.from_torch({before + key: value for key, value in weights.items()}, "clip"), "clip")
    assert back.keys() == weights.keys()
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)
    with pytest.raises(ValueError, match=f"missing: {before}ln_post.bias\n  unexpected: {before}head"):
        broken = weights | {"head": np.ones(2)}
        convert.from_torch({before + key: value for key, value in broken.items() if key != "ln_post.bias"}, "clip")
