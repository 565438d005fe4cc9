"""Distillation of a smaller student from a DINOv2 teacher (Oquab et al. 2024, arXiv:2304.07193, section 5 and table 16).

Variants, with the k-NN / linear top-1 accuracy on ImageNet-1k that the official repository reports for its distilled models,
whose teacher is ViT-g/14:

    vits14   ViT-S/14, 625,000 steps, batch 2048   79.0 / 81.1
    vitb14   ViT-B/14                              82.1 / 84.5
    vitl14   ViT-L/14                              83.5 / 86.3

    mim_jax --config=distillation:vits14 --config.data.dir=~/tensorflow_datasets \
      --config.target.workdir=runs/vitg14 --workdir=runs/vits14

The teacher is a run of dinov2:vitg14, because its heads are needed and the official ones are not published. These have not
been trained with this code yet. With `--dry_run` the command prints their plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo     the teacher is dinov2:demo, the student has half its width and two blocks. k-NN 0.378
"""

import ml_collections

from mim_jax.config import learns_from, load_config


def get_config(variant: str = "vits14") -> ml_collections.ConfigDict:
    config = load_config("dinov2:demo" if variant == "demo" else "dinov2:vitg14").unlock()
    config.method = "distillation"

    learns_from(config, "dinov2:vitg14")

    config.data.batch_size = 2048
    config.mask.group_size = 8  # images per group, for KoLeo and stochastic depth
    config.model.drop_path_rate = 0.0
    config.optim.update(lr=1e-3, lr_batch_size=0)  # 0: lr is not scaled with the batch
    del config.mask.probability, config.mask.ratio, config.mask.exact

    VARIANTS[variant](config)
    return config


def vits14(config):
    config.model.update(dim=384, depth=12, heads=6, ffn="mlp")


def vitb14(config):
    config.model.update(dim=768, depth=12, heads=12, ffn="mlp")


def vitl14(config):
    config.model.update(dim=1024, depth=24, heads=16, ffn="mlp")


def demo(config):
    config.target.update(config="dinov2:demo", workdir="runs/dinov2")
    config.data.batch_size = 64
    config.model.update(dim=48, depth=2, heads=3, unroll=2, init_std=0.14)
    config.optim.lr = 2e-3


VARIANTS = {"vits14": vits14, "vitb14": vitb14, "vitl14": vitl14, "demo": demo}
