"""The encoder of a run, or of a file of weights, in the layout of another library.

  python -m mim_jax.export --run=runs/dino --format=timm --out=dino_timm
  python -m mim_jax.export --run=runs/dino --format=hf --out=dino_hf
  python -m mim_jax.export --run=runs/dino --format=official --out=dino_official
  python -m mim_jax.export --run=runs/dino --format=safetensors --out=dino_encoder
  python -m mim_jax.export --run=runs/dino --format=onnx --out=dino_onnx --size=112
  python -m mim_jax.export --run=runs/dino --format=jax --out=dino_jax
  python -m mim_jax.export --run=runs/tuned --head --format=timm --out=tuned_timm

timm: `timm.create_model("local-dir:dino_timm", pretrained=True)`. hf: `AutoModel.from_pretrained("dino_hf")` of transformers;
a ViT with absolute positions becomes a DINOv2 there, one that pools before its norm a BEiT. official: the names of the
method's own repository, with heads. safetensors: the names of this package, for `mim_jax.load("dino_encoder")` and all that
reads weights.
onnx, jax: a program that computes the features of images of one size, `--size`, by default that of the run; batches are of any.
model.onnx takes "images" [batch, 3, S, S] in 0..1 and gives "cls" [batch, D] and "patch" [batch, N, D]; model.jax is
for `jax.export.deserialize`: it takes [batch, S, S, 3] and gives a dict of the same.
--head: with the classifier of a run of `supervised` or `linear`, or of a file; `AutoModelForImageClassification` loads it, and
a program gives "scores" [batch, classes], too.
--which=student: not the teacher, of a run that has both.
The folder of --out must be new or empty.

What is written is read again. Its features and scores of 8 images are compared with those of the run, and the largest
difference is printed. The images are those that the run is measured on, those of `--images=FOLDER`, or CIFAR-10's if they were
fetched before; random ones if none can be had.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError

import mim_jax
from mim_jax import checkpoint, cli, convert, families, journal, layouts, layouts_out, pretrained, storage, weight_files
from mim_jax.config import begins_with, of_run
from mim_jax.layouts_out import Config
from mim_jax.learned import Run, load_run
from mim_jax.methods.base import Encoder, Params
from mim_jax.models.heads import LinearHead
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT

PROGRAMS = {"onnx": ("onnx", "'mim_jax[onnx]'"), "jax": ("flatbuffers", "flatbuffers")}  # what each needs; its name for pip
TOLERANCE = 1e-4  # of features, relative to the largest
LICENCE = re.compile("released weights|licen[cs]e", re.IGNORECASE)  # in a line of `layouts.read`


class Source(NamedTuple):
    """What is exported: an encoder in float32, its parameters, what is pooled of it, and its run, if it is of one.

    `lines`: what is known of it.
    """

    encoder: Encoder
    parts: Params
    head: LinearHead
    run: Run | None
    seen: families.Seen = families.Seen()
    lines: Sequence[str] = ()

    @property
    def crop(self) -> float:
        return self.seen.crop or pretrained.RESIZE

    @property
    def parameters(self) -> Params:
        return {"backbone": self.parts["backbone"], "head": self.head.params}

    def outputs(self, parameters: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Images [B, H, W, C] in 0..1 -> "cls" [B, D], "patch" [B, N, D] and, of a classifier, "scores" [B, K]."""
        found = self.encoder.features({"backbone": parameters["backbone"]}, images)
        found = {name: found[name] for name in ("cls", "patch")}
        if self.head.linear:
            found["scores"] = self.head._replace(**parameters["head"]).scores(found)
        return found


def source_of(path: str, with_head: bool = False, which: str = "") -> Source:
    """The newest checkpoint of a run, of its teacher or of `which`, or a file of weights. Raises ValueError for one without an
    encoder, and, `with_head`, without a classifier."""
    run = None
    if layouts.is_weights(path):
        if which:
            raise ValueError(f"{path} is no run: only runs have a teacher and a student")
        weights = layouts.read(path, layouts.Told(channels=0))
        encoder, parts, head = weights.network, weights.parts, weights.head
        seen, lines = weights.seen, weights.lines
        if with_head and not head.linear:
            raise ValueError(f"there is no classifier in {path}")
    else:
        run = load_run(path, which)
        encoder, parts = run.method.network(), run.params
        evaluated, lines = run.config.eval, [what_it_is(run), *origins(run)]
        seen = families.Seen(evaluated.resize, evaluated.img_size or run.config.model.img_size, run.config.data.canvas)
        if not isinstance(encoder, Encoder):
            raise ValueError(f"{path} is a run of {run.config.method}, which has no ViT or Swin")
        try:
            head = run.method.classifier(run.params, run.extra)
        except ValueError:
            if with_head:
                raise
            head = LinearHead("cls" if getattr(encoder.backbone, "cls", False) else "mean", {}, {})
    if head.norm and head.eps != getattr(encoder.backbone, "norm_eps", head.eps):
        raise ValueError(f"the norms have epsilon {encoder.backbone.norm_eps:g}, that of the mean {head.eps:g}")
    encoder = dataclasses.replace(encoder, backbone=encoder.backbone.clone(dtype=jnp.float32, remat="none", microbatches=1))
    head = head if with_head else head._replace(linear={}, labels=())
    return Source(encoder, parts, head, run, seen, lines)


