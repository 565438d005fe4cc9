"""Multi-crop augmentation on the device, inside the jitted step: the host decodes each image once.

The reference is torchvision's transforms on Pillow images, as the papers used them. As in Pillow, images have 8 bits between
operations: levels are whole numbers in 0..255, held in float32, and each operation rounds or truncates them as Pillow's does.
So each operation can be compared with Pillow's level by level, and rounding hides the differences between devices.

`augment`, `center_crop` and `denormalize` take and return batches of channels-last images. The other functions work on the
planes of one image, [3, h, w], and are batched by `vmap`: XLA's CPU backend is up to ten times slower where the last axis has
length 3.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mim_jax.sharding import platform

Array = jax.Array

TRIES = 10  # draws of a crop's box until one fits, as in torchvision
BOX_DRAWS, JITTER_DRAWS, OTHER_DRAWS = 2 * TRIES + 2, 6, 5  # uniform numbers that a crop needs
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CORES, PIXELS_A_CORE = os.cpu_count() or 1, 3 * 2**16  # how much is worked on at a time on a CPU
BLOCK = 32  # a resized row or column is made in blocks of so many pixels or a few more
ORDERS = np.array(list(itertools.permutations(range(4))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """The random operations on one crop; the defaults are those of DINO's local crops.

    `flip`, `jitter`, `gray`, `blur` and `solarize` are probabilities. The factors of `brightness`, `contrast` and `saturation`
    are uniform in [max(0, 1 - x), 1 + x]; the shift of the hue is uniform in [-hue, hue], in turns of the color circle.
    `blur_radius` is the range of Pillow's `GaussianBlur(radius)`, in pixels of the crop.
    """

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


FLIP = Policy(jitter=0.0, gray=0.0, blur=0.0)  # flips only: masked image modelling


@dataclasses.dataclass(frozen=True)
class Target:
    """A second rendering of the same crop, for the network that makes the targets."""

    size: int
    interpolation: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class Crops:
    """A group of random resized crops of `size` x `size` pixels, one for each policy: `views[name]`."""

    name: str
    size: int
    scale: tuple[float, float]  # range of the crop's share of the image's area
    policies: tuple[Policy, ...]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of its width over its height
    interpolation: str = "bicubic"  # as Pillow's; or "bilinear", "lanczos"
    color_first: bool = False  # jitter the whole image before it is cropped (BEiT)
    target: Target | None = None  # the same crops, flipped and jittered alike, as `views["target"]`


def augment(
    batch: dict[str, Array],
    crops: Sequence[Crops],
    key: Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    """Random views of every image of a batch; each view is a function of `key`, the example's `index` and the crop's number.

    Args:
        batch: `image` uint8 [B, S, S, 3], with the image at the top left; `size` int [B, 2], its height and width, both at
            least 1; `index` int [B]. Other entries (labels, masks) are passed on.
        crops: the groups of crops; their order numbers the crops.
        key: a threefry key. (With "rbg" keys, the numbers would depend on the batch.)
        mean, std: per channel, for images in 0..1.
        dtype: of the views.

    Returns:
        `batch` without `image` and `size`, with normalised views [B, len(policies), size, size, 3] under each group's name,
        and a group's targets, in 0..1, under "target".
    """
    # Some images at a time: a CPU is several times slower on what its caches do not hold. Each part has equally many images of
    # every device, so none are moved.
    parts = _parts(len(batch["image"]), max(group.size for group in crops) ** 2)
    planes, sizes, index = (
        jnp.asarray(x).reshape(-1, parts, *x.shape[1:]) for x in (_planes(batch["image"]), batch["size"], batch["index"])
    )
    # all random numbers in one call: each call of the generator adds to the compilation
    draw = jax.vmap(jax.vmap(jax.vmap(random_numbers, (None, 0, None)), (None, 1, None)), (None, None, 0))
    draws = draw(key, index, jnp.arange(sum(len(c.policies) for c in crops)))
    views = {name: value for name, value in batch.items() if name not in ("image", "size")}
    first = 0
    for group in crops:
        count = len(group.policies)
        policies = jax.tree.map(lambda *leaves: jnp.repeat(jnp.array(leaves, jnp.float32), parts), *group.policies)
        view = jax.vmap(functools.partial(random_view, group=group), (0, 0, 0, None))

        def in_order(levels, count=count):  # [count * parts, B / parts, ...] -> [B, count, ...]
            levels = levels.reshape(count, parts, *levels.shape[1:])
            return levels.swapaxes(0, 2).reshape(-1, count, *levels.shape[3:])

        part = jnp.tile(jnp.arange(parts), count)
        some = draws[first : first + count].reshape(-1, *draws.shape[2:])
        levels, target = jax.lax.map(lambda x, view=view: view(planes[:, x[0]], sizes[:, x[0]], *x[1:]), (part, some, policies))
        views[group.name] = _normalize(in_order(levels), mean, std).astype(dtype)
        if target is not None:
            views["target"] = _normalize(in_order(target), (0.0,) * 3, (1.0,) * 3).astype(dtype)
        first += count
    return views


def _parts(images: int, pixels: int) -> int:
    """In how many parts to work on a batch of `images` of which crops of `pixels` are made: in one but on a CPU."""
    each, rest = divmod(images, jax.device_count())
    if platform() != "cpu" or rest:
        return 1
    return max(n for n in range(1, each + 1) if each % n == 0 and (n == 1 or each // n * pixels >= PIXELS_A_CORE * CORES))


def random_numbers(key: Array, index: Array, crop: Array) -> Array:
    """All random numbers, uniform in [0, 1), of one crop of the example `index`."""
    key = jax.random.fold_in(jax.random.fold_in(key, index), crop)
    return jax.random.uniform(key, (BOX_DRAWS + JITTER_DRAWS + OTHER_DRAWS,), jnp.float32)


def random_view(image: Array, size: Array, draws: Array, policy: Policy, group: Crops) -> tuple[Array, Array | None]:
    """One crop: planes [3, S, S] with valid `size` [2] -> (uint8 [3, group.size, group.size], its target or None).

    `policy` is one of `group.policies` and may be traced; operations that none of these uses are not computed.
    """

    def wanted(operation):
        return any(getattr(p, operation) > 0 for p in group.policies)

    box_draws, jitter_draws, (flip, gray, blur, radius, inverted) = jnp.split(draws, [BOX_DRAWS, BOX_DRAWS + JITTER_DRAWS])
    box = sample_box(box_draws, size, group.scale, group.ratio)
    jitter = functools.partial(color_jitter, jitter=sample_jitter(jitter_draws, policy), hue=wanted("hue"))
    if wanted("jitter") and group.color_first:
        image = jitter(image.astype(jnp.float32), size=size)
    cut = functools.partial(crop_resize, image, box, flip=flip < policy.flip, longest=longest_side(group, image.shape[-1]))
    view = cut(out=group.size, interpolation=group.interpolation)
    target = None
    if group.target:
        target = cut(out=group.target.size, interpolation=group.target.interpolation).astype(jnp.uint8)
    if wanted("jitter") and not group.color_first:
        view = jitter(view)
    if wanted("gray"):
        view = jnp.where(gray < policy.gray, grayscale(view), view)
    if wanted("blur"):
        low, high = policy.blur_radius
        radius = jnp.where(blur < policy.blur, low + (high - low) * radius, 0.0)
        view = gaussian_blur(view, radius, max_radius=max(p.blur_radius[1] for p in group.policies))
    if wanted("solarize"):
        view = jnp.where(inverted < policy.solarize, solarize(view), view)
    return view.astype(jnp.uint8), target


def center_crop(image: Array, size: Array, out: int, fraction: float, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The centered square of `fraction` of the short side, resized and normalized, for evaluation: float32 [B, out, out, 3].

    `image` and `size` as in `augment`. The usual "resize to 256, crop 224" is `out=224, fraction=224 / 256`. As in Pillow's
    `resize((out, out), BICUBIC, box=square)`, pixels just outside the square take part in the antialiasing.
    """

    def one(image, size):
        side = fraction * jnp.min(size)
        top, left = (size - side) / 2
        canvas = image.shape[-1]
        rows = resize_weights(top, side, out, canvas, canvas, within=(0, size[0]))
        columns = resize_weights(left, side, out, canvas, canvas, within=(0, size[1]))
        return _resample(image, jnp.int32(0), rows, columns, canvas)

    return _normalize(jax.vmap(one)(_planes(image), size.astype(jnp.float32)), mean, std)


def denormalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Normalized images [..., H, W, 3] of any float type -> uint8."""
    images = jnp.asarray(images, jnp.float32) * jnp.array(std, jnp.float32) + jnp.array(mean, jnp.float32)
    return _to_levels(images * 255).astype(jnp.uint8)


# Cropping


def sample_box(draws: Array, size: Array, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Array:
    """The box of a random resized crop: int32 [4], (top, left, height, width), from `BOX_DRAWS` numbers in [0, 1).

    As torchvision's `RandomResizedCrop.get_params`: the area is uniform in `scale` times the image's, width over height is
    log-uniform in `ratio`, the place is uniform. All tries are computed, and the first that fits is taken; if none does, the
    largest centered box with a permitted ratio.
    """
    size = jnp.asarray(size, jnp.float32)
    height, width = size
    area, aspect, where = jnp.split(draws, [TRIES, 2 * TRIES])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = jnp.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    tried = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect])))
    fits = jnp.all((tried > 0) & (tried <= size[:, None]), axis=0)
    drawn = tried[:, jnp.argmax(fits)]
    place = jnp.floor(where * (size - drawn + 1))

    largest_height = jnp.where(width / height < ratio[0], jnp.round(width / ratio[0]), height)
    largest_width = jnp.where(width / height > ratio[1], jnp.round(height * ratio[1]), width)
    largest = jnp.stack([largest_height, largest_width])
    centered = jnp.floor((size - largest) / 2)
    box = jnp.where(jnp.any(fits), jnp.concatenate([place, drawn]), jnp.concatenate([centered, largest]))
    return box.astype(jnp.int32)


def longest_side(group: Crops, canvas: int) -> int:
    """A bound for the sides of the boxes that `sample_box` draws in any image that fits the canvas."""
    (least, most), (low, high) = group.scale, group.ratio
    ratio = max(high, 1 / low)
    # A drawn side; one of the largest centered box, taken where all drawn ones are longer than the image; and one where a side
    # of a drawn box would have no pixel.
    share = max(math.sqrt(most * ratio), most * high / low)
    return min(canvas, max(math.ceil(canvas * share) + 1, math.ceil(ratio * math.sqrt(ratio / max(least, 1e-9)) / 2)))


def resize_weights(
    start: ArrayLike,
    length: ArrayLike,
    out: int,
    canvas: int,
    longest: int,
    flip: ArrayLike = False,
    within: tuple[ArrayLike, ArrayLike] | None = None,
    interpolation: str = "bicubic",
) -> tuple[Array, Array]:
    """What resamples `length` pixels of `canvas`, from `start`, to `out` pixels with Pillow's antialiased filters.

    When shrinking, filters are stretched by the scale. They are truncated at the borders of the box, or at `within` =
    (first, end), and normalised to sum 1. `flip` mirrors the result.

    Returns `first` int [blocks] and `weights` [blocks, out / blocks, span]: each block of pixels is made from the `span` pixels
    that begin at its `first`. (`longest`, static, is a bound for `length`: the span follows from it.)
    """
    kernel, support = KERNELS[interpolation]
    blocks = max(n for n in range(1, max(out // BLOCK, 1) + 1) if out % n == 0)
    each = out // blocks
    span = min(canvas, math.ceil((each - 1) * longest / out + 2 * support * max(longest / out, 1)) + 2)
    begin, end = (start, start + length) if within is None else within
    target = jnp.arange(out)
    target = jnp.where(flip, out - 1 - target, target)
    scale = length / out
    stretch = jnp.maximum(scale, 1.0)
    center = (start + (target + 0.5) * scale).reshape(blocks, each, 1)
    first = jnp.floor(jnp.min(center, axis=(1, 2)) - support * stretch).astype(jnp.int32)
    first = jnp.clip(first, 0, canvas - span)
    pixel = first[:, None, None] + jnp.arange(span)
    weights = jnp.where((pixel >= begin) & (pixel < end), kernel((pixel + 0.5 - center) / stretch), 0.0).astype(jnp.float32)
    return first, weights / jnp.sum(weights, axis=2, keepdims=True)


def crop_resize(
    image: Array, box: Array, out: int, flip: ArrayLike = False, interpolation: str = "bicubic", longest: int | None = None
) -> Array:
    """Crops planes [3, S, S] to `box` (top, left, height, width), resizes them to [3, out, out], and mirrors them if `flip`.

    No side of the box is longer than `longest` (static; S by default).
    """
    top, left, height, width = box
    canvas = image.shape[-1]
    longest = longest or canvas
    above = jnp.clip(top, 0, canvas - longest).astype(jnp.int32)
    rows = resize_weights(top - above, height, out, longest, longest, interpolation=interpolation)
    columns = resize_weights(left, width, out, canvas, longest, flip, interpolation=interpolation)
    return _resample(image, above, rows, columns, longest)


def _resample(image: Array, above: Array, rows: tuple[Array, Array], columns: tuple[Array, Array], height: int) -> Array:
    """Planes [3, S, S], of which `height` rows from `above` are read -> levels [3, out, out]."""
    # As Pillow: horizontally first, then rounded. The loop, because a CPU is fast on memory that it has just used.
    first, weights = columns
    blocks, each, span = weights.shape

    def make_block(wide, i):
        cut = jax.lax.dynamic_slice(image, (jnp.int32(0), above, first[i]), (3, height, span)).astype(jnp.float32)
        made = _weighted("hcw,ow->hco", cut.swapaxes(0, 1), weights[i])
        return jax.lax.dynamic_update_slice_in_dim(wide, _to_levels(made), i * each, 2), None

    wide, _ = jax.lax.scan(make_block, jnp.zeros((height, 3, blocks * each), jnp.float32), jnp.arange(blocks, dtype=jnp.int32))
    first, weights = rows
    cut = jax.vmap(lambda y: jax.lax.dynamic_slice_in_dim(wide, y, weights.shape[2]))(first)
    made = _weighted("bhco,bph->bpco", cut, weights)
    return _to_levels(made).reshape(-1, *made.shape[2:]).swapaxes(0, 1)


def _weighted(spec: str, levels: Array, weights: Array) -> Array:
    """Their product in float32, of which TPUs and GPUs would round the factors to 8 or 10 bits.

    bfloat16 holds levels as they are. So there only the weights are cut, into three parts of 8 bits: half the passes that
    `precision="highest"` takes.
    """
    if platform() == "cpu":
        return jnp.einsum(spec, levels, weights)
    made = jnp.float32(0)
    for _ in range(3):
        part = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=7)
        weights = weights - part
        factors = levels.astype(jnp.bfloat16), part.astype(jnp.bfloat16)
        made += jnp.einsum(spec, *factors, preferred_element_type=jnp.float32)
    return made


def _cubic(x: Array) -> Array:
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _triangle(x: Array) -> Array:
    return jnp.maximum(1 - jnp.abs(x), 0.0)


def _lanczos(x: Array) -> Array:
    return jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0.0)


KERNELS = {"bicubic": (_cubic, 2), "bilinear": (_triangle, 1), "lanczos": (_lanczos, 3)}  # and their half widths


# Color


def luma(image: Array) -> Array:
    """One plane: ITU-R 601 luma in Pillow's fixed-point numbers, which float32 holds exactly."""
    red, green, blue = image
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def grayscale(image: Array) -> Array:
    """Luma in all three planes."""
    return jnp.broadcast_to(luma(image), image.shape)


