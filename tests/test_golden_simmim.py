"""SimMIM, with ViT and with Swin, held against numbers of the official PyTorch code (microsoft/SimMIM at d3e29bc)."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, follow_four_steps, official, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim, sharding
from mim_jax.masking import RandomMask
from mim_jax.models.positions import bias_of_pairs, interpolate_bias_table, progression, relative_position_index
from mim_jax.models.swin import Swin


def config_of(meta, dtype="float64"):
    """The config of a stored case."""
    c = meta["config"]
    swin = "window" in c
    config = mim_jax.load_config("configs/simmim.py:" + ("swinb" if swin else "vitb16"))
    config.model.update(img_size=c["img"], patch_size=c["patch"], dtype=dtype, drop_path_rate=0.0)
    if swin:
        config.model.update(dim=c["embed_dim"], depths=tuple(c["depths"]), heads=tuple(c["heads"]), window=c["window"])
        config.mask.mask_patch_size = 8
    else:
        config.model.update(dim=c["dim"], depth=c["depth"], heads=c["heads"])
        config.mask.update(mask_patch_size=c["mask_patch"], ratio=c["mask_ratio"])
    return config


def views_of(images, mask, dtype=float):
    mask = jnp.asarray(mask, bool)
    return {"global": channels_last(images)[:, None].astype(dtype), "mask": mask.reshape(len(mask), 1, -1)}


@pytest.mark.parametrize("name", ["simmim_vit", "simmim_swin"])
def test_forward_loss_and_gradients(golden, name, x64):
    arrays, meta = golden(name)
    method = mim_jax.make_method(config_of(meta))
    params = double(convert.from_torch(prefixed(arrays, "w/"), "simmim"))
    views = views_of(arrays["in/imgs"], arrays["in/mask"])
    backbone = jax.jit(method.backbone.apply)
    out = backbone({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
    z = np.moveaxis(arrays["out/encoder_z"], 1, -1)
    np.testing.assert_allclose(out["patch"][:, 0].reshape(z.shape), z, atol=1e-12)
    rec = np.moveaxis(arrays["out/rec"], 1, -1)
    np.testing.assert_allclose(jax.jit(method.predict)(params, views)[:, 0], rec, atol=1e-12)
    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (value, _), grads = gradient(params, {}, {}, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-12)
    grads = official(grads, "simmim")
    stored = prefixed(arrays, "grad/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-10, key


@pytest.mark.parametrize("name", ["simmim_vit", "simmim_swin"])
def test_forward_float32(golden, name):
    arrays, meta = golden(name)
    method = mim_jax.make_method(config_of(meta, "float32"))
    params = convert.from_torch(prefixed(arrays, "w/"), "simmim")
    got = jax.jit(method.predict)(params, views_of(arrays["in/imgs"], arrays["in/mask"], np.float32))[:, 0]
    assert relative_error(got, np.moveaxis(arrays["out/rec"], 1, -1)) < 1e-5


@pytest.mark.parametrize("window", [5, 47])
def test_normalized_targets(golden, window, x64):
    arrays, meta = golden("simmim_vit")
    config = config_of(meta)
    config.loss.norm_target_window = window
    method = mim_jax.make_method(config)
    params = double(convert.from_torch(prefixed(arrays, "w/"), "simmim"))
    views = views_of(arrays["in/imgs"], arrays["in/mask"])
    want = np.moveaxis(arrays[f"out/norm_targets_ps{window}"], 1, -1)
    target, mean, std = losses.locally_normalized(views["global"], window)
    assert relative_error(target[:, 0], want) < 1e-6  # the official code made it in float32
    np.testing.assert_allclose(target * std + mean, views["global"], atol=1e-12)
    loss, _ = jax.jit(method.loss)(params, {}, {}, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(loss, arrays[f"out/loss_norm_target_ps{window}"], rtol=1e-6)


@pytest.mark.parametrize("name", ["simmim_vit", "simmim_swin", "simmim_vit_train_steps"])
def test_round_trip(golden, name):
    """All but Swin's masks of shifted windows, which depend on the size of the images."""
    arrays, _ = golden(name)
    weights = prefixed(arrays, "w/")
    back = convert.to_torch(convert.from_torch(weights, "simmim"), "simmim")
    assert back.keys() == {key for key in weights if not key.endswith("attn_mask")}
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)


