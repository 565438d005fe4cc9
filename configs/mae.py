"""MAE (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377).

Variants for ImageNet-1k, with the fine-tuned / linear top-1 accuracy that the paper and the official repository report
(table 3, FINETUNE.md): 1600 epochs at 224 px, batch 4096, 75 % of the patches masked, normalized pixels as targets.

    vitb16   ViT-B/16   83.6 / 68.0
    vitl16   ViT-L/16   85.9 / 75.8   31 hours on 128 TPU-v3
    vith14   ViT-H/14   86.9 / 76.6

    mim_jax --config=mae:vitl16 --config.data.dir=~/tensorflow_datasets --workdir=runs/mae_vitl16

The authors report a loss of about 0.3 for raw pixels, loss.norm_pix_loss=False (issue 16 of their repository). These have not
been trained with this code yet. With `--dry_run` the command prints their plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo     ViT of 2 blocks, patches of 8 pixels, 14,000 steps: 283 s on 2 CPU cores. The loss falls from 0.92 (step 100) to
             0.63. k-NN 0.456, 0.449, 0.422 with seeds 0, 1, 2
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "mae"
    config.total = "1600 epochs"
    config.data.batch_size = 4096

    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12

    config.decoder = ml_collections.ConfigDict()
    config.decoder.dim = 512
    config.decoder.depth = 8
    config.decoder.heads = 16

    config.crops.global_crops_scale = (0.2, 1.0)

    config.mask = ml_collections.ConfigDict()
    config.mask.ratio = 0.75

    config.loss = ml_collections.ConfigDict()
    config.loss.norm_pix_loss = True

    config.optim.schedule = "mae"
    config.optim.lr = 1.5e-4
    config.optim.warmup = "40 epochs"
    config.optim.beta2 = 0.95

    config.eval.tokens = "patch"
    config.eval.standardize = True  # MAE's linear probe has a batch norm without affine parameters before it

    VARIANTS[variant](config)
    return config


def vitl16(config):
    config.model.update(dim=1024, depth=24, heads=16)


def vith14(config):
    config.model.update(patch_size=14, dim=1280, depth=32, heads=16)


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "14_000 steps", 64
    config.model.update(patch_size=8, dim=192, depth=2, heads=6, unroll=2)  # dim: the values of a patch
    config.decoder.update(dim=64, depth=1, heads=2)
    config.optim.update(lr=4e-3, warmup="300 steps", weight_decay=0.5, weight_decay_end=0.5)
    # Training crops are enlarged parts of the image. Evaluation enlarges whole images to 48 pixels, so that objects have a
    # similar size.
    config.eval.update(img_size=48, every="3500 steps")
    config.checkpoint.every = "3500 steps"
    config.log_every = "100 steps"


VARIANTS = {"vitb16": lambda config: None, "vitl16": vitl16, "vith14": vith14, "demo": demo}
