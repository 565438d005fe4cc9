"""DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294).

Variants and what the paper and the official repository report on ImageNet-1k (k-NN / linear top-1):

    vits16   ViT-S/16, 800 epochs, batch 1024, 2 x 224 + 10 x 96 px   74.5 / 77.0   16 V100, 180 hours (table 8)
    vits8    ViT-S/8                                                  78.3 / 79.7
    vitb16   ViT-B/16, 400 epochs                                     76.1 / 78.2
    vitb8    ViT-B/8, 300 epochs                                      77.4 / 80.1

    python -m mim_jax.main --config=configs/dino.py:vits16 --config.data.dir=/data/tensorflow_datasets --workdir=runs/vits16

None of these four has been trained with this code yet; `--dry_run` prints their plan. Two more are on CIFAR-10:

    demo     a ViT of 3 blocks, 8 1/2 minutes on 2 CPU cores from nothing: k-NN 0.369 (pixels 0.346, whitened
             0.435, untrained 0.275), view retrieval 0.168 (0.125, -, 0.024), 2026-11-23, jax 0.10.2
    cifar10  a ViT of 6 blocks, patches of 4 pixels, 200 epochs. Not trained yet: hours on a CPU, for a GPU to measure
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(variant: str = "vits16") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.method = "dino"
    config.seed = 0
    # A duration may be given as *_steps, *_examples or *_epochs; the first that is set wins.
    config.total_steps = placeholder(int)
    config.total_examples = placeholder(int)
    config.total_epochs = 800.0

    config.data = ml_collections.ConfigDict()
    config.data.name = "imagenet2012"  # "cifar10", "folder", or any data set that TFDS has prepared
    config.data.dir = placeholder(str)  # TFDS directory, or the folder
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.data.num_examples = 1_281_167  # main.py puts in what the source really has
    config.data.batch_size = 1024  # global
    config.data.canvas = 320  # images are decoded to fit a square of this size, in pixels
    config.data.workers = 8  # decoding processes on each host
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.model = ml_collections.ConfigDict()
    config.model.img_size = 224
    config.model.patch_size = 16
    config.model.dim = 384
    config.model.depth = 12
    config.model.heads = 6
    config.model.mlp_ratio = 4.0
    config.model.drop_path_rate = 0.1
    config.model.init_std = 0.02  # of linear layers; the paper's widths are 384 and more
    config.model.dtype = "bfloat16"
    config.model.unroll = 1  # blocks a loop iteration holds: larger compiles longer

    config.head = ml_collections.ConfigDict()
    config.head.out_dim = 65536
    config.head.hidden_dim = 2048
    config.head.bottleneck_dim = 256
    config.head.nlayers = 3
    config.head.use_bn = False
    config.head.norm_last_layer = False

    config.crops = ml_collections.ConfigDict()
    config.crops.global_crops_number = 2
    config.crops.global_crops_size = 224
    config.crops.global_crops_scale = (0.25, 1.0)
    config.crops.local_crops_number = 10
    config.crops.local_crops_size = 96
    config.crops.local_crops_scale = (0.05, 0.25)
    config.crops.blur_radius = (0.1, 2.0)  # range, in pixels of the crop

    config.loss = ml_collections.ConfigDict()
    config.loss.student_temp = 0.1
    config.loss.warmup_teacher_temp = 0.04
    config.loss.teacher_temp = 0.07
    config.loss.warmup_teacher_temp_epochs = 30
    config.loss.center_momentum = 0.9

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 5e-4  # for a batch of 256; scaled linearly with data.batch_size
    config.optim.min_lr = 1e-6
    config.optim.warmup_epochs = 10.0
    config.optim.warmup_steps = placeholder(int)
    config.optim.weight_decay = 0.04
    config.optim.weight_decay_end = 0.4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip_grad = 3.0  # L2 norm of each parameter tensor; 0: never
    config.optim.freeze_last_layer_epochs = 1.0
    config.optim.freeze_last_layer_steps = placeholder(int)
    config.optim.momentum_teacher = 0.996

    config.eval = ml_collections.ConfigDict()
    config.eval.every_steps = placeholder(int)
    config.eval.every_epochs = 10.0
    config.eval.bank = 50_000  # images of the training split that vote
    config.eval.test = 10_000
    config.eval.batch_size = 256
    config.eval.resize = 0.875  # side of the central square, as a share of the image's short side
    config.eval.tokens = "cls"  # or "patch": the mean of the patch tokens

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = placeholder(int)
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep = 2

    config.log_every_steps = 50
    config.max_skipped = 20  # stop after so many steps in a row whose loss or gradient is not finite

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.rules = (  # the first regex found in an array's path says which of its axes are cut, and how
        (r"blocks/.*/kernel$", (None, None, "fsdp")),
        (r"patch_embed/kernel$", (None, None, None, "fsdp")),
        (r"head/mlp_\d/kernel$", (None, "fsdp")),
        (r"last_layer/weight_[gv]$", (None, "fsdp")),
    )

    config.init_from = placeholder(str)  # a run's workdir: start from its parameters
    config.resume = placeholder(str)  # a run's workdir: continue it here

    VARIANTS[variant](config)
    return config


def vits8(config):
    config.model.patch_size = 8


def vitb16(config):
    config.model.update(dim=768, depth=12, heads=12)
    config.head.norm_last_layer = True
    config.total_epochs = 400.0


def vitb8(config):
    vitb16(config)
    config.model.patch_size = 8
    config.total_epochs = 300.0


def demo(config):
    config.total_steps = 3500
    config.data.update(name="cifar10", eval_split="test", num_examples=50_000, batch_size=64, canvas=32, workers=0)
    config.model.update(img_size=32, patch_size=8, dim=96, depth=3, heads=3, drop_path_rate=0.0, dtype="float32", unroll=3)
    config.model.init_std = 0.1  # about 1 / sqrt(dim): with 0.02 so narrow a network learns more slowly
    config.head.update(out_dim=1024, hidden_dim=256, bottleneck_dim=64, norm_last_layer=True)
    small_crops(config)
    config.crops.local_crops_number = 2
    config.loss.update(warmup_teacher_temp_epochs=0, teacher_temp=0.04)
    config.optim.update(lr=8e-3, min_lr=2e-5, warmup_steps=100, weight_decay_end=0.04)
    config.optim.update(freeze_last_layer_steps=50, momentum_teacher=0.98)
    config.eval.update(every_steps=500, bank=5000, test=2000, resize=1.0)
    config.checkpoint.every_steps = 500
    config.log_every_steps = 25


def cifar10(config):
    demo(config)
    config.total_steps, config.total_epochs = placeholder(int), 200.0
    config.data.batch_size = 256
    config.model.update(patch_size=4, dim=192, depth=6, heads=6, drop_path_rate=0.1, init_std=0.07, unroll=1)
    config.head.update(out_dim=4096, hidden_dim=1024, bottleneck_dim=128)
    config.crops.local_crops_number = 4
    config.optim.update(lr=5e-4, min_lr=1e-6, warmup_epochs=10.0, warmup_steps=None, weight_decay_end=0.4)
    config.optim.update(freeze_last_layer_epochs=1.0, freeze_last_layer_steps=None, momentum_teacher=0.99)
    config.eval.update(every_epochs=5.0, every_steps=None, bank=50_000, test=10_000)
    config.checkpoint.update(every_epochs=1.0, every_steps=None)


def small_crops(config):
    """Crops of 32 and 16 pixels, of larger shares of the image; the blur is the paper's, scaled down with them."""
    config.crops.update(global_crops_size=32, global_crops_scale=(0.5, 1.0))
    config.crops.update(local_crops_size=16, local_crops_scale=(0.2, 0.6), blur_radius=(0.0, 0.3))


VARIANTS = {"vits16": lambda config: None, "vits8": vits8, "vitb16": vitb16, "vitb8": vitb8, "cifar10": cifar10, "demo": demo}
