"""The vision tower of CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020): a frozen network whose features other methods learn. It cannot be trained here.

    b32, b16     ViT-B/32 and ViT-B/16; features of 512 values
    l14          ViT-L/14; 768 values
    l14_336      ViT-L/14 at 336 px

The weights are those of OpenAI, in the file as it is published or in any other with its names:

    mim_jax --config=eva:b --config.target.config=clip:l14 --config.target.weights=ViT-L-14.pt ...

A file of CLIP with other names (transformers, timm) is read as any encoder is: its features are then not projected.
"""

import ml_collections


def get_config(variant: str = "l14") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict({"network": "clip", "model": {}})
    config.model.img_size = 224
    config.model.patch_size = 16
    config.model.dim = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.mlp_ratio = 4.0
    config.model.out_dim = 512  # of the projection
    config.model.dtype = "bfloat16"
    config.model.unroll = 1

    VARIANTS[variant](config)
    return config


def b32(config):
    config.model.patch_size = 32


def l14(config):
    config.model.update(patch_size=14, dim=1024, depth=24, heads=16, out_dim=768)


def l14_336(config):
    l14(config)
    config.model.img_size = 336


VARIANTS = {"b32": b32, "b16": lambda config: None, "l14": l14, "l14_336": l14_336}
