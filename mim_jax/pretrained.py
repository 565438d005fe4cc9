"""Trained weights as a frozen network, and what it makes of images:

    model = mim_jax.load("runs/mine")
    out = model.features(["a.jpg", "b.png"])  # {"cls": [2, D], "mean": [2, D], "patch": [2, N, D]}
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mim_jax import layouts, sharding, storage
from mim_jax.checkpoint import is_checkpoint
from mim_jax.config import of_run as config_of_run
from mim_jax.data import decode, pipeline
from mim_jax.data.augment import center_crop
from mim_jax.data.sources import Example, open_source, sample, user_cache
from mim_jax.evaluators import IN_0_TO_1, PIXELS
from mim_jax.learned import Run, load_run
from mim_jax.methods.base import BackboneMethod, Encoder, Params
from mim_jax.models import vit

Features = dict[str, np.ndarray]

KINDS = ("cls", "mean", "patch")
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue, as of Pillow's greys
CANVAS, OF = 512, 224  # of weights that no run has made: the canvas of `config.py`, for 224 pixels
RESIZE = 0.875  # and the share of the short side that is seen, if nothing says another


@dataclasses.dataclass(frozen=True)
class OfMethod(Encoder):
    """The backbone of a run, with the features of its method: "cls" of a classifier is what its linear layer sees."""

    method: Any

    def features(self, parts: Params, images: jax.Array) -> dict[str, jax.Array]:
        return self.method.features(parts, (images - jnp.array(self.mean)) / jnp.array(self.std))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A frozen network with its parameters.

    Attributes:
        network: takes images [B, H, W, 3] in 0..1 and normalises them.
        parts: its parameters, by part.
        img_size: side, in pixels, at which it sees images if not told otherwise.
        description: what this is, in one line.
        resize: side of the central square that is seen, as a share of the short side.
        canvas: side of the square to which larger images are reduced when they are decoded; it grows with the side that is
            asked for. 0: in proportion to `img_size`.
        levels, max_pixels: see `decode.decode`.
    """

    network: Encoder
    parts: Params
    img_size: int
    description: str
    resize: float = RESIZE
    canvas: int = 0
    levels: decode.Levels | None = None
    max_pixels: int = decode.MAX_PIXELS

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has devices of its own."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return state | {"parts": jax.device_get(self.parts)}

    @property
    def depth(self) -> int:
        """Blocks whose output can be used."""
        return getattr(self.network.backbone, "depth", 1)

    @property
    def patch_size(self) -> int:
        """Side, in pixels, of the square that a patch of the output stands for."""
        return self.network.stride

    def features(
        self, images: Sequence[str | os.PathLike | np.ndarray] | np.ndarray, size: int | None = None, layers: int = 1
    ) -> Features:
        """What the network makes of images: float32 {"cls": [B, D], "mean": [B, D], "patch": [B, N, D]}, in their order.

        "mean" is that of the patches, which are row-major. Images are decoded, cropped and resized as in the evaluation of a
        run, some at a time, on all devices of this process. `python -m mim_jax.embed` does it for more than memory can hold.
        Of each image, also of one that has the size that is seen, that is the central square whose side is the share `resize`
        of the short side: `mim_jax.load(path, resize=1.0)` leaves arrays of that size as they are.

        Args:
            images: file names, or arrays [h, w, 3] of any sizes, or one array [B, h, w, 3]. Arrays are uint8, or floats in
                0..1, which are rounded to 8 bits as files have them.
            size: side of the square that the network sees, in pixels: a multiple of `patch_size`; by default `img_size`.
            layers: the output is that of the last so many blocks, the oldest first, joined along D: D is so many times as wide.

        Raises ValueError for another size or number of layers, for other arrays, and for the first image that is bad.
        """
        size = self.checked(size, layers)
        source = Readable(Given(images), self.canvas_of(size), self.levels, self.max_pixels)
        rows, batch_size = np.arange(len(source), dtype=np.int32), self.batch_size(len(source), size)
        results = Features()
        with jax.set_mesh(self.mesh):
            made = self.stream(source, rows, KINDS, size, layers, batch_size)
            for start, batch in zip(range(0, len(rows), batch_size), made, strict=True):
                if source.bad:
                    raise ValueError(f"bad image: {source.bad[min(source.bad)]}")
                for kind in KINDS:
                    if not start:
                        results[kind] = np.empty((len(rows), *batch[kind].shape[1:]), np.float32)
                    results[kind][start : start + batch_size] = batch[kind][: len(rows) - start]
        return results

    def checked(self, size: int | None, layers: int) -> int:
        """The side that is meant. Raises ValueError for one that the patches do not divide, and for blocks that are not
        there."""
        size, depth = self.img_size if size is None else size, self.depth
        for name, value in (("size", size), ("layers", layers)):
            if not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name} is {value!r}, but must be an integer")
        size, layers = int(size), int(layers)
        if size < 1 or size % self.patch_size:
            raise ValueError(f"size is {size}, but must be a multiple of the {self.patch_size} pixels of a patch")
        if not 1 <= layers <= depth:
            raise ValueError(f"layers is {layers}, but of this network the last 1 to {depth} can be used")
        return size

    def canvas_of(self, size: int) -> int:
        """The canvas of images that are seen at this size: larger than that of `img_size` where they are."""
        canvas = self.canvas or math.ceil(CANVAS * self.img_size / OF)
        return math.ceil(canvas * max(size, self.img_size) / self.img_size)

    def batch_size(self, count: int, size: int) -> int:
        """How many of `count` images are worked on at a time: a multiple of the number of devices. A CPU has as many as in the
        evaluation; others, which are not busy training, more."""
        devices, pixels = self.mesh.size, PIXELS * (1 if sharding.platform() == "cpu" else 4)
        return devices * min(-(-count // devices), max(1, pixels // size**2))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices of this process."""
        return sharding.make_mesh(devices=jax.local_devices())

    @functools.cached_property
    def placed(self) -> Params:
        """The parameters, whole on each device."""
        return jax.device_put(self.parts, NamedSharding(self.mesh, P()))

    def stream(
        self, source: "Readable", rows: np.ndarray, kinds: Sequence[str], size: int, layers: int, batch_size: int
    ) -> Iterator[Features]:
        """These kinds of features of the rows, and their "label", batch by batch; the last batch is padded with its last row.

        While a batch is used, the devices work on the next one. The caller sets `mesh`.
        """
        ahead: Any = None
        for batch in pipeline.eval_batches(source, rows, canvas=source.canvas, batch_size=batch_size):
            images = sharding.global_batch({name: batch[name] for name in ("image", "size")})
            ready, ahead = ahead, self.encode(self.placed, images, tuple(kinds), size, layers) | {"label": batch["label"]}
            if ready:
                yield jax.device_get(ready)
        if ahead:
            yield jax.device_get(ahead)

    def shapes(self, kinds: Sequence[str], size: int, layers: int) -> list[tuple[int, ...]]:
        """Of an image's features of these kinds."""
        canvas, count = self.canvas_of(size), self.mesh.size
        image = jax.ShapeDtypeStruct((count, canvas, canvas, 3), np.uint8)
        batch = {"image": image, "size": jax.ShapeDtypeStruct((count, 2), np.int32)}
        with jax.set_mesh(self.mesh):
            encoded = functools.partial(self.encoded, kinds=tuple(kinds), size=size, layers=layers)
            made = jax.eval_shape(encoded, self.parts, batch)
        return [made[kind].shape[1:] for kind in kinds]

    @functools.cached_property
    def encode(self) -> Any:
        """`encoded`, compiled for each shape, kinds, size and layers."""
        return jax.jit(self.encoded, static_argnums=(2, 3, 4))

    def encoded(
        self, parts: Params, batch: dict[str, jax.Array], kinds: tuple[str, ...], size: int, layers: int
    ) -> dict[str, jax.Array]:
        """The features of a batch, see `center_crop`."""
        images = self.cropped(batch, size)
        out = of_last_blocks(self.network, parts, sharding.pin_batch(images), layers)
        patch = out["patch"].astype(jnp.float32)
        made = {"cls": out["cls"].astype(jnp.float32), "mean": patch.mean(axis=1), "patch": patch}
        return {kind: made[kind] for kind in kinds}

    def cropped(self, batch: dict[str, jax.Array], size: int) -> jax.Array:
        return center_crop(batch["image"], batch["size"], size, self.resize, *IN_0_TO_1)

    def seen(self, source: Any, size: int | None = None, count: int = 8) -> np.ndarray:
        """At most `count` images of a source, evenly spaced, as the network sees them before it normalises them: float32
        [B, size, size, 3] in 0..1. Bad images are left out; raises ValueError if none is left."""
        size = self.checked(size, 1)
        canvas = self.canvas_of(size)
        levels = pipeline.survey(source, canvas, self.levels, self.max_pixels).levels
        readable = Readable(source, canvas, levels, self.max_pixels)
        rows = np.array(sample(source, count), np.int32)
        batch = pipeline.load(readable, rows, canvas)
        good = [place for place, row in enumerate(rows) if row not in readable.bad]
        if not good:
            raise ValueError(f"none of the images can be read: {readable.bad[rows[0]]}")
        return np.asarray(self.cropped(jax.tree.map(jnp.asarray, batch), size))[good]


def of_last_blocks(network: Encoder, parts: Params, images: jax.Array, layers: int) -> dict[str, jax.Array]:
    """The network's features of images [B, H, W, 3] in 0..1; of several last blocks joined along the last axis, oldest first.

    Each block's are those after the final norm, if there is one.
    """
    if layers == 1:
        return network.features(parts, images)
    images = (images - jnp.array(network.mean)) / jnp.array(network.std)
    tokens = jnp.concatenate([*vit.intermediate_layers(network.backbone, parts["backbone"], images, layers)], axis=-1)
    first = tokens.shape[1] - (images.shape[1] // network.stride) * (images.shape[2] // network.stride)
    patch = tokens[:, first:]
    has_cls = first > network.backbone.registers
    return {"cls": tokens[:, 0] if has_cls else patch.mean(axis=1), "patch": patch}


def load(
    path: str | os.PathLike, which: str = "", resize: float | None = None, levels: decode.Levels | None = None, **told: Any
) -> Model:
    """What a run has learned, from the newest checkpoint in its workdir, which may be at gs://; or the encoder in a file or
    folder of weights, see `layouts.read`.

    Args:
        which: "teacher" or "student", of a run that has both; by default the teacher.
        resize: side of the central square that is seen, as a share of the short side of an image. By default that of the run's
            evaluation; of a file what its configuration says, see `families.seen`, else 0.875.
        levels: (black, white), the values that become 0 and 255, of images with more than 8 bits; by default those of the run.
        told: what a file does not say, `heads=6` for example, see `layouts.Told`.

    Raises FileNotFoundError if there is nothing or no checkpoint yet, and ValueError for a run without a ViT or Swin backbone
    (a tokenizer), and as `layouts.read`.
    """
    folder = storage.absolute(path)
    if resize is not None and not (isinstance(resize, (int, float)) and 0 < resize <= 1):
        raise ValueError(f"resize is {resize!r}, but must be in (0, 1]")
    if levels is not None and not (len(levels) == 2 and levels[0] < levels[1]):
        raise ValueError(f"levels is {levels!r}, but must be (black, white) with black below white")
    if is_run(folder):
        model = of_run(folder, which=which, **told)
        return dataclasses.replace(model, resize=resize or model.resize, levels=levels or model.levels)
    if not folder.exists():
        raise FileNotFoundError(f"there is no run and no file {folder}")
    if which:
        raise ValueError(f"{folder} is no run: only runs have a teacher and a student")
    weights = layouts.read(folder, layouts.Told(**told))
    if len(weights.mean) != 3:
        raise ValueError(
            f"the network takes images of {len(weights.mean)} channels, and those that are read here have 3: use "
            "mim_jax.layouts.read(...).network.features(parts, images)"
        )
    seen, share = weights.seen, resize or weights.seen.crop or RESIZE
    configured = "as its configuration says" if seen.crop else "as no configuration says it"
    who = "as asked for" if resize else configured
    lines = [*weights.lines, f"of each image the central square of {share:.4g} of the short side is seen, {who}"]
    size, what = seen.size or weights.settings["img_size"], f"{folder}: {'; '.join(lines)}"
    return Model(weights.network, weights.parts, size, what, share, seen.canvas, levels)


def is_run(folder: Path) -> bool:
    """Whether it is a checkpoint or a workdir: it has checkpoints or the config.json of a run."""
    return (folder / "checkpoints").is_dir() or is_checkpoint(folder) or bool(config_of_run(folder / "config.json"))


def of_run(workdir: Path, run: Run | None = None, which: str = "", **told: Any) -> Model:
    """See `load`. `run`: what is in the workdir, if it is loaded already."""
    if given := [name for name, value in told.items() if value or name not in layouts.Told._fields]:
        raise ValueError(f"{' and '.join(given)} cannot be given for a run, whose config says all")
    run = load_run(workdir, which) if run is None else run
    config, method = run.config, run.method
    if not isinstance(method, BackboneMethod):
        raise ValueError(f"{workdir} is a run of {config.method}, which has no ViT or Swin backbone: it makes no features")
    trained = method.backbone, method.views.mean, method.views.std
    network, parts = Encoder(*trained), {"backbone": run.params["backbone"]}
    if type(method).features is not BackboneMethod.features:
        network, parts = OfMethod(*trained, method), run.params
    return Model(
        network,
        parts,
        config.eval.img_size or config.model.img_size,
        f"{config.method}, step {run.step} of {workdir}" + f", the {run.which}" * bool(run.which),
        config.eval.resize,
        config.data.canvas,
        tuple(config.data.levels) if config.data.levels else None,
        config.data.max_pixels,
    )


# Images


def at_hand(named: str = "", data: Any = None) -> Any:
    """Real images to compare networks on, as a source: the folder, or files joined by commas, that is named; else those that a
    run with the config `data` is measured on; else CIFAR-10, if it was fetched before.

    Raises OSError and ValueError for a source that cannot be opened, and if there is none.
    """
    if named:
        folder = storage.absolute(named)
        return open_source("folder", folder) if folder.is_dir() else Given(named.split(","))
    if data is not None:
        return open_source(data.name, data.dir, data.eval_split)
    if not (user_cache() / "cifar10_pixels").exists():
        raise FileNotFoundError("no real images are at hand: name some, --images=FOLDER")
    return open_source("cifar10", None, "test")


def with_channels(images: np.ndarray, channels: int) -> jax.Array:
    """RGB [B, H, W, 3] as greys, or with its channels in turn, [B, H, W, channels]."""
    return jnp.asarray(images @ np.array(GREY, np.float32)[:, None] if channels == 1 else images[..., np.arange(channels) % 3])


class Given:
    """The images that `Model.features` is given, as a source. Raises ValueError for what is none."""

    description = "the images given"
    classes = ()

    def __init__(self, images: Any):
        if isinstance(images, (str, os.PathLike)):
            raise ValueError(f"images is {images}, but must be a list of file names: [{os.fspath(images)!r}]")
        if not isinstance(images, Iterable) or isinstance(images, Mapping):
            raise ValueError(f"images is of type {type(images).__name__}, but must be a list of file names or of arrays")
        if isinstance(images, (np.ndarray, jax.Array)) and images.ndim != 4:
            raise ValueError(f"images is one array {list(images.shape)}, but must be [B, h, w, 3], or a list of [h, w, 3]")
        self.images = [self.checked(i, image) for i, image in enumerate(images)]
        if not self.images:
            raise ValueError("images is empty")

    def checked(self, row: int, image: Any) -> Path | np.ndarray:
        if isinstance(image, (str, os.PathLike)):
            path = storage.absolute(image)
            if path.is_dir():
                raise ValueError(f"image {row} is the folder {path}: give its files")
            return path
        if not isinstance(image, (np.ndarray, jax.Array)):
            what = f"image {row} is of type {type(image).__name__}"
            raise ValueError(f"{what}, but must be a file name or an array uint8 [h, w, 3]")
        found, image = f"image {row} is {image.dtype} {list(image.shape)}", np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"{found}, but must be [h, w, 3]")
        if image.dtype == np.uint8:
            return image
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(f"{found}, but must be uint8, or floats in 0..1")
        low, high = float(image.min()), float(image.max())
        if not 0 <= low <= high <= 1:  # NaN, too
            raise ValueError(
                f"{found} with values from {low:.4g} to {high:.4g}, but floats must be in 0..1 and not normalised: the network "
                "does it; levels of 0 to 255 are uint8"
            )
        return np.rint(image.astype(np.float32) * 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Example:
        image = self.images[row]
        return Example(image if isinstance(image, np.ndarray) else decode.read_file(image), -1)

    def name(self, row: int) -> str:
        image = self.images[row]
        return f"image {row}" if isinstance(image, np.ndarray) else str(image)


class Readable:
    """A source whose images are decoded, and whose bad images are black: `bad` has "name: reason" of each row that was bad."""

    def __init__(self, source: Any, canvas: int, levels: decode.Levels | None, max_pixels: int):
        self.source, self.canvas, self.levels, self.max_pixels = source, canvas, levels, max_pixels
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Example:
        try:
            image, label = self.source[row]
            return Example(decode.decode(image, self.canvas, self.levels, self.max_pixels), label)
        except (decode.BadImage, OSError) as error:
            self.bad[row] = f"{self.source.name(row)}: {error}"
            return Example(np.zeros((1, 1, 3), np.uint8), -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)
