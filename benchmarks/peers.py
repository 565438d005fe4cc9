"""Encoders in the layouts of other libraries, in and out, checked against these libraries: writes docs/weights.md.

    python benchmarks/peers.py --peers=/path/to/python/with/torch,timm,transformers

In: tests/golden/weights has small random encoders of timm, transformers, open_clip and official repositories, with activations
that these libraries computed; shown is our largest difference from them, at the native size of an encoder and at another.
Out: each encoder is exported (`mim_jax.export`), and the library itself, in a process of its own, loads the folder; shown is
the largest difference of its tokens from ours on random images, relative to the largest.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mim_jax import export

PEERS = flags.DEFINE_string("peers", None, "A Python that has torch, timm and transformers.", required=True)
OUT = flags.DEFINE_string("out", "docs/weights.md", "The table.")

ROOT = Path(__file__).parent.parent
FORMS = ("timm", "transformers")
THEIRS = """
import json, pathlib, sys, numpy as np, torch, timm, transformers
found = {"versions": {m.__name__: m.__version__ for m in (torch, timm, transformers)}}
for folder in sorted(pathlib.Path(sys.argv[1]).glob("*/*")):
    form, check = folder.parent.name, np.load(folder / "check.npz")
    images = torch.tensor(check["images"].transpose(0, 3, 1, 2))
    try:
        with torch.no_grad():
            if form == "timm":
                tokens = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(images)
            else:
                load = transformers.AutoModel.from_pretrained
                model, info = load(folder, output_loading_info=True, attn_implementation="eager")
                assert not any(info.values()), info
                tokens = model.eval()(images).last_hidden_state
                tokens = model.post_layernorm(tokens) if hasattr(model, "post_layernorm") else tokens  # CLIP
        tokens, patch = tokens.flatten(1, -2).numpy(), check["patch"]
        errors = [np.abs(tokens[:, -patch.shape[1]:] - patch).max() / np.abs(patch).max()]
        if tokens.shape[1] > patch.shape[1]:
            errors.append(np.abs(tokens[:, 0] - check["cls"]).max() / np.abs(check["cls"]).max())
        found[f"{form}/{folder.name}"] = f"{max(errors):.0e}"
    except Exception as error:
        found[f"{form}/{folder.name}"] = f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
print(json.dumps(found))
"""
TEXT = """# Weights of other libraries

`python benchmarks/peers.py --peers=PYTHON`, with jax {jax}, {versions}. The encoders are small and random, in the layouts of
the released ones. In: the largest difference from the activations that the library itself computed (values of about 1 to 10),
at the native size and at another, oblong one. Out: the library loads what `mim_jax.export` has written; the largest relative
difference of its tokens from ours. "-" where there are no activations to compare with.

"""


def main(_: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import test_layouts

    golden = ROOT / "tests/golden/weights"
    rows: dict[str, list[str]] = {}
    reasons: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in test_layouts.NAMES:
            state, arrays, weights = test_layouts.of(lambda at: load(golden.parent / at), name)
            found = test_layouts.errors(name, state, arrays, weights)
            sides = [[e for (size, _), e in found.items() if size == which] for which in ("native", "other")]
            rows[name] = [f"{max(errors):.0e}" if errors else "-" for errors in sides]
            ours = Path(folder) / "ours" / name
            weights.save(ours)
            for form in FORMS:
                out = Path(folder) / "out" / form / name.replace("/", "_")
                try:
                    export.written(str(ours), form, out)
                except ValueError as error:
                    reason = re.sub(r", timm's .*", ", which timm's architecture has not", str(error))
                    reasons.setdefault(reason, len(reasons) + 1)
                    rows[name].append(f"refused ({reasons[reason]})")
                    continue
                size = weights.settings["img_size"]
                images = np.random.default_rng(0).random((2, size, size, 3)).astype(np.float32)
                made = weights.network.features(weights.parts, jnp.asarray(images))
                normalised = ((images - np.array(weights.mean)) / np.array(weights.std)).astype(np.float32)
                np.savez(out / "check.npz", images=normalised, **made)
                rows[name].append("")
        done = subprocess.run([PEERS.value, "-c", THEIRS, f"{folder}/out"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {done.stderr}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, row in rows.items():
        for place, form in enumerate(FORMS, start=2):
            row[place] = row[place] or theirs[f"{form}/{name.replace('/', '_')}"]
    head = ["encoder", "in, native", "in, other size", "out, timm", "out, transformers"]
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in rows.items())]
    versions = ", ".join(f"{name} {version}" for name, version in theirs["versions"].items())
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    table += "\n" + "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    Path(OUT.value).write_text(TEXT.format(jax=importlib.metadata.version("jax"), versions=versions) + table)
    print(table, jax.devices())


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """As the fixture `golden` of the tests."""
    with np.load(path.with_name(path.name + ".npz")) as arrays:
        return dict(arrays), json.loads(path.with_name(path.name + ".json").read_text())


if __name__ == "__main__":
    app.run(main)
