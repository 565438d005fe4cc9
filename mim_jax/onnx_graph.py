"""Encoders as ONNX models of plain operators, in float32.

    model = mim_jax.onnx_graph.encoder(network, parts, size=224)  # an onnx.ModelProto

It computes what `Encoder.features` does: "images" [batch, C, size, size] in 0..1 -> "cls" [batch, D], "patch" [batch, N, D],
and "scores" [batch, K] of a classifier.
The batch is free, the size is not: positions, relative biases, rotations and windows are computed here and stored as constants.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mim_jax.methods.base import Encoder, Params
from mim_jax.models.heads import LinearHead
from mim_jax.models.positions import bias_of_pairs, interpolate_positions, relative_bias, rotated, rotated_by_halves
from mim_jax.models.swin import EPS, Swin, shift_mask, windows
from mim_jax.models.vit import ViT

OPSET, IR = 17, 8  # the first opset with LayerNormalization, of ONNX 1.12 (2022), and the file format of that release
LARGEST = 2**31 - 2**20  # bytes of constants: a file has less than 2 GiB

Turn = Callable[[str], str]  # queries or keys [batch, heads, T, d] -> with rotary positions


class Graph:
    """Nodes in the order in which they run. A value is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, op: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Adds a node and returns the name of its output. Inputs are names, or arrays and numbers, which become constants."""
        output = output or f"{op}_{len(self.nodes)}"
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        array, name = np.asarray(value), f"constant_{len(self.constants)}"
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        self.constants.append(numpy_helper.from_array(array.astype(dtype), name))
        return name

    def linear(self, x: str, layer: Params) -> str:
        y = self.node("MatMul", x, layer["kernel"])
        return self.node("Add", y, layer["bias"]) if "bias" in layer else y

    def norm(self, x: str, layer: Params, eps: float, output: str = "") -> str:
        return self.node("LayerNormalization", x, layer["scale"], layer["bias"], epsilon=eps, output=output)

    def reshape(self, x: str, *shape: int) -> str:
        """0: as it was; -1: what is left."""
        return self.node("Reshape", x, shape)


def encoder(network: Encoder, parts: Params, size: int, head: LinearHead | None = None) -> onnx.ModelProto:
    """The model of an encoder for images of this size. Raises ValueError for one that does not fit into a file."""
    net, side = network.backbone, size // network.backbone.patch_size
    params = jax.tree.map(np.asarray, parts["backbone"])
    graph = Graph()
    mean, std = (np.asarray(color, np.float32).reshape(-1, 1, 1) for color in (network.mean, network.std))
    x = graph.node("Div", graph.node("Sub", "images", mean), std)
    embedding, p = params["patch_embed"], net.patch_size
    bias = [embedding["bias"]] if "bias" in embedding else []
    x = graph.node("Conv", x, embedding["kernel"].transpose(3, 2, 0, 1), *bias, strides=[p, p])
    x = graph.node("Transpose", graph.reshape(x, 0, 0, -1), perm=[0, 2, 1])
    (swin if isinstance(net, Swin) else vit)(graph, net, params, x, side)

    stages = len(net.depths) - 1 if isinstance(net, Swin) else 0
    shapes: dict[str, list[str | int]] = {"images": ["batch", len(network.mean), size, size]}
    shapes["cls"] = ["batch", net.dim * 2**stages]
    shapes["patch"] = ["batch", (side // 2**stages) ** 2, net.dim * 2**stages]
    if head and head.linear:
        classifier(graph, head)
        shapes["scores"] = ["batch", head.classes]
    image, *outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    total = sum(len(constant.raw_data) for constant in graph.constants)
    if total > LARGEST:
        raise ValueError(f"the encoder has {total / 2**30:.1f} GiB of weights and positions, but a file of ONNX less than 2")
    made = helper.make_graph(graph.nodes, "encoder", [image], outputs, graph.constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="mim_jax")


def classifier(graph: Graph, head: LinearHead) -> None:
    """From the outputs to "scores"."""
    mean = graph.node("ReduceMean", "patch", axes=[1], keepdims=0)
    x = {"cls": "cls", "mean": mean, "cls+mean": graph.node("Concat", "cls", mean, axis=-1)}[head.pool]
    x = graph.norm(x, head.norm, head.eps) if head.norm else x
    graph.node("Add", graph.node("MatMul", x, head.linear["kernel"]), head.linear["bias"], output="scores")


def vit(graph: Graph, net: ViT, params: Params, x: str, side: int) -> None:
    """From patches [batch, side**2, D] to the outputs."""
    table: Any = np.zeros((1, 1 + side**2, net.dim), np.float32)
    if "pos_embed" in params:
        offset = net.pos_offset if net.pos == "learned" and not net.antialias else 0.0
        table = interpolate_positions(jnp.asarray(params["pos_embed"]), side, side, offset, net.antialias)
    first = [params["cls_token"] + table[:, :1]] if net.cls else []
    first += [params["register_tokens"]] if net.registers else []
    count = sum(token.shape[1] for token in first)
    x = graph.node("Pad", x, [0, count, 0, 0, 0, 0])  # zeros in the places of CLS and registers, which are added as positions
    x = graph.node("Add", x, np.concatenate([*first, table[:, 1:]], axis=1))
    x = graph.norm(x, params["norm_pre"], net.norm_eps) if net.pre_norm else x

    grid = net.img_size // net.patch_size
    name, turn, bias = "relative_position_bias_table", rotation(graph, net, count, side), ""
    if name in params:
        bias = graph.constant(relative_bias(params[name], grid, (side, side), net.bilinear))
    for i in range(net.depth):
        block = jax.tree.map(lambda value, i=i: value[i], params["blocks"])
        if name in block:
            bias = graph.constant(relative_bias(block[name], grid, (side, side), net.bilinear))
        y = graph.norm(x, block["norm1"], net.norm_eps)
        x = residual(graph, x, attention(graph, y, block, net.heads, net.norm_eps, bias, turn), block, "gamma_1")
        x = mlp(graph, x, block, net.norm_eps, net.act)
    x = graph.norm(x, params["norm"], net.norm_eps) if net.final_norm else x
    graph.node("Slice", x, [count], [np.iinfo(np.int64).max], [1], output="patch")
    if net.cls:
        graph.node("Gather", x, 0, axis=1, output="cls")
    else:
        graph.node("ReduceMean", "patch", axes=[1], keepdims=0, output="cls")


def swin(graph: Graph, net: Swin, params: Params, x: str, side: int) -> None:
    """From patches [batch, side**2, D] to the outputs."""
    x = graph.norm(x, params["patch_norm"], EPS)
    for i, (depth, heads) in enumerate(zip(net.depths, net.heads)):
        stage, size = params[f"stage_{i}"], min(net.window, side)
        places: Any = np.arange(side**2).reshape(1, side, side, 1)
        for j in range(depth):
            shift = size // 2 if j % 2 and side > size else 0
            kind = stage["blocks"]["shifted" if j % 2 else "plain"]
            block = jax.tree.map(lambda value, j=j: value[j // 2], kind)
            shifted: Any = np.roll(places, (-shift, -shift), (1, 2))
            order = np.asarray(windows(shifted, size))[0, :, :, 0]  # [windows, patches of each]
            bias = np.asarray(bias_of_pairs(block["relative_position_bias_table"], size, size, cls=False))[None]
            bias = bias + shift_mask(side, side, size, shift)[:, None] if shift else bias
            y = graph.norm(x, block["norm1"], EPS)
            y = graph.reshape(graph.node("Gather", y, order.reshape(-1), axis=1), -1, size**2, net.dim * 2**i)
            y = attention(graph, y, block, heads, EPS, graph.constant(bias), cut=order.shape)
            y = graph.node("Gather", graph.reshape(y, -1, side**2, net.dim * 2**i), np.argsort(order.reshape(-1)), axis=1)
            x = mlp(graph, residual(graph, x, y, block, ""), block, EPS, "gelu")
        if "merge" in stage:
            order = places.reshape(side // 2, 2, side // 2, 2).transpose(0, 2, 3, 1)  # of four, the upper left one, then below
            x = graph.reshape(graph.node("Gather", x, order.reshape(-1), axis=1), 0, -1, 4 * net.dim * 2**i)
            x, side = graph.linear(graph.norm(x, stage["merge_norm"], EPS), stage["merge"]), side // 2
    graph.norm(x, params["norm"], EPS, output="patch")
    graph.node("ReduceMean", "patch", axes=[1], keepdims=0, output="cls")


def attention(
    graph: Graph, x: str, block: Params, heads: int, eps: float, bias: str = "", turn: Turn | None = None, cut: Any = ()
) -> str:
    """The attention branch of a `Block` after its first norm, without LayerScale, [batch, T, D] -> the same.

    `bias`: [heads, T, T]. With `cut`, (windows, T), the batch is of windows, image by image; `bias` is then [windows or 1,
    heads, T, T].
    """
    dim = block["proj"]["kernel"].shape[1]
    if "qkv" in block:
        layer = dict(block["qkv"])
    else:
        layer = {"kernel": np.concatenate([block[f"{name}_proj"]["kernel"] for name in "qkv"], axis=1)}
    if "q_bias" in block:
        layer["bias"] = np.concatenate([block["q_bias"], np.zeros(dim), block["v_bias"]]).astype(np.float32)
    y = graph.reshape(graph.linear(x, layer), 0, -1, 3, heads, dim // heads)
    y = graph.node("Transpose", y, perm=[2, 0, 3, 1, 4])
    q, k, v = (graph.node("Gather", y, i, axis=0) for i in range(3))
    q, k = (turn(q), turn(k)) if turn else (q, k)
    logits = graph.node("MatMul", q, graph.node("Transpose", k, perm=[0, 1, 3, 2]))
    logits = graph.node("Mul", logits, (dim // heads) ** -0.5)
    if cut:
        count, tokens = cut
        logits = graph.node("Add", graph.reshape(logits, -1, count, heads, tokens, tokens), bias)
        logits = graph.reshape(logits, -1, heads, tokens, tokens)
    elif bias:
        logits = graph.node("Add", logits, bias)
    y = graph.node("MatMul", graph.node("Softmax", logits, axis=-1), v)
    y = graph.reshape(graph.node("Transpose", y, perm=[0, 2, 1, 3]), 0, -1, dim)
    y = graph.norm(y, block["attn_norm"], eps) if "attn_norm" in block else y
    return graph.linear(y, block["proj"])


def mlp(graph: Graph, x: str, block: Params, eps: float, act: str) -> str:
    """x with the residual of the MLP's branch."""
    y = graph.norm(x, block["norm2"], eps)
    if "fc1" in block:
        y = graph.linear(y, block["fc1"])
        if act == "quick_gelu":
            y = graph.node("Mul", y, graph.node("Sigmoid", graph.node("Mul", y, 1.702)))
        else:
            cdf = graph.node("Add", graph.node("Erf", graph.node("Div", y, 2**0.5)), 1.0)
            y = graph.node("Mul", graph.node("Mul", y, cdf), 0.5)
        return residual(graph, x, graph.linear(y, block["fc2"]), block, "gamma_2")
    layers = [block["w1"], block["w2"]] if "w1" in block else []
    if not layers:  # both in one
        halves = {kind: np.split(value, 2, axis=-1) for kind, value in block["w12"].items()}
        layers = [{kind: value[i] for kind, value in halves.items()} for i in range(2)]
    gate, value = (graph.linear(y, layer) for layer in layers)
    y = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), value)
    y = graph.norm(y, block["ffn_ln"], eps) if "ffn_ln" in block else y
    return residual(graph, x, graph.linear(y, block["w3"]), block, "gamma_2")


