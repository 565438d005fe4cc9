"""The train step: what it accepts, refuses to learn from, gives back, and compiles; collapses that it must show."""

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import mim_jax
from mim_jax import TrainState, durations, health
from mim_jax.data.augment import Crops, Policy
from mim_jax.masking import Masks
from mim_jax.methods.base import Method
from mim_jax.methods.dino import Dino
from mim_jax.models.vit import ViT, drop_path
from mim_jax.state import create
from mim_jax.views import Views

BATCH = 8


class Tiny(NamedTuple):
    config: ConfigDict
    method: Dino
    train_step: Any
    initial: TrainState
    traces: list[int]  # one entry for each time that the loss was traced

    def start(self) -> TrainState:
        """A fresh state, which the step may have."""
        return jax.tree.map(jnp.copy, self.initial)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    """One train step for all tests, so that it compiles once for views and once for raw images."""
    config = mim_jax.load_config("tests/tiny.py")
    config.data.update(num_examples=64, batch_size=BATCH, canvas=24)
    method, traces = mim_jax.make_method(config), []
    loss = method.loss

    def counted(*args):
        traces.append(1)
        return loss(*args)

    object.__setattr__(method, "loss", counted)
    state, _ = mim_jax.init_state(method, config)
    return Tiny(config, method, mim_jax.make_train_step(method, config), state, traces)


@pytest.fixture
def compilations(caplog):
    """A function: how many train steps were compiled in this test until now."""
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        yield lambda: sum(
            "Compiling" in record.getMessage() and "train_step" in record.getMessage() for record in caplog.records
        )


def views(seed=0, batch_size=BATCH):
    rng = np.random.default_rng(seed)
    return {
        "global": rng.normal(size=(batch_size, 2, 16, 16, 3)).astype(np.float32),
        "local": rng.normal(size=(batch_size, 1, 8, 8, 3)).astype(np.float32),
    }


def raw_batch(seed=0, canvas=24):
    rng = np.random.default_rng(seed)
    size = np.stack([rng.integers(12, canvas + 1, BATCH), rng.integers(12, canvas + 1, BATCH)], axis=1).astype(np.int32)
    image = rng.integers(0, 256, (BATCH, canvas, canvas, 3), np.uint8)
    index = rng.permutation(64)[:BATCH].astype(np.int32)
    return {"image": image, "size": size, "label": np.zeros(BATCH, np.int32), "index": index}


def assert_same_bits(got, want):
    def check(path, a, b):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, got, want)


def test_raw_batches_are_augmented_in_the_step(tiny, compilations):
    """Raw images give what their finished views give, and other views at another step."""
    config, method, train_step = tiny.config, tiny.method, tiny.train_step
    batch = raw_batch()
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    finished = jax.jit(lambda b: method.views.make(b, key))(batch)
    _, of_views = train_step(tiny.start().replace(step=jnp.int32(3)), {}, {k: finished[k] for k in ("global", "local")})

    before = len(tiny.traces), compilations()
    state, of_batch = train_step(tiny.start().replace(step=jnp.int32(3)), {}, batch)
    assert (len(tiny.traces), compilations()) == (before[0] + 1, before[1] + 1), "another kind of batch, another program"
    assert int(state.step) == 4 and of_views.keys() == of_batch.keys()
    for tag in of_views:
        np.testing.assert_allclose(of_batch[tag], of_views[tag], rtol=1e-4, atol=1e-6, err_msg=tag)

    _, of_another_step = train_step(tiny.start(), {}, batch)
    assert abs(of_another_step["train/loss"] / of_batch["train/loss"] - 1) > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["global", "local"])
def test_a_step_that_is_not_finite_changes_nothing(tiny, name, bad):
    state, metrics = tiny.train_step(tiny.start(), {}, views(0))
    assert int(metrics["train/skipped"]) == 0
    before = jax.device_get(state)
    later = jax.tree.map(jnp.copy, state).replace(step=state.step + 1)
    untouched, _ = tiny.train_step(later, {}, views(1))

    broken = views(2)
    broken[name][5, 0, 3, 4, 1] = bad
    state, metrics = tiny.train_step(state, {}, broken)
    assert_same_bits(jax.device_get(state), before.replace(step=before.step + 1))
    assert int(metrics["train/skipped"]) == 1 and int(metrics["step"]) == 2

    state, metrics = tiny.train_step(state, {}, views(1))
    assert int(metrics["train/skipped"]) == 0 and int(metrics["step"]) == 3
    assert_same_bits(jax.device_get(state), jax.device_get(untouched))


