"""Attention and what is around it, against plain re-derivations."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax import sharding
from mim_jax.models import layers
from mim_jax.models.swin import shift_mask, unwindowed, windows


def qkv(length, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, length, 3, 8)), jnp.bfloat16) for _ in range(3)]


def by_hand(q, k, v, bias):
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = q @ k.swapaxes(-1, -2) / 8**0.5 + (0 if bias is None else np.asarray(bias, np.float64))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [5, 6])
def test_attention(length, biased):
    q, k, v = qkv(length)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, length, length)), jnp.float32) if biased else None
    np.testing.assert_allclose(layers.attention(q, k, v, bias).astype(float), by_hand(q, k, v, bias), atol=0.03)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [5, 6])
def test_lengths_are_padded_for_the_fused_kernel_and_nobody_sees_it(monkeypatch, length, biased):
    """The GPU's way, with XLA's attention in the place of the kernel, which takes even lengths only."""
    fused, lengths = jax.nn.dot_product_attention, []

    def even_only(q, k, v, bias, *, implementation, **kwargs):
        lengths.append(q.shape[1])
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return fused(q, k, v, bias, implementation="xla", **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", even_only)
    q, k, v = qkv(length)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, length, length)), jnp.float32) if biased else None
    got = layers.attention(q, k, v, bias)
    assert lengths == [6] and got.shape == q.shape
    np.testing.assert_allclose(got.astype(float), by_hand(q, k, v, bias), atol=0.03)


def test_on_gpus_the_gradient_of_a_shared_bias_is_summed_in_float32(monkeypatch):
    fused = jax.nn.dot_product_attention

    def with_xla(*args, implementation, **kwargs):
        return fused(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    mesh, bias = sharding.make_mesh(2, 1, jax.devices()[:2]), jnp.ones((1, 3, 6, 6))
    q, k, v = (jnp.tile(x, (2, 1, 1, 1)) for x in qkv(6))

    def loss(bias, q, k, v):
        return layers.attention(q, k, v, bias).astype(jnp.float32).var()

    with jax.set_mesh(mesh):
        places = (NamedSharding(mesh, PartitionSpec()), *[NamedSharding(mesh, sharding.BATCH)] * 3)
        lowered = jax.jit(jax.grad(loss), in_shardings=places).lower(bias, q, k, v)
        sums = re.findall(r"stablehlo.all_reduce.*?-> tensor<(\S+)>", lowered.as_text(), re.DOTALL)
        got = lowered.compile()(*jax.device_put((bias, q, k, v), places))
    assert sums == ["1x3x6x6xf32"]
    np.testing.assert_allclose(got, jax.grad(loss)(bias, q, k, v), atol=1e-4)


def test_a_tpu_s_fused_attention_is_attention(monkeypatch):
    """The kernel, interpreted, on two devices: values and gradients."""
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(layers, "LONG", 130)
    monkeypatch.setattr(layers, "splash_attention", functools.partial(layers.splash_attention, interpret=True))
    q, k, v = (jax.random.normal(key, (2, 130, 2, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

    def of(attention, *args):
        out, pull = jax.vjp(attention, *args)
        return out, *pull(jnp.roll(args[0], 1, axis=0))

    with jax.set_mesh(sharding.make_mesh(2, 1, jax.devices()[:2])):
        got = jax.jit(functools.partial(of, layers.attention))(q, k, v)
    monkeypatch.undo()
    for mine, theirs in zip(got, of(layers.attention, q, k, v)):
        np.testing.assert_allclose(mine.astype(float), theirs.astype(float), atol=0.03)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_has_the_gradient_of_the_plain_one(x64, biased):
    keys = jax.random.split(jax.random.key(0), 4)
    args = [jax.random.normal(key, (2, 5, 3, 8)) for key in keys[:3]]
    args += [jax.random.normal(keys[3], (1, 3, 5, 5))] * biased

    def plain(q, k, v, bias=0.0):
        weights = jax.nn.softmax(jnp.einsum("btnd,bsnd->bnts", q, k) / 8**0.5 + bias)
        return jnp.einsum("bnts,bsnd->btnd", weights, v)

    check_alike(layers.attention, plain, *args, atol=1e-12)


def test_layer_norm_is_flax_s(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    x, scale, bias = (jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 5, 8), (8,), (8,))))
    ours, theirs = (
        lambda *args, norm=norm: norm.apply({"params": {"scale": args[1], "bias": args[2]}}, args[0])
        for norm in (layers.LayerNorm("float64"), nn.LayerNorm(dtype="float64", use_fast_variance=False))
    )
    check_alike(ours, theirs, 3 + x, scale, bias, atol=1e-12)


def test_windows_and_back():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    parts = windows(x, 2)
    assert parts.shape == (2, 6, 4, 3)
    np.testing.assert_array_equal(parts[1, 4], x[1, 2:4, 2:4].reshape(4, 3))  # second row of windows, second column
    np.testing.assert_array_equal(unwindowed(parts, 2, 4), x)


def test_shifted_windows_hide_what_was_not_near(golden):
    arrays, _ = golden("simmim_swin")
    np.testing.assert_array_equal(shift_mask(8, 8, 4, 2), arrays["w/encoder.layers.0.blocks.1.attn_mask"])


@pytest.mark.parametrize("size, stride, padding", [(4, 2, 1), (3, 2, 1), (2, 2, 0)])
def test_convolutions_are_those_of_jax(size, stride, padding):
    """Values and gradients of the products that stand in on a CPU for those with a stride."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 6, 10, 3)), jax.random.normal(keys[1], (size, size, 3, 5))
    window = (stride, stride), ((padding, padding),) * 2
    names = ("NHWC", "HWIO", "NHWC")
    ours = lambda x, k: layers.convolve(x, k, *window)  # noqa: E731
    theirs = lambda x, k: jax.lax.conv_general_dilated(x, k, *window, dimension_numbers=names)  # noqa: E731
    check_alike(ours, theirs, x, kernel)


def test_transposed_convolutions_are_those_of_jax():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 3, 5, 3)), jax.random.normal(keys[1], (4, 4, 3, 5))
    check_alike(layers.convolve_to_twice, lambda x, k: jax.lax.conv_transpose(x, k, (2, 2), "SAME"), x, kernel)


def check_alike(ours, theirs, *args, atol=1e-3):
    """Values, to a tenth of `atol`, and gradients."""
    got, want = ours(*args), theirs(*args)
    np.testing.assert_allclose(got, want, atol=atol / 10)
    weights, places = jnp.cos(want), tuple(range(len(args)))
    gradients = [jax.grad(lambda *args, f=f: jnp.sum(f(*args) * weights), argnums=places)(*args) for f in (ours, theirs)]
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, atol=atol)
