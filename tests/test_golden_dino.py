"""DINO held against numbers that the official PyTorch code produced (facebookresearch/dino at 7c446df)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, follow_four_steps_with_a_teacher, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim
from mim_jax.methods.dino import SelfDistillation
from mim_jax.models.heads import DinoHead
from mim_jax.models.positions import interpolate_positions
from mim_jax.models.vit import ViT, intermediate_layers, last_attention

SIZES = ("16x16", "24x24", "8x8", "12x20", "28x16")


@pytest.mark.parametrize("size", ("28x16",))
def test_vit_float32(golden, size):
    arrays, _ = golden("dino_vit")
    params = convert.from_torch(prefixed(arrays, "params/"), "dino")["backbone"]
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2)
    images = channels_last(arrays[f"{size}/x"])
    out = jax.jit(vit.apply)({"params": params}, [images[:, None]])[0]
    np.testing.assert_allclose(out["cls"][:, 0], arrays[f"{size}/cls"], atol=1e-5)
    layers = jax.jit(lambda p, x: intermediate_layers(vit, p, x, 2))(params, images)
    np.testing.assert_allclose(layers[0], arrays[f"{size}/intermediate_0"], atol=1e-5)
    np.testing.assert_allclose(layers[1], arrays[f"{size}/intermediate_1"], atol=1e-5)
    np.testing.assert_allclose(out["patch"][:, 0], arrays[f"{size}/intermediate_1"][:, 1:], atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda p, x: last_attention(vit, p, x))(params, images), arrays[f"{size}/last_selfattention"], atol=1e-5
    )


@pytest.mark.parametrize("size", SIZES)
def test_vit_float64(golden, size, x64):
    arrays, _ = golden("dino_vit")
    params = convert.from_torch(prefixed(arrays, "params/"), "dino")["backbone"]
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, dtype=jnp.float64)
    out = jax.jit(vit.apply)({"params": params}, [channels_last(arrays[f"{size}/x"])[:, None].astype(float)])[0]
    np.testing.assert_allclose(out["cls"][:, 0], arrays[f"{size}/cls"], atol=1e-12)


def test_vit_several_resolutions_at_once_do_not_mix(golden):
    arrays, _ = golden("dino_vit")
    params = convert.from_torch(prefixed(arrays, "params/"), "dino")["backbone"]
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2)
    crops = [channels_last(arrays[f"{size}/x"]) for size in SIZES]
    crops = [jnp.stack([c, c[::-1]], axis=1) for c in crops]  # two crops of each size: the images, and in reverse order
    out = jax.jit(vit.apply)({"params": params}, crops)
    for size, o in zip(SIZES, out):
        np.testing.assert_allclose(o["cls"][:, 0], arrays[f"{size}/cls"], atol=1e-5)
        np.testing.assert_allclose(o["cls"][:, 1], arrays[f"{size}/cls"][::-1], atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_position_interpolation(golden, size, x64):
    arrays, _ = golden("dino_vit")
    stored = jnp.asarray(arrays["params/pos_embed"], jnp.float64)
    rows, columns = (int(side) // 4 for side in size.split("x"))
    np.testing.assert_allclose(
        interpolate_positions(stored, rows, columns), arrays[f"{size}/pos_embed"], atol=1e-13
    )


def test_gradient_through_interpolated_positions(golden, x64):
    arrays, _ = golden("dino_vit")
    params = convert.from_torch(prefixed(arrays, "params/"), "dino")["backbone"]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, dtype=jnp.float64)
    images = channels_last(arrays["24x24/x"])[:, None].astype(float)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(vit.apply({"params": p}, [images])[0]["cls"] ** 2)))(params)
    want = arrays["24x24/grad_pos_embed_of_sum_cls_squared"]
    assert relative_error(grads["pos_embed"], want) < 1e-11


@pytest.mark.parametrize("variant", ["default", "bn", "nlayers1", "unfrozen_g"])
def test_head(golden, variant, x64):
    arrays, meta = golden("dino_head")
    case = prefixed(arrays, f"{variant}/")
    params = convert.from_torch(prefixed(case, "params/"), "dino")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype.kind == "f" else a.dtype), params)
    head = DinoHead(
        out_dim=64,
        hidden_dim=48,
        bottleneck_dim=16,
        nlayers=1 if variant == "nlayers1" else 3,
        use_bn=variant == "bn",
        norm_last_layer=variant != "unfrozen_g",
        dtype=jnp.float64,
    )
    stats = params.get("batch_stats", {})

    def forward(p, x):
        return head.apply({"params": p, "batch_stats": stats}, x, train=True, mutable="batch_stats")

    (y, updates), vjp = jax.vjp(forward, params["head"], jnp.asarray(case["x"], jnp.float64))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0 if a.dtype == jnp.int32 else a.dtype), updates)
    grads, grad_x = vjp((jnp.asarray(case["grad_y"], jnp.float64), zeros))
    np.testing.assert_allclose(y, case["y"], atol=1e-12)
    assert relative_error(grad_x, case["grad_x"]) < 1e-11
    got = convert.to_torch({"head": grads, **({"batch_stats": stats} if stats else {})}, "dino")
    for key, want in prefixed(case, "grads/").items():
        np.testing.assert_allclose(got[key], want, rtol=1e-10, atol=1e-13, err_msg=key)
    if variant != "unfrozen_g":
        assert not np.any(got["last_layer.weight_g"])
    if variant == "bn":
        after = convert.to_torch({"head": params["head"], **updates}, "dino")
        for key, want in prefixed(case, "buffers_after/").items():
            if key.endswith("num_batches_tracked"):  # the recorded "before" is 1 already
                assert after[key] == case[f"params/{key}"] + 1
                continue
            np.testing.assert_allclose(after[key], want, atol=1e-12, err_msg=key)
        out = head.apply({"params": params["head"], **updates}, jnp.asarray(case["x"], jnp.float64))
        np.testing.assert_allclose(out, case["y_eval_after"], atol=1e-12)


def test_loss_three_steps_with_centers(golden, x64):
    arrays, meta = golden("dino_loss")
    batch, crops = meta["batch"], meta["ncrops"]
    temps = optim.warmup_by_epoch(
        meta["warmup_teacher_temp"], meta["teacher_temp"], meta["warmup_teacher_temp_epochs"], 1
    )
    np.testing.assert_allclose(
        [temps(jnp.int32(e)) for e in range(meta["nepochs"])], arrays["teacher_temp_schedule"], rtol=1e-14
    )

    def rows(x):  # crop-major rows -> [B, crops, K]
        return jnp.asarray(x, jnp.float64).reshape(-1, batch, x.shape[-1]).swapaxes(0, 1)

    center = jnp.asarray(arrays["center_0"])
    for step in range(3):
        teacher_logits = rows(arrays[f"teacher_{step}"])
        teacher = losses.dino_teacher(teacher_logits, center, temps(jnp.int32(step)))

        def loss(student, teacher=teacher):
            return losses.dino_loss(jax.nn.log_softmax(student / meta["student_temp"]), teacher)

        value, grad = jax.value_and_grad(loss)(rows(arrays[f"student_{step}"]))
        np.testing.assert_allclose(value, arrays[f"loss_{step}"], rtol=1e-13)
        want = rows(arrays[f"grad_student_{step}"])
        assert grad.shape == (batch, crops, 64) and relative_error(grad, want) < 1e-12
        center = losses.update_center(center, teacher_logits, meta["center_momentum"])
        np.testing.assert_allclose(center, arrays[f"center_{step + 1}"], atol=1e-14)


def test_targets_and_center_have_no_gradient():
    logits = jax.random.normal(jax.random.key(0), (4, 2, 8))

    def value(logits):
        targets = losses.dino_teacher(logits, jnp.zeros((1, 8)), 0.1), losses.sinkhorn_knopp(logits, 0.1)
        center = losses.update_center(jnp.zeros((1, 8)), logits, 0.9)
        return sum(jnp.sum(x**2) for x in (*targets, center))

    assert not np.any(jax.grad(value)(logits))


@pytest.mark.parametrize("crops", [2, 3, 5])
def test_no_crop_is_compared_with_itself(crops):
    """Two global crops and local ones. Each student's crop is sure of a prototype of its own: that of its number."""
    sure = np.eye(8)[:crops]
    log_probs = jnp.asarray(np.log(0.98 * sure + 0.02 / 8))[None]
    pairs = -np.asarray(log_probs)[0]  # of teacher's crop sure of prototype g and the student's crop: [crops, 8]
    targets = jnp.asarray(sure[:2])[None]
    want = np.mean([pairs[v, g] for g in range(2) for v in range(crops) if v != g])
    np.testing.assert_allclose(losses.dino_loss(log_probs, targets), want, rtol=1e-6)
    # the figures compare each target with the student's other global crop
    figures = SelfDistillation.figures(None, log_probs, targets, None)
    np.testing.assert_allclose(figures["health/kl"], (pairs[0, 1] + pairs[1, 0]) / 2, rtol=1e-5)


