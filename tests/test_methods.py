"""What every method promises, one row of `METHODS` for each."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax
from mim_jax import sharding
from mim_jax.data.sources import ArraySource
from mim_jax.evaluators import Evaluation
from mim_jax.methods.base import Tokenizer
from mim_jax.sharding import path_name
from mim_jax.state import TrainState, abstract_state, first_state

# What share of the first loss a few steps on one batch must come below, and the overrides of tests/tiny.py for it.
# targets that are sharp, which the student is not at first, and stand still
SHARP = {"optim.momentum_teacher": 1.0, "loss.center_momentum": 1.0, "loss.teacher_temp": 0.005}
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "dino": (0.5, SHARP),
    # hidden patches are noise around the image's color
    "ibot": (0.5, SHARP | {"loss.patch_center_momentum": 1.0, "loss.teacher_patch_temp": 0.005, "optim.lr": 0.003}),
    "mae": (0.5, {"loss.norm_pix_loss": False, "optim.lr": 0.03}),
    # of the first absolute errors a quarter is noise that nobody can learn in so few steps
    "simmim": (0.75, {"model.layerscale": 1.0, "loss.norm_target_window": 0, "optim.lr": 0.03}),
    "simmim_swin": (0.75, {"optim.lr": 0.03}),
    "dinov2": (0.5, {"optim.momentum_teacher": 1.0, "loss.teacher_temp": 0.005, "optim.lr": 0.01, "loss.koleo_weight": 0.01}),
    "distillation": (0.5, {"loss.teacher_temp": 0.005, "optim.lr": 0.01, "loss.koleo_weight": 0.01}),
    # 16 codes for noise
    "vqvae": (0.75, {"optim.lr": 0.01}),
    "dvae": (0.75, {"optim.lr": 0.01}),
    # the tokens of an untrained tokenizer are noise
    "beit": (0.85, {"model.layerscale": 1.0, "optim.lr": 0.01}),
    # keys that stand still: of 32 images, whose views are noise around a color
    "mocov3": (0.5, {"optim.momentum_teacher": 1.0, "optim.lr": 0.01}),
    "masked_patch": (0.5, {"optim.lr": 0.03}),
    # features of an untrained teacher
    "vqkd": (0.85, {"optim.lr": 0.01}),
    "beit2": (0.85, {"model.layerscale": 1.0, "optim.lr": 0.01}),
    # the loss is minus a cosine
    "eva": (2.0, {"optim.lr": 0.01}),
    # images are mixed
    "supervised": (0.6, {"optim.lr": 0.01}),
    "linear": (0.5, {"optim.lr": 0.1}),
}
STEPS = 20
# Variants of others (DINOv2 is DINO and more), or long to compile. Each has golden tests that are not slow.
SLOW = {"dino", "simmim_swin", "distillation", "dvae", "vqkd", "beit2", "eva", "mocov3", "supervised", "ibot", "simmim", "beit"}


def of(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


class Case(NamedTuple):
    share: float  # of the first loss
    config: Any
    method: Any
    abstract: TrainState  # shapes, dtypes and shardings
    initial: TrainState  # in numpy
    second: TrainState  # in numpy, after one step
    last: TrainState
    metrics: list[dict[str, float]]  # of each step
    gradients: tuple[Any, Any]  # with respect to the parameters and to the teacher, at the initial state
    target: Any
    program: str  # the compiled step
    alone: Any  # the first of them, on one device
    loss: Any  # at the initial state, on one device


@pytest.fixture(scope="module", params=of(METHODS))
def case(request) -> Case:
    """Twenty steps on one batch of finished views, on a mesh of 2 x 4 devices."""
    config = mim_jax.load_config(f"tests/tiny.py:{request.param}")
    config.data.num_examples, config.total = 64, f"{2 * STEPS} steps"
    config.data.batch_size = 32  # with fewer images than weights XLA sends the images around
    config.optim.update(lr=1e-3, lr_batch_size=0, warmup="0 steps", freeze_last_layer="0 steps")
    share, overrides = METHODS[request.param]
    config.update_from_flattened_dict(overrides)
    config.mesh.update(data=2, fsdp=4)
    with jax.set_mesh(sharding.make_mesh(2, 4)):
        method = mim_jax.make_method(config)
        target = jax.jit(lambda: method.target.init_parts(jax.random.key(1)) if method.target else {})()
        state = first_state(method, config)
        batch = sharding.global_batch(views(method, config.data.batch_size))
        args = (state.params, state.teacher, target, state.extra, batch, jax.random.key(0), state.step)
        gradients, _ = jax.jit(jax.grad(method.loss, argnums=(0, 1), has_aux=True))(*args)
        on_host = jax.device_get(args[:5])  # the steps take the state
        train_step = mim_jax.make_train_step(method, config).lower(state, target, batch).compile()
        states, metrics = [jax.device_get(state)], []
        for step in range(STEPS):
            state, figures = train_step(state, target, batch)
            metrics.append({tag: float(value) for tag, value in figures.items()})
            if step == 0:
                states.append(jax.device_get(state))
        abstract, gradients, target = abstract_state(method, config), jax.device_get(gradients), on_host[2]
    of_loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, _), alone = jax.device_get(of_loss(*on_host, jax.random.key(0), jnp.int32(0)))
    program = train_step.as_text()
    return Case(share, config, method, abstract, *states, state, metrics, gradients, target, program, alone, loss)


def views(method, batch_size, seed=0):
    """Random finished views of the shapes that the method declares: a color for each image, and noise."""
    rng = np.random.default_rng(seed)
    colors = 2 * rng.normal(size=(batch_size, 1, 1, 1, 3))
    specified = method.views.shapes(batch_size)
    shapes = {crops.name: specified[crops.name].shape for crops in method.views.crops}
    views = {name: (colors + 0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    if isinstance(method, Tokenizer):  # a tokenizer's images are in 0..1
        views = {name: 1 / (1 + np.exp(-images)) for name, images in views.items()}
    if method.num_classes:  # the channel that is strongest
        views |= {"label": colors.reshape(-1, 3).argmax(-1).astype(np.int32), "index": np.arange(batch_size, dtype=np.int32)}
    if "target" in specified:
        views["target"] = rng.uniform(size=specified["target"].shape).astype(np.float32)
    return views | method.views.masks.examples(batch_size, method.views.global_crops, seed)


def tensors(tree):
    """(path, array) of each tensor as the papers count them: those of stacked blocks one by one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        yield from ((f"{name}[{i}]", a) for i, a in enumerate(leaf)) if "/blocks/" in name else [(name, leaf)]


