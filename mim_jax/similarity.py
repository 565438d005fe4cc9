"""The similarity of a patch that is clicked to all patches of some images: the part of a page that shows it.

A page has `style`, PANEL, a `field` for each image in an <article> with an <h3>, `data` as JSON with the id "data", and SCRIPT.
"""

import base64
import io
from html import escape
from typing import Any

import numpy as np
from PIL import Image

LEAST = 16  # dimensions of a feature that a page may keep
SMALL = 128  # pixels of a side up to which pictures are kept exactly, and their pixels are shown as squares
CHECKED = 64  # patches whose similarities to all others are compared with those of the whole features


def data(features: np.ndarray, grid: int, room: int, ramp: np.ndarray) -> tuple[dict[str, Any], float]:
    """(what the script needs, for JSON; see `quantized` for the second) of the features [B, N, D] of square grids of patches.

    `ramp`: colors from the lowest similarity to 1, [n, 3]. "error": see `error`.
    """
    flat = features.reshape(-1, features.shape[-1])
    numbers, scale, share = quantized(flat, room)
    found = {"grid": grid, "dim": numbers.shape[1], "scale": scale, "ramp": ramp.tolist(), "error": error(flat, numbers, scale)}
    return found | {"features": base64.b64encode(numbers.tobytes()).decode()}, share


