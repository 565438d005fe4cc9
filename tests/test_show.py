"""What a network sees in images: `python -m mim_jax.show`."""

import base64
import functools
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import encode, picture
from PIL import Image

import mim_jax
from mim_jax import pretrained, show, similarity
from mim_jax.evaluators.pictures import HIDDEN, colorize
from mim_jax.learned import Run
from mim_jax.methods.base import Encoder, make_method
from mim_jax.models import vit

COUNT, BAD, GRID = 3, "b.png", 6
NAMES = ["a <i>&.png", BAD, "c.png", "d.png"]


def random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


def config_of(name):
    config = mim_jax.load_config(f"tests/tiny.py:{name}").unlock()
    config.data.num_examples = 64
    config.eval.update(resize=0.75, img_size=4 * GRID)
    return config


def random_run(name):
    """A run of this method whose weights are random, without a file."""
    config = config_of(name)
    method = make_method(config)
    return Run(config, method, *random(jax.eval_shape(method.init, jax.random.key(0))), 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(b"no image" if name == BAD else encode(picture(30 + i, 40, seed=i)))
    return folder


def written(run, images, out, *more):
    """The page that the command writes of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "load_run", lambda _: run)
        patch.setattr(pretrained, "is_run", lambda _: True)
        show.main(["show", "--run=runs/mine", f"--images={images}", f"--out={out}", *more])
    return out.read_text()


@pytest.fixture(scope="module")
def mae():
    return random_run("mae")


@pytest.fixture(scope="module")
def made(mae, images, tmp_path_factory):
    """(the page of a run of MAE, what was found for it)"""
    found, see = {}, show.see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "see", lambda *given: found.update(see(*given)) or dict(found))
        return written(mae, images, tmp_path_factory.mktemp("page") / "page.html"), found


@pytest.fixture(scope="module")
def page(made) -> str:
    return made[0]


class Balanced(HTMLParser):
    """Counts tags; each that is opened must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def blocks(page):
    return re.findall(r'<article class="block">(.*?)</article>', page, re.DOTALL)


def pictures_of(block):
    """{alt: image} of a block."""
    found = re.findall(r'<img(?: class=sharp)? alt="([^"]*)" src="data:image/\w+;base64,([^"]+)">', block)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for alt, data in found}


def data_of(page):
    """(the page's data, its features int8 [T, d])"""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    return data, np.frombuffer(base64.b64decode(data["features"]), np.int8).reshape(-1, data["dim"])


def test_the_page_stands_alone(page):
    found = Balanced(page)
    assert found.found.count("article") == COUNT and found.found.count("canvas") == COUNT
    assert "http" not in page and not re.search(r"@import|url\(|fetch|XMLHttp|<link", page)
    assert all(value.startswith("data:image/") for name, value in found.attributes if name in ("src", "href"))
    assert "<i>&.png" not in page and "<h3>a &lt;i&gt;&amp;.png</h3>" in page


def test_each_image_has_its_maps(page):
    """In a block: what is seen, components, the attention and its mean, and what the method makes of a masked image."""
    captions = ["", "principal components", "mean", "head 1", "head 2"]
    captions += ["masked input", "masked predicted", "all predicted"]
    for block in blocks(page):
        found = pictures_of(block)
        assert list(found) == captions and found[""].shape == (4 * GRID, 4 * GRID, 3)
        assert all(found[name].shape == (GRID, GRID, 3) for name in captions[1:5])
        hidden = (found["masked input"] == HIDDEN).all(-1).reshape(4, 4, 4, 4).all((1, 3))
        assert hidden.sum() == 12  # three quarters of 16
        differ = (found["masked predicted"] != found["all predicted"]).any(-1).reshape(4, 4, 4, 4).any((1, 3))
        assert not differ[hidden].any() and differ[~hidden].any()


