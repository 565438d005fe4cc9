"""Which of a run's numbers another run, a frozen target or a user gets: of small arrays, without any network."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import learned, load_config
from mim_jax.checkpoint import Checkpoints
from mim_jax.methods import base
from mim_jax.state import TrainState

METHOD = SimpleNamespace(encoder_part="backbone", untrained="", target=None)
BACKBONE, HEAD = {"kernel": (2, 3)}, {"kernel": (3, 4)}


def tree(parts, value):
    shapes = {"backbone": BACKBONE, "head": HEAD, "center": (1, 4)}
    fill = lambda shape: jnp.full(shape, value, jnp.float32)  # noqa: E731
    return {part: jax.tree.map(fill, shapes[part], is_leaf=lambda x: isinstance(x, tuple)) for part in parts}


def state(params=("backbone", "head"), teacher=(), extra=(), value=0.0, step=0):
    """All numbers of a section are one: those of the parameters `value` + 1, of the teacher + 2, of `extra` + 3."""
    sections = (tree(parts, value + i) for i, parts in enumerate((params, teacher, extra), 1))
    return TrainState(jnp.int32(step), *(next(sections), next(sections), jnp.zeros(()), next(sections)))


def saved(folder, **parts):
    checkpoints = Checkpoints(folder, load_config("dino:demo"))
    checkpoints.save(7, state(step=7, **parts))
    checkpoints.wait()
    return load_config("dino:demo").copy_and_resolve_references(), str(folder)


def numbers(found):
    """(section, part) -> the number that fills it."""
    sections = {name: getattr(found, name) for name in ("params", "teacher", "extra")}
    values = {(s, part): np.unique(jax.tree.leaves(t)[0]) for s, parts in sections.items() for part, t in parts.items()}
    return {key: float(value[0]) for key, value in values.items() if len(value) == 1}


def begun(source, fresh, parts=()):
    config, config_of = source
    config.init_from, config.init_parts = config_of, parts
    return learned.begin_with(METHOD, config, fresh)


@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("teacher"), teacher=("backbone",), extra=("center",))


@pytest.fixture(scope="module")
def without_teacher(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("none"))


def test_what_a_run_has_learned_is_its_teacher_where_there_is_one(with_teacher, monkeypatch):
    monkeypatch.setattr(learned, "made", lambda config: config.method)
    run = learned.load_run(with_teacher[1])
    assert (run.method, run.step) == ("dino", 7)
    assert {part: float(t["kernel"][0, 0]) for part, t in run.params.items()} == {"backbone": 2, "head": 1}
    assert float(run.extra["center"][0, 0]) == 3


def test_a_target_is_the_teacher_of_its_run(with_teacher):
    config = load_config("vqkd:demo")
    config.target.workdir = with_teacher[1]
    network = SimpleNamespace(init=lambda key: tree(("backbone", "head"), 9.0))
    target = learned.load_target(SimpleNamespace(target=network), config)
    assert {part: float(t["kernel"][0, 0]) for part, t in target.items()} == {"backbone": 2, "head": 1}


def test_a_run_of_the_same_kind_begins_with_student_teacher_and_the_rest(with_teacher):
    new = begun(with_teacher, state(teacher=("backbone",), extra=("center",), value=10.0))
    assert numbers(new) == {
        ("params", "backbone"): 1, ("params", "head"): 1, ("teacher", "backbone"): 2, ("extra", "center"): 3
    }  # fmt: skip
    assert int(new.step) == 0


def test_a_run_without_a_teacher_begins_with_that_of_the_other(with_teacher):
    new = begun(with_teacher, state(value=10.0))
    assert numbers(new) == {("params", "backbone"): 2, ("params", "head"): 1}


def test_a_teacher_begins_with_the_parameters_of_a_run_without_one(without_teacher):
    new = begun(without_teacher, state(teacher=("backbone", "head"), value=10.0))
    assert set(numbers(new).values()) == {1} and len(numbers(new)) == 4


def test_another_head_is_new_and_so_is_what_belongs_to_it(with_teacher, capsys):
    fresh = state(teacher=("backbone",), extra=("center",), value=10.0)
    fresh = dataclasses.replace(fresh, params=fresh.params | {"head": {"kernel": jnp.full((3, 5), 11.0)}})
    new = begun(with_teacher, fresh)
    assert numbers(new) == {
        ("params", "backbone"): 1, ("params", "head"): 11, ("teacher", "backbone"): 2, ("extra", "center"): 13
    }  # fmt: skip
    assert "new: head (head/kernel: (3, 4) -> (3, 5)), extra" in capsys.readouterr().err
    fresh = dataclasses.replace(fresh, params=fresh.params | {"backbone": {"kernel": jnp.full((2, 4), 11.0)}})
    with pytest.raises(ValueError, match=r"are of another model.*\n  backbone/kernel: \(2, 3\) -> \(2, 4\)"):
        begun(with_teacher, fresh)


def test_only_the_parts_that_are_named_are_taken(with_teacher):
    new = begun(with_teacher, state(teacher=("backbone",), extra=("center",), value=10.0), ("backbone",))
    assert numbers(new) == {
        ("params", "backbone"): 1, ("params", "head"): 11, ("teacher", "backbone"): 2, ("extra", "center"): 13
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"init_parts names \['decoder'\]"):
        begun(with_teacher, state(value=10.0), ("decoder",))


def test_a_frozen_encoder_normalizes_images_as_it_was_trained(monkeypatch):
    monkeypatch.setattr(base.vit, "features", lambda backbone, params, images: {"patch": images, "params": params})
    encoder = base.Encoder(backbone=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    found = encoder.features({"backbone": "weights"}, jnp.full((1, 2, 2, 3), 0.6))
    np.testing.assert_allclose(found["patch"][0, 0, 0], [1, 1.6, 1.5], rtol=1e-5)
    assert found["params"] == "weights"
