"""What a run writes: figures that survive kills and full disks, progress lines, the report."""

import base64
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from mim_jax import health, journal, report
from mim_jax.journal import Journal


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / journal.FILE).read_text().splitlines()]


def events(workdir: Path) -> list[event_pb2.Event]:
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # TFRecord: length, checksum, record, checksum
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_figures_are_one_object_a_line_at_once(tmp_path):
    with Journal(tmp_path, 10) as writer:
        writer.write(0, {"eval/knn": 0.25, "health/rank": np.float32(2)})
        writer.write(10, {"train/loss": jnp.float32(1.5), "train/steps": 3})
        assert lines(tmp_path) == [  # before the file is closed
            {"step": 0, "eval/knn": 0.25, "health/rank": 2.0},
            {"step": 10, "train/loss": 1.5, "train/steps": 3.0},
        ]
    scalars = [(event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value]
    assert scalars == [(0, "eval/knn", 0.25), (0, "health/rank", 2), (10, "train/loss", 1.5), (10, "train/steps", 3)]


def test_figures_that_are_not_finite_are_null_and_the_line_stays_json(tmp_path):
    with Journal(tmp_path, 10) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -jnp.inf, "d": 1.0})
    assert "NaN" not in (tmp_path / journal.FILE).read_text()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with Journal(tmp_path, 10) as writer:
        for step in range(6):
            writer.write(step, {"train/loss": step})
            if step % 2 == 0:
                writer.write(step, {"eval/knn": step})
    with (tmp_path / journal.FILE).open("a") as file:
        file.write('{"step": 6, "train/lo')  # torn by a kill
    with Journal(tmp_path, 10, resume_step=2) as writer:
        for step in range(3, 8):
            writer.write(step, {"train/loss": step})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(8))
    assert [row["step"] for row in rows if "eval/knn" in row] == [0, 2]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 3]  # TensorBoard hides what the first run said about steps from 3 on


def test_a_run_from_scratch_forgets_the_one_before(tmp_path):
    for _ in range(2):
        with Journal(tmp_path, 10) as writer:
            writer.write(0, {"a": 1})
    assert len(lines(tmp_path)) == 1


def test_a_killed_process_loses_no_line(tmp_path):
    program = f"""
import os, signal
from mim_jax.journal import Journal
writer = Journal({str(tmp_path)!r}, 50)
for step in range(50):
    writer.write(step, {{"train/loss": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in lines(tmp_path)] == list(range(50))
    told = [event.step for event in events(tmp_path) if event.summary.value]
    assert told == list(range(50))


def test_read_leaves_out_what_is_not_a_whole_line(tmp_path):
    assert journal.read(tmp_path) == []
    damaged = ["", "[1]", '{"a": 3}', '{"step": "1"}', '{"step": 1, "a": "2"}', '{"step": 1, "a": 1e999}', "[" * 100_000]
    (tmp_path / journal.FILE).write_text("\n".join(['{"step": 1, "a": 2}', *damaged, '{"step": 2, "a"']))
    assert journal.read(tmp_path) == [{"step": 1, "a": 2}]


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write.*file/run/metrics.jsonl"):
        Journal(tmp_path / "file" / "run", 10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_named(tmp_path):
    writer = Journal(tmp_path, 10)
    writer._lines.close()
    writer._lines = open("/dev/full", "w", buffering=1)
    with pytest.raises(OSError, match=r"cannot write: No space left.*metrics.jsonl"):
        writer.write(1, {"a": 1})
    with pytest.raises(OSError, match="metrics.jsonl"):
        writer.close()


def test_a_picture_is_kept_for_the_report_and_shown_in_tensorboard(tmp_path):
    with Journal(tmp_path, 10) as writer:
        writer.picture(0, "crops", Image.new("RGB", (4, 3), "red"))
        writer.picture(5, "crops", Image.new("RGB", (4, 3), "blue"))
    kept = Image.open(tmp_path / "pictures" / "crops.png")
    assert kept.size == (4, 3) and kept.getpixel((0, 0)) == (0, 0, 255)
    shown = [(event.step, value.tag, value.image.width) for event in events(tmp_path) for value in event.summary.value]
    assert shown == [(0, "crops", 4), (5, "crops", 4)]


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Journal(tmp_path / "run", 10) as writer:
        writer.write(0, {"a": 1})
        writer.picture(0, "a", Image.new("RGB", (1, 1)))
        writer.save("config.json", b"{}")
        writer.advance(1)
        writer.show({"train/loss": 1.0})
        writer.print("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    with Journal(tmp_path, 10) as writer:
        writer.save("config.json", b"first")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write: No space left.*config.json"):
            patch.setattr(Path, "replace", no_space)
            writer.save("config.json", b"second")
    assert (tmp_path / "config.json").read_bytes() == b"first" and not list(tmp_path.glob("*.tmp"))


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Else a crash of the machine can leave an empty file under the name."""
    (tmp_path / "config.json").write_bytes(b"first")
    (tmp_path / "config.json.tmp").write_bytes(b"left by a kill, and longer than the file")
    synced = []

    def fsync(number):
        synced.append(os.fstat(number).st_size)
        assert (tmp_path / "config.json").read_bytes() == b"first"

    monkeypatch.setattr(os, "fsync", fsync)
    journal.write_whole(tmp_path / "config.json", b"second")
    assert synced == [6] and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"second"


