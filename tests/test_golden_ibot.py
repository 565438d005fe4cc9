"""iBOT held against numbers that the official PyTorch code produced (bytedance/ibot at da316d8)."""

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, follow_four_steps_with_a_teacher, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim
from mim_jax.masking import RatioMask
from mim_jax.models.heads import DinoHead
from mim_jax.models.vit import ViT


@pytest.mark.parametrize("variant", ["shared", "separate", "separate_unfrozen"])
def test_head(golden, variant, x64):
    arrays, meta = golden("ibot_head")
    case = prefixed(arrays, f"{variant}/")
    params = double(convert.from_torch(prefixed(case, "params/"), "ibot"))["head"]
    separate = variant != "shared"
    assert ("last_layer2" in params) == separate
    head = DinoHead(
        out_dim=64,
        hidden_dim=48,
        bottleneck_dim=16,
        norm_last_layer=variant != "separate_unfrozen",
        patch_out_dim=40 if separate else 0,
        dtype=jnp.float64,
    )

    def forward(params, x):  # CLS [B, 1, D] and patches [B, N, D]
        return head.apply({"params": params}, x[:, :1], x[:, 1:])

    (cls, patch), vjp = jax.vjp(forward, params, jnp.asarray(case["x"], jnp.float64))
    np.testing.assert_allclose(cls[:, 0], case["y_cls"], atol=1e-12)
    np.testing.assert_allclose(patch, case["y_patch"], atol=1e-12)
    np.testing.assert_allclose(head.apply({"params": params}, case["x"][:, 0].astype(float)), case["y_2d"], atol=1e-12)
    grads, grad_x = vjp((jnp.asarray(case["grad_y_cls"], jnp.float64)[:, None], jnp.asarray(case["grad_y_patch"], jnp.float64)))
    assert relative_error(grad_x, case["grad_x"]) < 1e-11
    got = convert.to_torch({"head": jax.device_get(grads)}, "ibot")
    for key, want in prefixed(case, "grads/").items():
        np.testing.assert_allclose(got[key], want, rtol=1e-10, atol=1e-14, err_msg=key)
    if variant != "separate_unfrozen":
        assert not np.any(got["last_layer.weight_g"]) and not np.any(got["last_layer2.weight_g"])


@pytest.mark.parametrize("parts", [("backbone",), ("head",), ("backbone", "head")], ids="+".join)
def test_official_arrays_survive_the_way_in_and_out(golden, parts):
    stored, _ = golden("ibot_train_steps")
    arrays = prefixed(stored, "params_init/")
    if len(parts) == 1:
        arrays = prefixed(arrays, f"{parts[0]}.")
    params = convert.from_torch(arrays, "ibot")
    assert tuple(params) == parts
    back = convert.to_torch(params, "ibot")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name, variant", [("ibot_head", "shared"), ("ibot_head", "separate"), ("ibot_vit", "layerscale")])
def test_official_variants_survive_the_way_in_and_out(golden, name, variant):
    arrays = prefixed(golden(name)[0], f"{variant}/params/")
    back = convert.to_torch(convert.from_torch(arrays, "ibot"), "ibot")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_a_head_without_its_last_layer_for_patches_is_refused(golden):
    arrays = prefixed(golden("ibot_head")[0], "separate/params/")
    del arrays["last_layer2.weight_v"]
    with pytest.raises(ValueError, match="missing: last_layer2.weight_v"):
        convert.from_torch(arrays, "ibot")


@pytest.mark.parametrize("variant", ["plain", "layerscale"])
def test_vit(golden, variant, x64):
    """Masked and not; the token for masked patches comes before the positions."""
    case = prefixed(golden("ibot_vit")[0], f"{variant}/")
    params = double(convert.from_torch(prefixed(case, "params/"), "ibot"))["backbone"]
    settings = dict(mask_token=True, layerscale=0.1 * (variant == "layerscale"), dtype=jnp.float64)
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, **settings)

    @jax.jit
    def forward(params, images, mask=None):
        out = vit.apply({"params": params}, [images], masks=None if mask is None else [mask])[0]
        return jnp.concatenate([out["cls"], out["patch"][:, 0]], axis=1)

    def tokens(params, name, mask=None):
        return forward(params, channels_last(case[name])[:, None].astype(float), mask)

    mask = jnp.asarray(case["mask"]).reshape(3, 1, 16)
    np.testing.assert_allclose(tokens(params, "x", mask), case["tokens_masked"], atol=1e-12)
    np.testing.assert_allclose(tokens(params, "x"), case["tokens_unmasked"], atol=1e-12)
    np.testing.assert_allclose(tokens(params, "x_local"), case["tokens_local"], atol=1e-12)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(tokens(p, "x", mask) ** 2)))(params)
    assert relative_error(grads["mask_token"][0], case["grad_masked_embed"]) < 1e-10


