"""Masked patch prediction: what is corrupted and how, and the colours that are predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax


@pytest.fixture(scope="module")
def method():
    config = mim_jax.load_config("tests/tiny.py:masked_patch")
    config.model.img_size = 32  # 8 x 8 patches
    return mim_jax.make_method(config)


def test_half_of_the_patches_are_corrupted_as_bert_does(method):
    """80 % are the token, 10 % another patch of their image, 10 % as they were, and the other half is as it was."""
    mask = jnp.asarray(method.views.example_masks(400)["mask"])
    np.testing.assert_array_equal(mask.sum(-1), 32)
    number = jnp.arange(400 * 64, dtype=jnp.float32).reshape(400, 1, 8, 8)  # each patch is a number of its own

    def drawn(numbers):
        return jnp.broadcast_to(jnp.repeat(jnp.repeat(numbers, 4, 2), 4, 3)[..., None], (400, 1, 32, 32, 3))

    images = drawn(number)
    corrupted, hidden = jax.jit(method.corrupted)(images, mask, jax.random.key(0))
    patches = np.asarray(corrupted[:, :, ::4, ::4, 0]).reshape(400, 64)
    np.testing.assert_array_equal(corrupted, drawn(patches.reshape(400, 1, 8, 8)))
    mask, hidden, was = (np.asarray(x).reshape(400, 64) for x in (mask, hidden, number))
    changed = patches != was
    assert not np.any((changed | hidden) & ~mask) and not np.any(changed & hidden)
    shares = [hidden.sum() / mask.sum(), changed.sum() / mask.sum()]
    np.testing.assert_allclose(shares, [0.8, 0.1], atol=5 * (0.16 / mask.sum()) ** 0.5)
    np.testing.assert_array_equal(patches // 64, was // 64)  # of the same image
    shifts = np.bincount((patches - was)[changed].astype(int) % 64, minlength=64)
    assert shifts[0] == 0 and shifts[1:].min() > 0.3 * shifts[1:].mean() and shifts.max() < 2 * shifts[1:].mean()
    few = jnp.tile(images[:, :, :8, :8], (10, 1, 1, 1, 1))  # of 4 patches a quarter would be replaced by themselves
    replaced, _ = jax.jit(method.corrupted)(few, jnp.ones((4000, 1, 4), bool), jax.random.key(0))
    np.testing.assert_allclose(jnp.mean((replaced != few)[:, :, ::4, ::4, 0]), 0.1, atol=0.012)
    again, _ = jax.jit(method.corrupted)(images, jnp.asarray(mask[:, None]), jax.random.key(1))
    assert np.any(again != corrupted)


def test_the_target_is_the_mean_color_in_three_bits(method):
    colors = jnp.array([[0, 0, 0], [1, 1, 1], [0.99, 0.13, 0.0], [0.3, 0.6, 0.9]])
    images = jnp.broadcast_to(colors[:, None, None, None], (4, 1, 32, 32, 3))
    noise = jnp.tile(jnp.array([[0.1, -0.1], [-0.1, 0.1]]), (16, 16))[..., None]  # the mean of a patch is what counts
    mean, std = jnp.array(method.views.mean), jnp.array(method.views.std)
    found = method.colors((images + noise * jnp.array([0, 0, 0, 1])[:, None, None, None, None] - mean) / std)
    want = [0, 511, 7 * 64 + 1 * 8, 2 * 64 + 4 * 8 + 7]
    np.testing.assert_array_equal(found, np.broadcast_to(np.reshape(want, (4, 1, 1)), (4, 1, 64)))
    every = jnp.arange(512).reshape(8, 1, 64)
    np.testing.assert_array_equal(method.colors(method.painted(every, jnp.zeros((8, 1, 32, 32, 3)))), every)


def test_the_loss_is_of_every_corrupted_patch_and_of_no_other(method):
    """Also of those that stayed as they were; the network's scores are given."""
    rng = np.random.default_rng(0)
    images, scores = rng.normal(size=(4, 1, 32, 32, 3)).astype(np.float32), rng.normal(size=(4, 1, 64, 512))
    mask = method.views.example_masks(4)["mask"]
    given = mim_jax.make_method(mim_jax.load_config("tests/tiny.py:masked_patch"))
    object.__setattr__(given, "predict", lambda *_: jnp.asarray(scores, jnp.float32))
    loss, (_, figures) = given.loss({}, {}, {}, {}, {"global": images, "mask": mask}, jax.random.key(0), 0)
    colors = np.asarray(method.colors(images))
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    wanted = np.take_along_axis(log_probs, colors[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -wanted[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["train/masked_accuracy"], (scores.argmax(-1) == colors)[mask].mean(), atol=1e-6)
    np.testing.assert_allclose(figures["train/most_frequent_color"], np.bincount(colors[mask]).max() / mask.sum(), rtol=1e-6)
