"""MoCo v3 held against numbers that the official PyTorch code produced (facebookresearch/moco-v3 at c349e6e), and LARS."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import channels_last, keeping_gradients, official, prefixed, relative_error, tree_paths

import mim_jax
from mim_jax import convert, losses, optim
from mim_jax.models.positions import sincos_positions


def config_of(meta, dtype="float64"):
    """The config of a stored case."""
    c = meta["config"]
    config = mim_jax.load_config("configs/mocov3.py:demo")
    config.model.update(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["depth"], heads=c["heads"], dtype=dtype)
    config.head.update(hidden_dim=c["mlp_dim"], out_dim=c["out_dim"])
    config.loss.temperature = c["T"]
    config.optim.momentum_teacher = c.get("moco_m", c.get("momentum"))
    return config


def state_of(method, config, arrays):
    """The training state of stored weights: both encoders and the running statistics."""
    state, _ = mim_jax.init_state(method, config)
    tree = convert.from_torch(prefixed(arrays, "w/"), "mocov3")
    given = {"teacher": tree.pop("teacher"), "extra": tree.pop("extra"), "params": tree}
    here = {name: getattr(state, name) for name in given}
    return state.replace(**jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), given, here))


def all_official(state):
    return official(state.params | {"teacher": state.teacher, "extra": state.extra}, "mocov3")


def views_of(first, second):
    return {"global": jnp.stack([channels_last(first), channels_last(second)], axis=1)}


def test_teacher_loss_and_gradients(golden, x64):
    """The momentum update, which comes first, then the symmetric loss: through the real step.

    The stored keys agree to 1e-7 only, and so does what follows from them; it is not known why. Queries, those averaged weights
    that are stored, and the loss and the gradient with the stored keys agree to 1e-10 and better.
    """
    arrays, meta = golden("mocov3")
    config = config_of(meta)
    method = mim_jax.make_method(config)
    state = state_of(method, config, arrays)
    params, extra = jax.tree.map(jnp.copy, (state.params, state.extra))
    views = views_of(*(arrays[f"in/x{i}"].astype(float) for i in (1, 2)))
    after, metrics = mim_jax.make_train_step(method, config)(state, {}, views)
    np.testing.assert_allclose(metrics["train/loss"], arrays["out/loss"], rtol=1e-8)
    got = all_official(after)
    for key, want in prefixed(arrays, "out/momentum_after/").items():
        np.testing.assert_allclose(got[f"momentum_encoder.{key}"], want, atol=1e-14, err_msg=key)
    for key, want in prefixed(arrays, "out/base_bn_running_mean_after/").items():
        np.testing.assert_allclose(got[f"base_encoder.{key}.running_mean"], want, atol=1e-13, err_msg=key)

    def with_stored_keys(params):
        queries, _ = method.outputs(params, extra["student_stats"], views, jax.random.key(0))
        pairs = [losses.info_nce(queries[i - 1], jnp.asarray(arrays[f"out/k{3 - i}"]), 0.2) for i in (1, 2)]
        return pairs[0][0] + pairs[1][0], queries

    (value, queries), grads = jax.jit(jax.value_and_grad(with_stored_keys, has_aux=True))(params)
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-12)
    keys, _ = jax.jit(method.outputs)(after.teacher, extra["teacher_stats"], views)
    for i in (1, 2):
        np.testing.assert_allclose(queries[i - 1], arrays[f"out/q{i}"], atol=1e-11)
        np.testing.assert_allclose(keys[i - 1], arrays[f"out/k{i}"], atol=1e-7)
    grads = official(grads, "mocov3")
    stored = prefixed(arrays, "grad/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-10, key
    assert not np.any(grads["base_encoder.patch_embed.proj.weight"]) and not np.any(grads["base_encoder.pos_embed"])


def test_queries_float32(golden):
    arrays, meta = golden("mocov3")
    config = config_of(meta, "float32")
    method = mim_jax.make_method(config)
    state = state_of(method, config, arrays)
    views = views_of(*(arrays[f"in/x{i}"] for i in (1, 2)))
    queries, _ = jax.jit(method.outputs)(state.params, state.extra["student_stats"], views, jax.random.key(0))
    for i in (1, 2):
        assert relative_error(queries[i - 1], arrays[f"out/q{i}"]) < 1e-5


@pytest.mark.parametrize("name", ["T1", "T0.2"])
def test_one_sided_loss(golden, name, x64):
    arrays, _ = golden("mocov3")
    q, k = jnp.asarray(arrays["loss/q"], float), jnp.asarray(arrays["loss/k"], float)
    (value, accuracy), grad = jax.value_and_grad(losses.info_nce, has_aux=True)(q, k, float(name[1:]))
    np.testing.assert_allclose(value, arrays[f"loss_{name}/value"], rtol=1e-13)
    assert relative_error(grad, arrays[f"loss_{name}/grad_q"]) < 1e-12
    cosines = q @ (k / np.linalg.norm(k, axis=1, keepdims=True)).T
    assert accuracy == np.mean(np.asarray(cosines.argmax(1)) == np.arange(len(q)))
    assert not np.any(jax.grad(lambda k: losses.info_nce(q, k, 0.2)[0])(k))


def test_four_training_steps(golden, x64):
    """The trajectory of main_moco.py through the real train_step: losses, gradients' norms, both encoders, all statistics."""
    arrays, meta = golden("mocov3_train_steps")
    config, c, o, s = config_of(meta), meta["config"], meta["optimizer"], meta["schedule"]
    config.data.update(batch_size=c["batch"], num_examples=c["batch"] * s["iters_per_epoch"])
    config.total = f"{s['epochs']} epochs"
    config.optim.update(lr=s["lr"] * 256 / c["batch"], warmup=f"{s['warmup_epochs']} epochs")
    config.optim.weight_decay = config.optim.weight_decay_end = o["weight_decay"]
    assert (config.optim.beta1, config.optim.beta2) == tuple(o["betas"]) and config.optim.eps == o["eps"]
    method = keeping_gradients(mim_jax.make_method(config))
    state = state_of(method, config, arrays)
    train_step = mim_jax.make_train_step(method, config)
    for step in range(4):
        views = views_of(*(arrays[f"in/x{i}_step{step}"].astype(float) for i in (1, 2)))
        state, metrics = train_step(state, {}, views)
        grads = official(state.opt_state[1], "mocov3")
        norms = [np.linalg.norm(grads[str(name)]) for name in arrays["grad_norms_names"]]
        np.testing.assert_allclose(norms, arrays[f"out/grad_norms_step{step}"], rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(metrics["train/loss"], arrays[f"out/loss_step{step}"], rtol=1e-9)
        told = {"grad_norm": "grad_norm", "lr": "lr", "weight_decay": "wd", "momentum_teacher": "momentum"}
        for tag, name in told.items():
            np.testing.assert_allclose(metrics[f"train/{tag}"], arrays[f"out/{name}_step{step}"], rtol=1e-9, err_msg=tag)
    got = all_official(state)
    stored = prefixed(arrays, "w_after/")
    assert got.keys() == stored.keys()
    for key, want in stored.items():
        np.testing.assert_allclose(got[key], want, atol=1e-8, rtol=1e-7, err_msg=key)


def test_parameter_groups(golden):
    """Weight decay of all that is trained."""
    _, meta = golden("mocov3_train_steps")
    config = config_of(meta, "float32")
    method = mim_jax.make_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    decayed = optim.decayed(params, config.optim.no_decay, config.optim.decay_vectors)

    def group(path, is_decayed, p):
        name = "frozen" if re.search(method.untrained, path) else "decay" if is_decayed else "no_decay"
        return np.full(p.shape, name)

    got = official(jax.tree.map(group, tree_paths(params), decayed, params), "mocov3")
    groups = {key: name for name, keys in meta["param_groups"].items() for key in keys}
    assert {key: a.flat[0] for key, a in got.items()} == {k: g for k, g in groups.items() if not k.startswith("momentum")}


def test_weights_survive_the_way_in_and_out(golden):
    """The whole state, with the prefix that its files have; and the base encoder alone, with and without its head."""
    arrays, _ = golden("mocov3")
    whole = prefixed(arrays, "w/")
    tree = convert.from_torch({f"module.{key}": value for key, value in whole.items()}, "mocov3")
    with_head = prefixed(whole, "base_encoder.")
    alone = {key: value for key, value in with_head.items() if not key.startswith("head.")}
    for given in (whole, with_head, alone):
        back = convert.to_torch(convert.from_torch(given, "mocov3"), "mocov3")
        assert back.keys() == given.keys()
        for key, value in given.items():
            assert back[key].dtype == value.dtype, key
            np.testing.assert_array_equal(back[key], value, err_msg=key)
    encoder = convert.from_torch(alone, "mocov3")
    assert encoder.keys() == {"backbone"}
    jax.tree.map(np.testing.assert_array_equal, encoder["backbone"], tree["backbone"])
    assert jax.tree.structure(tree["teacher"]["backbone"]) == jax.tree.structure(encoder["backbone"])
    with pytest.raises(ValueError, match=r"unexpected: base_encoder\.head\.6\.bias"):
        convert.from_torch(whole | {"base_encoder.head.6.bias": np.zeros(16)}, "mocov3")
    with pytest.raises(ValueError, match=r"missing: momentum_encoder\.cls_token"):
        convert.from_torch({key: a for key, a in whole.items() if key != "momentum_encoder.cls_token"}, "mocov3")


def test_vit_base_has_the_published_number_of_parameters():
    method = mim_jax.make_method(mim_jax.load_config("configs/mocov3.py:vitb16"))
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    count = {path: p.size for path, p in zip(jax.tree.leaves(tree_paths(params)), jax.tree.leaves(params))}
    averaged = sum(size for path, size in count.items() if path.startswith(method.teacher_parts))
    assert sum(count.values()) + averaged == 215_678_464
    assert sum(size for path, size in count.items() if not re.search(method.untrained, path)) == 108_150_016
    small = mim_jax.make_method(mim_jax.load_config("configs/mocov3.py:vits16"))
    assert (small.backbone.dim, small.backbone.heads) == (384, 12)


def test_initial_distributions():
    """Xavier's bounds, of queries, keys and values one by one; the heads' are those of PyTorch; the teacher is a copy."""
    config = mim_jax.load_config("configs/mocov3.py:demo")
    method = mim_jax.make_method(config)
    state, _ = mim_jax.init_state(method, config)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, {part: state.params[part] for part in method.teacher_parts})
    arrays = official(state.params, "mocov3")
    for key, a in arrays.items():
        if a.ndim > 1 and "token" not in key and "pos_embed" not in key:
            out, inputs = a.reshape(len(a), -1).shape
            bound = (6 / (inputs + (out // 3 if "qkv" in key else out))) ** 0.5
            bound = inputs**-0.5 if re.search(r"head|predictor", key) else bound
            assert 0.98 * bound < np.abs(a).max() <= bound * (1 + 1e-6), key
            assert abs(a.std() / bound * 3**0.5 - 1) < 0.05, key
    assert 0.7e-6 < arrays["base_encoder.cls_token"].std() < 1.3e-6
    assert not any(np.any(a) for key, a in arrays.items() if key.endswith(("norm.bias", "fc1.bias", "proj.bias")))
    table = sincos_positions(config.model.dim, 4, 4, row_first=True)
    np.testing.assert_array_equal(arrays["base_encoder.pos_embed"], table.astype(np.float32))


def test_other_numbers_of_views_are_refused():
    config = mim_jax.load_config("configs/mocov3.py:demo")
    config.crops.global_crops_number = 3
    with pytest.raises(ValueError, match="two views, but crops.global_crops_number is 3"):
        mim_jax.make_method(config)


def test_lars(golden, x64):
    """Three steps of a matrix and a bias, alone and as the first of two blocks: what is 0 is moved without the ratio."""
    arrays, _ = golden("lars")
    config = mim_jax.load_config("configs/mae.py:demo")
    config.optim.update(name="lars", momentum=0.9)
    schedules = {"lr": lambda step: 0.3, "weight_decay": lambda step: 0.01}
    method = mim_jax.make_method(config)
    optimizer = optim.make_optimizer(config, schedules, method)

    def tree(kernel, bias, other):
        blocks = {"fc1": {"kernel": np.stack([kernel, other * kernel]), "bias": np.stack([bias, other * bias])}}
        return jax.tree.map(jnp.asarray, {"head": {"kernel": kernel, "bias": bias}, "backbone": {"blocks": blocks}})

    params = tree(arrays["w0"], arrays["b0"], 0.0)
    state = optimizer.init(params)
    for step in range(3):
        grads = tree(arrays[f"gw{step}"], arrays[f"gb{step}"], 1.0)
        updates, state = optimizer.update(grads, state, params, step=jnp.int32(step))
        if step == 0:
            plain = updates["backbone"]["blocks"]["fc1"]["kernel"][1]
            np.testing.assert_allclose(plain, -0.3 * arrays["gw0"], rtol=1e-12)
        params = optax.apply_updates(params, updates)
        block = jax.tree.map(lambda p: p[0], params["backbone"]["blocks"]["fc1"])
        for found in (params["head"], block):
            np.testing.assert_allclose(found["kernel"], arrays[f"w{step + 1}"], rtol=1e-12)
            np.testing.assert_allclose(found["bias"], arrays[f"b{step + 1}"], rtol=1e-12)
