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
from mim_jax import layouts, learned, weight_files
from mim_jax.config import resolve_encoder
from mim_jax.layouts import Told
from mim_jax.models import vit
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
        "ViT of width 32, 2 blocks of 2 heads, patches of 8 pixels, images of 32; epsilon 1e-06, as in the family's code",
        "30 of 50 tensors; heads and other parts not used: decoder, decoder_blocks, decoder_embed, decoder_norm, "
        "decoder_pos_embed, decoder_pred",
        "positions 4 x 4, at another size resized by a bicubic",
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
    with pytest.raises(ValueError, match="several encoders: choose with --encoder one of 'first.', 'second.'"):
        layouts.encoder(two, {}, Told(heads=2))


@pytest.mark.parametrize(
    "name, told, changes, message",
    [
        ("official/dino_backbone", {"heads": 0}, {}, r"the number of heads \(the width is 32\) is in no tensor.* --heads"),
        ("official/dino_backbone", {"heads": 5}, {}, "5 heads do not divide the width 32"),
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


def test_the_activation_is_asked_for(golden):
    arrays, meta = golden("weights/clip/open_clip_gelu")
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    with pytest.raises(ValueError, match="the activation of the MLPs .* is in no tensor.* --act"):
        layouts.encoder(state, {}, Told(heads=2))
    assert layouts.encoder(state, {}, Told(heads=2, act="quick_gelu")).settings["act"] == "quick_gelu"


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
    done = subprocess.run([*command, file], capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: .*backbone.npz: the number of heads .*\n", done.stderr), done.stderr


def test_what_other_channels_change(golden, tmp_path):
    """The command names the images and says how far the features have moved; the folder keeps its channels."""
    of(golden, "official/dino_backbone")[2].save(tmp_path / "rgb")
    for i in range(3):
        Image.fromarray(picture(40, 48, seed=i)).save(tmp_path / f"{i}.png")
    files = ",".join(str(tmp_path / f"{i}.png") for i in range(3))
    command = [sys.executable, "-m", "mim_jax.convert", tmp_path / "rgb", "--channels=1", f"--images={files}"]
    done = subprocess.run([*command, f"--out={tmp_path / 'grey'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"for 3 channels to those for 1: ([\d.]+) .* as they are, ([\d.]+) \(least.*; of 3 images", done.stdout)
    assert 0.5 < float(found[1]) < float(found[2]) < 1, done.stdout
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
