"""DINOv2 held against numbers that the official PyTorch code produced (facebookresearch/dinov2 at b8931f7)."""

import dataclasses
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, keeping_gradients, official, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim
from mim_jax.evaluators.knn import knn_scores
from mim_jax.masking import GroupMask
from mim_jax.models.heads import DinoHead
from mim_jax.models.positions import interpolate_positions
from mim_jax.models.vit import ViT, add_to_kept_rows, hidden_states, intermediate_layers, kept_rows, swiglu_width
from mim_jax.state import first_state


@pytest.mark.parametrize("variant", ["default", "nobias"])
def test_head(golden, variant, x64):
    """DINO's head, whose norms are always trained. (A linear layer without bias is one whose bias is 0.)"""
    arrays, _ = golden("dinov2_head")
    case = prefixed(arrays, f"{variant}/")
    stored = prefixed(case, "params/")
    stored |= {f"mlp.{i}.bias": np.zeros(len(stored[f"mlp.{i}.weight"])) for i in (0, 2, 4) if variant == "nobias"}
    params = double(convert.from_torch(stored, "dino"))["head"]
    head = DinoHead(out_dim=64, hidden_dim=48, bottleneck_dim=16, norm_last_layer=False, dtype=jnp.float64)

    y, vjp = jax.vjp(lambda p, x: head.apply({"params": p}, x), params, jnp.asarray(case["x"], jnp.float64))
    grads, grad_x = vjp(jnp.asarray(case["grad_y"], jnp.float64))
    np.testing.assert_allclose(y, case["y"], atol=1e-12)
    assert relative_error(grad_x, case["grad_x"]) < 1e-11
    got = convert.to_torch({"head": jax.device_get(grads)}, "dino")
    for key, want in prefixed(case, "grads/").items():
        np.testing.assert_allclose(got[key], want, rtol=1e-10, atol=1e-14, err_msg=key)


def state_dict(golden, name):
    """Random numbers under the names and in the shapes of an official model."""
    rng = np.random.default_rng(0)
    _, meta = golden("dinov2_state_dict_keys")
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in meta["keys"][name].items()}


@pytest.mark.parametrize("name", ["unchunked", "reg4_swiglu"])
def test_official_backbones_survive_the_way_in_and_out(golden, name):
    arrays = state_dict(golden, name)
    back = convert.to_torch(convert.from_torch(arrays, "dinov2"), "dinov2")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("heads", [("dino_head",), ("dino_head", "ibot_head")], ids="+".join)
def test_full_models_survive_the_way_in_and_out(golden, heads):
    """Two heads of different widths, as in the recipe of the giant."""
    arrays = {f"backbone.{key}": value for key, value in state_dict(golden, "reg4_swiglu").items()}
    stored, _ = golden("dino_head")
    for head, variant in zip(heads, ("default", "nlayers1")):
        arrays |= {f"{head}.{key}": value for key, value in prefixed(stored, f"{variant}/params/").items()}
    params = convert.from_torch(arrays, "dinov2")
    assert params.keys() == {"backbone", *heads}
    back = convert.to_torch(params, "dinov2")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_chunks_of_blocks_are_read(golden):
    """`blocks.1.3` is block 3, in chunk 1."""
    arrays = state_dict(golden, "chunks2_depth4")
    params = convert.from_torch({f"module.backbone.{key}": value for key, value in arrays.items()}, "dinov2")
    for i, chunk in enumerate((0, 0, 1, 1)):
        key = f"blocks.{chunk}.{i}.attn.qkv.weight"
        np.testing.assert_array_equal(params["backbone"]["blocks"]["qkv"]["kernel"][i], arrays[key].T)


@pytest.mark.parametrize("missing", ["mask_token", "register_tokens", "blocks.1.mlp.w3.bias", "blocks.0.ls1.gamma"])
def test_what_is_missing_is_named(golden, missing):
    arrays = state_dict(golden, "reg4_swiglu")
    del arrays[missing]
    if missing == "register_tokens":  # then it is another model, whose state dict it is
        assert "register_tokens" not in convert.from_torch(arrays, "dinov2")["backbone"]
        return
    with pytest.raises(ValueError, match=f"missing: {missing}"):
        convert.from_torch(arrays, "dinov2")


SIZES = [(16, 16), (24, 24), (8, 8), (12, 20)]
KINDS = {"dinov2_vit_mlp": {}, "dinov2_vit_reg_swiglu": dict(ffn="swiglu", registers=4, antialias=True)}


