"""The rows of a converter's table."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A change of axes from PyTorch to Flax and back."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a: a.T)  # linear: (out, in) <-> (in, out)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # (O, I, h, w) <-> (h, w, I, O)

Dim = int | str  # a size, a symbol, or "<factor>*<symbol>"


class Row(NamedTuple):
    key: str  # "{}" stands for the block's number
    path: str  # slash-joined; with "{}" in `key`, blocks are stacked on a leading axis
    shape: tuple[Dim, ...]
    layout: Layout = SAME
