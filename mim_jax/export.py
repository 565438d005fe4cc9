"""The encoder of a run, or of a file of weights, in the layout of another library.

  python -m mim_jax.export --run=runs/dino --format=timm --out=dino_timm
  python -m mim_jax.export --run=runs/dino --format=transformers --out=dino_hf
  python -m mim_jax.export --run=runs/dino --format=official --out=dino_official
  python -m mim_jax.export --run=runs/dino --format=onnx --out=dino_onnx --size=112
  python -m mim_jax.export --run=runs/dino --format=jax --out=dino_jax

timm: `timm.create_model("local-dir:dino_timm", pretrained=True)`. transformers: `AutoModel.from_pretrained("dino_hf")`; a ViT
with absolute positions becomes a DINOv2 there. official: the names of the method's own repository, with heads.
onnx, jax: a program that computes the features of images of one size, `--size`, by default that of the run; batches are of any.
model.onnx takes "images" [batch, 3, S, S] in 0..1 and gives "cls" [batch, D] and "patch" [batch, N, D]; model.jax, which
`jax.export.deserialize` reads, takes [batch, S, S, 3] and gives a dict of the same.

What is written is read again, and the features of random images are compared with those of the run: the largest difference is
printed.
"""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.errors import ScopeParamShapeError
from flax.traverse_util import flatten_dict

from mim_jax import convert, journal, layouts, weight_files
from mim_jax.convert import simmim
from mim_jax.learned import load_run
from mim_jax.methods.base import Encoder, Params
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT, swiglu_width

PROGRAMS = {"onnx": ("onnx", "'mim_jax[onnx]'"), "jax": ("flatbuffers", "flatbuffers")}  # what each needs; its name for pip
FORMATS = ("timm", "transformers", "official", *PROGRAMS)
Arrays = dict[str, np.ndarray]
Config = dict[str, Any]
EXAMPLE = "python -m mim_jax.export --run=runs/dino --format=timm --out=dino_timm"
TOLERANCE = 1e-4  # of features, relative to the largest

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
}
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
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
}


def timm(net: ViT | Swin, params: Params, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Arrays, Config]:
    """(tensors, config.json) of timm. Raises ValueError for what it does not have."""
    if isinstance(net, Swin):
        arrays = convert_swin(params)
        arrays = {
            re.sub(r"^layers\.(\d+)(?=\.downsample)", lambda m: f"layers.{int(m[1]) + 1}", k): v for k, v in arrays.items()
        }
        own = {"window_size": net.window, "depths": list(net.depths)}
        return arrays, config_of_timm(net, "swin_base_patch4_window7_224", own, mean, std)
    rotary = net.rotary or net.rotary_period
    beit = net.pos.startswith("relative")
    flat = dict(flatten_dict(params, sep="/"))
    flat.pop("mask_token", None)  # it has none
    if not beit and not net.rotary_period:
        if net.cls and (net.registers or net.pos == "none"):  # positions without CLS: that of CLS becomes part of the token
            flat["cls_token"] = flat["cls_token"] + flat["pos_embed"][:, :1]
        flat["pos_embed"] = flat["pos_embed"] if net.cls and not net.registers else flat["pos_embed"][:, 1:]
    unbiased = not net.k_bias and not any(np.any(flat[f"blocks/{x}_bias"]) for x in "qv")
    if unbiased and not beit and not net.rotary:
        flat = {path: value for path, value in flat.items() if not re.search("/[qv]_bias$", path)}
    plain = not beit and not rotary and (net.k_bias or unbiased)
    gammas = {f"blocks/gamma_{i}": f"ls{i}.gamma" if plain else f"gamma_{i}" for i in (1, 2)}
    for kind in ("kernel", "bias") if net.rotary_period and net.ffn != "mlp" else ():
        flat[f"blocks/w1/{kind}"], flat[f"blocks/w2/{kind}"] = np.split(np.asarray(flat.pop(f"blocks/w12/{kind}")), 2, axis=-1)
    arrays = named(flat, TIMM | gammas, "blocks.{}.")
    if not net.final_norm:
        raise ValueError("the encoder has no final norm, as after fine-tuning with mean pooling: this is not written yet")
    more: Config = {"init_values": 1e-5} if net.layerscale else {}
    gated = net.ffn != "mlp"
    if plain:
        architecture = "vit_giant_patch14_reg4_dinov2" if gated else "vit_small_patch16_224"
        if net.pre_norm:
            architecture = f"vit_base_patch16_clip_{'quickgelu_' * (net.act == 'quick_gelu')}224"
        more |= {
            "reg_tokens": net.registers,
            "no_embed_class": net.registers > 0 or not net.cls,
            "init_values": more.get("init_values"),
        }
        more |= {"qkv_bias": net.k_bias, "class_token": net.cls, "global_pool": "token" if net.cls else "avg", "fc_norm": False}
    elif beit:
        architecture = "beit_base_patch16_224"
        more |= {
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": net.pos == "relative_each",
            "init_values": more.get("init_values"),
        }
        more |= {"use_shared_rel_pos_bias": net.pos == "relative", "global_pool": "token"}
    elif net.rotary_period:
        architecture = f"vit_small{'_plus' * gated}_patch16_dinov3{'_qkvb' * ('blocks.0.attn.q_bias' in arrays)}"
    else:
        architecture = "eva02_base_patch14_224" if gated else "eva_giant_patch14_224"
        more |= {"use_fc_norm": False, "global_pool": "token"}
        if gated:
            more |= {"qkv_fused": not net.subln, "scale_mlp": net.subln, "ref_feat_shape": [net.rotary, net.rotary]}
            more |= {"scale_attn_inner": net.attn_norm}
    eps = 1e-5 if net.pre_norm or net.rotary_period else 1e-6
    if net.norm_eps != eps:
        raise ValueError(f"the norms have epsilon {net.norm_eps:g}, timm's {architecture} {eps:g}")
    return arrays, config_of_timm(net, architecture, more, mean, std)


