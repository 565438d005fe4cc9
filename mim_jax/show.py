"""What a network sees in images: one HTML page for a browser, without a server.

  python -m mim_jax.show --run=runs/dino --images=~/images --out=page.html
  python -m mim_jax.show --run=dinov2_vits14.pth --size=448 --out=page.html --images a.jpg b.jpg c.jpg

  --run=DIR_OR_WEIGHTS     the workdir of a run, or a file or folder of weights
  --images=FOLDER          by the rules of mim_jax/data/folder.py; or files: --images=a.jpg,b.jpg or --images a.jpg b.jpg
  --out=FILE.html          it is replaced if it is there
  --size=224               side that the network sees, in pixels; by default that of the run
  --count=8                images at most; of more, evenly spaced ones are shown
  --heads=6 --act=gelu     of a file of weights that does not say it; it is asked for then

For each image: what the network sees of it; the first three principal components of its patch features, which are those of all
images shown; the attention of the CLS token in the last block, by head, if there is such a token; and of a run that can
reconstruct (MAE, SimMIM) what it makes of a masked image. A click on a patch shows its cosine similarity to all patches of all
images. The page has at most 10 MB: features are rounded to 8 bits and, where that is not enough, projected to fewer dimensions.
"""

import base64
import functools
import io
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

import mim_jax
from mim_jax import compiled, journal, pretrained, sharding, storage
from mim_jax.command import raised_here
from mim_jax.data import pipeline
from mim_jax.data.augment import center_crop, denormalize
from mim_jax.data.sources import open_source, shown, user_cache
from mim_jax.evaluators import IN_0_TO_1, pictures
from mim_jax.learned import Run, load_run
from mim_jax.models import vit
from mim_jax.pretrained import Given, Model, Readable
from mim_jax.report import STYLE
from mim_jax.stopping import leave

EXAMPLE = "python -m mim_jax.show --run=runs/dino --images=~/images --out=page.html"
LIMIT = 10_000_000  # bytes of a page
LEAST = 16  # dimensions of a feature that a page may keep
SMALL = 128  # pixels of a side up to which pictures are kept exactly, and their pixels are shown as squares
CHECKED = 64  # patches whose similarities to all others are compared with those of the whole features


def show(model: Model, run: Run | None, paths: Sequence[Path], names: Sequence[str], size: int | None, among: int) -> str:
    """The page, of these image files by these names, `among` which they were chosen. `run`: that of the model, if it is one's.

    Bad images are named on standard error and left out. Raises ValueError for another size than the network can see, if no
    image is left, and if the page would be too large.
    """
    size = model.checked(size, 1)
    canvas = model.canvas_of(size)
    given: Any = Given(paths)
    levels = pipeline.survey(given, canvas, model.levels, model.max_pixels).levels
    source = Readable(given, canvas, levels, model.max_pixels)
    images: list[Any] = [source[row].image for row in range(len(paths))]
    for why in source.bad.values():
        print(shown(f"bad image: {why}"), file=sys.stderr)
    good = [row for row in range(len(paths)) if row not in source.bad]
    if not good:
        raise ValueError(f"none of the {len(paths)} images can be read")
    found = see(model, run if run and can_reconstruct(run.method) else None, [images[row] for row in good], size)
    grid = size // model.patch_size
    facts = {
        "Network": model.description,
        "Images": f"{len(good)} of {among:,}" + ", evenly spaced" * (among > len(paths)),
        "Seen at": f"{size} x {size} pixels, the central square of {model.resize:.4g} times the short side",
        "Patches": f"{grid} x {grid} of {model.patch_size} pixels",
    }
    if levels:
        facts["Levels"] = f"{levels[0]:.6g} to {levels[1]:.6g} of images with more than 8 bits become 0 to 255"
    facts |= {"Bad image": "; ".join(source.bad.values())} if source.bad else {}
    return page(found, [names[row] for row in good], grid, facts)


def can_reconstruct(method: Any) -> bool:
    """Whether it needs no more than its own parameters for it."""
    return "reconstruction" in method.pictures and method.target is None


