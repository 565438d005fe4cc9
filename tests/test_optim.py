"""The optimizer on a small tree of parameters: numbers worked out by hand. The schedules are held in the golden tests."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mim_jax import load_config, optim

RATE, DECAY = 0.5, 0.25


def made(untrained="", schedules=None, **changes):
    """The optimizer of DINO's demo with these changes of `optim`, Adam's update being the gradient's sign (but for eps)."""
    config = load_config("dino:demo")
    config.optim.update(dict(clip_grad=0.0, beta1=0.0, beta2=0.0, freeze_last_layer="0 steps", no_decay=()) | changes)
    schedules = schedules or {"lr": lambda step: RATE, "weight_decay": lambda step: DECAY}
    return optim.make_optimizer(config, schedules, SimpleNamespace(untrained=untrained, own_rates=False))


PARAMS = {
    "backbone": {"kernel": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0), "token": jnp.full((1, 2), 8.0)},
    "head": {"last_layer": {"kernel": jnp.full((2, 2), 8.0)}},
}


def updates(optimizer, steps=1, gradient=1.0):
    """What is added to each parameter, its first number, at each of the steps; the parameters stay as they are."""
    state, grads = optimizer.init(PARAMS), jax.tree.map(lambda p: jnp.full(p.shape, gradient), PARAMS)
    for step in range(steps):
        added, state = optimizer.update(grads, state, PARAMS, step=jnp.int32(step))
        flat = {**added["backbone"], "last_layer": added["head"]["last_layer"]["kernel"]}
        yield {name: float(a.flatten()[0]) for name, a in flat.items()}


def test_decay_is_of_matrices_by_the_rate_and_not_by_the_gradient():
    (found,) = updates(made(no_decay=("token",)))
    decayed, plain = -RATE * (1 + DECAY * 8), -RATE
    assert found == pytest.approx({"kernel": decayed, "bias": plain, "token": plain, "last_layer": decayed})


def test_adams_numbers_are_those_of_the_config():
    (found,) = updates(made(eps=3e-4), gradient=1e-4)
    assert found["bias"] == pytest.approx(-RATE / 4, rel=1e-4)
    for name, value in (("beta1", 0.9), ("beta2", 0.5)):
        config = {"beta1": 0.0, "beta2": 0.0} | {name: value}
        optimizer = made(**config)
        state, found = optimizer.init(PARAMS), []
        for step, gradient in enumerate((1.0, 3.0)):
            grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), PARAMS)  # noqa: B023
            added, state = optimizer.update(grads, state, PARAMS, step=jnp.int32(step))
            found.append(-float(added["backbone"]["bias"][0]) / RATE)
        mean = (0.9 * 1 + 3) / 1.9 if name == "beta1" else 3.0
        square = 9.0 if name == "beta1" else (0.5 * 1 + 9) / 1.5
        np.testing.assert_allclose(found, [1, mean / square**0.5], rtol=1e-5)


def test_sgd_adds_decay_to_the_gradient_and_has_momentum():
    found = list(updates(made(name="sgd", momentum=0.9, no_decay=("token",)), steps=2))
    decayed = 1 + DECAY * 8
    for added, share in zip(found, (1, 1.9)):
        assert added["kernel"] == pytest.approx(-RATE * share * decayed)
        assert (added["bias"], added["token"]) == pytest.approx((-RATE * share, -RATE * share))


@pytest.mark.parametrize("name, share", [("adamw", 1.0), ("sgd", 1.0), ("lars", 0.001 * 8 / (1 + DECAY * 8))])
def test_vectors_decay_if_they_are_to(name, share):
    """LARS scales matrices, all numbers of which are 8 here, but no vectors."""
    (found,) = updates(made(name=name, decay_vectors=True))
    assert found["bias"] == pytest.approx(-RATE * (1 + DECAY * 8))
    assert found["kernel"] == pytest.approx(-RATE * share * (1 + DECAY * 8))


def test_the_schedules_are_read_at_the_step():
    follows = {"lr": lambda step: 1.0 + step, "weight_decay": lambda step: 0.5 * step}
    found = [added["kernel"] for added in updates(made(schedules=follows), steps=3)]
    np.testing.assert_allclose(found, [-1, -2 * (1 + 4), -3 * (1 + 8)], rtol=1e-5)


@pytest.mark.parametrize("by", ["update", "lr"])
def test_last_layers_stay_for_so_many_steps_and_decay_no_more_than_they_move(by):
    found = list(updates(made(freeze_last_layer="2 steps", freeze_last_layer_by=by), steps=4))
    assert [bool(added["last_layer"]) for added in found] == [False, False, True, True]
    assert all(added["kernel"] == pytest.approx(-RATE * (1 + DECAY * 8)) for added in found)


def test_moments_of_frozen_last_layers_move_by_lr_alone():
    """Gradients of 1, 1, then 0: what Adam remembers of the first two at the first step of a last layer."""
    first = {}
    for by in ("update", "lr"):
        optimizer = made(freeze_last_layer="2 steps", freeze_last_layer_by=by, beta1=0.5, beta2=0.5, weight_decay=0.0)
        state = optimizer.init(PARAMS)
        for step, gradient in enumerate((1.0, 1.0, 0.0)):
            grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), PARAMS)  # noqa: B023
            added, state = optimizer.update(grads, state, jax.tree.map(jnp.zeros_like, PARAMS), step=jnp.int32(step))
        first[by] = float(added["head"]["last_layer"]["kernel"][0, 0])
    assert first["update"] == 0
    assert first["lr"] == pytest.approx(-RATE * (3 / 7) / (3 / 7) ** 0.5, rel=1e-5)  # (1/8 + 1/4) / (1 - 1/8) of both


def test_untrained_parameters_have_no_update_whatever_their_gradient():
    (found,) = updates(made(untrained="token$|last_layer/"))
    assert (found["token"], found["last_layer"]) == (0, 0) and found["kernel"] and found["bias"]


@pytest.mark.parametrize("per, factors", [("model", (5, 5, 5)), ("part", (3, 4, 4)), ("parameter", (3, 4, 1))])
def test_gradients_are_clipped_together_by_part_or_alone(per, factors):
    """To a norm of 1, and none is made larger: of parts of norm 3 and 4, the second of which has a bias of norm 0.1."""
    grads = {"a": {"kernel": jnp.array([[3.0]])}, "b": {"kernel": jnp.array([[4.0]]), "bias": jnp.array([0.1])}}
    clip = optim.clip(1.0, per)
    got, _ = clip.update(grads, clip.init(grads))
    got = [float(x.reshape(())) for x in (got["a"]["kernel"], got["b"]["kernel"], got["b"]["bias"])]
    np.testing.assert_allclose(got, np.array([3, 4, 0.1]) / factors, rtol=2e-3)


def test_the_rate_follows_a_power_of_the_batch():
    def peak(**changes):
        config = ml_collections.ConfigDict(load_config("dino:demo").to_dict())
        config.data.batch_size = 1024
        config.optim.update(dict(lr=0.01, lr_batch_size=256, lr_batch_power=1.0, warmup="0 steps") | changes)
        return float(optim.learning_rate(config)(0))

    assert [peak(), peak(lr_batch_power=0.5), peak(lr_batch_size=0)] == pytest.approx([0.04, 0.02, 0.01])
