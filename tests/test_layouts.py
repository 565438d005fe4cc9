"""Encoders in the layouts of timm, transformers, open_clip and official repositories, against activations of these."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from conftest import GOLDEN
from pictures import picture
from PIL import Image

import mim_jax
from mim_jax import journal, layouts, learned, weight_files
from mim_jax.config import resolve_encoder
from mim_jax.convert import __main__ as convert_command
from mim_jax.layouts import Told
from mim_jax.models import vit
from mim_jax.models.positions import relative_position_index, sincos_positions
from mim_jax.models.swin import Swin
from mim_jax.state import abstract_state

NAMES = sorted(str(path.relative_to(GOLDEN / "weights"))[:-4] for path in (GOLDEN / "weights").glob("*/*.npz"))
QUICK = "timm/vit_dinov2_reg_swiglu timm/dinov3_plus timm/eva02_clip timm/vit_no_qkv_bias_clsless hf/beit hf/vit_eps_trap "
QUICK += "hf/swin_simmim hf/vitmae_pretraining official/dinov3_backbone"


def of(golden, name, **told):
    """(state dict, other arrays, weights) of a golden model, read as a file of it would be."""
    arrays, meta = golden(f"weights/{name}")
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    config = {} if name.startswith("official") else meta.get("config") or {}
    if name.startswith("official"):
        told = {"heads": meta.get("heads") or 0} | told
    elif name.startswith("clip"):
        told = {"heads": meta["heads"]} | told
    if name == "official/dino_backbone":  # which is as timm's, but for images of another size
        told = {"positions": "dino"} | told
    return state, arrays, layouts.encoder(state, config, Told(**told))


def latents(weights, images, noise, wanted):
    """MAE's encoder: the visible patches are those of the smallest noise, in this order."""
    order = np.argsort(noise, axis=1)
    visible = wanted.shape[1] - 1
    mask = np.ones(noise.shape, bool)
    np.put_along_axis(mask, order[:, :visible], False, axis=1)
    net = weights.network.backbone.clone(mask_token=False)
    params = jax.tree.map(jnp.asarray, weights.parts["backbone"])
    (out,) = jax.jit(lambda p, x: net.apply({"params": p}, [x], masks=[mask[:, None]], visible=visible))(
        params, images[:, None]
    )
    place = np.argsort(np.argsort(order[:, :visible], axis=1), axis=1)  # of each in the order of the image
    patch = np.take_along_axis(np.asarray(out["patch"][:, 0]), place[..., None], axis=1)
    return np.concatenate([out["cls"], patch], axis=1)


def activations(weights, images, mask=None):
    """{"embedded", "after_block_0", "before_norm" and "normed": [B, T, D]}; CLS first where there is one."""
    net = weights.network.backbone
    params = jax.tree.map(jnp.asarray, weights.parts["backbone"])
    apply = jax.jit(lambda p, x, m: net.apply({"params": p}, [x], masks=None if m is None else [m], mutable="intermediates"))
    (out,), variables = apply(params, images[:, None], mask)
    tokens = [out[name][:, 0] for name in ("registers", "patch") if name in out]
    if getattr(net, "cls", False):
        tokens = [out["cls"], *tokens]
    found = {"normed": jnp.concatenate(tokens, axis=1), "cls": out["cls"][:, 0]}
    if not isinstance(net, Swin):
        sown = variables["intermediates"]
        blocks = sown["blocks"]["tokens"][0]
        found |= {"embedded": sown["tokens"][0], "after_block_0": blocks[0], "before_norm": blocks[-1]}
    return found


SAME = {  # what a library calls it: what we call it
    "after_ln_pre": "embedded",
    "before_ln_post": "before_norm",
    "tokens": "normed",
    "tokens_masked": "normed",
    "tokens_not_normed": "normed",
    "trunk_tokens": "normed",
    "forward_features": "normed",
    "last_hidden_state": "normed",
}


