"""Linear probing: linear classifiers of the frozen features of a run, trained on cropped and flipped images.

    mim_jax --config=linear:mae --config.init_from=runs/mae --workdir=runs/mae_linear

Without `init_from` the backbone is a random ViT, which is a baseline. Of a run with a teacher it is the teacher's.

    mae       MAE: CLS after the norm, batch normalisation without scale and bias, LARS, batch 16384, 90 epochs
    dino      DINO, ViT-S: CLS of the last 4 blocks, SGD, batch 1024, 100 epochs
    dino_vitb DINO, ViT-B: CLS and the mean patch of the last block
    sweep     DINOv2: 13 learning rates x the last 1 or 4 blocks x without and with the mean patch, 52 classifiers over one
              forward pass, batch 1024, 12,500 steps

The official code of `sweep` chooses the classifier on the validation images. Here one training image in ten is not learned
from, and the classifier with the highest accuracy on these, a moving average over about 100 steps, is the one that is used.
These have not been run on ImageNet with this code yet.

    demo      CIFAR-10: 6 learning rates x without and with the mean patch, of the demo of another method
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "mae") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "linear"
    config.total = "90 epochs"
    config.data.batch_size = 16384
    config.encoder = ml_collections.ConfigDict()  # filled in: the config of the run in init_from
    config.init_parts = ("backbone",)

    # Without init_from. What describes the backbone, all but img_size, unroll and dtype, becomes that of the run.
    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.pos = "learned"
    config.model.layerscale = 0.0

    config.probe = ml_collections.ConfigDict()
    config.probe.blocks = (1,)  # each: the CLS tokens of so many last blocks
    config.probe.mean_patch = (False,)  # each: whether the mean of the last patch tokens is a feature, too
    config.probe.rates = (1.0,)  # each: a factor of the learning rate
    config.probe.batch_norm = True
    config.probe.held_out = 0  # one image in so many is not learned from, to choose the classifier by; 0: all are

    config.crops.global_crops_scale = (0.08, 1.0)
    config.crops.interpolation = "bicubic"

    config.optim.name = "lars"
    config.optim.schedule = "mae"
    config.optim.lr = 0.1
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = config.optim.weight_decay_end = 0.0

    config.mesh.rules += ((r"heads/.*kernel$", (None, None, "fsdp")),)

    VARIANTS[variant](config)
    return config


def dino(config):
    config.total, config.data.batch_size = "100 epochs", 1024
    config.model.update(dim=384, heads=6)
    config.probe.update(blocks=(4,), batch_norm=False)
    config.crops.interpolation = "bilinear"
    config.optim.update(name="sgd", lr=1e-3, warmup="0 epochs")


def dino_vitb(config):
    dino(config)
    config.model.update(dim=768, heads=12)
    config.probe.update(blocks=(1,), mean_patch=(True,))


def sweep(config):
    config.total, config.data.batch_size = "12_500 steps", 1024
    config.probe.update(blocks=(1, 4), mean_patch=(False, True), batch_norm=False, held_out=10)
    config.probe.rates = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    config.optim.update(name="sgd", lr=1.0, warmup="0 epochs")


def demo(config):
    sweep(config)
    on_cifar10(config)
    config.total, config.data.batch_size = "2000 steps", 256
    config.model.update(patch_size=8, dim=96, depth=3, heads=3, unroll=3)
    config.probe.update(blocks=(1,), rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0))
    config.crops.global_crops_scale = (0.3, 1.0)
    config.eval.every = "1000 steps"
    config.checkpoint.every = "1000 steps"


VARIANTS = {"mae": lambda config: None, "dino": dino, "dino_vitb": dino_vitb, "sweep": sweep, "demo": demo}
