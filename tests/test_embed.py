"""Features of a run: `mim_jax.load` and `python -m mim_jax.embed`."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import embed_child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encode, picture
from PIL import Image

import mim_jax
from mim_jax import embed, families, layouts, pretrained
from mim_jax.checkpoint import Checkpoints
from mim_jax.data.augment import center_crop
from mim_jax.data.decode import decode
from mim_jax.data.sources import ArraySource, open_source
from mim_jax.learned import Run, load_run
from mim_jax.methods.base import make_method
from mim_jax.models import vit
from mim_jax.sharding import make_mesh
from mim_jax.state import abstract_state

ROOT = Path(__file__).parent.parent
SIZES = ((12, 16), (16, 12), (40, 20), (9, 9), (16, 16))
COUNT, BAD = 21, 5


def random(shapes):
    """Arrays of these shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jax.device_put((0.3 * rng.normal(size=s.shape)).astype(s.dtype), s.sharding), shapes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run of MAE whose weights are random."""
    config = mim_jax.load_config("tests/tiny.py:mae").unlock()
    config.data.num_examples = 64
    config.eval.update(resize=0.75, img_size=24)
    folder = tmp_path_factory.mktemp("run")
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        checkpoints = Checkpoints(folder, config)
        checkpoints.save(7, random(abstract_state(make_method(config), config)))
        checkpoints.wait()
    return folder


@pytest.fixture(scope="module")
def model(workdir) -> pretrained.Model:
    return mim_jax.load(workdir)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Pictures of several sizes in two classes; one is bad."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        path = folder / ("even", "odd")[i % 2] / f"ä {i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image" if i == BAD else encode(picture(*SIZES[i % len(SIZES)], seed=i)))
    return folder


def bare(workdir, images):
    """The features of single images by the method, its views and the evaluation's crop."""
    run = load_run(workdir)
    views, found = run.method.views, []

    @jax.jit
    def features(params, canvas, size):
        return run.method.features(params, center_crop(canvas, size, 24, 0.75, views.mean, views.std))

    for image in images:
        image = decode(image, 16)
        canvas = np.zeros((1, 16, 16, 3), np.uint8)
        canvas[0, : image.shape[0], : image.shape[1]] = image
        found.append(jax.device_get(features(run.params, canvas, np.array([image.shape[:2]]))))
    return {kind: np.concatenate([each[kind] for each in found]) for kind in ("cls", "patch")}


def test_features_are_those_of_the_method(model, workdir, tmp_path):
    given = [picture(*SIZES[i % len(SIZES)], seed=i) for i in range(3)]
    (tmp_path / "a.png").write_bytes(encode(given[1]))
    out = model.features([given[0], str(tmp_path / "a.png"), jnp.asarray(given[2])])
    want = bare(workdir, given)
    assert model.patch_size == 4 and out["patch"].shape == (3, 36, 16) and out["cls"].dtype == np.float32
    for kind in ("cls", "patch"):
        np.testing.assert_allclose(out[kind], want[kind], atol=1e-6 * np.abs(want[kind]).max())
    np.testing.assert_allclose(out["mean"], want["patch"].mean(1), atol=1e-6)
    floats = model.features([image / 255 for image in given])
    assert all(np.array_equal(floats[kind], out[kind]) for kind in out)
    same = [np.stack([given[0]] * 3), [given[0]] * 3]
    assert np.array_equal(*(model.features(each)["cls"] for each in same))


def test_other_sizes_and_last_blocks(model):
    images = np.stack([picture(32, 32, seed=i) for i in range(3)])
    one, two = (model.features(images, size=48, layers=layers) for layers in (1, 2))
    assert one["patch"].shape == (3, 144, 16) and two["patch"].shape == (3, 144, 32) and two["cls"].shape == (3, 32)
    for kind in one:
        np.testing.assert_allclose(two[kind][..., 16:], one[kind], atol=1e-5)
    network = model.network

    @jax.jit
    def blocks(params):  # of images of 32 pixels: the canvas, 16 for what is seen at 24, grows with the size
        seen = center_crop(images, jnp.full((3, 2), 32), 48, 0.75, network.mean, network.std)
        return vit.intermediate_layers(network.backbone, params, seen, 2)

    oldest = blocks(model.parts["backbone"])[0]
    np.testing.assert_allclose(two["cls"][:, :16], oldest[:, 0], atol=1e-5)
    np.testing.assert_allclose(two["patch"][..., :16], oldest[:, 1:], atol=1e-5)