@pytest.mark.parametrize("name", KINDS)
def test_vit(golden, name, x64):
    """All outputs, masked and not, at every size. (The official code interpolates positions in float32.)"""
    arrays, _ = golden(name)
    params = double(convert.from_torch(prefixed(arrays, "params/"), "dinov2"))["backbone"]
    settings = dict(mask_token=True, layerscale=0.1, dtype=jnp.float64, **KINDS[name])
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, **settings)
    apply, hidden = jax.jit(vit.apply), jax.jit(lambda p, x: hidden_states(vit, p, x)[0][-1])
    for size in SIZES:
        tag = f"{size[0]}x{size[1]}"
        atol = 1e-12 if size == (16, 16) else 2e-6
        rows, columns = size[0] // 4, size[1] // 4
        offset = 0.0 if settings.get("antialias") else 0.1
        positions = interpolate_positions(params["pos_embed"], rows, columns, offset, settings.get("antialias", False))
        np.testing.assert_allclose(positions, arrays[f"{tag}/pos_embed"], atol=atol)
        images = channels_last(arrays[f"{tag}/x"]).astype(float)
        out = apply({"params": params}, [images[:, None]])[0]
        np.testing.assert_allclose(out["cls"][:, 0], arrays[f"{tag}/x_norm_clstoken"], atol=atol)
        np.testing.assert_allclose(out["patch"][:, 0], arrays[f"{tag}/x_norm_patchtokens"], atol=atol)
        if "registers" in out:
            np.testing.assert_allclose(out["registers"][:, 0], arrays[f"{tag}/x_norm_regtokens"], atol=atol)
        np.testing.assert_allclose(hidden(params, images), arrays[f"{tag}/x_prenorm"], atol=atol)
        if f"{tag}/masks" in arrays:
            mask = jnp.asarray(arrays[f"{tag}/masks"])[:, None]
            out = apply({"params": params}, [images[:, None]], masks=[mask])[0]
            np.testing.assert_allclose(out["cls"][:, 0], arrays[f"{tag}/masked/x_norm_clstoken"], atol=atol)
            np.testing.assert_allclose(out["patch"][:, 0], arrays[f"{tag}/masked/x_norm_patchtokens"], atol=atol)
    layers = intermediate_layers(vit, params, channels_last(arrays["16x16/x"]).astype(float), n=2)
    for i, tokens in enumerate(layers):
        np.testing.assert_allclose(tokens[:, 0], arrays[f"16x16/inter_cls_{i}"], atol=1e-12)
        patches = channels_last(arrays[f"16x16/inter_patch_{i}"]).reshape(2, 16, 32)
        np.testing.assert_allclose(tokens[:, -16:], patches, atol=1e-12)


def test_swiglu_widths(golden):
    arrays, _ = golden("dinov2_swiglu")
    assert [swiglu_width(hidden) for hidden in arrays["hidden_table"][:, 0]] == arrays["hidden_table"][:, 1].tolist()


def test_kept_rows(golden):
    table = golden("dinov2_droppath_subset")[0]["table"]
    for rows, rate, kept, scale in table:
        assert kept_rows(int(rows), rate / 1000) == (kept, pytest.approx(scale, rel=1e-12))


def test_a_branch_is_computed_for_the_kept_rows_of_each_group_alone():
    """Two resolutions, three groups of four images: exact counts, scaled, the others untouched; each row has its turn."""
    x = 1 + jax.random.uniform(jax.random.key(0), (12, 2 * 5 + 3 * 2, 7))
    layout, seen_rows = ((2, 5), (3, 2)), []

    def branch(tokens, layout):
        seen_rows.append((tokens.shape, layout))
        return 3 * tokens

    step = jax.jit(lambda key: add_to_kept_rows(x, branch, layout, 4, 0.4, key) / x - 1)
    total = np.zeros((12, 5))
    for seed in range(30):
        added = np.asarray(step(jax.random.key(seed)))
        each = added[:, :10].reshape(12, 2, 5, 7), added[:, 10:].reshape(12, 3, 2, 7)
        for rows, (number, kept) in zip(each, ((8, 4), (12, 7))):
            np.testing.assert_allclose(rows, np.where(rows[:, :, :1, :1] > 1, 3 * number / kept, 0) + 0 * rows, atol=1e-5)
            assert ((rows[:, :, 0, 0] > 1).reshape(3, -1).sum(1) == kept).all()
        total += np.concatenate([rows[:, :, 0, 0] > 1 for rows in each], axis=1)
    assert seen_rows == [((3, 4 * 5 + 7 * 2, 7), ((4, 5), (7, 2)))]
    assert total.min() > 4 and total.max() < 28


