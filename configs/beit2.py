"""BEiT v2 (Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv:2208.06366).

Variants and what the paper reports on ImageNet-1k after 1600 epochs at 224 px, batch 2048, 75 of 196 patches masked, tokens
of VQ-KD with CLIP ViT-B/16 for its teacher (fine-tuned / linear top-1):

    vitb16   ViT-B/16   85.5 / 80.1
    vitl16   ViT-L/16   87.3

    python -m mim_jax.main --config=configs/beit2.py:vitb16 --config.data.dir=/data/tensorflow_datasets \
      --config.target.workdir=runs/vqkd --workdir=runs/beit2

with a tokenizer of configs/vqkd.py. Neither has been trained with this code yet; `--dry_run` prints their plan. One more:

    demo     CIFAR-10, tokens of configs/vqkd.py:demo. 1,500 steps, 10 minutes on one core: 19.2 % of the masked tokens are
             right (the most frequent one is 2.3 %), k-NN 0.338 (untrained 0.263), probe 0.419 (0.366), 2026-11-26, jax 0.10.2
"""

from pathlib import Path

import ml_collections

from mim_jax.config import load_config


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = load_config(f"{Path(__file__).parent}/beit.py:{variant}").unlock()
    config.method = "beit2"
    config.total = "1600 epochs"
    config.target.update(config="configs/vqkd.py:vitb16", family=None)
    config.model.early_layers = 9  # blocks after which the patches of the second prediction are taken
    config.model.head_layers = 2
    config.crops.update(global_crops_scale=(0.2, 1.0), target_size=224, target_interpolation="bicubic")
    config.mask.exact = True

    VARIANTS[variant](config)
    return config


def vitl16(config):
    config.model.early_layers = 21


def demo(config):
    config.total = "1500 steps"
    config.target.update(config="configs/vqkd.py:demo", workdir="runs/vqkd")
    config.model.early_layers = 3
    config.crops.target_size = 32


VARIANTS = {"vitb16": lambda config: None, "vitl16": vitl16, "demo": demo}
