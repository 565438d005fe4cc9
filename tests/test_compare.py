"""The table of all methods: which runs it makes, in which order, and what it says of them."""

import json
import re
import resource
import sys
import time

import pytest

from mim_jax import compare, load_config
from mim_jax.config import leaves


def finished_run(workdir, config, rows, **record):
    """What a run leaves, as far as the table reads it."""
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = compare.Run(workdir, "", {})
    if record:
        run.note(**record)
    return run


def pretrained(folder, name, seed, knn, images_per_s, **record):
    config = load_config(f"tests/tiny.py:{name}").unlock()
    config.seed = seed
    rows = [
        {"step": 1, "perf/images_per_s": images_per_s},
        {"step": 2, "eval/knn": knn, "eval/probe": 0.5, "eval/view_retrieval": 0.25, "perf/images_per_s": images_per_s},
    ]
    return finished_run(folder / f"{name}_{seed}", config, rows, **record)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """What a step costs is counted once for all runs of this file that differ in what costs nothing."""
    found, step_flops = {}, compare.step_flops

    def remembered(config):
        key = repr(config.to_dict() | {"seed": 0, "init_from": None})
        if key not in found:
            found[key] = step_flops(config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "step_flops", remembered)
        yield


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "done", lambda run: True)
    return [
        pretrained(tmp_path, "simmim", 0, 0.3, 100, mib=500),
        pretrained(tmp_path, "mae", 0, 0.3, 200, mib=400, test={"eval/knn": 0.4, "eval/probe": 0.6}),
        pretrained(tmp_path, "mae", 1, 0.3, 200, mib=450, test={"eval/knn": 0.5, "eval/probe": 0.6}),
    ]


def test_a_row_for_each_method(runs, tmp_path):
    """The mean and its standard error over the seeds, costs relative to SimMIM; test images where they were read."""
    compare.write_page(tmp_path, compare.table_of(runs))
    text = (tmp_path / "comparison.md").read_text()
    header, _, simmim, mae = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    row = dict(zip(header, mae))
    assert row["method"] == "MAE" and row["k-NN"] == "0.450 ± 0.050" and row["linear"].startswith("0.600 ± 0.000")
    assert row["view retrieval"] == "" and row["peak memory"] == "450 MiB" and row["cost"].startswith("0.50 (")
    row = dict(zip(header, simmim))
    assert row["method"] == "SimMIM" and row["k-NN"] == "0.300" and row["cost"].startswith("1.00 (")
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<tr>") == 3 and "http" not in page and page.count("<polyline") == 4


def test_fine_tuned_runs_belong_to_the_row_they_began_with(runs, tmp_path):
    """And those that began with nothing are the first row."""
    for name, begun, accuracy in (("a", runs[1].workdir, 0.5), ("b", runs[2].workdir, 0.7), ("c", None, 0.25)):
        config = load_config("tests/tiny.py:supervised").unlock()
        config.init_from = begun and str(begun)
        runs.append(finished_run(tmp_path / name, config, [{"step": 2, "eval/accuracy": accuracy}]))
    rows = compare.table_of(runs).rows
    assert [(row.title[:10], row.fine) for row in rows] == [("supervised", [0.25]), ("SimMIM", []), ("MAE", [0.5, 0.7])]
    assert [len(row.commands) for row in rows] == [1, 1, 4]


def test_only_runs_that_differ_in_the_seed_are_seeds(runs, tmp_path, monkeypatch):
    """Others have rows of their own, which say what is different, or are left out with the reason."""

    def made(name, method="supervised", row=None, **changes):
        config = load_config(f"tests/tiny.py:{method}").unlock()
        config.update_from_flattened_dict(changes)
        return finished_run(tmp_path / name, config, [{"step": 2, **({"eval/accuracy": 0.5} if row is None else row)}])

    mae = {"eval/knn": 0.9, "eval/probe": 0.5, "eval/view_retrieval": 0.25}
    longer = made("longer", "mae", mae, total="7 steps")
    begun = made("begun", "mae", mae, init_from=str(runs[1].workdir))
    tuned = made("tuned", init_from=f"{runs[1].workdir}/checkpoints/2")
    other = made("other", init_from=str(runs[1].workdir), **{"optim.lr": 0.125})
    lost = made("lost", init_from="/elsewhere/mae")
    new = made("new", row={})
    linear = made("linear", "linear", init_from=str(runs[1].workdir))
    broken, foreign = tmp_path / "broken", tmp_path / "foreign"
    for folder, text in ((broken, "{"), (foreign, '{"hidden_size": 3}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    half = made("half", "mae", mae)
    monkeypatch.setattr(compare, "done", lambda run: run != half)
    more = [longer, begun, tuned, other, lost, new, linear, *(compare.Run(each, "", {}) for each in (broken, foreign)), half]
    table = compare.table_of([*runs, *more])
    assert {row.title: (row.knn, row.fine) for row in table.rows} == {
        "SimMIM": ([0.3], []),
        "MAE": ([0.4, 0.5], [0.5]),
        "MAE, total=7 steps": ([0.9], []),
        "MAE, init_from": ([0.9], []),
        "supervised, from scratch": ([], []),
    }
    reasons = {line.partition(": ")[0].rpartition("/")[2]: line.partition(": ")[2] for line in table.left_out}
    assert set(reasons) == {"other", "lost", "new", "linear", "broken", "foreign", "half"}
    assert reasons["half"] == "it is not finished" and "other settings" in reasons["other"]
    text = compare.notes(table)
    assert "Left out: " in text[-1] and "of the images that a run is evaluated on" in text[0]


def test_a_workdir_of_another_command_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "done", lambda run: True)
    small, large = (compare.pretraining(tmp_path, "eva", 0, images) for images in (6400, 64_000))
    config = load_config(small.recipe).unlock()
    config.update_from_flattened_dict({key: str(v) if key == "target.workdir" else v for key, v in small.changes.items()})
    finished_run(small.workdir, config, [], seconds=1)
    assert small.finished and not large.finished
    with pytest.raises(ValueError, match="eva_0 was made with another total, .*: give another folder"):
        large.go()


def test_what_needs_a_failed_run_is_not_begun(tmp_path, monkeypatch):
    begun = []

    def go(run):
        begun.append(run.workdir.name)
        raise ChildProcessError("no memory")

    monkeypatch.setattr(compare.Run, "go", go)
    with pytest.raises(SystemExit, match="mae_0_fine: it needs .*mae_0"):
        compare.pretrain(tmp_path, list(compare.plan(tmp_path, ["mae"], 1, 6400)))
    assert begun == ["mae_0"]


def test_a_run_is_told_to_stop_and_its_own_memory_is_measured(tmp_path, monkeypatch):
    """Not that of this process, which is what `wait` reports on Linux."""
    run = compare.Run(tmp_path / "a", "", {})
    code = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path('told').touch()))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Run, "command", [sys.executable, "-c", code + "time.sleep(1)"])
    monkeypatch.setattr(compare, "done", lambda run: True)
    run.go()
    assert 1 < run.record["mib"] < 100 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    monkeypatch.setattr(compare.Run, "command", [sys.executable, "-c", code + "time.sleep(60)"])
    slept = iter([*[None] * 5, KeyError])
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds) or raised(next(slept)))
    with pytest.raises(KeyError):
        run.go()
    assert (tmp_path / "told").exists()


