"""The state dicts of facebookresearch/mae: the whole autoencoder, its encoder alone, or a fine-tuned classifier."""

from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, FC_NORM, LINEAR, NORM, POSITIONS, TRANSPOSED, Row, block_rows, under

DECODER = (
    Row("mask_token", "mask_token", (1, 1, "DD")),
    Row("decoder_pos_embed", "pos_embed", (1, "1+N", "DD")),
    Row("decoder_embed.weight", "embed/kernel", ("DD", "D"), TRANSPOSED),
    Row("decoder_embed.bias", "embed/bias", ("DD",)),
    *block_rows("decoder_blocks", "DD", "DMLP"),
    Row("decoder_norm.weight", "norm/scale", ("DD",)),
    Row("decoder_norm.bias", "norm/bias", ("DD",)),
    Row("decoder_pred.weight", "pred/kernel", ("PIXELS", "DD"), TRANSPOSED),
    Row("decoder_pred.bias", "pred/bias", ("PIXELS",)),
)


def table(decoder: bool, fc_norm: bool, linear: bool) -> list[Row]:
    """With mean pooling (`fc_norm`) the encoder's own norm is gone."""
    backbone = (*EMBEDDING, *POSITIONS, *block_rows(), *(() if fc_norm else NORM))
    head = (*(FC_NORM if fc_norm else ()), *(LINEAR if linear else ()))
    return [*under("backbone", backbone), *under("decoder", DECODER if decoder else ()), *under("head", head)]


def rows_for_keys(keys: Iterable[str]) -> list[Row]:
    starts = [any(key.startswith(prefix) for key in keys) for prefix in ("decoder_", "fc_norm.", "head.")]
    return table(*starts)


def rows_for_paths(paths: Iterable[str]) -> list[Row]:
    starts = [any(path.startswith(prefix) for path in paths) for prefix in ("decoder/", "head/fc_norm/", "head/linear/")]
    return table(*starts)