def test_dropping_rows_saves_their_computation():
    images = jnp.zeros((8, 2, 16, 16, 3))
    flops = {}
    for group in (0, 4):
        vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, drop_path_rate=0.5, drop_path_group=group, unroll=2)
        params = jax.eval_shape(vit.init, jax.random.key(0), [images])
        run = jax.jit(lambda p, key, vit=vit: vit.apply(p, [images], train=True, rngs={"drop_path": key})[0])
        flops[group] = run.lower(params, jax.random.key(0)).cost_analysis()["flops"]
    assert 0.5 < flops[4] / flops[0] < 0.6


@pytest.mark.parametrize("step", [0, 1, 2])
def test_cls_targets(golden, step, x64):
    arrays, _ = golden("dinov2_dino_loss")
    logits, temp = jnp.asarray(arrays[f"teacher_{step}"], jnp.float64), arrays["temps"][step]
    center = jnp.asarray(arrays[f"center_used_{step}"])
    np.testing.assert_allclose(losses.dino_teacher(logits, center, temp), arrays[f"centered_softmax_{step}"], atol=1e-12)
    after = arrays[f"center_used_{step + 1}" if step < 2 else "center_after_3"]
    np.testing.assert_allclose(losses.update_center(center, logits, 0.9), after, atol=1e-12)
    for iterations in (1, 3):
        got = losses.sinkhorn_knopp(logits, temp, iterations=iterations)
        np.testing.assert_allclose(got, arrays[f"sinkhorn_{step}_iter{iterations}"], atol=2e-6)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-12)


def test_cls_loss(golden, x64):
    """The official two terms, together over the number of pairs, are DINO's mean."""
    a, _ = golden("dinov2_dino_loss")

    def crops(x, number):
        return jnp.moveaxis(jnp.asarray(x, jnp.float64).reshape(number, 4, 64), 0, 1)

    teacher = crops(a["teacher_probs_for_global"], 2)[:, ::-1]  # they come swapped

    def loss(student):
        return losses.dino_loss(jax.nn.log_softmax(jnp.concatenate(student, axis=1) / 0.1), teacher)

    student = crops(a["student_global"], 2), crops(a["student_local"], 3)
    value, grads = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, (2 * a["loss_global"] + a["loss_local"]) / 8, rtol=1e-9)
    assert relative_error(grads[0], 2 * crops(a["grad_student_global"], 2) / 8) < 1e-8
    assert relative_error(grads[1], crops(a["grad_student_local"], 3) / 8) < 1e-8


@pytest.mark.parametrize("step", [0, 1])
def test_patch_targets(golden, step, x64):
    """Rows that only fill the buffer count for nothing."""
    arrays, _ = golden("dinov2_ibot_patch_loss")
    logits = jnp.asarray(arrays[f"teacher_masked_{step}"], jnp.float64)
    center = jnp.asarray(arrays[f"center_used_{step}"])[0]
    np.testing.assert_allclose(losses.dino_teacher(logits, center, 0.07), arrays[f"centered_softmax_{step}"], atol=1e-12)
    after = arrays["center_used_1" if step == 0 else "center_after_2"][0]
    np.testing.assert_allclose(losses.update_center(center, logits, 0.9), after, atol=1e-12)
    filled = jnp.concatenate([logits, 50 * jnp.ones((3, 48))])
    weight = jnp.arange(len(filled)) < len(logits)
    for iterations in (1, 3):
        want = arrays[f"sinkhorn_{step}_iter{iterations}"]
        np.testing.assert_allclose(losses.sinkhorn_knopp(logits, 0.07, iterations=iterations), want, atol=2e-6)
        got = losses.sinkhorn_knopp(filled, 0.07, weight, iterations)
        np.testing.assert_allclose(got[: len(want)], want, atol=2e-6)
        assert not np.any(got[len(want) :])
    assert not np.any(losses.sinkhorn_knopp(logits, 0.07, jnp.zeros(len(logits))))  # no masked patch in the whole batch