@pytest.mark.parametrize("pos", ["learned", "sincos"])
def test_positions_instead_of_biases(pos):
    """Absolute positions: the official keys, and an update of those alone that are learned."""
    config = mim_jax.load_config("tests/tiny.py:simmim")
    config.model.update(pos=pos, layerscale=0.0)
    config.optim.warmup = "0 steps"
    method = mim_jax.make_method(config)
    params, _ = jax.jit(method.init)(jax.random.key(0))
    arrays = convert.to_torch(params, "simmim")
    assert arrays["encoder.pos_embed"].shape == (1, 17, config.model.dim)
    assert not any("relative" in key or "gamma" in key for key in arrays)
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(arrays, "simmim"), params)
    tx = method.optimizer
    updates = jax.jit(lambda params: tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, step=0)[0])(params)
    assert np.any(updates["backbone"]["pos_embed"]) == (pos == "learned")
    assert not optim.decayed(params, config.optim.no_decay)["backbone"]["pos_embed"]


def test_conversion_is_strict(golden):
    arrays, _ = golden("simmim_swin")
    weights = prefixed(arrays, "w/")
    del weights["encoder.layers.0.blocks.1.norm1.weight"]
    weights["encoder.layers.1.blocks.0.mlp.fc3.weight"] = np.zeros((2, 2))
    weights["encoder.layers.0.downsample.reduction.weight"] = np.zeros((32, 65))
    with pytest.raises(ValueError) as error:
        convert.from_torch(weights, "simmim")
    told = sorted(line.strip() for line in str(error.value).splitlines()[1:])
    assert told == [
        "misshapen: encoder.layers.0.downsample.reduction.weight is (32, 65), expected (32, 64)",
        "missing: encoder.layers.0.blocks.1.norm1.weight",
        "unexpected: encoder.layers.1.blocks.0.mlp.fc3.weight",
    ]


@pytest.mark.parametrize("case", ["in192_mp32_p4_r0.6", "in224_mp32_p16_r0.6", "in224_mp16_p16_r0.75", "in32_mp16_p8_r0.6"])
def test_masks(golden, case):
    """The official generator, its permutations drawn by numpy after the same seed."""
    arrays, _ = golden("mask_generators")
    size, square, patch, ratio = (float(field.lstrip("inmpr")) for field in case.split("_"))
    config = mim_jax.load_config("configs/simmim.py")
    config.model.update(img_size=int(size), patch_size=int(patch))
    config.mask.update(mask_patch_size=int(square), ratio=ratio)
    mask = mim_jax.make_method(config).views.masks
    rng = np.random.RandomState(0)
    want = arrays[f"simmim/{case}"]
    for stored in want:
        got = mask.of_order(jnp.asarray(rng.permutation(math.prod(mask.squares))))
        np.testing.assert_array_equal(got.reshape(stored.shape), stored)
    assert mask.visible == want[0].size - want[0].sum()


def test_mask_counts_of_the_papers():
    counts = [
        mim_jax.make_method(mim_jax.load_config(f"configs/{name}")).views.masks.count
        for name in ("mae.py:vitb16", "simmim.py:vitb16", "simmim.py:swinb")
    ]
    assert counts == [147, 30, 22]


