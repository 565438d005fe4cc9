"""The table of all methods: which runs it makes, in which order, and what it says of them."""

import json
import re

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


@pytest.fixture
def runs(tmp_path):
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
    rows = compare.table_of(runs)
    assert [(row.title[:10], row.fine) for row in rows] == [("supervised", [0.25]), ("SimMIM", []), ("MAE", [0.5, 0.7])]
    assert [len(row.commands) for row in rows] == [1, 1, 4]


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
    (command,) = compare.table_of(runs[:1])[0].commands
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
