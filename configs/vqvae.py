"""VQ-VAE (van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv:1711.00937).

Variant for ImageNet-1k:

    imagenet128   128 px, 32 x 32 tokens of 512 codes (sections 4.1 and 4.2), 250,000 steps, batch 128. The codebook is an
                  exponential moving average

    mim_jax --config=vqvae:imagenet128 --config.data.dir=~/tensorflow_datasets --workdir=runs/vqvae_imagenet128

It has not been trained with this code yet. With `--dry_run` the command prints its plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo          8 x 8 tokens of 512 codes: the tokenizer of beit:demo. 1,500 steps: 4 minutes on one CPU core. Mean squared
                  error 0.0028 (pixels in 0..1), codebook perplexity 465 of 512
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "imagenet128") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "vqvae"
    config.total = "250_000 steps"
    config.data.batch_size = 128
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # tokenizers take images in 0..1

    del config.model.mlp_ratio, config.model.drop_path_rate, config.model.unroll, config.model.remat, config.model.microbatches
    config.model.img_size = 128
    config.model.hidden = 256
    config.model.layers = 2  # each halves the resolution
    config.model.blocks = 2

    config.quantizer = ml_collections.ConfigDict()
    config.quantizer.codes = 512
    config.quantizer.dim = 64
    config.quantizer.decay = 0.99
    config.quantizer.commitment = 0.25
    config.quantizer.threshold = 0.0  # codes with a lower average count are replaced by vectors of the batch

    config.crops.global_crops_scale = (0.35, 1.0)

    config.optim.lr_batch_size = 0  # lr is not scaled with the batch
    config.optim.lr = config.optim.min_lr = 2e-4
    config.optim.warmup = "0 steps"
    config.optim.weight_decay = config.optim.weight_decay_end = 0.0

    config.mesh.rules = ()
    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "1500 steps", 64
    config.model.hidden = 64
    config.quantizer.update(dim=16, threshold=0.5)
    config.optim.update(lr=2e-3, min_lr=1e-5, warmup="50 steps")


VARIANTS = {"imagenet128": lambda config: None, "demo": demo}