@pytest.mark.parametrize("config, key, value, message", [
    ("mae.py", "mask.ratio", 0.0, "mask 0 of 196"),
    ("mae.py", "mask.ratio", 0.999, "mask 196 of 196"),
    ("mae.py", "model.patch_size", 15, "model.img_size is 224, but must be a multiple of 15 pixels"),
    ("simmim.py", "mask.ratio", 1.0, "mask 49 of 49"),
    ("simmim.py", "mask.mask_patch_size", 24, "mask.mask_patch_size=24"),
    ("simmim.py", "model.img_size", 200, "model.img_size is 200, but must be a multiple of 16 pixels"),
    ("simmim.py", "model.arch", "swim", '"vit" or "swin"'),
    ("simmim.py:swinb", "model.heads", (4, 8), "one number for each stage"),
    ("simmim.py", "loss.norm_target_window", 48, "an odd number of pixels"),
    ("simmim.py", "loss.norm_target_window", 1, "an odd number of pixels"),
    ("simmim.py", "optim.schedule", "cosine", '"timm_multistep"'),
    ("simmim.py", "optim.clip_per", "tensor", 'must be "model" or "part" or "parameter"'),
])  # fmt: skip
def test_what_cannot_be_is_refused(config, key, value, message):
    config = mim_jax.load_config(f"configs/{config}")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.make_optimizer(config, mim_jax.make_method(config).fixed)


@pytest.mark.parametrize("key, value, message", [
    ("img_size", 160, "40 x 40 patches cannot be cut into windows of 6"),
    ("depths", (2, 3, 2, 2), "cannot have 3"),
])  # fmt: skip
def test_swin_refuses_what_it_cannot_cut(key, value, message):
    config = mim_jax.load_config("configs/simmim.py:swinb")
    config.model[key] = value
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mim_jax.make_method(config).init, jax.random.key(0))


def test_masks_are_uniform():
    mask = RandomMask((4, 4), count=10)
    drawn = np.asarray(jax.jit(lambda index: mask.draw(jax.random.key(0), index, 2)["mask"])(jnp.arange(10_000)))
    assert drawn.shape == (10_000, 2, 16) and (drawn.sum(-1) == 10).all()
    frequency = drawn.mean((0, 1))
    assert np.abs(frequency - 10 / 16).max() < 5 * 0.484 / 20_000**0.5
    pairs = np.einsum("bci,bcj->ij", drawn.astype(float), drawn.astype(float)) / 20_000
    off = pairs[~np.eye(16, dtype=bool)]
    assert np.abs(off - 10 * 9 / (16 * 15)).max() < 5 * 0.48 / 20_000**0.5, "squares are not drawn independently"


def test_masks_do_not_depend_on_the_devices_or_the_batch():
    mask, key = RandomMask((8, 8), count=10, square=2), jax.random.key(1)
    index = np.random.default_rng(0).permutation(1000)[:24].astype(np.int32)
    draw = jax.jit(lambda index: mask.draw(key, index, 1)["mask"])
    one = np.asarray(draw(index))
    assert one.shape == (24, 1, 64) and len(np.unique(one, axis=0)) == 24
    np.testing.assert_array_equal(draw(index[7:9]), one[7:9])
    for count in (4, 8):
        with jax.set_mesh(sharding.make_mesh(count, 1, jax.devices()[:count])):
            np.testing.assert_array_equal(draw(sharding.global_batch({"index": index})["index"]), one)


def test_relative_position_index(golden):
    arrays, _ = golden("simmim_vit")
    want = arrays["w/encoder.rel_pos_bias.relative_position_index"]
    np.testing.assert_array_equal(relative_position_index(4, 4, cls=True), want)


@pytest.mark.parametrize("cls", [False, True])
def test_the_bias_of_each_pair_is_the_table_s_entry(cls):
    table = np.random.default_rng(0).normal(size=(15 * 5 + 3 * cls, 2)).astype(np.float32)
    index = relative_position_index(8, 3, cls)
    bias, vjp = jax.vjp(lambda table: bias_of_pairs(table, 8, 3, cls), table)
    np.testing.assert_array_equal(bias, np.moveaxis(table[index], -1, 0))
    back = np.zeros_like(table)
    np.add.at(back, index.reshape(-1), np.moveaxis(table[index], -1, 2).reshape(-1, 2))
    np.testing.assert_allclose(vjp(bias)[0], back, rtol=1e-5)


