"""The discrete VAE of DALL-E (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", arXiv:2102.12092).

Variants for ImageNet-1k:

    dalle   the tokenizer of BEiT: 8192 codes, tokens of 8 x 8 pixels, 256 px, batch 512 (appendix A.2; 64 V100). The paper
            trains on to 3,000,000 steps at the last learning rate
    beit    the small dVAE in BEiT's code: squared error, tokens of 8 x 8 pixels, 112 px

    mim_jax --config=dvae:dalle --config.data.dir=~/tensorflow_datasets --workdir=runs/dvae_dalle

configs/beit.py shows how to use DALL-E's published weights instead. These have not been trained with this code yet. With
`--dry_run` the command prints their plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo    the small dVAE, 8 x 8 tokens of 256 codes. 1,500 steps: 12 minutes on one CPU core. Codebook perplexity 181, 98 %
            of the codes in use
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "dalle") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "dvae"
    config.total = "1_200_000 steps"
    config.data.batch_size = 512
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # tokenizers take images in 0..1

    del config.model.mlp_ratio, config.model.drop_path_rate, config.model.unroll, config.model.remat, config.model.microbatches
    config.model.arch = "dalle"  # or "beit"
    config.model.img_size = 256
    config.model.hidden = 256
    config.model.codes = 8192
    config.model.codebook_dim = 128  # width of the decoder's first layer

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 1 / 16  # final value; a cosine from 1
    config.loss.temperature_decay = "150_000 steps"
    config.loss.kl_weight = 6.6 / 192  # final value; a cosine from 0. A token stands for 192 values
    config.loss.kl_warmup = "5000 steps"

    config.crops.global_crops_scale = (0.35, 1.0)

    config.optim.lr_batch_size = 0  # lr is not scaled with the batch
    config.optim.lr = 1e-4
    config.optim.min_lr = 1.25e-6
    config.optim.warmup = "0 steps"
    config.optim.weight_decay = config.optim.weight_decay_end = 1e-4
    config.optim.momentum_teacher = 0.999  # of the EMA of the weights

    config.mesh.rules = ()
    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def beit(config):
    config.model.update(arch="beit", img_size=112, codebook_dim=512)
    config.model.layers = 3  # each halves the resolution


def demo(config):
    on_cifar10(config)
    beit(config)
    config.total, config.data.batch_size = "1500 steps", 64
    config.model.update(img_size=32, hidden=32, layers=2, codes=256, codebook_dim=64)
    config.loss.update(temperature=0.25, temperature_decay="1200 steps", kl_weight=2e-2, kl_warmup="500 steps")
    config.optim.update(lr=1e-3, min_lr=1e-5, warmup="50 steps", momentum_teacher=0.99)


VARIANTS = {"dalle": lambda config: None, "beit": beit, "demo": demo}
