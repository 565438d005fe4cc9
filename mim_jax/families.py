"""What is known of vision encoders where no tensor shows it, and what their configurations say.

`Family` has what the released encoders of a family share: what one must hold to be whole, epsilon, the activation, how its
positions are resized. `Facts` keeps who said each of them. `mim_jax.layouts` reads the tensors.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mim_jax.models.positions import sincos_positions

Config = Mapping[str, Any]

PARTS = {  # what an encoder may lack: (what it is, our names of the tensors that show that it is there)
    "cls": ("CLS token", r"cls_token"),
    "positions": ("positions", r"pos_embed|(blocks\.0\.)?relative_position_bias_table"),
    "absolute": ("absolute positions", r"pos_embed"),
    "relative": ("relative positions", r"(blocks\.0\.)?relative_position_bias_table"),
    "registers": ("registers", r"register_tokens"),
    "patch_bias": ("bias of the patch embedding", r"patch_embed\.bias"),
    "pre_norm": ("norm before the blocks", r"norm_pre\.weight"),
    "norm": ("norm after the blocks", r"(norm|fc_norm)\.weight"),
    "q_bias": ("bias of the queries", r"blocks\.0\.(q\.bias|q_bias|qkv\.bias)"),
    "k_bias": ("bias of the keys", r"blocks\.0\.(k\.bias|k_bias|qkv\.bias)"),
    "v_bias": ("bias of the values", r"blocks\.0\.(v\.bias|v_bias|qkv\.bias)"),
    "layerscale": ("LayerScale", r"blocks\.0\.gamma_1"),
    "sub_norm": ("norm inside the MLPs", r"blocks\.0\.ffn_ln\.weight"),
    "attn_norm": ("norm inside the attention", r"blocks\.0\.attn_norm\.weight"),
}
SAYS = (  # a key of a configuration, and the parts that there are if it is true, and need not be if it is false
    ("class_token", "cls"),
    ("num_register_tokens", "registers"),
    ("reg_tokens", "registers"),
    ("num_reg_tokens", "registers"),
    ("pre_norm", "pre_norm"),
    ("qkv_bias", "q_bias v_bias"),
    ("query_bias", "q_bias"),
    ("value_bias", "v_bias"),
    ("init_values", "layerscale"),
    ("layer_scale_init_value", "layerscale"),
    ("scale_mlp", "sub_norm"),
    ("scale_attn_inner", "attn_norm"),
    ("use_abs_pos_emb", "absolute"),
    ("use_absolute_position_embeddings", "absolute"),
    ("use_rel_pos_bias", "relative"),
    ("use_relative_position_bias", "relative"),
    ("use_shared_rel_pos_bias", "relative"),
    ("use_shared_relative_position_bias", "relative"),
)


class Family(NamedTuple):
    """What the released encoders of a family have in common."""

    name: str
    needs: str  # the PARTS without which one is not whole
    eps: float = 1e-6
    resize: str = ""  # how positions are resized, one of `layouts.POSITIONS`; "": it is not known
    act: str = "gelu"  # "": they differ
    heads: Mapping[int, int] = {}  # width -> heads, where they are others than those of HEADS
    types: str = ""  # the values of `model_type` that transformers has for it


# width -> heads: ViT-Ti, S, B, L, H; EVA's g, DINOv2's g, DINOv3's 7B.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 4096: 32}
WHOLE = "cls positions norm patch_bias q_bias k_bias v_bias"
VIT = Family("ViT", WHOLE)
MAE = Family("MAE", WHOLE, resize="size")
MOCO_V3 = Family("MoCo v3", WHOLE, heads={384: 12})
DINO = Family("DINO", WHOLE, resize="dino")
DINOV2 = Family("DINOv2", f"{WHOLE} layerscale", resize="dino")
DINOV2_REGISTERS = Family("DINOv2 with registers", f"{WHOLE} layerscale registers", resize="antialiased")
DINOV3 = Family("DINOv3", "cls norm patch_bias layerscale registers", 1e-5, heads={1280: 20})
DINOV3_BIASED = DINOV3._replace(needs=f"{DINOV3.needs} q_bias v_bias")
BEIT = Family("BEiT", "cls positions norm patch_bias q_bias v_bias", resize="size")
EVA = BEIT._replace(name="EVA")
EVA02 = BEIT._replace(name="EVA-02")
CLIP = Family("CLIP", "cls positions norm pre_norm q_bias k_bias v_bias", 1e-5, "antialiased", act="")
OF_TRANSFORMERS = {
    "vit": Family("ViT", WHOLE, 1e-12, "size", types="vit vit_mae vit_msn"),
    "dinov2": DINOV2._replace(resize="size", types="dinov2 dinov2_with_registers"),
    "dinov2_registers": DINOV2_REGISTERS._replace(types="dinov2_with_registers"),
    "dinov3": DINOV3_BIASED._replace(types="dinov3_vit"),
    "beit": BEIT._replace(needs=f"{BEIT.needs} layerscale", eps=1e-12, types="beit data2vec-vision"),
    "clip": CLIP._replace(resize="size", types="clip clip_vision_model"),
}
DEFAULTS: dict[str, dict[str, Any]] = {  # what a configuration of transformers may leave out, by its model_type
    "vit": {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "dinov2": {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
    "dinov3_vit": {"num_attention_heads": 6, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "rope_theta": 100.0},
    "beit": {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "use_mean_pooling": True},
    "clip_vision_model": {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "swin": {"layer_norm_eps": 1e-5, "hidden_act": "gelu"},
}
DEFAULTS |= {"vit_mae": DEFAULTS["vit"], "vit_msn": DEFAULTS["vit"] | {"layer_norm_eps": 1e-6}}
DEFAULTS |= {"data2vec-vision": DEFAULTS["beit"], "clip": DEFAULTS["clip_vision_model"]}
DEFAULTS["dinov2_with_registers"] = DEFAULTS["dinov2"] | {"num_register_tokens": 4}
OUTSIDE = ("model_type", "image_mean", "image_std", "do_normalize", "rescale_factor")  # of a nested configuration
DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}  # of timm's architectures, by a word in their names


def parts_of(names: Iterable[str]) -> set[str]:
    """The PARTS that there are, from our names of the tensors."""
    names = list(names)
    return {part for part, (_, shown_by) in PARTS.items() if any(re.fullmatch(shown_by, name) for name in names)}


def family_of(
    library: str,
    embedding: str,
    names: Collection[str],
    ours: Collection[str],
    config: Config,
    prefix: str = "",
    fixed: str = "",
    gated: bool = False,
) -> Family:
    """The family that names tell.

    Args:
      library: "transformers", "OpenAI", or "official or timm", which have the same names.
      embedding: the name of the patch embedding.
      names: of all tensors in the file. ours: our names of the encoder's tensors.
      prefix: what the encoder's names begin with.
      fixed: see `fixed_table`. gated: whether the MLPs are.
    """

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    parts = parts_of(ours)
    if library == "OpenAI":
        return CLIP
    if library == "transformers":
        kind = (
            "clip"
            if "patch_embedding." in embedding
            else "dinov3"
            if "projection" not in embedding
            else "dinov2"
            if has(r"\.norm1\.")
            else "beit"
            if "relative" in parts or "layerscale" in parts or ("v_bias" in parts and "k_bias" not in parts)
            else "vit"
        )
        return OF_TRANSFORMERS["dinov2_registers" if kind == "dinov2" and "registers" in parts else kind]
    if has(r"(^|\.)(storage_tokens|rope_embed\.periods)$|\.bias_mask$"):
        return DINOV3_BIASED
    rotary = config.get("rope_type") == "dinov3" or "dinov3" in str(config.get("architecture"))
    if rotary or ("registers" in parts and not {"positions", "k_bias"} & parts):
        return DINOV3
    if "pre_norm" in parts or config.get("pre_norm") is True:
        return CLIP
    if has(r"(^|\.)decoder_(embed|pred)\.") or fixed == MAE.name:
        return MAE
    if re.search(r"\b(base|momentum)_encoder\.", prefix) or fixed == MOCO_V3.name:
        return MOCO_V3
    if "relative" in parts:
        return BEIT
    official = has(r"\.mlp\.(w\d|ffn_ln)\.|(^|\.)(mask_token|lm_head\.weight)$")  # names that timm has not
    if "absolute" in parts and "k_bias" not in parts and "registers" not in parts:
        if gated:
            apart = {"blocks.0.q.weight", "blocks.0.w1.weight"} <= set(ours)  # and not in one tensor
            needs = EVA02.needs + " sub_norm" * apart
            return EVA02._replace(needs=needs, resize="size" if official else "antialiased")
        if {"q_bias", "v_bias"} & parts:
            return EVA._replace(resize="size" if official else "")
    if "registers" in parts:
        return DINOV2_REGISTERS
    if "mask_token" in ours and not has(r"(^|\.)masked_embed$"):
        return DINOV2
    if has(r"(^|\.)(masked_embed$|head\.last_layer\.|dino_head\.)"):
        return DINO
    return VIT._replace(resize="antialiased") if prefix.endswith("trunk.") else VIT


def fixed_table(patches: np.ndarray) -> str:
    """Which family does not train its positions [N, D] of a square grid, but has this table: "MAE", "MoCo v3", or ""."""
    side, dim = math.isqrt(len(patches)), patches.shape[1]
    for name, row_first in ((MAE.name, False), (MOCO_V3.name, True)) if side > 1 and dim % 4 == 0 else ():
        if np.allclose(sincos_positions(dim, side, side, row_first)[0, 1:], patches, rtol=0, atol=5e-3):
            return name
    return ""


def needed(family: Family, config: Config) -> set[str]:
    """The parts that an encoder of a family must have, as its configuration says; without one, as all of the family have."""
    needs = set(family.needs.split())
    for key, parts in SAYS:
        if key in config:
            needs = needs | set(parts.split()) if config[key] else needs - set(parts.split())
    if config.get("qkv_bias") is False:
        needs -= {"k_bias"}
    if family.name == BEIT.name and config.get("use_mean_pooling"):
        needs -= {"norm"}  # which is after the mean then
    if False in (config.get("final_norm"), config.get("use_post_transformer_norm")):
        needs -= set() if config.get("fc_norm") or config.get("use_fc_norm") else {"norm"}
    return needs


def whole(parts: set[str], family: Family, config: Config, without: str) -> None:
    """Raises ValueError for an encoder that lacks what it needs, see `needed`. `without`: parts that a person says it has not,
    joined by commas."""
    absent = {part.strip() for part in without.split(",") if part.strip()}
    if wrong := absent - PARTS.keys():
        raise ValueError(f"without={','.join(sorted(wrong))} is not known: there are {', '.join(PARTS)}")
    if wrong := absent & parts:
        raise ValueError(f"without={','.join(sorted(wrong))} was given, but the file has it")
    absent |= {"absolute", "relative"} if "positions" in absent else set()
    if missing := [part for part in PARTS if part in needed(family, config) - parts - absent]:
        what = ", ".join(PARTS[part][0] for part in missing)
        without = f"--without={','.join(missing)}"
        raise ValueError(
            f"it is not whole, as {family.name} is known: it lacks the {what}; if the network has none, say {without}"
        )


class Facts:
    """What no tensor shows, and who says it."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}

    def __call__(self, what: str, *found: tuple[Any, str], otherwise: Exception | None = None) -> Any:
        """The first value in `found`, (value or nothing, who says it). Raises `otherwise` if there is none."""
        value, who = next((pair for pair in found if pair[0]), (None, ""))
        if value is None:
            raise otherwise or asked(what, "")
        self.said.setdefault(who, []).append(f"{what} {value:g}" if isinstance(value, float) else f"{what} {value}")
        return value

    @property
    def line(self) -> str:
        return "; ".join(f"{', '.join(what)} ({who})" for who, what in self.said.items())


