"""Distillation from a larger DINOv2 (Oquab et al. 2024, arXiv:2304.07193, section 5 and table 16).

Variants and what the official repository reports of its distilled models on ImageNet-1k (k-NN / linear top-1), whose teacher
is ViT-g/14:

    vits14   ViT-S/14, 625,000 steps, batch 2048   79.0 / 81.1
    vitb14   ViT-B/14                              82.1 / 84.5
    vitl14   ViT-L/14                              83.5 / 86.3

    python -m mim_jax.main --config=configs/distillation.py:vits14 --config.data.dir=/data/tensorflow_datasets \
      --config.target.workdir=runs/vitg14 --workdir=runs/vits14

Heads are a part of the teacher, and the official ones are not published: it is a run of configs/dinov2.py. None of these has
been trained with this code yet; `--dry_run` prints their plan. One more:

    demo     CIFAR-10; the teacher is configs/dinov2.py:demo, the student has half its width and two blocks: k-NN 0.378 (the
             teacher 0.376, untrained 0.248, pixels 0.346), probe 0.407 (0.404, 0.273), view retrieval 0.176 (0.162, 0.027,
             pixels 0.125), 2026-11-26, jax 0.10.2, 1,080 images/s on two cores
"""

import ml_collections

from mim_jax.config import learns_from, load_config


def get_config(variant: str = "vits14") -> ml_collections.ConfigDict:
    config = load_config("dinov2:demo" if variant == "demo" else "dinov2:vitg14").unlock()
    config.method = "distillation"

    learns_from(config, "dinov2:vitg14", family="dinov2")

    config.data.batch_size = 2048
    config.mask.group_size = 16  # images among which KoLeo looks for neighbours
    config.model.drop_path_rate = 0.0
    config.optim.update(lr=1e-3, lr_batch_size=0)  # the rate is absolute
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
    config.data.batch_size = config.mask.group_size = 64
    config.model.update(dim=48, depth=2, heads=3, unroll=2, init_std=0.14)
    config.optim.lr = 2e-3


VARIANTS = {"vits14": vits14, "vitb14": vitb14, "vitl14": vitl14, "demo": demo}
