"""SimMIM (Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv:2111.09886).

Variants for ImageNet-1k, with the fine-tuned top-1 accuracy that the official repository reports: batch 2048, 60 % of the
squares of 32 x 32 pixels masked.

    vitb16   ViT-B/16, 800 epochs, 224 px              83.8
    swinb    Swin-B, 100 epochs, 192 px, window 6      82.8 (fine-tuned at 192 px), 83.5 (at 224)
    swinl    Swin-L, 800 epochs, 192 px, window 12     85.4

    mim_jax --config=simmim:swinb --config.data.dir=~/tensorflow_datasets --workdir=runs/simmim_swinb

These have not been trained with this code yet. With `--dry_run` the command prints their plan.

Variants for CIFAR-10 (scores and baselines of both: docs/results.md):

    demo       ViT of 3 blocks, patches of 8 pixels, absolute positions, 4,500 steps: 319 s on 2 CPU cores. The loss falls
               from 0.77 (step 25) to 0.5. k-NN 0.395, 0.396, 0.391 with seeds 0, 1, 2
    demo_swin  Swin, patches of 4 pixels, 4,500 steps: 7.5 minutes on one CPU core. k-NN 0.327, below pixels (0.346)
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "simmim"
    config.total = "800 epochs"
    config.data.batch_size = 2048

    config.model.arch = "vit"  # or "swin"
    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.drop_path_rate = 0.1
    config.model.pos = "relative"  # or absolute positions: "learned", "sincos"
    config.model.layerscale = 0.1
    config.model.init_std = 0.02  # of a normal distribution truncated at one standard deviation

    config.crops.global_crops_scale = (0.67, 1.0)

    config.mask = ml_collections.ConfigDict()
    config.mask.ratio = 0.6
    config.mask.mask_patch_size = 32  # side of a masked square, in pixels

    config.loss = ml_collections.ConfigDict()
    config.loss.norm_target_window = 0  # odd: side of the window in which targets are normalized (later recipes: 47); 0: off

    config.optim.schedule = "timm_multistep"
    config.optim.lr_batch_size = 512
    config.optim.lr = 1e-4
    config.optim.warmup_lr = 5e-7
    config.optim.decay_at = ("700 epochs",)
    config.optim.decay_rate = 0.1
    config.optim.clip_grad = 5.0
    config.optim.no_decay = ("cls_token", "pos_embed")

    config.eval.tokens = "patch"
    config.eval.standardize = True

    VARIANTS[variant](config)
    return config


def swinb(config):
    config.total = "100 epochs"
    as_swin(config, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=6)
    config.model.update(img_size=192, drop_path_rate=0.0)
    config.optim.update(schedule="timm_cosine", lr=2e-4, min_lr=1e-5)


def swinl(config):
    swinb(config)
    config.total = "800 epochs"
    config.model.update(dim=192, heads=(6, 12, 24, 48), window=12)
    config.optim.update(schedule="timm_multistep", lr=1e-4)


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "4500 steps", 64
    # dim: the values of a patch. With larger initial weights and no LayerScale this small network learns faster.
    config.model.update(patch_size=8, dim=192, depth=3, heads=6, drop_path_rate=0.0, unroll=3, init_std=0.12, layerscale=0.0)
    config.model.pos = "sincos"  # absolute, so that the mean of the patch tokens keeps spatial information
    config.mask.mask_patch_size = 8
    config.loss.norm_target_window = 31  # nearly the whole image: its mean color and contrast are removed from the targets
    config.optim.update(schedule="mae", lr_batch_size=256, lr=4e-3, warmup="150 steps")
    config.optim.weight_decay = config.optim.weight_decay_end = 0.5
    config.crops.global_crops_scale = (0.2, 1.0)
    config.eval.update(img_size=64, every="1500 steps")  # enlarged like the crops
    config.checkpoint.every = "1500 steps"


def demo_swin(config):
    demo(config)
    as_swin(config, dim=48, depths=(2, 2, 2), heads=(3, 6, 12), window=2)
    config.mask.mask_patch_size = 4  # smaller than the last stage's patches, so that each of them sees some visible pixels
    config.loss.norm_target_window = 0
    config.eval.img_size = 32


def as_swin(config, **model):
    del config.model.depth, config.model.heads, config.model.pos, config.model.layerscale, config.model.init_std
    config.model.update(arch="swin", patch_size=4, **model)
    config.optim.no_decay = ("mask_token",)


VARIANTS = {
    "vitb16": lambda config: None, "swinb": swinb, "swinl": swinl, "demo": demo, "demo_swin": demo_swin
}  # fmt: skip
