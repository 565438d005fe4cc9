"""DINOv2 (Oquab et al. 2024, "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193).

Variants, with the k-NN / linear top-1 accuracy on ImageNet-1k that the official repository reports:

    vitl16      ViT-L/16, ImageNet-1k, 125,000 steps, batch 2048: the short recipe   81.6 / 82.9   a day on 32 A100
    vitl14      ViT-L/14 with SwiGLU, ImageNet-22k, 625,000 steps, batch 3072        82.0 / 84.5   3.3 days on 96 A100
    vitl14_518  last phase of vitl14 (appendix B.2): 10,000 steps at 518 px with compressed schedules. It starts from a run
                of vitl14: --config.init_from=runs/vitl14. The paper only says that the learning rate is lower; here it is
                a tenth
    vitg14      ViT-g/14, batch 3072. The paper trains it on LVD-142M, which is not public   83.5 / 86.5
    vits16, vitb16   the short recipe for smaller networks; no published accuracy

    mim_jax --config=dinov2:vitl16 --config.data.dir=~/tensorflow_datasets --workdir=runs/dinov2_vitl16

These have not been trained with this code yet. With `--dry_run` the command prints their plan. Blur follows the official
code, not the paper: the code passes the probability of blurring to an argument that is the probability of not blurring.

Variants for CIFAR-10 (scores and baselines of both: docs/results.md):

    demo        network and steps of dino:demo. k-NN 0.376
    cifar10     the same with width 128, 18 epochs: 49 minutes on one CPU core. k-NN 0.514
"""

import ml_collections

from mim_jax.config import hours_on_cifar10, load_config, on_cifar10


def get_config(variant: str = "vitl16") -> ml_collections.ConfigDict:
    config = load_config("dino:vits16").unlock()
    config.method = "dinov2"
    config.total = "125_000 steps"
    config.data.batch_size = 2048

    config.model.update(dim=1024, depth=24, heads=16)
    config.model.drop_path_rate = 0.3  # the same for all blocks
    config.model.layerscale = 1e-5
    config.model.ffn = "mlp"  # or "swiglu"
    config.model.registers = 0
    config.model.antialias = False  # of interpolated positions; True for the official models with registers

    del config.head.use_bn, config.head.norm_last_layer
    config.ibot_head = ml_collections.ConfigDict(config.head)

    config.crops.update(global_crops_scale=(0.32, 1.0), local_crops_number=8, local_crops_scale=(0.05, 0.32))

    config.mask = ml_collections.ConfigDict()
    # Images per group, for masks and stochastic depth. In the official code it is the batch of a GPU, here 64; 8 are what each
    # of 256 devices has.
    config.mask.group_size = 8
    config.mask.probability = 0.5
    config.mask.ratio = (0.1, 0.5)
    config.mask.exact = False  # True: the same number of masked patches in every group, reached by adding single patches

    config.loss.centering = "centering"  # or "sinkhorn_knopp"
    config.loss.separate_head = False  # True: patches have their own head, ibot_head
    config.loss.teacher_temp_warmup = "37_500 steps"  # 30 "epochs" of the official code, 1250 steps each
    config.loss.dino_weight = 1.0
    config.loss.ibot_weight = 1.0
    config.loss.koleo_weight = 0.1
    config.loss.koleo_groups = 8  # groups among which KoLeo looks for neighbours, all together: the official 64 images

    config.optim.update(lr=4e-3, lr_batch_size=1024, warmup="12_500 steps", momentum_teacher=0.992)
    config.optim.lr_batch_power = 0.5  # square root scaling of the learning rate
    config.optim.update(clip_per="part", layer_decay=0.9, patch_embed_lr=0.2)
    config.optim.update(freeze_last_layer="1250 steps", freeze_last_layer_by="lr")

    VARIANTS[variant](config)
    return config


def vits16(config):
    config.model.update(dim=384, depth=12, heads=6)


def vitb16(config):
    config.model.update(dim=768, depth=12, heads=12)


def vitl14(config):
    config.total = "625_000 steps"
    config.data.batch_size = 3072
    config.model.update(patch_size=14, ffn="swiglu", drop_path_rate=0.4)
    config.head.update(out_dim=131072, bottleneck_dim=384)
    config.ibot_head.update(out_dim=131072)
    config.crops.local_crops_size = 98
    config.mask.group_size = 12  # of 32 in the official code
    config.loss.update(centering="sinkhorn_knopp", separate_head=True, koleo_groups=2)
    config.optim.update(lr=2e-4, warmup="100_000 steps", weight_decay_end=0.2, layer_decay=1.0, momentum_teacher=0.994)


def vitl14_518(config):
    vitl14(config)
    config.total = "10_000 steps"
    config.data.canvas = 640
    config.model.img_size = config.crops.global_crops_size = 518
    config.loss.teacher_temp_warmup = "600 steps"  # vitl14's duration x 10,000 / 625,000, as the two below
    config.optim.update(lr=2e-5, warmup="1600 steps", freeze_last_layer="20 steps")


def vitg14(config):
    vitl14(config)
    config.model.update(dim=1536, depth=40, heads=24)
    config.loss.koleo_groups = 1


def demo(config):
    on_cifar10(config)
    config.total, config.data.batch_size = "3500 steps", 64
    config.model.update(patch_size=8, dim=96, depth=3, heads=3, drop_path_rate=0.0, layerscale=1.0, unroll=3, init_std=0.1)
    config.head.update(out_dim=1024, hidden_dim=256, bottleneck_dim=64)
    config.ibot_head.update(config.head)
    config.crops.update(global_crops_size=32, global_crops_scale=(0.5, 1.0), local_crops_number=2)
    config.crops.update(local_crops_size=16, local_crops_scale=(0.2, 0.6), blur_radius=(0.0, 0.3))
    config.loss.update(teacher_temp_warmup="0 steps", teacher_temp=0.04)
    config.loss.update(separate_head=True, ibot_weight=0.3, koleo_weight=0.05, koleo_groups=1)
    config.optim.update(lr=8e-3, lr_batch_size=256, lr_batch_power=1.0, min_lr=2e-5, warmup="100 steps", weight_decay_end=0.04)
    config.optim.update(layer_decay=1.0, patch_embed_lr=1.0, freeze_last_layer="50 steps", momentum_teacher=0.98)


def cifar10(config):
    demo(config)
    hours_on_cifar10(config, total="18 epochs")


VARIANTS = {"vitl16": lambda config: None, "vits16": vits16, "vitb16": vitb16, "vitl14": vitl14}
VARIANTS |= {"vitl14_518": vitl14_518, "vitg14": vitg14, "cifar10": cifar10, "demo": demo}