def see(model: Model, run: Run | None, images: Sequence[np.ndarray], size: int) -> dict[str, Any]:
    """What there is to show of images uint8 [h, w, 3]: "image" uint8 [B, size, size, 3], as it is seen; "patch" float32
    [B, N, D]; "attention" float32 [B, heads, N] of the last block's CLS token, if there is one; and with a `run` "columns",
    pictures [B, H, W, 3] by caption: the image masked, and what the run's method makes of it."""
    source, whole = Readable(Given(images), model.canvas_of(size), None, model.max_pixels), NamedSharding(model.mesh, P())
    rows = np.arange(len(images), dtype=np.int32)
    masks = run.method.views.example_masks(len(rows), 1) if run else {}
    learned = jax.device_put((run.params, run.extra), whole) if run else ({}, {})
    seen = jax.jit(functools.partial(of_batch, model, run.method if run else None, size))
    made = []
    with jax.set_mesh(model.mesh):
        batch_size = model.batch_size(len(rows), size)
        for batch in pipeline.eval_batches(source, rows, canvas=source.canvas, batch_size=batch_size):
            inputs = {name: batch[name] for name in ("image", "size")}
            inputs |= {name: mask[batch["place"]] for name, mask in masks.items()}
            made.append(jax.device_get(seen(model.placed, *learned, sharding.global_batch(inputs))))
    found: dict[str, Any] = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *made)
    if run:
        columns = found["columns"]
        masked = pictures.darkened(columns.pop("image"), masks["mask"][:, 0])
        found["columns"] = OrderedDict({"masked input": masked}) | columns
    return found


def of_batch(model: Model, method: Any, size: int, parts: Any, params: Any, extra: Any, batch: dict[str, jax.Array]) -> Any:
    """See `see`; the "columns" have the "image" itself, not masked."""

    def cropped(side: int, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
        images = center_crop(batch["image"], batch["size"], side, model.resize, mean, std)
        return sharding.pin_batch(images)

    network, images = model.network, cropped(size, *IN_0_TO_1)
    found: dict[str, Any] = {
        "image": denormalize(images, *IN_0_TO_1),
        "patch": network.features(parts, images)["patch"].astype(jnp.float32),
    }
    backbone = network.backbone
    if isinstance(backbone, vit.ViT) and backbone.cls:
        normal = (images - jnp.array(network.mean)) / jnp.array(network.std)
        weights = vit.last_attention(backbone, parts["backbone"], normal)
        found["attention"] = weights[:, :, 0, 1 + backbone.registers :].astype(jnp.float32)
    if method is not None:
        views = {name: mask for name, mask in batch.items() if name not in ("image", "size")}
        views["global"] = cropped(method.views.crops[0].size, method.views.mean, method.views.std)[:, None]
        columns = {"image": views["global"], **method.reconstruction(params, extra, {}, views)}
        found["columns"] = OrderedDict((name, method.views.denormalize(x)[:, 0]) for name, x in columns.items())
    return found


# The page


def page(found: Mapping[str, Any], names: Sequence[str], grid: int, facts: Mapping[str, str]) -> str:
    """What `see` found of good images, on a page. `facts`, name -> text, are shown at its end."""
    patch = found["patch"]
    colors, attention = pictures.principal_components(patch), found.get("attention")
    columns, blocks = found.get("columns", {}), []
    for i, name in enumerate(names):
        large = field(found["image"][i], name) + figure(colors[i], "principal components")
        parts = [f'<div class="large">{large}</div>']
        if attention is not None:
            heads = [attention[i].mean(0), *attention[i]]
            captions = ["mean", *(f"head {number + 1}" for number in range(len(heads) - 1))]
            maps = [figure(heat(each, grid), text) for each, text in zip(heads, captions, strict=True)]
            parts.append(f'<h4>Attention of CLS</h4><div class="heads">{"".join(maps)}</div>')
        if columns:
            made = "".join(figure(images[i], text) for text, images in columns.items())
            parts.append(f'<h4>Reconstruction</h4><div class="three">{made}</div>')
        blocks.append(f'<article class="block"><h3>{escape(shown(name))}</h3>{"".join(parts)}</article>')
    explained = [EXPLAINED["components"]] + [EXPLAINED["attention"]] * (attention is not None)
    explained += [EXPLAINED["columns"]] * bool(columns)

    def written(features: str, facts: Mapping[str, str]) -> str:
        return PAGE.format(
            style=STYLE + OWN_STYLE,
            ramp=", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*color) for color in pictures.MAGMA),
            network=escape(shown(facts["Network"].split("; ")[0])),
            explained=" ".join(explained),
            blocks="".join(blocks),
            facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(shown(text))}</dd>" for name, text in facts.items()),
            data=features,
            script=SCRIPT,
        )

    flat = patch.reshape(-1, patch.shape[-1])
    room = LIMIT - len(written("", facts).encode(errors="backslashreplace")) - 4096
    numbers, scale, share = quantized(flat, room)
    dims = f"all {flat.shape[1]} dimensions"
    if numbers.shape[1] < flat.shape[1]:
        dims = f"{numbers.shape[1]} of {flat.shape[1]} dimensions (principal components with {share:.1%} of the squared length)"
    checked = f"off by at most {error(flat, numbers, scale):.4f}, as measured for {min(CHECKED, len(flat))} patches"
    facts = {**facts, "Features": f"{dims}, in 8 bits. The cosines on this page are {checked}"}
    facts["Versions"] = f"mim_jax {mim_jax.__version__}, jax {jax.__version__}"
    data = {"grid": grid, "dim": numbers.shape[1], "scale": scale, "ramp": pictures.MAGMA.tolist()}
    return written(json.dumps(data | {"features": base64.b64encode(numbers.tobytes()).decode()}), facts)