@pytest.mark.parametrize("name", ["ibot_loss", "ibot_loss_local0"])
@pytest.mark.parametrize("step", [0, 1])
def test_loss(golden, name, step, x64):
    """Both terms, their gradients and both centres, from stored logits; the official ones are crop-major."""
    a, _ = golden(name)

    def crops(x, number):
        return jnp.moveaxis(jnp.asarray(x, jnp.float64).reshape(number, 4, *x.shape[1:]), 0, 1)

    teacher, patch_teacher = crops(a[f"teacher_cls_{step}"], 2), crops(a[f"teacher_patch_{step}"], 2)
    student = {"cls": crops(a[f"student_cls_{step}"], 2), "patch": crops(a[f"student_patch_{step}"], 2)}
    if name == "ibot_loss":
        student["local"] = crops(a[f"student_local_cls_{step}"], 2)
    mask = jnp.moveaxis(jnp.asarray(a[f"masks_{step}"]), 0, 1).reshape(4, 2, 16)
    temps = [optim.warmup_by_epoch(0.04, end, 2, 1)(step) for end in (0.06, 0.07)]
    np.testing.assert_allclose(temps, [a[f"teacher_{kind}temp_schedule"][step] for kind in ("", "patch_")], rtol=1e-6)
    centers = [jnp.asarray(a[f"center_{kind}_{step}"], jnp.float64) for kind in ("cls", "patch")]
    targets = [losses.dino_teacher(*args) for args in zip((teacher, patch_teacher), centers, temps)]

    def terms(student):
        cls = jnp.concatenate([student["cls"], *([student["local"]] if "local" in student else [])], axis=1)
        log_cls, log_patch = jax.nn.log_softmax(cls / 0.1), jax.nn.log_softmax(student["patch"] / 0.1)
        weight = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        both = losses.dino_loss(log_cls, targets[0]), 0.7 * losses.patch_loss(log_patch, targets[1], weight, 8)
        return sum(both), both

    (total, (cls, patch)), grads = jax.value_and_grad(terms, has_aux=True)(student)
    np.testing.assert_allclose([total, cls, patch], [a[f"loss{kind}_{step}"] for kind in ("", "_cls", "_patch")], rtol=1e-6)
    for kind, key in (("cls", "student_cls"), ("patch", "student_patch"), ("local", "student_local_cls")):
        if kind in grads:
            want = crops(a[f"grad_{key}_{step}"], 2)
            assert relative_error(grads[kind], want) < 1e-5, kind
    for center, logits, kind in zip(centers, (teacher, patch_teacher), ("cls", "patch")):
        np.testing.assert_allclose(losses.update_center(center, logits, 0.9), a[f"center_{kind}_{step + 1}"], atol=1e-7)


@pytest.mark.slow
def test_the_papers_sum_is_not_divided_by_the_masked_patches():
    """With as many masked patches in each crop the two differ by that number."""
    config = small()
    config.mask.update(ratios=((0.25, 0.0),), shape="random")
    values = {}
    for per_image in (True, False):
        config.loss.per_image = per_image
        method = mim_jax.make_method(config)
        params, extra = method.init(jax.random.key(0))
        sizes = {"global": (3, 2, 16, 16, 3), "local": (3, 2, 8, 8, 3)}
        views = {name: jax.random.normal(jax.random.key(1), size) for name, size in sizes.items()}
        views["mask"] = jnp.asarray(method.views.example_masks(3)["mask"])
        _, (_, figures) = jax.jit(method.loss)(params, params, {}, extra, views, jax.random.key(2), jnp.int32(0))
        values[per_image] = figures["train/loss_patch"]
    np.testing.assert_allclose(values[False], 4 * values[True], rtol=1e-5)


@pytest.mark.parametrize("name, ratios, shape", [
    ("block_readme_0_or_03pm02", ((0.0, 0.0), (0.3, 0.2)), "block"),
    ("block_03", ((0.3, 0.0),), "block"),
    ("rand_065", ((0.65, 0.0),), "random"),
    ("rand_065_var005", ((0.65, 0.05),), "random"),
])  # fmt: skip
def test_masks_are_the_official_ones_after_the_same_seed(golden, name, ratios, shape):
    arrays = prefixed(golden("ibot_masks")[0], f"{name}/")
    mask, rng, numbers = RatioMask((14, 14), ratios, shape), random.Random(7), np.random.RandomState(7)
    drawn = np.stack([mask.one(rng, numbers) for _ in range(2000)]).reshape(2000, 14, 14)
    np.testing.assert_array_equal(drawn[:32], arrays["first32"])
    np.testing.assert_array_equal(drawn.sum((1, 2)), arrays["counts"])
    np.testing.assert_allclose(drawn.mean(0), arrays["freq_map"], atol=1e-12)
    assert drawn.sum((1, 2)).max() <= mask.count