def test_patch_loss(golden, x64):
    a, _ = golden("dinov2_ibot_patch_loss")
    probs, weight = jnp.asarray(a["teacher_masked_probs"], jnp.float64), jnp.asarray(a["masks_weight"], jnp.float64)

    def loss(student):
        return losses.patch_loss(jax.nn.log_softmax(student / 0.1), probs, weight, 4)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(a["student_masked"], jnp.float64))
    np.testing.assert_allclose(value, a["loss_masked_weight"], rtol=1e-7)
    np.testing.assert_allclose(value, a["loss_forward"], rtol=1e-7)
    assert relative_error(grad, a["grad_masked_weight"]) < 1e-7


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_koleo(golden, kind, x64):
    case = prefixed(golden("dinov2_koleo")[0], f"{kind}/")
    x = jnp.asarray(case["x"], jnp.float64)
    value, grad = jax.value_and_grad(losses.koleo)(x, len(x))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-9)
    assert relative_error(grad, case["grad"]) < 1e-7
    groups = jnp.concatenate([x, 3 * x[::-1]])
    np.testing.assert_allclose(losses.koleo(groups, len(x)), case["loss"], rtol=1e-6)  # each group by itself


def test_masks_are_the_official_ones_after_the_same_seed(golden):
    arrays, _ = golden("dinov2_masks_collate")
    mask, rng = GroupMask((16, 16), group_size=8, crops=2), random.Random(7)
    for count in (25, 64, 128):
        drawn = np.stack([mask.one(rng, count) for _ in range(1000)]).reshape(1000, 16, 16)
        np.testing.assert_array_equal(drawn[:16], arrays[f"gen{count}/first16"])
        np.testing.assert_array_equal(drawn.sum((1, 2)), arrays[f"gen{count}/counts"])
        np.testing.assert_allclose(drawn.mean(0), arrays[f"gen{count}/freq_map"], atol=1e-12)
    rng = random.Random(11)
    for i in range(3):
        drawn = mask.group(rng)  # the official order is crop by crop
        np.testing.assert_array_equal(drawn.swapaxes(0, 1).reshape(16, -1), arrays[f"collate{i}/masks"])
        assert mask.upper == arrays[f"collate{i}/upperbound"] and drawn.sum() == arrays[f"collate{i}/n_masked"]


def test_masks_of_a_stream_are_those_of_its_groups():
    mask = GroupMask((8, 8), group_size=4, crops=2)
    drawn = mask.draw_on_host(3, np.arange(16), 2)["mask"]
    assert drawn.shape == (16, 2, 64) and drawn.dtype == bool
    np.testing.assert_array_equal(mask.draw_on_host(3, np.array([5, 14, 4]), 2)["mask"], drawn[[5, 14, 4]])
    for group in drawn.reshape(4, 8, 64):
        counts = np.sort(group.sum(-1))
        assert not counts[:4].any() and (counts[4:] > 0).all() and counts.sum() <= mask.upper
    assert not np.array_equal(drawn[:4], drawn[4:8])


@pytest.mark.parametrize("decay", ["unchunked_lrd0.9", "unchunked_lrd1.0"])
def test_parameter_groups(golden, decay):
    """Factors of the learning rate, what is decayed, and which are the last layers."""
    _, meta = golden("dinov2_param_groups")
    groups = meta["groups"][decay]
    config = mim_jax.load_config("configs/dinov2.py:demo")
    config.model.update(depth=meta["depth"], registers=sum("register_tokens" in key for key in groups) * 2)
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    scales = method.lr_scales(params, float(decay[-3:]), meta["patch_embed_lr_mult"])
    decayed = optim.decayed(params, config.optim.no_decay)
    last = jax.tree.map(lambda path: "/last_layer/" in path, tree_paths(params))
    got = {}
    for kind, tree in (("lr_multiplier", scales), ("wd_multiplier", decayed), ("is_last_layer", last)):
        filled = jax.tree.map(lambda value, p: np.broadcast_to(np.asarray(value, float), p.shape), tree, params)
        got[kind] = {key: float(value.flat[0]) for key, value in convert.to_torch(filled, "dinov2").items()}
    for key, want in groups.items():
        ours = re.sub("^head|^dino_head", "dino_head", key)
        for kind, value in want.items():
            assert got[kind][ours] == pytest.approx(float(value), rel=1e-9), (key, kind)