def test_schedules(golden, x64):
    arrays, meta = golden("dino_schedules_clip")
    for i, spec in enumerate(meta["schedules"]):
        total = spec["epochs"] * spec["niter"]
        warmup = spec["warmup_epochs"] * spec["niter"]
        schedule = optim.cosine_schedule(spec["base"], spec["final"], total, warmup, spec["start_warmup"])
        got = [float(schedule(jnp.int32(step))) for step in range(total)]
        np.testing.assert_allclose(got, arrays[f"schedule_{i}"], rtol=1e-12, atol=1e-18)


def test_clipping_is_per_tensor_and_per_block(golden):
    arrays, meta = golden("dino_schedules_clip")
    grads = {"a": {"kernel": arrays["clip_in_0"]}, "b": {"bias": arrays["clip_in_1"]}}
    clip = optim.clip(meta["clip"], per="parameter")
    got, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(got["a"]["kernel"], arrays["clip_out_0"], rtol=1e-6)
    np.testing.assert_allclose(got["b"]["bias"], arrays["clip_out_1"], rtol=1e-6)
    stacked = {"blocks": {"fc1": {"kernel": np.stack([arrays["clip_in_0"], 0.01 * arrays["clip_in_0"]])}}}
    got, _ = clip.update(stacked, clip.init(stacked))
    want = np.stack([arrays["clip_out_0"], 0.01 * arrays["clip_in_0"]])
    np.testing.assert_allclose(got["blocks"]["fc1"]["kernel"], want, rtol=1e-6)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_parameter_groups(golden, norm_last_layer):
    _, meta = golden("dino_param_groups")
    groups = meta["groups"][f"norm_last_layer={norm_last_layer}"]
    config = mim_jax.load_config("configs/dino.py:demo")
    config.head.norm_last_layer = norm_last_layer
    config.model.depth = 2
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    fixed = jax.tree.map(
        lambda path: bool(method.untrained and re.search(method.untrained, path)), tree_paths(params)
    )
    ours = jax.tree.map(
        lambda is_fixed, is_decayed, p: np.full(
            p.shape, "not_in_optimizer" if is_fixed else "regularized" if is_decayed else "not_regularized"
        ),
        fixed,
        optim.decayed(params, config.optim.no_decay),
        params,
    )
    got = {f"module.{key}": value.flat[0] for key, value in convert.to_torch(ours, "dino").items()}
    assert got == groups


