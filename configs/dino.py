"""DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294).

Variants for ImageNet-1k, with the k-NN / linear top-1 accuracy that the paper and the official repository report:

    vits16     ViT-S/16, 800 epochs, batch 1024, 2 x 224 + 10 x 96 px   74.5 / 77.0   180 hours on 16 V100 (table 8)
    vits8      ViT-S/8                                                  78.3 / 79.7
    vitb16     ViT-B/16, 400 epochs                                     76.1 / 78.2
    vitb8      ViT-B/8, 300 epochs                                      77.4 / 80.1
    two_views  vits16 without local crops: algorithm 1 of the paper

    mim_jax --config=dino:vits16 --config.data.dir=~/tensorflow_datasets --workdir=runs/dino_vits16

These have not been trained with this code yet. With `--dry_run` the command prints their plan.

Variants for CIFAR-10 (scores and baselines of both: docs/results.md):

    demo       ViT of 3 blocks, width 96, 3,500 steps: 4 1/2 minutes on 2 CPU cores. k-NN 0.377
    cifar10    the same with width 128, 36 epochs: 90 minutes on one CPU core. k-NN 0.540
"""

import ml_collections

from mim_jax.config import hours_on_cifar10, on_cifar10, skeleton


def get_config(variant: str = "vits16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "dino"
    config.total = "800 epochs"

    config.model.patch_size = 16
    config.model.dim = 384
    config.model.depth = 12
    config.model.heads = 6
    config.model.drop_path_rate = 0.1
    config.model.init_std = 0.02  # std of the initial weights of linear layers

    config.head = ml_collections.ConfigDict()
    config.head.out_dim = 65536
    config.head.hidden_dim = 2048
    config.head.bottleneck_dim = 256
    config.head.nlayers = 3
    config.head.use_bn = False
    config.head.norm_last_layer = False

    config.crops.global_crops_number = 2
    config.crops.global_crops_size = 224
    config.crops.global_crops_scale = (0.25, 1.0)
    config.crops.local_crops_number = 10
    config.crops.local_crops_size = 96
    config.crops.local_crops_scale = (0.05, 0.25)
    config.crops.blur_radius = (0.1, 2.0)  # std of the Gaussian blur, in pixels of the crop

    config.loss = ml_collections.ConfigDict()
    config.loss.student_temp = 0.1
    config.loss.warmup_teacher_temp = 0.04
    config.loss.teacher_temp = 0.07
    config.loss.teacher_temp_warmup = "30 epochs"
    config.loss.center_momentum = 0.9

    config.optim.lr = 5e-4
    config.optim.min_lr = 1e-6
    config.optim.weight_decay = 0.04
    config.optim.weight_decay_end = 0.4
    config.optim.clip_grad = 3.0
    config.optim.clip_per = "parameter"
    config.optim.freeze_last_layer = "1 epoch"
    config.optim.momentum_teacher = 0.996

    config.mesh.rules += (
        (r"head/mlp_\d/kernel$", (None, "fsdp")),
        (r"last_layer2?/weight_[gv]$", (None, "fsdp")),
    )

    VARIANTS[variant](config)
    return config


def vits8(config):
    config.model.patch_size = 8


def vitb16(config):
    config.model.update(dim=768, depth=12, heads=12)
    config.head.norm_last_layer = True
    config.total = "400 epochs"


def vitb8(config):
    vitb16(config)
    config.model.patch_size = 8
    config.total = "300 epochs"


def two_views(config):
    """Algorithm 1 of the paper: two crops. The student's output for each is compared with the teacher's for the other."""
    config.crops.local_crops_number = 0


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "3500 steps", 64
    config.model.update(patch_size=8, dim=96, depth=3, heads=3, drop_path_rate=0.0, unroll=3)
    config.model.init_std = 0.1  # about 1 / sqrt(dim); with 0.02 this narrow network learns more slowly
    config.head.update(out_dim=1024, hidden_dim=256, bottleneck_dim=64, norm_last_layer=True)
    small_crops(config)
    config.crops.local_crops_number = 2
    config.loss.update(teacher_temp_warmup="0 epochs", teacher_temp=0.04)
    config.optim.update(lr=8e-3, min_lr=2e-5, warmup="100 steps", weight_decay_end=0.04)
    config.optim.update(freeze_last_layer="50 steps", momentum_teacher=0.98)


def cifar10(config):
    demo(config)
    hours_on_cifar10(config, total="36 epochs")


def small_crops(config):
    """Crops of 32 and 16 pixels that cover larger shares of the image; the blur is scaled down with the crops."""
    config.crops.update(global_crops_size=32, global_crops_scale=(0.5, 1.0))
    config.crops.update(local_crops_size=16, local_crops_scale=(0.2, 0.6), blur_radius=(0.0, 0.3))


VARIANTS = {"vits16": lambda config: None, "vits8": vits8, "vitb16": vitb16, "vitb8": vitb8}
VARIANTS |= {"two_views": two_views, "cifar10": cifar10, "demo": demo}
