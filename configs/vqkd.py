"""VQ-KD, the tokenizer of BEiT v2 (Peng et al. 2022, arXiv:2208.06366, section 3.2 and appendix).

Variant for ImageNet-1k:

    vitb16   ViT-B/16 with a decoder of 3 blocks, 8192 codes of 32 values, 100 epochs, batch 512

    mim_jax --config=vqkd:vitb16 --config.data.dir=~/tensorflow_datasets --config.target.workdir=runs/dino_vitb16 \
      --workdir=runs/vqkd

Here the teacher is DINO, which the paper tries too: a run of dino:vitb16, or a file of weights of any encoder
(--config.target.weights=FILE). The paper's teacher is CLIP ViT-B/16: --config.target.config=clip:b16
--config.target.weights=ViT-B-16.pt, see configs/clip.py. The variant has not been trained with this code yet. With `--dry_run`
the command prints its plan.

Variant for CIFAR-10 (scores and baselines: docs/results.md):

    demo     the teacher is dino:demo. 1,000 steps: 4 minutes on one CPU core. Codebook perplexity 319 of 512, with a teacher
             of 1,500 steps
"""

import ml_collections

from mim_jax.config import learns_from, on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "vqkd"
    config.total = "100 epochs"
    config.data.batch_size = 512
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # tokenizers take images in 0..1

    learns_from(config, "dino:vitb16")

    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.decoder_depth = 3

    config.quantizer = ml_collections.ConfigDict()
    config.quantizer.codes = 8192
    config.quantizer.dim = 32
    config.quantizer.decay = 0.99
    config.quantizer.beta = 1.0
    config.quantizer.kmeans_init = True

    config.crops.global_crops_scale = (0.08, 1.0)

    config.optim.lr_batch_size = 128
    config.optim.lr = 5e-5
    config.optim.min_lr = 1e-5
    config.optim.beta2 = 0.99
    config.optim.weight_decay = config.optim.weight_decay_end = 1e-4

    config.eval.tokens = "patch"

    VARIANTS[variant](config)
    return config


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "1000 steps", 64
    config.target.update(config="dino:demo", workdir="runs/dino")
    config.model.update(patch_size=4, dim=96, depth=2, heads=3, decoder_depth=1, unroll=2)
    config.quantizer.update(codes=512, dim=16)
    config.crops.global_crops_scale = (0.3, 1.0)
    config.optim.update(lr=1e-3, min_lr=1e-5, warmup="100 steps", lr_batch_size=0)


VARIANTS = {"vitb16": lambda config: None, "demo": demo}