def test_an_error_while_lines_are_dropped_keeps_them_all(tmp_path, monkeypatch):
    with Journal(tmp_path, 10) as writer:
        for step in range(6):
            writer.write(step, {"train/loss": step})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write: No space left"):
        patch.setattr(os, "fsync", no_space)
        Journal(tmp_path, 10, resume_step=2)
    assert [row["step"] for row in lines(tmp_path)] == list(range(6))


def no_space(*_):
    raise OSError(28, "No space left on device")


# Progress


def test_progress_in_a_log_file_is_one_line_for_each_show(tmp_path):
    file = io.StringIO()
    with Journal(tmp_path, 10, file=file) as writer:
        writer.show({"eval/knn": 0.25})
        for step in range(1, 5):
            writer.advance(step)
        writer.show({"train/loss": jnp.float32(2.5), "perf/images_per_s": 1234.5, "health/kl": 1})
        writer.print("saved")
    first, second, third = file.getvalue().splitlines()
    assert first == "step 0/10 | k-NN 0.250 | ETA ?"
    assert second.startswith("step 4/10 | loss 2.5000 | 1,234 images/s | k-NN 0.250 | ETA 0:0")
    assert third == "saved"


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with Journal(tmp_path, 10, resume_step=2, file=file) as writer:
        writer.show({"train/loss": 2.5, "eval/knn": 0.25})
        writer.print("saved")
        for step in range(3, 11):
            writer.advance(step)
    text = file.getvalue()
    assert "\r" in text and "loss 2.5000 | k-NN 0.250" in text and "saved\n" in text
    assert "2/10" in text and "10/10" in text


def test_times_leave_out_compilation_and_speed_leaves_out_pauses(tmp_path):
    now, file = [0.0], io.StringIO()
    writer = Journal(tmp_path, 101, batch_size=50, file=file, clock=lambda: now[0])
    with writer.paused():
        now[0] += 100
    assert writer.images_per_s() is None
    now[0] = 500  # compilation
    writer.advance(1)
    assert writer.images_per_s() is None
    for step in range(2, 12):
        now[0] += 1
        writer.advance(step)
    writer.show({})
    assert "ETA 1:30" in file.getvalue()
    with pytest.raises(KeyError), writer.paused():
        now[0] += 1000
        raise KeyError
    assert writer.images_per_s() == 50
    now[0] += 2
    writer.advance(12)
    assert writer.images_per_s() == 25
    assert writer.images_per_s() is None
    writer.close()


# Report


VERDICT = health.Verdict("collapsing", "teacher entropy 98% of uniform <b>")


def write_run(workdir: Path) -> None:
    with Journal(workdir, 1000) as writer:
        writer.write(0, {"eval/knn_baseline_untrained": 0.271, "eval/knn_baseline_whitened": 0.423})
        for step in range(1, 1001):
            writer.write(step, {"train/loss": math.nan if step == 500 else 7 - step / 200, "train/odd": 3})
        writer.write(1000, {"eval/knn": 0.376})
        writer.picture(1000, "crops", Image.new("RGB", (8, 8), "red"))


def test_report_is_one_whole_file_with_scores_baselines_verdict_pictures_and_config(tmp_path):
    write_run(tmp_path)
    facts = {"jax": "0.10"}
    history = journal.history(tmp_path)
    path = report.write_report(tmp_path, history, title="A <run>", config="lr: 1 < 2", verdict=VERDICT, facts=facts)
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    for text in ("A &lt;run&gt;", "step 1,000", "collapsing", "98% of uniform &lt;b&gt;", "lr: 1 &lt; 2", "train/odd"):
        assert text in page
    assert '<p class="value">0.376</p>' in page
    assert '<li class="above"><b>0.271</b> untrained</li>' in page
    assert '<li class="below"><b>0.423</b> whitened pixels</li>' in page
    assert report.relation(0.07, 0.07) == "equal"
    assert "View retrieval" not in page  # was not measured
    for outside in ("http:", "https:", "<script", 'src="/', "url("):
        assert outside not in page
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert picture and base64.b64decode(picture[1]) == (tmp_path / "pictures" / "crops.png").read_bytes()
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)
    assert "nan" not in page.lower()


