"""MAE held against numbers that the official PyTorch code produced (facebookresearch/mae at efb2a80)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, follow_four_steps, official, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim
from mim_jax.models.heads import Classifier
from mim_jax.models.layers import patchify, unpatchify
from mim_jax.models.positions import interpolate_positions, sincos_positions
from mim_jax.models.vit import ViT


def config_of(meta, dtype="float64"):
    """The config of a stored case."""
    c = meta["config"]
    config = mim_jax.load_config("configs/mae.py:demo")
    config.model.update(img_size=c["img_size"], patch_size=c["patch_size"], dim=c["embed_dim"], depth=c["depth"])
    config.model.update(heads=c["num_heads"], dtype=dtype)
    config.decoder.update(dim=c["decoder_embed_dim"], depth=c["decoder_depth"], heads=c["decoder_num_heads"])
    config.mask.ratio = c["mask_ratio"]
    return config


def mask_of(method, noise):
    """The official masks: small noise is kept."""
    return method.views.masks.of_order(jnp.argsort(jnp.asarray(noise), axis=-1)[:, ::-1])


def views_of(method, images, noise):
    return {"global": channels_last(images)[:, None].astype(float), "mask": mask_of(method, noise)[:, None]}


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_masks(golden, ratio):
    arrays, meta = golden("mae_forward")
    config = config_of(meta)
    config.mask.ratio = ratio
    want = arrays["out/mask" if ratio == 0.75 else f"out/mask_ratio_{ratio}"]
    np.testing.assert_array_equal(mask_of(mim_jax.make_method(config), arrays["in/noise"]), want)


def test_patches(golden):
    arrays, _ = golden("mae_forward")
    images = channels_last(arrays["in/imgs"])
    patches = patchify(images, 4)
    np.testing.assert_array_equal(patches, arrays["out/target_patches"].astype(np.float32))
    np.testing.assert_array_equal(unpatchify(patches, 4), images)


def test_normalized_patches(golden, x64):
    arrays, _ = golden("mae_forward")
    target = jnp.asarray(arrays["out/target_patches"])
    normalized, mean, std = losses.normalized_patches(target)
    np.testing.assert_allclose(normalized, arrays["out/target_patches_normpix"], atol=1e-12)
    np.testing.assert_allclose(normalized * std + mean, target, atol=1e-12)


@pytest.mark.parametrize("loss", ["pix", "normpix"])
def test_forward_loss_and_gradients(golden, loss, x64):
    arrays, meta = golden("mae_forward")
    config = config_of(meta)
    config.loss.norm_pix_loss = loss == "normpix"
    method = mim_jax.make_method(config)
    params = double(convert.from_torch(prefixed(arrays, "w/"), "mae"))
    views = views_of(method, arrays["in/imgs"], arrays["in/noise"])

    backbone = jax.jit(functools.partial(method.backbone.apply, visible=method.views.masks.visible))
    out = backbone({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
    latent = arrays["out/latent"]  # kept patches in the order of their noise; ours are in the order of the image
    kept = np.argsort(arrays["in/noise"], axis=1)[:, : latent.shape[1] - 1]
    in_image_order = np.take_along_axis(latent[:, 1:], np.argsort(kept, axis=1)[..., None], axis=1)
    np.testing.assert_allclose(out["cls"][:, 0], latent[:, 0], atol=1e-12)
    np.testing.assert_allclose(out["patch"][:, 0], in_image_order, atol=1e-12)
    np.testing.assert_allclose(jax.jit(method.predict)(params, views)[:, 0], arrays["out/pred"], atol=1e-12)

    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (value, _), grads = gradient(params, {}, {}, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(value, arrays[f"out/loss_{loss}"], rtol=1e-12)
    grads = official(grads, "mae")
    stored = prefixed(arrays, f"grad_{loss}/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-10, key
    assert not np.any(grads["pos_embed"]) and not np.any(grads["decoder_pos_embed"])


def test_forward_float32(golden):
    arrays, meta = golden("mae_forward")
    method = mim_jax.make_method(config_of(meta, "float32"))
    params = convert.from_torch(prefixed(arrays, "w/"), "mae")
    views = views_of(method, arrays["in/imgs"], arrays["in/noise"])
    assert relative_error(jax.jit(method.predict)(params, views)[:, 0], arrays["out/pred"]) < 1e-5


def test_raw_reconstruction_undoes_the_normalization(golden, x64):
    """A decoder that predicts the normalised target exactly paints the image itself."""
    arrays, meta = golden("mae_forward")
    method = mim_jax.make_method(config_of(meta))
    views = views_of(method, arrays["in/imgs"], arrays["in/noise"])
    target, _, _ = losses.normalized_patches(patchify(views["global"], 4))
    object.__setattr__(method, "predict", lambda *_: target)
    np.testing.assert_allclose(method.reconstruction({}, {}, {}, views)["all predicted"], views["global"], atol=1e-12)


@pytest.mark.parametrize("name", ["mae_forward", "mae_train_steps"])
def test_round_trip(golden, name):
    arrays, _ = golden(name)
    whole = prefixed(arrays, "w/")
    encoder = {k: v for k, v in whole.items() if not k.startswith("decoder_") and k != "mask_token"}
    for weights in (whole, encoder):
        back = convert.to_torch(convert.from_torch(weights, "mae"), "mae")
        assert back.keys() == weights.keys()
        for key, want in weights.items():
            np.testing.assert_array_equal(back[key], want, err_msg=key)


def test_encoder_and_decoder_may_differ_in_depth(golden):
    arrays, _ = golden("mae_forward")
    shallow = {k: v for k, v in prefixed(arrays, "w/").items() if not k.startswith("decoder_blocks.1.")}
    params = convert.from_torch(shallow, "mae")
    assert len(params["backbone"]["blocks"]["qkv"]["kernel"]) == 2
    assert len(params["decoder"]["blocks"]["qkv"]["kernel"]) == 1


@pytest.mark.parametrize("pool", ["gp", "cls"])
def test_fine_tuned_classifier(golden, pool, x64):
    arrays, meta = golden("mae_finetune_vit")
    weights = prefixed(arrays, f"w_{pool}/")
    params = double(convert.from_torch(weights, "mae"))
    assert convert.to_torch(params, "mae").keys() == weights.keys()
    c = meta["config"]
    vit = ViT(
        patch_size=c["patch_size"], img_size=c["img_size"], dim=c["embed_dim"], depth=c["depth"], heads=c["num_heads"],
        final_norm=pool == "cls", dtype=jnp.float64,
    )  # fmt: skip
    out = jax.jit(vit.apply)({"params": params["backbone"]}, [channels_last(arrays["in/imgs"])[:, None].astype(float)])[0]
    features = out["cls"][:, 0] if pool == "cls" else out["patch"][:, 0].mean(1)
    head = Classifier(c["num_classes"], norm="layer" if pool == "gp" else "", dtype=jnp.float64)
    logits, seen = head.apply(
        {"params": params["head"]}, features, capture_intermediates=True, mutable="intermediates"
    )
    np.testing.assert_allclose(logits, arrays[f"out_{pool}/logits"], atol=1e-12)
    features = seen["intermediates"]["fc_norm"]["__call__"][0] if pool == "gp" else features
    np.testing.assert_allclose(features, arrays[f"out_{pool}/features"], atol=1e-12)


def test_linear_probe_head(golden, x64):
    arrays, _ = golden("mae_finetune_vit")
    features = jnp.asarray(arrays["lp/features"])
    head = Classifier(5, norm="batch", dtype=jnp.float64)
    stats = head.init(jax.random.key(0), features, train=True)["batch_stats"]
    params = {"linear": {"kernel": jnp.asarray(arrays["lp/w"].T), "bias": jnp.asarray(arrays["lp/b"])}}
    variables = {"params": params, "batch_stats": stats}
    logits, updates = head.apply(variables, features, train=True, mutable="batch_stats")
    np.testing.assert_allclose(logits, arrays["lp/logits_train"], atol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["bn"]["mean"], arrays["lp/running_mean_after"], atol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["bn"]["var"], arrays["lp/running_var_after"], atol=1e-12)
    np.testing.assert_allclose(head.apply({"params": params} | updates, features), arrays["lp/logits_eval"], atol=1e-12)


@pytest.mark.parametrize("dim, grid, cls", [(32, 4, True), (48, 7, False), (16, 3, True)])
def test_sincos_positions(golden, dim, grid, cls):
    arrays, _ = golden("sincos_posembed")
    got = sincos_positions(dim, grid, grid)[0]
    np.testing.assert_allclose(got if cls else got[1:], arrays[f"mae/d{dim}_g{grid}_cls{int(cls)}"], atol=1e-14)


def test_sincos_positions_of_vit_base(golden):
    arrays, _ = golden("sincos_posembed")
    rows = arrays["mae/d768_g14_rows"]
    np.testing.assert_allclose(sincos_positions(768, 14, 14)[0][rows], arrays["mae/d768_g14_values"], atol=1e-14)


def test_sincos_positions_of_moco_have_the_halves_swapped(golden):
    arrays, _ = golden("sincos_posembed")
    for dim, side in ((32, 4), (48, 7)):
        table = sincos_positions(dim, side, side, row_first=True)[0]
        np.testing.assert_allclose(table, arrays[f"moco/d{dim}_g{side}_cls"], atol=1e-6)
    column, row = np.split(sincos_positions(32, 2, 3)[0], 2, axis=1)
    np.testing.assert_array_equal(sincos_positions(32, 2, 3, row_first=True)[0], np.concatenate([row, column], axis=1))
    # the official table of 2 rows and 3 columns runs column by column: it is that of 3 rows and 2 columns
    np.testing.assert_allclose(sincos_positions(32, 3, 2, row_first=True)[0], arrays["moco/d32_h2_w3_cls"], atol=1e-6)


def test_position_interpolation(golden, x64):
    arrays, _ = golden("sincos_posembed")
    got = interpolate_positions(jnp.asarray(arrays["mae/interp_in_4x4"]), 6, 6, offset=0.0)
    np.testing.assert_allclose(got, arrays["mae/interp_out_6x6"], atol=1e-12)


def test_schedule(golden, x64):
    arrays, _ = golden("schedules")
    for code in ("mae", "moco"):
        floor = 1e-6 if code == "mae" else 0.0
        schedule = optim.cosine_schedule(2.4e-3, floor, 50, 10, endpoint=False)
        got = [schedule(jnp.int32(step)) for step in range(50)]
        np.testing.assert_allclose(got, arrays[f"{code}/lr"], rtol=1e-12, atol=1e-18)


def test_other_schedules_are_dinos(golden, x64):
    """BEiT's learning rate and weight decay, and MoCo's momentum."""
    arrays, _ = golden("schedules")
    schedules = {
        "beit/lr": optim.cosine_schedule(1.5e-3, 1e-5, 50, 10),
        "beit/lr_warmup_steps7": optim.cosine_schedule(1.5e-3, 1e-5, 50, 7),
        "beit/wd": optim.cosine_schedule(0.05, 0.01, 50),
        "moco/momentum": optim.cosine_schedule(0.99, 1.0, 50),
    }
    for name, schedule in schedules.items():
        np.testing.assert_allclose([schedule(jnp.int32(step)) for step in range(50)], arrays[name], rtol=1e-12, err_msg=name)


BEIT = {"pos": "relative_each", "layerscale": 0.1, "k_bias": False}


@pytest.mark.parametrize("family, decay, settings, no_decay", [
    ("mae", 0.65, {}, ("cls_token", "pos_embed")),
    ("mae", 0.75, {}, ("cls_token", "pos_embed")),
    ("beit", 0.65, BEIT, ("cls_token",)),
    ("beit", 0.85, BEIT, ("cls_token",)),
])  # fmt: skip
def test_layer_decay(golden, family, decay, settings, no_decay):
    """Factors of the learning rate and weight decay, by the official names."""
    arrays, meta = golden("layer_decay")
    stored = {name: (entry["lr_scale"], entry["weight_decay"]) for name, entry in meta[f"{family}_{decay}"].items()}
    assert sorted({scale for scale, _ in stored.values()}) == sorted(arrays[f"{family}/scales_{decay}"])
    vit = ViT(patch_size=4, img_size=16, dim=8, depth=12, heads=2, final_norm=False, **settings)
    params = {
        "backbone": jax.eval_shape(vit.init, jax.random.key(0), [jnp.zeros((1, 1, 16, 16, 3))])["params"],
        "head": jax.eval_shape(Classifier(5, norm="layer").init, jax.random.key(0), jnp.zeros((1, 8)))["params"],
    }
    scales = {"backbone": vit.lr_scales(params["backbone"], decay, 1.0), "head": jax.tree.map(lambda _: 1.0, params["head"])}
    full = jax.tree.map(lambda scale, p: np.broadcast_to(scale, p.shape), scales, params)
    decayed = optim.decayed(params, no_decay)
    decays = jax.tree.map(lambda is_decayed, p: np.full(p.shape, 0.05 * is_decayed), decayed, params)
    decays = official(decays, family)
    got = {key: (a.flat[0], decays[key].flat[0]) for key, a in official(full, family).items() if "index" not in key}
    assert got.keys() == stored.keys()
    for key, want in stored.items():
        np.testing.assert_allclose(got[key], want, rtol=1e-12, err_msg=key)


def test_layer_decay_scales_the_update(x64):
    config = mim_jax.load_config("tests/tiny.py:mae")
    config.optim.update(layer_decay=0.5, warmup="0 steps", schedule="dino", weight_decay=0.1, weight_decay_end=0.1)

    def update(config):
        method = mim_jax.make_method(config)
        params = jax.tree.map(lambda p: jnp.full(p.shape, 1.0), jax.eval_shape(method.init, jax.random.key(0))[0])
        return jax.jit(lambda p: method.optimizer.update(p, method.optimizer.init(p), p, step=0)[0])(params)

    scaled = update(config)
    config.optim.layer_decay = 1.0
    ratio = jax.tree.map(lambda a, b: np.asarray(a / b), scaled, update(config))
    np.testing.assert_allclose(ratio["backbone"]["blocks"]["fc1"]["kernel"][:, 0, 0], [0.25, 0.5])
    np.testing.assert_allclose(ratio["backbone"]["cls_token"], 1 / 8)
    np.testing.assert_allclose(ratio["decoder"]["pred"]["kernel"], 1)


def test_parameter_groups(golden):
    _, meta = golden("mae_train_steps")
    config = config_of(meta, "float32")
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]

    def group(path, is_decayed, p):
        name = "frozen" if re.search(method.untrained, path) else "decay" if is_decayed else "no_decay"
        return np.full(p.shape, name)

    groups = jax.tree.map(group, tree_paths(params), optim.decayed(params, config.optim.no_decay), params)
    got = {key: value.flat[0] for key, value in official(groups, "mae").items()}
    assert got == {key: name for name, keys in meta["param_groups"].items() for key in keys}


def test_initial_distributions():
    """Xavier bounds of every matrix, the patch embedding's as that of a matrix, uniform within them (models_mae.py)."""
    method = mim_jax.make_method(mim_jax.load_config("configs/mae.py:demo"))
    arrays = official(jax.jit(method.init)(jax.random.key(0))[0], "mae")
    for key, a in arrays.items():
        if a.ndim > 1 and "token" not in key and "pos_embed" not in key:
            matrix = a.reshape(len(a), -1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.98 * bound < np.abs(a).max() <= bound, key
            assert abs(a.std() / bound * 3**0.5 - 1) < 0.05, key
    np.testing.assert_array_equal(arrays["norm.bias"], 0)
    assert 0 < np.abs(arrays["patch_embed.proj.bias"]).max() <= 192**-0.5
    assert 0.015 < arrays["cls_token"].std() < 0.025 and 0.01 < arrays["mask_token"].std() < 0.03


def test_vit_base_has_the_published_number_of_parameters():
    method = mim_jax.make_method(mim_jax.load_config("configs/mae.py"))
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    fixed = {path for path in jax.tree.leaves(tree_paths(params)) if re.search(method.untrained, path)}
    count = {path: p.size for path, p in zip(jax.tree.leaves(tree_paths(params)), jax.tree.leaves(params))}
    assert sum(count.values()) == 111_907_840
    assert sum(size for path, size in count.items() if path not in fixed) == 111_655_680


def test_four_training_steps(golden, x64):
    """The trajectory of engine_pretrain.py through the real train_step: losses, gradients' norms, every weight."""
    arrays, meta = golden("mae_train_steps")
    config = config_of(meta)
    o, s = meta["optimizer"], meta["schedule"]
    config.data.update(batch_size=4, num_examples=4 * s["iters_per_epoch"])
    config.total = f"{s['epochs']} epochs"
    config.optim.update(lr=s["lr"] * 256 / 4, min_lr=s["min_lr"], warmup=f"{s['warmup_epochs']} epochs")
    config.optim.update(weight_decay=o["weight_decay"], weight_decay_end=o["weight_decay"])
    assert (config.optim.beta1, config.optim.beta2) == tuple(o["betas"]) and config.optim.eps == o["eps"]

    def views(method, step):
        return views_of(method, arrays[f"in/imgs_step{step}"], arrays[f"in/noise_step{step}"])

    follow_four_steps(config, "mae", arrays, views)