def raised(error):
    if error:
        raise error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--runs=", "--runs= matches no finished run"),
        ("--runs=x --budget=3", "--runs makes a page of runs that exist: --budget, --seeds"),
        ("--budget=nan", "--budget is nan, but must be 6.4 minutes or more"),
        ("--budget=inf", "--budget is inf"),
        ("--budget=text", "flag --budget=text"),
        ("--seeds=0", "--seeds is 0, but must be 1 or more"),
        ("--methods=mea", "--methods has mea, but there are only dino"),
        ("--out=gs://b/x", "--out is gs://b/x, but must be a folder of this machine"),
        ("more", "not understood: more"),
    ],
)
def test_words_of_the_command(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", *words.split()])
    assert str(stop.value).startswith(f"error: {told}") and "\n" not in str(stop.value) and not list(tmp_path.iterdir())


def test_a_failed_run_is_named_and_does_not_end_the_others(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "done", lambda run: run.record.get("seconds", 0) > 1)
    monkeypatch.setattr(compare, "on_test_images", lambda run: {"eval/knn": 0.75})

    def go(run):
        if run == runs[1]:
            raise ChildProcessError("mim_jax ended early: no disk")
        run.note(seconds=2)

    monkeypatch.setattr(compare.Run, "go", go)
    steps = [("simmim", 0, "pretraining", runs[0]), ("mae", 0, "pretraining", runs[1]), ("mae", 1, "pretraining", runs[2])]
    with pytest.raises(SystemExit, match="some runs failed:\nmim_jax ended early: no disk"):
        compare.pretrain(tmp_path, steps)
    assert [run.record.get("test", {}).get("eval/knn") for run in runs] == [0.75, 0.4, 0.5]  # what was read is not read again
    assert "| MAE |" in (tmp_path / "comparison.md").read_text() and "2/3  mae, seed 0" in capsys.readouterr().out


def test_commands_make_the_same_config(runs):
    """Each row has the commands of its runs, with all that differs from the recipe."""
    (command,) = compare.table_of(runs[:1]).rows[0].commands
    assert command.startswith("mim_jax --config=") and f"--workdir={runs[0].workdir}" in command
    run = runs[1]
    config = run.config
    config.optim.lr = 0.125
    config.data.num_examples = 7  # found by the run
    assert re.findall(r"--config\.(\S+)=(\S+)", compare.command_of(config, run.workdir)) == [("optim.lr", "0.125")]


def test_each_run_finds_what_it_needs(tmp_path):
    plan = list(compare.plan(tmp_path, [*compare.ENTRIES, compare.SCRATCH], seeds=2, images=64_000))
    assert len({run.workdir for *_, run in plan}) == len(plan) == 2 * (2 * len(compare.ENTRIES) + 1) + len(compare.TARGETS)
    made = set()
    for *_, run in plan:
        for key in ("target.workdir", "init_from"):
            if key in run.changes:
                assert str(run.changes[key]) in made, (run.workdir, key)
        made.add(str(run.workdir))


@pytest.mark.parametrize("name", [*compare.ENTRIES, *compare.TARGETS])
def test_what_is_changed_are_keys_of_the_recipe(tmp_path, name):
    run = compare.pretraining(tmp_path, name, 0, 64_000)
    assert run.changes.keys() <= {key for key, _ in leaves(load_config(run.recipe))}


def test_time_left(tmp_path, monkeypatch):
    """Runs of a kind that has none yet are taken to last as long as the others do on average."""
    plan = list(compare.plan(tmp_path, ["mae", "simmim"], seeds=2, images=6400))
    assert compare.time_left(plan) == "time left unknown"
    monkeypatch.setattr(compare, "done", lambda run: run.workdir.exists())
    for (*_, run), seconds in zip(plan, (60, 180)):  # MAE's two
        run.workdir.mkdir()
        run.note(seconds=seconds)
    # SimMIM's two of the first seed, MAE's two of the second, SimMIM's again: 2 + 2 + 1 + 3 + 2 + 2
    assert compare.time_left(plan) == "about 12 minutes left"
