"""The state dicts of BEiT v2's tokenizer (microsoft/unilm, beit2/modeling_vqkd.py), without those of its teacher.

What the quantiser's averages never use (`quantize.embedding.cluster_size`, `embed_avg`) and its flag `initted` are left out.
"""

from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, FC_NORM, POSITIONS, TRANSPOSED, Row, beit_block_rows, under


def vit(part: str, channels: str) -> list[Row]:
    """Encoder or decoder; the decoder's patches are single codes. Both have widths and lengths of their own."""
    rows = [*EMBEDDING, *POSITIONS, *beit_block_rows(layerscale=False)]
    rows += [row._replace(path=row.path.replace("fc_norm", "norm")) for row in FC_NORM]
    own = {name: f"{part}_{name}" for name in ("D", "MLP", "P")} | {"C": channels, "3*D": f"3*{part}_D"}
    rows = [row._replace(key=f"{part}.{row.key}", shape=tuple(own.get(str(dim), dim) for dim in row.shape)) for row in rows]
    return under(part, rows)


def task(part: str, key: str, dim: str, out: str) -> list[Row]:
    """Linear, tanh, linear."""
    rows = []
    for number, name, size in ((0, "hidden", dim), (2, "out", out)):
        rows.append(Row(f"{key}.{number}.weight", f"{part}/{name}/kernel", (size, dim), TRANSPOSED))
        rows.append(Row(f"{key}.{number}.bias", f"{part}/{name}/bias", (size,)))
    return rows


TABLE = [
    *vit("encoder", "C"),
    *vit("decoder", "CODE"),
    *task("encode_task", "encode_task_layer", "encoder_D", "CODE"),
    *task("decode_task", "decode_task_layer", "decoder_D", "TEACHER"),
    Row("quantize.embedding.weight", "quantizer/codebook", ("K", "CODE")),
    Row("quantize.cluster_size", "quantizer/cluster_size", ("K",)),
]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    return TABLE


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    return TABLE
