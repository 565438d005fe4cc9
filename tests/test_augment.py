"""Multi-crop augmentation: against Pillow, against plain re-derivations, and its random numbers."""

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mim_jax.data import augment as A

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOTHING = A.Policy(flip=0, jitter=0, gray=0, blur=0)
DINO = (
    A.Crops("global", 32, (0.3, 1.0), (A.Policy(blur=1.0), A.Policy(blur=0.1, solarize=0.2))),
    A.Crops("local", 16, (0.05, 0.3), (A.Policy(),) * 4),
)
run = jax.jit(A.augment, static_argnames=("crops", "mean", "std", "dtype"))  # most tests share one compiled form


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width, seed=0):
    coarse = Image.fromarray(noise(height // 6, width // 6, seed))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def planes(image):
    return jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0)


def picture(planes):
    return np.stack(planes, axis=-1).astype(np.float64)


def on_canvas(image, side, filling=0):
    canvas = np.full((side, side, 3), filling, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def batch_of(images, side, filling=0, index=None):
    return {
        "image": np.stack([on_canvas(image, side, filling) for image in images]),
        "size": np.array([image.shape[:2] for image in images], np.int32),
        "label": np.arange(len(images), dtype=np.int32) % 7,
        "index": np.arange(len(images), dtype=np.int32) if index is None else np.asarray(index, np.int32),
    }


def one_crop(policy, size=8):
    """One crop that takes the whole square picture."""
    return (A.Crops("view", size, (1.0, 1.0), (policy,), ratio=(1.0, 1.0)),)


def levels(views):
    return np.asarray(A.denormalize(views, MEAN, STD))


# Random resized crop


def cubic_by_hand(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resize_by_hand(image, size):
    """Horizontal pass, then vertical, in float64, with 8 bits in between: `image` [h, w, 3] -> [size, size, 3]."""
    for axis in (1, 0):
        n = image.shape[axis]
        scale = n / size
        stretch = max(scale, 1.0)
        rows = []
        for i in range(size):
            center = (i + 0.5) * scale
            weights = np.array([cubic_by_hand((j + 0.5 - center) / stretch) for j in range(n)])
            rows.append(np.tensordot(weights / weights.sum(), image.astype(np.float64), (0, axis)))
        image = np.clip(np.floor(np.stack(rows, axis) + 0.5), 0, 255)
    return image


# (top, left, height, width) in a picture of 64 x 80: inside, at every border, whole, tiny; wide ones and high ones.
WIDE = [(3, 5, 20, 40), (0, 0, 13, 31), (44, 20, 20, 60), (0, 0, 64, 80), (10, 70, 8, 10), (63, 79, 1, 1)]
HIGH = [(1, 1, 50, 30), (0, 70, 64, 10), (24, 50, 40, 30), (2, 3, 9, 7)]
center_crop = jax.jit(A.center_crop, static_argnames=("out", "fraction", "mean", "std"))
crop_resize = jax.jit(A.crop_resize, static_argnames=("out", "interpolation", "longest"))


@pytest.mark.parametrize("out", [8, 16, 32, 96])
@pytest.mark.parametrize(
    "make, interpolation", [(noise, "bicubic"), (smooth, "bicubic"), (noise, "bilinear"), (noise, "lanczos")]
)
def test_crop_equals_pillow_within_one_level(make, interpolation, out):
    image = make(64, 80)
    canvas = planes(on_canvas(image, 96, filling=255))
    for top, left, height, width in WIDE:
        ours = picture(crop_resize(canvas, np.array([top, left, height, width]), out, interpolation=interpolation))
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        theirs = np.asarray(cut.resize((out, out), Image.Resampling[interpolation.upper()])).astype(float)
        # What differs are levels that end in a half exactly, which scales like 5/2 make, and a triangle's weights more often.
        assert np.abs(ours - theirs).max() <= (2 if interpolation == "bilinear" else 1)
        assert np.mean(ours == theirs) > (0.9 if interpolation == "bilinear" else 0.99)
        assert np.abs(np.mean(ours - theirs)) < 0.1


@pytest.mark.parametrize("out", [8, 16, 32, 96])
def test_crop_equals_reference_where_pillow_goes_down_first(out):
    image = noise(64, 80)
    canvas = planes(on_canvas(image, 96, filling=255))
    for top, left, height, width in WIDE + HIGH:
        ours = picture(crop_resize(canvas, np.array([top, left, height, width]), out))
        reference = resize_by_hand(image[top : top + height, left : left + width], out)
        assert np.abs(ours - reference).max() <= 1
        assert np.mean(ours == reference) > 0.99


def test_crop_of_random_boxes_is_equal_nearly_everywhere():
    image = noise(64, 80)
    canvas = planes(on_canvas(image, 80, filling=255))
    equal = []
    for seed in range(50):
        rng = random.Random(seed)
        height, width = rng.randint(2, 64), rng.randint(2, 80)
        top, left = rng.randint(0, 64 - height), rng.randint(0, 80 - width)
        ours = picture(crop_resize(canvas, np.array([top, left, height, width]), 17))
        equal.append(np.mean(ours == resize_by_hand(image[top : top + height, left : left + width], 17)))
    assert np.mean(equal) > 0.9998


def test_products_in_bfloat16_give_the_same_levels(monkeypatch):
    """What accelerators compute: the levels of Pillow's filters, in three passes."""
    image, box = planes(noise(90, 90)), jnp.array([3, 5, 80, 61])
    want = A.crop_resize(image, box, 33)
    monkeypatch.setattr(A, "platform", lambda: "tpu")
    program = jax.make_jaxpr(lambda: A.crop_resize(image, box, 33))()
    assert str(program).count("preferred_element_type=float32") == 6 and "bf16" in str(program)
    np.testing.assert_array_equal(A.crop_resize(image, box, 33), want)


def test_a_crop_does_not_depend_on_the_bound_of_its_sides():
    canvas = planes(noise(80, 80))
    for seed in range(20):
        rng = random.Random(seed)
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        box = np.array([rng.randint(0, 80 - height), rng.randint(0, 80 - width), height, width])
        tight, loose = (picture(crop_resize(canvas, box, 64, longest=bound)) for bound in (40, None))
        assert np.abs(tight - loose).max() <= 1 and np.mean(tight == loose) > 0.999


@pytest.mark.parametrize("scale", [(0.05, 0.25), (0.32, 0.5), (0.25, 1.0), (0.001, 0.02)])
def test_no_box_has_a_side_above_the_bound(scale):
    canvas = 60
    bound = A.longest_side(A.Crops("view", 8, scale, (NOTHING,)), canvas)
    sides = np.array([(h, w) for h in range(1, canvas + 1) for w in range(1, canvas + 1)])
    draws = jax.random.uniform(jax.random.key(0), (len(sides), 8, A.BOX_DRAWS))
    draws = draws.at[:, 0].set(1 - 2**-24).at[:, 1, : A.TRIES].set(1 - 2**-24).at[:, 1, A.TRIES :].set(0)
    draws = draws.at[:, 2].set(0)
    draw = jax.vmap(jax.vmap(lambda draws, size: A.sample_box(draws, size, scale), (0, None)))
    largest = np.asarray(jax.jit(draw)(draws, sides))[..., 2:].max()
    assert bound / 2 < largest <= bound <= canvas


def test_flip_mirrors_the_crop():
    image, box = planes(noise(64, 64)), np.array([3, 5, 20, 40])
    straight, mirrored = (picture(crop_resize(image, box, 16, flip)) for flip in (False, True))
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])


def test_padding_never_leaks_in():
    images = [smooth(18 + 2 * i, 32 - 2 * i, seed=i) for i in range(8)]
    black, white = (run(batch_of(images, 32, filling), DINO, jax.random.key(0), MEAN, STD) for filling in (0, 255))
    for name in ("global", "local"):
        np.testing.assert_array_equal(black[name], white[name])
    black, white = (
        center_crop(jnp.asarray(b["image"]), jnp.asarray(b["size"]), 24, 1.0, MEAN, STD)
        for b in (batch_of(images, 32, 0), batch_of(images, 32, 255))
    )
    np.testing.assert_array_equal(black, white)


def box_by_hand(rng, height, width, scale, ratio):
    """torchvision's loop."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def sample_boxes(count, size, scale, ratio=(3 / 4, 4 / 3), seed=0):
    draws = jax.random.uniform(jax.random.key(seed), (count, A.BOX_DRAWS))
    return np.asarray(jax.jit(jax.vmap(lambda d: A.sample_box(d, jnp.array(size), scale, ratio)))(draws))


def largest_gap(a, b):
    """Between the two distribution functions (Kolmogorov-Smirnov)."""
    at = np.union1d(a, b)
    share_of_a, share_of_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    return np.abs(share_of_a - share_of_b).max()


# The last three: boxes that often do not fit (tries repeated), and that seldom or never do (fallback).
@pytest.mark.parametrize(
    "size, scale",
    [
        ((120, 200), (0.25, 1.0)),
        ((96, 96), (0.05, 0.25)),
        ((90, 90), (0.8, 1.0)),
        ((20, 100), (0.5, 1.0)),
        ((100, 30), (0.3, 0.6)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(size, scale):
    count = 4000
    rng = random.Random(1)
    ours = sample_boxes(count, size, scale)
    theirs = np.array([box_by_hand(rng, *size, scale, (3 / 4, 4 / 3)) for _ in range(count)])
    assert ours.dtype == np.int32
    assert np.all(ours[:, :2] >= 0) and np.all(ours[:, 2:] >= 1) and np.all(ours[:, :2] + ours[:, 2:] <= size)
    bound = 1.95 * math.sqrt(2 / count)  # one in a thousand; the seeds are fixed
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert largest_gap(a, b) < bound
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert largest_gap(statistic(ours), statistic(theirs)) < bound


def test_boxes_keep_scale_and_ratio():
    boxes = sample_boxes(5000, (1000, 1000), (0.2, 0.4), (0.5, 2.0))
    share = boxes[:, 2] * boxes[:, 3] / 1e6
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.199 < share.min() < 0.201 and 0.399 < share.max() < 0.401 and abs(share.mean() - 0.3) < 0.003
    assert 0.498 < ratio.min() < 0.502 and 1.99 < ratio.max() < 2.01 and abs(np.log(ratio).mean()) < 0.02


@pytest.mark.parametrize("size, box", [((11, 100), (0, 42, 11, 15)), ((100, 11), (42, 0, 15, 11)), ((1, 50), (0, 24, 1, 1))])
def test_fallback_is_the_largest_centered_box(size, box):
    boxes = sample_boxes(50, size, (0.9, 1.0))
    np.testing.assert_array_equal(boxes, np.tile(box, (50, 1)))


# Color


def hue_by_torchvision(image, shift):
    hue, saturation, value = image.convert("HSV").split()
    hue = (np.asarray(hue, np.int32) + int(shift * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(hue.astype(np.uint8)), saturation, value)).convert("RGB")


ENHANCE = {
    A.BRIGHTNESS: ImageEnhance.Brightness,
    A.CONTRAST: ImageEnhance.Contrast,
    A.SATURATION: ImageEnhance.Color,
}


@pytest.mark.parametrize("factor", [0.0, 0.61, 1.0, 1.13, 2.0])
@pytest.mark.parametrize("operation", list(ENHANCE))
def test_brightness_contrast_and_saturation_equal_pillow(operation, factor):
    jitter = A.ORDERS[0], np.where(np.arange(3) == operation, np.float32(factor), 1), 0.0
    for image in (noise(40, 56), smooth(40, 56)):
        theirs = np.asarray(ENHANCE[operation](Image.fromarray(image)).enhance(factor)).astype(float)
        ours = picture(jax.jit(A.color_jitter, static_argnames="hue")(planes(image), jitter, hue=False))
        assert np.abs(ours - theirs).max() <= 1
        assert np.mean(ours == theirs) > 0.999


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.003, 0.0, 0.05, 0.33])
def test_hue_equals_torchvision_on_pillow(shift):
    special = np.array(list(itertools.product((0, 1, 85, 128, 170, 254, 255), repeat=3)), np.uint8)[None]
    for image in (noise(64, 80), smooth(64, 80), special):
        theirs = np.asarray(hue_by_torchvision(Image.fromarray(image), shift)).astype(float)
        ours = picture(jax.jit(A.adjust_hue)(planes(image), shift))
        assert np.abs(ours - theirs).max() <= 6  # one of the 256 steps of hue
        if image is not special:
            assert np.mean(ours == theirs) > 0.998


def test_gray_and_solarize_equal_pillow():
    for image in (noise(64, 80), smooth(64, 80)):
        opened = Image.fromarray(image)
        gray = np.asarray(opened.convert("L").convert("RGB"))
        np.testing.assert_array_equal(picture(A.grayscale(planes(image))), gray)
        np.testing.assert_array_equal(picture(A.solarize(planes(image))), np.asarray(ImageOps.solarize(opened)))


blur = jax.jit(A.gaussian_blur, static_argnames="max_radius")


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.34, 1.0, 1.7, 4.3])
def test_blur_equals_pillow(radius):
    for image in (noise(40, 40), smooth(40, 40)):
        theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))).astype(float)
        ours = picture(blur(planes(image), radius, max_radius=max(2.0, radius)))
        error = np.abs(ours - theirs)
        assert error.max() <= (3 if radius else 0) and error.mean() < 1
        # Nearly all of it is Pillow's rounding six times.
        assert np.abs(ours - box_blur_by_hand(image, radius)).max() <= 1


def box_blur_by_hand(image, radius):
    """Three extended box filters a direction, as Pillow computes their radius, in float64, never rounded."""
    variance = radius**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    kernel = np.array([rest] + [1.0] * (2 * whole + 1) + [rest]) / (2 * (whole + rest) + 1)

    def blur(line):
        for _ in range(3):
            line = np.convolve(np.pad(line, whole + 1, mode="edge"), kernel, mode="valid")
        return line

    return np.apply_along_axis(blur, 0, np.apply_along_axis(blur, 1, image.astype(np.float64)))


def test_blur_weights_are_nearly_gaussian():
    at = np.arange(41) - 20
    for radius in (0.3, 0.8, 1.5, 2.0):
        row = np.asarray(A.blur_weights(jnp.float32(radius), 41, 2.0))[20]
        assert row.sum() == pytest.approx(1, abs=1e-6)
        assert math.sqrt(np.sum(row * at**2)) == pytest.approx(radius, rel=1e-4)
        gaussian = np.exp(-(at**2) / (2 * radius**2))
        # As sampled, a Gaussian narrower than a pixel is narrower than it should be.
        assert np.abs(row - gaussian / gaussian.sum()).max() < (0.1 if radius < 0.5 else 0.05)


def test_jitter_in_every_order_equals_pillow_in_that_order():
    image = smooth(32, 32)
    factors, shift = np.array([1.3, 0.65, 1.18], np.float32), 0.08
    ours = jax.vmap(lambda order: A.color_jitter(planes(image), (order, factors, jnp.float32(shift))))(A.ORDERS)
    results = []
    for order, result in zip(A.ORDERS, np.moveaxis(ours, 1, -1), strict=True):
        theirs = Image.fromarray(image)
        for operation in order:
            if operation == A.HUE:
                theirs = hue_by_torchvision(theirs, shift)
            else:
                theirs = ENHANCE[operation](theirs).enhance(float(factors[operation]))
        error = np.abs(result - np.asarray(theirs).astype(float))
        assert error.max() <= 10 and np.mean(error == 0) > 0.995
        results.append(result)
    # The orders can be told apart, so the one that was asked for was taken.
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(results, 2)) > 0.05


def test_jitter_arguments():
    policy = A.Policy(jitter=0.8, brightness=0.4, contrast=1.5, saturation=0.0, hue=0.1)
    draws = jax.random.uniform(jax.random.key(0), (24_000, A.JITTER_DRAWS))
    order, factors, shift = map(np.asarray, jax.vmap(lambda d: A.sample_jitter(d, policy))(draws))
    unchanged = np.all(factors == 1, axis=1) & (shift == 0)
    assert abs(unchanged.mean() - 0.2) < 0.011
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 850 and counts.max() < 1150
    brightness, contrast, saturation = factors[~unchanged].T
    for values, low, high in ((brightness, 0.6, 1.4), (contrast, 0.0, 2.5), (shift[~unchanged], -0.1, 0.1)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert np.all(saturation == 1)
    # Nothing is drawn from the same number as something else.
    drawn = np.column_stack([np.argmax(order == A.HUE, axis=1), factors[:, :2], shift])[~unchanged]
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03


# Views


@pytest.mark.parametrize(
    "policy, changed",
    [
        ({"flip": 0.5}, lambda view, image: np.array_equal(view, image[:, ::-1])),
        ({"jitter": 0.8}, lambda view, image: not np.array_equal(view, image)),
        ({"gray": 0.2}, lambda view, image: np.ptp(view, axis=-1).max() == 0),
        ({"blur": 0.3, "blur_radius": (1.0, 2.0)}, lambda view, image: not np.array_equal(view, image)),
        ({"solarize": 0.4}, lambda view, image: np.array_equal(view, np.where(image < 128, image, 255 - image))),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_frequencies(policy, changed):
    image, count = noise(8, 8), 2000
    batch = batch_of([image] * count, 8)
    crops = one_crop(A.Policy(**({"flip": 0, "jitter": 0, "gray": 0, "blur": 0} | policy)))
    views = levels(run(batch, crops, jax.random.key(3), MEAN, STD)["view"])[:, 0]
    happened = np.array([changed(view, image) for view in views])
    for view in views[~happened]:
        np.testing.assert_array_equal(view, image)
    probability = next(iter(policy.values()))
    assert abs(happened.mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / count)


def test_what_happens_to_a_crop_is_drawn_independently():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = (240, 200, 210), (200, 140, 150)
    policy = A.Policy(flip=0.5, jitter=0, gray=0.5, blur=0.5, blur_radius=(0.8, 0.8), solarize=0.5)
    count = 4000
    views = run(batch_of([image] * count, 8), one_crop(policy), jax.random.key(0), MEAN, STD)
    views = levels(views["view"])[:, 0].astype(int)
    solarized = views[:, 0, 0, 0] < 128
    bright = np.where(solarized[:, None, None, None], 255 - views, views)
    left, right = bright[:, 0, 0], bright[:, 0, -1]  # the blur does not reach them
    flipped = left.sum(axis=1) > right.sum(axis=1)
    gray = np.ptp(left, axis=1) == 0
    blurred = np.any(bright[:, 0, 3] != left, axis=1)
    _, counts = np.unique(np.column_stack([solarized, flipped, gray, blurred]), axis=0, return_counts=True)
    assert len(counts) == 16
    assert np.abs(counts / count - 1 / 16).max() < 4 * math.sqrt(1 / 16 / count)


def test_the_radius_of_a_blur_has_a_draw_of_its_own(monkeypatch):
    """It is uniform in the range, whatever number decided that the crop is blurred; it is 0 where it is not."""
    monkeypatch.setattr(A, "crop_resize", lambda image, *_, **__: image)
    monkeypatch.setattr(A, "gaussian_blur", lambda image, radius, max_radius: radii.append(float(radius)) or image)
    policy, radii = A.Policy(flip=0, jitter=0, gray=0, blur=0.5, blur_radius=(0.5, 2.5)), []
    group = A.Crops("view", 2, (1.0, 1.0), (policy,))
    for happens, radius in ((0.1, 0.75), (0.4, 0.75), (0.4, 0.0), (0.6, 0.75)):
        draws = jnp.full(A.BOX_DRAWS + A.JITTER_DRAWS + A.OTHER_DRAWS, 0.5).at[-3:-1].set(jnp.array([happens, radius]))
        A.random_view(jnp.zeros((3, 2, 2)), jnp.array([2, 2]), draws, policy, group)
    assert radii == [2.0, 2.0, 0.5, 0.0]


def test_a_policy_that_asks_for_nothing_resizes_only():
    image = smooth(24, 24)
    views = run(batch_of([image], 32), one_crop(NOTHING, size=24), jax.random.key(0), MEAN, STD)
    np.testing.assert_allclose(views["view"][0, 0], (image / 255 - MEAN) / STD, atol=1e-5)
    np.testing.assert_array_equal(levels(views["view"])[0, 0], image)


def test_a_target_is_the_same_crop_at_another_size_after_the_same_jitter():
    """BEiT's two renderings: jitter of the whole image, then one box, flipped alike, cut out twice."""
    images = [smooth(48, 60, seed) for seed in range(6)]
    beit = A.Policy(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0, gray=0.0, blur=0.0)
    group = A.Crops("global", 32, (0.3, 1.0), (beit,), color_first=True, target=A.Target(16, "lanczos"))
    batch, key = batch_of(images, 64, filling=255), jax.random.key(3)
    views = run(batch, (group,), key, MEAN, STD)
    for i, image in enumerate(images):
        draws = A.random_numbers(key, jnp.int32(i), jnp.int32(0))
        box_draws, jitter_draws, others = jnp.split(draws, [A.BOX_DRAWS, A.BOX_DRAWS + A.JITTER_DRAWS])
        order, factors, shift = A.sample_jitter(jitter_draws, beit)
        assert shift == 0
        theirs = Image.fromarray(image)
        for operation in order:
            theirs = theirs if operation == A.HUE else ENHANCE[int(operation)](theirs).enhance(float(factors[operation]))
        top, left, height, width = (int(x) for x in A.sample_box(box_draws, np.array(image.shape[:2]), group.scale))
        cut = theirs.crop((left, top, left + width, top + height))
        cut = ImageOps.mirror(cut) if others[0] < 0.5 else cut
        seen = levels(views["global"][i, 0]), np.round(np.asarray(views["target"][i, 0]) * 255)
        for ours, size, name in zip(seen, (32, 16), ("BICUBIC", "LANCZOS")):
            want = np.asarray(cut.resize((size, size), Image.Resampling[name])).astype(float)
            assert np.abs(ours.astype(float) - want).max() <= 1  # ties of whole ratios, as above
            assert np.mean(ours == want) > 0.8


def test_policies_belong_to_their_crops():
    crops = (A.Crops("view", 8, (1.0, 1.0), (NOTHING, A.Policy(0, 0, gray=1, blur=0), NOTHING), ratio=(1.0, 1.0)),)
    batch = batch_of([noise(8, 8, seed) for seed in range(5)], 8)
    views = run(batch, crops, jax.random.key(0), MEAN, STD)["view"]
    spread = np.ptp(levels(views), axis=-1).max(axis=(0, 2, 3))
    assert spread[1] == 0 and spread[0] > 100 and spread[2] > 100


def test_order_of_operations_is_dinos():
    # Solarized last: of a crop made gray, then blurred. (The other orders differ on noise.)
    policy = A.Policy(flip=0, jitter=0, gray=1, blur=1, blur_radius=(1.5, 1.5), solarize=1)
    image = noise(16, 16)
    view = levels(run(batch_of([image], 16), one_crop(policy, 16), jax.random.key(0), MEAN, STD)["view"])[0, 0]
    blurred = Image.fromarray(image).convert("L").convert("RGB").filter(ImageFilter.GaussianBlur(1.5))
    error = np.abs(view.astype(float) - np.asarray(ImageOps.solarize(blurred)).astype(float))
    assert np.mean(error <= 2) > 0.98


def test_views_shapes_types_and_what_is_passed_on():
    batch = batch_of([smooth(32, 24, i) for i in range(8)], 32)
    views = run(batch, DINO, jax.random.key(0), MEAN, STD)
    assert set(views) == {"global", "local", "label", "index"}
    assert views["global"].shape == (8, 2, 32, 32, 3) and views["global"].dtype == jnp.float32
    assert views["local"].shape == (8, 4, 16, 16, 3) and views["local"].dtype == jnp.float32
    batch["mask"] = np.arange(8)[:, None] > np.arange(5)
    views = run(batch, one_crop(NOTHING), jax.random.key(0), MEAN, STD, jnp.bfloat16)
    assert views["view"].shape == (8, 1, 8, 8, 3) and views["view"].dtype == jnp.bfloat16
    for name in ("label", "index", "mask"):
        np.testing.assert_array_equal(views[name], batch[name])


def test_views_do_not_depend_on_the_batch():
    images = [smooth(32, 30, i) for i in range(8)]
    index = np.array([5, 900, 31, 2, 77, 40_000, 6, 1])
    key = jax.random.key(7)
    whole = run(batch_of(images, 32, index=index), DINO, key, MEAN, STD)
    for chosen in ([3, 0, 7], list(reversed(range(8)))):
        crops = DINO if len(chosen) == 8 else DINO[:1]
        part = run(batch_of([images[i] for i in chosen], 32, index=index[chosen]), crops, key, MEAN, STD)
        for name in [group.name for group in crops]:
            np.testing.assert_array_equal(levels(part[name]), levels(whole[name])[np.array(chosen)])
            np.testing.assert_allclose(part[name], whole[name][np.array(chosen)], atol=1e-6)


def test_views_depend_on_key_index_and_crop_number():
    batch = batch_of([smooth(32, 32)] * 8, 32, index=[4, 4, 5, 6, 7, 8, 9, 10])
    views = run(batch, DINO, jax.random.key(0), MEAN, STD)
    np.testing.assert_array_equal(views["global"][0], views["global"][1])
    np.testing.assert_array_equal(views["local"][0], views["local"][1])
    other = run(batch, DINO, jax.random.key(1), MEAN, STD)
    seen = np.concatenate([views["local"][1:4], other["local"][1:4]]).reshape(-1, 16, 16, 3)
    for a, b in itertools.combinations(seen, 2):
        assert np.abs(a - b).mean() > 0.01


def test_more_crops_leave_the_first_ones_as_they_were():
    batch = batch_of([smooth(32, 32)] * 3, 32)
    crops = (A.Crops("a", 8, (0.1, 0.9), (A.Policy(blur=0),)), A.Crops("b", 8, (0.1, 0.9), (A.Policy(blur=0),)))
    one = run(batch, crops[:1], jax.random.key(0), MEAN, STD)
    two = run(batch, crops, jax.random.key(0), MEAN, STD)
    np.testing.assert_array_equal(levels(one["a"]), levels(two["a"]))
    assert np.abs(two["a"] - two["b"]).mean() > 0.01


def test_views_are_the_same_in_float64_programs():
    batch = batch_of([smooth(32, 30, i) for i in range(8)], 32)
    plain = run(batch, DINO, jax.random.key(0), MEAN, STD)
    with jax.enable_x64(True):
        double = run(batch, DINO[:1], jax.random.key(0), MEAN, STD)
    assert double["global"].dtype == jnp.float32
    # A weight whose last bit differs may turn a level that ends in a half.
    assert np.mean(levels(plain["global"]) == levels(double["global"])) > 0.999


def test_eight_devices_make_the_views_of_one_without_talking(monkeypatch):
    batch = batch_of([smooth(32, 30, i) for i in range(16)], 32)
    halves = [
        run({name: x[half] for name, x in batch.items()}, DINO, jax.random.key(0), MEAN, STD)
        for half in (slice(8), slice(8, 16))
    ]
    monkeypatch.setattr(A, "PIXELS_A_CORE", 0)  # each device works on one image at a time
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    key = jax.random.key(0)
    assert A._parts(16, 1) == 2
    compiled = run.lower(sharded, DINO[:1], key, MEAN, STD).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    spread = compiled(sharded, key)
    assert len(spread["global"].sharding.device_set) == 8
    alone = np.concatenate([half["global"] for half in halves])
    # Compiled for another number of images, a level that ends in a half may be rounded to the other side.
    assert np.mean(levels(spread["global"]) == levels(alone)) > 0.9999


# Evaluation and pictures


@pytest.mark.parametrize("out, fraction", [(16, 1.0), (32, 0.875), (96, 0.5)])
def test_center_crop_equals_pillow(out, fraction):
    images = [noise(64, 80), smooth(80, 60), noise(40, 40)]
    batch = batch_of(images, 80, filling=255)
    views = center_crop(jnp.asarray(batch["image"]), jnp.asarray(batch["size"]), out, fraction, MEAN, STD)
    assert views.shape == (3, out, out, 3) and views.dtype == jnp.float32
    for image, view in zip(images, levels(views).astype(float), strict=True):
        height, width = image.shape[:2]
        side = fraction * min(height, width)
        top, left = (height - side) / 2, (width - side) / 2
        box = (left, top, left + side, top + side)
        theirs = np.asarray(Image.fromarray(image).resize((out, out), Image.Resampling.BICUBIC, box=box)).astype(float)
        assert np.abs(view - theirs).max() <= 1
        assert np.mean(view == theirs) > 0.99


def test_denormalize_undoes_normalize():
    every = np.stack([np.arange(256)] * 3, -1)[None]
    normalized = (every / 255 - MEAN) / STD
    pictures = A.denormalize(normalized, MEAN, STD)
    assert pictures.dtype == jnp.uint8
    np.testing.assert_array_equal(pictures, every)
    out_of_range = A.denormalize(jnp.array([[[[-9.0, 9.0, 0.0]]]]), MEAN, STD)
    np.testing.assert_array_equal(out_of_range[0, 0, 0], [0, 255, round(0.406 * 255)])
