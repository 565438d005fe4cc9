"""MoCo v3 (Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv:2104.02057).

Variants for ImageNet-1k, with the fine-tuned / linear top-1 accuracy that the official repository reports, for ViT-L the MAE
paper (table 3): 300 epochs, two views of 224 px, batch 4096.

    vits16   ViT-S/16 with 12 heads   81.4 / 73.2
    vitb16   ViT-B/16                 83.2 / 76.7
    vitl16   ViT-L/16                 84.1 / 77.6   36 hours on 128 TPU-v3 (MAE, section 4.2)

    mim_jax --config=mocov3:vitb16 --config.data.dir=~/tensorflow_datasets --workdir=runs/mocov3_vitb16

The paper evaluates the encoder, this code its average (the teacher); `params` of a checkpoint are the encoder. These have not
been trained with this code yet. With `--dry_run` the command prints their plan.

Variant for CIFAR-10:

    demo     ViT of 3 blocks, patches of 8 pixels, 3,500 steps
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "mocov3"
    config.total = "300 epochs"
    config.data.batch_size = 4096

    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12

    config.head = ml_collections.ConfigDict()  # of projector and predictor
    config.head.hidden_dim = 4096
    config.head.out_dim = 256

    config.crops.global_crops_number = 2
    config.crops.global_crops_scale = (0.08, 1.0)
    config.crops.blur_radius = (0.1, 2.0)  # std of the Gaussian blur, in pixels of the crop

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 0.2

    config.optim.schedule = "mae"
    config.optim.lr = 1.5e-4
    config.optim.warmup = "40 epochs"
    config.optim.weight_decay = config.optim.weight_decay_end = 0.1
    config.optim.decay_vectors = True
    config.optim.momentum_teacher = 0.99

    config.mesh.rules += ((r"(projector|predictor)/mlp_\d/kernel$", (None, "fsdp")),)

    VARIANTS[variant](config)
    return config


def vits16(config):
    config.model.update(dim=384, depth=12, heads=12)


def vitl16(config):
    config.model.update(dim=1024, depth=24, heads=16)


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "3500 steps", 64
    config.model.update(patch_size=8, dim=96, depth=3, heads=3, unroll=3)
    config.head.update(hidden_dim=256, out_dim=64)
    config.crops.update(global_crops_scale=(0.3, 1.0), blur_radius=(0.0, 0.3))  # the blur is scaled down with the crops
    config.optim.update(lr=8e-3, warmup="100 steps")


VARIANTS = {"vits16": vits16, "vitb16": lambda config: None, "vitl16": vitl16, "demo": demo}
