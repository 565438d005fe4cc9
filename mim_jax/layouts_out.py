"""Encoders, with or without a classifier, as timm and transformers have them: tensors by name, and config.json.

What a library has no place for is refused. `mim_jax.export` writes the files, reads them again and compares.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from mim_jax import convert
from mim_jax.convert import simmim
from mim_jax.methods.base import Params
from mim_jax.models.heads import LinearHead
from mim_jax.models.swin import EPS, Swin
from mim_jax.models.vit import ViT, swiglu_width

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


class Encoded(NamedTuple):
    """What is written. `mean` and `std` have an entry for each channel of the images, in 0..1."""

    net: ViT | Swin
    params: Params
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: LinearHead
    resize: float = 1.0  # side of the central square that is seen, as a share of the short side

    @property
    def flat(self) -> dict[str, Any]:
        return {path: np.asarray(value, np.float32) for path, value in flatten_dict(self.params, sep="/").items()}


# timm

TIMM = {  # our path -> its name; of kernels ".weight", of scales too
    "cls_token": "cls_token",
    "register_tokens": "reg_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj",
    "norm_pre": "norm_pre",
    "norm": "norm",
    "relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "blocks/norm1": "norm1",
    "blocks/norm2": "norm2",
    "blocks/qkv": "attn.qkv",
    "blocks/q_bias": "attn.q_bias",
    "blocks/v_bias": "attn.v_bias",
    "blocks/q_proj": "attn.q_proj",
    "blocks/k_proj": "attn.k_proj",
    "blocks/v_proj": "attn.v_proj",
    "blocks/attn_norm": "attn.norm",
    "blocks/proj": "attn.proj",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
    "blocks/w12": "mlp.fc1",
    "blocks/w1": "mlp.fc1_g",
    "blocks/w2": "mlp.fc1_x",
    "blocks/w3": "mlp.fc2",
    "blocks/ffn_ln": "mlp.norm",
    "blocks/relative_position_bias_table": "attn.relative_position_bias_table",
    "head/norm": "fc_norm",
    "head/linear": "head",
}


def timm(given: Encoded) -> tuple[Arrays, Config]:
    """(tensors, config.json) of timm. Raises ValueError for what it does not have."""
    net, head = given.net, given.head
    if head.linear and head.pool == "cls+mean":
        raise ValueError("the classifier sees CLS and the mean of the patches together: timm has no such head")
    if isinstance(net, Swin):
        arrays = {
            re.sub(r"^layers\.(\d+)(?=\.downsample)", lambda m: f"layers.{int(m[1]) + 1}", name): value
            for name, value in convert_swin(given.params).items()
        }
        arrays |= named({f"linear/{kind}": value for kind, value in head.linear.items()}, {"linear": "head.fc"}, "")
        return arrays, config_of_timm(given, "swin_base_patch4_window7_224", depths=list(net.depths), window_size=net.window)
    flat = parameters_of_timm(given)
    kind = vision_transformer if "blocks/q_bias" not in flat and not net.rotary and not net.rotary_period else eva
    architecture, args = (beit if net.pos.startswith("relative") else kind)(net, head, flat)
    gammas = {f"blocks/gamma_{i}": f"ls{i}.gamma" if "reg_tokens" in args else f"gamma_{i}" for i in (1, 2)}
    args |= {"depth": net.depth, "init_values": 1e-5 if net.layerscale else None}
    args["global_pool"] = "avg" if head.pool == "mean" or not net.cls else "token"
    eps = 1e-5 if net.pre_norm or net.rotary_period else 1e-6
    if net.norm_eps != eps:
        raise ValueError(f"the norms have epsilon {net.norm_eps:g}, timm's {architecture} {eps:g}")
    return named(flat, TIMM | gammas, "blocks.{}."), config_of_timm(given, architecture, **args)


def parameters_of_timm(given: Encoded) -> Params:
    """The parameters by path, in timm's parts."""
    net, flat = given.net, given.flat
    flat.pop("mask_token", None)  # it has none
    if "pos_embed" in flat:
        if net.cls and (net.registers or net.pos == "none"):  # positions without CLS: that of CLS becomes part of the token
            flat["cls_token"] = flat["cls_token"] + flat["pos_embed"][:, :1]
        flat["pos_embed"] = flat["pos_embed"] if net.cls and not net.registers else flat["pos_embed"][:, 1:]
    biases = [f"blocks/{x}_bias" for x in "qv" if f"blocks/{x}_bias" in flat]
    if not any(np.any(flat[path]) for path in biases) and not net.pos.startswith("relative") and not net.rotary:
        flat = {path: value for path, value in flat.items() if path not in biases}
    for kind in ("kernel", "bias") if net.rotary_period and net.ffn != "mlp" else ():
        flat[f"blocks/w1/{kind}"], flat[f"blocks/w2/{kind}"] = np.split(flat.pop(f"blocks/w12/{kind}"), 2, axis=-1)
    return flat | flatten_dict({"head": given.head.params}, sep="/")


