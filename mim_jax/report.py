"""report.html: a run on one self-contained page. Curves are SVG, pictures are embedded.

It is made from the history of the figures and `pictures/`, and rewritten while the run goes on.
"""

import base64
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mim_jax import journal, similarity, storage
from mim_jax.health import Verdict
from mim_jax.journal import History

FILE = "report.html"
MISTAKES = "pictures/mistakes.json"  # of a classifier: what `mim_jax.evaluators.mistakes.summary` returns
SIMILARITY = "pictures/similarity.json"  # what `Evaluation.similarity` returns

# picture -> (heading, caption), in the order of the page
CAPTIONS: Mapping[str, tuple[str, str]] = {
    "crops": ("Crops", "Training images as decoded, and the crops that are made of them, at their relative sizes."),
    "reconstruction": (
        "Reconstruction",
        "Held-out images, the same images masked, and the model's prediction. Visible patches are not part of the loss. "
        "If the targets are normalized, the mean and contrast of each target are taken from the image.",
    ),
    "attention": (
        "Attention",
        "Attention of the CLS token to the patches in the last block, one column for each head. Below: the patches that "
        "together hold 60 % of the attention.",
    ),
    "tokens": ("Codebook usage", "How often each code occurs among the tokens of the held-out images."),
    "features": (
        "Patch features",
        "Held-out images and the first three principal components of their patch features, shown as red, green and blue. "
        "The components are computed over all images shown.",
    ),
    "correspondences": (
        "Correspondences",
        "Two random crops of held-out images. Lines connect patches that are mutual nearest neighbors by cosine similarity; "
        "the most similar pairs are shown.",
    ),
    "neighbors": (
        "Nearest neighbors",
        "Held-out images and their nearest neighbors in the bank by cosine similarity. Green: the same class. Red: another "
        "class.",
    ),
    "confusion": (
        "Confusions",
        "How the head answers for held-out images of each class (row). A cell's brightness is the square root of its share of "
        "the row, its number that share in percent. Gray: no images.",
    ),
    "mistakes": (
        "Mistakes",
        "The first held-out images for which the head's answer is wrong. Below each: its class, and the answer.",
    ),
}