def test_schedules(golden, x64):
    arrays, meta = golden("dinov2_schedules")
    for i, spec in enumerate(meta["specs"][:4]):  # the fifth's frozen steps are not used in training
        numbers = (spec.get(name, 0) for name in ("base_value", "final_value", "total_iters", "warmup_iters"))
        schedule = optim.cosine_schedule(*numbers, start=spec.get("start_warmup_value", 0))
        want = arrays[f"schedule_{i}"]
        np.testing.assert_allclose([schedule(step) for step in range(len(want))], want, rtol=1e-12, atol=1e-18)


def test_schedules_that_the_config_makes(golden, x64):
    arrays, meta = golden("dinov2_schedules")
    built = meta["build_cfg"]
    o, t, epoch = built["optim"], built["teacher"], built["train"]["OFFICIAL_EPOCH_LENGTH"]
    config = mim_jax.load_config("configs/dinov2.py:demo")
    config.data.update(batch_size=4, num_examples=4 * epoch)
    config.mask.group_size = 4
    config.total = f"{o['epochs'] * epoch} steps"
    config.optim.update(lr=o["lr"], lr_batch_size=0, min_lr=o["min_lr"], warmup=f"{o['warmup_epochs'] * epoch} steps")
    config.optim.update(weight_decay=o["weight_decay"], weight_decay_end=o["weight_decay_end"])
    config.optim.momentum_teacher = t["momentum_teacher"]
    config.loss.update(teacher_temp=t["teacher_temp"], warmup_teacher_temp=t["warmup_teacher_temp"])
    config.loss.teacher_temp_warmup = f"{t['warmup_teacher_temp_epochs']} epochs"
    made = optim.schedules(config) | mim_jax.make_method(config).schedules
    names = {"lr": "lr", "weight_decay": "wd", "momentum_teacher": "momentum", "teacher_temp": "teacher_temp"}
    for ours, theirs in names.items():
        want = arrays[f"built/{theirs}"]
        got = [made[ours](jnp.int32(step)) for step in range(len(want))]
        np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=ours)
    frozen = o["freeze_last_layer_epochs"] * epoch
    np.testing.assert_array_equal(arrays["built/last_layer_lr"], np.where(np.arange(len(want)) < frozen, 0, arrays["built/lr"]))


def test_knn(golden):
    """Its softmax over the most neighbours of all is DINO's exponentials over their sum."""
    arrays, _ = golden("dino_knn")
    want, _ = golden("dinov2_knn")
    args = (arrays["train_features"], arrays["train_labels"], arrays["test_features"], 10)
    scores = {k: np.asarray(knn_scores(*args, k, 0.07)) for k in (3, 10, 20)}
    for k, votes in scores.items():
        np.testing.assert_allclose(votes / scores[20].sum(-1, keepdims=True), want[f"probas_k{k}"], atol=2e-6)


def test_initial_distributions(golden):
    _, meta = golden("dinov2_init_stats")
    settings = dict(registers=4, antialias=True, mask_token=True, layerscale=1e-5, mask_token_init=jax.nn.initializers.zeros)
    vit = ViT(patch_size=14, img_size=224, dim=384, depth=12, heads=6, token_init=jax.nn.initializers.normal(1e-6), **settings)
    image, mask = jnp.zeros((1, 1, 224, 224, 3)), jnp.zeros((1, 1, 256), bool)
    backbone = jax.jit(vit.init)(jax.random.key(0), [image], masks=[mask])["params"]
    arrays = convert.to_torch({"backbone": jax.device_get(backbone)}, "dinov2")
    stats = {key.removeprefix("backbone."): value for key, value in meta["stats"].items() if not key.startswith("head.")}
    assert set(arrays) == set(stats)
    for key, want in stats.items():
        got = arrays[key]
        assert list(got.shape) == want["shape"], key
        if want["std"] < 1e-12:
            np.testing.assert_allclose(got, want["mean"], rtol=1e-6, err_msg=key)
            continue
        spread = 6 / np.sqrt(got.size)
        assert abs(got.mean() - want["mean"]) < 2 * spread * want["std"], key
        assert abs(got.std() / want["std"] - 1) < 2 * spread, key


SLOW = {"marks": pytest.mark.slow}
OTHERS = ("center", "shared"), ("center", "sep"), ("sk", "shared")
STEP_KINDS = [("sk", "sep"), *(pytest.param(*kind, **SLOW) for kind in OTHERS)]