def test_a_gradient_that_is_not_finite_is_skipped_too(tiny):
    """Columns of almost no length: the loss does not see lengths, but its gradient is divided by them."""
    state = tiny.start()
    last_layer = state.params["head"]["last_layer"]
    last_layer["weight_v"] = last_layer["weight_v"] * 1e-18
    before = jax.device_get(state)
    state, metrics = tiny.train_step(state, {}, views())
    assert np.isfinite(metrics["train/loss"]) and not np.isfinite(metrics["train/grad_norm"])
    assert int(metrics["train/skipped"]) == 1
    assert_same_bits(jax.device_get(state), before.replace(step=before.step + 1))


def test_state_is_donated(tiny):
    old = tiny.start()
    memory = tiny.train_step.lower(old, {}, views()).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(old))
    state, _ = tiny.train_step(old, {}, views())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        tiny.train_step(old, {}, views())
    tiny.train_step(state, {}, views())


def test_many_steps_are_one_trace(tiny, compilations):
    """From a state made by init through the ends of all schedules."""
    state, _ = mim_jax.init_state(tiny.method, tiny.config)
    state, _ = tiny.train_step(state, {}, views())
    before = len(tiny.traces), compilations()
    for step in range(1, durations.total_steps(tiny.config) + 2):
        state, metrics = tiny.train_step(state, {}, views(step))
        assert (len(tiny.traces), compilations()) == before, f"step {step}"
    assert int(metrics["step"]) == durations.total_steps(tiny.config) + 2


# What the step gives to a method, of one that only takes notes