def what_it_is(run: Run) -> str:
    config, whose = run.config, f", the {run.which}" * bool(run.which)
    recipe = f" (recipe {config.recipe})" if config.get("recipe") else ""
    return f"method: {config.method}{recipe}, data: {config.data.name}, step {run.step} of {config.total}{whose}"


def origins(run: Run) -> list[str]:
    """What a run began with, as far back as it is known, and what it learned from; with the licence of released weights."""
    found: list[str] = []
    config: Any = run.config
    while (begun := begins_with(config)) and len(found) < 10:
        found.append(f"it began with {begun}{licence(begun)}")
        config = of_run(workdir_of(begun) / "config.json") or config.get("encoder") or {}
    if weights := (run.config.get("target") or {}).get("weights"):
        found.append(f"it learned from {weights}{licence(weights)}")
    return found


def workdir_of(path: str) -> Path:
    """The workdir of a run, of which this is the workdir or a checkpoint."""
    folder = storage.absolute(path)
    return folder.parents[1] if checkpoint.is_checkpoint(folder) else folder


def licence(path: str) -> str:
    """That of a run or file of weights: by name where it is known."""
    lines = []
    with contextlib.suppress(OSError, ValueError):  # it may be gone
        lines = layouts.read(path).lines if layouts.is_weights(path) else []
    known = [line for line in lines if LICENCE.search(line)]
    return ", whose licence holds for this, too" + f" ({'; '.join(known)})" * bool(known)


class Pictures(NamedTuple):
    """Images to compare on, [B, H, W, C] in 0..1, what they are, and the names of the data set's classes, if it is known."""

    images: np.ndarray
    what: str
    classes: tuple[str, ...] = ()


def pictures(source: Source, size: int, named: str = "") -> Pictures:
    """See the head of this module. Raises OSError and ValueError for images that are `named` and cannot be read."""
    channels, net = len(source.encoder.mean), source.encoder.backbone
    model = pretrained.Model(source.encoder, source.parts, net.img_size, "", source.crop)
    try:
        if source.run:
            model = pretrained.of_run(Path(), source.run)
        found = pretrained.at_hand(named, source.run and source.run.config.data)
        classes = () if named else tuple(found.classes)
        return Pictures(np.asarray(pretrained.with_channels(model.seen(found, size), channels)), found.description, classes)
    except (OSError, ValueError) as error:
        if named:
            raise
        images = np.random.default_rng(0).random((4, size, size, channels), np.float32)
        return Pictures(images, f"random ones, as there are no others ({error}); name some, --images=FOLDER")


def program(form: str, source: Source, size: int) -> tuple[bytes, Config]:
    """(the file, what goes in and comes out) of a program that computes the features of images of `size` x `size` pixels.

    Raises ValueError for a size that the encoder cannot have, and where a library is missing."""
    needed, wheel = PROGRAMS[form]
    if importlib.util.find_spec(needed) is None:
        raise ValueError(f"the format {form} cannot be written without {needed}: pip install {wheel}")
    channels, run = len(source.encoder.mean), functools.partial(source.outputs, source.parameters)
    try:
        shapes = jax.eval_shape(run, jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32))
    except ScopeParamShapeError:
        raise ValueError(f"the encoder cannot have images of {size} pixels: its windows would be larger than trained") from None
    image = ["batch", channels, size, size] if form == "onnx" else ["batch", size, size, channels]
    config: Config = {"images": image, "range": [0, 1]} | {name: ["batch", *shapes[name].shape[1:]] for name in shapes}
    if form == "onnx":
        from mim_jax import onnx_graph

        made = onnx_graph.encoder(source.encoder, {"backbone": source.parts["backbone"]}, size, source.head)
        return made.SerializeToString(), config | {"opset": onnx_graph.OPSET}
    (batch,) = jax.export.symbolic_shape("batch")
    export_to = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))
    exported = export_to(jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32))
    return bytes(exported.serialize()), config | {"platforms": list(exported.platforms)}