@pytest.mark.parametrize("centering, heads", STEP_KINDS)
def test_two_training_steps(golden, monkeypatch, centering, heads, x64):
    """Two official steps through the real train_step: losses, gradients, their norms by part, centres, student, teacher."""
    arrays, meta = golden(f"dinov2_step_{centering}_{heads}")
    config = mim_jax.load_config("configs/dinov2.py:demo")
    config.data.update(batch_size=4, num_examples=8)
    config.total = "2 steps"
    config.model.update(img_size=16, patch_size=4, dim=16, depth=2, heads=2, registers=2, dtype="float64")
    config.head.update(out_dim=64, hidden_dim=24, bottleneck_dim=16)
    config.ibot_head.update(out_dim=48, hidden_dim=24, bottleneck_dim=16)
    config.crops.update(global_crops_size=16, local_crops_number=3, local_crops_size=8)
    config.mask.group_size = 4
    config.loss.update(centering="centering" if centering == "center" else "sinkhorn_knopp", separate_head=heads == "sep")
    config.loss.update(ibot_weight=1.0, koleo_weight=0.1)
    config.optim.update(clip_grad=0.5, clip_per="part", layer_decay=0.9, patch_embed_lr=0.2)
    config.optim.update(freeze_last_layer="1 step", freeze_last_layer_by="lr")
    steps = meta["steps"] if "steps" in meta else STEPS
    given = {name: jnp.asarray([step[name] for step in steps]) for name in ("lr", "wd", "momentum", "teacher_temp")}
    follow = lambda name: lambda step: given[name][step]  # noqa: E731
    monkeypatch.setattr(optim, "schedules", lambda _: {"lr": follow("lr"), "weight_decay": follow("wd")})
    method = mim_jax.make_method(config)
    schedules = {"momentum_teacher": follow("momentum"), "teacher_temp": follow("teacher_temp")}
    method = keeping_gradients(dataclasses.replace(method, schedules=schedules))
    state = first_state(method, config)
    params = convert.from_torch(prefixed(arrays, "params_init/"), "dinov2")
    params = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), params, state.params)
    state = state.replace(params=params, teacher={part: jax.tree.map(jnp.copy, params[part]) for part in method.teacher_parts})
    train_step = mim_jax.make_train_step(method, config)
    loose = 1e4 if centering == "center" else 1e5  # positions are interpolated in float32 there, and targets balanced

    def crops(x, number):
        return jnp.moveaxis(channels_last(x).reshape(number, 4, *x.shape[2:], 3), 0, 1).astype(float)

    for step in range(2):
        at = prefixed(arrays, f"step{step}/")
        masks = next(value for key, value in at.items() if key.endswith("masks") or key.endswith("collated_masks"))
        views = {"global": crops(at["global_crops"], 2), "local": crops(at["local_crops"], 3)}
        views["mask"] = jnp.moveaxis(jnp.asarray(masks).reshape(2, 4, 16), 0, 1)
        if centering == "center":  # a step's centres are applied at the next one there
            np.testing.assert_allclose(state.extra["center"], at["dino_center"], atol=1e-12)
            np.testing.assert_allclose(state.extra["patch_center"], at["ibot_center"][0], atol=1e-12)
        state, metrics = train_step(state, {}, views)
        grads = state.opt_state[1]
        for part in method.teacher_parts:
            norm = optim.optax.tree.norm(grads[part])
            np.testing.assert_allclose(norm, at[f"grad_norm/{part}"], rtol=1e-9 * loose)
        got = official(grads, "dinov2")
        for key, want in prefixed(at, "grads/").items():
            assert np.max(np.abs(got[key] - want)) < 1e-10 * loose * max(np.max(np.abs(want)), 1e-3), key
        local, whole, koleo, ibot = (at[f"loss/{name}"] for name in LOSSES)
        want = {"loss_cls": local + whole, "loss_koleo": 2 * koleo, "loss_patch": 2 * ibot}
        want["loss"] = sum(want.values())
        for tag, value in want.items():
            np.testing.assert_allclose(metrics[f"train/{tag}"], value, rtol=1e-9 * loose, err_msg=tag)
    for part, tree in (("student", state.params), ("teacher", state.teacher)):
        got = official(tree, "dinov2")
        for key, value in prefixed(arrays, f"{part}_after_step1/").items():
            np.testing.assert_allclose(got[key], value, atol=2e-11 * loose, err_msg=f"{part} {key}")


STEPS = [
    {"lr": 0.001, "wd": 0.04, "momentum": 0.9, "teacher_temp": 0.05},
    {"lr": 0.0005, "wd": 0.1, "momentum": 0.95, "teacher_temp": 0.06},
]
LOSSES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")
