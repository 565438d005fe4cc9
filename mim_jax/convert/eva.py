"""The state dicts of baaivision/EVA: EVA-01 and EVA-02, pre-trained.

EVA-02's tables of rotary positions (`rope.freqs_cos`, `rope.freqs_sin`) follow from the model's shape and are left out.
"""

from collections.abc import Iterable

from mim_jax.convert.table import (
    EMBEDDING,
    MASK_TOKEN,
    NORM,
    POSITIONS,
    TRANSPOSED,
    Row,
    beit_block_rows,
    has,
    linear,
    norm,
    under,
)

AT = "blocks.{}"
SEPARATE = [Row(f"{AT}.attn.{name}_proj.weight", f"blocks/{name}_proj/kernel", ("D", "D"), TRANSPOSED) for name in "qkv"]
GATED = {  # with sub-LN, without
    True: [
        *linear(f"{AT}.mlp.w1", "blocks/w1", "MLP", "D"),
        *linear(f"{AT}.mlp.w2", "blocks/w2", "MLP", "D"),
        *norm(f"{AT}.mlp.ffn_ln", "blocks/ffn_ln", "MLP"),
        *linear(f"{AT}.mlp.w3", "blocks/w3", "D", "MLP"),
    ],
    False: [*linear(f"{AT}.mlp.w3", "blocks/w3", "D", "MLP"), *linear(f"{AT}.mlp.w12", "blocks/w12", "2*MLP", "D")],
}


def rows(names: Iterable[str]) -> list[Row]:
    """Sub-LN has a norm inside the MLP; files without a mask token or a head are read, too."""
    eva02, subln, mask_token = (any(word in name for name in names) for word in ("w3", "ffn_ln", "mask_token"))
    blocks = beit_block_rows(layerscale=False)
    if eva02:
        blocks = [row for row in blocks if not row.path.startswith(("blocks/fc1", "blocks/fc2"))] + GATED[subln]
    if subln:
        blocks = [row for row in blocks if row.path != "blocks/qkv/kernel"] + SEPARATE
    backbone = [*EMBEDDING, *([MASK_TOKEN] if mask_token else []), POSITIONS, *blocks, *NORM]
    head = linear("lm_head", "linear", "OUT", "D") if has(names, "lm_head.", "head/") else []
    return [*under("backbone", backbone), *under("head", head)]