def test_similarities(made):
    """Products of the page's numbers are the cosines of the patches, image by image; its script computes them, and colours."""
    page, found = made
    patch = found["patch"].reshape(COUNT * GRID**2, -1)
    unit = patch / np.linalg.norm(patch, axis=1, keepdims=True)
    data, numbers = data_of(page)
    assert data["grid"] == GRID and numbers.shape == patch.shape == (108, 16)
    cosines = numbers.astype(int) @ numbers.T.astype(int) / data["scale"] ** 2
    worst = np.abs(cosines - unit @ unit.T).max()
    assert worst < 0.02 and float(re.search(r"off by at most ([\d.]+)", page)[1]) == pytest.approx(worst, rel=0.3)
    if node := shutil.which("node"):
        script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1].removesuffix("start();\n")
        script += f"const data = {json.dumps(data)};"
        script += "const shades = [-1, 0, 0.3, 1, 2].map((x) => color(data, x)), found = cosines(data, decoded(data), 40);"
        script += "console.log(JSON.stringify([Array.from(found), shades]));"
        found, shades = json.loads(subprocess.run([node, "-e", script], capture_output=True, check=True).stdout)
        np.testing.assert_allclose(found, cosines[40], atol=1e-5)
        np.testing.assert_allclose(shades, colorize(np.array([0, 0, 0.3, 1, 1])), atol=0.51)


def test_bad_images_are_named(mae, page, images, tmp_path, capsys, monkeypatch):
    assert f"<dt>Bad image</dt><dd>{images}/{BAD}: " in page and f"<dt>Images</dt><dd>{COUNT} of 4</dd>" in page
    monkeypatch.setattr(show, "see", lambda *_: None)
    monkeypatch.setattr(show, "page", lambda found, names, grid, facts: json.dumps([names, facts]))
    names, facts = json.loads(written(mae, f"{images}/d.png", tmp_path / "a.html", f"{images}/{BAD}", "--count=3", "none.png"))
    assert names == [f"{images}/d.png"] and "none.png: " in facts["Bad image"]
    told = capsys.readouterr().err
    assert f"bad image: {images}/{BAD}: " in told and "none.png: " in told
    joined = ",".join([f"{images}/c.png"] * 99)
    names, facts = json.loads(written(mae, joined, tmp_path / "a.html", "--count=99"))
    assert len(names) == 99 and "Bad image" not in facts
    names, facts = json.loads(written(mae, images, tmp_path / "a.html", "--count=2"))
    assert names == [NAMES[0], NAMES[3]] and facts["Images"] == "2 of 4, evenly spaced"


