"""The state dicts of facebookresearch/mae: the whole autoencoder, its encoder alone, or a fine-tuned classifier."""

from collections.abc import Iterable

from mim_jax.convert.table import EMBEDDING, FC_NORM, LINEAR, NORM, POSITIONS, Row, block_rows, has, linear, norm, under

DECODER = [
    Row("mask_token", "mask_token", (1, 1, "DD")),
    Row("decoder_pos_embed", "pos_embed", (1, "1+N", "DD")),
    *linear("decoder_embed", "embed", "DD", "D"),
    *block_rows("decoder_blocks", "DD", "DMLP"),
    *norm("decoder_norm", "norm", "DD"),
    *linear("decoder_pred", "pred", "PIXELS", "DD"),
]


def rows(names: Iterable[str]) -> list[Row]:
    """With mean pooling (`fc_norm`) the encoder has no norm of its own."""
    fc_norm = has(names, "fc_norm.", "head/fc_norm/")
    backbone = [*EMBEDDING, POSITIONS, *block_rows(), *([] if fc_norm else NORM)]
    decoder = DECODER if has(names, "decoder_", "decoder/") else []
    head = [*(FC_NORM if fc_norm else []), *(LINEAR if has(names, "head.", "head/linear/") else [])]
    return [*under("backbone", backbone), *under("decoder", decoder), *under("head", head)]
