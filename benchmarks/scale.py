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
FSDP = 8  # mesh.fsdp

HEADINGS = (
    "recipe",
    "devices",
    "batch",
    "remat",
    "GiB a device",
    "GFLOP an image",
    "gates",
    "compiled in",
    "sent in a step",
)
GATES = HEADINGS.index("gates")
TEXT = """# What fits where

`python benchmarks/scale.py` compiles the train step of each recipe, at its own batch, for devices that are not there:
`--plan=v5e-8 --config.mesh.fsdp={fsdp} --config.model.remat=auto`, with jax {jax}, up to
{date}. Memory is the compiler's own figure, and what does not fit is refused by the compiler itself.
Nothing in this table was run on such devices.

The compilers are the extras plan-tpu and plan-gpu (CUDA 12, 5.9 GB), in this environment or another one. For one recipe:
`EXTRAS=plan-tpu bash launch/local.sh --config=dino:vits16 --config.mesh.fsdp=8 --plan=v5e-8`. Where libtpu is installed but no
TPU is, programs print warnings when they start, unless JAX_PLATFORMS=cpu is set.

`ring`: a kernel, or its gradient, that goes round in parts while it is multiplied, as TPU compilers do it in place of an
all-gather or a reduce-scatter. `halo`: columns of a gradient that move to the next device after a reduce-scatter, whose
blocks are wider than the devices' parts. What is in a loop over blocks is counted once. The gates: the step fits, it sends
activations nowhere (no all-to-all, no other collective-permute, no involuntary rematerialization), it sums gradients in float32
(but for 0.1 MiB at most), and it donates its state. Where a recipe is refused, the next larger slices follow until one is not.
Tokenizers are not in the table: of `vqvae` the gradients of the convolutions, 9.3 MiB, are summed in bf16.

"""


def cell(recipe: str, name: str) -> list[str]:
    """A row of the table."""
    start = time.monotonic()
    settings = [f"--config={recipe}", f"--config.mesh.fsdp={FSDP}", "--config.model.remat=auto"]
    command = [sys.executable, "-m", "mim_jax.main", *settings, f"--plan={name}", "--compiled="]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = f"{time.monotonic() - start:.0f} s"
    if done.returncode:
        match = re.search(r"error: (.*)", done.stderr)
        why = match[1] if match else done.stderr.strip().splitlines()[-1]
        if re.search("not installed|lockfile", why):
            raise SystemExit(f"{recipe} on {name}: {why}")
        return [recipe, name, "", "", "", "", why, seconds, ""]

    def found(pattern: str) -> str:
        return match[1] if (match := re.search(pattern, done.stdout)) else ""

    sent = re.findall(r"^ +(\d+) ([a-z-]+) +([a-z]+\d*) +([\d.,]+) MiB$", done.stdout, re.M)
    kinds = ", ".join(f"{count} {kind} ({dtype}, {size} MiB)" for count, kind, dtype, size in sent)
    broken = [f"{count} {kind}" for count, kind, *_ in sent if kind in ("all-to-all", "collective-permute")]
    sums = [(float(size.replace(",", "")), dtype) for _, kind, dtype, size in sent if kind in ("all-reduce", "reduce-scatter")]
    broken += [f"{size} MiB summed in {dtype}" for size, dtype in sums if dtype in ("bf16", "f16") and size > 0.1]
    broken += ["involuntary rematerialization"] * ("nvoluntary full rematerialization" in done.stderr)
    donated = re.search(r"state donated +([\d,]+) arrays of ([\d,]+)", done.stdout)
    if donated is None or donated[1] != donated[2]:
        broken.append("state not donated")
    way, flops = found(r"model\.remat is (.*?):"), found(r"([\d,.]+) GFLOP per image")
    batch, memory = found(r"global batch (\d+)"), found(r"  fits: ([\d.]+ of [\d.]+) GiB")
    return [recipe, name, batch, way, memory, flops, "; ".join(broken) or "passed", seconds, kinds]


def main(argv: list[str]) -> None:
    out, rows = Path(OUT.value), {}
    if out.is_file():
        for line in out.read_text().splitlines():
            cells = [text.strip() for text in line.strip("|").split("|")]
            if len(cells) == len(HEADINGS) and cells[0] not in (HEADINGS[0], "---"):
                rows[cells[0], cells[1]] = cells
    cells = [(recipe, name) for name in SLICES.value for recipe in SHOWN.value]
    for recipe, name in cells:
        if (recipe, name) not in rows:
            rows[recipe, name] = cell(recipe, name)
            print(*rows[recipe, name], sep="  ", flush=True)
            table = [HEADINGS, ["---"] * len(HEADINGS), *(rows[key] for key in sorted(rows))]
            head = TEXT.format(fsdp=FSDP, jax=jax.__version__, date=datetime.date.today())
            out.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in table))
        kind, devices = name.split("-")
        if "fit" in rows[recipe, name][GATES] and int(devices) < 1024:
            cells.append((recipe, f"{kind}-{2 * int(devices)}"))
    if failed := [" on ".join(key) for key in cells if rows[key][GATES] != "passed"]:
        raise SystemExit(f"gates not passed: {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
