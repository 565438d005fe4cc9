"""EVA (Fang et al. 2023, "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale", arXiv:2211.07636) and
EVA-02 (Fang et al. 2023, "EVA-02: A Visual Representation for Neon Genesis", arXiv:2303.11331).

Variants at 224 px, with the fine-tuned top-1 accuracy on ImageNet-1k and the pixels of that fine-tuning as the official
repository reports them: at most 105 of 256 patches masked, features of a CLIP as the targets.

    g14   EVA-01, ViT-g/14 of 1.0 B parameters, batch 4096, 150 epochs of 30 M images                      89.6 (336)
    ti    EVA-02, ViT-Ti/14, batch 4000, 240 epochs of ImageNet-21k                                        80.7 (336)
    s     EVA-02, ViT-S/14, the same                                                                       85.8 (336)
    b     EVA-02, ViT-B/14 with sub-LN, batch 2048, 150 epochs of ImageNet-21k                             88.3 (448)
    l     EVA-02, ViT-L/14 with sub-LN, the same                                                           89.6 (448)

The figure of g14 is of a model that was also trained on the labels of ImageNet-21k. The other figures are of masked images
alone.

    mim_jax --config=eva:b --config.data.dir=~/tensorflow_datasets --config.target.weights=ViT-L-14.pt --workdir=runs/eva_b

ViT-L-14.pt is OpenAI's file. The target is CLIP ViT-L/14, as in EVA-01. That of EVA-02 was EVA-CLIP g/14, which is not here
yet. Any other network that makes features can be the target: --config.target.config=dino:vitb16
--config.target.workdir=runs/dino_vitb16. `total` counts epochs of the data set that is named by data.name. These variants
have not been trained with this code yet. With `--dry_run` the command prints their plan.

Variant for CIFAR-10, whose scores have not been measured yet:

    demo  EVA-02 with sub-LN, targets from dino:demo, 1,500 steps
"""

import ml_collections

from mim_jax.config import learns_from, on_cifar10, skeleton


def get_config(variant: str = "b") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "eva"
    config.total = "150 epochs"
    config.data.batch_size = 2048
    config.data.mean = (0.48145466, 0.4578275, 0.40821073)  # of CLIP
    config.data.std = (0.26862954, 0.26130258, 0.27577711)

    learns_from(config, "clip:l14")

    config.model.arch = "eva02"  # or "eva01"
    config.model.patch_size = 14
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.mlp_ratio = 4 * 2 / 3
    config.model.subln = True  # EVA-02: sub-LN, and a matrix each for queries, keys and values
    config.model.patch_grad = 0.1  # a factor of the gradient of the patch embedding
    config.model.init_std = 0.02  # of normal distributions truncated at one standard deviation

    config.crops.global_crops_scale = (0.2, 1.0)

    config.mask = ml_collections.ConfigDict()
    config.mask.count = 105  # masked patches, at most
    config.mask.smallest = 16  # patches in a block, at least

    config.optim.lr_batch_size = 0  # lr is not scaled with the batch
    config.optim.lr = 1.5e-3
    config.optim.min_lr = 1e-5
    config.optim.warmup = "1 epoch"
    config.optim.beta2 = 0.98
    config.optim.eps = 1e-6
    config.optim.clip_grad = 3.0
    config.optim.no_decay = ("cls_token", "pos_embed")

    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def g14(config):
    config.data.batch_size = 4096
    config.model.update(arch="eva01", dim=1408, depth=40, heads=16, mlp_ratio=6144 / 1408, drop_path_rate=0.1)
    config.model.update(subln=False, patch_grad=1.0, init_std=0.015)
    config.optim.update(lr=1e-3, warmup="2 epochs")


def ti(config):
    config.total, config.data.batch_size = "240 epochs", 4000
    config.model.update(dim=192, heads=3, subln=False)
    config.optim.lr = 3e-3


def s(config):
    ti(config)
    config.model.update(dim=384, heads=6)


def l(config):  # noqa: E743
    config.model.update(dim=1024, depth=24, heads=16, drop_path_rate=0.1)


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "1500 steps", 64
    config.target.update(config="dino:demo", workdir="runs/dino")
    config.model.update(patch_size=4, dim=96, depth=4, heads=3, unroll=4)
    config.mask.update(count=26, smallest=4)
    config.optim.update(lr=1e-3, warmup="150 steps")


VARIANTS = {"g14": g14, "ti": ti, "s": s, "b": lambda config: None, "l": l, "demo": demo}
