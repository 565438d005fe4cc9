"""Vision encoders in the layouts that people have: of official repositories, timm, transformers, OpenAI's CLIP and open_clip.

    weights = mim_jax.layouts.read("dinov2_vits14_pretrain.pth")
    out = weights.network.features(weights.parts, images)  # images [B, H, W, 3] in 0..1; other channels: see `Told`
    weights.save("runs/dinov2")  # `read` reads it again, and so do init_from and target.weights

A file may hold several models and much else. An encoder is found by the name of its patch embedding. Its tensors are renamed
to one set of names, from which the settings of our ViT or Swin follow. What no tensor shows (the number of heads, epsilon, the
activation, how positions are resized) is taken from `config.json` beside the file, or from what is known of the family
(`mim_jax.families`), and is said; otherwise it is asked for. What the family or `config.json` has and the file lacks is an
error.
"""

import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import convert, families, journal, weight_files
from mim_jax.convert import simmim
from mim_jax.families import Facts, agree, count, number, shown, sides
from mim_jax.methods.base import Encoder, Params
from mim_jax.methods.imported import backbone
from mim_jax.models.clip import MEAN, STD
from mim_jax.models.heads import LinearHead
from mim_jax.models.positions import relative_position_index, rotary_angles
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


class Weights(NamedTuple):
    """An encoder that was read."""

    settings: dict[str, Any]  # of `ViT` or `Swin`
    mean: tuple[float, ...]  # of the images in 0..1 that it was trained on
    std: tuple[float, ...]
    parts: Params  # {"backbone": its parameters}
    lines: list[str]  # what was recognised, used, assumed and left out
    head: LinearHead = LinearHead("cls", {}, {})  # what is pooled, and the classifier beside the encoder, if there is one
    seen: families.Seen = families.Seen()

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
        config = {"mim_jax_seen": self.seen._asdict(), "mim_jax_encoder": kept}
        return {"model.safetensors": weight_files.safetensors(flat), "config.json": json.dumps(config, indent=1).encode()}

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
    without: str = ""  # what the network does not have, of `families.PARTS`, joined by commas


NOTHING = Told()
POSITIONS = {  # (offset, antialias), see `ViT`
    "dino": (0.1, False),  # DINO, iBOT, DINOv2 without registers
    "size": (0.0, False),  # MAE, BEiT, EVA, transformers
    "antialiased": (0.0, True),  # timm, DINOv2 with registers, open_clip
}
HOW = {"dino": "as DINO's code does", "size": "by a bicubic", "antialiased": "by an antialiased bicubic, as timm does"}


def convention(name: str) -> tuple[float, bool]:
    """Of POSITIONS. Raises ValueError for a name that is not there."""
    if name not in POSITIONS:
        raise ValueError(f"positions={name!r} is not known: there are {', '.join(POSITIONS)}")
    return POSITIONS[name]


