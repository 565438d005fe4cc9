"""A run that begins with what one at another resolution has learned (`config.init_from`)."""

import dataclasses

import jax
import numpy as np
import pytest

import mim_jax
from mim_jax import learned
from mim_jax.checkpoint import Checkpoints
from mim_jax.methods.base import make_method
from mim_jax.sharding import make_mesh, path_name
from mim_jax.state import first_state


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