def test_relative_position_index_of_an_oblong():
    index = relative_position_index(8, 3, cls=False)
    for query in range(24):
        for key in range(24):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert index[query, key] == (dy + 7) * 5 + dx + 2


@pytest.mark.parametrize("case", ["vit_4to6", "vit_14to24", "vit_14to14", "swin_w6to7"])
def test_bias_table_interpolation(golden, case):
    arrays, _ = golden("rel_pos_bias_interp")
    size, to = (int(n) for n in case.split("_")[1].removeprefix("w").split("to"))
    if size != to:
        ratio, places = progression(2 * size - 1, 2 * to - 1)
        np.testing.assert_allclose(ratio, arrays[f"{case}/q"], atol=1e-12)
        np.testing.assert_allclose(places, arrays[f"{case}/source_positions"], atol=1e-9)
    table = jnp.asarray(arrays[f"{case}/in"])
    got = interpolate_bias_table(table, (size, size), (to, to), cls=case.startswith("vit"))
    np.testing.assert_allclose(got, arrays[f"{case}/out"], atol=2e-6)


def schedule_config(kind):
    config = mim_jax.load_config("configs/simmim.py")
    config.data.update(batch_size=512, num_examples=512 * 5)
    config.total = "10 epochs"
    config.optim.update(schedule=f"timm_{kind}", lr=8e-4, warmup_lr=1e-6, min_lr=1e-5)
    config.optim.update(warmup="2 epochs", decay_at=("8 epochs",))
    return config