def read(path: str | Path, told: Told = NOTHING) -> Weights:
    """The vision encoder in a file of weights or a folder of Hugging Face's, see `weight_files.read`; `config.json` and
    `preprocessor_config.json` beside it are used.

    Raises FileNotFoundError, and ValueError in one line for a file without an encoder, with tensors that are missing, unknown
    or misshapen, for a configuration of another encoder, and for what must be `told`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        config, processor = (read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config"))
        arrays = weight_files.flat(weight_files.read(path))
        if kept := config.get("mim_jax_encoder"):
            weights = checked(for_channels(ours(arrays, kept, told), told.channels))
        else:
            weights = encoder(arrays, config | processor, told)
            if path.is_dir():
                weights.lines.insert(0, f"file: {weight_files.in_folder(path).name}")
        return weights._replace(seen=families.seen(config, processor))
    except ValueError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        if flag := re.search(r"--[a-z]+=[^\s,;]+", message):  # which many commands have not
            command = f"python -m mim_jax.convert {path} {flag[0]} --out=DIR"
            message += f" (`{command}` writes a folder that can be named instead)"
        raise ValueError(message) from None


def ours(arrays: Arrays, kept: Any, told: Told = NOTHING) -> Weights:
    """What `Weights.save` has written. (mim_jax 0.4 wrote no head.) Of what may be `told`, only `positions` can be missing."""
    check(told)
    if said := [name for name in ("encoder", "heads", "eps", "act", "img_size", "without") if getattr(told, name)]:
        raise ValueError(f"{' and '.join(said)} cannot be given: mim_jax has written the file, and its config.json says all")
    try:
        params = unflatten_dict(dict(arrays), sep=".")
        head = {"norm": {}, "linear": {}} | params.pop("head", {})
        more = kept.get("head", {"pool": "cls", "labels": ()})
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in kept["settings"].items()}
        head = LinearHead(**head | more | {"labels": tuple(more["labels"])})
        mean, std, lines = tuple(kept["mean"]), tuple(kept["std"]), list(kept["lines"])
        backbone(settings)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("config.json: mim_jax_encoder is not as mim_jax writes it") from None
    if told.positions and settings.get("pos") == "learned":
        offset, antialias = convention(told.positions)
        settings |= {"pos_offset": offset, "antialias": antialias, "resizable": True}
        lines = [line for line in lines if not line.startswith("positions ")]
        lines.append(f"positions at another size resized {HOW[told.positions]} (given)")
    return Weights(settings, mean, std, {"backbone": params}, lines, head)


def is_weights(path: str | Path) -> bool:
    """Whether `read` is meant for it: a file, or a folder with a file of weights and without checkpoints of a run."""
    path = Path(path)
    if path.is_dir() and not (path / "checkpoints").exists():
        return any(file.name.endswith((*weight_files.SUFFIXES, ".index.json")) for file in path.iterdir())
    return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no file. Raises ValueError for another file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > 2**20:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and is no configuration")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {shown(found)}, but must be an object")
    return found


def check(told: Told) -> None:
    """Raises ValueError for a value of another type or out of its range."""
    for name, nothing in Told._field_defaults.items():
        value: Any = getattr(told, name)
        number: Any = numbers.Real if name == "eps" else numbers.Integral
        if isinstance(nothing, str):
            if not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}, but must be a text")
        elif isinstance(value, bool) or not isinstance(value, number) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}, but must be a {'whole ' * (name != 'eps')}number above 0")
    if told.positions:
        convention(told.positions)


def encoder(arrays: Arrays, config: Mapping[str, Any] | None = None, told: Told = NOTHING) -> Weights:
    """The encoder among named arrays. `config`: what `config.json` of timm or transformers says."""
    check(told)
    config = families.unwrapped(config or {})
    prefix, layout, found = choose(list(arrays), told.encoder)
    inside = {name.removeprefix(prefix): np.asarray(array) for name, array in arrays.items() if name.startswith(prefix)}
    above = re.sub(r"(^|(?<=\.))[^.]+\.$", "", prefix)
    beside = {f"{above}classifier.{kind}" for kind in ("weight", "bias")} & arrays.keys()  # where transformers has it
    beside = set() if layout.renames is CLIP_TRANSFORMERS else beside  # which pools before the norm
    inside |= {name.removeprefix(above): np.asarray(arrays[name]) for name in beside}
    if BLOCK_OF_SWIN.search(" ".join(inside)):
        weights = swin(inside, layout, config, told)
    else:
        weights = vit(inside, layout, config, told, prefix, arrays.keys())
    weights = checked(for_channels(weights, told.channels))
    others = [name for name in found if name != prefix]
    rest = [name for name in arrays if not name.startswith(prefix) and name not in beside]
    outside = Counter(".".join(name.split(".")[:-1][:2]) or name for name in rest)
    first = f'{layout.name} names, of the tensors "{prefix}..."' if prefix else f"{layout.name} names"
    lines = [f"recognised: {first}" + f" (there are also {', '.join(map(repr, others))}; --encoder chooses)" * bool(others)]
    lines += [f"not read: {', '.join(f'{name} ({n})' for name, n in sorted(outside.items()))}"] if outside else []
    return weights._replace(lines=lines + weights.lines)


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
        raise ValueError(f"there are several encoders: choose with --encoder=... one of {', '.join(map(repr, best))}")
    return best[0], found[best[0]], list(found)


def renamed(arrays: Arrays, renames: Renames) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        for pattern, to in renames:
            name = re.sub(pattern, to, name)
        out[name] = array
    return out


# ViTs

# Lines of the licences of known weights
OWNED = {
    "MAE": "the released weights of MAE are CC BY-NC 4.0",
    "MoCo v3": "the released weights of MoCo v3 are CC BY-NC 4.0",
    "DINOv3": "the released weights of DINOv3 are under the DINOv3 License",
}


def vit(
    inside: Arrays, layout: Layout, config: Mapping[str, Any], told: Told, prefix: str = "", names: Collection[str] = ()
) -> Weights:
    """As `encoder`, of one encoder's tensors. `prefix`: what their names began with; `names`: of all tensors in the file."""
    hf = layout.name == "transformers"
    arrays = {name: array for name, array in renamed(inside, layout.renames).items() if not BUFFERS.search(name)}
    take = Taken(arrays)
    params = {"patch_embed/kernel": take("patch_embed.weight", 4).transpose(2, 3, 1, 0)}
    patch, side, channels, dim = params["patch_embed/kernel"].shape
    if patch != side:
        raise ValueError(f"patches of {patch} x {side} pixels are not square")
    decoder = any(re.search(r"(^|\.)decoder_(embed|pred)\.", name) for name in names)
    if "mask_token" in arrays and (decoder or arrays["mask_token"].size != dim):  # of MAE's decoder
        arrays["decoder.mask_token"] = arrays.pop("mask_token")
    attends = layout.renames is CLIP_TRANSFORMERS or any(name.startswith("attn_pool.") for name in inside)
    if attends and "cls_token" not in arrays:
        raise ValueError("it has no CLS token where CLIP has one, as SigLIP, whose encoders are not read")
    depth = 1 + max((int(match[1]) for name in arrays if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if not depth:
        raise ValueError("there are no blocks")

    pos, table, grid = positions(take, dim, patch, config)
    fixed = families.fixed_table(table[0, 1:]) if pos == "learned" else ""
    gated = any(re.fullmatch(r"blocks\.0\.(w\d+|gate_proj)\.weight", name) for name in arrays) or halved(arrays)
    family = families.family_of(layout.name, layout.embedding, names, arrays, config, prefix, fixed, gated)
    kind = str(config.get("model_type") or "")
    known = families.DEFAULTS.get(kind, {}) if hf else {}
    if known and family.types and kind not in family.types.split():
        raise ValueError(f"config.json is of {kind}, but the tensors have the names of the family {family.name}")
    parts = families.parts_of(arrays)
    inner = [{name.partition(f"blocks.{i}.")[2] for name in arrays if name.startswith(f"blocks.{i}.")} for i in range(depth)]
    if not all(inner):
        raise ValueError(f"block {inner.index(set())} of {depth} is missing")
    inner_parts = [families.parts_of(f"blocks.0.{name}" for name in own) for own in inner]
    for i, found in enumerate(inner_parts):
        if odd := found ^ inner_parts[0]:
            what = ", ".join(families.PARTS[part][0] for part in families.PARTS if part in odd)
            raise ValueError(f"the blocks do not have the same tensors: only one of 0 and {i} has the {what}")
    families.whole(parts, family, {**known, **config}, told.without)

    blocks, subln = [block(take, f"blocks.{i}.") for i in range(depth)], "sub_norm" in parts
    if any(one.keys() != blocks[0].keys() for one in blocks):
        raise ValueError("the blocks do not have the same tensors")
    try:
        params |= {f"blocks/{name}": np.stack([one[name] for one in blocks]) for name in blocks[0]}
    except ValueError:
        raise ValueError("the blocks do not have the same shapes") from None
    params |= {"patch_embed/bias": take("patch_embed.bias", 1)} if "patch_bias" in parts else {}
    for name in ("cls_token", "mask_token", "register_tokens"):
        if name in arrays:
            params[name] = take.rows(name, dim)
    for name in ("norm_pre", "norm"):
        params |= scale_and_bias(take, f"{name}.", name) if f"{name}.weight" in arrays else {}
    if pos == "learned":
        params["pos_embed"] = table
    elif pos == "relative":
        params["relative_position_bias_table"] = table

    gated, key_bias = "blocks/w3/kernel" in params, "blocks/qkv/bias" in params
    hidden = params["blocks/w3/kernel" if gated else "blocks/fc2/kernel"].shape[1]
    registers = params["register_tokens"].shape[1] if "register_tokens" in params else 0
    widths = ("hidden_size", "width", "num_features") + ("embed_dim",) * (not {"quick_gelu", "timm_model_name"} & config.keys())
    images = sides(config, "image_size", "img_size")
    agree(
        {**config, "grid of image_size": images and images[0] // patch if grid else None},
        (
            (widths, dim),
            (("num_hidden_layers", "depth", "layers"), depth),
            (("patch_size",), patch),
            (("grid of image_size",), grid),
            (("num_register_tokens", "reg_tokens", "num_reg_tokens"), registers),
            (("intermediate_size",), hidden),
            (("num_channels", "in_chans"), channels),
        ),
    )
    if told.img_size and (told.img_size % patch or grid and told.img_size != grid * patch):
        raise ValueError(f"img_size is {told.img_size}, but the encoder is for {grid * patch or f'multiples of {patch}'}")
    if told.positions and pos != "learned":
        raise ValueError(f"positions={told.positions} is said of learned positions, which the encoder does not have")
    if pos == "learned" and family.name == families.DINOV3.name:
        raise ValueError("learned positions beside rotary ones are not read")

    facts, rotary = Facts(), pos == "none" and family.name == families.DINOV3.name
    of_family, default = f"known of {family.name}", f"transformers' default for {kind}"
    heads = heads_of(params, dim, config, told, inside, facts, (known.get("num_attention_heads"), default), family)
    eps = facts(
        "epsilon",
        (told.eps, "given"),
        (number(config, "layer_norm_eps", "eps"), "config.json beside it"),
        (known.get("layer_norm_eps"), default),
        (family.eps, of_family),
    )
    act = "gelu" if gated else activation(config, told, facts, (known.get("hidden_act"), default), (family.act, of_family))
    eva02 = gated and pos == "learned" and not key_bias
    period = grid_of_angles = 0.0
    if rotary:
        rope = number(config, "rope_theta", "rope_temperature")
        period = facts("period of the positions", (rope, "config.json beside it"), (100.0, of_family))
    if eva02:
        given = sides(config, "ref_feat_shape")
        grid_of_angles = facts("grid of the angles", (given and max(given), "config.json beside it"), (16, of_family))
    if config.get("use_rot_pos_emb") and not (eva02 or rotary):
        raise ValueError("config.json: rotary positions are read of EVA-02 and DINOv3 only")
    compare_buffers(inside, grid, dim, heads, period, int(grid_of_angles), "cls_token" in params)
    size = grid * patch or told.img_size or (max(images) // patch * patch if images else 0)
    size = size or facts("images of", (224 // patch * patch, "assumed, other sizes are as good"))

    resize, lines = "", list[str]()
    if pos == "learned":
        timm = not hf and bool({"architecture", "num_heads", "global_pool"} & config.keys())
        how = (told.positions, "given"), (timm and "antialiased", "known of timm"), (family.resize, of_family)
        resize, who = next(((name, who) for name, who in how if name), ("", ""))
        line = f"positions {grid} x {grid}, "
        if resize:
            line += f"at another size resized {HOW[resize]} ({who})"
        else:
            line += f"for images of {size} only, as libraries resize them in different ways and the file does not say which; "
            line += "for others: `python -m mim_jax.convert FILE --positions=... --out=DIR`"
        lines.append(line)
    elif pos != "none":
        lines.append(f"relative positions {grid} x {grid}")
    elif rotary:
        lines.append("rotary positions as DINOv3's")
    offset, antialias = convention(resize or "dino")
    settings = dict(
        patch_size=patch,
        img_size=size,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=(hidden + 1e-3) / dim,
        pos=pos,
        pos_offset=offset,
        antialias=antialias,
        resizable=pos != "learned" or bool(resize),
        bilinear=hf and pos.startswith("relative"),
        mask_token="mask_token" in params,
        layerscale=float("blocks/gamma_1" in params),
        k_bias=key_bias,
        ffn="swiglu_eva" if gated else "mlp",
        act=act,
        subln=subln,
        attn_norm="attn_norm" in parts,
        rotary=int(grid_of_angles),
        rotary_period=period,
        registers=registers,
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
    name = family.name
    mean, std, whose = colors(config, channels, name == families.CLIP.name, hf and name == families.BEIT.name)
    owner = families.MAE.name if decoder or fixed == families.MAE.name else name
    lines = [
        f"ViT of width {dim}, {depth} blocks of {heads} heads, patches of {patch} pixels, images of {size}",
        f"not in the tensors: {facts.line}",
        f"{len(used)} of {len(arrays)} tensors"
        + f", {len(inside) - len(arrays)} buffers ignored" * (len(inside) > len(arrays))
        + (f"; heads and other parts not used: {', '.join(beside)}" if beside else ""),
        *lines,
        *told_of(head),
        whose,
        *([OWNED[owner]] if owner in OWNED else []),
    ]
    return Weights(settings, mean, std, {"backbone": unflatten_dict(params, sep="/")}, lines, head)


def halved(arrays: Arrays) -> bool:
    """Whether an MLP's first layer has gate and value in one tensor."""
    first, last = (arrays.get(f"blocks.0.{name}.weight", np.zeros(0)) for name in ("fc1", "fc2"))
    return first.ndim == last.ndim == 2 and len(first) == 2 * last.shape[1]


def positions(take: "Taken", dim: int, patch: int, config: Mapping[str, Any]) -> tuple[str, np.ndarray, int]:
    """(`pos` of a ViT, the table of positions or of relative positions that all blocks share, side of their grid; 0: any).

    Raises ValueError for a table of an oblong grid.
    """
    shared, each = "relative_position_bias_table", "blocks.0.relative_position_bias_table"
    wanted = sides(config, "image_size", "img_size")
    if wanted and wanted[0] // patch != wanted[1] // patch and {"pos_embed", shared, each} & take.arrays.keys():
        raise ValueError(f"positions for oblong images, {wanted[0]} x {wanted[1]} pixels by config.json, are not read")
    if shared in take.arrays or each in take.arrays:
        if "pos_embed" in take.arrays:
            raise ValueError("learned positions beside relative ones are not read")
        table = take(shared if shared in take.arrays else each, 2)
        side = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
        if (2 * side - 1) ** 2 + 3 != len(table):
            raise ValueError(f"a table of {len(table)} relative positions is not that of a square grid of patches with CLS")
        return ("relative" if shared in take.arrays else "relative_each"), table, side
    if "pos_embed" not in take.arrays:
        return "none", np.zeros((0, 0)), 0
    table = take.rows("pos_embed", dim)
    rows = table.shape[1]
    side = math.isqrt(rows)
    if side**2 == rows:  # without a row for CLS
        return "learned", np.concatenate([np.zeros((1, 1, dim), table.dtype), table], axis=1), side
    if (side := math.isqrt(rows - 1)) ** 2 != rows - 1:
        raise ValueError(f"{rows} positions are not those of a square grid of patches, with or without CLS")
    return "learned", table, side


def compare_buffers(inside: Arrays, grid: int, dim: int, heads: int, period: float, side: int, cls: bool) -> None:
    """Raises ValueError for buffers of other positions than ours, which follow from the settings."""
    for name, buffer in inside.items():
        *_, kind = name.rsplit(".", 1)
        if kind == "relative_position_index" and grid:
            wanted: np.ndarray = relative_position_index(grid, grid, cls)
        elif name.endswith("rope_embed.periods") and period:
            places = np.arange(dim // heads // 4)
            wanted = period ** (4 * places / (dim // heads))
        elif kind in ("freqs_cos", "freqs_sin") and side and grid and buffer.shape[:1] == (grid**2,):
            angles = rotary_angles(dim // heads, (grid, grid), side)
            wanted = np.cos(angles) if kind == "freqs_cos" else np.sin(angles)
        else:
            continue
        if buffer.shape != wanted.shape or not np.allclose(np.asarray(buffer, np.float64), wanted, rtol=0.01, atol=0.01):
            of = f"{grid} x {grid} patches" if grid else f"period {period:g}"
            raise ValueError(f"{name} is not that of {of} and {heads} heads: such positions are not read")


def activation(config: Mapping[str, Any], told: Told, facts: Facts, *known: tuple[Any, str]) -> str:
    said = config.get("hidden_act") or config.get("act_layer")
    if "quick_gelu" in config:  # open_clip's
        said = "quick_gelu" if config["quick_gelu"] else "gelu"
    asked = families.asked("the activation of the MLPs (OpenAI's CLIP has quick_gelu, most others gelu)", "--act")
    act = facts("activation", (told.act, "given"), (said, "config.json beside it"), *known, otherwise=asked)
    if act not in ("gelu", "quick_gelu"):
        raise ValueError(f"the activation {shown(act)} is not known: there are gelu and quick_gelu")
    return act


class Taken:
    """Arrays by name, as float32, and which of them were used."""

    def __init__(self, arrays: Arrays):
        self.arrays, self.used = arrays, set[str]()

    def __call__(self, name: str, axes: int = 0, finite: bool = True) -> np.ndarray:
        """Raises ValueError for a tensor that is missing, that has not so many axes, see also `floats`."""
        if name not in self.arrays:
            raise ValueError(f"the tensor {name} is missing")
        self.used.add(name)
        if axes and self.arrays[name].ndim != axes:
            raise ValueError(f"the tensor {name} is {self.arrays[name].shape}, but must have {axes} axes")
        return floats(name, self.arrays[name], finite)

    def rows(self, name: str, width: int) -> np.ndarray:
        """A tensor of so wide rows, [1, rows, width]."""
        array = self(name)
        if not array.size or array.size % width:
            raise ValueError(f"the tensor {name} is {array.shape}, whose numbers are not rows of {width}")
        return array.reshape(1, -1, width)

    def report(self) -> tuple[set[str], list[str], list[str]]:
        """(names that were used, parts that were not and stand beside an encoder, names that are not known)"""
        rest = [name for name in self.arrays if name not in self.used]
        beside = sorted({name.split(".")[0] for name in rest if BESIDE.match(name)})
        return self.used, beside, [name for name in rest if not BESIDE.match(name)]


def floats(name: str, array: np.ndarray, finite: bool = True) -> np.ndarray:
    """As float32. Raises ValueError for a tensor of other numbers, and for NaN and infinity if all must be `finite`."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"the tensor {name} is of {array.dtype}, but weights must be real floating-point numbers")
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if finite and not np.isfinite(array).all():
        raise ValueError(f"the tensor {name} has values that are not finite in float32")
    return array


def scale_and_bias(take: Taken, at: str, to: str) -> dict[str, np.ndarray]:
    return {f"{to}/scale": take(f"{at}weight", 1), f"{to}/bias": take(f"{at}bias", 1)}


def linear(take: Taken, at: str, to: str) -> dict[str, np.ndarray]:
    bias = {f"{to}/bias": take(f"{at}bias", 1)} if f"{at}bias" in take.arrays else {}
    return {f"{to}/kernel": take(f"{at}weight", 2).T} | bias


def block(take: Taken, at: str) -> dict[str, np.ndarray]:
    """Our parameters of a block, from tensors whose names begin with `at`."""
    have = take.arrays
    params = scale_and_bias(take, f"{at}norm1.", "norm1") | scale_and_bias(take, f"{at}norm2.", "norm2")
    for name in ("attn_norm", "ffn_ln"):
        params |= scale_and_bias(take, f"{at}{name}.", name) if f"{at}{name}.weight" in have else {}
    for name, axes in (("gamma_1", 1), ("gamma_2", 1), ("relative_position_bias_table", 2)):
        params |= {name: take(at + name, axes)} if at + name in have else {}

    subln, split = f"{at}ffn_ln.weight" in have, f"{at}q.weight" in have
    if split:
        weights = [take(f"{at}{x}.weight", 2).T for x in "qkv"]
    else:
        weights = np.split(thirds(f"{at}qkv.weight", take(f"{at}qkv.weight", 2)).T, 3, axis=1)
    if subln:
        params |= {f"{x}_proj/kernel": weight for x, weight in zip("qkv", weights)}
    else:
        params["qkv/kernel"] = np.concatenate(weights, axis=1)
    names = [next((n for n in (f"{at}{x}.bias", f"{at}{x}_bias") if n in have), "") for x in "qkv"]
    biases = [take(name, 1) if name else np.zeros(len(weights[0]), np.float32) for name in names]
    if f"{at}qkv.bias" in have:
        fused = take(f"{at}qkv.bias", 1, finite=f"{at}qkv.bias_mask" not in have)
        if f"{at}qkv.bias_mask" in have:  # DINOv3: that of the keys must not be used
            mask = take(f"{at}qkv.bias_mask", 1, finite=False)
            fused = np.where(np.isfinite(mask) & (mask != 0), fused * np.nan_to_num(mask), 0)
            fused = floats(f"{at}qkv.bias", fused)
        biases = np.split(thirds(f"{at}qkv.bias", fused), 3)
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


def thirds(name: str, array: np.ndarray) -> np.ndarray:
    """The same. Raises ValueError if it cannot be that of queries, keys and values."""
    if len(array) % 3:
        raise ValueError(f"the tensor {name} is {array.shape}, which cannot be divided into queries, keys and values")
    return array


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
    names = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else names
    labels = tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    labels = labels if len(labels) == len(flat.get("linear/bias", ())) else ()
    params: Any = {"norm": {}, "linear": {}} | unflatten_dict(flat, sep="/")
    return LinearHead(pool, params["norm"], params["linear"], eps, labels)


def told_of(head: LinearHead) -> list[str]:
    """A line about a classifier, if there is one."""
    pooled = {"cls": "CLS", "mean": "the mean of the patches", "cls+mean": "CLS and the mean of the patches"}[head.pool]
    pooled += ", with a norm" * bool(head.norm)
    return [f"classifier of {head.classes} classes, of {pooled}"] if head.linear else []


def heads_of(
    params: Arrays,
    dim: int,
    config: Mapping[str, Any],
    told: Told,
    inside: Arrays,
    facts: Facts,
    default: tuple[Any, str],
    family: families.Family,
) -> int:
    """The number of heads. Raises ValueError if it is not known, or does not divide the width."""
    tables = [array.shape[-1] for name, array in params.items() if name.endswith("relative_position_bias_table")]
    periods, width = inside.get("rope_embed.periods"), count(config, "head_width")
    by_periods = dim // (4 * periods.size) if periods is not None and periods.size else 0
    released = f"as the released {family.name}s of this width have"
    heads = facts(
        "heads",
        (told.heads, "given"),
        (count(config, "num_attention_heads", "num_heads") or (width and dim // width), "config.json beside it"),
        (tables[0] if tables else by_periods, "the tables of positions"),
        default,
        (family.heads.get(dim, families.HEADS.get(dim)), released),
        otherwise=families.asked(f"the number of heads (the width is {dim})", "--heads"),
    )
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide the width {dim}")
    return heads


def colors(
    config: Mapping[str, Any], channels: int, clip: bool = False, half: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std) of images in 0..1, and a line about them. `clip`, `half`: what they are where no configuration says it.

    Raises ValueError for a configuration that means something else.
    """
    if abs(255 * (number(config, "rescale_factor") or 1 / 255) - 1) > 1e-3:
        raise ValueError(f"config.json: rescale_factor is {config['rescale_factor']}, but images are in 0..1 here")
    if config.get("do_normalize") is False:
        return (0.0,), (1.0,), "images are not normalised, as its configuration says"
    mean, std = (color_of(config, f"image_{name}", name) for name in ("mean", "std"))
    if bool(mean) != bool(std) or not all(std):
        raise ValueError(f"config.json: mean is {shown(mean)} and std {shown(std)}, but both must be given, std above 0")
    if wrong := [color for color in (mean, std) if len(color) not in (0, 1, channels)]:
        raise ValueError(f"config.json: {counted(channels)} cannot be normalised by {len(wrong[0])} numbers, {shown(wrong[0])}")
    if mean and std:
        return mean, std, "images are normalised as its configuration says"
    if clip:
        return *CLIP, "images are normalised as CLIP's"
    if half:
        return *HALF, "images are normalised to -1..1, as in the family's code"
    return *IMAGENET, "images are normalised by ImageNet's mean and std, as in most code: no configuration says it"


def color_of(config: Mapping[str, Any], *keys: str) -> tuple[float, ...]:
    """A number in 0..1 for each channel; () if there is none."""
    key = next((key for key in keys if config.get(key) is not None), "")
    value = config.get(key, [])
    value = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x <= 1 for x in value):
        raise ValueError(f"config.json: {key} is {shown(config[key])}, but must be numbers in 0..1, as pixels are here")
    return tuple(map(float, value))


def for_channels(weights: Weights, channels: int) -> Weights:
    """The same, for images of so many channels; 0: of as many as it has. As timm does it: the kernels of all channels are
    summed for one channel; for several they are repeated in turn, times old / new. Mean and std are averaged or repeated.

    Raises ValueError for a patch embedding of other channels than 1 or 3 that would have to be changed.
    """
    embedding = weights.parts["backbone"]["patch_embed"]
    kernel = embedding["kernel"]
    have = kernel.shape[2]
    if channels < 0:
        raise ValueError(f"channels is {channels}, but must be above 0")
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
    line += f"mean {rounded(mean)}, std {rounded(std)}"
    backbone = weights.parts["backbone"] | {"patch_embed": embedding | {"kernel": kernel}}
    return weights._replace(mean=mean, std=std, parts={"backbone": backbone}, lines=[*weights.lines, line])


def per_channel(color: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Mean or std for so many channels: averaged for one, else repeated in turn."""
    return (float(np.mean(color)),) if channels == 1 else tuple(color[i % len(color)] for i in range(channels))


def counted(channels: int) -> str:
    return f"{channels} channel{'s' * (channels > 1)}"


def rounded(color: tuple[float, ...]) -> str:
    return ", ".join(f"{x:.4g}" for x in color)


def checked(weights: Weights) -> Weights:
    """The same. Raises ValueError for parameters of other shapes than the network has."""
    wanted = jax.eval_shape(lambda: weights.network.init_parts(jax.random.key(0)))
    have, want = (
        flatten_dict(jax.tree.map(np.shape, tree), sep="/") for tree in (weights.parts["backbone"], wanted["backbone"])
    )
    if wrong := [name for name in have | want if have.get(name) != want.get(name)]:
        first = "; ".join(f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'there')}" for name in wrong[:3])
        raise ValueError(f"{len(wrong)} tensors do not fit the network: {first}")
    return weights


# Swin


def swin(inside: Arrays, layout: Layout, config: Mapping[str, Any], told: Told) -> Weights:
    """As `vit`."""
    arrays: Any = {name: array for name, array in inside.items() if not BUFFERS.search(name)}
    arrays = renamed(arrays, SWIN_TRANSFORMERS if layout.name == "transformers" else ())
    for name in [name for name in arrays if re.search(r"\.attn\.q\.", name)]:
        kinds = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if lacking := [kind for kind in kinds if kind not in arrays or not arrays[kind].ndim]:
            raise ValueError(f"the tensor {lacking[0]} is missing or a single number")
        arrays[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([arrays.pop(kind) for kind in kinds])
    if not any(name.startswith("layers.0.downsample.") for name in arrays):  # timm has them at the start of the next stage
        arrays = {
            re.sub(r"^layers\.(\d+)(?=\.downsample\.)", lambda m: f"layers.{int(m[1]) - 1}", n): a for n, a in arrays.items()
        }
    width = arrays["norm.weight"].size if "norm.weight" in arrays else 0
    head = classifier(take := Taken(arrays), width, False, EPS, config)
    arrays = {name: array for name, array in arrays.items() if name not in take.used}
    beside = sorted({name.split(".")[0] for name in arrays if BESIDE.match(name)})
    arrays = {name: floats(name, a) for name, a in arrays.items() if not BESIDE.match(name)}
    stages = 1 + max(int(match[1]) for name in arrays if (match := re.match(r"layers\.(\d+)\.", name)))
    rows = [row for row in simmim.swin(stages) if row.path != "mask_token" or "mask_token" in arrays]
    params, problems = convert.filled(arrays, rows)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit a Swin: {'; '.join(problems[:5])}")
    tables = [params[f"stage_{s}/blocks/plain/relative_position_bias_table"] for s in range(stages)]
    patch, side, channels, dim = params["patch_embed/kernel"].shape
    if patch != side:
        raise ValueError(f"patches of {patch} x {side} pixels are not square")
    windows = [(math.isqrt(t.shape[1]) + 1) // 2 for t in tables]
    for name, index in inside.items():
        if name.endswith("relative_position_index"):
            window = next((w for w in windows if index.shape == (w**2, w**2)), 0)
            if not window or not np.array_equal(index, relative_position_index(window, window, False)):
                raise ValueError(f"{name} is not that of square windows: such positions are not read")
    window = max(windows)
    depths, heads = tuple(2 * len(t) for t in tables), tuple(t.shape[-1] for t in tables)
    agree(
        config,
        (
            (("embed_dim",), dim),
            (("depths",), list(depths)),
            (("num_heads",), list(heads)),
            (("patch_size",), patch),
            (("window_size",), window),
            (("num_channels", "in_chans"), channels),
        ),
    )
    # In a stage whose map is smaller than the windows of others there is one window.
    smallest = min([patch * 2**s * w for s, w in enumerate(windows) if w < window] or [patch * 2 ** (stages - 1) * window])
    images, assumed = sides(config, "image_size", "img_size"), 224 if 224 % smallest == 0 else smallest
    facts, why = Facts(), f"assumed, multiples of {smallest} are as good"
    size = facts("images of", (told.img_size, "given"), (images and max(images), "config.json beside it"), (assumed, why))
    if size % smallest:
        raise ValueError(f"images of {size} pixels cannot be cut into windows of {window} patches: --img_size={smallest} can")
    facts("epsilon", (told.eps, "given"), (number(config, "layer_norm_eps"), "config.json beside it"), (EPS, "known of Swin"))
    if (eps := told.eps or number(config, "layer_norm_eps") or EPS) != EPS:
        raise ValueError(f"the norms have epsilon {eps:g}: those of a Swin here have {EPS:g}")
    if activation(config, told, facts, ("gelu", "known of Swin")) != "gelu":
        raise ValueError("the MLPs of a Swin here have gelu")
    if told.heads not in (0, heads[0]) or told.positions or told.without:
        raise ValueError(f"a Swin whose tables are of {heads} heads cannot have others, other positions, or lack anything")
    settings = dict(
        patch_size=patch,
        img_size=size,
        dim=dim,
        depths=depths,
        heads=heads,
        window=window,
        mlp_ratio=(params["stage_0/blocks/plain/fc1/kernel"].shape[-1] + 1e-3) / dim,
        mask_token="mask_token" in params,
    )
    lines = [
        f"Swin of width {dim}, {depths} blocks of {heads} heads, windows of {window} patches, images of {size}",
        f"not in the tensors: {facts.line}",
        f"{len(arrays)} of {len(arrays)} tensors, {len(inside) - len(arrays)} others and buffers not used"
        + f" ({', '.join(beside)})" * bool(beside),
    ]
    mean, std, whose = colors(config, channels)
    lines += [*told_of(head), whose]
    return Weights(settings, mean, std, {"backbone": unflatten_dict(params, sep="/")}, lines, head)
