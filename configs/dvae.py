"""The discrete VAE of DALL-E (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", arXiv:2102.12092).

Variants:

    dalle   8192 tokens of 8 pixels, 256 px, batch 512 (appendix A.2; 64 V100): BEiT's tokenizer. The paper goes on to
            3,000,000 steps at the last learning rate
    beit    the small one of BEiT's code: squared error, tokens of 8 pixels, 112 px

    python -m mim_jax.main --config=configs/dvae.py:dalle --config.data.dir=/data/tensorflow_datasets --workdir=runs/dvae

The published weights need no training (configs/beit.py tells how to use them). Neither has been trained with this code yet;
`--dry_run` prints their plan. One more:

    demo    CIFAR-10, the small one, 8 x 8 tokens of 256. 1,500 steps, 12 minutes on one core: perplexity 181, all but 2 % of
            the codes in use, 2026-11-26, jax 0.10.2. With a twentieth of its KL weight 16 codes were in use after 400 steps
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "dalle") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "dvae"
    config.total = "1_200_000 steps"
    config.data.batch_size = 512
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # images in 0..1, as tokenizers take them

    del config.model.mlp_ratio, config.model.drop_path_rate, config.model.unroll
    config.model.arch = "dalle"  # or "beit"
    config.model.img_size = 256
    config.model.hidden = 256
    config.model.codes = 8192
    config.model.codebook_dim = 128  # width of the decoder's first layer

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 1 / 16  # from 1, by a cosine
    config.loss.temperature_decay = "150_000 steps"
    config.loss.kl_weight = 6.6 / 192  # from 0, by a cosine; 192 values for each token
    config.loss.kl_warmup = "5000 steps"

    config.crops.global_crops_scale = (0.35, 1.0)

    config.optim.lr_batch_size = 0  # the rate is absolute
    config.optim.lr = 1e-4
    config.optim.min_lr = 1.25e-6
    config.optim.warmup = "0 steps"
    config.optim.weight_decay = config.optim.weight_decay_end = 1e-4
    config.optim.momentum_teacher = 0.999  # of the average of the weights

    config.mesh.rules = ()
    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def beit(config):
    config.model.update(arch="beit", img_size=112, codebook_dim=512)
    config.model.layers = 3  # each halves the side


def demo(config):
    on_cifar10(config)
    beit(config)
    config.total, config.data.batch_size = "1500 steps", 64
    config.model.update(img_size=32, hidden=32, layers=2, codes=256, codebook_dim=64)
    config.loss.update(temperature=0.25, temperature_decay="1200 steps", kl_weight=2e-2, kl_warmup="500 steps")
    config.optim.update(lr=1e-3, min_lr=1e-5, warmup="50 steps", momentum_teacher=0.99)


VARIANTS = {"dalle": lambda config: None, "beit": beit, "demo": demo}