IMAGE = np.zeros((4, 4, 3), np.uint8)
REFUSED = [
    ("a.png", r"images is a.png, but must be a list of file names: \['a.png'\]"),
    (IMAGE, r"images is one array \[4, 4, 3\], but must be \[B, h, w, 3\]"),
    ([], "images is empty"),
    ([IMAGE, IMAGE[..., 0]], r"image 1 is uint8 \[4, 4\], but must be \[h, w, 3\]"),
    ([IMAGE.transpose(2, 0, 1)], r"image 0 is uint8 \[3, 4, 4\], but must be \[h, w, 3\]"),
    ([IMAGE.astype(int)], "but must be uint8, or floats in 0..1"),
    ([IMAGE - 2.0], r"values from -2 to -2, but floats must be in 0..1 and not normalised"),
    ([IMAGE + 255.0], "values from 255 to 255, but floats must be in 0..1"),
    ([IMAGE * np.nan], "values from nan to nan, but floats must be in 0..1"),
    ([Image.fromarray(IMAGE)], r"image 0 is of type Image, but must be a file name or an array uint8 \[h, w, 3\]"),
    ([IMAGE, "none.png"], "bad image: .*none.png: .*No such file"),
    (None, "images is of type NoneType, but must be a list of file names or of arrays"),
    (5, "images is of type int, but"),
    ({"a": IMAGE}, "images is of type dict, but"),
    ([None], "image 0 is of type NoneType, but"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_are_no_images(model, given, told):
    with pytest.raises(ValueError, match=told):
        model.features(given)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 18}, "size is 18, but must be a multiple of the 4 pixels of a patch"),
        ({"size": 0}, "size is 0"),
        ({"layers": 3}, "layers is 3, but of this network the last 1 to 2"),
        ({"layers": 0}, "layers is 0"),
        ({"size": "32"}, "size is '32', but must be an integer"),
        ({"size": 32.0}, "size is 32.0, but must be an integer"),
        ({"layers": None}, "layers is None, but must be an integer"),
    ],
    ids=["size", "no size", "layers", "no layers", "text", "float", "None"],
)
def test_sizes_and_layers_that_are_not_there(model, options, told):
    with pytest.raises(ValueError, match=told):
        model.features([IMAGE], **options)