def asked(what: str, option: str) -> ValueError:
    return ValueError(f"{what} is in no tensor, and there is no config.json that says it: say {option}=...")


# Configurations


def unwrapped(config: Config) -> dict[str, Any]:
    """What `config.json` of timm or transformers says of the encoder: what is nested in it, and what timm's architecture is."""
    config = dict(config)
    for key in ("vision_config", "backbone_config"):
        if config.get(key):
            kept = {name: value for name, value in config.items() if name in OUTSIDE}
            config = kept | section(config, key)
    args, of_weights = section(config, "model_args"), section(config, "pretrained_cfg")
    config = of_architecture(str(config.get("architecture") or "")) | config | args | of_weights
    pixels = config.get("input_size")
    if isinstance(pixels, list) and len(pixels) == 3 and pixels[1] != pixels[2] and "img_size" not in config:
        config["img_size"] = pixels[1:]
    return config


class Seen(NamedTuple):
    """What an encoder is to see of an image. Zeros: nobody says it."""

    crop: float = 0.0  # side of the central square, as a share of the short side
    size: int = 0  # side of what the square becomes, in pixels
    canvas: int = 0  # larger images are reduced to it before, see `pretrained.Model`


def seen(config: Config, processor: Config) -> Seen:
    """As `mim_jax.export` says it; else the crop.

    timm says that as `crop_pct`. transformers makes the short side as long as `size` and cuts out `crop_size`, or makes the
    whole image square: then it is 1.
    """
    ours = config.get("mim_jax_seen")
    if isinstance(ours, dict) and [type(ours.get(name)) for name in Seen._fields] == [float, int, int]:
        return Seen(*(max(0, ours[name]) for name in Seen._fields))
    inside = config.get("pretrained_cfg")
    said: list[Any] = [found.get("crop_pct") for found in (processor, inside if isinstance(inside, dict) else {}, config)]
    size, cut = processor.get("size"), processor.get("crop_size")
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    side = cut.get("height") if isinstance(cut, dict) else cut
    if processor.get("do_center_crop", cut is not None) and type(short) is type(side) is int and short > 0:
        said.append(side / short)
    elif size:
        said.append(1.0)
    return Seen(next((float(x) for x in said if type(x) in (int, float) and 0 < x <= 1), 0.0))