BASELINES: Mapping[str, str] = {
    "whitened": "whitened pixels",
    "pixels": "pixels",
    "untrained": "untrained",
    "start": "at the start",
    "majority": "largest class",
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over the steps. `series`: tag -> name. `zero`: the axis always starts at zero.

    The baselines of a tag are horizontal lines; that of the untrained encoder, or of the start, is also its point at step 0.
    """

    title: str
    caption: str
    series: Mapping[str, str]
    zero: bool = False


SCORES = (
    Chart(
        "Accuracy",
        "Top-1 accuracy of the trained head on held-out images. The largest class is the one with most held-out images: its "
        "share is what the best constant answer scores.",
        {"eval/accuracy": "accuracy"},
    ),
    Chart(
        "k-NN accuracy",
        "Top-1 accuracy on held-out images. The neighbors come from a bank of training images.",
        {"eval/knn": "k-NN"},
    ),
    Chart(
        "View retrieval",
        "Two random crops of each held-out image: how often the nearest second crop is of the same image. Needs no labels.",
        {"eval/view_retrieval": "view retrieval"},
    ),
    Chart(
        "Patch retrieval",
        "Patches of each held-out image's enlarged and mirrored centre: how often the nearest patch of the whole image shows "
        "the same place. Needs no labels.",
        {"eval/patch_retrieval": "patch retrieval"},
    ),
    Chart(
        "Linear probe",
        "Top-1 accuracy on held-out images of a linear classifier trained on the features of the bank.",
        {"eval/probe": "linear probe"},
    ),
)

FEW_LABELS: Mapping[str, str] = {
    "eval/probe_1_percent": "1 %",
    "eval/probe_5_percent": "5 %",
    "eval/probe_10_percent": "10 %",
    "eval/probe": "all",
}

CHARTS = (
    Chart("Loss", "Training loss, averaged over the global batch.", {"train/loss": "loss"}),
    *SCORES,
    Chart(
        "Entropy of the prototype assignments",
        "Mean entropy of the softmax over the prototypes, in nats.",
        {"health/teacher_entropy": "teacher entropy", "health/student_entropy": "student entropy"},
    ),
    Chart(
        "Mutual information and KL",
        "Mutual information between the image and the teacher's prototype assignment, and the KL divergence between teacher "
        "and student, in nats. Both go to zero in a collapse.",
        {"health/mutual_information": "mutual information", "health/kl": "KL(teacher ‖ student)"},
        zero=True,
    ),
    Chart(
        "Prototypes in use",
        "Effective share: exp(entropy of the mean assignment) / number of prototypes. 1 if all are used equally.",
        {"health/prototype_usage": "share"},
        zero=True,
    ),
    Chart(
        "Accuracy by class",
        "Mean of the accuracies of all classes, and the lowest of them.",
        {"eval/accuracy_class_mean": "mean", "eval/accuracy_worst_class": "worst class"},
    ),
    Chart("Feature rank", "Effective rank of the held-out features (RankMe).", {"health/rank": "rank"}, zero=True),
    Chart(
        "Feature spread",
        "Standard deviation of the L2-normalized features over images, scaled. 1: spread evenly over the sphere; 0: all equal.",
        {"health/feature_std": "std"},
        zero=True,
    ),
    Chart(
        "Cosine to the start",
        "Mean cosine of held-out images' features and their features before the first step. 1: the same directions.",
        {"health/start_cosine": "cosine"},
    ),
    Chart("Learning rate", "With warm-up and decay.", {"train/lr": "learning rate"}),
    Chart(
        "Throughput",
        "Training images per second. Compilation, evaluation and checkpoints are not counted.",
        {"perf/images_per_s": "images/s"},
        zero=True,
    ),
)


def write_report(
    workdir: str | os.PathLike, history: History, *, title: str, config: str, verdict: Verdict, facts: Mapping[str, str]
) -> Path:
    """Writes `workdir/report.html` atomically, from the figures and from `workdir/pictures/*.png`, and returns its path.

    `history`: that of the journal while a run goes on, else `journal.history(workdir)`. `facts`, name -> text, are shown at
    the end: data, steps, device, versions. Raises OSError, naming the path, if it cannot be written.
    """
    workdir = storage.absolute(workdir)
    latest = history.latest
    scores = "".join(_score(chart, latest) for chart in SCORES)
    charts = "".join(_chart(chart, history) for chart in CHARTS)
    drawn = {tag for chart in CHARTS for tag in chart.series} | {"step", *FEW_LABELS}
    others = sorted(tag for tag in latest if tag not in drawn and "_baseline_" not in tag and not tag.endswith("_error"))
    more = "".join(_chart(Chart(tag, "", {tag: tag}), history) for tag in others)
    tables = _few_labels(latest) + _mistakes(workdir / MISTAKES)
    files = {path.stem: path for path in sorted((workdir / "pictures").glob("*.png"))}
    pictures = "".join(_picture(files[name]) for name in {**CAPTIONS, **files} if name in files)
    body = BODY.format(
        title=escape(title),
        step=f"{latest.get('step', 0):,}",
        similarity=_similarity(workdir / SIMILARITY),
        status=escape(verdict.status),
        mood={"healthy": "good", "too early": "calm", "too few images": "calm"}.get(verdict.status, "bad"),
        sentence=escape(verdict.sentence),
        scores=scores,
        charts=charts and f'<h2>Curves <small>over training steps</small></h2><section class="charts">{charts}</section>',
        tables=tables and f'<section class="tables">{tables}</section>',
        more=more and f'<details><summary>All other metrics</summary><section class="charts">{more}</section></details>',
        pictures=pictures and f"<h2>Pictures</h2>{pictures}",
        facts=described(facts),
        config=escape(config),
    )
    page = document(title, STYLE, body)
    path = workdir / FILE
    with journal.named_errors(path):
        journal.write_whole(path, page.encode(errors="backslashreplace"))
    return path


def document(title: str, style: str, body: str) -> str:
    """A page of its own; `title` is a plain text, `body` ends with a line."""
    return DOCUMENT.format(title=escape(title), style=style, body=body)


def described(facts: Mapping[str, str]) -> str:
    """The items of a <dl>: name and text."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())


def embedded(png: bytes, alt: str) -> str:
    """A picture that the page holds."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def number(value: float) -> str:
    """A figure with three significant digits: 0.285, 12.3, 5.00e-05; from 100 on without decimals: 1,465."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value else "0"


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round numbers (1, 2, 5 times a power of ten) within [low, high], about `count` of them, with their labels."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    shown = f",.{decimals}f" if decimals <= 4 else "g"
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, format(value, shown)) for value in values]


