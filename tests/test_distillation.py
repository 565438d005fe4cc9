"""Distillation: the loss written out, what is refused, and a run whose teacher is trained first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mim_jax
from mim_jax import losses, train
from mim_jax.config import resolve_target


def test_the_loss_is_of_all_patches_against_the_fixed_teacher():
    config = mim_jax.load_config("tests/tiny.py:distillation")
    config.data.num_examples = 64
    config.loss.update(ibot_weight=1.0, koleo_weight=0.0)
    method = mim_jax.make_method(config)
    params, extra = jax.jit(method.init)(jax.random.key(0))
    target = jax.jit(method.target.init_parts)(jax.random.key(1))
    crops = {"global": jax.random.normal(jax.random.key(2), (8, 2, 16, 16, 3))}
    crops["local"] = jax.random.normal(jax.random.key(3), (8, 1, 8, 8, 3))
    loss, (_, figures) = jax.jit(method.loss)(params, params, target, extra, crops, jax.random.key(4), jnp.array(0))

    def logits(network, params, sizes):
        out = [network.backbone.apply({"params": params["backbone"]}, [x])[0] for x in sizes]
        cls = jnp.concatenate([o["cls"] for o in out], axis=1)
        cls = network.dino_head.apply({"params": params["dino_head"]}, cls)
        return cls, network.ibot_head.apply({"params": params["ibot_head"]}, out[0]["patch"])

    teacher = jax.jit(functools.partial(logits, method.target))(target, [crops["global"]])
    votes = [losses.sinkhorn_knopp(x.reshape(*x.shape[:2], -1) if x.ndim == 3 else x.reshape(8, -1, 16), 0.04) for x in teacher]
    student = [jax.nn.log_softmax(x / 0.1) for x in jax.jit(functools.partial(logits, method))(params, list(crops.values()))]
    pairs = [-jnp.sum(votes[0][:, i] * student[0][:, j], -1).mean() for i in range(2) for j in range(3) if i != j]
    patch = -jnp.sum(votes[1].reshape(student[1].shape) * student[1], -1).mean()
    np.testing.assert_allclose(figures["train/loss_cls"], np.mean(pairs), rtol=1e-5)
    np.testing.assert_allclose(figures["train/loss_patch"], patch, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(pairs) + patch, rtol=1e-5)
    assert figures["train/masked"] == 1


@pytest.mark.parametrize("change, words", [
    ({"head.out_dim": 48}, r"the same prototypes .*: \[48, 16\] here, \[32, 16\] there"),
    ({"loss.separate_head": False}, r"the same prototypes .*: \[32\] here, \[32, 16\] there"),
    ({"model.patch_size": 8}, "the same patch size in pixels: 8 here, 4 there"),
    ({"data.mean": (0.5, 0.5, 0.5)}, "the same mean and std of the images"),
    ({"target.config": "tests/tiny.py:dino"}, "the teacher of config.target must be of DINOv2, not of dino"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused(change, words):
    config = mim_jax.load_config("tests/tiny.py:distillation")
    config.update_from_flattened_dict(change)
    resolve_target(config)
    with pytest.raises(ValueError, match=words):
        mim_jax.make_method(config)


@pytest.mark.slow  # tests/test_target.py has a quicker pair
def test_the_teacher_is_trained_first(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    config = mim_jax.load_config("tests/tiny.py:distillation")
    config.total, config.data.dir, config.target.workdir = "2 steps", str(tmp_path / "images"), str(tmp_path / "teacher")
    state = train.run(config, tmp_path / "student")
    assert "distillation needs the dinov2 run in" in capsys.readouterr().err
    assert int(state.step) == 2 and state.teacher.keys() == state.params.keys()


def test_the_teacher_consists_of_its_parameters_alone():
    """Not of its centers, which no file of weights has."""
    config = mim_jax.load_config("tests/tiny.py:distillation")
    config.target.network.loss.centering = "centering"
    parts = jax.eval_shape(mim_jax.make_method(config).target.init_parts, jax.random.key(0))
    assert parts.keys() == {"backbone", "dino_head", "ibot_head"}