def test_loss_is_finite(case):
    assert all(np.isfinite(list(figures.values())).all() for figures in case.metrics)


def test_loss_falls_on_one_repeated_batch(case):
    losses = [figures["train/loss"] for figures in case.metrics]
    assert losses[-1] < case.share * losses[0], losses


def test_all_parameters_but_the_untrained_are_trained(case):
    fixed = re.compile(case.method.untrained or "$^")
    before, after = (dict(tensors(state.params)) for state in (case.initial, case.second))
    for name, g in tensors(case.gradients[0]):
        is_fixed = bool(fixed.search(re.sub(r"\[\d+\]$", "", name)))
        assert np.any(g) != is_fixed, f"gradient of {name}"
        assert np.any(after[name] != before[name]) != is_fixed, f"update of {name}"
    assert not case.method.untrained or any(fixed.search(name) for name in before), "`untrained` matches nothing"


def test_one_device_and_a_mesh_agree_on_the_gradient(case):
    for (name, got), (_, want) in zip(tensors(case.gradients[0]), tensors(case.alone)):
        # what MoCo v3's batch normalisation takes out again has no gradient but rounding
        floor = 0.1 if (case.config.method, name) == ("mocov3", "backbone/norm/bias") else 1e-3
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), floor), err_msg=name)


def test_no_activation_moves_between_devices(case):
    assert "all-reduce" in case.program
    assert "all-to-all" not in case.program and "collective-permute" not in case.program


def test_no_gradient_reaches_the_teacher(case):
    assert case.initial.teacher.keys() == set(case.method.teacher_parts)
    assert not any(np.any(g) for g in jax.tree.leaves(case.gradients[1]))


def test_state_keeps_its_structure_dtypes_and_shardings(case):
    assert jax.tree.structure(case.last) == jax.tree.structure(case.abstract)

    def check(path, leaf, want):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), path_name(path)
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), path_name(path)

    jax.tree_util.tree_map_with_path(check, case.last, case.abstract)
    assert [figures["step"] for figures in case.metrics] == list(range(1, STEPS + 1))


def test_features_and_reconstruction(case):
    images = jnp.zeros((3, 16, 16, 3))
    cls, patch = (jax.eval_shape(case.method.features, case.initial.params, images)[k] for k in ("cls", "patch"))
    assert cls.shape == (3, cls.shape[-1]) and patch.shape == (3, *patch.shape[1:2], cls.shape[-1])
    if "reconstruction" in case.method.pictures:
        seen = views(case.method, 3)
        painted = jax.eval_shape(case.method.reconstruction, case.initial.params, case.initial.extra, case.target, seen)
        assert painted and all(x.dtype == jnp.float32 and x.shape[:2] == seen["global"].shape[:2] for x in painted.values())


# Methods that between them have all pictures, and all parts of models that compute in half precision
# (tests/test_step.py has DINO's).
DRAWN = ("dinov2", "mae", "simmim_swin", "vqvae", "vqkd", "beit")
HALF = ("dinov2", "mae", "simmim_swin", "vqvae", "dvae", "beit2")


@pytest.mark.parametrize("case", of(DRAWN), indirect=True)
def test_pictures_are_drawn(case):
    """Each that the method declares."""
    config = case.config.copy_and_resolve_references()
    config.eval.update(img_size=32, resize=1.0, bank=8, batch_size=8)
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    bank, test = (ArraySource(part, np.arange(8) % 4, 4, name) for part, name in ((images[:8], "noise"), (images[8:], "more")))
    evaluation = Evaluation(config, case.method, bank, test)
    drawn = dict(evaluation.pictures(case.initial, case.target))
    more = {"correspondences"} if "features" in case.method.pictures else set()
    assert drawn.keys() == {*case.method.pictures, "neighbors"} | more
    assert all(min(picture.size) > 100 for picture in (evaluation.crop_picture(), *drawn.values()))


@pytest.mark.parametrize("case", of(HALF), indirect=True)
def test_bfloat16_computes_nearly_the_same_loss(case):
    config = case.config.copy_and_resolve_references()
    assert config.model.dtype == "float32"
    config.model.dtype = "bfloat16"
    method = mim_jax.make_method(config)
    batch = views(method, config.data.batch_size)
    args = (case.initial.params, case.initial.teacher, case.target, case.initial.extra, batch)
    loss, _ = jax.jit(method.loss)(*args, jax.random.key(0), jnp.int32(0))
    assert loss.dtype == jnp.float32 and loss != case.loss
    np.testing.assert_allclose(loss, case.loss, rtol=0.03)
