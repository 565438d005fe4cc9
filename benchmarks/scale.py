"""Every recipe, compiled for slices that need not be here: what fits, and what is sent between devices.

    python benchmarks/scale.py [--recipes=dino:vits16,mae:vitl16] [--slices=v5e-8,h100-8] [--out=docs/scale.md]

Each cell is `--plan` with the recipe's own batch, `model.remat=auto` and `mesh.fsdp=8`, in a process of its own. It takes from
seconds (GPUs) to minutes (TPUs) on 2 CPU cores. What is in the table already is not compiled again: to start anew, remove it.
"""

import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
from absl import app, flags

RECIPES = (
    "dino:vits16 dino:vits8 dino:vitb16 ibot:vits16 dinov2:vitl16 mocov3:vitb16 mae:vitb16 mae:vitl16 mae:vith14 "
    "simmim:vitb16 simmim:swinb beit:vitb16 beit2:vitb16 eva:b masked_patch:vitb16 supervised:vitb16"
)
SHOWN = flags.DEFINE_list("recipes", RECIPES.split(), "Recipes.")
SLICES = flags.DEFINE_list("slices", ["v5e-8", "v5e-256", "h100-8", "h100-256"], "Slices, see mim_jax/topology.py.")
OUT = flags.DEFINE_string("out", "docs/scale.md", "The table.")
FSDP = flags.DEFINE_integer("fsdp", 8, "mesh.fsdp.")

HEADINGS = (
    "recipe",
    "devices",
    "batch",
    "remat",
    "GiB a device",
    "sent in a step",
    "gradients summed in",
    "GFLOP an image",
    "compiled in",
)
TEXT = """# What fits where

`python benchmarks/scale.py` compiles the train step of each recipe, at its own batch, for devices that are not there:
`--plan=v5e-8 --config.mesh.fsdp={fsdp} --config.model.remat=auto`, with jax {jax}, up to
{date}. Memory is the compiler's own figure.
Nothing in this table was run on such devices.

"""


def cell(recipe: str, name: str) -> list[str]:
    """A row of the table."""
    start = time.monotonic()
    settings = [f"--config={recipe}", f"--config.mesh.fsdp={FSDP.value}", "--config.model.remat=auto"]
    command = [sys.executable, "-m", "mim_jax.main", *settings, f"--plan={name}", "--compiled="]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = f"{time.monotonic() - start:.0f} s"
    if done.returncode:
        why = re.search(r"error: (.*)", done.stderr)
        return [recipe, name, "", "", why[1] if why else done.stderr.strip().splitlines()[-1], "", "", "", seconds]

    def found(pattern: str) -> str:
        return match[1] if (match := re.search(pattern, done.stdout)) else ""

    sent = re.findall(r"^ +(\d+) ([a-z-]+) +([a-z]+\d+) +([\d.,]+ MiB)$", done.stdout, re.M)
    kinds = ", ".join(f"{count} {kind} ({dtype}, {size})" for count, kind, dtype, size in sent)
    summed = sorted({dtype for _, kind, dtype, _ in sent if kind in ("all-reduce", "reduce-scatter")})
    if "rematerialization" in done.stderr:
        kinds += "; involuntary rematerialization"
    memory = found(r"(?:fits|DOES NOT FIT): ([\d.]+ of [\d.]+) GiB")
    batch, flops = found(r"global batch (\d+)"), found(r"([\d,.]+) GFLOP per image")
    return [recipe, name, batch, found(r"model\.remat is (\w+)"), memory, kinds, ", ".join(summed), flops, seconds]


def main(argv: list[str]) -> None:
    out, rows = Path(OUT.value), {}
    if out.is_file():
        for line in out.read_text().splitlines():
            cells = [text.strip() for text in line.strip("|").split("|")]
            if len(cells) == len(HEADINGS) and cells[0] not in (HEADINGS[0], "---"):
                rows[cells[0], cells[1]] = cells
    for name in SLICES.value:
        for recipe in SHOWN.value:
            if (recipe, name) in rows:
                continue
            rows[recipe, name] = cell(recipe, name)
            print(*rows[recipe, name], sep="  ", flush=True)
            table = [HEADINGS, ["---"] * len(HEADINGS), *(rows[key] for key in sorted(rows))]
            head = TEXT.format(fsdp=FSDP.value, jax=jax.__version__, date=datetime.date.today())
            out.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in table))


if __name__ == "__main__":
    app.run(main)