def quantized(features: np.ndarray, room: int) -> tuple[np.ndarray, float, float]:
    """(int8 [T, d], scale, share): the products of rows are `scale` squared times the cosines of the features [T, D].

    d is D, or as many principal components (of the normalised features, around 0) as fit into `room` bytes of base64; they hold
    this share of the squared length. Raises ValueError if LEAST do not fit.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count, dim = unit.shape
    fits, share = max(room, 0) * 3 // 4 // count, 1.0
    if fits < min(LEAST, dim):
        raise ValueError(f"the page would have more than {LIMIT // 10**6} MB: give a smaller --count or --size")
    if fits < dim:
        _, axes = np.linalg.eigh(unit.T @ unit)  # in ascending order
        length = np.sum(unit**2)
        unit = unit @ axes[:, : -fits - 1 : -1]
        share = float(np.sum(unit**2) / length)
    scale = 127 / float(np.abs(unit).max())
    return np.rint(unit * scale).astype(np.int8), scale, share


def error(features: np.ndarray, numbers: np.ndarray, scale: float) -> float:
    """The largest error of the cosines of CHECKED evenly spaced patches to all."""
    rows = np.unique(np.linspace(0, len(features) - 1, CHECKED).astype(int))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    whole, kept = numbers.astype(np.float32), numbers[rows].astype(np.float32)
    return float(np.abs(unit[rows] @ unit.T - kept @ whole.T / scale**2).max())


def heat(values: np.ndarray, grid: int) -> np.ndarray:
    """A map [N] from its lowest value, black, to its highest: uint8 [grid, grid, 3]."""
    low, high = values.min(), values.max()
    return pictures.colorize((values - low) / max(high - low, 1e-12)).reshape(grid, grid, 3)


def picture(image: np.ndarray, alt: str) -> str:
    """An image uint8 [H, W, 3] in the page. Small ones are exact and have sharp pixels."""
    small, file = max(image.shape[:2]) <= SMALL, io.BytesIO()
    kind = "png" if small else "jpeg"
    Image.fromarray(np.ascontiguousarray(image)).save(file, kind, **({"optimize": True} if small else {"quality": 90}))
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{" class=sharp" * small} alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def figure(image: np.ndarray, caption: str) -> str:
    return f"<figure>{picture(image, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def field(image: np.ndarray, name: str) -> str:
    """The image whose patches can be chosen."""
    label = escape(f"{shown(name)}: the arrow keys choose a patch")
    return (
        f'<figure><div class="field" tabindex="0" role="application" aria-label="{label}">{picture(image, "")}'
        "<canvas></canvas></div><figcaption>as seen: choose a patch</figcaption></figure>"
    )


EXPLAINED = {
    "components": "<b>Principal components</b>: the first three of the patch features, as red, green and blue, computed over "
    "all images on this page. Equal colours mean the same in all of them.",
    "attention": "<b>Attention</b>: of the CLS token to the patches in the last block, each map from its lowest value (black) "
    "to its highest.",
    "columns": "<b>Reconstruction</b>: the image with masked patches in grey, and the prediction from the patches that are "
    "left. If the targets are normalized, the mean and contrast of each target are taken from the image.",
}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a network sees</title>
<style>{style}
.ramp {{ background: linear-gradient(to right, {ramp}); }}</style>
</head>
<body>
<header><h1>What a network sees</h1></header>
<p class="step">{network}</p>
<div class="told"><p id="told" aria-live="polite">Click a patch of an image, or tab to an image and use the arrow keys: the
similarity of its feature to all patches of all images is drawn over them.</p>
<p id="scale" hidden><span id="low"></span><i class="ramp"></i><span>1</span><span id="here"></span>
<button id="clear" type="button">Clear</button></p></div>
<main class="blocks">{blocks}</main>
<h2>What is shown</h2>
<p>{explained} <b>Similarity</b>: the cosine of the features of two patches.</p>
<dl>{facts}</dl>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

OWN_STYLE = """
.step { overflow-wrap: anywhere; }
.told { position: sticky; top: 0; z-index: 1; margin: 1rem 0; padding: .6rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; font-size: .9rem; }
.told p { margin: 0; overflow-wrap: anywhere; }
#scale:not([hidden]) { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .6rem; margin-top: .3rem; }
.ramp { display: inline-block; width: 7rem; height: .7rem; border-radius: 3px; }
#here { color: var(--faint); flex: 1; }
button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: .1rem .8rem; cursor: pointer; }
.blocks { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.block { min-width: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.block h3 { overflow-wrap: anywhere; }
h4 { margin: .8rem 0 0; font-size: .85rem; font-weight: 600; }
.large, .three, .heads { display: grid; gap: .6rem; margin-top: .5rem; }
.large { grid-template-columns: repeat(2, 1fr); } .three { grid-template-columns: repeat(3, 1fr); }
.heads { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); }
.block img { width: 100%; border-radius: 3px; } .sharp, canvas { image-rendering: pixelated; }
.block figcaption { margin-top: .2rem; font-size: .78rem; line-height: 1.3; }
.field { position: relative; cursor: crosshair; touch-action: manipulation; scroll-margin-top: 7rem; }
.field:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; }
.field canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: .75; display: none; }
.on .field canvas { display: block; } .on .field img { filter: grayscale(1); }
.mark { position: absolute; border: 2px solid #fff; outline: 1px solid #000; display: none; } .on .mark { display: block; }
"""

# `features` are int8, patch by patch and image by image. In a list of patches an image has grid * grid.
SCRIPT = """
"use strict";
function decoded(data) { return Int8Array.from(atob(data.features), (c) => c.charCodeAt(0)); }

function cosines(data, features, patch) {
  const dim = data.dim, found = new Float32Array(features.length / dim);
  for (let i = 0; i < found.length; i++) {
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += features[i * dim + d] * features[patch * dim + d];
    found[i] = sum / data.scale ** 2;
  }
  return found;
}

function color(data, value) {
  const last = data.ramp.length - 1, place = Math.min(Math.max(value, 0), 1) * last;
  const i = Math.min(Math.floor(place), last - 1);
  return data.ramp[i].map((start, c) => start + (place - i) * (data.ramp[i + 1][c] - start));
}

function start() {
  const part = (id) => document.getElementById(id);
  const data = JSON.parse(part("data").textContent), features = decoded(data), grid = data.grid, size = grid * grid;
  const fields = [...document.querySelectorAll(".field")], mark = document.createElement("i");
  let at = null, values = null;
  mark.className = "mark";
  mark.style.width = mark.style.height = `${100 / grid}%`;

  function choose(image, row, column) {
    at = [image, row, column];
    values = cosines(data, features, image * size + row * grid + column);
    const low = values.reduce((a, b) => Math.min(a, b));
    fields.forEach((field, i) => {
      const canvas = field.querySelector("canvas"), drawn = new ImageData(grid, grid);
      for (let p = 0; p < size; p++) {
        drawn.data.set([...color(data, (values[i * size + p] - low) / Math.max(1 - low, 1e-6)), 255], 4 * p);
      }
      canvas.width = canvas.height = grid;
      canvas.getContext("2d").putImageData(drawn, 0, 0);
    });
    mark.style.left = `${100 * column / grid}%`;
    mark.style.top = `${100 * row / grid}%`;
    fields[image].append(mark);
    const name = fields[image].closest("article").querySelector("h3").textContent;
    part("told").textContent = `Similarity to row ${row + 1}, column ${column + 1} of ${name}`;
    part("low").textContent = low.toFixed(2);
    part("here").textContent = "";
    part("scale").hidden = false;
    document.body.classList.add("on");
  }

  function clear() {
    at = values = null;
    part("told").textContent = "Click a patch of an image.";
    part("scale").hidden = true;
    document.body.classList.remove("on");
  }

  fields.forEach((field, image) => {
    const within = (share) => Math.min(Math.max(Math.floor(share * grid), 0), grid - 1);
    const place = (event) => {
      const box = field.getBoundingClientRect();
      return [within((event.clientY - box.top) / box.height), within((event.clientX - box.left) / box.width)];
    };
    field.addEventListener("click", (event) => choose(image, ...place(event)));
    field.addEventListener("focus", () => {
      if (field.matches(":focus-visible")) choose(image, grid >> 1, grid >> 1);
    });
    field.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Escape") clear();
      if (!move) return;
      event.preventDefault();
      const [row, column] = at && at[0] === image ? at.slice(1) : [grid >> 1, grid >> 1];
      choose(image, within((row + move[0] + 0.5) / grid), within((column + move[1] + 0.5) / grid));
    });
    field.addEventListener("pointermove", (event) => {
      if (!values) return;
      const [row, column] = place(event);
      part("here").textContent = `under the pointer ${values[image * size + row * grid + column].toFixed(2)}`;
    });
  });
  part("clear").addEventListener("click", clear);
}
start();
"""


# The command


def chosen(given: Sequence[str], count: int) -> tuple[list[Path], list[str], int]:
    """(image files, their names, the number of those that there are): at most `count`, evenly spaced."""
    paths = [storage.absolute(name) for name in given]
    if len(paths) == 1 and "," in given[0] and not os.path.exists(paths[0]):  # False of a name that is too long
        return chosen(given[0].split(","), count)
    names = list(given)
    if len(paths) == 1 and paths[0].is_dir():
        source: Any = open_source("folder", paths[0])
        names, paths = list(source.files), [source.root / file for file in source.files]
    rows = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int))
    return [paths[row] for row in rows], [names[row] for row in rows], len(paths)


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """(the flags, the images). Exits with one line for what is wrong."""
    given = flags.FlagValues()
    for name in ("run", "images", "out"):
        flags.DEFINE_string(name, None, "", flag_values=given)
    flags.DEFINE_string("act", "", "", flag_values=given)
    flags.DEFINE_integer("heads", 0, "", flag_values=given)
    flags.DEFINE_integer("size", None, "", flag_values=given)
    flags.DEFINE_integer("count", 8, "", flag_values=given, lower_bound=1)
    given.set_gnu_getopt()
    try:
        rest = given(argv)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    for name in ("run", "images", "out"):
        if not given[name].value:
            sys.exit(f"error: --{name} is missing, for example {EXAMPLE}")
    out = Path(given.out).expanduser().absolute()
    if storage.remote(given.out) or out.suffix != ".html" or not out.parent.is_dir():
        sys.exit(f"error: --out is {given.out}, but must be a file.html in a folder of this machine")
    return given, [given.images, *rest]


def main(argv: list[str]) -> None:
    if {"-h", "-help", "--help"} & set(argv):
        print(__doc__)
        return
    given, images = parse(argv)
    logging.set_verbosity(logging.WARNING)
    compiled.keep(user_cache() / "compiled")
    try:
        paths, names, among = chosen(images, given.count)
        out, folder = Path(given.out).expanduser().absolute(), storage.absolute(given.run)
        run = load_run(folder) if pretrained.is_run(folder) else None
        model = pretrained.of_run(folder, run) if run else pretrained.load(folder, heads=given.heads, act=given.act)
        content = show(model, run, paths, names, given.size, among).encode(errors="backslashreplace")
        with journal.named_errors(out):
            journal.write_whole(out, content)
        print(f"{shown(str(out))}: {len(content):,} bytes", file=sys.stderr)
    except KeyboardInterrupt:
        leave(130, "stopped; no page is written")
    except (OSError, ValueError) as error:
        if not raised_here(error):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    from mim_jax import show as this  # under its own name, by which `raised_here` knows it

    this.main(sys.argv)
