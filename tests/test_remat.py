"""What is computed again in the backward pass: the same gradients, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax
from mim_jax.models.vit import ViT


@pytest.mark.parametrize(
    "name, remat", [("dino", "dots"), ("mae", "full"), pytest.param("simmim_swin", "dots", marks=pytest.mark.slow)]
)
def test_gradients_are_the_same(x64, name, remat):
    """In double precision, with stochastic depth, which draws the same blocks again."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}").unlock()
    config.model.update(dtype="float64", drop_path_rate=0.5)

    def gradient(remat):
        config.model.remat = remat
        method = mim_jax.make_method(config)
        rng = np.random.default_rng(0)
        views = {c.name: rng.normal(size=(8, len(c.policies), c.size, c.size, 3)) for c in method.views.crops}
        views |= method.views.example_masks(8)
        params, extra = jax.jit(method.init)(jax.random.key(0))
        of_loss = jax.grad(lambda p: method.loss(p, p, {}, extra, views, jax.random.key(1), 0)[0])
        return jax.jit(of_loss)(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient(remat), gradient("none"))


def test_memory_falls():
    images = [jnp.zeros((32, 1, 32, 32, 3))]
    bytes_of = {}
    for remat in ("none", "dots", "full"):
        vit = ViT(patch_size=4, img_size=32, dim=32, depth=12, heads=2, remat=remat)
        params = jax.eval_shape(lambda vit=vit: vit.init(jax.random.key(0), images))
        loss = jax.jit(jax.grad(lambda p, vit=vit: vit.apply(p, images)[0]["cls"].sum()))
        bytes_of[remat] = loss.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert bytes_of["full"] < 0.6 * bytes_of["dots"] and bytes_of["dots"] < 0.8 * bytes_of["none"], bytes_of
