"""Vision encoders in the layouts that people have: of official repositories, timm, transformers, OpenAI's CLIP and open_clip.

    weights = mim_jax.layouts.read("dinov2_vits14_pretrain.pth")
    out = weights.network.features(weights.parts, images)  # images [B, H, W, 3] in 0..1; other channels: see `Told`
    weights.save("runs/dinov2")  # `read` reads it again, and so do init_from and target.weights

A file may hold several models and much else. An encoder is found by the name of its patch embedding. Its tensors are renamed
to one set of names, from which the settings of our ViT or Swin follow. What no tensor shows (the number of heads, epsilon, the
activation, how positions are resized) is taken from `config.json` beside the file, or from what is known of the family, and is
said; otherwise it is asked for.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import convert, journal, weight_files
from mim_jax.convert import simmim
from mim_jax.methods.base import Encoder, Params
from mim_jax.methods.imported import backbone
from mim_jax.models.clip import MEAN, STD
from mim_jax.models.heads import LinearHead
from mim_jax.models.swin import EPS

Arrays = Mapping[str, np.ndarray]
Renames = tuple[tuple[str, str], ...]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = MEAN, STD
HALF = ((0.5,) * 3,) * 2


class Layout(NamedTuple):
    """The names of a library: regexes in the order in which they are applied, and what it does where files do not say."""

    name: str
    embedding: str  # the name of the patch embedding's weight, by which the layout is recognised
    renames: Renames


BLOCKS = (r"^((encoder|model)\.)?(layers?|transformer\.resblocks)\.(\d+)\.", r"blocks.\4.")
TRANSFORMERS: Renames = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed."),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", ""),
    (r"^(layernorm|norm)\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    BLOCKS,
    (r"\.attention\.(attention|self)\.(q|k|v)(uery|ey|alue)\.", r".\2."),
    (r"\.attention\.(q|k|v)_proj\.", r".\1."),
    (r"(\.attention)*(\.relative_position_bias)?\.(?=relative_position_bias_table$)", "."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".proj."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(lambda_|layer_scale)(\d)(\.lambda1)?$", r".gamma_\2"),
    (r"\.mlp\.weights_in\.", ".w12."),
    (r"\.mlp\.weights_out\.", ".w3."),
    (r"\.mlp\.gate_proj\.", ".w1."),
    (r"\.mlp\.", "."),
)
CLIP_TRANSFORMERS: Renames = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    BLOCKS,
    (r"\.self_attn\.(q|k|v)_proj\.", r".\1."),
    (r"\.self_attn\.out_proj\.", ".proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.", "."),
)
OPENAI: Renames = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    BLOCKS,
    (r"\.attn\.in_proj_", ".qkv."),
    (r"\.attn\.out_proj\.", ".proj."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.mlp\.c_fc\.", ".fc1."),
    (r"\.mlp\.c_proj\.", ".fc2."),
)
TIMM: Renames = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"^masked_embed$", "mask_token"),
    (r"^rel_pos_bias\.", ""),
    (r"\bblocks\.\d+\.(?=\d+\.)", "blocks."),  # of chunks
    (r"\.attn\.(q|k|v)_proj\.", r".\1."),
    (r"\.attn\.(norm|inner_attn_ln)\.", ".attn_norm."),
    (r"\.attn\.", "."),
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.mlp\.fc1_g\.", ".w1."),
    (r"\.mlp\.fc1_x\.", ".w2."),
    (r"\.mlp\.norm\.", ".ffn_ln."),
    (r"\.mlp\.", "."),
)
LAYOUTS = (
    Layout("transformers", "embeddings.patch_embeddings.projection.weight", TRANSFORMERS),
    Layout("transformers", "embeddings.patch_embeddings.weight", TRANSFORMERS),
    Layout("transformers", "embeddings.patch_embedding.weight", CLIP_TRANSFORMERS),
    Layout("OpenAI", "conv1.weight", OPENAI),
    Layout("official or timm", "patch_embed.proj.weight", TIMM),
)
SWIN_TRANSFORMERS: Renames = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^encoder\.layers\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(self\.)?(relative_position_bias\.)?(?=relative_position_bias_table)", ".attn."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)

BUFFERS = re.compile(
    r"(^|\.)(relative_position_index|attn_mask|rope\.freqs_(cos|sin)|rope_embed\.periods|position_ids|num_batches_tracked)$"
)
# What stands beside an encoder's tensors, under no name of its own: heads, decoders, poolers.
BESIDE = re.compile(
    r"(head|fc_norm|pooler|classifier|lm_head|decoder\w*|proj|visual_projection|cls_pt_layers|predictor|projector|mlp_head"
    r"|attn_pool|head_drop|pre_logits|norm_head)(\.|$)"
)
AVERAGES = re.compile(r"(^|\.)(teacher|\w*ema)(\.|$)")
OTHERS = re.compile(r"(^|\.)(student|momentum_encoder|target_encoder)(\.|$)")
# width -> heads of the known families: ViT-Ti, S, B, L, H; EVA's g, DINOv2's g, DINOv3's 7B.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 4096: 32}


class Weights(NamedTuple):
    """An encoder that was read."""

    settings: dict[str, Any]  # of `ViT` or `Swin`
    mean: tuple[float, ...]  # of the images in 0..1 that it was trained on
    std: tuple[float, ...]
    parts: Params  # {"backbone": its parameters}
    lines: list[str]  # what was recognised, used, assumed and left out
    head: LinearHead = LinearHead("cls", {}, {})  # what is pooled, and the classifier beside the encoder, if there is one

    @property
    def network(self) -> Encoder:
        """`network.features(parts, images)` for images [B, H, W, C] in 0..1, of as many channels as `mean` has."""
        return Encoder(backbone(self.settings), self.mean, self.std)

    @property
    def files(self) -> dict[str, bytes]:
        """Name and content of the files of a folder that `read` reads."""
        head = {"pool": self.head.pool, "eps": self.head.eps, "labels": self.head.labels}
        kept = {"settings": self.settings, "mean": self.mean, "std": self.std, "lines": self.lines, "head": head}
        flat: Any = flatten_dict(self.parts["backbone"] | {"head": self.head.params}, sep=".")
        config = json.dumps({"mim_jax_encoder": kept}, indent=1).encode()
        return {"model.safetensors": weight_files.safetensors(flat), "config.json": config}

    def save(self, folder: str | Path) -> None:
        """Writes the `files`."""
        for name, content in self.files.items():
            journal.write_whole(Path(folder) / name, content)


class Told(NamedTuple):
    """What a person says of a file that does not say it. Zeros and empty texts: nothing."""

    encoder: str = ""  # the beginning of the tensors' names, where a file has several
    heads: int = 0
    eps: float = 0.0
    act: str = ""  # "gelu" or "quick_gelu"
    positions: str = ""  # how they are resized: one of POSITIONS
    img_size: int = 0
    channels: int = 3  # of the images, see `for_channels`; 0: as many as the file is for


NOTHING = Told()
POSITIONS = {  # (offset, antialias), see `ViT`
    "dino": (0.1, False),  # DINO, iBOT, DINOv2 without registers
    "size": (0.0, False),  # MAE, BEiT, EVA, transformers
    "antialiased": (0.0, True),  # timm, DINOv2 with registers, open_clip
}


def read(path: str | Path, told: Told = NOTHING) -> Weights:
    """The vision encoder in a file of weights or a folder of Hugging Face's, see `weight_files.read`; `config.json` and
    `preprocessor_config.json` beside it are used.

    Raises FileNotFoundError, and ValueError in one line for a file without an encoder, with tensors that are missing, unknown
    or misshapen, and for what must be `told`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") | read_json(folder / "preprocessor_config.json")
    try:
        arrays = weight_files.flat(weight_files.read(path))
        if kept := config.get("mim_jax_encoder"):
            return for_channels(ours(arrays, kept), told.channels)
        return encoder(arrays, config, told)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def ours(arrays: Arrays, kept: Mapping[str, Any]) -> Weights:
    """What `Weights.save` has written. (mim_jax 0.4 wrote no head.)"""
    backbone = unflatten_dict(dict(arrays), sep=".")
    head = {"norm": {}, "linear": {}} | backbone.pop("head", {})
    more = kept.get("head", {"pool": "cls", "labels": ()})
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in kept["settings"].items()}
    head = LinearHead(**head | more | {"labels": tuple(more["labels"])})
    return Weights(settings, tuple(kept["mean"]), tuple(kept["std"]), {"backbone": backbone}, kept["lines"], head)