def adjust_hue(image: Array, shift: ArrayLike) -> Array:
    """torchvision's `adjust_hue` of a Pillow image, through an HSV image of 8 bits; `shift` in [-0.5, 0.5] turns.

    One value in five hundred differs, by up to 6 levels: its hue lies on the edge of one of the 256 steps.
    """
    red, green, blue = image
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    sector = jnp.where(red == value, green - blue, jnp.where(green == value, blue - red, red - green))
    offset = jnp.where(red == value, 0.0, jnp.where(green == value, 2.0, 4.0))
    turn = sector / jnp.maximum(chroma, 1) + offset
    turn = jnp.where(turn < 0, turn + 6, turn) / 6
    # in Pillow, saturation and hue have 256 steps, and the shift is truncated to whole steps
    saturation = jnp.floor(chroma * 255 / jnp.maximum(value, 1)) / 255
    hue = jnp.floor(turn * 255) + jnp.trunc(shift * 255)
    hue = (hue - 256 * jnp.floor(hue / 256)) * (6 / 255)

    def plane(offset):
        k = hue + offset
        k = jnp.where(k >= 6, k - 6, k)
        return jnp.floor(value * (1 - saturation * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)) + 0.5)

    return jnp.stack([plane(5), plane(3), plane(1)])


def sample_jitter(draws: Array, policy: Policy) -> tuple[Array, Array, Array]:
    """The `jitter` of `color_jitter` from `JITTER_DRAWS` numbers in [0, 1); without it, factors are 1 and the shift is 0."""
    happens = draws[0] < policy.jitter
    order = jnp.asarray(ORDERS)[jnp.floor(draws[1] * len(ORDERS)).astype(jnp.int32)]
    width = jnp.array([policy.brightness, policy.contrast, policy.saturation], jnp.float32)
    low = jnp.maximum(0.0, 1 - width)
    factors = low + (1 + width - low) * draws[2:5]
    shift = policy.hue * (2 * draws[5] - 1)
    return order, jnp.where(happens, factors, 1.0), jnp.where(happens, shift, 0.0)