def config_of_timm(net: ViT | Swin, architecture: str, more: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> Config:
    hidden = net.mlp_ratio
    if isinstance(net, ViT) and net.ffn != "mlp":  # of DINOv2's, timm counts gate and value together
        hidden = hidden_width(net) * (1 if net.rotary or net.rotary_period else 2) / net.dim
    args: Config = {
        "img_size": net.img_size,
        "patch_size": net.patch_size,
        "embed_dim": net.dim,
        "mlp_ratio": ratio(hidden, net.dim),
    }
    heads = list(net.heads) if isinstance(net, Swin) else net.heads
    args |= {"num_heads": heads} | ({"depth": net.depth} if isinstance(net, ViT) else {}) | more
    size = [3, net.img_size, net.img_size]
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": net.dim * 2 ** (len(net.depths) - 1) if isinstance(net, Swin) else net.dim,
        "model_args": args,
        "pretrained_cfg": {
            **{"input_size": size, "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 0},
            **{"mean": list(mean), "std": list(std), "first_conv": "patch_embed.proj", "classifier": "head"},
        },
    }


def transformers(net: ViT | Swin, params: Params, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Arrays, Config]:
    """(tensors, config.json) of transformers. Raises ValueError for what it does not have."""
    if isinstance(net, Swin):
        tensors: Arrays = {}
        for name, value in convert_swin(params).items():
            for ours, theirs in SWIN:
                name = re.sub(ours, theirs, name)
            tensors |= split(name, value, "attention.self") if ".qkv." in name else {name: value}
        heads, depths = list(net.heads), list(net.depths)
        config: Config = {
            "model_type": "swin",
            "embed_dim": net.dim,
            "depths": depths,
            "num_heads": heads,
            "window_size": net.window,
        }
        config |= {"mlp_ratio": ratio(net.mlp_ratio, net.dim), "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}
        return tensors, config | {"image_size": net.img_size, "patch_size": net.patch_size, "hidden_act": "gelu"}
    beit = net.pos.startswith("relative")
    if net.rotary or net.rotary_period or net.pre_norm or net.attn_norm or not net.cls or (not beit and not net.k_bias):
        raise ValueError("transformers has no model class for such an encoder that this program writes")
    if beit and net.ffn != "mlp":
        raise ValueError("transformers' BEiT has no gated MLP")
    if not net.final_norm:
        raise ValueError("the encoder has no final norm, as after fine-tuning with mean pooling: this is not written yet")
    flat = dict(flatten_dict(params, sep="/"))
    depth, dim = net.depth, net.dim
    flat.setdefault("mask_token", np.zeros((1, 1, dim), np.float32))
    flat["mask_token"] = flat["mask_token"] if beit else np.asarray(flat["mask_token"])[0]
    for name in ("blocks/gamma_1", "blocks/gamma_2"):
        flat.setdefault(name, np.ones((depth, dim), np.float32))
    arrays: Arrays = {}
    for name, value in named(flat, (BEIT if beit else DINOV2) | QKV, "encoder.layer.{}.").items():
        arrays |= (
            split(name, value, "attention.attention")
            if re.search(r"\.(qkv\.(weight|bias)|[qv]_bias)$", name)
            else {name: value}
        )
    config = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": net.heads, "image_size": net.img_size}
    config |= {"patch_size": net.patch_size, "layer_norm_eps": net.norm_eps, "hidden_act": "gelu", "num_channels": 3}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    if beit:
        config |= {
            "model_type": "beit",
            "intermediate_size": hidden_width(net),
            "use_mean_pooling": False,
            "use_mask_token": True,
        }
        config |= {"use_relative_position_bias": net.pos == "relative_each", "layer_scale_init_value": 0.1}
        config |= {"use_shared_relative_position_bias": net.pos == "relative", "use_absolute_position_embeddings": False}
        return arrays, config
    config |= {"model_type": "dinov2_with_registers" if net.registers else "dinov2", "qkv_bias": True, "layerscale_value": 1.0}
    config |= {"num_register_tokens": net.registers} if net.registers else {"use_mask_token": True}
    config |= {"use_swiglu_ffn": net.ffn != "mlp", "mlp_ratio": ratio(net.mlp_ratio, dim)}
    if net.ffn != "mlp":
        ratios = [n for n in range(1, 9) if swiglu_width(n * dim) == hidden_width(net)]
        if not ratios:
            raise ValueError(f"transformers' DINOv2 has no gated MLP of width {hidden_width(net)}")
        config["mlp_ratio"] = ratios[0]
    return arrays, config


QKV = {"blocks/qkv": "qkv", "blocks/q_bias": "q_bias", "blocks/v_bias": "v_bias"}
SWIN = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.relative", ".attention.self.relative"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
)


def split(name: str, value: np.ndarray, at: str) -> Arrays:
    """The tensors of queries, keys and values from those of all three."""
    before, _, kind = name.rpartition(".")
    if kind.endswith("_bias"):
        return {f"{before}.{at}.{'query' if kind[0] == 'q' else 'value'}.bias": value}
    before = before.rpartition(".")[0]
    return {f"{before}.{at}.{which}.{kind}": part for which, part in zip(("query", "key", "value"), np.split(value, 3))}


def named(flat: Mapping[str, Any], names: Mapping[str, str], blocks: str) -> Arrays:
    """Tensors of PyTorch's layout by their names. Raises ValueError for a parameter that has none."""
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
            arrays[(blocks.format(i) if path.startswith("blocks/") else "") + key] = one
    return arrays


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


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, start = [], 0
    for name, array in sorted(arrays.items()):
        blob = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + len(blob)]}
        start += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    journal.write_whole(path, b"".join([len(text).to_bytes(8, "little"), text, *blobs]))


