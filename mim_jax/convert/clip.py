"""The vision tower of openai/CLIP, its keys with or without `visual.` before them."""

from collections.abc import Iterable

from mim_jax.convert.table import CONV, ROW, TRANSPOSED, Layout, Row, has, linear, norm, under

AT = "transformer.resblocks.{}"
VISUAL = [
    Row("class_embedding", "cls_token", ("D",), Layout(lambda a: a[None, None], lambda a: a[0, 0])),
    Row("positional_embedding", "pos_embed", ("1+N", "D"), ROW),
    Row("conv1.weight", "patch_embed/kernel", ("D", "C", "P", "P"), CONV),
    *norm("ln_pre", "norm_pre"),
    *norm(f"{AT}.ln_1", "blocks/norm1"),
    Row(f"{AT}.attn.in_proj_weight", "blocks/qkv/kernel", ("3*D", "D"), TRANSPOSED),
    Row(f"{AT}.attn.in_proj_bias", "blocks/qkv/bias", ("3*D",)),
    *linear(f"{AT}.attn.out_proj", "blocks/proj", "D", "D"),
    *norm(f"{AT}.ln_2", "blocks/norm2"),
    *linear(f"{AT}.mlp.c_fc", "blocks/fc1", "MLP", "D"),
    *linear(f"{AT}.mlp.c_proj", "blocks/fc2", "D", "MLP"),
    *norm("ln_post", "norm"),
    Row("proj", "proj", ("D", "OUT")),
]
# What a whole CLIP has besides: the tower of texts, the temperature, and sizes.
IGNORED = (
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale|"
    r"input_resolution|context_length|vocab_size)(\.|$)"
)


def rows(names: Iterable[str]) -> list[Row]:
    return under("visual", VISUAL, prefixed=has(names, "visual."))