def vision_transformer(net: ViT, head: LinearHead, flat: Params) -> tuple[str, Config]:
    """(the name of an architecture of its `VisionTransformer`, arguments that it differs in)"""
    architecture = "vit_giant_patch14_reg4_dinov2" if net.ffn != "mlp" else "vit_small_patch16_224"
    if net.pre_norm:
        architecture = f"vit_base_patch16_clip_{'quickgelu_' * (net.act == 'quick_gelu')}224"
    norms = {"fc_norm": bool(head.norm), "final_norm": net.final_norm or bool(head.norm)}
    tokens = {"reg_tokens": net.registers, "class_token": net.cls, "no_embed_class": net.registers > 0 or not net.cls}
    return architecture, norms | tokens | {"qkv_bias": net.k_bias}


def beit(net: ViT, head: LinearHead, flat: Params) -> tuple[str, Config]:
    """As `vision_transformer`."""
    if not net.final_norm and not head.norm:
        raise ValueError("the encoder has no norm after its blocks and none after a mean: timm's Beit has one of them")
    tables = {"use_rel_pos_bias": net.pos == "relative_each", "use_shared_rel_pos_bias": net.pos == "relative"}
    return "beit_base_patch16_224", tables | {"use_abs_pos_emb": False, "use_fc_norm": bool(head.norm)}


def eva(net: ViT, head: LinearHead, flat: Params) -> tuple[str, Config]:
    """As `vision_transformer`; of DINOv3 and of EVA, with rotary positions or without key biases."""
    gated = net.ffn != "mlp"
    norms = {"use_fc_norm": bool(head.norm), "use_post_transformer_norm": net.final_norm}
    if net.rotary_period:
        return f"vit_small{'_plus' * gated}_patch16_dinov3{'_qkvb' * ('blocks/q_bias' in flat)}", norms
    if not gated:
        return "eva_giant_patch14_224", norms
    inside = {"qkv_fused": not net.subln, "scale_mlp": net.subln, "scale_attn_inner": net.attn_norm}
    return "eva02_base_patch14_224", norms | inside | {"ref_feat_shape": [net.rotary, net.rotary]}


def config_of_timm(given: Encoded, architecture: str, **more: Any) -> Config:
    net, head = given.net, given.head
    hidden: float = net.mlp_ratio
    if isinstance(net, ViT) and net.ffn != "mlp":  # of DINOv2's, timm counts gate and value together
        hidden = hidden_width(net) * (1 if net.rotary or net.rotary_period else 2) / net.dim
    channels, swin = len(given.mean), isinstance(net, Swin)
    args: Config = {"img_size": net.img_size, "patch_size": net.patch_size, "in_chans": channels, "embed_dim": net.dim}
    args |= {"mlp_ratio": ratio(hidden, net.dim), "num_heads": list(net.heads) if isinstance(net, Swin) else net.heads}
    sizes: Config = {"input_size": [channels, net.img_size, net.img_size], "fixed_input_size": True}
    sizes |= {"interpolation": "bicubic", "crop_pct": given.resize, "mean": list(given.mean), "std": list(given.std)}
    names = {"first_conv": "patch_embed.proj", "classifier": "head.fc" if swin else "head"}
    return {
        "architecture": architecture,
        "num_classes": head.classes,
        "num_features": net.dim * 2 ** (len(net.depths) - 1) if isinstance(net, Swin) else net.dim,
        **({"label_names": list(head.labels)} if head.linear and head.labels else {}),
        "model_args": args | more,
        "pretrained_cfg": sizes | names | {"num_classes": head.classes},
    }


# transformers

TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
    "blocks/qkv": "attention.attention",
    "blocks/proj": "attention.output.dense",
    "blocks/relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
}
DINOV2 = TRANSFORMERS | {
    "blocks/norm1": "norm1",
    "blocks/norm2": "norm2",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
    "blocks/w12": "mlp.weights_in",
    "blocks/w3": "mlp.weights_out",
    "blocks/gamma_1": "layer_scale1.lambda1",
    "blocks/gamma_2": "layer_scale2.lambda1",
}
BEIT = TRANSFORMERS | {
    "blocks/norm1": "layernorm_before",
    "blocks/norm2": "layernorm_after",
    "blocks/fc1": "intermediate.dense",
    "blocks/fc2": "output.dense",
    "blocks/gamma_1": "lambda_1",
    "blocks/gamma_2": "lambda_2",
    "head/norm": "pooler.layernorm",
}
DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed": "embeddings.patch_embeddings",
    "norm": "norm",
    "blocks/norm1": "norm1",
    "blocks/norm2": "norm2",
    "blocks/qkv": "attention",
    "blocks/proj": "attention.o_proj",
    "blocks/fc1": "mlp.up_proj",
    "blocks/fc2": "mlp.down_proj",
    "blocks/w1": "mlp.gate_proj",
    "blocks/w2": "mlp.up_proj",
    "blocks/w3": "mlp.down_proj",
    "blocks/gamma_1": "layer_scale1.lambda1",
    "blocks/gamma_2": "layer_scale2.lambda1",
}
CLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks/norm1": "layer_norm1",
    "blocks/norm2": "layer_norm2",
    "blocks/qkv": "self_attn",
    "blocks/proj": "self_attn.out_proj",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
}
SWIN = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.qkv\.", ".attention.self."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.relative", ".attention.self.relative"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
)
QKV = ("query", "key", "value")
QKV_PROJ = ("q_proj", "k_proj", "v_proj")
CLASSES = {  # model_type -> the class without and with a classifier
    "swin": ("SwinModel", "SwinForImageClassification"),
    "beit": ("BeitModel", "BeitForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", ""),
    "clip_vision_model": ("CLIPVisionModel", ""),
}


def transformers(given: Encoded) -> tuple[Arrays, Config]:
    """(tensors, config.json) of transformers. Raises ValueError for what it does not have."""
    net, head = given.net, given.head
    if isinstance(net, Swin):
        arrays, config = swin_of_transformers(given)
    else:
        if not net.cls or net.rotary or net.attn_norm:
            raise ValueError("transformers has no model without CLS, and none of EVA-02")
        make = dinov3 if net.rotary_period else clip if net.pre_norm else dinov2
        if net.pos.startswith("relative") or not net.final_norm:
            make = beit_of_transformers
        arrays, config = make(given, given.flat)
        config |= {"hidden_size": net.dim, "num_hidden_layers": net.depth, "num_attention_heads": net.heads}
        config |= {"layer_norm_eps": net.norm_eps, "attention_dropout": 0.0}
    config |= {"image_size": net.img_size, "patch_size": net.patch_size, "num_channels": len(given.mean)}
    without, with_classifier = CLASSES[config["model_type"]]
    if not head.linear:
        return arrays, config | {"architectures": [without]}
    if not with_classifier:
        raise ValueError(f"transformers' {without} has no such classifier: leave --head away")
    arrays = {f"{config['model_type']}.{name}": value for name, value in arrays.items()}
    kernel = np.asarray(head.linear["kernel"], np.float32)
    if config["model_type"].startswith("dinov2"):  # it has weights for CLS and for the mean
        halves = {"cls": [kernel, 0 * kernel], "mean": [0 * kernel, kernel], "cls+mean": [kernel]}
        kernel = np.concatenate(halves[head.pool])
    elif head.pool != ("cls" if config.get("use_mean_pooling") is False else "mean"):
        raise ValueError(f"the classifier sees {head.pool}: transformers' {with_classifier} sees another feature")
    arrays |= {"classifier.weight": kernel.T, "classifier.bias": np.asarray(head.linear["bias"], np.float32)}
    labels = head.labels or [f"LABEL_{i}" for i in range(head.classes)]
    config |= {"id2label": {str(i): name for i, name in enumerate(labels)}}
    config |= {"label2id": {name: i for i, name in enumerate(labels)}, "problem_type": "single_label_classification"}
    return arrays, config | {"architectures": [with_classifier]}


