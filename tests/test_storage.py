"""Runs, images and weights at an address, against a server that speaks the protocol of Google Cloud Storage."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from test_data import tfds_dir  # noqa: F401
from test_folder import make

from mim_jax import checkpoint, journal, load_config, report, storage, weight_files
from mim_jax.config import resolve_encoder, resolve_target
from mim_jax.data import decode, pipeline, sources
from mim_jax.health import Verdict
from mim_jax.journal import Journal
from mim_jax.lock import locked


@pytest.fixture
def folder(bucket, tmp_path):
    """An address that is new."""
    return bucket / tmp_path.parent.name / tmp_path.name


def steps(workdir):
    return [row["step"] for row in journal.read(workdir)]


def told(workdir):
    """(step, tag) of the events of a run, in the order of TensorBoard."""
    found, names = [], sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.name)
    for path in names:
        data = path.read_bytes()
        while data:  # TFRecord: length, checksum, record, checksum
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_paths_and_addresses(bucket, monkeypatch):
    assert str(storage.absolute("gs://bucket/a/") / "b") == "gs://bucket/a/b"
    assert str(storage.absolute("a")) == os.path.abspath("a")
    for address in ("ftp://host/run", "gs://", "http:///"):
        with pytest.raises(ValueError, match=f"{address} is no folder that can be read: addresses are gs://BUCKET/FOLDER"):
            storage.absolute(address)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://b/run cannot be read without gcsfs: pip install 'mim_jax\[gcs\]'"):
        storage.absolute("gs://b/run")
    with pytest.raises(ValueError, match="s3://b/run cannot have checkpoints: Orbax keeps them at gs:// and on disks"):
        checkpoint.newest("s3://b/run", lambda saved: None)


def test_figures_are_kept_in_parts_and_read_as_one_file(folder, monkeypatch):
    monkeypatch.setattr(storage, "PART", 300)
    now = [0.0]
    with Journal(folder, 100, clock=lambda: now[0]) as writer:
        for step in range(10):
            writer.write(step, {"train/loss": step})
        assert steps(folder) == []  # not yet
        now[0] += journal.EVERY + 1
        writer.write(10, {"train/loss": 10})
        assert steps(folder) == list(range(11))
        for step in range(11, 40):
            writer.write(step, {"train/loss": step})
            if step % 5 == 0:
                writer.flush()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["metrics.jsonl", "metrics.jsonl.00001", "metrics.jsonl.00002", "metrics.jsonl.00003", "tensorboard"]
    assert steps(folder) == list(range(40))
    assert told(folder) == [(step, "train/loss") for step in range(40)]
    assert journal.history(folder).latest == {"step": 39, "train/loss": 39}


def test_a_killed_run_at_an_address_goes_on_with_every_step_once(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "PART", 300)
    writer = Journal(folder, 100)
    for step in range(30):
        writer.write(step, {"train/loss": step})
        if step % 10 == 0:
            writer.flush()  # before the checkpoint of this step
    del writer  # a kill: the last lines are lost
    assert steps(folder) == list(range(21))
    with Journal(folder, 100, resume_step=10) as writer:
        assert writer.history.latest["step"] == 10
        for step in range(11, 25):
            writer.write(step, {"train/loss": step})
    assert steps(folder) == list(range(25))
    journal.inherit(folder, tmp_path)
    assert steps(tmp_path) == list(range(25))
    with Journal(folder, 100) as writer:
        writer.write(0, {"train/loss": 0})
    assert steps(folder) == [0]


def test_pictures_and_the_report(folder, tmp_path):
    with Journal(folder, 100) as writer:
        writer.picture(0, "crops", Image.new("RGB", (4, 3), "red"))
        writer.save("config.json", b"{}")
        page = report.write_report(
            folder, writer.history, title="t", config="", verdict=Verdict("mixed", "s"), facts={"jax": "1"}
        )
    assert str(page) == f"{folder}/report.html" and "data:image/png;base64" in page.read_text()
    assert (folder / "config.json").read_text() == "{}" and told(folder) == [(0, "crops")]
    journal.inherit(folder, tmp_path)
    assert (tmp_path / "pictures/crops.png").read_bytes() == (folder / "pictures/crops.png").read_bytes()


def test_what_cannot_be_written_is_one_line(bucket, monkeypatch):
    missing = storage.absolute("gs://missing/run")
    with pytest.raises(OSError, match="cannot write gs://missing/run/metrics.jsonl: FileNotFoundError: "):
        Journal(missing, 10)
    with pytest.raises(OSError, match="cannot write to gs://missing/run: FileNotFoundError: "), locked(missing):
        pass


def test_of_two_runs_at_an_address_the_later_one_goes_on(folder, capfd):
    with locked(folder) as first, Journal(folder, 100, held=first) as writer:
        writer.write(1, {"a": 1})
        writer.flush()
        (folder / "lock").write_text("process 1 on another host, since 2026\n")
        writer.write(2, {"a": 2})
        with pytest.raises(OSError, match="is in use by another run, which began later: process 1 on another host, since 2026"):
            writer.flush()
        writer._held = lambda: None
    assert "another host" in (folder / "lock").read_text()  # is the other's
    with locked(folder):
        assert f"{folder} was not left by process 1 on another host, since 2026; " in capfd.readouterr().err
    assert not (folder / "lock").exists()


# Images


def upload(root, folder):
    for path in root.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(root)).write_bytes(path.read_bytes())


def test_a_folder_of_images_is_read_as_on_a_disk(folder, tmp_path):
    make(tmp_path, "data/train/cat/", "data/train/dog/", "data/val/dog/", "data/readme.txt", "data/train/dog/.x.png")
    make(tmp_path, "data/__MACOSX/a.png")
    for i in range(3):
        Image.new("RGB", (8, 6), (80 * i, 0, 0)).save(tmp_path / f"data/train/cat/{i}.png")
    upload(tmp_path, folder)
    for split in ("train", "val", "train[:50%]"):
        here, there = (sources.open_source("folder", str(root), split) for root in (tmp_path, folder))
        assert there.files == here.files and there.classes == here.classes
        assert there.labels.tolist() == here.labels.tolist() and there.fingerprint == here.fingerprint
        assert [note.replace(str(folder), str(tmp_path)) for note in there.notes] == list(here.notes)
        assert there[1] == here[1] and there.name(1) == f"{there.root}/{there.files[1]}"
    source = sources.open_source("folder", str(folder), "train")
    for workers in (0, 1):
        stream = pipeline.train_batches(source, seed=0, batch_size=4, canvas=8, workers=workers, on_bad=lambda *_: None)
        batch = next(stream)
        assert set(batch["image"][:, 0, 0, 0].tolist()) <= {0, 80, 160} and batch["size"].tolist() == [[6, 8]] * 4
        stream.close()
    (source.root / source.files[0]).unlink()
    with pytest.raises(OSError, match="FileNotFoundError"):
        source[0]
    with pytest.raises(OSError, match="more than 10 bytes"):
        decode.read_file(source.root / source.files[1], limit=10)


def test_folders_at_addresses_that_cannot_be_read(folder, bucket):
    with pytest.raises(FileNotFoundError, match=f"There is no folder {folder}"):
        sources.open_source("folder", str(folder))
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"No images below {folder}"):
        sources.open_source("folder", str(folder))
    with pytest.raises(ValueError, match="cache of CIFAR-10 must be a folder of this machine"):
        sources.open_source("cifar10", "gs://bucket/cache")
    with pytest.raises(ValueError, match="ftp://host is no folder"):
        sources.open_source("folder", "ftp://host")


def test_tfds_at_an_address(folder, tfds_dir, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", os.environ["STORAGE_EMULATOR_HOST"])
    upload(tfds_dir, folder)
    here, there = (sources.open_source("pngs", str(root), "train") for root in (tfds_dir, folder))
    assert len(there) == 10 and there[4] == here[4] and there.fingerprint == here.fingerprint


# Weights


def test_the_config_of_a_run_at_an_address(folder):
    network, encoder = load_config("vqvae:demo"), load_config("mae:demo")
    (folder / "vqvae/config.json").write_bytes(network.to_json_best_effort().encode())
    (folder / "mae/config.json").write_bytes(encoder.to_json_best_effort().encode())
    beit, tuned = load_config("beit:demo"), load_config("supervised:demo")
    beit.target.workdir, tuned.init_from = f"{folder}/vqvae", f"{folder}/mae"
    resolve_target(beit)
    assert beit.target.network.quantizer.codes == network.quantizer.codes and beit.target.config == "vqvae:demo"
    resolve_encoder(tuned, f"{folder}/tuned")
    assert tuned.encoder.method == "mae" and tuned.model.dim == encoder.model.dim
    tuned.init_from = f"{folder}/none"
    with pytest.raises(FileNotFoundError, match=f"there is neither a run nor a file of weights in {folder}/none"):
        resolve_encoder(tuned)


def test_arrays_of_a_file_at_an_address(folder, tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float32)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    (folder / "weights.npz").write_bytes(file.getvalue())
    read = weight_files.read(f"{folder}/weights.npz")
    assert read.keys() == arrays.keys() and all(np.array_equal(read[name], arrays[name]) for name in arrays)
    with pytest.raises(FileNotFoundError, match=f"there is no file {folder}/other.npz"):
        weight_files.read(f"{folder}/other.npz")
    (folder / "weights.pth").write_bytes(b"no arrays")
    with pytest.raises(ValueError, match="weights.pth cannot be read: at an address only .npz"):
        weight_files.read(f"{folder}/weights.pth")