def is_weights(path: str | Path) -> bool:
    """Whether `read` is meant for it: a file, or a folder with a file of weights and without checkpoints of a run."""
    path = Path(path)
    if path.is_dir() and not (path / "checkpoints").exists():
        return any(file.name.endswith((*weight_files.SUFFIXES, ".index.json")) for file in path.iterdir())
    return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > 2**20:
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def encoder(arrays: Arrays, config: Mapping[str, Any] | None = None, told: Told = NOTHING) -> Weights:
    """The encoder among named arrays. `config`: what `config.json` of timm or transformers says."""
    config = dict(config or {})
    config |= config.get("model_args") or {}
    config |= config.get("vision_config") or {}
    config |= config.get("pretrained_cfg") or {}
    prefix, layout, found = choose(list(arrays), told.encoder)
    inside = {name.removeprefix(prefix): np.asarray(array) for name, array in arrays.items() if name.startswith(prefix)}
    above = re.sub(r"(^|(?<=\.))[^.]+\.$", "", prefix)
    beside = {f"{above}classifier.{kind}" for kind in ("weight", "bias")} & arrays.keys()  # where transformers has it
    beside = set() if layout.renames is CLIP_TRANSFORMERS else beside  # which pools before the norm
    inside |= {name.removeprefix(above): np.asarray(arrays[name]) for name in beside}
    if BLOCK_OF_SWIN.search(" ".join(inside)):
        weights = swin(inside, layout, config, told)
    else:
        weights = vit(inside, layout, config, told)
    weights = checked(for_channels(weights, told.channels))
    others = [name for name in found if name != prefix]
    rest = [name for name in arrays if not name.startswith(prefix) and name not in beside]
    outside = Counter(".".join(name.split(".")[:-1][:2]) or name for name in rest)
    first = f'{layout.name} names, of the tensors "{prefix}..."' if prefix else f"{layout.name} names"
    lines = [f"recognised: {first}" + f" (there are also {', '.join(map(repr, others))}; --encoder chooses)" * bool(others)]
    lines += [f"not read: {', '.join(f'{name} ({count})' for name, count in sorted(outside.items()))}"] if outside else []
    licences = (
        ("MAE", "CC BY-NC 4.0", any(re.search(r"(^|\.)decoder_(embed|pred)\.", name) for name in arrays)),
        ("MoCo v3", "CC BY-NC 4.0", "base_encoder." in prefix or "momentum_encoder." in prefix),
        ("DINOv3", "under the DINOv3 License", bool(weights.settings.get("rotary_period"))),
    )
    owned = [f"the released weights of {owner} are {licence}" for owner, licence, found in licences if found]
    return weights._replace(lines=lines + weights.lines + owned)


