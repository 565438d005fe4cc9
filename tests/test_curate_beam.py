"""Curation by Apache Beam: the same bytes as by the local engine, the same components, kills, bad options."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_curate
from test_curate import ROOT, config_of, outputs

from mim_jax.curate import components, shards, stages
from mim_jax.curate.shards import Made, spans, stage

pytest.importorskip("apache_beam")
from mim_jax.curate import beam

images = test_curate.images
PROCESSES = ("--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
DATAFLOW = ("--runner=DataflowRunner", "--project=a-project", "--region=us-central1", "--temp_location=gs://a-bucket/tmp")


def run(config, workdir):
    stages.run(config, workdir)
    found = outputs(workdir)
    found.pop("report.html")  # it has the config
    assert len(found) == 3 and not list(workdir.rglob("*.tmp"))
    return found, sorted(path.name for path in workdir.iterdir())


@pytest.fixture
def small_batches(monkeypatch):
    """So that embedding has several shards. Workers get it with the embedder."""
    begin = stages.Pixels.__init__

    def begun(self, given):
        begin(self, given)
        self.batch_size = 8

    monkeypatch.setattr(stages.Pixels, "__init__", begun)


# The whole command


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("select", ["retrieve", pytest.param("balance", marks=pytest.mark.slow)])
def test_the_bytes_are_those_of_the_local_engine(images, tmp_path, select):
    want = run(config_of(images, select=select), tmp_path / "local")
    assert run(config_of(images, select=select, engine="beam", shard_rows=50), tmp_path / "beam") == want


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
def test_several_processes(images, tmp_path):
    want = run(config_of(images), tmp_path / "local")
    options = {"engine": "beam", "beam.options": PROCESSES}
    assert run(config_of(images, shard_rows=70, **options), tmp_path / "beam") == want


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
def test_two_hundred_random_divisions(images, tmp_path):
    rng, want = np.random.default_rng(0), {}
    for case in range(200):
        more = {"select": ("retrieve", "balance", "all")[case % 3]}
        more |= {"neighbors.exact": 10, "neighbors.cells": 8, "neighbors.probes": 3} if case % 2 else {}
        if (key := case % 6) not in want:
            want[key] = run(config_of(images, **more), tmp_path / f"local{key}")
        threads = ("--direct_running_mode=multi_threading", f"--direct_num_workers={rng.integers(1, 5)}")
        options = ("--runner=FnApiRunner", *(threads if case % 4 == 0 else ()))
        rows = int(rng.integers(15, 170))
        found = run(
            config_of(images, engine="beam", shard_rows=rows, **{"beam.options": options}, **more), tmp_path / f"{case}"
        )
        assert found == want[key], (case, rows, options)
        subprocess.run(["rm", "-r", tmp_path / f"{case}"], check=True)


@pytest.mark.slow
def test_kills_at_random_moments(images, tmp_path):
    """kill -9 of the command, and in the end the other engine takes over."""
    rng, killed = np.random.default_rng(0), 0
    flags = [f"--config.{key}={images}/{name}" for key, name in (("uncurated", "heap"), ("curated", "good"))]
    flags += ["--config.dedup.threshold=0.8", "--config.retrieve.k=2", "--config.shard_rows=16"]

    def start(workdir, *more):
        line = [sys.executable, "-m", "mim_jax.curate", *flags, *more, f"--workdir={tmp_path / workdir}"]
        return subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)

    def found(workdir):
        return {name: content for name, content in outputs(tmp_path / workdir).items() if name != "report.html"}

    assert start("whole").wait(300) == 0
    begin = time.monotonic()
    assert start("beam", "--config.engine=beam").wait(300) == 0
    took = time.monotonic() - begin
    assert found("beam") == found("whole")
    for _ in range(8):
        process = start("killed", "--config.engine=beam")
        time.sleep(rng.uniform(0.4, 0.9) * took)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
    assert killed > 2 and start("killed").wait(300) == 0
    assert found("killed") == found("whole") and not list((tmp_path / "killed").rglob("*.tmp"))


# Components


def graph(root, first, second, inputs):
    """A result with these edges, and what reads a shard of them."""
    parts = np.array_split(np.arange(len(first)), inputs)

    def make(i):
        return Made({"edges": components.packed([(first[parts[i]], second[parts[i]], None)])})

    made = stage(root, "graph", 1, [], {}, list(range(inputs)), make)
    return made, functools.partial(beam.edges_in, made.folder)


def test_components_are_those_of_union_find(tmp_path):
    rng, none, many = np.random.default_rng(0), np.zeros(0, np.int32), np.arange(60, dtype=np.int32)
    mixed = rng.permutation(60).astype(np.int32)
    cases = {"none": (none, none), "chain": (many[:-1], many[1:]), "mixed chain": (mixed[:-1], mixed[1:])}
    cases |= {"star": (np.full(59, 59, np.int32), many[:-1]), "itself": (many, many[::-1])}
    cases |= {f"random {i}": rng.integers(0, 60, (2, 20 * i + 1)).astype(np.int32) for i in range(4)}
    for name, (first, second) in cases.items():
        want = components.components(60, [(first, second, np.ones(len(first), np.float32))])
        rows, root = int(rng.integers(1, 70)), tmp_path / name
        found, read = graph(root, first, second, int(rng.integers(1, 4)))
        got = beam.Beam(["--runner=FnApiRunner"]).components(functools.partial(stage, root), found, read, {}, 60, rows)
        assert np.array_equal(got, want) and got.dtype == want.dtype, name


def test_a_kill_between_rounds_loses_none(tmp_path):
    first, second = (np.random.default_rng(0).permutation(200).astype(np.int32)[at] for at in (slice(-1), slice(1, None)))
    found, read = graph(tmp_path, first, second, 2)

    def rounds(stop):
        told = []

        def tell(line):
            told.append(line)
            if len(told) == stop:
                raise test_curate.Killed

        begun = functools.partial(stage, tmp_path, tell=tell)
        try:
            labels = beam.Beam(["--runner=FnApiRunner"]).components(begun, found, read, {}, 200, 64)
        except test_curate.Killed:
            return None
        assert np.array_equal(labels, np.zeros(200))
        return len(told)

    assert rounds(3) is None and rounds(2) is None  # at the third round, then at the fourth
    assert len(list(tmp_path.glob("stars-*/manifest.json"))) == 3 and rounds(0) >= 2
    assert rounds(0) == 0  # all are there


# Bad input


BAD = [
    (("--runner=Nope",), r"beam.options=\('--runner=Nope',\): Unexpected pipeline runner: Nope. Valid"),
    (("--runner=FnApiRunner", "--direct_running_mode=fast"), "argument --direct_running_mode: invalid choice: 'fast'"),
    (("--runner=FnApiRunner", "--direct_num_worker=2"), "beam.options has --direct_num_worker, which Beam .* does not know"),
    (("--runner=DataflowRunner",), "Missing required option: project"),
    (DATAFLOW, "the workers of DataflowRunner are other machines, and the workdir is a folder of this one: .*beam.shared=True"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=range(len(BAD)))
def test_bad_options(images, tmp_path, options, told):
    with pytest.raises(ValueError, match=told) as error:
        stages.run(config_of(images, engine="beam", **{"beam.options": options}), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_a_worker_cannot_write_is_told(tmp_path, monkeypatch):
    make, engine = (lambda span: Made({"x": np.arange(*span)})), beam.Beam(["--runner=FnApiRunner"])
    begun = functools.partial(stage, tmp_path, "a", 1, [], {}, spans(10, 3), make, engine)
    save, left = np.save, [2]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(shards.np, "save", full)
    with pytest.raises(ValueError, match=r"cannot write: No space left on device: '.*a-.*\.parts-.*tmp'$"):
        begun()
    assert not list(tmp_path.rglob("manifest.json")) and len(list(tmp_path.rglob("*.npy"))) == 2
    left[0] = 2  # the finished ones are used
    assert np.array_equal(begun().array("x"), np.arange(10))


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(Exception, match="division or modulo by zero"):
        stage(tmp_path, "a", 1, [], {}, [0, 1], lambda i: 1 // 0, beam.Beam(["--runner=FnApiRunner"]))


# Dataflow, which is not run


def test_the_graphs_for_dataflow(tmp_path):
    """They are built with the options that Dataflow asks for, and are small, whatever a stage needs."""
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
    from apache_beam.runners.pipeline_utils import group_by_key_input_visitor, validate_pipeline_graph
    from apache_beam.transforms.environments import DockerEnvironment

    engine, needed = beam.Beam(DATAFLOW, shared=True), np.zeros(10**6)

    def make(folder, i, *given):
        return needed[i]

    one = engine.graph(tmp_path, make, range(1000))
    round_of = engine.round_graph(make, 1000, 64, tmp_path, make, range(1000))
    for pipeline, groups in ((one, 1), (round_of, 5)):  # one for each Create, which spreads what it makes
        assert isinstance(pipeline.runner, DataflowRunner)
        for visitor in (
            DataflowRunner.combinefn_visitor(),
            DataflowRunner.side_input_visitor(),
            group_by_key_input_visitor(True),
        ):
            pipeline.visit(visitor)
        graph = pipeline.to_runner_api(default_environment=DockerEnvironment.from_container_image("an/image"))
        validate_pipeline_graph(graph)
        urns = [each.spec.urn for each in graph.components.transforms.values()]
        assert urns.count("beam:transform:group_by_key:v1") == groups
        assert len(graph.SerializeToString()) < 200_000


def test_a_worker_that_does_not_see_the_workdir(tmp_path):
    with pytest.raises(OSError, match="does not see .*/other: all workers must have the workdir under this path"):
        beam.loaded(tmp_path / "other" / "a.tmp")
