"""The views that the methods ask for: their crops as the papers have them, and their shapes as they are made."""

import dataclasses

import jax
import numpy as np
import pytest

import mim_jax
from mim_jax.data.augment import FLIP, Policy

JITTER = dict(flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2)
BEIT = Policy(flip=0.5, jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0, gray=0.0, blur=0.0)
# Of the global crops, then of each local one.
POLICIES = {
    # always blurred; rarely blurred and perhaps solarised; half of them blurred (DINO, appendix C; iBOT has the same)
    "dino": ((Policy(**JITTER, blur=1.0), Policy(**JITTER, blur=0.1, solarize=0.2)), Policy(**JITTER, blur=0.5)),
    "ibot": ((Policy(**JITTER, blur=1.0), Policy(**JITTER, blur=0.1, solarize=0.2)), Policy(**JITTER, blur=0.5)),
    # the official code's probabilities are those of no blur
    "dinov2": ((Policy(**JITTER, blur=0.0), Policy(**JITTER, blur=0.9, solarize=0.2)), Policy(**JITTER, blur=0.5)),
    "distillation": ((Policy(**JITTER, blur=0.0), Policy(**JITTER, blur=0.9, solarize=0.2)), Policy(**JITTER, blur=0.5)),
    "mocov3": ((Policy(**JITTER, blur=1.0), Policy(**JITTER, blur=0.1, solarize=0.2)), None),
    "mae": ((FLIP,), None),
    "masked_patch": ((FLIP,), None),
    "simmim": ((FLIP,), None),
    "vqvae": ((FLIP,), None),
    "dvae": ((FLIP,), None),
    "vqkd": ((FLIP,), None),
    "beit": ((BEIT,), None),
    "beit2": ((BEIT,), None),
}


@pytest.mark.parametrize("name", POLICIES)
def test_crops_are_those_of_the_config(name):
    config = mim_jax.load_config(f"tests/tiny.py:{name}")
    config.crops.global_crops_scale = (0.3, 0.9)
    if local := config.crops.get("local_crops_number"):
        config.crops.update(local_crops_scale=(0.1, 0.25), local_crops_number=3)
    if "blur_radius" in config.crops:
        config.crops.blur_radius = (0.2, 1.5)
    views = mim_jax.make_method(config).views
    size = config.crops.get("global_crops_size") or config.model.img_size
    wanted, of_local = POLICIES[name]
    crops = [("global", size, (0.3, 0.9), wanted)]
    crops += [("local", config.crops.local_crops_size, (0.1, 0.25), (of_local,) * 3)] if local else []
    assert len(views.crops) == len(crops)
    for group, (label, size, scale, policies) in zip(views.crops, crops):
        radius = {"blur_radius": (0.2, 1.5)} if "blur_radius" in config.crops else {}
        assert (group.name, group.size, group.scale) == (label, size, scale)
        assert group.policies == tuple(dataclasses.replace(policy, **radius) for policy in policies)
        assert group.ratio == (3 / 4, 4 / 3) and group.color_first == name.startswith("beit")
        assert group.interpolation == ("bilinear" if name in ("simmim", "mocov3") else "bicubic")
    assert (views.mean, views.std) == (tuple(config.data.mean), tuple(config.data.std))


@pytest.mark.parametrize("name", ["dino", "ibot", "beit", "mae"])
def test_shapes_are_those_of_what_is_made(name):
    config = mim_jax.load_config(f"tests/tiny.py:{name}")
    views = mim_jax.make_method(config).views
    batch = views.batch_shapes(4, 24)
    assert (batch["image"].shape, batch["size"].shape) == ((4, 24, 24, 3), (4, 2))
    if (draw := views.host_masks(0)) is not None:
        masks = draw(np.arange(4))
        assert {key: (mask.shape, mask.dtype) for key, mask in masks.items()} == {
            key: (batch[key].shape, batch[key].dtype) for key in masks
        }
    made = jax.eval_shape(views.make, batch, jax.random.key(0))
    assert {key: (a.shape, a.dtype) for key, a in made.items()} == {
        key: (a.shape, a.dtype) for key, a in views.shapes(4).items()
    }