def swin_of_transformers(given: Encoded) -> tuple[Arrays, Config]:
    net, arrays = given.net, Arrays()
    assert isinstance(net, Swin)
    for name, value in convert_swin(given.params).items():
        for ours, theirs in SWIN:
            name = re.sub(ours, theirs, name)
        arrays |= split(name, value, QKV) if re.search(r"\.self\.(weight|bias)$", name) else {name: value}
    config: Config = {"model_type": "swin", "embed_dim": net.dim, "depths": list(net.depths), "num_heads": list(net.heads)}
    config |= {"window_size": net.window, "mlp_ratio": ratio(net.mlp_ratio, net.dim), "use_absolute_embeddings": False}
    return arrays, config | {"hidden_act": "gelu", "layer_norm_eps": EPS}


def beit_of_transformers(given: Encoded, flat: Params) -> tuple[Arrays, Config]:
    """With relative positions, or with a norm after the mean of the patches instead of one after the blocks."""
    net, head = given.net, given.head
    only(net, "transformers' BEiT", ffn="mlp", act="gelu", registers=0, pre_norm=False, patch_bias=True, rotary_period=0)
    if net.final_norm == bool(head.norm):
        raise ValueError("transformers' BEiT has a norm either after its blocks or after the mean of the patches")
    flat.setdefault("mask_token", np.zeros((1, 1, net.dim), np.float32))
    flat |= {f"head/norm/{kind}": np.asarray(value) for kind, value in head.norm.items()}
    flat["blocks/qkv/bias"] = biases(flat)
    arrays = named(flat, BEIT, "encoder.layer.{}.", QKV)
    # Its keys have no bias. One would add the same to a query's products with all keys, which the softmax does not see.
    arrays = {name: value for name, value in arrays.items() if not name.endswith(".key.bias")}
    absolute = "pos_embed" in flat
    config: Config = {"model_type": "beit", "intermediate_size": hidden_width(net), "use_mean_pooling": bool(head.norm)}
    config |= {"use_mask_token": True, "use_absolute_position_embeddings": absolute, "hidden_act": "gelu"}
    config |= {"use_relative_position_bias": net.pos == "relative_each", "layer_scale_init_value": 0.1 * bool(net.layerscale)}
    config |= {"use_shared_relative_position_bias": net.pos == "relative"} | NO_DROPOUT
    return arrays, config


