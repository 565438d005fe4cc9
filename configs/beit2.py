"""BEiT v2 (Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv:2208.06366).

Variants for ImageNet-1k, with the fine-tuned / linear top-1 accuracy that the paper reports: 1600 epochs at 224 px, batch
2048, 75 of 196 patches masked, tokens of VQ-KD whose teacher is CLIP ViT-B/16.

    vitb16   ViT-B/16   85.5 / 80.1
    vitl16   ViT-L/16   87.3

    mim_jax --config=beit2:vitb16 --config.data.dir=~/tensorflow_datasets --config.target.workdir=runs/vqkd \
      --workdir=runs/beit2_vitb16

The tokenizer is a run of vqkd:vitb16. These have not been trained with this code yet. With `--dry_run` the command prints
their plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo     tokens of vqkd:demo, 1,500 steps: 10 minutes on one CPU core. k-NN 0.338
"""

import ml_collections

from mim_jax.config import load_config


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = load_config(f"beit:{variant}").unlock()
    config.method = "beit2"
    config.total = "1600 epochs"
    config.target.update(config="vqkd:vitb16")
    config.model.early_layers = 9  # the second prediction uses the patch tokens after this block
    config.model.head_layers = 2  # blocks of the second prediction
    config.crops.update(global_crops_scale=(0.2, 1.0), target_size=224, target_interpolation="bicubic")
    config.mask.exact = True

    VARIANTS[variant](config)
    return config


def vitl16(config):
    config.model.early_layers = 21


def demo(config):
    config.total = "1500 steps"
    config.target.update(config="vqkd:demo", workdir="runs/vqkd")
    config.model.early_layers = 3
    config.crops.target_size = 32


VARIANTS = {"vitb16": lambda config: None, "vitl16": vitl16, "demo": demo}