BLOCK_OF_SWIN = re.compile(r"\blayers\.\d+\.blocks\.\d+\.")


def choose(names: list[str], wanted: str = "") -> tuple[str, Layout, list[str]]:
    """(what the names of the chosen encoder begin with, its layout, the beginnings of all encoders)"""
    found: dict[str, Layout] = {}
    have = set(names)
    for layout in LAYOUTS:
        for name in names:
            prefix = name.removesuffix(layout.embedding)
            whole = name.endswith(layout.embedding) and (not prefix or prefix.endswith("."))
            if whole and not (layout.renames is OPENAI and f"{prefix}class_embedding" not in have):
                found.setdefault(prefix, layout)
    if not found:
        shown = ", ".join(names[:5])
        raise ValueError(f"there is no vision encoder of a known layout among {len(names)} tensors ({shown}, ...)")
    fitting = [prefix for prefix in found if prefix.startswith(wanted)] if wanted else list(found)
    if not fitting:
        raise ValueError(f"no encoder's names begin with {wanted!r}: there are {', '.join(map(repr, found))}")
    ranks = {prefix: 0 if AVERAGES.search(prefix) else 2 if OTHERS.search(prefix) else 1 for prefix in fitting}
    best = [prefix for prefix in fitting if ranks[prefix] == min(ranks.values())]
    if len(best) > 1:
        raise ValueError(f"there are several encoders: choose with --encoder one of {', '.join(map(repr, best))}")
    return best[0], found[best[0]], list(found)