def test_curves_lie_within_the_axes_and_fall_where_the_loss_falls(tmp_path):
    write_run(tmp_path)
    page = report.write_report(tmp_path, journal.history(tmp_path), title="", config="", verdict=VERDICT, facts={}).read_text()
    curve = re.search(r'aria-label="Loss".*?points="([^"]+)"', page)
    points = np.array([[float(v) for v in point.split(",")] for point in curve[1].split()])
    assert 100 < len(points) <= journal.POINTS
    assert (points >= 0).all() and (points[:, 0] <= 520).all() and (points[:, 1] <= 230).all()
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) >= 0).all()  # SVG counts downwards


def test_report_of_a_run_that_has_logged_nothing_yet(tmp_path):
    history = journal.history(tmp_path)
    page = report.write_report(tmp_path, history, title="t", config="", verdict=health.verdict({}), facts={}).read_text()
    assert "nothing has been measured yet" in page and "Curves" not in page


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write_report(tmp_path, journal.history(tmp_path), title="first", config="", verdict=VERDICT, facts={})

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="cannot write: No space left.*report.html"):
        report.write_report(tmp_path, journal.history(tmp_path), title="second", config="", verdict=VERDICT, facts={})
    assert "first" in path.read_text()


@pytest.mark.parametrize(
    "low, high, written",
    [
        (0, 1000, ["0", "200", "400", "600", "800", "1,000"]),
        (0.27, 0.43, ["0.30", "0.35", "0.40"]),
        (0, 3e-3, ["0.000", "0.001", "0.002", "0.003"]),
        (2e-6, 9e-6, ["2e-06", "4e-06", "6e-06", "8e-06"]),
        (-3, 3, ["-2", "0", "2"]),
    ],
)
def test_ticks_are_round(low, high, written):
    assert [text for _, text in report.ticks(low, high)] == written


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (0.4, "0.400"), (3.9, "3.90"), (1465.2, "1,465"), (5e-5, "5.00e-05"), (-0.25, "-0.250")]
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_a_curve_is_bounded_and_its_points_have_equal_weights():
    curve, count = journal.Curve(), 10 * journal.POINTS + 7
    for x in range(count):
        curve.add(x, 2.0 * x)
        assert len(curve.points()) <= journal.POINTS + 1
        if x < journal.POINTS:
            assert curve.points()[-1] == (x, 2.0 * x) and len(curve.points()) == x + 1  # a short curve is kept as it is
    assert curve.size == 16
    *whole, (last, _) = curve.points()
    assert whole == [(start + 7.5, 2 * start + 15) for start in range(0, 16 * (count // 16), 16)]
    assert last == np.mean(range(16 * (count // 16), count))


def test_history_of_a_resumed_run_is_that_of_its_file(tmp_path):
    with Journal(tmp_path, 10) as writer:
        for step in range(8):
            writer.write(step, {"train/loss": step if step != 5 else math.nan, f"odd/{step}": 1})
    with Journal(tmp_path, 10, resume_step=5) as writer:
        assert writer.history.latest["step"] == 5 and writer.history.latest["train/loss"] is None
        assert "odd/6" not in writer.history.latest and "odd/6" not in writer.history.curves
        writer.write(6, {"train/loss": 0.5})
        told, read = writer.history, journal.history(tmp_path)
    assert told.latest == read.latest and list(told.latest) == list(read.latest)
    curves = [{tag: curve.points() for tag, curve in found.curves.items()} for found in (told, read)]
    assert curves[0] == curves[1] and curves[0]["train/loss"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (6, 0.5)]


def test_a_report_reads_no_row_again(tmp_path, monkeypatch):
    with Journal(tmp_path, 10) as writer:
        writer.write(1, {"train/loss": 1.5})
        monkeypatch.setattr(journal, "rows", None)
        page = report.write_report(tmp_path, writer.history, title="", config="", verdict=VERDICT, facts={}).read_text()
    assert 'aria-label="Loss"' in page


def test_text_that_cannot_be_encoded_stops_nothing(tmp_path):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    name = os.fsdecode(b"caf\xe9.png")
    with Journal(tmp_path, 10, file=ascii_only) as writer:
        writer.print(f"bad image: \u00e9 {name}")
    assert ascii_only.buffer.getvalue() == b"bad image: \\xe9 caf\\udce9.png\n"
    path = report.write_report(tmp_path, journal.History(), title=name, config="", verdict=VERDICT, facts={"data": name})
    assert path.read_text(encoding="utf-8").count("caf\\udce9.png") == 3


def test_latest_is_the_last_of_each_tag(tmp_path):
    write_run(tmp_path)
    latest = journal.history(tmp_path).latest
    assert latest["step"] == 1000 and latest["train/loss"] == 2 and latest["eval/knn_baseline_untrained"] == 0.271
