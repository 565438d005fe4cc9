"""What is computed again in the backward pass: the same gradients, in less memory."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax
from mim_jax import dry_run, sharding
from mim_jax.methods import dinov2
from mim_jax.models.vit import ViT


def first(config):
    """(parameters, extra) in double precision."""
    config = config.copy_and_resolve_references()
    config.model.dtype = "float64"
    return jax.jit(mim_jax.make_method(config).init)(jax.random.key(0))


def gradient(config, start, **settings):
    """(loss, gradient) of 8 images in double precision, all settings of the model but these as they are in `config`."""
    config = config.copy_and_resolve_references()
    config.model.update(dtype="float64", **settings)
    method = mim_jax.make_method(config)
    rng = np.random.default_rng(0)
    views = {c.name: rng.normal(size=(8, len(c.policies), c.size, c.size, 3)) for c in method.views.crops}
    views |= method.views.example_masks(8)
    params, extra = start
    of_loss = jax.value_and_grad(lambda p: method.loss(p, p, {}, extra, views, jax.random.key(1), 0)[0])
    return jax.jit(of_loss)(params)


def assert_equal(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), a, b)


@pytest.mark.parametrize(
    "name, remat",
    [("dino", "dots"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("mae", "full"), ("simmim_swin", "dots")))],
)
def test_gradients_are_the_same(x64, name, remat):
    """In double precision, with stochastic depth, which draws the same blocks again."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}").unlock()
    config.model.drop_path_rate = 0.5
    start = first(config)
    assert_equal(gradient(config, start, remat=remat), gradient(config, start, remat="none"))


@pytest.mark.parametrize("name", ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2", "simmim_swin"))])
def test_microbatches_change_nothing(x64, name):
    """Beside stochastic depth, which draws other numbers. DINOv2 has groups of images."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}").unlock()
    config.model.drop_path_rate = 0.0
    if "group_size" in config.get("mask", {}):
        config.mask.group_size = 2
    start = first(config)
    assert_equal(gradient(config, start, microbatches=4), gradient(config, start))


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", pytest.param("centering", marks=pytest.mark.slow)])
def test_the_patch_loss_in_pieces(x64, monkeypatch, centering):
    config = mim_jax.load_config("tests/tiny.py:dinov2").unlock()
    config.loss.centering = centering
    config.mask.exact = True  # the last patch of a group is masked: what follows it is filling
    start = first(config)
    whole = gradient(config, start)
    monkeypatch.setattr(dinov2, "PIECE", 500)
    method = mim_jax.make_method(config)
    vectors = jnp.zeros((8 // method.group_size, method.views.masks.upper, 1))
    assert len(method.pieces(vectors)) > 3
    assert_equal(gradient(config, start), whole)


def test_memory_falls():
    images = [jnp.zeros((32, 1, 32, 32, 3))]
    bytes_of = {}
    for remat in ("none", "dots", "full"):
        vit = ViT(patch_size=4, img_size=32, dim=32, depth=12, heads=2, remat=remat)
        params = jax.eval_shape(lambda vit=vit: vit.init(jax.random.key(0), images))
        loss = jax.jit(jax.grad(lambda p, vit=vit: vit.apply(p, images)[0]["cls"].sum()))
        bytes_of[remat] = loss.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert bytes_of["full"] < 0.6 * bytes_of["dots"] and bytes_of["dots"] < 0.8 * bytes_of["none"], bytes_of


def test_memory_falls_with_microbatches():
    images = [jnp.zeros((32, 1, 32, 32, 3))]

    def temporaries(number):
        vit = ViT(patch_size=4, img_size=32, dim=32, depth=12, heads=2, microbatches=number)
        params = jax.eval_shape(lambda: vit.init(jax.random.key(0), images))
        loss = jax.jit(jax.grad(lambda p: vit.apply(p, images)[0]["cls"].sum()))
        return loss.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.3 * temporaries(1)


@pytest.mark.parametrize(
    "memory, way",
    [
        (40, "none: 39.00 of 40.00 GiB a device"),
        (30, "dots: 20.00 of 30.00 GiB a device; none needs 39.00 GiB"),
        (8, "full with model.microbatches=4: 7.00 of 8.00 GiB a device; none .*; dots .*; full needs 9G of 8G"),
    ],
)
def test_auto_takes_the_fastest_way_that_fits(monkeypatch, memory, way):
    config = mim_jax.load_config("mae:demo").unlock()
    config.model.remat = "auto"

    def compile_step(config):
        """As a compiler would, some of which refuse what is too large."""
        way = config.model.remat, config.model.microbatches
        if way == ("full", 1) and memory < 9:
            raise dry_run.TooLarge(f"needs 9G of {memory}G")
        needed = {("none", 1): 39, ("dots", 1): 20, ("full", 1): 9, ("full", 4): 7, ("full", 16): 6}
        return SimpleNamespace(peak=needed[way] * 2**30)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    line, program = dry_run.resolve_remat(config, memory * 2**30)
    assert re.match(f"model.remat is {way}", line) and program.peak <= memory * 2**30
    config.model.update(remat="auto", microbatches=1)
    with pytest.raises(ValueError, match="with any model.remat .none needs .*, full with model.micro.*=16 needs"):
        dry_run.resolve_remat(config, 5 * 2**30)


def test_auto_keeps_the_microbatches_that_are_asked_for(monkeypatch):
    config, tried = mim_jax.load_config("mae:demo").unlock(), []
    config.model.update(remat="auto", microbatches=4)

    def compile_step(config):
        tried.append((config.model.remat, config.model.microbatches))
        if config.model.microbatches > 4:
            raise ValueError("the batch cannot be divided so")
        return SimpleNamespace(peak=2 * 2**30)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    with pytest.raises(ValueError, match="does not fit into the 1.00 GiB .* with any model.remat"):
        dry_run.resolve_remat(config, 2**30)
    assert tried == [("none", 4), ("dots", 4), ("full", 4), ("full", 16)]
    config.model.update(remat="auto", microbatches=32)
    with pytest.raises(ValueError, match="the batch cannot be divided so"):
        dry_run.resolve_remat(config, 2**30)


@pytest.mark.slow
def test_parts_of_a_batch_stay_on_their_devices(monkeypatch):
    """Microbatches and pieces of the patch loss on 8 devices: nothing but parameters and sums is sent."""
    config = mim_jax.load_config("tests/tiny.py:dinov2").unlock()
    config.data.update(num_examples=96, batch_size=32)
    config.mask.group_size, config.mesh.fsdp = 2, 8
    peaks = []
    for number, piece in ((1, 2**28), (2, 300)):
        monkeypatch.setattr(dinov2, "PIECE", piece)
        config.model.microbatches = number
        with jax.set_mesh(sharding.make_mesh(1, 8)):
            program = dry_run.compile_step(config)
        kinds = {name for name, _ in dry_run.collectives(program.compiled.as_text())}
        assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
        peaks.append(program.peak)
    assert peaks[1] < 0.8 * peaks[0]