def errors(name, state, arrays, weights):
    """{(size, what): the largest difference} at the native size and at another, oblong one; values are of about 1 to 10."""
    found = {}
    for size in ("native", "other"):
        if f"in/{size}" not in arrays:
            continue
        images = (arrays[f"in/{size}"].astype(np.float32).transpose(0, 2, 3, 1) - 127.5) / 64
        given = {key.split("/")[2]: array for key, array in arrays.items() if key.startswith(f"out/{size}/")}
        mask = None if name.startswith("official") else arrays.get(f"in/{size}_mask")  # their "tokens" are of whole images
        noise = arrays.get(f"in/{size}_noise")
        if noise is not None and "latent" in given:
            found[size, "latent"] = np.abs(latents(weights, images, noise, given["latent"]) - given["latent"]).max()
            continue
        got = activations(weights, images, None if mask is None else jnp.asarray(mask[:, None], bool))
        for key, wanted in given.items():
            if key not in SAME and key not in got or key == "tokens_masked":
                continue
            ours = got[SAME.get(key, key)]
            if key == "last_hidden_state" and getattr(weights.network.backbone, "pre_norm", False):
                ours = got["before_norm"]  # CLIP's is not normalised
            if name == "hf/beit_mim" and key == "before_norm":
                ours = got["normed"]  # before the second of its two norms
            if noise is not None:  # MAE's order
                restore = given["ids_restore"][..., None].astype(int)
                wanted = np.concatenate([wanted[:, :1], np.take_along_axis(wanted[:, 1:], restore, axis=1)], axis=1)
            found[size, key] = np.abs(ours - wanted.reshape(ours.shape)).max()
        if "reconstruction" in given and mask is not None:
            patch = got["normed"] if name == "hf/swin_simmim" else got["normed"][:, -mask.shape[1] :]
            pixels = patch @ state["decoder.0.weight"][:, :, 0, 0].T + state["decoder.0.bias"]
            grid, side = int(patch.shape[1] ** 0.5), int((pixels.shape[-1] // 3) ** 0.5)
            pixels = pixels.reshape(-1, grid, grid, 3, side, side).transpose(0, 3, 1, 4, 2, 5)
            found[size, "reconstruction"] = np.abs(
                pixels.reshape(given["reconstruction"].shape) - given["reconstruction"]
            ).max()
        if "logits" in given and "classifier.weight" in state:
            logits = got["cls"] @ state["classifier.weight"].T + state["classifier.bias"]
            found[size, "logits"] = np.abs(logits - given["logits"]).max()
    return found


@pytest.mark.parametrize("name", [n if n in QUICK.split() else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_activations(golden, name):
    found = errors(name, *of(golden, name))
    assert found and max(found.values()) < 2e-5, found


HF = [name for name in NAMES if name.startswith("hf/")]


@pytest.mark.parametrize("name", HF)
def test_names_in_memory(golden, name):
    """`state_dict()` of transformers 5 has other names than its files."""
    state, _, weights = of(golden, name)
    _, meta = golden(f"weights/{name}")
    changed = meta["in_memory_names"]
    if not isinstance(changed, dict):
        pytest.skip("one generation of names")
    moved = [source if isinstance(source, str) else source[0] for source in changed.values()]
    memory = {key: array for key, array in state.items() if key not in moved}
    for key, source in changed.items():
        part = slice(None) if isinstance(source, str) or isinstance(source[1], str) else slice(*source[1:])
        memory[key] = state[source if isinstance(source, str) else source[0]][part]
    again = layouts.encoder(memory, meta["config"])
    assert again.network == weights.network
    jax.tree.map(np.testing.assert_array_equal, again.parts, weights.parts)


def test_what_is_said(golden):
    _, _, weights = of(golden, "official/mae_full")
    assert weights.lines == [
        "recognised: official or timm names",
        "ViT of width 32, 2 blocks of 2 heads, patches of 8 pixels, images of 32",
        "not in the tensors: heads 2 (given); epsilon 1e-06, activation gelu (known of MAE)",
        "30 of 50 tensors; heads and other parts not used: decoder, decoder_blocks, decoder_embed, decoder_norm, "
        "decoder_pos_embed, decoder_pred",
        "positions 4 x 4, at another size resized by a bicubic (known of MAE)",
        "images are normalised by ImageNet's mean and std, as in most code: no configuration says it",
        "the released weights of MAE are CC BY-NC 4.0",
    ]


@pytest.mark.parametrize(
    "file, encoder, chosen, others",
    [
        ("dino_full_checkpoint.pth", "", "teacher.backbone.", "student.module.backbone."),
        ("dino_full_checkpoint.pth", "student", "student.module.backbone.", "teacher.backbone."),
        ("mocov3_base_encoder.pth", "", "module.base_encoder.", "module.momentum_encoder."),
        ("dinov2_teacher_omegaconf.pth", "", "teacher.backbone.", ""),
        ("lightning.ckpt", "", "state_dict.model.backbone.", ""),
        ("mae_model_args.pth", "", "model.", ""),
        ("sharded", "", "", ""),
    ],
)
def test_encoders_inside_files(file, encoder, chosen, others):
    weights = layouts.read(GOLDEN / "weights" / file, Told(heads=2, encoder=encoder))
    assert (f'of the tensors "{chosen}..."' in weights.lines[0]) == bool(chosen)
    assert (f"there are also '{others}'" in weights.lines[0]) == bool(others)
    blocks = weights.parts["backbone"]["blocks"]
    assert blocks["qkv"]["kernel"].shape == (2, 16, 48) and blocks["qkv"]["kernel"].dtype == np.float32
    given = weight_files.flat(weight_files.read(GOLDEN / "weights" / file))
    name = next(name for name in given if name.startswith(chosen) and re.search(r"blocks\.(0\.)?1\.attn\.proj\.weight", name))
    np.testing.assert_array_equal(blocks["proj"]["kernel"][1], given[name].T)


def test_a_moving_average_is_taken_first(golden):
    state, _, _ = of(golden, "official/dino_backbone")
    both = {f"{at}.{key}": array for at in ("model", "model_ema") for key, array in state.items()}
    assert 'of the tensors "model_ema...."' in layouts.encoder(both, {}, Told(heads=2)).lines[0]
    two = {f"{at}.{key}": array for at in ("first", "second") for key, array in state.items()}
    with pytest.raises(ValueError, match=r"several encoders: choose with --encoder=\.\.\. one of 'first.', 'second.'"):
        layouts.encoder(two, {}, Told(heads=2))


@pytest.mark.parametrize(
    "name, told, changes, message",
    [
        ("official/dino_backbone", {"heads": 0}, {}, r"the number of heads \(the width is 32\) is in no tensor.* --heads"),
        ("official/dino_backbone", {"heads": 5}, {}, "5 heads do not divide the width 32"),
        ("official/dino_backbone", {"heads": -2}, {}, "heads is -2, but must be a whole number above 0"),
        ("official/dino_backbone", {"eps": float("nan")}, {}, "eps is nan, but must be a number above 0"),
        ("official/dino_backbone", {"channels": -1}, {}, "channels is -1, but must be a whole number above 0"),
        ("official/dino_backbone", {"img_size": 40}, {}, "img_size is 40, but the encoder is for 32"),
        ("official/dino_backbone", {"without": "cls"}, {}, "without=cls was given, but the file has it"),
        ("official/dino_backbone", {"without": "tail"}, {}, "without=tail is not known: there are cls, positions"),
        ("official/beit_finetuned", {"positions": "dino"}, {}, "positions=dino is said of learned positions, which"),
        ("official/dino_backbone", {}, {"blocks.0.attn.qkv.weight": (96,)}, r"qkv.weight is \(96,\), but must have 2 axes"),
        ("official/dino_backbone", {}, {"blocks.0.attn.qkv.weight": ()}, r"qkv.weight is \(\), but must have 2 axes"),
        ("official/dino_backbone", {}, {"blocks.0.attn.qkv.weight": (95, 32)}, "cannot be divided into queries, keys and"),
        ("official/dino_backbone", {}, {"cls_token": (31,)}, "cls_token is .31,., whose numbers are not rows of 32"),
        ("hf/swin", {}, {"encoder.layers.0.blocks.0.attention.self.key.weight": None}, "attn.k.weight is missing or a single"),
        ("official/simmim_swin", {"heads": 4}, {}, r"whose tables are of \(2, 4\) heads cannot have others"),
        ("official/simmim_swin", {"img_size": 40}, {}, "40 pixels cannot be cut into windows of 4 patches: --img_size=16 can"),
        ("official/eva_mim", {}, {"blocks.1.attn.q_bias": None}, "only one of 0 and 1 has the bias of the queries"),
        ("official/eva_mim", {}, {"blocks.0.attn.v_bias": None}, "only one of 0 and 1 has the bias of the values"),
        ("official/dino_backbone", {}, {"blocks.1.norm2.bias": None}, "the tensor blocks.1.norm2.bias is missing"),
        ("official/dino_backbone", {}, {"blocks.1.adapter.weight": (3,)}, "1 tensors are not known: blocks.1.adapter.weight"),
        ("official/dino_backbone", {}, {"pos_embed": (1, 13, 32)}, "13 positions are not those of a square grid"),
        ("official/dino_backbone", {}, {"blocks.1.attn.proj.weight": (32, 30)}, "the blocks do not have the same shapes"),
        ("official/dino_backbone", {}, {"norm.bias": (31,)}, r"1 tensors do not fit the network: norm/bias is \(31,\), not"),
        ("official/simmim_swin", {"eps": 1e-6}, {}, "the norms have epsilon 1e-06: those of a Swin here have 1e-05"),
        ("official/dino_backbone", {}, {"patch_embed.proj.weight": (32, 3, 8, 4)}, "8 x 4 pixels are not square"),
        ("official/dino_backbone", {}, {"patch_embed.proj.weight": (32, 4, 8, 8)}, "is for 4 channels, not 3: only one"),
        ("official/dino_backbone", {}, {"patch_embed.proj.weight": None}, "there is no vision encoder of a known layout"),
        ("official/dino_backbone", {"encoder": "student."}, {}, "no encoder's names begin with 'student.': there are ''"),
        ("official/beit_finetuned", {}, {f"blocks.{i}.attn.relative_position_bias_table": (41, 2) for i in (0, 1)},
         "a table of 41 relative positions is not that of a square grid of patches with CLS"),
        ("official/simmim_swin", {}, {"layers.0.blocks.1.norm1.bias": (16,)}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(golden, name, told, changes, message):
    arrays, meta = golden(f"weights/{name}")
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    for key, shape in changes.items():
        if shape is None:
            del state[key]
        else:
            state[key] = np.zeros(shape, np.float32)
    told = Told(**({"heads": meta.get("heads") or 0} | told))
    if message is None:  # a second encoder beside, without a patch embedding
        assert layouts.encoder(state, {}, told).lines[1] == "not read: decoder.0 (2), layers.0 (1)"
        return
    with pytest.raises(ValueError, match=message):
        layouts.encoder(state, {}, told)


@pytest.mark.parametrize("name", ["official/dino_backbone", "official/simmim_swin"])
def test_channels(golden, name):
    """As timm's `adapt_input_conv`; and what it means for images: six channels that repeat three, and greys, are the same."""
    state, _, rgb = of(golden, name)
    kernel = rgb.parts["backbone"]["patch_embed"]["kernel"]
    grey, six = (of(golden, name, channels=channels)[2] for channels in (1, 6))
    np.testing.assert_allclose(grey.parts["backbone"]["patch_embed"]["kernel"], kernel.sum(2, keepdims=True))
    np.testing.assert_allclose(six.parts["backbone"]["patch_embed"]["kernel"][:, :, 4], kernel[:, :, 1] / 2)
    assert six.mean == rgb.mean * 2 and grey.mean == (pytest.approx(np.mean(rgb.mean)),) and len(grey.std) == 1
    assert "for 3 channels became one for 6: repeated in turn and times 3/6, as timm does; mean 0.485, 0.456" in six.lines[-1]
    images = np.random.default_rng(0).random((1, *[rgb.settings["img_size"]] * 2, 3)).astype(np.float32)
    want, got = (w.network.features(w.parts, jnp.tile(images, (1, 1, 1, n))) for w, n in ((rgb, 1), (six, 2)))
    np.testing.assert_allclose(got["patch"], want["patch"], atol=1e-5)

    key = next(key for key in state if key.endswith("patch_embed.proj.weight"))
    one = state | {key: state[key].sum(1, keepdims=True)}
    told = Told(heads=2 if "dino" in name else 0)
    assert of(lambda _: ({f"sd/{k}": v for k, v in one.items()}, {"heads": 2}), name, channels=0)[2].mean == grey.mean
    again = layouts.encoder(one, {}, told)
    np.testing.assert_allclose(again.parts["backbone"]["patch_embed"]["kernel"][:, :, 2], kernel.sum(2) / 3, rtol=1e-6)
    assert again.mean == grey.mean * 3


def state_of(golden, name):
    arrays, meta = golden(f"weights/{name}")
    return {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}, meta.get("config") or {}


@pytest.mark.parametrize("name", ["clip/open_clip_gelu", "hf/clip_vision", "timm/vit_clip_gelu"])
def test_the_activation_is_asked_for(golden, name):
    state, _ = state_of(golden, name)
    with pytest.raises(ValueError, match=r"the activation of the MLPs .* is in no tensor.*: say --act=\.\.\."):
        layouts.encoder(state, {}, Told(heads=2))
    assert layouts.encoder(state, {}, Told(heads=2, act="quick_gelu")).settings["act"] == "quick_gelu"


TAKEN = {  # of what, with its config.json or not; names of the tensors that are taken away; what is said to be lacking
    ("hf/dinov2", True): {
        r"^layernorm": "norm after the blocks",
        r"layer\.1\.": "num_hidden_layers is 2 there, 1 in the tensors",
        "position_embeddings": "positions",
        "layer_scale": "LayerScale",
        r"projection\.bias": "bias of the patch embedding",
    },
    ("hf/dinov2_registers", True): {"cls_token": "CLS token", "register_tokens": "registers"},
    ("hf/vit", True): {r"(query|key|value)\.bias": "bias of the queries, bias of the keys, bias of the values"},
    ("hf/beit", True): {r"(query|value)\.bias": "bias of the queries, bias of the values"},
    ("hf/clip_vision", True): {"pre_layrnorm": "norm before the blocks"},
    ("hf/dinov3", True): {"register_tokens": "registers", r"v_proj\.bias": "bias of the values"},
    ("timm/dinov3", True): {"^norm": "norm after the blocks", "reg_token": "registers"},
    ("timm/eva02_clip", True): {r"attn\.norm": "norm inside the attention"},
    ("official/eva02_mim", False): {"ffn_ln": "norm inside the MLPs"},
    ("official/dinov2_backbone", False): {
        r"^norm\.": "norm after the blocks",
        "^cls_token": "CLS token",
        "^pos_embed": "positions",
        r"qkv\.bias": "bias of the queries, bias of the keys, bias of the values",
        r"\.ls1\.": "LayerScale",
    },
    ("official/dinov2_reg_backbone", False): {"^pos_embed": "positions"},
    ("official/dino_backbone", False): {r"proj\.bias": "bias of the patch embedding", "cls_token": "CLS token"},
    ("official/beit_finetuned", False): {r"\.(q|v)_bias": "bias of the queries, bias of the values"},
    ("timm/vit_no_qkv_bias_clsless", False): {"none": "CLS token, bias of the queries, bias of the keys, bias of the values"},
    ("official/ibot_backbone", False): {r"blocks\.0\.": "block 0 of 2 is missing"},
    ("timm/swin", True): {r"layers\.1\.": r"2 there|misshapen: norm.weight"},
}


@pytest.mark.parametrize(
    "name, with_config, gone, lacking", [(*key, *pair) for key, all in TAKEN.items() for pair in all.items()]
)
def test_a_file_that_is_not_whole(golden, name, with_config, gone, lacking):
    state, config = state_of(golden, name)
    fewer = {key: array for key, array in state.items() if not re.search(gone, key)}
    with pytest.raises(ValueError, match=lacking):
        layouts.encoder(fewer, config if with_config else {}, Told(heads=0 if "swin" in name else 2))


def test_what_a_network_does_not_have_can_be_said(golden):
    state, config = state_of(golden, "timm/vit_no_qkv_bias_clsless")
    told = Told(heads=2, without="cls,q_bias,k_bias,v_bias", positions="antialiased")
    assert layouts.encoder(state, {}, told).network == layouts.encoder(state, config).network


def test_where_it_comes_from(golden):
    """Heads, epsilon, the activation: a person, config.json, the tables, transformers' defaults, or the family."""
    beit, clip = state_of(golden, "official/beit_finetuned")[0], state_of(golden, "hf/clip_vision")[0]
    (line,) = [line for line in layouts.encoder(beit, {"layer_norm_eps": 1e-5}).lines if line.startswith("not in")]
    assert line.startswith("not in the tensors: heads 2 (the tables of positions); epsilon 1e-05 (config.json beside it); ")
    assert line.endswith("; activation gelu (known of BEiT)")
    (line,) = [
        line
        for line in layouts.encoder(clip, {"vision_config": {"model_type": "clip_vision_model"}}, Told(heads=2)).lines
        if line.startswith("not in")
    ]
    assert "heads 2 (given); epsilon 1e-05, activation quick_gelu (transformers' default for clip_vision_model)" in line


def wide(state, dim):
    """Tensors of the names of a golden model of width 32, of another width."""
    shapes = {key: [{32: dim, 96: 3 * dim}.get(n, n) for n in array.shape] for key, array in state.items()}
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


def test_heads_of_families(golden, monkeypatch):
    """MoCo v3's ViT-S has 12 heads, others of its width have 6; DINOv3's H+ has 20, other ViT-H have 16."""
    monkeypatch.setattr(layouts, "checked", lambda weights: weights)
    dino, v3 = state_of(golden, "official/dino_backbone")[0], state_of(golden, "timm/dinov3_plus")[0]
    moco = {f"module.base_encoder.{key}": array for key, array in wide(dino, 384).items()}
    states = {3: wide(dino, 192), 6: wide(dino, 384), 12: moco, 16: wide(dino, 1280), 20: wide(v3, 1280)}
    found = {heads: layouts.encoder(state) for heads, state in states.items()}
    assert {heads: weights.settings["heads"] for heads, weights in found.items()} == {n: n for n in found}
    assert "heads 12 (as the released MoCo v3s of this width have)" in found[12].lines[2]
    assert "CC BY-NC" in found[12].lines[-1] and "DINOv3 License" in found[20].lines[-1]
    with pytest.raises(ValueError, match=r"the number of heads \(the width is 1664\)"):
        layouts.encoder(wide(dino, 1664))


@pytest.mark.parametrize("row_first, owner, resize", [(False, "MAE", True), (True, "MoCo v3", False)])
def test_an_encoder_is_known_by_its_fixed_table(golden, row_first, owner, resize):
    state, _ = state_of(golden, "official/dino_backbone")
    state["pos_embed"] = sincos_positions(32, 4, 4, row_first).astype(np.float16)
    weights = layouts.encoder({f"model.{key}": array for key, array in state.items()}, {}, Told(heads=2))
    assert weights.lines[-1] == f"the released weights of {owner} are CC BY-NC 4.0"
    assert weights.settings["resizable"] == resize and (weights.settings["pos_offset"] == 0) == resize


def test_positions_that_nobody_knows_how_to_resize(golden, tmp_path):
    """Names that DINO and timm share: the native size works, another one is refused, in one line, until it is said."""
    state, _ = state_of(golden, "timm/vit_dino")
    weights = layouts.encoder(state, {}, Told(heads=2))
    assert "for images of 32 only" in weights.lines[4] and "--positions=... --out=DIR" in weights.lines[4]
    weights.save(tmp_path)
    model, images = mim_jax.load(tmp_path), [picture(40, 48)]
    assert model.features(images)["patch"].shape == (1, 16, 32)
    with pytest.raises(ValueError, match="4 x 4 patches are not resized to 6 x 6.*--positions=.*--out=DIR, then name DIR"):
        model.features(images, size=48)
    again = layouts.read(tmp_path, Told(positions="antialiased"))
    assert again.network == of(golden, "timm/vit_dino")[2].network and "antialiased" in again.lines[-1]
    assert "for images of 32 only" not in " ".join(again.lines)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("hf/dinov2", {"hidden_size": 99, "patch_size": 7}, "hidden_size is 99 there, 32 in the tensors; patch_size is 7"),
        ("hf/dinov2", {"image_size": 112}, "grid of image_size is 8 there, 4 in the tensors"),
        ("hf/dinov2", {"image_size": [28, 112]}, "positions for oblong images, 28 x 112 pixels"),
        ("timm/vit_dino", {"img_size": [16, 64]}, "positions for oblong images, 16 x 64 pixels"),
        ("hf/dinov2", {"model_type": "vit"}, "config.json is of vit, but the tensors have the names of the family DINOv2"),
        ("timm/vit_dino", {"architecture": "vit_small_patch16_224.dino", "depth": 12}, "depth is 12 there, 2 in the tensors"),
        ("timm/swin", {"depths": [2, 6], "window_size": 7}, r"depths is \[2, 6\] there, \[2, 2\] in the tensors; window_size"),
        ("hf/dinov2", {"num_attention_heads": [2]}, r"num_attention_heads is \[2\], but must be a number above 0"),
        ("hf/dinov2", {"num_attention_heads": -2}, "num_attention_heads is -2, but must be a number above 0"),
        ("hf/dinov2", {"num_attention_heads": 2.5}, "num_attention_heads is 2.5, but must be whole"),
        ("hf/dinov2", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, but must be"),
        ("hf/dinov2", {"layer_norm_eps": [1e-6]}, "layer_norm_eps is .1e-06., but must be"),
        ("hf/dinov2", {"hidden_act": "gelu_new"}, "the activation 'gelu_new' is not known"),
        ("hf/dinov2", {"image_size": "big"}, "image_size is 'big', but must be a number of pixels"),
        ("hf/dinov2", {"model_args": 5}, "model_args is 5, but must be an object"),
        ("hf/dinov2", {"vision_config": [1]}, r"vision_config is \[1\], but must be an object"),
        (
            "hf/dinov2",
            {"image_mean": [123, 116, 103], "image_std": [58, 57, 57]},
            "image_mean is .123, .*must be numbers in 0..1",
        ),
        ("hf/dinov2", {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]}, "std above 0"),
        ("hf/dinov2", {"image_mean": [0.5] * 3}, "but both must be given"),
        ("hf/dinov2", {"image_mean": [0.5] * 2, "image_std": [0.5] * 2}, "cannot be normalised by 2 numbers"),
        ("hf/dinov2", {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ("timm/vit_dino", {"use_rot_pos_emb": True}, "rotary positions are read of EVA-02 and DINOv3 only"),
    ],
)
def test_configurations_that_are_wrong(golden, name, changes, message):
    state, config = state_of(golden, name)
    with pytest.raises(ValueError, match=message) as error:
        layouts.encoder(state, config | changes)
    assert "\n" not in str(error.value)


def test_configurations_that_are_odd(golden):
    state, config = state_of(golden, "hf/vit_classifier")
    odd = {"id2label": {"a": "b"}, "image_size": {"height": 32, "width": 32}, "image_mean": 0.5, "image_std": 0.25}
    weights = layouts.encoder(state, config | odd)
    assert weights.mean == (0.5,) * 3 and weights.std == (0.25,) * 3 and weights.head.labels == ()
    assert layouts.encoder(state, config | {"do_normalize": False}).std == (1.0,) * 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("5", "config.json is 5, but must be an object"),
        ('{"a":' * 20000 + "1" + "}" * 20000, "is no JSON: maximum recursion"),
        ("{", "is no JSON"),
        (" " * 2**21, "2,097,152 bytes, and is no configuration"),
        ('{"mim_jax_encoder": 5}', "mim_jax_encoder is not as mim_jax writes it"),
    ],
)
def test_files_that_are_no_configuration(golden, tmp_path, text, message):
    (tmp_path / "model.safetensors").write_bytes(weight_files.safetensors(state_of(golden, "hf/dinov2")[0]))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        layouts.read(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name, key, change, message",
    [
        ("official/dino_backbone", "cls_token", lambda a: a + 1j, "cls_token is of complex64, but weights must be real"),
        ("official/dino_backbone", "norm.weight", lambda a: a.astype(np.int8), "norm.weight is of int8"),
        ("official/dino_backbone", "blocks.0.attn.qkv.bias", lambda a: a > 0, "qkv.bias is of bool"),
        ("official/dino_backbone", "norm.weight", lambda a: a * np.nan, "norm.weight has values that are not finite"),
        (
            "official/dino_backbone",
            "norm.weight",
            lambda a: a.astype(float) * 1e300,
            "norm.weight has values that are not finite",
        ),
        ("official/simmim_swin", "encoder.norm.weight", lambda a: a * np.inf, "norm.weight has values that are not finite"),
        ("official/dinov3_backbone", "rope_embed.periods", lambda a: a * 7, "rope_embed.periods is not that of period 100"),
        ("official/eva02_mim", "rope.freqs_cos", lambda a: a[::-1], "rope.freqs_cos is not that of 4 x 4 patches and 2 heads"),
        ("official/simmim_swin", "encoder.layers.0.blocks.0.attn.relative_position_index", lambda a: a.T, "of square windows"),
        (
            "official/beit_finetuned",
            "blocks.0.attn.relative_position_index",
            lambda a: a.T,
            "index is not that of 4 x 4 patches",
        ),
    ],
)
def test_tensors_of_other_numbers(golden, name, key, change, message):
    state, _ = state_of(golden, name)
    if key not in state:  # the golden Swin holds no index
        state[key] = relative_position_index(4, 4, False)
        layouts.encoder(state)
    with pytest.raises(ValueError, match=message):
        layouts.encoder(state | {key: change(state[key])}, {}, Told(heads=0 if "swin" in name else 2))


def test_a_table_of_an_oblong_grid(golden):
    """5 x 13 patches have as many relative positions as 8 x 8: the index that the file holds tells."""
    state, _ = state_of(golden, "official/beit_finetuned")
    state |= {key: np.zeros((228, 2), np.float32) for key in state if key.endswith("bias_table")}
    state |= {key: relative_position_index(5, 13, True) for key in state if key.endswith("position_index")}
    with pytest.raises(ValueError, match="relative_position_index is not that of 8 x 8 patches"):
        layouts.encoder(state)


def test_siglip_is_refused(golden):
    state, _ = state_of(golden, "hf/clip_vision")
    siglip = {key: array for key, array in state.items() if "class_embedding" not in key and "pre_layrnorm" not in key}
    with pytest.raises(ValueError, match="no CLS token where CLIP has one, as SigLIP"):
        layouts.encoder(siglip, {}, Told(heads=2))


def test_a_swin_of_windows_that_224_pixels_have_not(golden):
    """SimMIM's, of 192 pixels, has windows of 6."""
    state, _ = state_of(golden, "official/simmim_swin")
    state = {key: array for key, array in state.items() if not key.endswith("index")}
    state |= {key: np.zeros((121, a.shape[1]), np.float32) for key, a in state.items() if key.endswith("bias_table")}
    weights = layouts.encoder(state)
    assert weights.settings["img_size"] == 24 and "images of 24 (assumed, multiples of 24 are as good)" in weights.lines[3]
    with pytest.raises(ValueError, match="224 pixels cannot be cut into windows of 6 patches: --img_size=24 can"):
        layouts.encoder(state, {}, Told(img_size=224))


def test_our_own_folder(golden, tmp_path):
    for name in ("timm/eva02_clip", "hf/swin", "timm/vit_avg_fcnorm"):
        _, _, weights = of(golden, name)
        weights.save(tmp_path / name)
        again = layouts.read(tmp_path / name)
        assert again._replace(parts={}, head=None) == weights._replace(parts={}, head=None)
        assert again.head._replace(norm={}, linear={}) == weights.head._replace(norm={}, linear={})
        for ours, theirs in ((again.parts, weights.parts), (again.head.params, weights.head.params)):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert layouts.is_weights(tmp_path / name) and not layouts.is_weights(tmp_path)


def test_the_command(capsys, tmp_path):
    command = [sys.executable, "-m", "mim_jax.convert"]
    file = GOLDEN / "weights/backbone.npz"
    done = subprocess.run([*command, file, "--heads=2", f"--out={tmp_path / 'ours'}"], capture_output=True, text=True)
    assert done.returncode == 0 and "30 of 30 tensors\n" in done.stdout, done.stderr
    assert layouts.read(tmp_path / "ours").settings["heads"] == 2
    with pytest.raises(ValueError, match="heads cannot be given: mim_jax has written the file"):
        layouts.read(tmp_path / "ours", Told(heads=4))
    journal.fresh_folder(tmp_path / "new")
    before = (tmp_path / "ours/config.json").read_bytes()
    with pytest.raises(SystemExit) as stop:  # a text is exit code 1
        convert_command.main(["convert", str(file), "--heads=2", f"--out={tmp_path / 'ours'}"])
    assert re.fullmatch("error: .*ours is not empty; give --out a new folder", stop.value.code)
    assert (tmp_path / "ours/config.json").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        convert_command.main(["convert", str(file)])
    assert re.fullmatch("error: .*backbone.npz: the number of heads .*", stop.value.code)


def test_what_other_channels_change(golden, tmp_path, capsys):
    """The command names the images and says how far the features have moved; the folder keeps its channels."""
    of(golden, "official/dino_backbone")[2].save(tmp_path / "rgb")
    for i in range(3):
        Image.fromarray(picture(40, 48, seed=i)).save(tmp_path / f"{i}.png")
    files = ",".join(str(tmp_path / f"{i}.png") for i in range(3))
    convert_command.main(["convert", f"{tmp_path}/rgb", "--channels=1", f"--images={files}", f"--out={tmp_path}/grey"])
    told = capsys.readouterr().out
    found = re.search(r"for 3 channels to those for 1: ([\d.]+) .* as they are, ([\d.]+) \(least.*; of 3 images", told)
    assert 0.5 < float(found[1]) < float(found[2]) < 1, told
    assert len(layouts.read(tmp_path / "grey", Told(channels=0)).mean) == 1
    assert "for 1 channel became one for 3: repeated and times 1/3" in mim_jax.load(tmp_path / "grey").description
    with pytest.raises(ValueError, match="takes images of 1 channels, and those that are read here have 3"):
        mim_jax.load(tmp_path / "grey", channels=0)


def begun(path, variant, **changes):
    """(config, method, state) of a tiny run that begins with a file."""
    config = mim_jax.load_config(f"tests/tiny.py:{variant}")
    config.init_from, config.data.num_examples, config.data.num_classes = str(path), 64, 5
    resolve_encoder(config)
    config.update_from_flattened_dict(changes)
    method = mim_jax.make_method(config)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_state(method, config))
    return config, method, learned.begin_with(method, config, state)


@pytest.mark.parametrize("name, variant", [("hf/dinov2_registers", "supervised"), ("timm/dinov3", "linear")])
def test_a_run_that_begins_with_a_file(golden, tmp_path, name, variant, capsys):
    """Of other settings than any recipe has. The config of the run needs the file no more."""
    _, arrays, weights = of(golden, name)
    weights.save(tmp_path)
    size = weights.settings["img_size"]
    config, method, state = begun(
        tmp_path, variant, **{"model.img_size": size} | ({"model.pool": "cls"} if variant == "supervised" else {})
    )
    images = (arrays["in/native"].astype(np.float32).transpose(0, 2, 3, 1) - 127.5) / 64
    got = vit.features(method.backbone, state.params["backbone"], jnp.asarray(images))
    np.testing.assert_allclose(got["cls"], arrays["out/native/" + ("pooler_output" if "hf" in name else "pooled")], atol=1e-5)
    assert f"initialised from {tmp_path}; recognised: " in capsys.readouterr().err
    again = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
    assert mim_jax.make_method(again).backbone == method.backbone


def test_pretraining_goes_on_from_a_file_of_the_same_network(golden, tmp_path, capsys):
    _, _, weights = of(golden, "official/dino_backbone")
    weights.save(tmp_path)
    same = {
        "model.dim": 32,
        "model.heads": 2,
        "model.depth": 2,
        "model.patch_size": 8,
        "model.img_size": 32,
        "model.mlp_ratio": 2.0,
    }
    same |= {"crops.global_crops_size": 32, "crops.local_crops_size": 16}
    _, _, state = begun(tmp_path, "dino", **same)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params["backbone"], weights.parts["backbone"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.teacher["backbone"], weights.parts["backbone"]))
    assert "params/backbone, teacher/backbone from params; new: head" in capsys.readouterr().err
    with pytest.raises(ValueError, match="heads: 2 there, 4 here"):
        begun(tmp_path, "dino", **same | {"model.heads": 4})
    half = (0.5, 0.5, 0.5)
    begun(tmp_path, "dino", **same | {"data.std": half})  # no configuration says which it is
    assert "std 0.229, 0.224, 0.225 there, 0.5, 0.5, 0.5 here" in capsys.readouterr().err
    weights._replace(mean=half, lines=["images are normalised as its configuration says"]).save(tmp_path)
    with pytest.raises(ValueError, match=r'other images, mean 0.5, .* here: set --config.data.mean="\(0.5, 0.5, 0.5\)"$'):
        begun(tmp_path, "dino", **same)
    begun(tmp_path, "dino", **same | {"data.mean": half})
    weights._replace(settings=weights.settings | {"norm_eps": 1e-12}).save(tmp_path)
    with pytest.raises(ValueError, match="epsilon 1e-12, those of this method 1e-06: .* --eps=1e-06 --out=DIR` writes$"):
        begun(tmp_path, "dino", **same)
    weights.save(tmp_path)
    with pytest.raises(ValueError, match="(?s)another model.*blocks/fc1/kernel"):
        begun(tmp_path, "dino", **same | {"model.mlp_ratio": 4.0})
