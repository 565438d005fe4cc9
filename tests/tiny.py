"""The demo of a method, shrunk until a run takes seconds: `--config=tests/tiny.py:mae`. Its data is the folder `data.dir`."""

import ml_collections

from mim_jax import load_config

VIT = {"model.patch_size": 8, "model.dim": 16, "model.depth": 2, "model.heads": 2}
DINO = VIT | {
    "head.out_dim": 32,
    "head.hidden_dim": 16,
    "head.bottleneck_dim": 8,
    "crops.global_crops_size": 16,
    "crops.local_crops_number": 1,
    "crops.local_crops_size": 8,
    "model.drop_path_rate": 0.1,
    "optim.freeze_last_layer": "1 step",
}
BEIT = VIT | {
    "target.workdir": None,
    "model.patch_size": 4,
    "model.drop_path_rate": 0.1,
    "head.vocab_size": 16,
    "crops.target_size": 16,
    "mask.count": 6,
    "mask.smallest": 2,
}
DINOV2 = DINO | {
    "model.patch_size": 4,
    "model.registers": 2,
    "model.ffn": "swiglu",
    "ibot_head.out_dim": 16,
    "ibot_head.hidden_dim": 16,
    "ibot_head.bottleneck_dim": 8,
    "loss.separate_head": True,
    "loss.centering": "sinkhorn_knopp",
    "mask.group_size": 4,
    "model.drop_path_rate": 0.3,
}
# What of a demo is to be smaller.
SMALLER = {
    "dino": DINO,
    "ibot": DINO | {"model.patch_size": 4, "mask.start": "0 steps", "mask.ratios": ((0.0, 0.0), (0.4, 0.1))},
    "dinov2": DINOV2,
    "distillation": DINOV2
    | {"target.config": f"{__file__}:dinov2", "target.workdir": None, "model.dim": 8, "model.drop_path_rate": 0.0},
    "mae": VIT | {"model.patch_size": 4, "decoder.dim": 16, "decoder.depth": 2, "decoder.heads": 2},
    "simmim": VIT | {"model.patch_size": 4, "model.drop_path_rate": 0.1, "model.pos": "relative", "model.layerscale": 0.1},
    "vqvae": {"model.hidden": 8, "quantizer.codes": 16, "quantizer.dim": 4},
    "dvae": {"model.hidden": 8, "model.codes": 16, "model.codebook_dim": 8},
    "beit": BEIT | {"target.config": f"{__file__}:vqvae"},
    "vqkd": VIT
    | {
        "target.config": f"{__file__}:dino",
        "target.workdir": None,
        "model.patch_size": 4,
        "quantizer.codes": 16,
        "quantizer.dim": 4,
    },
    "eva": VIT
    | {
        "target.config": f"{__file__}:dino",
        "target.workdir": None,
        "model.patch_size": 4,
        "model.drop_path_rate": 0.1,
        "mask.count": 6,
        "mask.smallest": 2,
    },
    "beit2": BEIT | {"target.config": f"{__file__}:vqkd", "model.early_layers": 1},
    "mocov3": VIT | {"head.hidden_dim": 16, "head.out_dim": 8, "model.drop_path_rate": 0.1},
    "masked_patch": VIT | {"model.patch_size": 4, "model.drop_path_rate": 0.1},
    "supervised": VIT
    | {
        "model.patch_size": 4,
        "model.drop_path_rate": 0.1,
        "augment.magnitude": 9.0,
        "augment.erasing": 0.25,
        "augment.cutmix": 1.0,
        "optim.momentum_teacher": 0.9,
        "optim.momentum_teacher_end": 0.9,
    },
    "linear": VIT | {"model.patch_size": 4, "probe.blocks": (1, 2), "probe.rates": (0.5, 1.0), "optim.name": "adamw"},
    "simmim_swin": {"model.dim": 8, "model.depths": (2, 2), "model.heads": (2, 4), "model.drop_path_rate": 0.1},
}
DEMOS = {"simmim_swin": "simmim:demo_swin"}  # of variants that are not named after their method


def get_config(variant: str = "dino") -> ml_collections.ConfigDict:
    config = load_config(DEMOS.get(variant, f"{variant}:demo")).unlock()
    config.total = "6 steps"
    config.data.update(name="folder", dir="", eval_split="train", batch_size=8, canvas=16)
    config.model.img_size = 16
    if "unroll" in config.model:
        config.model.unroll = 1
    config.optim.warmup = "2 steps"
    config.eval.update(every="3 steps", bank=24, test=8, batch_size=8)
    config.checkpoint.update(every="2 steps", keep=2)
    config.log_every = "1 step"
    config.update_from_flattened_dict(SMALLER[variant])
    return config