def random_run(name, monkeypatch):
    """A run of this method, without a file."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}").unlock()
    config.data.update(num_examples=64, num_classes=3)
    method = make_method(config)
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    run = Run(config, method, random(params), extra, 3)
    monkeypatch.setattr(pretrained, "load_run", lambda *_: run)
    return run


def test_a_classifier_has_the_features_of_its_head(monkeypatch):
    run = random_run("supervised", monkeypatch)
    model, views = pretrained.of_run(Path("runs/fine")), run.method.views
    image = jnp.asarray(picture(16, 16)[None] / np.float32(255))

    @jax.jit
    def both(params, parts):
        seen = (image - jnp.array(views.mean)) / jnp.array(views.std)
        return run.method.features(params, seen), model.network.features(parts, image)

    want, out = both(run.params, model.parts)
    np.testing.assert_allclose(out["cls"], want["cls"], atol=1e-5)
    assert not np.allclose(out["cls"], out["patch"].mean(1))  # it has a norm


def test_a_swin_has_one_last_block(monkeypatch):
    random_run("simmim_swin", monkeypatch)
    model = pretrained.of_run(Path("runs/swin"))
    assert model.patch_size == 2 * model.network.backbone.patch_size
    with pytest.raises(ValueError, match="the last 1 to 1"):
        model.features([IMAGE], layers=2)


def test_runs_without_features_and_no_runs(monkeypatch, tmp_path):
    random_run("vqvae", monkeypatch)
    with pytest.raises(ValueError, match="runs/tokens is a run of vqvae, which has no ViT or Swin backbone"):
        pretrained.of_run(Path("runs/tokens"))
    with pytest.raises(FileNotFoundError, match="there is no run and no file"):
        mim_jax.load(tmp_path / "none")
    for config in ('{"model_type": "dinov2"}', '{"model_type": "dinov2", "method": "x"}', "5", "[" * 10**5, "{"):
        (tmp_path / "config.json").write_text(config)
        assert not pretrained.is_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "method": "x"}')
    with pytest.raises(ValueError, match="holds no file of weights"):
        mim_jax.load(tmp_path)
    with pytest.raises(ValueError, match="which is 'both', but must be teacher or student"):
        load_run(tmp_path, "both")
    for resize in (0, 2, "1"):
        with pytest.raises(ValueError, match="resize is .*, but must be in"):
            mim_jax.load(tmp_path, resize=resize)


# The command


def test_order_names_and_bad_images(model, workdir, images, tmp_path, capsys, monkeypatch):
    """All formats have the same rows; that of the bad image is NaN and its name is told."""
    monkeypatch.setattr(embed, "ROWS", 8)
    source = open_source("folder", images)
    names = sorted(f"{('even', 'odd')[i % 2]}/ä {i}.png" for i in range(COUNT))
    bad = names.index(f"odd/ä {BAD}.png")
    good = [name for name in names if name != names[bad]]
    want = model.features([images / name for name in good])
    for file, kind in (("a.npz", "cls"), ("b.npy", "cls"), ("c.parquet", "patch")):
        out = tmp_path / file
        if file == "b.npy":
            more = [f"--run={workdir}", f"--data={images}", f"--out={out}", "--batch_size=8"]
            embed.main(["embed", *more])
        else:
            embed.embed(model, source, out, kind=kind, batch_size=8)
        if file == "a.npz":
            with np.load(out) as found:
                features, label, about = found["features"], found["label"], json.loads(str(found["about"]))
                assert found["names"].tolist() == names
        elif file == "b.npy":
            features, about = np.load(out), json.loads((tmp_path / "b.npy.json").read_text())
            label = np.array(about["label"])
            assert about["names"] == names
        else:
            parquet = pytest.importorskip("pyarrow.parquet")
            table = parquet.read_table(out)
            about = json.loads(table.schema.metadata[b"mim_jax"])
            features = np.stack(table["features"].to_numpy()).reshape(about["shape"])
            label = table["label"].to_numpy()
            assert table["name"].to_pylist() == names
        told = capsys.readouterr().err
        assert f"bad image, row {bad}: {images}/odd/ä {BAD}.png: " in told and "1 rows are NaN" in told
        assert list(about["bad"]) == [str(bad)] and about["classes"] == ["even", "odd"]
        assert features.dtype == np.float32 and list(features.shape) == about["shape"]
        assert np.isnan(features[bad]).all() and label[bad] == -1
        assert np.delete(label, bad).tolist() == [name.startswith("odd") for name in good]
        np.testing.assert_allclose(np.delete(features, bad, axis=0), want[kind], atol=1e-6)
        assert not Path(f"{out}.parts").exists()


def test_arrays_joined_kinds_and_no_labels(model, tmp_path):
    images = np.stack([picture(16, 16, seed=i) for i in range(5)])
    source = ArraySource(images, np.full(5, -1), 0)
    embed.embed(model, source, tmp_path / "a.npz", kind="cls+mean")
    want = model.features(images)
    with np.load(tmp_path / "a.npz") as found:
        assert set(found) == {"features", "names", "about"} and found["names"][2] == "image 2 of arrays in memory"
        np.testing.assert_allclose(found["features"], np.concatenate([want["cls"], want["mean"]], axis=1), atol=1e-6)


def test_other_settings_and_other_files_are_refused(model, images, tmp_path, monkeypatch):
    source, out = open_source("folder", images), tmp_path / "a.npz"
    monkeypatch.setattr(embed, "ROWS", 8)

    def killed(parts, out):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(embed, "join", killed)
        with pytest.raises(MemoryError):
            embed.embed(model, source, out, batch_size=8)
    with pytest.raises(ValueError, match="a.npz.parts has parts with other settings: batch_size 8 -> 16. Remove it"):
        embed.embed(model, source, out, batch_size=16)  # and its parts stay
    with monkeypatch.context() as patch:
        patch.setattr(embed, "compute", None)  # nothing is left to do
        embed.embed(model, source, out, batch_size=8)
    with pytest.raises(OSError, match="a.npz is there already"):
        embed.embed(model, source, out)
    with pytest.raises(ValueError, match="batch_size is 9, but must be a multiple of the 8 devices"):
        embed.embed(model, source, tmp_path / "b.npz", batch_size=9)
    with pytest.raises(ValueError, match="files end with .npz, .npy, .parquet"):
        embed.embed(model, source, tmp_path / "b.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"without pyarrow: pip install 'mim_jax\[parquet\]'"):
        embed.embed(model, source, tmp_path / "b.parquet")


def test_a_damaged_part_is_named_and_made_again(model, images, tmp_path, monkeypatch, capsys):
    source, out, other = open_source("folder", images), tmp_path / "a.npz", tmp_path / "b.npz"
    monkeypatch.setattr(embed, "ROWS", 8)
    embed.embed(model, source, other, batch_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "join", lambda *_: None)
        embed.embed(model, source, out, batch_size=8)
    parts = sorted((tmp_path / "a.npz.parts").glob("0*.npz"))
    parts[0].write_bytes(b"PKbroken")
    parts[1].write_bytes(parts[2].read_bytes())  # of fewer rows
    content = bytearray(parts[2].read_bytes())
    content[len(content) // 3] ^= 1
    parts[2].write_bytes(content)
    capsys.readouterr()
    embed.embed(model, source, out, batch_size=8)
    told = capsys.readouterr().err
    assert all(f"{part} is damaged" in told for part in parts) and told.count("it is made again") == 3 == len(parts)
    assert out.read_bytes() == other.read_bytes()


def test_a_finished_file_stays(model, images, tmp_path):
    """Also where a kill has left of its parts the settings alone, or nothing but the folder."""
    out, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    parts.mkdir()
    out.write_bytes(b"finished")
    for settings, error, told in (
        (None, OSError, "a.npz is there already"),
        ("{}", ValueError, "parts with other settings: network None -> "),
        ("{", ValueError, "parts with other settings: network None -> "),
    ):
        if settings:
            (parts / "settings.json").write_text(settings)
        with pytest.raises(error, match=told):
            embed.embed(model, open_source("folder", images), out)
        assert out.read_bytes() == b"finished"


def test_bad_images_only(workdir, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        embed.main(["embed", f"--run={workdir}", f"--data={tmp_path}", f"--out={tmp_path}/a.npy"])
    assert str(stop.value).startswith(f"error: all 3 images are bad, nothing is written: {tmp_path}/0.png: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--data=x --out=a.npz", "error: --run is missing, for example python -m mim_jax.embed"),
        ("--run=x --out=a.npz", "error: --data is missing"),
        ("--run=x --data=x", "error: --out is missing"),
        ("--run=x --data=no/x --out=a.npz", "error: --data is no/x, but there is no such folder"),
        ("--run=x --data=x --out=gs://b/a.npz", "error: --out is gs://b/a.npz, but must be a file of this machine"),
        ("--run=x --data=x --out=a.npz --layers=two", "error: flag --layers=two"),
        ("--run=x --data=x --out=a.npz --sise=2", "error: Unknown command line flag 'sise'"),
        ("--run=x --data=x --out=a.npz more", "error: not understood: more"),
    ],
)
def test_words_of_the_command(arguments, told):
    with pytest.raises(SystemExit) as stop:
        embed.main(["embed", *arguments.split()])
    assert str(stop.value).startswith(told) and "\n" not in str(stop.value)


# Kills


@pytest.fixture(scope="module")
def children():
    """Starts processes of `embed_child.run` by a fork server, which imports everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["embed_child"])

    def start(*arguments, **kill):
        child = context.Process(target=embed_child.run, args=(list(arguments),), kwargs=kill)
        child.start()
        return child

    return start