def run_again(form: str, source: Source, images: np.ndarray, file: Path) -> float | None:
    """As `compared`, of what `program` made, for 1 and for all images; None where ONNX Runtime is not installed: the graph is
    then checked, but not run."""
    run: Any = None
    if form == "jax":
        run = jax.export.deserialize(bytearray(file.read_bytes())).call
    else:
        import onnx

        onnx.checker.check_model(str(file), full_check=True)
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            names = [output.name for output in session.get_outputs()]
            given = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
            return dict(zip(names, session.run(names, given)))

    with jax.default_matmul_precision("highest" if form == "onnx" else None):
        ours = jax.jit(source.outputs)(source.parameters, images)
    found = [run(images[:count]) for count in (1, len(images))]
    return max(difference({name: value[: len(other["cls"])] for name, value in ours.items()}, other) for other in found)


def compared(source: Source, images: np.ndarray, folder: Path) -> float:
    """The largest difference of features and scores of images between a source and what is in a folder, relative to the
    largest of each kind."""
    pair = source, source_of(str(folder), bool(source.head.linear))
    return difference(*(jax.jit(one.outputs)(one.parameters, images) for one in pair))


def difference(ours: Mapping[str, Any], others: Mapping[str, Any]) -> float:
    return max(float(np.abs(ours[name] - others[name]).max() / np.abs(ours[name]).max()) for name in ours)


def card(path: str, source: Source, side: int, config: Config, library: str, command: str) -> str:
    """README.md of the folder: what it is, and how it was made. `side`: of the images, in pixels."""
    run = source.run
    what, task = ("A classifier", "classification") if source.head.linear else ("An encoder", "feature-extraction")
    lines = ["---", f"library_name: {library}", f"pipeline_tag: image-{task}", "tags: [mim_jax]", "---", ""]
    lines += [f"# {what} {'trained' if run else 'converted'} with mim_jax", "", f"From `{path}`:", ""]
    lines += [*(f"* {line}" for line in source.lines), ""]
    mean, std = (", ".join(f"{x:.6g}" for x in color) for color in (source.encoder.mean, source.encoder.std))
    lines += [
        f"It sees the central square of an image, {source.crop:.4g} of its short side, resized to {side} pixels. Images in "
        f"0..1 are normalised by mean {mean} and std {std}.",
        "",
    ]
    if canvas := native(source).canvas:
        lines += [
            f"As in the training, mim_jax first reduces larger images to {canvas} x {canvas} pixels. Other programs do not: "
            "of such images their features differ.",
            "",
        ]
    if run:
        scores = scores_of(path, run.step)
        lines += ["Scores on held-out images, with their baselines:", "", *scores, ""] if scores else []
        lines += [f"Trained with {', '.join(f'{name} {version}' for name, version in run.versions.items())}.", ""]
    lines += [f"Written by mim_jax {mim_jax.__version__}" + (f": `{command}`" if command else "."), ""]
    return "\n".join([*lines, "```json", json.dumps(config, indent=1), "```", ""])


def scores_of(path: str, step: int) -> list[str]:
    """The last score of each kind that a run has up to this step. `path`: its workdir, or one of its checkpoints."""
    found = journal.History()
    for row in journal.rows(workdir_of(path)):
        if row["step"] <= step:
            found.add(row)
    scores = {tag: value for tag, value in sorted(found.latest.items()) if tag.startswith("eval/") and value is not None}
    return [f"* {tag}: {value:.4g}" for tag, value in scores.items()]


def export(
    path: str,
    form: str,
    out: str | Path,
    size: int | None = None,
    with_head: bool = False,
    images: str = "",
    which: str = "",
    command: str = "",
) -> tuple[float | None, str]:
    """Writes the folder `out`; returns (what `compared` or `run_again` finds, of what). Standard error says what was read.

    Args:
        path, which: see `source_of`.
        size: of the images of a program.
        images: a folder or files to compare on.
        command: how to repeat this; for README.md.

    Raises ValueError if the layout has no place for the encoder, if `out` is not empty, and for a difference above TOLERANCE.
    The folder is there when it has been compared.
    """
    journal.fresh_folder(out)
    out = Path(out)
    if form == "official" and layouts.is_weights(path):
        raise ValueError("official names are written for runs, whose method says which")
    source = source_of(path, with_head, which)
    print(f"{path}: {'; '.join(source.lines)}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.unchecked-", dir=out.parent) as work:
        made = Path(work) / out.name
        found, what = made_and_compared(path, form, made, size, source, images, command)
        if found is not None and not found <= TOLERANCE:
            raise ValueError(f"{what} differ by {found:.1e} of the largest, more than {TOLERANCE:g}: nothing is written")
        os.rename(made, out)
    return found, what


