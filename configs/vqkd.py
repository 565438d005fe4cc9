"""VQ-KD, the tokenizer of BEiT v2 (Peng et al. 2022, arXiv:2208.06366, section 3.2 and appendix).

Variants:

    vitb16   ViT-B/16 with a decoder of 3 blocks, 8192 codes of 32 values, 100 epochs, batch 512

    python -m mim_jax.main --config=configs/vqkd.py:vitb16 --config.data.dir=/data/tensorflow_datasets \
      --config.target.workdir=runs/vits16 --workdir=runs/vqkd

The paper's teacher is CLIP, which is not here yet; this is a run of configs/dino.py, or official weights of DINO
(--config.target.weights=file.npz --config.target.family=dino), which the paper tries too. Not trained with this code yet;
`--dry_run` prints its plan. One more:

    demo     CIFAR-10; the teacher is configs/dino.py:demo. 1,000 steps: perplexity 319 of 512, k-NN 0.325 (untrained 0.259),
             probe 0.420 (0.368), 2026-11-26, jax 0.10.2 (its teacher had 1,500 steps)
"""

import ml_collections

from mim_jax.config import learns_from, on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "vqkd"
    config.total = "100 epochs"
    config.data.batch_size = 512
    config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # images in 0..1, as tokenizers take them

    learns_from(config, "configs/dino.py:vitb16", family="dino")

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
    config.target.update(config="configs/dino.py:demo", workdir="runs/dino")
    config.model.update(patch_size=4, dim=96, depth=2, heads=3, decoder_depth=1, unroll=2)
    config.quantizer.update(codes=512, dim=16)
    config.crops.global_crops_scale = (0.3, 1.0)
    config.optim.update(lr=1e-3, min_lr=1e-5, warmup="100 steps", lr_batch_size=0)


VARIANTS = {"vitb16": lambda config: None, "demo": demo}
