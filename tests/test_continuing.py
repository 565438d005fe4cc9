"""Runs that go on from other weights with care: `config.continue_from`."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mim_jax
from mim_jax import health, journal, learned, optim, report, train
from mim_jax.checkpoint import Checkpoints, differences, saved_steps
from mim_jax.config import resolve_encoder
from mim_jax.evaluators import Evaluation
from mim_jax.evaluators.retrieval import patch_retrieval
from mim_jax.methods.base import make_method
from mim_jax.pretrained import is_run
from mim_jax.sharding import make_mesh
from mim_jax.state import abstract_state


def tiny(variant, **changes):
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.data.num_examples, config.data.num_classes, config.data.workers = 64, 2, 0
    config.continued.frozen = config.continued.ramp = "2 steps"
    config.update_from_flattened_dict(changes)
    return config


def filled(config, number):
    """A state of a method whose numbers are drawn by another generator: nothing is compiled."""
    rng, method = np.random.default_rng(number), make_method(config)
    shapes = abstract_state(method, config)
    return method, jax.tree.map(lambda x: jnp.asarray(0.1 * np.abs(rng.normal(size=x.shape)), x.dtype), shapes)


def saved(workdir, variant, **changes):
    """The state of step 5 of a run, whose student and teacher differ."""
    config = tiny(variant, **changes)
    _, state = filled(config, 0)
    state = state.replace(step=jnp.int32(5))
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(5, state)
    checkpoints.wait()
    return state


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dino")
    return workdir, saved(workdir, "dino")


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), a, b))


@pytest.mark.parametrize("own, more, decay", [(1.0, 0.5, 0.5), (0.25, 0.5, 0.25), (0.25, 1.0, 0.25)])
def test_the_backbone_waits_and_then_its_rate_grows(own, more, decay):
    """No update for two steps, half of it, then all, with the stronger layer decay. The mask token is updated as heads are."""
    changes = {"optim.layer_decay": own, "continued.layer_decay": more, "optim.freeze_last_layer": "0 steps"}
    config = tiny("dino", continue_from="there", **changes)
    schedules = optim.schedules(config) | {"lr": lambda step: 1.0}

    def lr_scales(params, decay, patch_embed):
        return {"backbone": jax.tree.map(lambda _: decay, params["backbone"]), "head": 1.0}

    method = SimpleNamespace(lr_scales=lr_scales, untrained="", own_rates=False)
    params = {"backbone": {"blocks": {"bias": jnp.ones(2)}, "mask_token": jnp.ones(2)}, "head": jnp.ones(2)}
    optimizer = optim.make_optimizer(config, schedules, method)
    state = optimizer.init(params)
    for step, factor in enumerate((0, 0, 0.5, 1, 1)):
        found, state = optimizer.update(params, state, params, step=jnp.int32(step))
        np.testing.assert_allclose(found["head"], -1, rtol=1e-4)
        np.testing.assert_array_equal(found["backbone"]["mask_token"], found["head"])
        np.testing.assert_array_equal(found["backbone"]["blocks"]["bias"], decay * factor * found["head"])
    assert "backbone_rate" not in optim.schedules(tiny("dino"))


def begun(workdir, variant, **changes):
    config = tiny(variant, continue_from=str(workdir), **changes)
    method, fresh = filled(config, 1)
    return fresh, learned.begin_with(method, config, fresh)


def test_student_and_teacher_begin_with_what_was_learned(dino, capsys):
    workdir, there = dino
    assert not same(there.params, there.teacher)
    _, state = begun(workdir, "dino")
    assert same(state.params, there.teacher) and same(state.teacher, there.teacher) and same(state.extra, there.extra)
    fresh, state = begun(workdir, "dino", **{"head.out_dim": 48})
    assert same(state.params, {"backbone": there.teacher["backbone"], "head": fresh.params["head"]})
    assert same(state.teacher, {"backbone": there.teacher["backbone"], "head": fresh.teacher["head"]})
    assert "new: head (head/last_layer/weight_g: (1, 32) -> (1, 48)), extra" in capsys.readouterr().err


def test_what_cannot_be_continued_is_refused(dino, tmp_path):
    def refused(variant, message, **changes):
        with pytest.raises(ValueError, match=message):
            make_method(tiny(variant, **({"continue_from": "there"} | changes)))

    refused("dino", "init_from and continue_from are both given, but a run begins with one of them$", init_from="here")
    long = {"continued.frozen": "6 steps"}
    refused("dino", 'continued.frozen is "6 steps", but must be shorter than the run, 6 steps$', **long)
    refused("dino", 'continued.ramp is "6", but must be a duration with its unit.*$', **{"continued.ramp": "6"})
    refused("dino", r"continued.layer_decay is 0.0, but must be in \(0, 1\]$", **{"continued.layer_decay": 0.0})
    refused("vqvae", "continue_from needs a method with a ViT or Swin, which vqvae is not: use init_from$")
    make_method(tiny("simmim_swin", continue_from="there"))
    with pytest.raises(FileNotFoundError, match=f"there is no run in {tmp_path}/no: it has no folder checkpoints$"):
        begun(tmp_path / "no", "dino")
    (tmp_path / "a.npz").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"{tmp_path}/a.npz"):
        begun(tmp_path / "a.npz", "dino")
    with pytest.raises(ValueError, match="are of another model. There and here"):
        begun(dino[0], "dino", **{"model.dim": 8})


def test_a_continued_run_may_find_its_start_elsewhere_but_not_become_another(dino):
    old = {"recipe": "dino", "continue_from": "a", "continued": {"ramp": "1 epoch"}}
    assert differences(old, old | {"continue_from": "b"}) == []
    assert differences(old, old | {"continue_from": None}) == [("continue_from", "a", None)]
    assert [key for key, *_ in differences(old, old | {"continued": {"ramp": "2 epochs"}})] == ["continued.ramp"]


def test_fine_tuning_continues_from_one_checkpoint(dino):
    workdir = dino[0]
    (workdir / "config.json").write_text(tiny("dino").to_json_best_effort())
    config = tiny("supervised", continue_from=f"{workdir}/checkpoints/5")
    with pytest.raises(ValueError, match="continue_from was changed to .*: call mim_jax.config.resolve_encoder"):
        make_method(config)
    resolve_encoder(config)
    assert config.encoder.method == "dino" and make_method(config).backbone.patch_size == 8
    assert is_run(workdir / "checkpoints/5") and not is_run(workdir / "checkpoints")
    assert mim_jax.load_run(workdir / "checkpoints/5").step == 5


def test_checkpoints_of_the_best_scores_are_kept(tmp_path):
    config, state = tiny("mae"), {"step": jnp.int32(0)}
    config.checkpoint.keep = 2
    given = {1: (0.3, 0.5), 2: (0.4, 0.4), 3: (0.2, 0.6), 4: (0.4, 0.6), 5: (0.1, 0.1), 6: (0.1, float("nan"))}
    with Checkpoints(tmp_path, config) as checkpoints:
        told = []
        for step, (knn, dense) in given.items():
            figures = {"eval/view_retrieval": 0.9, "eval/knn": knn, "eval/patch_retrieval": dense}
            told.append(checkpoints.is_best(step, figures))
            checkpoints.save(step, state)
        checkpoints.wait()
        assert told == [True, True, True, False, False, False]
        assert saved_steps(checkpoints.folder) == [6, 5, 3, 2]
        assert checkpoints.is_best(7, {"eval/view_retrieval": 0.9})  # without labels
    record = json.loads((tmp_path / "checkpoints/6/record/metadata").read_text())
    assert record["best"] == {"global": [2, 0.4], "dense": [3, 0.6]}


def test_patch_retrieval():
    """Patches that know what they show are found; those that know where they are, or nothing, are not."""
    content = jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    rows = np.array([1, 1, 2, 2])  # of `whole`, in which the rows of its enlarged central half lie
    half = content[:, rows][:, :, rows[::-1]]
    flat = lambda x: x.reshape(3, 16, -1)  # noqa: E731
    noise = 1e-3 * jax.random.normal(jax.random.key(1), half.shape)
    np.testing.assert_array_equal(patch_retrieval(flat(content), flat(half + noise)), 1)
    np.testing.assert_array_equal(patch_retrieval(flat(content), flat(content)), 0)
    assert np.all(patch_retrieval(jnp.ones((3, 16, 8)), jnp.ones((3, 16, 8))) <= 1 / 16)


def test_the_verdict_of_a_continued_run():
    start = {"health/feature_std": 0.8, "health/start_cosine": 0.91, "eval/knn_baseline_start": 0.4}
    start |= {"eval/view_retrieval_baseline_start": 0.2, "eval/patch_retrieval_baseline_start": 0.3}

    def verdict(knn, view, patch, **more):
        scores = {"eval/knn": knn, "eval/view_retrieval": view, "eval/patch_retrieval": patch}
        return health.verdict(start | scores, images=2000, **more)

    kept = verdict(0.4, 0.2, 0.3)
    assert kept.status == "healthy" and "cosine to the features at the start 0.910" in kept.sentence
    assert "k-NN 0.400 (start 0.400)" in kept.sentence and verdict(0.4, 0.2, 0.3, progress=0.2).status == "healthy"
    worse = verdict(0.3, 0.2, 0.3)
    assert worse.status == "forgetting" and worse.sentence.startswith("worse than the start: ") and "0.910" in worse.sentence
    assert verdict(0.3, 0.2, 0.3, progress=0.2).status == "too early"
    mixed = verdict(0.5, 0.2, 0.2)
    assert mixed.status == "mixed" and "better than the start in k-NN 0.500 (start 0.400), but worse in patch" in mixed.sentence
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert health.mean_cosine(x, 3 * x) == pytest.approx(1) and health.mean_cosine(x, -x) == pytest.approx(-1)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`go(name)` runs MAE, continued from a run of DINO, in workdir `name` on one device; programs are compiled once."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    made, make_train_step = {}, train.make_train_step

    def evaluation(*args):
        found = made.setdefault("evaluation", Evaluation(*args))
        found.start = found.encoded = None
        return found

    def train_step(*args):
        if "step" not in made:
            made["step"] = make_train_step(*args)
        return made["step"]

    monkeypatch.setattr(train, "Evaluation", evaluation)
    monkeypatch.setattr(train, "make_train_step", train_step)
    monkeypatch.setattr(train, "first_state", lambda method, config: filled(config, 1)[1].replace(step=jnp.int32(0)))
    monkeypatch.setattr(Evaluation, "pictures", lambda *_: iter(()))
    monkeypatch.setattr(Evaluation, "crop_picture", lambda _: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *_: make_mesh(1, 1, jax.devices()[:1]))
    saved(tmp_path / "dino", "dino", **{"model.patch_size": 4})

    def go(name):
        config = tiny("mae", continue_from=str(tmp_path / "dino"))
        config.data.dir = str(tmp_path / "images")
        config.optim.update(warmup="0 steps", lr_batch_size=0)
        config.eval.every, config.checkpoint.every, config.checkpoint.keep = "2 steps", "2 steps", 1
        return train.run(config, tmp_path / name)

    return go


@pytest.mark.slow
def test_a_continued_run_is_frozen_first_and_goes_on_with_equal_bytes(runs, tmp_path, monkeypatch, capsys):
    backbones, save = {}, Checkpoints.save

    def seen(self, step, state, **record):
        backbones[step] = jax.device_get(state.params["backbone"])
        save(self, step, state, **record)

    monkeypatch.setattr(Checkpoints, "save", seen)
    end, told = runs("whole"), capsys.readouterr().err
    learned_there = mim_jax.load_run(tmp_path / "dino").params["backbone"]["blocks"]
    assert [step for step in backbones if same(backbones[step]["blocks"], learned_there)] == [2]
    figures = {row["step"]: row for row in journal.read(tmp_path / "whole") if "health/start_cosine" in row}
    cosines = [figures[step]["health/start_cosine"] for step in (2, 4, 6)]
    assert cosines[0] == pytest.approx(1, abs=1e-6) and cosines[2] < 1 - 1e-6
    latest = journal.history(tmp_path / "whole").latest
    assert latest["eval/patch_retrieval_baseline_start"] == figures[2]["eval/patch_retrieval"]
    assert not any("untrained" in tag for tag in latest)
    assert "eval/patch_retrieval_error" in latest and latest["train/backbone_rate"] == 1
    best = max((2, 4, 6), key=lambda step: figures[step]["eval/view_retrieval"])
    assert {6, best} <= set(saved_steps(tmp_path / "whole/checkpoints"))
    assert f"best global score: {figures[best]['eval/view_retrieval']:.3f} at step {best}, kept as" in told
    assert "Cosine to the start" in (tmp_path / "whole" / report.FILE).read_text()

    def killed(self, state):
        if state.step == 4:
            raise RuntimeError("killed")
        return scores(self, state)

    with monkeypatch.context() as patch:
        scores = Evaluation.scores
        patch.setattr(Evaluation, "scores", killed)
        with pytest.raises(RuntimeError, match="killed"):
            runs("again")
    for file in (tmp_path / "dino/checkpoints").rglob("*"):
        if file.is_file():
            file.unlink()  # what it began with is not needed any more
    assert same(runs("again"), end)
    assert saved_steps(tmp_path / "again/checkpoints") == saved_steps(tmp_path / "whole/checkpoints")
    assert "resuming after step 2 of 6" in capsys.readouterr().err
    again = {row["step"]: row for row in journal.read(tmp_path / "again") if "health/start_cosine" in row}
    assert [again[step] for step in figures] == list(figures.values())
