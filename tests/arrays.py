"""What the golden tests do with stored arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mim_jax
from mim_jax import convert
from mim_jax.sharding import path_name
from mim_jax.state import first_state


def prefixed(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def channels_last(images):
    return jnp.asarray(np.moveaxis(images, -3, -1))


def relative_error(got, want):
    return np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))


def tree_paths(tree):
    """The tree with every leaf replaced by its slash-joined path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def double(tree):
    """Floating-point leaves in float64."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype.kind == "f" else a.dtype), tree)


def official(tree, family):
    """A tree of parameters (or gradients) under its official names, fetched."""
    return convert.to_torch(jax.device_get(tree), family)


def keeping_gradients(method):
    """The method with an optimizer whose state is (its own state, the last gradient that it was given). So the gradient that is
    looked at is that of the train step, and is compiled once."""
    own = method.optimizer

    def update(grads, state, params=None, **more):
        updates, inner = own.update(grads, state[0], params, **more)
        return updates, (inner, grads)

    def init(params):
        return own.init(params), jax.tree.map(jnp.zeros_like, params)

    return dataclasses.replace(method, optimizer=optax.GradientTransformationExtraArgs(init, update))


def follow_four_steps(config, family, arrays, views_of_step, target=None):
    """Holds the real train step, in float64, against a stored trajectory of four official ones: losses, norms of all
    gradients, learning rates, weight decays, and every weight at the end. `views_of_step(method, step)` are its views."""
    method = keeping_gradients(mim_jax.make_method(config))
    state, target = first_state(method, config), target or {}
    state = state.replace(params=double(convert.from_torch(prefixed(arrays, "w/"), family)))
    train_step = mim_jax.make_train_step(method, config)

    for step in range(4):
        views = views_of_step(method, step)
        state, metrics = train_step(state, target, views)
        grads = official(state.opt_state[1], family)
        norms = [np.linalg.norm(grads[str(name)]) for name in arrays["grad_norms_names"]]
        np.testing.assert_allclose(norms, arrays[f"out/grad_norms_step{step}"], rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(metrics["train/loss"], arrays[f"out/loss_step{step}"], rtol=1e-9)
        np.testing.assert_allclose(metrics["train/grad_norm"], arrays[f"out/grad_norm_step{step}"], rtol=1e-9)
        np.testing.assert_allclose(metrics["train/lr"], arrays[f"out/lr_step{step}"], rtol=1e-12)
        np.testing.assert_allclose(metrics["train/weight_decay"], arrays[f"out/wd_step{step}"], rtol=1e-12)
    got = official(state.params, family)
    for key, want in prefixed(arrays, "w_after/").items():
        np.testing.assert_allclose(got[key], want, atol=1e-8, rtol=1e-7, err_msg=key)


def follow_four_steps_with_a_teacher(config, family, arrays, centers, more_views):
    """The same for DINO and iBOT, whose crops are stored: also the centres (name in `extra` -> stored name) before and after
    each step, and student and teacher after it. `more_views(at)` are what a step has besides its crops."""
    method = keeping_gradients(mim_jax.make_method(config))
    state, target = mim_jax.init_state(method, config)
    params = convert.from_torch(prefixed(arrays, "params_init/"), family)
    params = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), params, state.params)
    state = state.replace(params=params, teacher=jax.tree.map(jnp.copy, params))
    train_step = mim_jax.make_train_step(method, config)
    names = [str(n).removeprefix("module.") for n in arrays["grad_norms_names"]]

    def check_centers(state, when):
        for name, stored in centers.items():
            if f"{stored}_{when}" in arrays:  # what is not stored after a step is stored before the next
                np.testing.assert_allclose(state.extra[name], arrays[f"{stored}_{when}"], atol=1e-12)

    for step in range(4):
        at = f"epoch{step // 2}_it{step % 2}"
        crops = [channels_last(arrays[f"images/{at}_crop{c}"]).astype(float) for c in range(4)]
        views = {"global": jnp.stack(crops[:2], axis=1), "local": jnp.stack(crops[2:], axis=1)} | more_views(at)
        check_centers(state, f"before_step{step}")
        state, metrics = train_step(state, target, views)
        grads = official(state.opt_state[1], family)
        norms = np.array([np.linalg.norm(grads[n]) for n in names])
        np.testing.assert_allclose(norms, arrays[f"grad_norms_step{step}"], rtol=1e-8, atol=1e-14)
        for key, want in prefixed(arrays, f"grads_preclip_step{step}/").items():
            assert np.max(np.abs(grads[key] - want)) < 1e-10 * max(np.max(np.abs(want)), 1e-3), key
        told = {"lr": "lr_used", "weight_decay": "wd_used"} | {name: name for name in ("loss", "loss_cls", "loss_patch")}
        for tag, name in told.items():
            if f"{name}_step{step}" in arrays:
                rtol = 1e-9 if "loss" in tag else 1e-12
                np.testing.assert_allclose(metrics[f"train/{tag}"], arrays[f"{name}_step{step}"], rtol=rtol, err_msg=tag)
        np.testing.assert_allclose(metrics["train/momentum_teacher"], arrays["momentum_schedule"][step], rtol=1e-12)
        check_centers(state, f"after_step{step}")
        for part, tree in (("student", state.params), ("teacher", state.teacher)):
            got = official(tree, family)
            for key, value in prefixed(arrays, f"{part}_after_step{step}/").items():
                np.testing.assert_allclose(got[key], value, atol=1e-7, rtol=1e-7, err_msg=f"{part} {key}")