def test_initial_distributions(golden):
    """Each tensor's spread is that of the official initialisation, within its own sampling error."""
    _, meta = golden("dino_init_stats")
    vit = ViT(patch_size=16, img_size=224, dim=384, depth=12, heads=6)
    head = DinoHead(out_dim=4096)
    backbone = jax.jit(vit.init)(jax.random.key(0), [jnp.zeros((1, 1, 224, 224, 3))])["params"]
    head_params = jax.jit(head.init)(jax.random.key(1), jnp.zeros((1, 384)))["params"]
    arrays = convert.to_torch({"backbone": jax.device_get(backbone)}, "dino")
    arrays |= {f"head.{key}": value for key, value in convert.to_torch({"head": head_params}, "dino").items()}
    stats = meta["stats"]
    assert sum(a.size for key, a in arrays.items() if not key.startswith("head.")) == 21_665_664
    assert set(arrays) == set(stats)
    for key, want in stats.items():
        got = arrays[key]
        assert list(got.shape) == want["shape"], key
        if want["std"] == 0:
            np.testing.assert_array_equal(got, want["mean"], err_msg=key)
            continue
        spread = 6 / np.sqrt(got.size)  # 6 standard errors of a mean, in units of the standard deviation
        assert abs(got.mean() - want["mean"]) < 2 * spread * want["std"], key
        assert abs(got.std() / want["std"] - 1) < 2 * spread, key
        if want["absmax"] < 1:  # torch's sampler puts a value at its far bound, 2, once in some 10 million draws
            assert 0.7 < np.abs(got).max() / want["absmax"] < 1.4, key


