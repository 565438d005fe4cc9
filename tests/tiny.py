"""The demo of DINO, shrunk until a run takes seconds: `--config=tests/tiny.py`. Its data is the folder `data.dir`."""

from pathlib import Path

import ml_collections

from mim_jax import load_config


def get_config() -> ml_collections.ConfigDict:
    config = load_config(f"{Path(__file__).parent.parent}/configs/dino.py:demo").unlock()
    config.total_steps = 6
    config.data.update(name="folder", dir="", eval_split="train", batch_size=8, canvas=16)
    config.model.update(img_size=16, patch_size=8, dim=16, depth=2, heads=2, unroll=1, drop_path_rate=0.1)
    config.head.update(out_dim=32, hidden_dim=16, bottleneck_dim=8)
    config.crops.update(global_crops_size=16, local_crops_number=1, local_crops_size=8)
    config.optim.update(warmup_steps=2, freeze_last_layer_steps=1)
    config.eval.update(every_steps=3, bank=24, test=8, batch_size=8)
    config.checkpoint.update(every_steps=2, keep=2)
    config.log_every_steps = 1
    return config