def program(form: str, encoder: Encoder, parts: Params, size: int) -> tuple[bytes, Config]:
    """(the file, what goes in and comes out) of a program that computes the features of images of `size` x `size` pixels.

    Raises ValueError for a size that the encoder cannot have, and where a library is missing."""
    needed, wheel = PROGRAMS[form]
    if importlib.util.find_spec(needed) is None:
        raise ValueError(f"the format {form} cannot be written without {needed}: pip install {wheel}")
    backbone = {"backbone": parts["backbone"]}

    def features(images: jax.Array) -> dict[str, jax.Array]:
        found = encoder.features(backbone, images)
        return {name: found[name] for name in ("cls", "patch")}

    try:
        shapes = jax.eval_shape(features, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    except ScopeParamShapeError:
        raise ValueError(f"the encoder cannot have images of {size} pixels: its windows would be larger than trained") from None
    channels = ["batch", 3, size, size] if form == "onnx" else ["batch", size, size, 3]
    config: Config = {"images": channels, "range": [0, 1]} | {name: ["batch", *shapes[name].shape[1:]] for name in shapes}
    if form == "onnx":
        from mim_jax import onnx_graph

        return onnx_graph.encoder(encoder, backbone, size).SerializeToString(), config | {"opset": onnx_graph.OPSET}
    (batch,) = jax.export.symbolic_shape("batch")
    export_to = jax.export.export(jax.jit(features), platforms=("cpu", "cuda", "tpu"))
    exported = export_to(jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32))
    return bytes(exported.serialize()), config | {"platforms": list(exported.platforms)}


