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

import dataclasses
import functools
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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mim_jax
from mim_jax import cli, journal, pretrained, sharding, similarity, storage
from mim_jax.data import pipeline
from mim_jax.data.augment import center_crop, denormalize
from mim_jax.data.sources import open_source, shown
from mim_jax.evaluators import IN_0_TO_1, pictures
from mim_jax.learned import Run, load_run
from mim_jax.models import vit
from mim_jax.pretrained import Given, Model, Readable
from mim_jax.report import STYLE, described, document

LIMIT = 10_000_000  # bytes of a page


@dataclasses.dataclass(frozen=True)
class Flags:
    run: str
    images: str
    out: str
    size: int | None = None
    count: int = 8
    heads: int = 0
    act: str = ""


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
        "Seen at": f"{size} x {size} pixels, the central square"
        + (f", whose side is {model.resize:.4g} of the short side" if model.resize != 1 else ""),
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
        body = BODY.format(
            panel=similarity.PANEL,
            network=escape(shown(facts["Network"].split("; ")[0])),
            explained=" ".join(explained),
            blocks="".join(blocks),
            facts=described({name: shown(text) for name, text in facts.items()}),
            data=features,
            script=similarity.SCRIPT,
        )
        return document("What a network sees", STYLE + OWN_STYLE + similarity.style(pictures.MAGMA), body)

    room = LIMIT - len(written("", facts).encode(errors="backslashreplace")) - 4096
    data, share = similarity.data(patch, grid, room, pictures.MAGMA)
    dim, of = data["dim"], patch.shape[-1]
    if dim < min(similarity.LEAST, of):
        raise ValueError(f"the page would have more than {LIMIT // 10**6} MB: give a smaller --count or --size")
    dims = f"{dim} of {of} dimensions (principal components with {share:.1%} of the squared length)"
    dims = dims if dim < of else f"all {of} dimensions"
    checked = f"off by at most {data['error']:.4f}, as measured for {min(similarity.CHECKED, patch[..., 0].size)} patches"
    facts = {**facts, "Features": f"{dims}, in 8 bits. The cosines on this page are {checked}"}
    facts["Versions"] = f"mim_jax {mim_jax.__version__}, jax {jax.__version__}"
    return written(json.dumps(data), facts)


def heat(values: np.ndarray, grid: int) -> np.ndarray:
    """A map [N] from its lowest value, black, to its highest: uint8 [grid, grid, 3]."""
    low, high = values.min(), values.max()
    return pictures.colorize((values - low) / max(high - low, 1e-12)).reshape(grid, grid, 3)


def figure(image: np.ndarray, caption: str) -> str:
    made = similarity.tag(similarity.uri(image), caption)
    return f"<figure>{made}<figcaption>{escape(caption)}</figcaption></figure>"


def field(image: np.ndarray, name: str) -> str:
    """The image whose patches can be chosen."""
    made = similarity.field(similarity.uri(image), shown(name))
    return f"<figure>{made}<figcaption>as seen: choose a patch</figcaption></figure>"


EXPLAINED = {
    "components": "<b>Principal components</b>: the first three of the patch features, as red, green and blue, computed over "
    "all images on this page. Equal colours mean the same in all of them.",
    "attention": "<b>Attention</b>: of the CLS token to the patches in the last block, each map from its lowest value (black) "
    "to its highest.",
    "columns": "<b>Reconstruction</b>: the image with masked patches in grey, and the prediction from the patches that are "
    "left. If the targets are normalized, the mean and contrast of each target are taken from the image.",
}

BODY = """<header><h1>What a network sees</h1></header>
<p class="step">{network}</p>
{panel}
<main class="blocks">{blocks}</main>
<h2>What is shown</h2>
<p>{explained} <b>Similarity</b>: the cosine of the features of two patches.</p>
<dl>{facts}</dl>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
"""

OWN_STYLE = """
.step { overflow-wrap: anywhere; }
.blocks { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.block { min-width: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.block h3 { overflow-wrap: anywhere; }
h4 { margin: .8rem 0 0; font-size: .85rem; font-weight: 600; }
.large, .three, .heads { display: grid; gap: .6rem; margin-top: .5rem; }
.large { grid-template-columns: repeat(2, 1fr); } .three { grid-template-columns: repeat(3, 1fr); }
.heads { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); }
.block img { width: 100%; border-radius: 3px; }
.block figcaption { margin-top: .2rem; font-size: .78rem; line-height: 1.3; }
"""

# The command


def chosen(given: Sequence[str], count: int) -> tuple[list[Path], list[str], int]:
    """(image files, their names, the number of those that there are): at most `count`, evenly spaced."""
    paths = [storage.absolute(name) for name in given]
    if len(paths) == 1 and "," in given[0] and not os.path.exists(paths[0]):  # False of a name that is too long
        return chosen(given[0].split(","), count)
    names = list(given)
    if len(paths) > 1 and (folders := [path for path in paths if path.is_dir()]):
        raise ValueError(f"one folder or several files can be shown, and {folders[0]} is a folder")
    if len(paths) == 1 and paths[0].is_dir():
        source: Any = open_source("folder", paths[0])
        names, paths = list(source.files), [source.root / file for file in source.files]
    rows = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int))
    return [paths[row] for row in rows], [names[row] for row in rows], len(paths)


def main(argv: list[str]) -> None:
    given, more = cli.begin(Flags, argv, __doc__ or "", "...")
    with cli.in_one_line("stopped; no page is written"):
        if given.count < 1:
            raise ValueError(f"--count is {given.count}, but must be 1 or more")
        out = cli.of_this_machine("out", given.out)
        if out.suffix != ".html" or not out.parent.is_dir():
            raise ValueError(f"--out is {given.out}, but must be a file.html in a folder that is there")
        paths, names, among = chosen([given.images, *more], given.count)
        folder = storage.absolute(given.run)
        run = load_run(folder) if pretrained.is_run(folder) else None
        told: Any = {"heads": given.heads, "act": given.act}
        model = pretrained.of_run(folder, run, **told) if run else pretrained.load(folder, **told)
        content = show(model, run, paths, names, given.size, among).encode(errors="backslashreplace")
        with journal.named_errors(out):
            journal.write_whole(out, content)
        print(f"{shown(str(out))}: {len(content):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv)