def bytes_after_kills(start, arguments, kills):
    """(the output after these kills, each of a run that goes on, how many killed it); some may come too late."""
    killed, out = 0, Path(next(arg for arg in arguments if arg.startswith("--out=")).removeprefix("--out="))
    for kill in [*kills, {}]:
        if out.exists() and not Path(f"{out}.parts").exists():
            break
        child = start(*arguments, **kill)
        child.join(120)
        assert child.exitcode in ((-signal.SIGKILL, 0) if kill else (0,))
        killed += child.exitcode != 0
    return out.read_bytes(), killed


def test_kills_leave_the_same_bytes(children, images, tmp_path):
    same = ["--run=plain", f"--data={images}", "--batch_size=4", "--kind=cls+mean"]
    want, _ = bytes_after_kills(children, [*same, f"--out={tmp_path}/a.npz"], [])
    found, killed = bytes_after_kills(children, [*same, f"--out={tmp_path}/b.npz"], [{"files": 1}, {"files": 2}])
    assert found == want and killed


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["npz", "npy", "parquet"])
def test_twenty_kills(children, workdir, tmp_path, ending):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.png").write_bytes(encode(picture(16, 16, seed=i)))
    same, begin = [f"--run={workdir}", f"--data={folder}", "--batch_size=4", "--kind=patch"], time.monotonic()
    want, _ = bytes_after_kills(children, [*same, f"--out={tmp_path}/a.{ending}"], [])
    took, killed = time.monotonic() - begin, 0
    while killed < 20:
        out = tmp_path / f"b.{ending}"
        # at any moment of a whole run, or when so many parts are there: of 25
        drawn = [({"seconds": rng.uniform(0.2, took)}, {"files": int(rng.integers(1, 26))})[rng.integers(2)] for _ in range(5)]
        kills = sorted(drawn, key=lambda kill: kill.get("files", 0))  # else most would be at once
        found, number = bytes_after_kills(children, [*same, f"--out={out}"], kills)
        assert found == want
        killed += number
        for file in tmp_path.glob(f"b.{ending}*"):
            file.unlink()