def section(config: Config, key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"config.json: {key} is {shown(found)}, but must be an object")
    return found


def of_architecture(name: str) -> dict[str, Any]:
    """What the name of one of timm's architectures says."""
    found: dict[str, Any] = {}
    for key, pattern in (("patch_size", r"_patch(\d+)"), ("reg_tokens", r"_reg(\d+)_"), ("window_size", r"_window(\d+)")):
        if match := re.search(pattern, name):
            found[key] = int(match[1])
    size = re.match(r"(vit|deit|deit3|beit|beitv2|eva|eva02)_(tiny|small|base|large|huge)_", name)
    if size and not re.search(r"_\d+x\d", name):
        found["depth"] = DEPTHS[size[2]]
    if re.search(r"^vit_.*dinov2", name):
        found["init_values"] = 1e-5
    if re.search(r"^vit_.*_clip_", name):
        found |= {"pre_norm": True, "act_layer": "quick_gelu" if "quickgelu" in name else "gelu"}
    return found


def number(config: Config, *keys: str) -> float:
    """The first of these that it has; 0 if none. Raises ValueError for what is not a number above 0."""
    for key in keys:
        if (value := config.get(key)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"config.json: {key} is {shown(value)}, but must be a number above 0")
        return float(value)
    return 0.0


def count(config: Config, *keys: str) -> int:
    """As `number`, for whole numbers."""
    if (value := number(config, *keys)) != int(value):
        raise ValueError(f"config.json: {' or '.join(key for key in keys if key in config)} is {value:g}, but must be whole")
    return int(value)


