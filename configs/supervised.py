"""Supervised training: from scratch, or fine-tuning of a run (`--config.init_from`).

    mim_jax --config=supervised:mae_vitb16 --config.init_from=runs/mae --workdir=runs/mae_tuned

With `init_from` the backbone is that of the run, ViT or Swin, of a student or, if there is one, of its teacher; any method but
the tokenizers has one. Its mask token goes. Position tables are resized for another `model.img_size`, sine-cosine positions
become trainable, and each block gets its own copy of a shared table of relative positions. With `model.pool="mean"` the norm
comes after the pooling. The images are normalised as the run did it. A Swin needs model.pool=mean.

From scratch, ImageNet-1k at 224 px:

    vitb16         MAE's supervised ViT-B/16 (table 11 of its paper), 300 epochs, with EMA   82.3
    deitb16        DeiT-B (Touvron et al. 2021), 300 epochs                                   81.8

Fine-tuning on ImageNet-1k at 224 px, with the top-1 accuracy that the authors report (and of what):

    mae_vitb16     100 epochs   83.6  (mae:vitb16)
    mae_vitl16      50 epochs   85.9  (mae:vitl16)
    mae_vith14      50 epochs   86.9  (mae:vith14)
    beit_vitb16    100 epochs   83.7  (beit:vitb16, but pre-trained on ImageNet-22k)
    beit_vitl16     50 epochs   86.0  (beit:vitl16, but pre-trained on ImageNet-22k)
    simmim_vitb16  100 epochs   83.8  (simmim:vitb16)
    simmim_swinb   100 epochs   82.8  (simmim:swinb, 192 px)
    ibot_vits16    200 epochs   82.3  (ibot:vits16)
    ibot_vitb16    100 epochs   84.0  (ibot:vitb16)
    ibot_vitl16     50 epochs   84.8  (ibot:vitl16)

Not as there: DeiT repeats each image three times in a batch, and mixed images are neighbours in the batch, not image i and the
i-th from the end. These have not been trained with this code yet.

For CIFAR-10: `demo`, minutes on 2 CPU cores, from scratch or with `init_from` of the demo of another method.
"""

import ml_collections

from mim_jax.config import on_cifar10, skeleton


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
    config = skeleton()
    config.method = "supervised"
    config.total = "300 epochs"
    config.data.batch_size = 4096
    config.encoder = ml_collections.ConfigDict()  # filled in: the config of the run in init_from
    config.init_parts = ("backbone",)

    # Without init_from. What describes the backbone (all but img_size, drop_path_rate, unroll, dtype) becomes that of the run.
    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.pos = "learned"
    config.model.layerscale = 0.0
    config.model.drop_path_rate = 0.1
    config.model.pool = "mean"  # or "cls"

    config.crops.global_crops_scale = (0.08, 1.0)

    config.augment = ml_collections.ConfigDict()
    config.augment.magnitude = 9.0  # of RandAugment, in 0..10; 0: none
    config.augment.erasing = 0.25  # probability
    config.augment.mixup = 0.8  # parameter of the beta distribution; 0: never
    config.augment.cutmix = 1.0

    config.loss = ml_collections.ConfigDict()
    config.loss.label_smoothing = 0.1

    config.optim.schedule = "mae"
    config.optim.lr = 1e-4
    config.optim.warmup = "20 epochs"
    config.optim.weight_decay = config.optim.weight_decay_end = 0.3
    config.optim.no_decay = ("cls_token", "pos_embed")
    config.optim.beta2 = 0.95
    config.optim.momentum_teacher = 0.9999  # of the moving average that is evaluated; 0: there is none
    config.optim.momentum_teacher_end = 0.9999

    config.mesh.rules += ((r"head/linear/kernel$", (None, "fsdp")),)

    VARIANTS[variant](config)
    return config


def vitb16(config):
    config.augment.erasing = 0.0


def deitb16(config):
    config.data.batch_size = 1024
    config.model.pool = "cls"
    config.optim.update(lr=5e-4, lr_batch_size=512, min_lr=1e-5, warmup="5 epochs", beta2=0.999)
    no_average(config, weight_decay=0.05)