@pytest.mark.parametrize("kind", ["cosine", "multistep"])
def test_schedules(golden, kind, x64):
    arrays, _ = golden("schedules")
    want, config = arrays[f"simmim/{kind}"], schedule_config(kind)
    got = [optim.learning_rate(config)(jnp.int32(step)) for step in range(50)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    # all of it is scaled with the batch, what it begins and ends with too
    config.data.update(batch_size=1024, num_examples=1024 * 5)
    got = [optim.learning_rate(config)(jnp.int32(step)) for step in range(50)]
    np.testing.assert_allclose(got, 2 * want, rtol=1e-12)


@pytest.mark.parametrize("name", ["simmim_vit_train_steps"])
def test_parameter_groups(golden, name):
    _, meta = golden(name)
    config = config_of(meta, "float32")
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    decayed = optim.decayed(params, config.optim.no_decay)
    groups = jax.tree.map(lambda p, d: np.full(p.shape, "decay" if d else "no_decay"), params, decayed)
    got = {key: value.flat[0] for key, value in official(groups, "simmim").items() if value.dtype.kind == "U"}
    assert got == {key: group for group, keys in meta["param_groups"].items() for key in keys}


def test_swin_decays_its_bias_tables_but_not_the_mask_token():
    config = mim_jax.load_config("configs/simmim.py:swinb")
    params = jax.eval_shape(mim_jax.make_method(config).init, jax.random.key(0))[0]
    decayed = jax.tree.leaves(optim.decayed(params, config.optim.no_decay))
    for path, is_decayed, p in zip(jax.tree.leaves(tree_paths(params)), decayed, jax.tree.leaves(params)):
        matrix = p.ndim - ("/blocks/" in path) > 1 and not path.endswith("mask_token")
        assert is_decayed == matrix, path


def test_initial_distributions():
    """Cut at one standard deviation, what a block adds divided by sqrt(2 * layer) (recipe sheet 1.2)."""
    config = mim_jax.load_config("configs/simmim.py")
    config.model.update(img_size=32, patch_size=8, dim=96, depth=4, heads=3)
    config.mask.mask_patch_size = 8
    arrays = official(jax.jit(mim_jax.make_method(config).init)(jax.random.key(0))[0], "simmim")
    for key, a in arrays.items():
        if key.endswith("weight") and a.ndim > 1 and key.startswith("encoder."):
            name = key.split(".")
            layer = int(name[2]) + 1 if name[-2] in ("proj", "fc2") and name[1] == "blocks" else 0.5
            scale = (2 * layer) ** -0.5
            assert 0.97 * 0.02 * scale < np.abs(a).max() <= 0.0200001 * scale, key
            assert abs(a.std() / (0.0108 * scale) - 1) < 0.05, key
    for i in range(4):
        np.testing.assert_allclose(arrays[f"encoder.blocks.{i}.gamma_1"], 0.1, rtol=1e-6)
    for name in ("cls_token", "mask_token"):
        assert 0.014 < np.abs(arrays[f"encoder.{name}"]).max() <= 0.02, name
    assert not np.any(arrays["encoder.patch_embed.proj.bias"])
    assert not np.any(arrays["encoder.rel_pos_bias.relative_position_bias_table"])
    bound = 96**-0.5
    for key in ("decoder.0.weight", "decoder.0.bias"):
        assert 0.95 * bound < np.abs(arrays[key]).max() <= bound, key


def test_vit_base_has_the_published_number_of_parameters():
    params = jax.eval_shape(mim_jax.make_method(mim_jax.load_config("configs/simmim.py")).init, jax.random.key(0))[0]
    assert sum(p.size for p in jax.tree.leaves(params)) == 86_256_720


def test_four_training_steps(golden, x64):
    """The trajectory of main_simmim.py through the real train_step: losses, gradients' norms, every weight."""
    arrays, meta = golden("simmim_vit_train_steps")
    o, s, batch = meta["optimizer"], meta["schedule"], meta["config"]["batch"]
    config = config_of(meta)
    config.data.update(batch_size=batch, num_examples=batch * s["iters_per_epoch"])
    config.total = f"{s['epochs']} epochs"
    config.optim.update(schedule=f"timm_{s['name']}", lr=s["base_lr"], lr_batch_size=batch, min_lr=s["min_lr"])
    config.optim.update(warmup_lr=s["warmup_lr"], warmup=f"{s['warmup_epochs']} epochs", decay_rate=s["gamma"])
    config.optim.update(decay_at=tuple(f"{at} epochs" for at in s["multisteps"]), clip_grad=o["clip_grad_norm"])
    config.optim.update(weight_decay=o["weight_decay"], weight_decay_end=o["weight_decay"])

    def views(_, step):
        return views_of(arrays[f"in/imgs_step{step}"], arrays[f"in/mask_step{step}"])

    follow_four_steps(config, "simmim", arrays, views)


def test_layer_decay_of_a_swin():
    """The layers that `get_swin_layer` of the official optimizer.py gives to a Swin with 2, 4 and 2 blocks."""
    swin = Swin(patch_size=2, img_size=16, dim=4, depths=(2, 4, 2), heads=(1, 1, 1), window=2)
    params = {"backbone": jax.eval_shape(swin.init, jax.random.key(0), [jnp.zeros((1, 1, 16, 16, 3))])["params"]}
    scales = swin.lr_scales(params["backbone"], 0.5, 1.0)
    full = jax.tree.map(lambda scale, p: np.broadcast_to(scale, p.shape), {"backbone": scales}, params)
    want = {"mask_token": 0, "patch_embed": 0, "layers.0.downsample": 2, "layers.1.downsample": 6, "norm": 9}
    want |= {"layers.0.blocks.0": 1, "layers.0.blocks.1": 2, "layers.2.blocks.0": 7, "layers.2.blocks.1": 8}
    want |= {f"layers.1.blocks.{block}": 3 + block for block in range(4)}
    found = {}
    for name, scale in official(full, "simmim").items():
        part = re.match(r"encoder\.(layers\.\d+\.(blocks\.\d+|downsample)|[a-z_]+)", name)
        if "index" not in name and "attn_mask" not in name:
            found.setdefault(part[1], set()).update(np.unique(scale))
    assert found == {name: {0.5 ** (9 - layer)} for name, layer in want.items()}