def residual(graph: Graph, x: str, y: str, block: Params, gamma: str) -> str:
    """x + y, times its LayerScale if there is one."""
    return graph.node("Add", x, graph.node("Mul", y, block[gamma]) if gamma in block else y)


def rotation(graph: Graph, net: ViT, first: int, side: int) -> Turn | None:
    """What turns queries and keys whose tokens are the patches of a grid, `first` others before them.

    A channel becomes cos * channel + sin * its partner. The tables are read off the network's own functions: of an input whose
    first partners are 1 and the others 0, and of the opposite.
    """
    if not net.rotary and not net.rotary_period:
        return None
    width = net.dim // net.heads
    channels, half, grid = np.arange(width), width // 2, (side, side)
    if net.rotary_period:
        leads, partner = channels < half, (channels + half) % width
    else:
        leads, partner = channels % 2 == 0, channels ^ 1

    def of(x: np.ndarray) -> np.ndarray:
        """[d] for all tokens, turned: [T, d]."""
        y = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, first + side**2, 1, width))
        y = rotated_by_halves(y, grid, net.rotary_period) if net.rotary_period else rotated(y, grid, net.rotary)
        return np.asarray(y)[0, :, 0]

    one, other = of(leads), of(~leads)
    cos, sin = graph.constant(np.where(leads, one, other)), graph.constant(np.where(leads, other, one))

    def turn(x: str) -> str:
        turned = graph.node("Mul", graph.node("Gather", x, partner, axis=-1), sin)
        return graph.node("Add", graph.node("Mul", x, cos), turned)

    return turn