def sides(config: Config, *keys: str) -> tuple[int, int] | None:
    """(height, width) of the first of these that it has, a number, a pair or {"height": 2, "width": 3}; None if none."""
    for key in keys:
        if (value := config.get(key)) is None:
            continue
        pair = [value.get("height"), value.get("width")] if isinstance(value, dict) else value
        pair = pair if isinstance(pair, (list, tuple)) else [pair, pair]
        if len(pair) != 2 or not all(isinstance(n, (int, float)) and n > 0 and n == int(n) for n in pair):
            raise ValueError(f"config.json: {key} is {shown(value)}, but must be a number of pixels, or two")
        return int(pair[0]), int(pair[1])
    return None


def agree(config: Config, found: Iterable[tuple[tuple[str, ...], Any]]) -> None:
    """Raises ValueError for a configuration of another encoder: `found` has, for each quantity, the keys that it may have and
    what the tensors show. The first key that the configuration has counts."""
    wrong = []
    for keys, here in found:
        key = next((key for key in keys if config.get(key) is not None), "")
        there = config.get(key)
        if isinstance(there, (list, tuple, dict)) and isinstance(here, int):
            there = (sides(config, key) or (0,)) if key in ("patch_size", "window_size") else there
            there = there[0] if isinstance(there, tuple) and len(set(there)) == 1 else there
        if key and (list(there) if isinstance(there, (list, tuple)) else there) != here:
            wrong.append(f"{key} is {shown(there)} there, {shown(here)} in the tensors")
    if wrong:
        raise ValueError(f"config.json is of another encoder, or the file is not whole: {'; '.join(wrong)}")


def shown(value: Any) -> str:
    """A value of a configuration in a few characters."""
    text = repr(value)
    return text if len(text) < 50 else f"{text[:47]}..."
