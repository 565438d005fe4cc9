"""The state dicts of facebookresearch/moco-v3: both encoders with their heads and the predictor, or a ViT alone."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from mim_jax.convert.dino import BACKBONE
from mim_jax.convert.table import TRANSPOSED, Row, has, norm, statistics, under


def head(key: str, path: str, stats: str, widths: Sequence[str]) -> list[Row]:
    """A torch Sequential of linear layer, batch normalisation and ReLU; the last normalisation has no scale and no bias.
    `stats`: where the running statistics are, "" if there are none."""
    rows = []
    for i, (inputs, out) in enumerate(pairwise(widths)):
        bn, last = f"{key}.{3 * i + 1}", i == len(widths) - 2
        rows += [Row(f"{key}.{3 * i}.weight", f"{path}/mlp_{i}/kernel", (out, inputs), TRANSPOSED)]
        rows += [] if last else norm(bn, f"{path}/bn_{i}", out)
        rows += statistics(bn, f"{stats}/bn_{i}", out) if stats else []
    return rows


def rows(names: Iterable[str]) -> list[Row]:
    """The base encoder's and the predictor's parts are the parameters, the momentum encoder's are under `teacher`, and running
    statistics under `extra`, as in a training state. Keys that name no encoder are of a base encoder."""
    with_stats = any("running_" in name or name.startswith("extra/") for name in names)

    def encoder(key: str, section: str, stats: str) -> list[Row]:
        rows = [row._replace(key=key + row.key, path=section + row.path) for row in under("backbone", BACKBONE)]
        if has(names, f"{key}head.", f"{section}projector/"):
            at = f"{stats}/projector" if with_stats else ""
            rows += head(f"{key}head", f"{section}projector", at, ("D", "HIDDEN", "HIDDEN", "OUT"))
        return rows

    several = has(names, "base_encoder.", "momentum_encoder.", "predictor", "teacher/")
    table = encoder("base_encoder." if several else "", "", "extra/student_stats")
    if has(names, "momentum_encoder.", "teacher/"):
        table += encoder("momentum_encoder.", "teacher/", "extra/teacher_stats")
    if has(names, "predictor"):
        at = "extra/student_stats/predictor" if with_stats else ""
        table += head("predictor", "predictor", at, ("OUT", "HIDDEN", "OUT"))
    return table