def made_and_compared(
    path: str, form: str, out: Path, size: int | None, source: Source, images: str, command: str
) -> tuple[float | None, str]:
    """See `export`."""
    side = source.encoder.backbone.img_size if size is None else size
    if form == "official":
        written(path, form, out, size, source, command)
        again = convert.from_torch(weight_files.read(out / "model.safetensors"), family_of(source))
        jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, dict(source.parts)))
        return 0.0, "all tensors"
    seen = pictures(source, side, images)
    if source.head.linear and len(seen.classes) == source.head.classes:
        source = source._replace(head=source.head._replace(labels=seen.classes))
    written(path, form, out, size, source, command)
    what = f"features{' and scores' * bool(source.head.linear)} of {len(seen.images)} images ({seen.what})"
    if form in PROGRAMS:
        return run_again(form, source, seen.images, out / f"model.{form}"), what
    return compared(source, seen.images, out), what


def written(
    path: str, form: str, out: str | Path, size: int | None = None, source: Source | None = None, command: str = ""
) -> None:
    """Writes the folder `out`. `source`: what is at `path`, if not the encoder alone; the rest as of `export`."""
    journal.fresh_folder(out)
    source = source_of(path) if source is None else source
    out, config, encoder = Path(out), Config(), source.encoder
    net = encoder.backbone
    side = net.img_size if size is None else size
    if size is not None and form not in PROGRAMS:
        raise ValueError(f"size is for the formats {' and '.join(PROGRAMS)}")
    if side < 1 or side % net.patch_size:
        raise ValueError(f"size is {side}, but must be a multiple of the {net.patch_size} pixels of a patch")
    if form in PROGRAMS:
        data, config = program(form, source, side)
        files = {f"model.{form}": data}
    elif form == "official":
        files = {"model.safetensors": weight_files.safetensors(convert.to_torch(source.parts, family_of(source)))}
    elif form == "safetensors":
        parts, lines = {"backbone": source.parts["backbone"]}, [f"an encoder of {path}", *source.lines]
        settings = settings_of(net)
        files = layouts.Weights(settings, encoder.mean, encoder.std, parts, lines, source.head, source.seen).files
    else:
        write = layouts_out.timm if form == "timm" else layouts_out.transformers
        given = layouts_out.Encoded(net, source.parts["backbone"], encoder.mean, encoder.std, source.head, source.crop)
        arrays, config = write(given)
        config = config | {"mim_jax_seen": native(source)._asdict()}
        files = {"model.safetensors": weight_files.safetensors(arrays), "config.json": json.dumps(config, indent=2).encode()}
    if form == "hf":
        processor: Config = {"image_processor_type": "BitImageProcessor", "do_resize": True, "resample": 3}
        processor |= {"size": {"shortest_edge": round(side / source.crop)}, "do_center_crop": True}
        processor |= {"crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255}
        processor |= {"do_normalize": True, "image_mean": list(encoder.mean), "image_std": list(encoder.std)}
        files["preprocessor_config.json"] = json.dumps(processor, indent=2).encode()
    library = {"hf": "transformers", "official": "pytorch", "safetensors": "mim_jax"}.get(form, form)
    files["README.md"] = card(path, source, side, config, library, command).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        journal.write_whole(out / name, content)


def native(source: Source) -> families.Seen:
    """What is seen of an image where the network sees it at its own size, as other libraries do."""
    side, size = source.encoder.backbone.img_size, source.seen.size
    return source.seen._replace(size=0, canvas=math.ceil(source.seen.canvas * side / (size or side)))


def settings_of(net: ViT | Swin) -> Config:
    """The fields that a file can say and that are not the default; initializers are of no use in it."""
    plain = str | int | float | tuple
    return {
        field.name: value
        for field in dataclasses.fields(net)
        if field.name not in ("parent", "name")
        and isinstance(value := getattr(net, field.name), plain)
        and value != field.default
    }


def family_of(source: Source) -> str:
    """The converter of a method's official code; of a classifier that of BEiT or MAE."""
    assert source.run
    method = source.run.config.method
    if method == "supervised":
        return "beit" if getattr(source.encoder.backbone, "pos", "") == "relative_each" else "mae"
    return {"beit2": "beit"}.get(method, method)


@dataclasses.dataclass(frozen=True)
class Flags:
    run: str
    format: Literal["timm", "hf", "official", "safetensors", "onnx", "jax"]
    out: str
    size: int | None = None
    head: bool = False
    images: str = ""
    which: Literal["", "teacher", "student"] = ""


def main(argv: list[str]) -> None:
    given, _ = cli.begin(Flags, argv, __doc__ or "")
    with cli.in_one_line("stopped"):
        out, command = cli.of_this_machine("out", given.out, "folder"), f"python -m mim_jax.export {shlex.join(argv[1:])}"
        more = given.size, given.head, given.images, given.which
        found, what = export(given.run, given.format, out, *more, command)
        if found is None:
            print(f"{given.out}: the graph is valid, but its outputs are not compared: that needs onnxruntime")
            return
        print(f"{given.out}: read again; {what} differ by at most {found:.1e} of the largest")


if __name__ == "__main__":
    main(sys.argv)