UNFROZEN = pytest.param("dino_train_steps_unfrozen_g", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["dino_train_steps", UNFROZEN])
def test_four_training_steps(golden, name, x64):
    """The trajectory of main_dino.py through the real train_step: losses, gradients' norms, student, teacher, centre."""
    arrays, meta = golden(name)
    config = mim_jax.load_config("configs/dino.py:demo")
    config.data.update(batch_size=4, num_examples=8)  # 2 steps an epoch
    config.total = "3 epochs"
    config.model.update(img_size=16, patch_size=4, dim=16, depth=2, heads=2, dtype="float64")
    config.head.update(out_dim=32, hidden_dim=24, bottleneck_dim=8)
    config.head.norm_last_layer = name == "dino_train_steps"
    config.crops.update(global_crops_size=16, local_crops_number=2, local_crops_size=8)
    config.loss.update(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_temp_warmup="2 epochs")
    config.optim.update(lr=2e-3 * 256 / 4, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.5)
    config.optim.update(warmup="1 epoch", freeze_last_layer="1 epoch")
    config.optim.momentum_teacher = 0.9

    follow_four_steps_with_a_teacher(config, "dino", arrays, {"center": "center"}, lambda _: {})


@pytest.mark.slow
def test_two_views_are_the_papers_algorithm_1(x64):
    """Three steps of the pseudocode, written out with numpy on the networks' outputs."""
    config = mim_jax.load_config("configs/dino.py:two_views")
    config.data.update(batch_size=4, num_examples=8)
    config.total = "6 steps"
    config.model.update(img_size=16, patch_size=4, dim=16, depth=2, heads=2, dtype="float64", drop_path_rate=0.0)
    config.head.update(out_dim=32, hidden_dim=24, bottleneck_dim=8)
    config.crops.global_crops_size = 16
    config.optim.update(warmup="0 steps", freeze_last_layer="0 steps", lr=0.1)
    config.loss.teacher_temp = 0.04
    method = mim_jax.make_method(config)
    state, _ = mim_jax.init_state(method, config)
    train_step = mim_jax.make_train_step(method, config)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def cross_entropy(t, s):
        t, s = softmax((t - C) / 0.04), softmax(s / 0.1)
        return -(t * np.log(s)).sum(-1).mean()

    C = np.zeros((1, 32))
    for step in range(3):
        x = jax.random.normal(jax.random.key(step), (4, 2, 16, 16, 3), float)
        s1, s2 = np.moveaxis(np.asarray(method.logits(state.params, {}, {"global": x})[0]), 1, 0)
        t1, t2 = np.moveaxis(np.asarray(method.logits(state.teacher, {}, {"global": x})[0]), 1, 0)
        loss = cross_entropy(t1, s2) / 2 + cross_entropy(t2, s1) / 2
        C = 0.9 * C + 0.1 * np.concatenate([t1, t2]).mean(0)
        old = jax.device_get(state.teacher)
        state, metrics = train_step(state, {}, {"global": x})
        np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-12)
        np.testing.assert_allclose(state.extra["center"], C, atol=1e-13)
        m = float(metrics["train/momentum_teacher"])
        want = jax.tree.map(lambda t, s: m * t + (1 - m) * s, old, jax.device_get(state.params))  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), jax.device_get(state.teacher), want)
