"""The command line: what it refuses and how it says so, what it derives from the config, and one whole run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags, logging
from PIL import Image

from mim_jax import command as program
from mim_jax import config as configs
from mim_jax import dry_run, durations, journal, load_config, make_method, make_train_step, optim, train
from mim_jax.learned import abstract_target
from mim_jax.sharding import make_mesh
from mim_jax.state import abstract_state

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests/tiny.py")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mim_jax.main", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def command():
    """A function: the command line in this process, up to its exit -> what it exits with."""

    def run_here(*arguments: str):
        with pytest.raises(SystemExit) as stop:
            program.main(program.parse(["mim_jax", *arguments]))
        return stop.value.code

    verbosity = logging.get_verbosity()
    yield run_here
    logging.set_verbosity(verbosity)
    for name in [name for name in flags.FLAGS if name.partition(".")[0] == "config"]:
        delattr(flags.FLAGS, name)
    for name in ("workdir", "dry_run", "plan", "coordinator", "processes", "process"):
        flags.FLAGS[name].unparse()


DEMO = "--config=dino:demo"
WRONG = [
    ([], "error: --config is missing, for example mim_jax --config=dino:demo --workdir=runs/dino"),
    ([DEMO], "error: --workdir is missing, for example mim_jax --config=dino:demo --workdir=runs/dino"),
    (["--config=none:demo"], "error: there is no config file {cwd}/none; mim_jax comes with beit, beit2, clip, curate, "),
    (["--config", "configs/dino.py:dem"], "configs/dino.py has no variant 'dem', only vits16, "),
    ([DEMO, "--config.method=dinoo", "--dry_run"], "no mim_jax/methods/dinoo.py"),
    (["--config=clip:b16", "--dry_run"], "clip:b16 is no method but a frozen network that others learn from: --config.target"),
    (["--config=eva:demo", "--config.model.arch=eva3", "--dry_run"], "model.arch is 'eva3', but must be "),
    ([DEMO, "--wrkdir=x"], "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ([DEMO, "runs"], "error: not understood: runs"),
    # Keys that do not exist: those of all sections, and durations by their old and their usual names
    ([DEMO, "--config.optim.lrr=1"], "error: the config has no key optim.lrr; did you mean optim.lr?"),
    ([DEMO, "--config.batch_size=1"], "batch_size; did you mean data.batch_size or eval.batch_size?"),
    ([DEMO, "--config.optim.patch_size=1"], "optim.patch_size; did you mean model.patch_size?"),
    ([DEMO, "--config.zzz=1"], "error: the config has no key zzz"),
    ([DEMO, "--config.optim=1"], "error: optim is a section of the config, with optim.beta1, "),
    ([DEMO, "--config.optim.steps=6"], 'no key optim.steps; it is total, with a unit: --config.total="6 steps"'),
    ([DEMO, "--config.total_epochs=2.0"], 'it is total, with a unit: --config.total="2.0 epochs"'),
    ([DEMO, "--config.total_examples=99"], 'it is total, with a unit: --config.total="99 examples"'),
    ([DEMO, "--config.eval.every_steps=6"], 'it is eval.every, with a unit: --config.eval.every="6 steps"'),
    ([DEMO, "--config.checkpoint.every_epochs=6"], '--config.checkpoint.every="6 epochs"'),
    ([DEMO, "--config.log_every_steps", "6"], "it is log_every, with a unit: "),
    ([DEMO, "--config.optim.warmup_epochs=6"], '--config.optim.warmup="6 epochs"'),
    ([DEMO, "--config.warmup_steps=6"], '--config.optim.warmup="6 steps"'),
    ([DEMO, "--config.loss.warmup_teacher_temp_epochs=6"], '--config.loss.teacher_temp_warmup="6 epochs"'),
    (["--config=simmim:vitb16", "--config.optim.decay_epochs=6"], '--config.optim.decay_at="6 epochs"'),
    (["--config=dvae:demo", "--config.loss.kl_steps=6"], '--config.loss.kl_warmup="6 steps"'),
    (["--config=beit:demo", "--config.target.network.model.hiden=1"], "; did you mean target.network.model.hidden"),
    # Values of another type
    ([DEMO, "--config.model.dim=big"], 'error: model.dim is "big", but must be a whole number'),
    ([DEMO, "--config.optim.lr=low"], 'error: optim.lr is "low", but must be a number'),
    ([DEMO, "--config.eval.img_size=1.5"], 'error: eval.img_size is "1.5", but must be a whole number'),
    ([DEMO, "--config.head.use_bn=maybe"], 'error: head.use_bn is "maybe", but must be true or false'),
    ([DEMO, "--config.data.mean=(1,"], 'error: data.mean is "(1,", but must be a tuple'),
    # Values that cannot be, more of them in test_config.py
    ([DEMO, "--config.model.drop_path_rate=2", "--workdir={tmp}"],
     "error: model.drop_path_rate is 2.0, but must be in [0, 1)"),
    ([DEMO, "--config.total=2", "--dry_run"], 'error: total is "2", but must be a duration with its unit'),
    ([DEMO, "--config.mesh.fsdp=3", "--dry_run"], "error: mesh.data=-1 x mesh.fsdp=3 cannot be made of the 8 devices"),
    ([DEMO, "--config.data.batch_size=12", "--dry_run"],
     "error: data.batch_size is 12, but must be a multiple of the 8 devices"),
    (["--config=vqkd:demo", "--config.target.config=dvae:dalli", "--dry_run"], "dvae.py has no variant 'dalli', only dalle"),
    ([DEMO, "--config.data.batch_size=12", "--config.model.remat=auto", "--dry_run"],
     "error: data.batch_size is 12, but must be a multiple of the 8 devices"),
    # Devices to plan for
    ([DEMO, "--plan=v4-8"], "error: --plan=v4-8 is not known: there are v5e-8, v5e-256, "),
    ([DEMO, "--plan=h100-0"], "error: --plan=h100-0 is not known"),
    ([DEMO, "--plan=h100-12"], "error: --plan=h100-12: more than 8 GPUs must be a multiple of 8"),
    ([DEMO, "--plan=v5e-512"], "error: --plan=v5e-512: a slice has a power of two of chips, and at most 256"),
    ([DEMO, "--plan=v5litepod-6"], "error: --plan=v5litepod-6: a slice has a power of two of chips, and at most 256"),
    ([DEMO, "--plan=v5p-1"], "a slice has a power of two of chips, counted as 2 cores each, and at most 6144"),
    # Paths
    ([DEMO, "--workdir={tmp}", "--config.data.name=folder"], "error: data.dir is missing: set --config.data.dir to a folder"),
    ([DEMO, "--workdir={tmp}", "--config.data.name=folder", "--config.data.dir=no/such"],
     "error: There is no folder {cwd}/no/such: set --config.data.dir to a folder of images."),
    ([DEMO, "--workdir={tmp}", "--config.data.name=folder", "--config.data.dir=~/no"], "There is no folder {home}/no: "),
    (["--config=dino", "--workdir={tmp}", "--config.data.dir={tmp}"],
     "Prepare it where TensorFlow is installed with `tfds build imagenet2012 --data_dir={tmp}"),
    # Several hosts
    ([DEMO, "--workdir={tmp}", "--processes=2"],
     "error: of --coordinator=HOST:PORT --processes=N --process=I all three are needed, or none where the cluster tells them"),
    ([DEMO, "--workdir={tmp}", "--coordinator=host", "--processes=2", "--process=0"],
     "error: coordinator is 'host', but must be HOST:PORT, where process 0 listens"),
    ([DEMO, "--workdir={tmp}", "--coordinator=host:0", "--processes=2", "--process=0"], "coordinator is 'host:0', but must"),
    ([DEMO, "--workdir={tmp}", "--coordinator=host:1", "--processes=0", "--process=0"], "error: processes is 0, but must be"),
    ([DEMO, "--workdir={tmp}", "--coordinator=host:1", "--processes=2", "--process=2"],
     "error: process is 2, but must be in [0, 2), as there are 2 processes"),
    ([DEMO, "--workdir={tmp}", "--coordinator=host:1", "--processes=2", "--process=b"], "error: flag --process=b: "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[(arguments or [""])[-1][-40:] for arguments, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, command, arguments, message):
    folders = {"tmp": tmp_path / "run", "home": tmp_path / "home", "cwd": tmp_path}
    monkeypatch.setenv("HOME", str(folders["home"]))
    monkeypatch.chdir(tmp_path)
    told = command(*(argument.format(**folders) for argument in arguments))
    assert told.startswith("error: ") and "\n" not in told
    assert message.format(**folders) in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--config=dino:dem"], [DEMO, "--config.optim.lrr=1"], [DEMO, "--config.total=", "--dry_run"]]
)
def test_a_command_that_is_refused_fails_without_a_traceback(tmp_path, arguments):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_help_is_one_screen_with_examples(command, capsys):
    assert command("--help") is None
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert len(lines) <= 33 and max(map(len, lines)) <= 128
    assert sum(line.lstrip().startswith("mim_jax --config=") or "mim_jax --config=mae" in line for line in lines) == 3
    assert all(f"  {path.stem} " in told for path in (ROOT / "configs").glob("*.py") if path.stem != "curate")


def test_paths_begin_in_the_home_folder_or_where_the_user_stands(tmp_path, monkeypatch, command):
    seen = {}
    monkeypatch.setattr(train, "run", lambda config, workdir, stop: (seen.update(config=config, workdir=workdir), sys.exit()))
    monkeypatch.setenv("HOME", "/home/of/me")
    monkeypatch.chdir(tmp_path)
    paths = ["--workdir=~/runs", "--config.data.dir=images", "--config.init_from=~/one", "--config.resume=two"]
    command("--config=beit:demo", *paths)
    config = seen["config"]
    assert seen["workdir"] == "/home/of/me/runs"
    assert (config.data.dir, config.init_from, config.resume) == (f"{tmp_path}/images", "/home/of/me/one", f"{tmp_path}/two")
    assert configs.absolute("gs://bucket/images") == "gs://bucket/images"


def test_errors_of_the_code_itself_keep_their_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    result = run(f"--config={tmp_path}/broken.py", "--dry_run")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_overriding_the_batch_size_moves_steps_and_learning_rate():
    def recipe(batch_size):
        config = load_config(f"{ROOT}/configs/dino.py:vits16")
        config.data.batch_size = batch_size
        total, warmup = durations.total_steps(config), durations.steps(config, "optim.warmup")
        return config, total, warmup, float(optim.schedules(config)["lr"](warmup)), make_method(config).schedules

    config, total, warmup, peak, schedules = recipe(1024)
    assert (total, warmup) == (800 * (1_281_167 // 1024), 10 * (1_281_167 // 1024))
    assert peak == pytest.approx(5e-4 * 1024 / 256)
    _, smaller_total, smaller_warmup, smaller_peak, smaller_schedules = recipe(256)
    assert (smaller_total, smaller_warmup) == (800 * (1_281_167 // 256), 10 * (1_281_167 // 256))
    assert smaller_peak == pytest.approx(peak / 4)
    for name in ("weight_decay", "teacher_temp", "momentum_teacher"):  # the same course over the epochs
        for step, smaller_step in ((0, 0), (total // 2, smaller_total // 2), (total, smaller_total)):
            assert float(smaller_schedules[name](smaller_step)) == pytest.approx(float(schedules[name](step)), rel=1e-3)


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        yield


VARIANTS = [
    pytest.param(f"{path.stem}:{variant}", marks=pytest.mark.slow if number else [])  # demos are the base of tests/tiny.py
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("clip", "curate")  # a frozen network, and what makes data sets
    for number, variant in enumerate(runpy.run_path(str(path))["VARIANTS"])
]


@pytest.mark.parametrize("spec", VARIANTS)
def test_every_variant_makes_a_step(one_device, spec):
    config = load_config(spec)
    method = make_method(config)
    state = abstract_state(method, config)
    args = state, abstract_target(method, config), dry_run.abstract_batch(method, config)
    new, figures = jax.eval_shape(make_train_step(method, config), *args)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state))
    assert {"train/loss", "train/lr", "train/grad_norm", "train/skipped", "step"} <= figures.keys()
    assert figures["train/loss"].shape == ()


# Plans.


def test_plan_of_a_run_on_8_devices():
    config = load_config(TINY)
    config.crops.local_crops_number = 0
    config.mesh.update(data=1, fsdp=8)
    text = dry_run.plan(config)
    method = make_method(config)
    params = jax.tree.leaves(jax.eval_shape(method.init, jax.random.key(0))[0])
    count = sum(leaf.size for leaf in params)
    assert f"Total: {count:,} -- {4 * count:,} bytes" in text
    assert "backbone/blocks/qkv/kernel" in text
    assert "mesh: data=1 x fsdp=8" in text
    assert "(None, None, 'fsdp')" in text
    assert "8 x cpu, global batch 8, 6 steps" in text
    for name in ("parameters", "teacher", "optimizer", "peak", "state donated", "largest buffers:", "FLOPs per step"):
        assert name in text


def test_largest_buffers_are_what_a_program_keeps():
    def run(x):
        y = jnp.sin(x @ x.T) * 2  # a product, then a fusion of the same shape
        return (y @ y).sum(), y[:10]

    text = jax.jit(run).lower(jnp.ones((256, 64))).compile().as_text()
    (size, shape, name), *rest = dry_run.buffers(text)
    assert (size, shape) == (4 * 256 * 256, "f32[256,256]") and "dot_general" in name
    assert all(size < 4 * 256 * 256 for size, _, _ in rest)


def test_bytes_of_a_device_are_those_of_its_shards():
    config = load_config(TINY)
    for data, fsdp in ((8, 1), (1, 8)):
        with jax.set_mesh(make_mesh(data, fsdp)):
            state = abstract_state(make_method(config), config)
            kernel = state.params["backbone"]["blocks"]["fc1"]["kernel"]
            array = jax.device_put(np.zeros(kernel.shape, kernel.dtype), kernel.sharding)
            assert dry_run.device_bytes([kernel]) == array.addressable_shards[0].data.nbytes == array.nbytes // fsdp


def test_flops_are_those_of_the_closed_formula(one_device):
    config = load_config(f"{ROOT}/configs/dino.py:vits16")
    dim, depth = config.model.dim, config.model.depth

    def forward(tokens):
        return 2 * depth * (tokens * 12 * dim**2 + 2 * tokens**2 * dim) + 2 * (tokens - 1) * 16 * 16 * 3 * dim

    head = 2 * (dim * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536)
    crops = 2 * forward(197) + 10 * forward(37) + 12 * head  # of the student: forward, and twice that backward
    want = 3 * crops + 2 * (forward(197) + head)
    assert want == pytest.approx(123.8e9, rel=0.002)
    assert dry_run.step_flops(config) / config.data.batch_size == pytest.approx(want, rel=0.05)


def test_flops_of_a_scanned_model_are_those_of_the_unrolled_one(one_device):
    config = load_config(TINY)
    config.crops.local_crops_number = 0
    config.model.update(depth=3, unroll=3)
    method = make_method(config)
    args = abstract_state(method, config), abstract_target(method, config), dry_run.abstract_batch(method, config)
    unrolled = make_train_step(method, config).lower(*args).cost_analysis()["flops"]
    config.model.unroll = 1
    assert dry_run.step_flops(config) == unrolled


# A whole run, as its user sees it.

BAD = ("cut.jpg", "text.png", "empty.jpg")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """(workdir, what it printed) of a run on folders with labels that hold grey, transparent and bad files."""
    data, workdir = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "first"
    rng = np.random.default_rng(0)
    modes = {"RGB": (20, 24, 3), "L": (16, 16), "RGBA": (30, 17, 4)}
    for split, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(("ant", "bee")):
            folder = data / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, shape = list(modes.items())[i % 3]
                pixels = rng.integers(100 * label, 156 + 100 * label, shape, np.uint8)
                Image.fromarray(pixels, mode=None).save(folder / f"{i}.png")
    ant = data / "train/ant"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(ant / BAD[0])
    os.truncate(ant / BAD[0], 700)
    (ant / BAD[1]).write_text("no image")
    (ant / BAD[2]).touch()
    result = run(f"--config={TINY}", f"--workdir={workdir}", f"--config.data.dir={data}", "--config.data.eval_split=val")
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_figures_of_a_run(finished):
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval/knn" in row] == [3, 6]
    assert [row["step"] for row in rows if "eval/knn_baseline_whitened" in row] == [0]
    figures = journal.history(workdir).latest
    scores = {
        "eval/knn", "eval/knn_baseline_untrained", "eval/knn_baseline_pixels", "eval/knn_baseline_whitened",
        "eval/view_retrieval", "eval/view_retrieval_baseline_untrained", "eval/view_retrieval_baseline_pixels",
        "eval/probe", "eval/probe_baseline_untrained", "eval/probe_baseline_whitened",
        "eval/knn_error", "eval/view_retrieval_error", "eval/probe_error",
    }  # fmt: skip
    assert {tag for tag in figures if tag.startswith("eval/")} == scores
    assert all(0 <= figures[tag] <= 1 for tag in scores)
    others = {"train/loss", "train/lr", "train/momentum_teacher", "perf/images_per_s", "data/bad_images", "health/rank"}
    assert others <= figures.keys()
    assert {"health/teacher_entropy", "health/kl", "health/prototype_usage", "health/center_norm"} <= figures.keys()
    assert figures["perf/images_per_s"] > 0
    assert figures["data/bad_images"] >= len(BAD)  # 48 images were drawn, of 27


def test_words_of_a_run(finished):
    workdir, result = finished
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    told = [line for line in lines if line.startswith("bad image, replaced by another one: ")]
    named = [Path(line.removeprefix("bad image, replaced by another one: ").partition(": ")[0]).name for line in told]
    assert sorted(named) == sorted(BAD)  # once, by training and evaluation together
    assert "3 of 27 sampled images are bad, such as " in result.stderr
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/6", "2/6", "3/6", "3/6", "4/6", "5/6", "6/6", "6/6"]
    assert all("loss" in line and "ETA" in line for line in steps)
    assert all("images/s" in line for line in steps[1:])  # the first step is compilation
    assert "k-NN" in steps[-1]
    figures = journal.history(workdir).latest
    baselines = ", ".join(f"{name} {figures[f'eval/knn_baseline_{name}']:.3f}" for name in ("untrained", "pixels", "whitened"))
    assert f"k-NN            {figures['eval/knn']:.3f} ({figures['eval/knn_error']:.3f})  baselines: {baselines}" in lines
    assert any(line.startswith("view retrieval") for line in lines)
    assert lines[-2] == f"features: python -m mim_jax.embed --run={workdir} --data=FOLDER --out=features.npz"
    assert lines[-1] == f"report: {workdir}/report.html"


def test_report_and_pictures_of_a_run(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    bad = int(journal.history(workdir).latest["data/bad_images"])
    for text in ("27 image files, 2 classes", "6 of 6", "out_dim: 32", f"jax {jax.__version__}"):
        assert text in page
    assert page.count("data:image/png;base64") == 3 + 8  # pictures, and images whose patches are compared
    assert bad and f">{bad}<" in page
    for name in ("crops", "attention", "neighbors"):
        with Image.open(workdir / f"pictures/{name}.png") as picture:
            assert picture.width > 100
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["data"]["num_examples"] == 27