@pytest.mark.slow
def test_two_processes_share_the_work(workdir, images, tmp_path):
    """The file of two processes is that of one with as many devices."""

    def run(out, processes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        code = "import embed_child, sys; embed_child.run(sys.argv[1:])"
        command = [sys.executable, "-c", code, f"--run={workdir}", f"--data={images}", f"--out={out}", "--batch_size=4"]
        several = [[f"--coordinator={address}", f"--processes={processes}", f"--process={i}"] for i in range(processes)]
        path = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        started = [
            subprocess.Popen(command + more, env=os.environ | path, stderr=subprocess.PIPE, text=True) for more in several
        ]
        told = [process.communicate(timeout=200)[1] for process in started]
        assert [process.returncode for process in started] == [0] * processes, told
        return out.read_bytes(), told

    want, _ = run(tmp_path / "one.npz", 1)
    found, (first, second) = run(tmp_path / "two.npz", 2)
    assert found == want
    assert "1 rows are NaN" in first and "NaN" not in second


def test_a_file_of_weights(golden, tmp_path):
    """By `load` and by the command; what the file does not say is asked for."""
    file = Path(__file__).parent / "golden/weights/backbone.npz"
    images = list(np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8))
    model = mim_jax.load(file, heads=2)
    out = model.features(images)
    assert out["cls"].shape == (2, 16) and out["patch"].shape == (2, 16, 16) and "30 of 30 tensors" in model.description
    asked = r"number of heads .*: say --heads=\.\.\. \(`.*convert .*backbone.npz --heads=\.\.\. --out=DIR` writes a folder"
    with pytest.raises(ValueError, match=asked):
        mim_jax.load(file)
    for wrong in ({"heads": "2"}, {"heads": True}, {"heads": 2.0}, {"eps": True}, {"without": 3}, {"encoder": 3}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}, but must be a "):
            mim_jax.load(file, **{"heads": 2} | wrong)
    with pytest.raises(ValueError, match="positions='foo' is not known"):
        mim_jax.load(file, heads=2, positions="foo")
    with pytest.raises(ValueError, match="backbone.npz is no run: only runs have"):
        mim_jax.load(file, heads=2, which="student")
    layouts.read(file, layouts.Told(heads=2)).save(tmp_path / "ours")
    again = mim_jax.load(tmp_path / "ours").features(images, layers=2)
    np.testing.assert_allclose(again["cls"][:, 16:], out["cls"], atol=1e-6)


def test_what_is_seen_of_an_image(tmp_path):
    """An array of the size that is seen is cropped, too; with resize=1.0 it is what the network gets."""
    file, size = Path(__file__).parent / "golden/weights/backbone.npz", 16
    model, whole = mim_jax.load(file, heads=2), mim_jax.load(file, heads=2, resize=1.0)
    assert (model.resize, whole.resize, whole.img_size) == (0.875, 1.0, size)
    assert "the central square of 0.875 of the short side is seen, as no configuration says it" in model.description
    images = np.stack([picture(size, size, seed=i) for i in range(2)])
    want = jax.jit(whole.network.features)(whole.parts, images / np.float32(255))["cls"]
    np.testing.assert_allclose(whole.features(images)["cls"], want, atol=1e-5)
    assert np.abs(model.features(images)["cls"] - want).max() > 0.01
    clip = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    for config, processor, share in (
        ({}, {}, 0),
        ({"pretrained_cfg": {"crop_pct": 0.9}}, {}, 0.9),
        ({"pretrained_cfg": 5, "crop_pct": "0.9"}, {"size": "x"}, 1.0),
        ({"crop_pct": 0.5}, {}, 0.5),
        ({}, clip, 0.875),
        ({}, clip | {"do_center_crop": False}, 1.0),
        ({}, {"size": 256, "crop_size": 192}, 0.75),
        ({}, {"size": {"height": 224, "width": 224}, "do_center_crop": False}, 1.0),
        ({}, {"size": 0, "crop_size": 192, "crop_pct": 7}, 0),
    ):
        assert families.seen(config, processor).crop == share
    shutil.copy(file, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip | {"size": 448}))
    read = layouts.read(tmp_path / file.name, layouts.Told(heads=2))
    read.save(tmp_path / "ours")
    assert mim_jax.load(tmp_path / file.name, heads=2).resize == mim_jax.load(tmp_path / "ours").resize == read.seen.crop == 0.5