def dinov2(given: Encoded, flat: Params) -> tuple[Arrays, Config]:
    """Absolute positions and a final norm."""
    net = given.net
    only(net, "transformers' DINOv2", patch_bias=True, act="gelu", subln=False)
    flat["mask_token"] = flat.get("mask_token", np.zeros((1, 1, net.dim), np.float32))[0]
    flat.setdefault("pos_embed", np.zeros((1, 1 + (net.img_size // net.patch_size) ** 2, net.dim), np.float32))
    flat["blocks/qkv/bias"] = biases(flat)
    arrays = named(flat | gammas_of(net, flat), DINOV2, "encoder.layer.{}.", QKV)
    config: Config = {"model_type": "dinov2", "qkv_bias": True, "layerscale_value": 1.0, "hidden_act": "gelu"} | NO_DROPOUT
    if net.registers:
        config |= {"model_type": "dinov2_with_registers", "num_register_tokens": net.registers}
    else:
        config |= {"use_mask_token": True}
    config |= {"use_swiglu_ffn": net.ffn != "mlp", "mlp_ratio": ratio(net.mlp_ratio, net.dim)}
    if net.ffn != "mlp":
        ratios = [n for n in range(1, 9) if swiglu_width(n * net.dim) == hidden_width(net)]
        if not ratios:
            raise ValueError(f"transformers' DINOv2 has no gated MLP of width {hidden_width(net)}")
        config["mlp_ratio"] = ratios[0]
    return arrays, config


def dinov3(given: Encoded, flat: Params) -> tuple[Arrays, Config]:
    net = given.net
    only(net, "transformers' DINOv3", patch_bias=True, act="gelu", subln=False, pre_norm=False, k_bias=False)
    flat.setdefault("mask_token", np.zeros((1, 1, net.dim), np.float32))
    flat.setdefault("register_tokens", np.zeros((1, 0, net.dim), np.float32))
    flat["blocks/qkv/bias"] = biases(flat)
    gated = net.ffn != "mlp"
    for kind in ("kernel", "bias") if gated else ():
        flat[f"blocks/w1/{kind}"], flat[f"blocks/w2/{kind}"] = np.split(flat.pop(f"blocks/w12/{kind}"), 2, axis=-1)
    arrays = named(flat | gammas_of(net, flat), DINOV3, "layer.{}.", QKV_PROJ)
    arrays = {name: value for name, value in arrays.items() if not name.endswith(".k_proj.bias")}
    config: Config = {"model_type": "dinov3_vit", "intermediate_size": hidden_width(net), "use_gated_mlp": gated}
    config |= {"num_register_tokens": net.registers, "rope_theta": net.rotary_period, "hidden_act": "silu" if gated else "gelu"}
    config |= {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
    return arrays, config | {"layerscale_value": 1.0, "drop_path_rate": 0.0}


def clip(given: Encoded, flat: Params) -> tuple[Arrays, Config]:
    net = given.net
    only(net, "transformers' CLIP", patch_bias=False, k_bias=True, registers=0, layerscale=0, ffn="mlp", pos="learned")
    flat.pop("mask_token", None)
    flat["cls_token"], flat["pos_embed"] = flat["cls_token"].reshape(-1), flat["pos_embed"][0]
    config = {"model_type": "clip_vision_model", "intermediate_size": hidden_width(net), "hidden_act": net.act}
    return named(flat, CLIP, "encoder.layers.{}.", QKV_PROJ), config


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}


def only(net: ViT, what: str, **settings: Any) -> None:
    """Raises ValueError if the network has not these settings."""
    if wrong := [f"{name} {getattr(net, name)}" for name, value in settings.items() if getattr(net, name) != value]:
        raise ValueError(f"{what} has not the settings of this encoder: {', '.join(wrong)}")


def biases(flat: Params) -> np.ndarray:
    """Of queries, keys and values, [depth, 3 * D]; takes those out that stand alone."""
    if "blocks/q_bias" not in flat:
        return flat["blocks/qkv/bias"]
    q, v = flat.pop("blocks/q_bias"), flat.pop("blocks/v_bias")
    return np.concatenate([q, 0 * q, v], axis=-1)


def gammas_of(net: ViT, flat: Params) -> Params:
    """LayerScale that changes nothing, where there is none."""
    return {} if net.layerscale else {f"blocks/gamma_{i}": np.ones((net.depth, net.dim), np.float32) for i in (1, 2)}


# Both


def named(flat: Mapping[str, Any], names: Mapping[str, str], blocks: str, qkv: tuple[str, ...] = ()) -> Arrays:
    """Tensors of PyTorch's layout by their names; with three names `qkv`, queries, keys and values have a tensor each. Raises
    ValueError for a parameter that has no name."""
    arrays: Arrays = {}
    for path, value in flat.items():
        at, _, kind = path.rpartition("/")
        key = names.get(path) or names.get(at, "")
        if not key:
            raise ValueError(f"there is no name for the parameter {path} in this layout")
        if path not in names:
            key += {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}[kind]
        value = np.asarray(value, np.float32)
        for i, one in enumerate(value) if path.startswith("blocks/") else ((0, value),):
            one = one if kind != "kernel" else one.T if one.ndim == 2 else one.transpose(3, 2, 0, 1)
            name = (blocks.format(i) if path.startswith("blocks/") else "") + key
            arrays |= split(name, one, qkv) if qkv and at == "blocks/qkv" else {name: one}
    return arrays


def split(name: str, value: np.ndarray, qkv: tuple[str, ...]) -> Arrays:
    """The tensors of queries, keys and values from those of all three."""
    before, _, kind = name.rpartition(".")
    return {f"{before}.{which}.{kind}": part for which, part in zip(qkv, np.split(value, 3))}


def convert_swin(params: Params) -> Arrays:
    """A Swin's tensors by their official names, without a decoder and the mask token of pretraining."""
    flat = {path: np.asarray(value, np.float32) for path, value in flatten_dict(params, sep="/").items()}
    rows = simmim.swin(stages=sum(name.startswith("stage_") for name in params))
    return convert.unfilled(flat, [row for row in rows if row.path != "mask_token"])


def hidden_width(net: ViT) -> int:
    hidden = int(net.dim * net.mlp_ratio)
    return swiglu_width(hidden) if net.ffn == "swiglu" else hidden


def ratio(value: float, dim: int) -> float | int:
    """A ratio that gives the same width again."""
    width = int(dim * value)
    return width // dim if width % dim == 0 else (width + 1e-3) / dim
