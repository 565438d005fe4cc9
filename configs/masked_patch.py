"""Masked patch prediction of the ViT paper (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929, B.1.2).

Variant for ImageNet-1k:

    vitb16   ViT-B/16, 1,000,000 steps, batch 4096, half of the patches corrupted

    mim_jax --config=masked_patch:vitb16 --config.data.dir=~/tensorflow_datasets --workdir=runs/masked_patch_vitb16

The paper reports 79.9 % after fine-tuning at 384 px, but pretrains on JFT-300M, which is not public: 1,000,000 steps are 14
epochs of it, and 3,200 of ImageNet-1k. It saw diminishing returns after 100,000 steps, and similar gains from pretraining on
ImageNet. This has not been trained with this code yet. With `--dry_run` the command prints its plan.

Variant for CIFAR-10:

    demo     ViT of 3 blocks, patches of 4 pixels, 3,500 steps
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "masked_patch"
    config.total = "1_000_000 steps"
    config.data.batch_size = 4096
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)

    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12

    config.crops.global_crops_scale = (0.05, 1.0)

    config.mask = ml_collections.ConfigDict()
    config.mask.ratio = 0.5

    config.optim.lr_batch_size = 0  # lr is not scaled with the batch
    config.optim.lr = 2e-4
    config.optim.warmup = "10_000 steps"
    config.optim.weight_decay = config.optim.weight_decay_end = 0.1

    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "3500 steps", 64
    config.model.update(patch_size=4, dim=96, depth=3, heads=3, unroll=3)
    config.crops.global_crops_scale = (0.2, 1.0)
    config.optim.update(lr=1e-3, warmup="150 steps")


VARIANTS = {"vitb16": lambda config: None, "demo": demo}