class KeptKey(Masks):
    """The key that masks are drawn with, as the mask."""

    def draw(self, key, index, crops):
        return {"mask": jax.random.key_data(key)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes(Method):
    """Two parts of one weight each, with gradients 2 and 3 at every step; `extra` is what the loss was given."""

    teacher_parts: tuple[str, ...] = ("first", "second")

    def init(self, key):
        nothing = jnp.zeros(2, jnp.uint32)
        keys = dict.fromkeys(("augment", "mask", "mix", "loss"), nothing)
        return {"first": jnp.float32(1), "second": jnp.float32(10)}, keys | {"step": jnp.int32(-1), "after": jnp.int32(-1)}

    def mix(self, views, key):
        return views | {"mix": jax.random.key_data(key)}

    def loss(self, params, teacher, target, extra, views, key, step):
        keys = {name: views[name] for name in ("augment", "mask", "mix")} | {"loss": jax.random.key_data(key)}
        return 2 * params["first"] + 3 * params["second"], (extra | keys | {"step": step}, {})

    def after_update(self, state):
        return state.replace(extra=state.extra | {"after": state.step})


@pytest.fixture
def noted(monkeypatch) -> list[TrainState]:
    """The states of four steps of gradient descent at the rate 0.1 * (step + 1), the teacher's momentum being step / 4."""
    monkeypatch.setattr("mim_jax.views.augment", lambda batch, crops, key, *_: {"augment": jax.random.key_data(key)})

    def update(grads, state, params, *, step):
        return jax.tree.map(lambda g: -0.1 * (step + 1) * g, grads), step

    method = Notes(
        views=Views((Crops("global", 4, (1.0, 1.0), (Policy(),)),), (0.0,) * 3, (1.0,) * 3, KeptKey()),
        schedules={"momentum_teacher": lambda step: step / 4},
        optimizer=optax.GradientTransformationExtraArgs(lambda params: jnp.int32(-1), update),
    )
    config = ConfigDict({"seed": 5, "mesh": {"rules": ()}})
    train_step, states = mim_jax.make_train_step(method, config), [create(method, config)]
    batch = {"image": np.zeros((1, 4, 4, 3), np.uint8), "index": np.zeros(1, np.int32)}
    for _ in range(4):
        state, _ = train_step(jax.tree.map(jnp.copy, states[-1]), {}, batch)
        states.append(state)
    return jax.device_get(states)


def test_each_use_of_randomness_has_a_key_of_its_own_at_each_step(noted):
    keys = [tuple(state.extra[name]) for state in noted[1:] for name in ("augment", "mask", "mix", "loss")]
    assert len(set(keys)) == 16


def test_all_of_a_step_follows_the_step_before_it(noted):
    """Schedules, loss and optimizer read the number of finished steps; what comes after the update sees the new one."""
    for step, state in enumerate(noted[1:]):
        assert (state.extra["step"], state.opt_state, state.step, state.extra["after"]) == (step, step, step + 1, step + 1)


def test_the_teacher_follows_the_student_after_its_update(noted):
    for step, (old, new) in enumerate(zip(noted, noted[1:])):
        for part, gradient in (("first", 2), ("second", 3)):
            np.testing.assert_allclose(new.params[part], old.params[part] - 0.1 * (step + 1) * gradient, rtol=1e-6)
            want = step / 4 * old.teacher[part] + (1 - step / 4) * new.params[part]
            np.testing.assert_allclose(new.teacher[part], want, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("section", ["params", "teacher", "opt_state", "extra"])
def test_a_new_state_that_is_not_finite_is_not_kept(section, bad):
    """Though the loss and the gradient are."""

    class Spoiled(Method):
        def init(self, key):
            return {"part": jnp.ones(3)}, {"mean": jnp.zeros(2)}

        def loss(self, params, teacher, target, extra, views, key, step):
            return params["part"].sum(), ({"mean": extra["mean"] + 1}, {})

        def after_update(self, state):
            spoil = lambda x: jnp.where(state.step == 2, bad, x) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
            return state.replace(**{section: jax.tree.map(spoil, getattr(state, section))})

    schedules = {"momentum_teacher": lambda step: 0.5}
    optimizer = optax.with_extra_args_support(optax.adam(0.1))
    method = Spoiled(views=Views((), (0.0,) * 3, (1.0,) * 3), schedules=schedules, optimizer=optimizer, teacher_parts=("part",))
    config = ConfigDict({"seed": 5, "mesh": {"rules": ()}})
    train_step = mim_jax.make_train_step(method, config)
    states, skipped = [create(method, config)], []
    for _ in range(3):
        state, metrics = train_step(jax.tree.map(jnp.copy, states[-1]), {}, {})
        states.append(state)
        skipped.append(int(metrics["train/skipped"]))
    assert skipped == [0, 1, 0] and np.isfinite(metrics["train/loss"]) and np.isfinite(metrics["train/grad_norm"])
    _, first, second, third = jax.device_get(states)
    assert_same_bits(second, first.replace(step=second.step))
    assert third.extra["mean"][0] == 2 and not np.array_equal(third.params["part"], first.params["part"])


# Collapses


def figures_after(steps, **loss):
    """The step's own figures after training on eight kinds of noisy images."""
    config = mim_jax.load_config("tests/tiny.py")
    config.total = f"{steps} steps"
    config.data.update(num_examples=64, batch_size=32)
    config.model.update(dim=32, depth=1, patch_size=4, drop_path_rate=0.0, init_std=0.02)
    config.head.update(out_dim=64, hidden_dim=32, bottleneck_dim=16)
    config.crops.local_crops_number = 0
    config.loss.update(dict(student_temp=0.1, teacher_temp=0.04, teacher_temp_warmup="0 steps", center_momentum=0.9) | loss)
    config.optim.update(lr=1e-3 * 256 / 32, warmup="10 steps", freeze_last_layer="0 steps", momentum_teacher=0.99)
    method = mim_jax.make_method(config)
    state, target = mim_jax.init_state(method, config)
    train_step = mim_jax.make_train_step(method, config)
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(8, 1, 4, 4, 3)) + rng.normal(size=(8, 1, 1, 1, 3))
    kinds = kinds.repeat(4, axis=2).repeat(4, axis=3)
    for _ in range(steps):
        images = kinds[rng.integers(0, 8, 32)]
        batch = {"global": (images + 0.3 * rng.normal(size=(32, 2, 16, 16, 3))).astype(np.float32)}
        state, metrics = train_step(state, target, batch)
    return {tag: float(value) for tag, value in metrics.items() if tag.startswith("health/") or tag == "train/loss"}


@pytest.mark.slow
@pytest.mark.parametrize("loss, status, sentence", [
    (dict(), "healthy", ""),
    (dict(center_momentum=1.0), "collapsing", "all images are assigned to the same prototype"),  # the center stays at 0
    (dict(teacher_temp=0.5), "collapsing", "all images get the same uniform assignment"),  # above the student's 0.1
], ids=["recipe", "no centering", "no sharpening"])  # fmt: skip
def test_verdict_on_the_recipe_and_on_forced_collapses(loss, status, sentence):
    verdict = health.verdict(figures_after(100, **loss), num_prototypes=64)
    assert verdict.status == status, verdict
    assert sentence in verdict.sentence, verdict


# Stochastic depth


def test_drop_path_drops_whole_crops_and_keeps_the_mean():
    layout = ((2, 5), (3, 2))
    x = np.random.default_rng(0).normal(size=(64, 16, 4)).astype(np.float32)
    many = jax.jit(jax.vmap(lambda key: drop_path(jnp.asarray(x), jnp.float32(0.3), layout, key)))
    y = np.asarray(many(jax.random.split(jax.random.key(0), 500)))
    factor = y / x  # 0 or 1 / 0.7
    kept = factor > 0.5
    np.testing.assert_allclose(factor[kept], 1 / 0.7, rtol=1e-5)
    assert not np.any(y[~kept])
    crops = np.split(kept, np.cumsum([5, 5, 2, 2])[:4], axis=2)
    assert [c.shape[2] for c in crops] == [5, 5, 2, 2, 2]
    assert all((c == c[:, :, :1, :1]).all() for c in crops)
    fates = np.stack([c[:, :, 0, 0] for c in crops], axis=-1).reshape(-1, 5)  # [draws * B, crops]
    assert abs(fates.mean() - 0.7) < 0.01  # 0.46 / sqrt(160_000) = 0.001
    assert np.abs(np.corrcoef(fates.T) - np.eye(5)).max() < 0.03, "crops are not drawn for each by itself"


def test_stochastic_depth_is_for_training_only():
    images = jnp.asarray(views()["global"])
    kwargs = dict(patch_size=8, img_size=16, dim=16, depth=3, heads=2)
    vit = ViT(**kwargs, drop_path_rate=0.9)
    params = jax.tree.map(lambda p: p * 10, jax.jit(vit.init)(jax.random.key(0), [images]))
    run = jax.jit(lambda train, key: vit.apply(params, [images], train, rngs={"drop_path": key})[0]["cls"], static_argnums=0)
    off = jax.jit(lambda: ViT(**kwargs).apply(params, [images])[0]["cls"])()
    np.testing.assert_allclose(run(False, jax.random.key(1)), off, rtol=1e-3, atol=1e-3)
    first, again, other = (np.asarray(run(True, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - off).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_each_block_drops_crops_of_its_own():
    """A draw that all blocks shared would drop a crop in every block after the first that drops it."""
    images = jax.random.normal(jax.random.key(0), (64, 1, 4, 4, 3))
    vit = ViT(patch_size=4, img_size=4, dim=4, depth=6, heads=1, drop_path_rate=0.9)
    params = jax.jit(vit.init)(jax.random.key(0), [images])["params"]
    rngs = {"drop_path": jax.random.key(1)}
    run = jax.jit(lambda p: vit.apply({"params": p}, [images], True, rngs=rngs, mutable="intermediates"))
    kept = run(params)[1]["intermediates"]
    tokens = np.concatenate([kept["tokens"][0][None], kept["blocks"]["tokens"][0]])
    dropped = (tokens[1:] == tokens[:-1]).all((2, 3))  # [blocks, images]: of both branches
    assert not dropped[0].any() and dropped[-1].mean() > 0.6
    assert 0.1 < (dropped[3] & ~dropped[4]).sum() / dropped[3].sum()


def test_the_first_block_is_never_dropped():
    """Rates rise linearly from 0: a single block is never dropped, whatever the rate."""
    images = jnp.asarray(views()["global"])
    vit = ViT(patch_size=8, img_size=16, dim=16, depth=1, heads=2, drop_path_rate=0.9)
    params = jax.jit(vit.init)(jax.random.key(0), [images])
    run = jax.jit(lambda train, key: vit.apply(params, [images], train, rngs={"drop_path": key})[0]["cls"], static_argnums=0)
    key = jax.random.key(0)
    np.testing.assert_allclose(run(True, key), run(False, key), rtol=1e-5, atol=1e-6)


# Half precision


def test_bfloat16_computes_in_half_and_keeps_in_full():
    config = mim_jax.load_config("tests/tiny.py")
    config.data.update(num_examples=64, batch_size=BATCH)
    config.model.update(drop_path_rate=0.0, dim=32)
    config.head.bottleneck_dim = 32
    results = {}
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        method = mim_jax.make_method(config)
        params, extra = jax.jit(method.init)(jax.random.key(0))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves((params, extra))} == {"float32"}
        gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
        results[dtype] = gradient(params, params, {}, extra, views(), jax.random.key(0), jnp.int32(0))
    (loss, (extra, _)), gradients = results["bfloat16"]
    (want, _), want_gradients = results["float32"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((loss, extra, gradients))} == {"float32"}
    assert loss != want, "nothing was computed in bfloat16"
    np.testing.assert_allclose(loss, want, rtol=0.02)
    flat, want_flat = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (gradients, want_gradients))
    cosine = flat @ want_flat / np.linalg.norm(flat) / np.linalg.norm(want_flat)
    assert cosine > 0.98, cosine