def color_jitter(image: Array, jitter: tuple[Array, Array, ArrayLike], size: Array | None = None, hue: bool = True) -> Array:
    """torchvision's `ColorJitter`.

    `jitter` = (order, factors, shift): `order` int [4] is a permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE), `factors`
    [3] are those of the first three (Pillow's `ImageEnhance`), `shift` is that of the hue. If given, `size` = (height, width)
    is the valid part of the planes. Without `hue` (static) the shift is ignored.
    """
    order, factors, shift = jitter
    # Under vmap, a branch on the order would compute all its arms. But the first three operations are one blend with different
    # backgrounds; so there are three blends before the hue and three after it, unwanted ones with factor 1, and the expensive
    # hue is computed once. (A scan, because unrolled, XLA fuses the rounds and recomputes the early ones many times.)
    factors = jnp.append(factors, 1.0)[order]
    before = jnp.cumsum(order == HUE) == 0

    def blend(image, operation_and_factor):
        operation, factor = operation_and_factor
        gray = luma(image)
        mean = _mean_level(gray, size)
        background = jnp.where(operation == BRIGHTNESS, 0.0, jnp.where(operation == CONTRAST, mean, gray))
        return jnp.floor(jnp.clip(background + factor * (image - background), 0, 255)), None  # as Pillow's `Image.blend`

    if not hue:
        return jax.lax.scan(blend, image, (order, factors))[0]
    image, _ = jax.lax.scan(blend, image, (order[:3], jnp.where(before, factors, 1.0)[:3]))
    image = jnp.where(shift == 0, image, adjust_hue(image, shift))
    image, _ = jax.lax.scan(blend, image, (order[1:], jnp.where(before, 1.0, factors)[1:]))
    return image


