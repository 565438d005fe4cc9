"""What the golden tests do with stored arrays."""

import jax
import jax.numpy as jnp
import numpy as np

import mim_jax
from mim_jax import convert
from mim_jax.state import create


def prefixed(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def channels_last(images):
    return jnp.asarray(np.moveaxis(images, -3, -1))


def relative_error(got, want):
    return np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))


def double(tree):
    """Floating-point leaves in float64."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if a.dtype.kind == "f" else a.dtype), tree)


def official(tree, family):
    """A tree of parameters (or gradients) under its official names, fetched."""
    return convert.to_torch(jax.device_get(tree), family)


def follow_four_steps(config, family, arrays, views_of_step, frozen=None):
    """Holds the real train step, in float64, against a stored trajectory of four official ones: losses, norms of all
    gradients, learning rates, weight decays, and every weight at the end. `views_of_step(method, step)` are its views."""
    method = mim_jax.make_method(config)
    state, frozen = create(method, config), frozen or {}
    state = state.replace(params=double(convert.from_torch(prefixed(arrays, "w/"), family)))
    train_step = mim_jax.make_train_step(method, config)
    gradient = jax.jit(jax.grad(method.loss, has_aux=True))

    for step in range(4):
        views = views_of_step(method, step)
        grads, _ = gradient(state.params, {}, frozen, {}, views, jax.random.key(0), state.step)
        grads = official(grads, family)
        norms = [np.linalg.norm(grads[str(name)]) for name in arrays["grad_norms_names"]]
        np.testing.assert_allclose(norms, arrays[f"out/grad_norms_step{step}"], rtol=1e-8, atol=1e-14)
        state, metrics = train_step(state, frozen, views)
        np.testing.assert_allclose(metrics["train/loss"], arrays[f"out/loss_step{step}"], rtol=1e-9)
        np.testing.assert_allclose(metrics["train/grad_norm"], arrays[f"out/grad_norm_step{step}"], rtol=1e-9)
        np.testing.assert_allclose(metrics["train/lr"], arrays[f"out/lr_step{step}"], rtol=1e-12)
        np.testing.assert_allclose(metrics["train/weight_decay"], arrays[f"out/wd_step{step}"], rtol=1e-12)
    got = official(state.params, family)
    for key, want in prefixed(arrays, "w_after/").items():
        np.testing.assert_allclose(got[key], want, atol=1e-8, rtol=1e-7, err_msg=key)
