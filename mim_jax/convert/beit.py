"""The state dicts of microsoft/unilm's beit and beit2: pre-training, with or without patch aggregation, or a classifier."""

from collections.abc import Iterable

from mim_jax.convert import table
from mim_jax.convert.table import EMBEDDING, FC_NORM, LINEAR, MASK_TOKEN, NORM, SHARED_BIAS, Row, beit_block_rows, under

OWN_BIAS = Row("blocks.{}.attn.relative_position_bias_table", "blocks/relative_position_bias_table", ("TABLE", "HEADS"))
LM_HEAD = table.linear("lm_head", "linear", "VOCAB", "D")


def rows(names: Iterable[str]) -> list[Row]:
    """In fine-tuning each block has a table of its own, and the norm comes after the pooling."""
    blocks = beit_block_rows()
    if table.has(names, "fc_norm.", "head/fc_norm/"):
        return [*under("backbone", [*EMBEDDING, *blocks, OWN_BIAS]), *under("head", [*FC_NORM, *LINEAR])]
    backbone = [*EMBEDDING, MASK_TOKEN, SHARED_BIAS, *blocks, *NORM]
    cls_layers = beit_block_rows("cls_pt_layers") if table.has(names, "cls_pt_layers.", "cls_layers/") else []
    return [*under("backbone", backbone), *under("head", LM_HEAD), *under("cls_layers", cls_layers)]
