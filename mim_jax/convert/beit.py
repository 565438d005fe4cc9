"""The state dicts of microsoft/unilm's beit and beit2: pre-training, with or without patch aggregation, or a classifier."""

from collections.abc import Iterable

from mim_jax.convert.table import (
    EMBEDDING,
    FC_NORM,
    LINEAR,
    MASK_TOKEN,
    NORM,
    SHARED_BIAS,
    TRANSPOSED,
    Row,
    beit_block_rows,
    under,
)

OWN_BIAS = Row("blocks.{}.attn.relative_position_bias_table", "blocks/relative_position_bias_table", ("TABLE", "HEADS"))
LM_HEAD = (
    Row("lm_head.weight", "linear/kernel", ("VOCAB", "D"), TRANSPOSED),
    Row("lm_head.bias", "linear/bias", ("VOCAB",)),
)


def table(cls_layers: bool, fine_tuned: bool) -> list[Row]:
    """In fine-tuning each block has a table of its own, and the norm comes after the pooling."""
    blocks = beit_block_rows()
    if fine_tuned:
        return [*under("backbone", [*EMBEDDING, *blocks, OWN_BIAS]), *under("head", [*FC_NORM, *LINEAR])]
    rows = [*under("backbone", [*EMBEDDING, MASK_TOKEN, SHARED_BIAS, *blocks, *NORM]), *under("head", LM_HEAD)]
    return [*rows, *(under("cls_layers", beit_block_rows("cls_pt_layers")) if cls_layers else ())]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    starts = [any(key.startswith(prefix) for key in keys) for prefix in ("cls_pt_layers.", "fc_norm.")]
    return table(*starts)


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    starts = [any(path.startswith(prefix) for path in paths) for prefix in ("cls_layers/", "head/fc_norm/")]
    return table(*starts)
