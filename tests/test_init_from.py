"""Runs that begin with what another run has learned (`config.init_from`), and `mim_jax.load_run`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax
from mim_jax import learned
from mim_jax.checkpoint import Checkpoints
from mim_jax.methods.base import make_method
from mim_jax.sharding import make_mesh, path_name
from mim_jax.state import first_state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "simmim", "mae"])
def test_a_phase_at_a_higher_resolution(name, tmp_path):
    """Positions are interpolated once, as the models do it themselves at each call for images of another size."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}")
    config.data.num_examples = 64
    low, image = make_method(config), jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    with jax.set_mesh(make_mesh(2, 4)):
        state = first_state(low, config)
        noise = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape, x.dtype), state.params)
        state = dataclasses.replace(state, params=noise, teacher={part: noise[part] for part in low.teacher_parts})
        checkpoints = Checkpoints(tmp_path, config)
        checkpoints.save(7, state)
        checkpoints.wait()
        expected = jax.jit(low.features)(state.params, image)

        config.init_from, config.model.img_size = str(tmp_path), 32
        for side in {"global_crops_size", "target_size"} & set(config.crops):
            config.crops[side] = 32
        high = make_method(config)
        fresh = first_state(high, config)
        begun = learned.begin_with(high, config, fresh)
        assert jax.tree.map(lambda x: (x.shape, x.sharding), begun) == jax.tree.map(lambda x: (x.shape, x.sharding), fresh)
        assert begun.step == 0 and set(begun.teacher) == set(low.teacher_parts)
        if name == "mae":  # never trained: those of the new size
            pos_embed = begun.params["backbone"]["pos_embed"]
            assert np.array_equal(pos_embed, fresh.params["backbone"]["pos_embed"])
            assert pos_embed.shape[1] == 65
        else:
            found = jax.jit(high.features)(begun.params, image)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.slow
