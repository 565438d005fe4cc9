"""The state dicts of the small discrete VAE in microsoft/unilm's beit/modeling_discrete_vae.py: encoder and decoder."""

import re
from collections.abc import Iterable

from mim_jax.convert.table import Layout, Row, conv

# A PyTorch transposed convolution, the gradient of a convolution: (I, O, h, w) <-> (h, w, I, O), rows and columns reversed
TRANSPOSED_CONV = Layout(
    lambda a: a.transpose(2, 3, 0, 1)[::-1, ::-1],
    lambda a: a[::-1, ::-1].transpose(2, 3, 0, 1),
)


def rows(names: Iterable[str]) -> list[Row]:
    layers = len({match[0] for name in names if (match := re.match(r"encoder(\.\d+\.0\.|/conv_\d+/)", name))})
    rows = [Row("codebook.weight", "decoder/codebook", ("K", "D"))]
    for i in range(layers):
        rows += conv(f"encoder.{2 * i}.0", f"encoder/conv_{i}", "HIDDEN", "HIDDEN" if i else "C", 4)
        up, path, shape = f"decoder.{2 * i}.0", f"decoder/conv_{i}", ("HIDDEN" if i else "D", "HIDDEN", 4, 4)
        rows += [Row(f"{up}.weight", f"{path}/kernel", shape, TRANSPOSED_CONV), Row(f"{up}.bias", f"{path}/bias", ("HIDDEN",))]
        for part in ("encoder", "decoder"):
            for j, size in enumerate((3, 3, 1)):
                path = f"{part}/res_{i}/conv_{j + 1}"
                rows += conv(f"{part}.{2 * i + 1}.net.{2 * j}", path, "HIDDEN", "HIDDEN", size)
    rows += conv(f"encoder.{2 * layers}", "encoder/output", "K", "HIDDEN", 1)
    return rows + conv(f"decoder.{2 * layers}", "decoder/output", "C", "HIDDEN", 1)
