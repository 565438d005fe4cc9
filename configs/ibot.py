"""iBOT (Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832).

Variants for ImageNet-1k, with the k-NN / linear top-1 accuracy that the paper and the official repository report:

    vits16   ViT-S/16, 800 epochs, batch 1024, 2 x 224 + 10 x 96 px   75.2 / 77.9
    vitb16   ViT-B/16, 400 epochs                                     77.1 / 79.5
    vitl16   ViT-L/16, 250 epochs                                     78.0 / 81.0

    mim_jax --config=ibot:vits16 --config.data.dir=~/tensorflow_datasets --workdir=runs/ibot_vits16

These have not been trained with this code yet. With `--dry_run` the command prints their plan.

Variants for CIFAR-10 (scores and baselines of both: docs/results.md):

    demo     network and steps of dino:demo. k-NN 0.391
    cifar10  the same with width 128, 18 epochs: an hour on one CPU core. k-NN 0.484
"""

import ml_collections

from mim_jax.config import load_config


def get_config(variant: str = "vits16") -> ml_collections.ConfigDict:
    config = load_config(f"dino:{BASES.get(variant, variant)}").unlock()
    config.method = "ibot"
    config.head.out_dim = 8192
    config.head.patch_out_dim = 0  # number of patch prototypes; 0: CLS and patches share the prototypes

    config.mask = ml_collections.ConfigDict()
    config.mask.shape = "block"  # or "random"
    config.mask.start = "0 steps"  # until then no patch is masked
    config.mask.ratios = ((0.0, 0.0), (0.3, 0.2))  # masked share: one (mean, half-width) is drawn per crop

    config.loss.warmup_teacher_patch_temp = 0.04
    config.loss.teacher_patch_temp = 0.07
    config.loss.patch_center_momentum = 0.9
    config.loss.cls_weight = 1.0
    config.loss.patch_weight = 1.0
    config.loss.per_image = True  # mean over the masked patches of a crop (official code); False: sum (paper)
    config.loss.shared_head_teacher = True  # one set of prototypes in the teacher, even if the student has two

    VARIANTS[variant](config)
    return config


def vitb16(config):
    config.head.norm_last_layer = False


def vitl16(config):
    vitb16(config)
    config.total = "250 epochs"
    config.model.update(dim=1024, depth=24, heads=16)
    config.crops.global_crops_scale = (0.32, 1.0)
    config.crops.local_crops_scale = (0.05, 0.32)


def demo(config):
    # The patch features of an untrained teacher encode little but color. So masking starts after CLS has learned something,
    # and the patch loss has a smaller weight.
    config.mask.start = "1500 steps"
    config.head.update(out_dim=1024, patch_out_dim=512)
    config.loss.update(teacher_patch_temp=0.04, shared_head_teacher=False, patch_weight=0.3)


def cifar10(config):
    demo(config)
    config.total = "18 epochs"
    config.mask.start = "6 epochs"


BASES = {"vitl16": "vitb16"}
VARIANTS = {"vits16": lambda config: None, "vitb16": vitb16, "vitl16": vitl16, "cifar10": cifar10, "demo": demo}