def gaussian_blur(image: Array, radius: Array, max_radius: float) -> Array:
    """Pillow's `GaussianBlur(radius)` of a square image; 0 changes nothing, `max_radius` (static) is an upper bound.

    Pillow rounds after each of six box filters, three in each direction; here the three are one filter. Of white noise the
    results differ by less than one level on average, and at most 3.
    """
    n, reach = image.shape[-1], 3 * _box_reach(max_radius)
    taps, at = 2 * reach + 1, np.arange(n)
    # the filter is the same everywhere but near the borders
    small = blur_weights(radius, min(n, taps), max_radius)
    row = np.maximum(np.minimum(at, reach), at - (n - len(small)))[:, None]
    weights = jnp.pad(small, ((0, 0), (reach, reach)))[row, row + np.arange(taps)].T[:, :, None]

    def transpose_and_blur_columns(image, _):
        padded = jnp.pad(image.swapaxes(1, 2), ((0, 0), (reach, reach), (0, 0)))
        shifted = [jax.lax.slice_in_dim(padded, t, t + n, axis=1) for t in range(taps)]
        return _to_levels(sum((w * x for w, x in zip(weights, shifted)), jnp.float32(0))), None

    return jax.lax.scan(transpose_and_blur_columns, image, None, length=2)[0]