def test_swin_with_a_larger_window(tmp_path):
    config = mim_jax.load_config("tests/tiny.py:simmim_swin")
    config.data.num_examples = 64
    method = make_method(config)
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        state = first_state(method, config)
        checkpoints = Checkpoints(tmp_path, config)
        checkpoints.save(7, state)
        checkpoints.wait()
        config.init_from, config.model.window, config.model.img_size = str(tmp_path), 4, 32
        method = make_method(config)
        begun = learned.begin_with(method, config, first_state(method, config))

    def tables(params):
        found = {path_name(p): x for p, x in jax.tree.leaves_with_path(params)}
        return {name: x for name, x in found.items() if name.endswith("relative_position_bias_table")}

    old, new = tables(state.params), tables(begun.params)
    assert old.keys() == new.keys() and old
    for name in old:
        assert (old[name].shape[-2], new[name].shape[-2]) == (9, 49)
        np.testing.assert_allclose(new[name][..., 24, :], old[name][..., 4, :], atol=1e-6)  # a token and itself


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(workdir, method, state) of a DINO run whose student and teacher differ, and whose center is not the first one."""
    workdir, config = tmp_path_factory.mktemp("dino"), mim_jax.load_config("tests/tiny.py:dino")
    config.data.num_examples, config.model.patch_size = 64, 4
    method = make_method(config)
    state = first_state(method, config)
    teacher, extra = (jax.tree.map(lambda x: x + 1, tree) for tree in (state.teacher, state.extra))
    state = dataclasses.replace(state, teacher=teacher, extra=extra)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    return workdir, method, state


def begun(dino, variant, changes):
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.data.num_examples, config.init_from = 64, str(dino[0])
    config.update_from_flattened_dict(changes)
    method = make_method(config)
    fresh = first_state(method, config)
    return fresh, learned.begin_with(method, config, jax.tree.map(jnp.copy, fresh))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), a, b))


SMALL = {"model.patch_size": 4}


def test_all_is_taken_by_the_same_method(dino, capsys):
    _, state = begun(dino, "dino", SMALL)
    assert same((state.params, state.teacher, state.extra), (dino[2].params, dino[2].teacher, dino[2].extra))
    words = f"initialised from step 5 in {dino[0]}: params/backbone, teacher/backbone, params/head, teacher/"
    assert capsys.readouterr().err.startswith(words)


def test_another_head_stays_new(dino, capsys):
    fresh, state = begun(dino, "dino", SMALL | {"head.out_dim": 48})
    for section in ("params", "teacher"):
        now, then, new = (getattr(s, section) for s in (state, dino[2], fresh))
        assert same(now["backbone"], then["backbone"]) and same(now["head"], new["head"])
    assert same(state.extra, fresh.extra)
    assert "new: head (head/last_layer/weight_g: (1, 32) -> (1, 48)), extra" in capsys.readouterr().err


def test_only_the_parts_that_are_named_are_taken(dino):
    """The center belongs to the head: it stays new with it."""
    fresh, state = begun(dino, "dino", SMALL | {"init_parts": ("backbone",)})
    for section in ("params", "teacher"):
        now, then, new = (getattr(s, section) for s in (state, dino[2], fresh))
        assert same(now["backbone"], then["backbone"]) and same(now["head"], new["head"])
    assert same(state.extra, fresh.extra) and not same(state.extra, dino[2].extra)


def test_a_method_without_a_teacher_begins_with_the_teacher(dino, capsys):
    changes = {"init_parts": ("backbone",), "model.patch_size": 4}
    fresh, state = begun(dino, "mae", changes)
    assert not state.teacher
    blocks, positions = state.params["backbone"]["blocks"], state.params["backbone"]["pos_embed"]
    assert same(blocks, dino[2].teacher["backbone"]["blocks"]) and same(positions, dino[2].teacher["backbone"]["pos_embed"])
    assert same(state.params["decoder"], fresh.params["decoder"])
    words = capsys.readouterr().err
    assert "params/backbone from teacher" in words and "new: decoder" in words


def test_a_mask_token_may_be_new(dino, capsys):
    fresh, state = begun(dino, "ibot", {"init_parts": ("backbone",)})
    for section in ("params", "teacher"):
        now, new = getattr(state, section)["backbone"], getattr(fresh, section)["backbone"]
        assert same(now.pop("mask_token"), new["mask_token"]) and same(now, getattr(dino[2], section)["backbone"])
    assert "new: head, extra, backbone/mask_token" in capsys.readouterr().err


def test_a_teacher_that_the_run_lacks_is_filled_from_the_parameters(tmp_path, capsys):
    config = mim_jax.load_config("tests/tiny.py:mae")
    config.data.num_examples = 64
    state = first_state(make_method(config), config)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(2, state)
    checkpoints.wait()
    _, begun_state = begun((tmp_path,), "dino", SMALL | {"init_parts": ("backbone",)})
    assert same(begun_state.params["backbone"], state.params["backbone"])
    assert same(begun_state.teacher["backbone"], state.params["backbone"])
    assert "teacher/backbone from params" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"model.dim": 8}, r"are of another model. There and here: backbone/blocks/fc1/bias: \(2, 64\) -> \(2, 32\)"),
    ({"init_parts": ("backbone", "neck")}, r"init_parts names \['neck'\], but .* have in common only \['backbone', 'head'\]"),
])  # fmt: skip
def test_an_encoder_that_does_not_fit_is_refused(dino, changes, message):
    with pytest.raises(ValueError, match=message):
        begun(dino, "dino", SMALL | changes)


def test_a_run_is_loaded_for_use(dino):
    workdir, method, state = dino
    run, images = mim_jax.load_run(workdir), jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    assert run.step == 5 and run.config.model.dim == 16 and same(run.params, state.teacher)
    np.testing.assert_allclose(run.method.features(run.params, images)["cls"], method.features(state.teacher, images)["cls"])