def relation(value: float, baseline: float) -> str:
    return "above" if value > baseline else "below" if value < baseline else "equal"


def _baselines(tags: Sequence[str], latest: Mapping[str, Any]) -> dict[str, float]:
    found = {name: latest.get(f"{tag}_baseline_{key}") for tag in tags for key, name in BASELINES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _score(chart: Chart, latest: Mapping[str, Any]) -> str:
    (tag,) = chart.series
    value = latest.get(tag)
    if value is None:
        return ""
    baselines = _baselines([tag], latest)
    full = max(value, *baselines.values(), 0.01) * 1.1 if baselines else 1.0
    marks = "".join(f'<i style="left:{baseline / full:.2%}"></i>' for baseline in baselines.values())
    beside = "".join(
        f'<li class="{relation(value, baseline)}"><b>{baseline:.3f}</b> {escape(name)}</li>'
        for name, baseline in baselines.items()
    )
    error = latest.get(f"{tag}_error")
    written = f"{value:.3f}" + ("" if error is None else f" <small>± {error:.3f}</small>")
    return (
        f'<div class="score"><h3>{escape(chart.title)}</h3><p class="value">{written}</p>'
        f'<div class="bar"><span style="width:{value / full:.2%}"></span>{marks}</div>'
        f"<ul>{beside}</ul></div>"
    )


def _chart(chart: Chart, history: History) -> str:
    curves, latest = {}, history.latest
    for tag, name in chart.series.items():
        if tag in history.curves:
            first = latest.get(f"{tag}_baseline_untrained", latest.get(f"{tag}_baseline_start"))
            curves[name] = ([] if first is None else [(0.0, first)]) + history.curves[tag].points()
    if not curves:
        return ""
    baselines = _baselines(list(chart.series), latest)
    lines = [(f"c{i}", name, points[-1][1]) for i, (name, points) in enumerate(curves.items())]
    lines += [(f"baseline f{i}", name, value) for i, (name, value) in enumerate(baselines.items())]
    legend = "".join(legend_item(kind, name, f" <b>{number(value)}</b>") for kind, name, value in lines)
    return (
        f'<figure class="chart"><h3>{escape(chart.title)}</h3><ul class="legend">{legend}</ul>'
        f"{plot(chart, list(curves.values()), list(baselines.values()), last_step=max(latest['step'], 1))}"
        f"{f'<figcaption>{escape(chart.caption)}</figcaption>' if chart.caption else ''}</figure>"
    )


def legend_item(kind: str, name: str, more: str = "") -> str:
    """A line of this CSS class, its name, and more HTML."""
    return f'<li><svg width="18" height="8"><line class="{kind}" x2="18" y1="4" y2="4"/></svg>{escape(name)}{more}</li>'


def plot(chart: Chart, curves: Sequence[Sequence[tuple[float, float]]], baselines: Sequence[float], last_step: float) -> str:
    width, height, left, right, top, bottom = 520, 230, 52, 14, 8, 26
    ys = [y for curve in curves for _, y in curve] + list(baselines)
    spread = max(ys) - min(ys) or abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - 0.08 * spread, max(ys) + 0.08 * spread
    if min(ys) >= 0 and (chart.zero or min(ys) < 0.5 * spread):  # zero is near the values: show it
        y_low = 0.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x / last_step * (width - left - right)
        return across, height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for value, written in ticks(y_low, y_high):
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 3.5:.1f}" text-anchor="end">{written}</text>')
    for value, written in ticks(0, last_step):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{written}</text>')
    for i, baseline in enumerate(baselines):
        _, y = place(0, baseline)
        parts.append(f'<line class="baseline f{i}" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for i, curve in enumerate(curves):
        placed = [place(x, y) for x, y in curve]
        parts.append(f'<polyline class="c{i}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if len(curve) <= 40:
            for (x, y), (step, value) in zip(placed, curve, strict=True):
                tip = f"<title>step {step:,.0f}: {number(value)}</title>"
                parts.append(f'<circle class="c{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{tip}</circle>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'


def _few_labels(latest: Mapping[str, Any]) -> str:
    rows = [(name, number(latest[tag])) for tag, name in FEW_LABELS.items() if latest.get(tag) is not None]
    caption = "Accuracy of the linear probe with so many of the bank's labels. Fewer labels than classes are not measured."
    return _table("Few labels", ("labels", "accuracy"), rows, caption) if len(rows) > 1 else ""


def _mistakes(path: Path) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_bytes())
    classes = [(name, number(accuracy), f"{images:,}") for name, accuracy, images in found["classes"]]
    pairs = [(name, other, f"{count:,} of {images:,}") for name, other, count, images in found["pairs"]]
    return _table(
        "Worst classes", ("class", "accuracy", "images"), classes, "The head's accuracy on held-out images of the class."
    ) + _table("Confused most", ("class", "taken for", "images"), pairs, "Held-out images of a class that get another answer.")


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    cells = [[f"<th>{escape(text)}</th>" for text in columns], *([f"<td>{escape(text)}</td>" for text in row] for row in rows)]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return (
        f'<figure class="table"><h3>{escape(heading)}</h3><table>{lines}</table>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _picture(path: Path) -> str:
    heading, caption = CAPTIONS.get(path.stem, (path.stem, ""))
    return (
        f'<figure class="picture"><h3>{escape(heading)}</h3><div>{embedded(path.read_bytes(), heading)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _similarity(path: Path) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_bytes())
    addresses = found.pop("images")
    caption = (
        "Held-out images. A click on a patch shows the cosine similarity of its feature to those of all patches. Features have "
        f"{found['dim']} dimensions here, in 8 bits: the cosines are off by at most {found['error']:.3f}."
    )
    names = [f"image {number + 1}" for number in range(len(addresses))]
    fields = "".join(f"<article><h3>{n}</h3>{similarity.field(a, n)}</article>" for a, n in zip(addresses, names))
    return (
        f"<section><style>{similarity.style(found['ramp'])}{FIELDS}</style><h2>Similarity of patches</h2>{similarity.PANEL}"
        f'<div class="fields">{fields}</div><p><small>{caption}</small></p>'
        f'<script type="application/json" id="data">{json.dumps(found)}</script><script>{similarity.SCRIPT}</script></section>'
    )


DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""

BODY = """<header><h1>{title}</h1><p class="step">step {step}</p></header>
<p class="verdict {mood}"><strong>{status}</strong><span>{sentence}</span></p>
<section class="scores">{scores}</section>
{tables}
{charts}
{more}
{pictures}
{similarity}
<h2>The run</h2>
<dl>{facts}</dl>
<details><summary>Config</summary><pre>{config}</pre></details>
"""

COLORS = "#3b6fd4 #d9792b #1f8a5b #c93c37 #8a55c7 #8c6d3f #d05fa2 #5d6b7a #a5a02a #2aa5b8 #6f9b2f #b04a4a".split()
# of a page whose charts have more curves than those of a run
COLORED = "\n".join(f"line.c{i}, polyline.c{i} {{ stroke: {c}; }} circle.c{i} {{ fill: {c}; }}" for i, c in enumerate(COLORS))

FIELDS = """
.fields { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
"""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2128; --faint: #667080; --line: #e3e6ea;
  --c0: #3b6fd4; --c1: #d9792b; --good: #1f8a5b; --bad: #c93c37; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e4e8ee; --faint: #939dab;
  --line: #2d333c; --c0: #7aa5f7; --c1: #eda35e; --good: #4cc38a; --bad: #f0716b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 1120px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
header { display: flex; align-items: baseline; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
h1, h3, figure, .step { margin: 0; }
h1 { font-size: 1.6rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; font-weight: 620; }
h3 { font-size: .95rem; font-weight: 600; }
small { font-size: .85rem; font-weight: 400; margin-left: .4rem; }
.value small { font-size: 1rem; }
small, .step, figcaption, dt, .legend, summary { color: var(--faint); }
.verdict { display: flex; flex-wrap: wrap; gap: .2rem .9rem; align-items: baseline; margin: 1.2rem 0; padding: .8rem 1.1rem;
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--mood); border-radius: 8px; }
.verdict strong { color: var(--mood); white-space: nowrap; } .verdict span { flex: 1 1 18rem; }
.good { --mood: var(--good); } .calm { --mood: var(--faint); } .bad { --mood: var(--bad); }
.scores, .charts { display: grid; gap: 1rem; }
.scores { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.score, .chart, .picture, .table, dl, pre { padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.score .value { font-size: 2.1rem; line-height: 1.15; font-weight: 640; margin: .25rem 0 .6rem; letter-spacing: -.02em; }
.score ul, .legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.score ul { margin: .65rem 0 0; font-size: .85rem; }
.score li::before { content: "above "; color: var(--good); } .score li.below::before { content: "below "; color: var(--bad); }
.score li.equal::before { content: "equal to "; color: var(--faint); }
.bar { position: relative; height: 8px; border-radius: 4px; background: var(--line); }
.bar span { display: block; height: 100%; border-radius: 4px; background: var(--c0); }
.bar i { position: absolute; top: -4px; bottom: -4px; width: 2px; margin-left: -1px; background: var(--ink); opacity: .65; }
.chart { min-width: 0; }
.tables { display: grid; gap: 1rem; margin-top: 1rem; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
table { border-collapse: collapse; width: 100%; margin-top: .5rem; font-size: .9rem; }
th, td { padding: .15rem 0; text-align: right; font-weight: 400; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-size: .82rem; } th:first-child, td:first-child { text-align: left; }
.legend { margin: .3rem 0 .4rem; font-size: .82rem; }
.legend svg { margin-right: .4rem; }
.legend b { font-weight: 600; color: var(--ink); }
.chart > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 11px; }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); }
line, polyline { stroke: var(--c); stroke-width: 2; } circle { fill: var(--c); }
.baseline { stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 7 4; }
.f1 { stroke-dasharray: 2 3; } .f2 { stroke-dasharray: 9 3 2 3; }
figcaption { font-size: .82rem; margin-top: .5rem; max-width: 75ch; }
.picture { margin-bottom: 1rem; }
.picture div { margin-top: .7rem; padding: .3rem; border-radius: 6px; background: #fff; overflow-x: auto; width: fit-content;
  max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 0 0 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; } details .charts { margin-top: .8rem; }
summary { cursor: pointer; font-size: .9rem; }
pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-x: auto; }
@media (max-width: 600px) { .chart > svg { overflow: visible; } .chart > svg text { font-size: 16px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { body { max-width: none; } .chart, .picture, .score, .table { break-inside: avoid; } }
"""