def _box_reach(max_radius: float) -> int:
    return math.floor((math.sqrt(4 * max_radius**2 + 1) + 1) / 2)


def blur_weights(radius: Array, n: int, max_radius: float) -> Array:
    """The matrix [n, n] of Pillow's blur along one axis: three box filters of fractional width, borders repeated.

    The box has the radius for which their convolution has the variance radius**2. Source: Gwosdek et al., "Theoretical
    foundations of Gaussian convolution by extended box filtering" (2011); Pillow's BoxBlur.c.
    """
    reach = _box_reach(max_radius)
    variance = radius * radius / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    box = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    taps = np.arange(-reach, reach + 1)
    weights = jnp.clip(box + 1 - np.abs(taps), 0, 1) / (2 * box + 1)
    source = np.clip(np.arange(n)[:, None] + taps, 0, n - 1)
    goes_to = (source[:, :, None] == np.arange(n)).astype(np.float32)
    one_pass = jnp.einsum("t,itj->ij", weights, goes_to, precision="highest")
    return jnp.linalg.matrix_power(one_pass, 3)


def solarize(image: Array, threshold: int = 128) -> Array:
    """Pillow's `ImageOps.solarize`: inverts levels from `threshold` up."""
    return jnp.where(image >= threshold, 255 - image, image)


# Levels


def _mean_level(gray: Array, size: Array | None = None) -> Array:
    if size is None:
        return jnp.floor(jnp.mean(gray) + 0.5)
    rows, columns = (jnp.arange(n) < s for n, s in zip(gray.shape, size))
    return jnp.floor(jnp.sum(gray * rows[:, None] * columns) / jnp.prod(size) + 0.5)


def _to_levels(values: Array) -> Array:
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)


def _planes(images: Array) -> Array:
    """uint8 [..., H, W, 3] -> [..., 3, H, W]. Raises ValueError for another type."""
    if images.dtype != np.uint8:
        raise ValueError(
            f'batch["image"] is {images.dtype}, wanted is uint8, levels of 0 to 255: '
            "(images * 255).round().astype(np.uint8) of floats in 0..1"
        )
    return jnp.stack([images[..., channel] for channel in range(3)], axis=-3)  # moveaxis is slower on a CPU


def _normalize(levels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """[..., 3, h, w] -> [..., h, w, 3]."""
    return (jnp.moveaxis(levels, -3, -1).astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)