def run_again(form: str, encoder: Encoder, parts: Params, size: int, file: Path) -> float | None:
    """As `compared`, of what `program` made, for 1 and for 3 images; None where ONNX Runtime is not installed: the graph is
    then checked, but not run."""
    images = np.random.default_rng(0).random((3, size, size, 3), np.float32)
    run: Any = None
    if form == "jax":
        run = jax.export.deserialize(bytearray(file.read_bytes())).call
    else:
        import onnx

        onnx.checker.check_model(str(file), full_check=True)
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            given = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
            return dict(zip(("cls", "patch"), session.run(["cls", "patch"], given)))

    with jax.default_matmul_precision("highest" if form == "onnx" else None):
        ours = jax.jit(encoder.features)({"backbone": parts["backbone"]}, images)
    found = [(ours[name][:count], value) for count in (1, 3) for name, value in run(images[:count]).items()]
    return float(np.max([np.abs(one - other).max() / np.abs(one).max() for one, other in found]))


def compared(encoder: Encoder, parts: Params, folder: Path) -> float:
    """The largest difference of features of images between an encoder and what is in a folder, relative to the largest."""
    again = layouts.read(folder)
    size = encoder.backbone.img_size
    images = jnp.asarray(np.random.default_rng(0).random((4, size, size, 3)), jnp.float32)
    pairs = [(encoder, parts), (again.network, again.parts)]
    one, other = (jax.jit(net.features)({"backbone": p["backbone"]}, images) for net, p in pairs)
    return max(float(jnp.abs(one[name] - other[name]).max() / jnp.abs(one[name]).max()) for name in one)


def card(source: str, config: Config, library: str) -> str:
    """README.md of the folder: what it is, and how it was made."""
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-feature-extraction", "tags: [mim_jax]", "---", ""]
    lines += ["# An encoder pretrained with mim_jax", "", f"From `{source}`.", ""]
    record = Path(source) / "config.json"
    if record.is_file() and (run := json.loads(record.read_text())).get("method"):
        latest = journal.history(Path(source)).latest
        scores = [f"* {tag}: {latest[tag]:.4g}" for tag in sorted(latest) if tag.startswith("eval/")]
        lines += [
            f"Method: {run['method']} (recipe {run.get('recipe', '')}), data: {run['data']['name']}, total: {run['total']}."
        ]
        lines += ["", "Scores on held-out images, with their baselines:", "", *scores, ""]
        begun = run.get("init_from") or run.get("continue_from")
        lines += [f"It began with `{begun}`, whose licence holds for it, too.", ""] if begun else []
    return "\n".join([*lines, "```json", json.dumps(config, indent=1), "```", ""])


