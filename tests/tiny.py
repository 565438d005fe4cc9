"""The demo of a method, shrunk until a run takes seconds: `--config=tests/tiny.py:mae`. Its data is the folder `data.dir`."""

from pathlib import Path

import ml_collections

from mim_jax import load_config

# What of a method's own keys is to be smaller, too.
OWN = {
    "dino": {
        "head.out_dim": 32,
        "head.hidden_dim": 16,
        "head.bottleneck_dim": 8,
        "crops.global_crops_size": 16,
        "crops.local_crops_number": 1,
        "crops.local_crops_size": 8,
        "model.drop_path_rate": 0.1,
        "optim.freeze_last_layer_steps": 1,
    },
    "mae": {"model.patch_size": 4, "decoder.dim": 16, "decoder.depth": 2, "decoder.heads": 2},
}


def get_config(variant: str = "dino") -> ml_collections.ConfigDict:
    config = load_config(f"{Path(__file__).parent.parent}/configs/{variant}.py:demo").unlock()
    config.total_steps = 6
    config.data.update(name="folder", dir="", eval_split="train", batch_size=8, canvas=16)
    config.model.update(img_size=16, patch_size=8, dim=16, depth=2, heads=2, unroll=1)
    config.optim.warmup_steps = 2
    config.eval.update(every_steps=3, bank=24, test=8, batch_size=8)
    config.checkpoint.update(every_steps=2, keep=2)
    config.log_every_steps = 1
    config.update_from_flattened_dict(OWN[variant])
    return config