def quantized(features: np.ndarray, room: int) -> tuple[np.ndarray, float, float]:
    """(int8 [T, d], scale, share): the products of rows are `scale` squared times the cosines of the features [T, D].

    d is D, or as many principal components (of the normalised features, around 0) as fit into `room` bytes of base64, but one
    at least; they hold this share of the squared length.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count, dim = unit.shape
    fits, share = max(room * 3 // 4 // count, 1), 1.0
    if fits < dim:
        _, axes = np.linalg.eigh(unit.T @ unit)  # in ascending order
        length = np.sum(unit**2)
        unit = unit @ axes[:, : -fits - 1 : -1]
        share = float(np.sum(unit**2) / length)
    scale = 127 / float(np.abs(unit).max())
    return np.rint(unit * scale).astype(np.int8), scale, share


def error(features: np.ndarray, numbers: np.ndarray, scale: float) -> float:
    """The largest error of the cosines of CHECKED evenly spaced patches to all."""
    rows = np.unique(np.linspace(0, len(features) - 1, CHECKED).astype(int))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    whole, kept = numbers.astype(np.float32), numbers[rows].astype(np.float32)
    return float(np.abs(unit[rows] @ unit.T - kept @ whole.T / scale**2).max())


def uri(image: np.ndarray) -> str:
    """An image uint8 [H, W, 3] as an address that holds it. Small ones are exact."""
    small, file = max(image.shape[:2]) <= SMALL, io.BytesIO()
    kind = "png" if small else "jpeg"
    Image.fromarray(np.ascontiguousarray(image)).save(file, kind, **({"optimize": True} if small else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def tag(address: str, alt: str) -> str:
    """An image by its `uri`; small ones have sharp pixels."""
    return f'<img{" class=sharp" * address.startswith("data:image/png")} alt="{escape(alt)}" src="{address}">'


def field(address: str, name: str) -> str:
    """The image whose patches can be chosen."""
    label = escape(f"{name}: the arrow keys choose a patch")
    return f'<div class="field" tabindex="0" role="application" aria-label="{label}">{tag(address, "")}<canvas></canvas></div>'


def style(ramp: Any) -> str:
    colors = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*color) for color in ramp)
    return STYLE + f".ramp {{ background: linear-gradient(to right, {colors}); }}\n"


PANEL = """<div class="told">
<p id="told" aria-live="polite">Click a patch of an image, or tab to an image and use the arrow keys: the
similarity of its feature to all patches of all images is drawn over them.</p>
<p id="scale" hidden><span id="low"></span><i class="ramp"></i><span>1</span><span id="here"></span>
<button id="clear" type="button">Clear</button></p></div>"""

STYLE = """
.told { position: sticky; top: 0; z-index: 1; margin: 1rem 0; padding: .6rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; font-size: .9rem; }
.told p { margin: 0; overflow-wrap: anywhere; }
#scale:not([hidden]) { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .6rem; margin-top: .3rem; }
.ramp { display: inline-block; width: 7rem; height: .7rem; border-radius: 3px; }
#here { color: var(--faint); flex: 1; }
button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: .1rem .8rem; cursor: pointer; }
.sharp, canvas { image-rendering: pixelated; }
.field { position: relative; cursor: crosshair; touch-action: manipulation; scroll-margin-top: 7rem; }
.field img { width: 100%; }
.field:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; }
.field canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: .75; display: none; }
.on .field canvas { display: block; } .on .field img { filter: grayscale(1); }
.mark { position: absolute; border: 2px solid #fff; outline: 1px solid #000; display: none; } .on .mark { display: block; }
"""

# `features` are int8, patch by patch and image by image. In a list of patches an image has grid * grid.
SCRIPT = """
"use strict";
function decoded(data) { return Int8Array.from(atob(data.features), (c) => c.charCodeAt(0)); }

function cosines(data, features, patch) {
  const dim = data.dim, found = new Float32Array(features.length / dim);
  for (let i = 0; i < found.length; i++) {
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += features[i * dim + d] * features[patch * dim + d];
    found[i] = sum / data.scale ** 2;
  }
  return found;
}

function color(data, value) {
  const last = data.ramp.length - 1, place = Math.min(Math.max(value, 0), 1) * last;
  const i = Math.min(Math.floor(place), last - 1);
  return data.ramp[i].map((start, c) => start + (place - i) * (data.ramp[i + 1][c] - start));
}

function start() {
  const part = (id) => document.getElementById(id);
  const data = JSON.parse(part("data").textContent), features = decoded(data), grid = data.grid, size = grid * grid;
  const fields = [...document.querySelectorAll(".field")], mark = document.createElement("i");
  let at = null, values = null;
  mark.className = "mark";
  mark.style.width = mark.style.height = `${100 / grid}%`;

  function choose(image, row, column) {
    at = [image, row, column];
    values = cosines(data, features, image * size + row * grid + column);
    const low = values.reduce((a, b) => Math.min(a, b));
    fields.forEach((field, i) => {
      const canvas = field.querySelector("canvas"), drawn = new ImageData(grid, grid);
      for (let p = 0; p < size; p++) {
        drawn.data.set([...color(data, (values[i * size + p] - low) / Math.max(1 - low, 1e-6)), 255], 4 * p);
      }
      canvas.width = canvas.height = grid;
      canvas.getContext("2d").putImageData(drawn, 0, 0);
    });
    mark.style.left = `${100 * column / grid}%`;
    mark.style.top = `${100 * row / grid}%`;
    fields[image].append(mark);
    const name = fields[image].closest("article").querySelector("h3").textContent;
    part("told").textContent = `Similarity to row ${row + 1}, column ${column + 1} of ${name}`;
    part("low").textContent = low.toFixed(2);
    part("here").textContent = "";
    part("scale").hidden = false;
    document.body.classList.add("on");
  }

  function clear() {
    at = values = null;
    part("told").textContent = "Click a patch of an image.";
    part("scale").hidden = true;
    document.body.classList.remove("on");
  }

  fields.forEach((field, image) => {
    const within = (share) => Math.min(Math.max(Math.floor(share * grid), 0), grid - 1);
    const place = (event) => {
      const box = field.getBoundingClientRect();
      return [within((event.clientY - box.top) / box.height), within((event.clientX - box.left) / box.width)];
    };
    field.addEventListener("click", (event) => choose(image, ...place(event)));
    field.addEventListener("focus", () => {
      if (field.matches(":focus-visible")) choose(image, grid >> 1, grid >> 1);
    });
    field.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Escape") clear();
      if (!move) return;
      event.preventDefault();
      const [row, column] = at && at[0] === image ? at.slice(1) : [grid >> 1, grid >> 1];
      choose(image, within((row + move[0] + 0.5) / grid), within((column + move[1] + 0.5) / grid));
    });
    field.addEventListener("pointermove", (event) => {
      if (!values) return;
      const [row, column] = place(event);
      part("here").textContent = `under the pointer ${values[image * size + row * grid + column].toFixed(2)}`;
    });
  });
  part("clear").addEventListener("click", clear);
}
start();
"""
