"""The state dicts of BEiT v2's tokenizer (microsoft/unilm, beit2/modeling_vqkd.py), without its teacher.

What the quantiser's averages never use (`quantize.embedding.cluster_size`, `embed_avg`) and its flag `initted` are left out.
"""

from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, POSITIONS, Row, beit_block_rows, linear, norm, under


def vit(part: str, channels: str) -> list[Row]:
    """Encoder or decoder, each with its own width and length; a patch of the decoder is a single code."""
    rows = [*EMBEDDING, POSITIONS, *beit_block_rows(layerscale=False), *norm("fc_norm", "norm")]
    own = {name: f"{part}_{name}" for name in ("D", "MLP", "P")} | {"C": channels, "3*D": f"3*{part}_D"}
    return under(part, [row._replace(shape=tuple(own.get(str(dim), dim) for dim in row.shape)) for row in rows], prefixed=True)


def task(part: str, dim: str, out: str) -> list[Row]:
    """Linear, tanh, linear."""
    return under(part, [*linear(f"{part}_layer.0", "hidden", dim, dim), *linear(f"{part}_layer.2", "out", out, dim)])


TABLE = [
    *vit("encoder", "C"),
    *vit("decoder", "CODE"),
    *task("encode_task", "encoder_D", "CODE"),
    *task("decode_task", "decoder_D", "TEACHER"),
    Row("quantize.embedding.weight", "quantizer/codebook", ("K", "CODE")),
    Row("quantize.cluster_size", "quantizer/cluster_size", ("K",)),
]


def rows(names: Iterable[str]) -> list[Row]:
    return TABLE
