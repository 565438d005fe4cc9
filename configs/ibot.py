"""iBOT (Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832).

Variants and what the paper and the official repository report on ImageNet-1k (k-NN / linear top-1):

    vits16   ViT-S/16, 800 epochs, batch 1024, 2 x 224 + 10 x 96 px   75.2 / 77.9
    vitb16   ViT-B/16, 400 epochs                                     77.1 / 79.5
    vitl16   ViT-L/16, 250 epochs                                     78.0 / 81.0

    python -m mim_jax.main --config=configs/ibot.py:vits16 --config.data.dir=/data/tensorflow_datasets --workdir=runs/ibot

None of these three has been trained with this code yet; `--dry_run` prints their plan. Two more are on CIFAR-10:

    demo     the network and steps of configs/dino.py:demo: k-NN 0.391 (untrained 0.291, pixels 0.346), probe 0.421 (0.318),
             view retrieval 0.168 (0.030, pixels 0.125), 2026-11-26, jax 0.10.2, 430 images/s on one core
    cifar10  width 128, 18 epochs, an hour on one core: k-NN 0.484 (whitened pixels 0.426, untrained 0.289; bank of 5,000,
             10,000 test images), probe 0.512 (whitened 0.369), view retrieval 0.298 (pixels 0.094), 2026-11-26, jax 0.10.2
"""

from pathlib import Path

import ml_collections

from mim_jax.config import load_config


def get_config(variant: str = "vits16") -> ml_collections.ConfigDict:
    config = load_config(f"{Path(__file__).parent}/dino.py:{BASES.get(variant, variant)}").unlock()
    config.method = "ibot"
    config.head.out_dim = 8192
    config.head.patch_out_dim = 0  # prototypes of the patches; 0: those of CLS

    config.mask = ml_collections.ConfigDict()
    config.mask.shape = "block"  # or "random"
    config.mask.start = "0 steps"  # no patch is masked before
    config.mask.ratios = ((0.0, 0.0), (0.3, 0.2))  # one is chosen: (mean, half-width) of the share that is masked

    config.loss.warmup_teacher_patch_temp = 0.04
    config.loss.teacher_patch_temp = 0.07
    config.loss.patch_center_momentum = 0.9
    config.loss.cls_weight = 1.0
    config.loss.patch_weight = 1.0
    config.loss.per_image = True  # mean over a crop's masked patches, as in the official code; False: sum, as in the paper
    config.loss.shared_head_teacher = True  # the teacher's patches see CLS's prototypes, whatever the student's do

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
    # Patches of an untrained teacher are mere colors: they wait until CLS has learned something, and weigh less.
    config.mask.start = "1500 steps"
    config.head.update(out_dim=1024, patch_out_dim=512)
    config.loss.update(teacher_patch_temp=0.04, shared_head_teacher=False, patch_weight=0.3)


def cifar10(config):
    demo(config)
    config.total = "18 epochs"
    config.mask.start = "6 epochs"


BASES = {"vitl16": "vitb16"}
VARIANTS = {"vits16": lambda config: None, "vitb16": vitb16, "vitl16": vitl16, "cifar10": cifar10, "demo": demo}