def export(source: str, form: str, out: str | Path, size: int | None = None) -> float | None:
    """Writes the folder `out`; returns what `compared` or `run_again` finds. `size`: of the images of a program. Raises
    ValueError if the layout has no place for the encoder."""
    encoder, parts = written(source, form, out, size)
    if form in PROGRAMS:
        size = encoder.backbone.img_size if size is None else size
        return run_again(form, encoder, parts, size, Path(out) / f"model.{form}")
    if form != "official":
        return compared(encoder, parts, Path(out))
    family = family_of(json.loads((Path(source) / "config.json").read_text())["method"])
    again = convert.from_torch(weight_files.read(Path(out) / "model.safetensors"), family)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, dict(parts)))
    return 0.0


def written(source: str, form: str, out: str | Path, size: int | None = None) -> tuple[Encoder, Params]:
    """Writes the folder `out`; returns the encoder, in float32, and its parameters."""
    out, config = Path(out), Config()
    if size is not None and form not in PROGRAMS:
        raise ValueError(f"size is for the formats {' and '.join(PROGRAMS)}")
    if layouts.is_weights(source):
        if form == "official":
            raise ValueError("official names are written for runs, whose method says which")
        weights = layouts.read(source)
        encoder, parts = weights.network, weights.parts
    else:
        run = load_run(source)
        encoder, parts = run.method.network(), run.params
        if not isinstance(encoder, Encoder):
            raise ValueError(f"{source} is a run of {run.config.method}, which has no ViT or Swin")
    net = encoder.backbone.clone(dtype=jnp.float32, remat="none", microbatches=1)
    encoder = dataclasses.replace(encoder, backbone=net)
    if form in PROGRAMS:
        if size is not None and (size < 1 or size % net.patch_size):
            raise ValueError(f"size is {size}, but must be a multiple of the {net.patch_size} pixels of a patch")
        data, config = program(form, encoder, parts, net.img_size if size is None else size)
        out.mkdir(parents=True, exist_ok=True)
        journal.write_whole(out / f"model.{form}", data)
        journal.write_whole(out / "README.md", card(source, config, form).encode())
        return encoder, parts
    if form == "official":
        arrays = convert.to_torch(parts, family_of(run.config.method))
    else:
        write = timm if form == "timm" else transformers
        arrays, config = write(net, parts["backbone"], encoder.mean, encoder.std)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", arrays)
    if config:
        journal.write_whole(out / "config.json", json.dumps(config, indent=2).encode())
    if form == "transformers":
        side = encoder.backbone.img_size
        processor = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"height": side, "width": side}}
        processor |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3}
        processor |= {"do_center_crop": False, "image_mean": list(encoder.mean), "image_std": list(encoder.std)}
        journal.write_whole(out / "preprocessor_config.json", json.dumps(processor, indent=2).encode())
    journal.write_whole(out / "README.md", card(source, config, form if form != "official" else "pytorch").encode())
    return encoder, parts


def family_of(method: str) -> str:
    """The converter of a method's official code."""
    return {"beit2": "beit"}.get(method, method)


def main(argv: list[str]) -> None:
    if {"-h", "-help", "--help"} & set(argv):
        print(__doc__)
        return
    given = flags.FlagValues()  # of its own: the functions above are for other programs, too
    flags.DEFINE_string("run", "", "", flag_values=given)
    flags.DEFINE_enum("format", "", ["", *FORMATS], "", flag_values=given)
    flags.DEFINE_string("out", "", "", flag_values=given)
    flags.DEFINE_integer("size", None, "", flag_values=given)
    try:
        rest = given(argv)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if rest:
        sys.exit(f"error: not understood: {' '.join(rest)}")
    for name in ("run", "format", "out"):
        if not given[name].value:
            sys.exit(f"error: --{name} is missing. For example: {EXAMPLE}")
    try:
        found = export(given.run, given.format, given.out, given.size)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if found is None:
        print(
            f"{given.out}: the graph is valid, but was not run, as onnxruntime is not installed: its features are not compared"
        )
        return
    print(f"{given.out}: read again; features differ by at most {found:.1e} of the largest")
    if not found <= TOLERANCE:
        sys.exit(f"error: this is more than {TOLERANCE:g}: do not use what was written")


if __name__ == "__main__":
    main(sys.argv)