def renamed(arrays: Arrays, renames: Renames) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        for pattern, to in renames:
            name = re.sub(pattern, to, name)
        out[name] = array
    return out


def asked(what: str, option: str) -> ValueError:
    return ValueError(f"{what} is in no tensor, and there is no config.json that says it: give {option}")


# ViTs


def vit(inside: Arrays, layout: Layout, config: Mapping[str, Any], told: Told) -> Weights:
    """As `encoder`, of one encoder's tensors."""
    hf, clip = layout.name == "transformers", layout.renames in (OPENAI, CLIP_TRANSFORMERS)
    mae = any(name.startswith("decoder_") for name in inside)
    arrays = {name: array for name, array in renamed(inside, layout.renames).items() if not BUFFERS.search(name)}
    dim, _, patch, side = arrays["patch_embed.weight"].shape
    if patch != side:
        raise ValueError(f"patches of {patch} x {side} pixels are not square")
    if "mask_token" in arrays and arrays["mask_token"].shape[-1] != dim:  # of MAE's decoder
        arrays["decoder.mask_token"] = arrays.pop("mask_token")
    take = Taken(arrays)
    depth = 1 + max((int(match[1]) for name in arrays if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if not depth:
        raise ValueError("there are no blocks")

    blocks, subln = [block(take, f"blocks.{i}.") for i in range(depth)], "blocks.0.ffn_ln.weight" in arrays
    if any(one.keys() != blocks[0].keys() for one in blocks):
        raise ValueError("the blocks do not have the same tensors")
    params: dict[str, np.ndarray] = {}
    try:
        params |= {f"blocks/{name}": np.stack([one[name] for one in blocks]) for name in blocks[0]}
    except ValueError:
        raise ValueError("the blocks do not have the same shapes") from None

    params["patch_embed/kernel"] = take("patch_embed.weight").transpose(2, 3, 1, 0)
    params |= {"patch_embed/bias": take("patch_embed.bias")} if "patch_embed.bias" in arrays else {}
    for name in ("cls_token", "mask_token", "register_tokens"):
        if name in arrays:
            params[name] = take(name).reshape(1, -1, dim)
    for name in ("norm_pre", "norm"):
        params |= scale_and_bias(take, f"{name}.", name) if f"{name}.weight" in arrays else {}

    bias_name, pos, lines = "relative_position_bias_table", "none", list[str]()
    grid = 0
    if "pos_embed" in arrays:
        pos, positions = "learned", take("pos_embed").reshape(1, -1, dim)
        count = positions.shape[1]
        grid = math.isqrt(count)
        if grid**2 == count:  # without a row for CLS
            positions = np.concatenate([np.zeros((1, 1, dim), positions.dtype), positions], axis=1)
        elif (grid := math.isqrt(count - 1)) ** 2 != count - 1:
            raise ValueError(f"{count} positions are not those of a square grid of patches, with or without CLS")
        params["pos_embed"] = positions
    if bias_name in arrays:
        pos, params[bias_name] = "relative", take(bias_name)
    elif f"blocks/{bias_name}" in params:
        pos = "relative_each"
    if pos.startswith("relative"):
        if "pos_embed" in arrays:
            raise ValueError("learned positions beside relative ones are not read")
        rows = params[bias_name if pos == "relative" else f"blocks/{bias_name}"].shape[-2]
        grid = (math.isqrt(rows - 3) + 1) // 2
        if (2 * grid - 1) ** 2 + 3 != rows:
            raise ValueError(f"a table of {rows} relative positions is not that of a square grid of patches with CLS")

    gated, key_bias = "blocks/w3/kernel" in params, "blocks/qkv/bias" in params
    eva02 = gated and pos == "learned" and not key_bias
    if pos == "none":
        lines.append("rotary positions as DINOv3's")
    hidden = params["blocks/w3/kernel" if gated else "blocks/fc2/kernel"].shape[1]
    clip |= "norm_pre/scale" in params
    eps, why = told.eps or float(config.get("layer_norm_eps") or config.get("eps") or 0), ""
    if not eps:
        v3 = pos == "none" and "register_tokens" in params
        dinov2 = hf and "blocks/gamma_1" in params and pos == "learned"
        eps = 1e-5 if clip or v3 else 1e-12 if hf and not dinov2 else 1e-6
        why = ", as in the family's code"
    named = "quick_gelu" if "quickgelu" in str(config.get("architecture")) else ""
    act = told.act or str(config.get("hidden_act") or config.get("act_layer") or named or "gelu")
    if "quick_gelu" in config and not told.act:
        act = "quick_gelu" if config["quick_gelu"] else "gelu"
    elif layout.renames is OPENAI and not told.act and "act_layer" not in config:
        raise asked("the activation of the MLPs (OpenAI's models have quick_gelu, most of open_clip's gelu)", "--act")
    if not gated and act not in ("gelu", "quick_gelu"):
        raise ValueError(f"the activation {act} is not known: there are gelu and quick_gelu")
    timm = not hf and bool({"architecture", "num_heads", "global_pool"} & config.keys())
    if told.positions:
        resize = told.positions
    elif timm or "register_tokens" in params or (clip and not hf):
        resize = "antialiased"
    else:
        resize = "size" if hf or mae or not key_bias else "dino"
    if resize not in POSITIONS:
        raise ValueError(f"positions={resize!r} is not known: there are {', '.join(POSITIONS)}")

    size = grid * patch or told.img_size or int(np.max(config.get("image_size") or config.get("img_size") or 224))
    settings = dict(
        patch_size=patch,
        img_size=size,
        dim=dim,
        depth=depth,
        heads=heads_of(params, dim, config, told, inside),
        mlp_ratio=(hidden + 1e-3) / dim,
        pos=pos,
        pos_offset=POSITIONS[resize][0],
        antialias=POSITIONS[resize][1],
        bilinear=hf and pos.startswith("relative"),
        mask_token="mask_token" in params,
        layerscale=float("blocks/gamma_1" in params),
        k_bias=key_bias,
        ffn="swiglu_eva" if gated else "mlp",
        act=act if not gated else "gelu",
        subln=subln,
        attn_norm="blocks/attn_norm/scale" in params,
        rotary=int(np.max(config.get("ref_feat_shape") or 16)) if eva02 else 0,
        rotary_period=float(config.get("rope_theta") or config.get("rope_temperature") or 100) if pos == "none" else 0.0,
        registers=params["register_tokens"].shape[1] if "register_tokens" in params else 0,
        final_norm="norm/scale" in params,
        cls="cls_token" in params,
        pre_norm="norm_pre/scale" in params,
        patch_bias="patch_embed/bias" in params,
        norm_eps=eps,
    )
    head = classifier(take, dim, "cls_token" in params, eps, config)
    used, beside, unknown = take.report()
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are not known: {', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}")
    lines = [
        f"ViT of width {dim}, {depth} blocks of {settings['heads']} heads, patches of {patch} pixels, images of {size}; "
        f"epsilon {eps:g}{why}" + f", {act}" * (not gated and act != "gelu"),
        f"{len(used)} of {len(arrays)} tensors"
        + f", {len(inside) - len(arrays)} buffers ignored" * (len(inside) > len(arrays))
        + (f"; heads and other parts not used: {', '.join(beside)}" if beside else ""),
        *lines,
    ]
    if pos == "learned":
        how = {"dino": "as DINO's code does", "size": "by a bicubic", "antialiased": "by an antialiased bicubic, as timm does"}
        lines.append(f"positions {grid} x {grid}, at another size resized {how[resize]}")
    mean, std, whose = colors(config, clip, hf)
    lines += [*told_of(head), whose]
    return Weights(settings, mean, std, {"backbone": unflatten_dict(params, sep="/")}, lines, head)


class Taken:
    """Arrays by name, as float32, and which of them were used."""

    def __init__(self, arrays: Arrays):
        self.arrays, self.used = arrays, set[str]()

    def __call__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"the tensor {name} is missing")
        self.used.add(name)
        return np.asarray(self.arrays[name], np.float32)

    def report(self) -> tuple[set[str], list[str], list[str]]:
        """(names that were used, parts that were not and stand beside an encoder, names that are not known)"""
        rest = [name for name in self.arrays if name not in self.used]
        beside = sorted({name.split(".")[0] for name in rest if BESIDE.match(name)})
        return self.used, beside, [name for name in rest if not BESIDE.match(name)]


def scale_and_bias(take: Taken, at: str, to: str) -> dict[str, np.ndarray]:
    return {f"{to}/scale": take(f"{at}weight"), f"{to}/bias": take(f"{at}bias")}


def linear(take: Taken, at: str, to: str) -> dict[str, np.ndarray]:
    bias = {f"{to}/bias": take(f"{at}bias")} if f"{at}bias" in take.arrays else {}
    return {f"{to}/kernel": take(f"{at}weight").T} | bias


def block(take: Taken, at: str) -> dict[str, np.ndarray]:
    """Our parameters of a block, from tensors whose names begin with `at`."""
    have = take.arrays
    params = scale_and_bias(take, f"{at}norm1.", "norm1") | scale_and_bias(take, f"{at}norm2.", "norm2")
    for name in ("attn_norm", "ffn_ln"):
        params |= scale_and_bias(take, f"{at}{name}.", name) if f"{at}{name}.weight" in have else {}
    for name in ("gamma_1", "gamma_2", "relative_position_bias_table"):
        params |= {name: take(at + name)} if at + name in have else {}

    subln, split = f"{at}ffn_ln.weight" in have, f"{at}q.weight" in have
    weights = [take(f"{at}{x}.weight").T for x in "qkv"] if split else np.split(take(f"{at}qkv.weight").T, 3, axis=1)
    if subln:
        params |= {f"{x}_proj/kernel": weight for x, weight in zip("qkv", weights)}
    else:
        params["qkv/kernel"] = np.concatenate(weights, axis=1)
    names = [next((n for n in (f"{at}{x}.bias", f"{at}{x}_bias") if n in have), "") for x in "qkv"]
    biases = [take(name) if name else np.zeros(len(weights[0]), np.float32) for name in names]
    if f"{at}qkv.bias" in have:
        fused = take(f"{at}qkv.bias")
        if f"{at}qkv.bias_mask" in have:  # DINOv3: that of the keys must not be used
            fused = np.where(np.isfinite(mask := take(f"{at}qkv.bias_mask")), fused * np.nan_to_num(mask), 0)
        biases = np.split(fused, 3)
        names = [at] * 3 if biases[1].any() or f"{at}qkv.bias_mask" not in have else [at, "", at]
    if names[1]:
        params["qkv/bias"] = np.concatenate(biases)
    else:
        params |= {"q_bias": biases[0], "v_bias": biases[2]}
    params |= linear(take, f"{at}proj.", "proj")

    if f"{at}w1.weight" in have:  # gate and value apart; transformers calls the value of a gated MLP `up_proj`
        value, out = ("up_proj", "down_proj") if f"{at}up_proj.weight" in have else ("w2", "w3")
        out = out if f"{at}{out}.weight" in have else "fc2"
        gate, values = linear(take, f"{at}w1.", "w1"), linear(take, f"{at}{value}.", "w2")
        if subln:
            params |= gate | values
        else:
            params |= {
                f"w12/{kind}": np.concatenate([gate[f"w1/{kind}"], values[f"w2/{kind}"]], -1) for kind in ("kernel", "bias")
            }
        return params | linear(take, f"{at}{out}.", "w3")
    first = next((name for name in ("w12", "fc1", "up_proj") if f"{at}{name}.weight" in have), "fc1")
    last = next((name for name in ("w3", "fc2", "down_proj") if f"{at}{name}.weight" in have), "fc2")
    into, out_of = linear(take, f"{at}{first}.", "w12"), linear(take, f"{at}{last}.", "w3")
    if into["w12/kernel"].shape[1] == 2 * out_of["w3/kernel"].shape[0]:
        return params | into | out_of
    named = {"w12": "fc1", "w3": "fc2"}
    return params | {re.sub("^w12|^w3", lambda m: named[m[0]], name): value for name, value in (into | out_of).items()}


def classifier(take: Taken, dim: int, cls: bool, eps: float, config: Mapping[str, Any]) -> LinearHead:
    """The classifier beside an encoder, with the norm of what it pools; either may be missing."""
    have: Any = take.arrays
    flat = scale_and_bias(take, "fc_norm.", "norm") if "fc_norm.weight" in have else {}
    for at in ("classifier.", "head.fc.", "head."):
        if f"{at}weight" in have and have[f"{at}weight"].ndim == 2 and have[f"{at}weight"].shape[1] in (dim, 2 * dim):
            flat |= {"linear/bias": np.zeros(len(have[f"{at}weight"]), np.float32)} | linear(take, at, "linear")
            break
    pool = "mean" if "norm/scale" in flat or not cls or config.get("global_pool") == "avg" else "cls"
    if "linear/kernel" in flat and len(flat["linear/kernel"]) == 2 * dim:
        pool = "cls+mean"  # DINOv2's in transformers
    names = config.get("label_names") or config.get("id2label") or ()
    labels = tuple(names[str(i)] for i in range(len(names))) if isinstance(names, dict) else tuple(names)
    labels = labels if len(labels) == len(flat.get("linear/bias", ())) else ()
    params: Any = {"norm": {}, "linear": {}} | unflatten_dict(flat, sep="/")
    return LinearHead(pool, params["norm"], params["linear"], eps, labels)


def told_of(head: LinearHead) -> list[str]:
    """A line about a classifier, if there is one."""
    pooled = {"cls": "CLS", "mean": "the mean of the patches", "cls+mean": "CLS and the mean of the patches"}[head.pool]
    pooled += ", with a norm" * bool(head.norm)
    return [f"classifier of {head.classes} classes, of {pooled}"] if head.linear else []


def heads_of(params: Arrays, dim: int, config: Mapping[str, Any], told: Told, inside: Arrays) -> int:
    """The number of heads. Raises ValueError if it is not known, or does not divide the width."""
    tables = [array for name, array in params.items() if name.endswith("relative_position_bias_table")]
    periods = inside.get("rope_embed.periods")
    width = config.get("head_width")
    heads = told.heads or int(config.get("num_attention_heads") or config.get("num_heads") or 0)
    heads = heads or (dim // int(width) if width else 0) or (tables[0].shape[-1] if tables else 0)
    heads = heads or (dim // (4 * len(periods)) if periods is not None else HEADS.get(dim, 0))
    if not heads:
        raise asked(f"the number of heads (the width is {dim})", "--heads")
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide the width {dim}")
    return heads


def colors(config: Mapping[str, Any], clip: bool, hf: bool) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std) of images in 0..1, and a line about them."""
    mean, std = config.get("image_mean") or config.get("mean"), config.get("image_std") or config.get("std")
    if mean and std:
        return tuple(map(float, mean)), tuple(map(float, std)), "images are normalised as its configuration says"
    if clip:
        return *CLIP, "images are normalised as CLIP's"
    if hf and config.get("model_type") in ("beit", "data2vec-vision"):
        return *HALF, "images are normalised to -1..1, as in the family's code"
    return *IMAGENET, "images are normalised by ImageNet's mean and std, as in most code: no configuration says it"


def for_channels(weights: Weights, channels: int) -> Weights:
    """The same, for images of so many channels; 0: of as many as it has. As timm does it: the kernels of all channels are
    summed for one channel; for several they are repeated in turn, times old / new. Mean and std are averaged or repeated.

    Raises ValueError for a patch embedding of other channels than 1 or 3 that would have to be changed.
    """
    embedding = weights.parts["backbone"]["patch_embed"]
    kernel = embedding["kernel"]
    have = kernel.shape[2]
    mean, std = (per_channel(color, have) for color in (weights.mean, weights.std))
    if channels in (0, have):
        return weights._replace(mean=mean, std=std)
    if have not in (1, 3):
        raise ValueError(
            f"the patch embedding is for {counted(have)}, not {channels}: only one for 1 or 3 can be changed; "
            f"--channels={have} takes it as it is"
        )
    if channels == 1:
        how, kernel = f"summed over the {have}", kernel.sum(axis=2, keepdims=True)
    else:
        how = "repeated" + " in turn" * (have > 1) + f" and times {have}/{channels}"
        kernel = kernel[:, :, np.arange(channels) % have] * np.float32(have / channels)
    mean, std = (per_channel(color, channels) for color in (mean, std))
    line = f"the patch embedding for {counted(have)} became one for {channels}: {how}, as timm does; "
    line += f"mean {shown(mean)}, std {shown(std)}"
    backbone = weights.parts["backbone"] | {"patch_embed": embedding | {"kernel": kernel}}
    return weights._replace(mean=mean, std=std, parts={"backbone": backbone}, lines=[*weights.lines, line])


def per_channel(color: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Mean or std for so many channels: averaged for one, else repeated in turn."""
    return (float(np.mean(color)),) if channels == 1 else tuple(color[i % len(color)] for i in range(channels))


def counted(channels: int) -> str:
    return f"{channels} channel{'s' * (channels > 1)}"


def shown(color: tuple[float, ...]) -> str:
    return ", ".join(f"{x:.4g}" for x in color)


def checked(weights: Weights) -> Weights:
    """The same. Raises ValueError for parameters of other shapes than the network has."""
    wanted = jax.eval_shape(lambda: weights.network.init_parts(jax.random.key(0)))
    have, want = (
        flatten_dict(jax.tree.map(np.shape, tree), sep="/") for tree in (weights.parts["backbone"], wanted["backbone"])
    )
    if wrong := [name for name in have | want if have.get(name) != want.get(name)]:
        shown = "; ".join(f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'there')}" for name in wrong[:3])
        raise ValueError(f"{len(wrong)} tensors do not fit the network: {shown}")
    return weights


# Swin


def swin(inside: Arrays, layout: Layout, config: Mapping[str, Any], told: Told) -> Weights:
    """As `vit`."""
    arrays = {name: np.asarray(a, np.float32) for name, a in inside.items() if not BUFFERS.search(name)}
    arrays = renamed(arrays, SWIN_TRANSFORMERS if layout.name == "transformers" else ())
    for name in [name for name in arrays if re.search(r"\.attn\.q\.", name)]:
        kinds = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        arrays[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([arrays.pop(kind) for kind in kinds])
    if not any(name.startswith("layers.0.downsample.") for name in arrays):  # timm has them at the start of the next stage
        arrays = {
            re.sub(r"^layers\.(\d+)(?=\.downsample\.)", lambda m: f"layers.{int(m[1]) - 1}", n): a for n, a in arrays.items()
        }
    width = len(arrays["norm.weight"]) if "norm.weight" in arrays else 0
    head = classifier(take := Taken(arrays), width, False, EPS, config)
    arrays = {name: array for name, array in arrays.items() if name not in take.used}
    beside = sorted({name.split(".")[0] for name in arrays if BESIDE.match(name)})
    arrays = {name: a for name, a in arrays.items() if not BESIDE.match(name)}
    stages = 1 + max(int(match[1]) for name in arrays if (match := re.match(r"layers\.(\d+)\.", name)))
    rows = [row for row in simmim.swin(stages) if row.path != "mask_token" or "mask_token" in arrays]
    params, problems = convert.filled(arrays, rows)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit a Swin: {'; '.join(problems[:5])}")
    tables = [params[f"stage_{s}/blocks/plain/relative_position_bias_table"] for s in range(stages)]
    dim, patch = params["patch_embed/kernel"].shape[-1], params["patch_embed/kernel"].shape[0]
    window = max((math.isqrt(t.shape[1]) + 1) // 2 for t in tables)
    settings = dict(
        patch_size=patch,
        img_size=told.img_size or int(np.max(config.get("image_size") or config.get("img_size") or 224)),
        dim=dim,
        depths=tuple(2 * len(t) for t in tables),
        heads=tuple(t.shape[-1] for t in tables),
        window=window,
        mlp_ratio=(params["stage_0/blocks/plain/fc1/kernel"].shape[-1] + 1e-3) / dim,
        mask_token="mask_token" in params,
    )
    lines = [
        f"Swin of width {dim}, {settings['depths']} blocks of {settings['heads']} heads, windows of {window} patches",
        f"{len(arrays)} of {len(arrays)} tensors, {len(inside) - len(arrays)} others and buffers not used"
        + f" ({', '.join(beside)})" * bool(beside),
    ]
    if (eps := told.eps or config.get("layer_norm_eps") or EPS) != EPS:
        raise ValueError(f"the norms have epsilon {eps:g}: those of a Swin here have {EPS:g}")
    mean, std, whose = colors(config, False, False)
    lines += [*told_of(head), whose]
    return Weights(settings, mean, std, {"backbone": unflatten_dict(params, sep="/")}, lines, head)