def test_the_patch_temperature_waits_for_the_masks():
    config = small()
    config.data.update(batch_size=4, num_examples=8)  # 2 steps an epoch
    config.loss.update(warmup_teacher_patch_temp=0.04, teacher_patch_temp=0.07, teacher_temp_warmup="4 epochs")
    config.mask.start = "3 epochs"
    method = mim_jax.make_method(config)
    expected = np.repeat(np.concatenate([np.full(3, 0.04), np.linspace(0.04, 0.07, 4), np.full(2, 0.07)]), 2)
    np.testing.assert_allclose([method.schedules["teacher_patch_temp"](step) for step in range(18)], expected, rtol=1e-6)
    assert method.views.masks.start == 3 * 8


def small(**head):
    config = mim_jax.load_config("configs/ibot.py:demo")
    config.model.update(img_size=16, patch_size=4, dim=16, depth=2, heads=2)
    config.head.update({"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "patch_out_dim": 0} | head)
    config.loss.update(shared_head_teacher=True, patch_weight=1.0)
    config.mask.start = "0 steps"
    config.crops.update(global_crops_size=16, local_crops_number=2, local_crops_size=8)
    return config


@pytest.mark.parametrize("shared, shared_teacher", [(True, True), (False, True), (False, False)])
def test_parameter_groups(golden, shared, shared_teacher):
    """Which are decayed, and which the teacher has (a last layer for patches of its own only if it is not shared there)."""
    _, meta = golden("ibot_param_groups")
    groups = meta["cases"][f"shared_head={shared},shared_head_teacher={shared_teacher}"]
    config = small(norm_last_layer=True, patch_out_dim=0 if shared else 32)
    config.loss.shared_head_teacher = shared_teacher
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]

    def label(path, decayed, p):
        fixed = re.search(method.untrained, path)
        return np.full(p.shape, "not_in_optimizer" if fixed else "regularized" if decayed else "not_regularized")

    labels = jax.tree.map(label, tree_paths(params), optim.decayed(params, config.optim.no_decay), params)
    got = {key: value.flat[0] for key, value in convert.to_torch(labels, "ibot").items()}
    want = {key.removeprefix("module."): value for key, value in groups["student"].items()}
    assert {key: got[key] for key in want} == want
    assert got.keys() - want.keys() <= {"head.last_layer2.weight_g", "head.last_layer2.weight_v"}  # stored twice if shared
    used = method.teacher_head.init(jax.random.key(0), jnp.zeros((1, 1, 16)), jnp.zeros((1, 1, 16)))["params"]
    assert ("last_layer2" in used) == any("last_layer2" in key for key in groups["teacher_parameters"])


def test_both_last_layers_wait():
    """The official code drops the gradient of whatever has "last_layer" in its name, so that of the patches' own layer too."""
    config = small(patch_out_dim=32)
    config.optim.update(freeze_last_layer="2 steps", warmup="0 steps")
    method = mim_jax.make_method(config)
    params = jax.jit(lambda: method.init(jax.random.key(0))[0])()
    tx = method.optimizer
    ones, opt_state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    moved = []
    for step in range(3):
        updates, opt_state = jax.jit(tx.update)(ones, opt_state, params, step=step)
        moved.append({name: bool(np.any(updates["head"][name]["weight_v"])) for name in ("last_layer", "last_layer2")})
        assert np.any(updates["head"]["mlp_0"]["kernel"])
    assert moved == [{"last_layer": moves, "last_layer2": moves} for moves in (False, False, True)]


def test_four_training_steps(golden, x64):
    arrays, _ = golden("ibot_train_steps")
    config = small(norm_last_layer=True)
    config.data.update(batch_size=4, num_examples=8)  # 2 steps an epoch
    config.total, config.model.dtype = "3 epochs", "float64"
    config.loss.update(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_patch_temp=0.07, teacher_temp_warmup="2 epochs")
    config.optim.update(lr=2e-3 * 256 / 4, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.5)
    config.optim.update(warmup="1 epoch", freeze_last_layer="1 epoch")
    config.optim.momentum_teacher = 0.9
    config.mask.ratios = ((0.0, 0.0), (0.6, 0.3))  # room for the stored masks

    def more_views(at):
        return {"mask": jnp.moveaxis(jnp.asarray(arrays[f"masks/{at}"]), 0, 1).reshape(4, 2, 16)}

    centers = {"center": "center_cls", "patch_center": "center_patch"}
    follow_four_steps_with_a_teacher(config, "ibot", arrays, centers, more_views)