def test_networks_without_a_cls_token_have_no_attention():
    swin = make_method(config_of("simmim_swin")).backbone
    plain = vit.ViT(patch_size=4, img_size=32, dim=16, depth=1, heads=2, cls=False, pos="none")
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8), "size": np.full((1, 2), 32)}
    for backbone in (swin, plain):
        network = Encoder(backbone, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        parts = jax.eval_shape(network.init_parts, jax.random.key(0))
        model = pretrained.Model(network, parts, 32, "plain")
        found = jax.eval_shape(functools.partial(show.of_batch, model, None, 32), parts, {}, {}, batch)
        assert set(found) == {"image", "patch"}
    found = {"image": batch["image"], "patch": np.asarray(random(found["patch"]))}
    page = show.page(found, ["a.png"], 8, {"Network": "plain"})
    assert "ttention" not in page.split("<main")[1] and "Reconstruction" not in page
    assert list(pictures_of(blocks(page)[0])) == ["", "principal components"]


def test_what_can_reconstruct():
    able = {name: show.can_reconstruct(make_method(config_of(name))) for name in ("mae", "simmim", "dino", "beit")}
    assert able == {"mae": True, "simmim": True, "dino": False, "beit": False}  # BEiT predicts tokens of another network


def test_attention_is_that_of_cls_to_the_patches():
    backbone = vit.ViT(patch_size=4, img_size=8, dim=16, depth=1, heads=2, registers=3)
    network = Encoder(backbone, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    parts = random(jax.eval_shape(network.init_parts, jax.random.key(0)))
    model = pretrained.Model(network, parts, 8, "plain", resize=1.0)
    seen = np.stack([picture(8, 8, seed=i) for i in range(2)])
    normal = (seen / np.float32(255) - np.array(network.mean)) / np.array(network.std)

    @jax.jit
    def both(parts, batch):
        found = show.of_batch(model, None, 8, parts, {}, {}, batch)
        return found, vit.last_attention(backbone, parts["backbone"], normal.astype(np.float32))

    found, weights = both(parts, {"image": seen, "size": np.full((2, 2), 8)})
    np.testing.assert_allclose(found["attention"], weights[:, :, 0, 4:], atol=1e-5)
    assert np.array_equal(found["image"], seen) and "columns" not in found


def test_features_that_do_not_fit_are_projected():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 20)) @ rng.normal(size=(20, 64)) + 3).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for room, dim in ((50 * 64 * 4 // 3 + 4, 64), (50 * 30 * 4 // 3 + 4, 30)):
        numbers, scale, share = similarity.quantized(features, room)
        assert numbers.shape == (50, dim) and share == pytest.approx(1)
        products = numbers.astype(int) @ numbers.T.astype(int) / scale**2
        worst = np.abs(products - unit @ unit.T).max()
        assert worst < 0.02 and similarity.error(features, numbers, scale) == pytest.approx(worst, abs=1e-5)
    numbers, _, share = similarity.quantized(features, 50 * 16 * 4 // 3 + 4)
    assert numbers.shape == (50, 16) and 0.8 < share < 1
    assert similarity.quantized(features, -1)[0].shape == (50, 1)


def test_weights_are_told_what_they_do_not_say(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda path, **told: pytest.fail(f"{path.name} {told}"))
    with pytest.raises(pytest.fail.Exception, match="a.pth {'heads': 6, 'act': ''}"):
        show.main(["show", f"--run={tmp_path}/a.pth", f"--images={images}", f"--out={tmp_path}/p.html", "--heads=6"])


def test_a_page_keeps_to_its_limit(monkeypatch):
    rng = np.random.default_rng(0)
    found = {"image": np.zeros((2, 48, 48, 3), np.uint8), "patch": rng.normal(size=(2, 144, 64)).astype(np.float32)}
    whole = show.page(found, ["a", "b"], 12, {"Network": "plain"})
    monkeypatch.setattr(show, "LIMIT", len(whole))
    kept = show.page(found, ["a", "b"], 12, {"Network": "plain"})
    dim = data_of(kept)[1].shape[1]
    monkeypatch.setattr(show, "LIMIT", len(whole) - 288 * 50 * 4 // 3)
    with pytest.raises(ValueError, match="the page would have more than 0 MB: give a smaller --count or --size"):
        show.page(found, ["a", "b"], 12, {"Network": "plain"})
    assert "all 64 dimensions" in whole and f"{dim} of 64 dimensions" in kept and 40 < dim < 64 and len(kept) < len(whole)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--run=r", "--out=p.html"], "error: --images is missing, for example python -m mim_jax.show "),
        (
            ["--run=r", "--images=i", "--out=p.png"],
            "error: --out is p.png, but must be a file.html in a folder that is there",
        ),
        (["--run=r", "--images=i", "--out=none/p.html"], "error: --out is none/p.html, but must be"),
        (["--run=r", "--images=i", "--out=p.html", "--count=0"], "error: --count is 0, but must be 1 or more"),
        (["--run=r", "--images={images}/b.png", "--out={out}/p.html"], "error: none of the 1 images can be read"),
        (["--run=r", "--images={out}", "--out={out}/p.html"], "error: No images below"),
        (["--run=r", "--images={images}", "--out={out}/p.html", "--size=18"], "error: size is 18, but must be a multiple"),
    ],
)
def test_what_is_wrong_is_one_line(argv, told, mae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "load_run", lambda _: mae)
    monkeypatch.setattr(pretrained, "is_run", lambda _: True)
    with pytest.raises(SystemExit, match=told) as stopped:
        show.main(["show", *(each.format(images=images, out=tmp_path) for each in argv)])
    assert "\n" not in str(stopped.value) and not list(tmp_path.iterdir())