def tuned(config, epochs, warmup, layer_decay, drop_path_rate, **optim):
    """What all recipes of fine-tuning have in common."""
    config.total, config.data.batch_size = f"{epochs} epochs", 1024
    config.model.drop_path_rate = drop_path_rate
    config.optim.update(warmup=f"{warmup} epochs", layer_decay=layer_decay, min_lr=1e-6, beta2=0.999)
    config.optim.update(optim)
    no_average(config, weight_decay=0.05)


def no_average(config, weight_decay):
    config.optim.update(momentum_teacher=0.0, momentum_teacher_end=0.0)
    config.optim.update(weight_decay=weight_decay, weight_decay_end=weight_decay)


def mae_vitb16(config):
    tuned(config, epochs=100, warmup=5, layer_decay=0.65, drop_path_rate=0.1, lr=5e-4)


def mae_vitl16(config):
    config.model.update(dim=1024, depth=24, heads=16)
    tuned(config, epochs=50, warmup=5, layer_decay=0.75, drop_path_rate=0.2, lr=1e-3)


def mae_vith14(config):
    config.model.update(patch_size=14, dim=1280, depth=32, heads=16)
    tuned(config, epochs=50, warmup=5, layer_decay=0.75, drop_path_rate=0.3, lr=1e-3)


def beit_vitb16(config):
    config.model.update(pos="relative", layerscale=0.1)
    tuned(config, 100, 20, layer_decay=0.65, drop_path_rate=0.1, lr=4e-3, lr_batch_size=0, schedule="dino")


def beit_vitl16(config):
    config.model.update(dim=1024, depth=24, heads=16, pos="relative", layerscale=1e-5)
    tuned(config, 50, 5, layer_decay=0.75, drop_path_rate=0.2, lr=1e-3, lr_batch_size=0, schedule="dino")


def simmim_vitb16(config):
    config.model.update(pos="relative", layerscale=0.1)
    tuned(config, 100, 20, layer_decay=0.65, drop_path_rate=0.1, lr=1.25e-3, lr_batch_size=512, schedule="timm_cosine")
    config.optim.update(warmup_lr=2.5e-7, min_lr=2.5e-7, clip_grad=5.0)
    config.data.batch_size = 2048


def simmim_swinb(config):
    simmim_vitb16(config)
    config.model.img_size = 192
    config.optim.layer_decay = 0.9


def ibot_vits16(config):
    config.model.update(dim=384, heads=6)
    as_ibot(config, epochs=200, layer_decay=0.75, drop_path_rate=0.1)


def ibot_vitb16(config):
    as_ibot(config, epochs=100, layer_decay=0.65, drop_path_rate=0.2)


def ibot_vitl16(config):
    config.model.update(dim=1024, depth=24, heads=16)
    as_ibot(config, epochs=50, layer_decay=0.75, drop_path_rate=0.4)


def as_ibot(config, **settings):
    """BEiT's recipe with CLS. Its authors chose the learning rate for each model."""
    config.model.pool = "cls"
    tuned(config, warmup=20, lr=4e-3, lr_batch_size=0, schedule="dino", **settings)


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "3000 steps", 64
    config.model.update(patch_size=4, dim=96, depth=4, heads=3, drop_path_rate=0.0, unroll=4)
    config.crops.global_crops_scale = (0.3, 1.0)
    config.optim.update(lr=4e-3, warmup="300 steps", beta2=0.999)
    config.augment.update(magnitude=0.0, erasing=0.0, mixup=0.2, cutmix=0.0)
    no_average(config, weight_decay=0.05)
    config.eval.every = "1000 steps"
    config.checkpoint.every = "1000 steps"


VARIANTS = {"vitb16": vitb16, "deitb16": deitb16, "mae_vitb16": mae_vitb16, "mae_vitl16": mae_vitl16, "mae_vith14": mae_vith14}
VARIANTS |= {
    "beit_vitb16": beit_vitb16,
    "beit_vitl16": beit_vitl16,
    "simmim_vitb16": simmim_vitb16,
    "simmim_swinb": simmim_swinb,
}
VARIANTS |= {"ibot_vits16": ibot_vits16, "ibot_vitb16": ibot_vitb16, "ibot_vitl16": ibot_vitl16, "demo": demo}
