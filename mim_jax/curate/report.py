"""report.html of a curation: one self-contained page, a function of what was found (no date, no time)."""

import io
import itertools
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from mim_jax.curate import clusters
from mim_jax.curate.plants import Planted
from mim_jax.data.decode import decode
from mim_jax.data.sources import sample, shown
from mim_jax.evaluators.pictures import enlarge
from mim_jax.evaluators.pictures import table as sheet
from mim_jax.report import COLORED, STYLE, Chart, described, document, embedded, legend_item, number, plot

GROUPS, ACROSS, CANVAS = 12, 8, 96  # pictures: rows, columns, pixels
MOST_BAD = 20  # images in the table of bad ones
UNREAD = f"What could not be read, of all sets, at most {MOST_BAD}; provenance.parquet has all of the uncurated sets."
GROUPED = "Components, largest first. Of each the first is kept, whose pixels have the smallest hash."
LISTED = "Copies of evaluation images are left out. How often the others are in an epoch is write.curated."
LEFT = (
    "th:first-child, td:first-child { text-align: left; } td { padding-left: .7rem; } "
    "td:not(:first-child) { white-space: nowrap; } figure.table { overflow-x: auto; }"
)


def page(state: Any) -> str:
    """`state`: a `stages.Curation`."""
    sections = [
        table("Counts", ("stage", "images"), counts(state), "What each stage leaves of the uncurated sets."),
        table("Bad images", ("image", "why"), bad(state), UNREAD),
        table("Curated sets", ("set", "images", "copies of evaluation images", "in the list"), curated_sets(state), LISTED),
        table("Duplicates", ("images of a component", "components"), sizes(state), duplicates_told(state)),
        leakage(state),
        truth(state),
        calibration(state),
        picture("Duplicate groups", duplicate_groups(state), GROUPED),
        picture(
            "Retrieved", retrievals(state), "Images of the curated sets, and their nearest of the pool after deduplication."
        ),
        table(
            "Retrieved, by class",
            ("class", "curated images", "of retrieved, share of this class", "of those to choose from"),
            by_class(state),
            "How often an image that was retrieved has the class of the curated one that it was retrieved for.",
        ),
        balance(state),
    ]
    facts = {
        "uncurated": "; ".join(images.source.description for images in state.uncurated),
        "curated": "; ".join(images.source.description for images in state.curated) or "none",
        "evaluation": "; ".join(images.source.description for images in state.evaluation) or "none",
        "embedder": state.embedder.description,
        "threshold": f"{state.threshold:g}" + (" (calibrated)" if state.curve else " (given)"),
        "threshold of leakage": f"{state.leakage_threshold:g}",
    }
    body = BODY.format(
        sections="".join(sections),
        facts=described({name: shown(text) for name, text in facts.items()}),
        config=escape(state.config.to_json_best_effort(indent=2)),
    )
    return document("Curation", STYLE + LEFT + COLORED, body)


def counts(state: Any) -> list[tuple[str, int]]:
    total, bad = len(state.member), int((state.member < 0).sum())
    parts = len(np.unique(state.labels))
    found = [("all", total), ("readable", total - bad), ("without exact copies", len(state.labels))]
    clean = state.labels[~state.leaked]
    found += [("one of each component", parts), ("without copies of evaluation images", len(np.unique(clean)))]
    if state.doubled.any():
        found.append(("without images that are also in a curated set", len(state.candidates)))
    return [*found, ({"retrieve": "retrieved", "balance": "balanced", "all": "chosen"}[state.config.select], len(state.chosen))]


def bad(state: Any) -> list[tuple[str, str]]:
    found = (why for each in (*state.uncurated, *state.curated, *state.evaluation) for why in each.result.column("bad") if why)
    return [(name, why) for name, _, why in (shown(each).partition(": ") for each in itertools.islice(found, MOST_BAD))]


def curated_sets(state: Any) -> list[tuple[str, int, int, str]]:
    rows, weight = [], state.config.write.curated
    for each in state.curated:
        good, out = len(each.good), len(each.left_out)
        rows.append((shown(each.source.description), good + out, out, f"{good:,} x {weight:g}"))
    return rows


def sizes(state: Any) -> list[tuple[str, int]]:
    members = np.bincount(state.labels)
    bounds = [1, 2, 3, 5, 9, 17, 65, 257, 1025, len(members) + 1]
    found = [
        (low, high - 1, int(((members >= low) & (members < high)).sum())) for low, high in zip(bounds, bounds[1:]) if low < high
    ]
    return [(f"{low:,}" if low == high else f"{low:,} to {high:,}", count) for low, high, count in found if count]


def similarity(state: Any) -> str:
    return {"pixels": "Correlation of pixels", "vectors": "Cosine"}[state.config.dedup.by]


def duplicates_told(state: Any) -> str:
    text = f"{similarity(state)} of at least {state.threshold:g} among the {state.found.rows('ids').shape[1]} nearest."
    for each in state.giants[:3]:
        text += f" A giant component had {each.size:,} images, edge density {each.density:.3f}{', and was cut' * state.cut}."
    return text


def leakage(state: Any) -> str:
    rows = []
    for images, leak in zip(state.evaluation, state.leaks):
        hit = leak >= state.leakage_threshold
        groups = np.unique(state.labels[hit])
        dropped = int(np.isin(state.labels, groups).sum())
        rows.append((shown(images.source.description), len(images.good), int(hit.sum()), len(groups), dropped))
    columns = ("evaluation set", "images", "copies in the pool", "components", "images dropped")
    caption = f"{similarity(state)} of at least {state.leakage_threshold:g}; whole components are dropped."
    return table("Leakage", columns, rows, caption)


def truth(state: Any) -> str:
    """What was found of what was planted."""
    source = state.uncurated[0].source
    if not isinstance(source, Planted):
        return ""
    found = planted_found(state)
    rows = [(name, f"{value:.4f}") for name, value in found.items()]
    return table(
        "Planted", ("", ""), rows,
        "Recall: planted copies in one component with their image. Precision: images dropped as duplicates whose "
        "representative comes from the same image. Duplicates that the data set has by itself count as wrong.",
    )  # fmt: skip


def planted_found(state: Any) -> dict[str, float]:
    """Figures of a planted pool; shares."""
    source = state.uncurated[0].source
    member = state.member[: len(source)]
    kinds, foreign = np.array(source.kinds), source.foreign
    first = {int(row): i for i, row in enumerate(source.rows) if not kinds[i] and not foreign[i]}
    copies = np.array([i for i in np.flatnonzero(member >= 0) if kinds[i] and not foreign[i]], np.int64)
    origins = np.array([first[int(source.rows[i])] for i in copies], np.int64)
    together = state.labels[member[copies]] == state.labels[member[origins]]
    found = {f"recall, {kind}": float(together[kinds[copies] == kind].mean()) for kind in dict.fromkeys(kinds[copies].tolist())}
    if len(copies):
        found = {"recall": float(together.mean())} | found
    of = np.where(foreign, -1 - source.rows, source.rows)  # the image that each comes from
    leaked = state.leaked
    places = state.origin[state.origin < len(source)]
    dropped = np.flatnonzero((state.labels != np.arange(len(state.labels))) & ~leaked & (state.origin < len(source)))
    kept = state.origin[state.labels[dropped]]
    right = np.array([k < len(source) and of[state.origin[d]] == of[k] for d, k in zip(dropped, kept)])
    if len(right):
        found["precision"] = float(right.mean())
    if foreign.any():
        foreign = foreign & (member >= 0)
        survive = ~leaked[member[foreign]]
        for what, of_these in (("unchanged", kinds[foreign] == ""), ("changed", kinds[foreign] != "")):
            found[f"evaluation images that survive, {what}"] = float(survive[of_these].mean()) if of_these.any() else 0.0
        with_foreign = np.unique(state.labels[member[foreign]])
        innocent = leaked[: len(state.labels)] & ~np.isin(state.labels, with_foreign)
        found["false drops, of the pool"] = float(innocent.sum() / max(1, len(places)))
    return found


def calibration(state: Any) -> str:
    curve = state.curve
    if curve is None:
        return ""
    at = int(np.searchsorted(curve.thresholds, state.threshold))
    series = {"precision": curve.precision, "recall": curve.recall} | {
        f"recall, {kind}": v for kind, v in curve.by_kind.items()
    }
    legend = "".join(
        legend_item(f"c{i}", name, f" <b>{number(float(v[at]))}</b>") for i, (name, v) in enumerate(series.items())
    )
    points = [list(zip(curve.thresholds.tolist(), values.tolist())) for values in series.values()]
    caption = (
        "Precision: of the pairs above a threshold, those of an image and its copy, as it would be in the whole pool. Pairs of "
        "images that resemble each other by themselves are left out: they may be copies already. Numbers are those at the "
        f"threshold, {state.threshold:g}."
    )
    return (
        f'<h2>Calibration</h2><figure class="chart"><ul class="legend">{legend}</ul>'
        f"{plot(Chart('Calibration', '', {}, zero=True), points, [], 1.0)}<figcaption>{caption}</figcaption></figure>"
    )


def duplicate_groups(state: Any) -> Image.Image | None:
    members = np.bincount(state.labels, minlength=len(state.labels))
    labels = [int(i) for i in np.lexsort((np.arange(len(members)), -members))[:GROUPS] if members[i] > 1]
    rows = [[of_pool(state, i) for i in np.flatnonzero(state.labels == label)[:ACROSS]] for label in labels]
    return sheet(rows) if rows else None


def retrievals(state: Any) -> Image.Image | None:
    rows: list[list[Image.Image | None]] = []
    captions = []
    for images, result in state.why.get("retrieved", ()):
        shown_rows = np.array(sample(images.good, GROUPS))
        ids, similarity = (result.rows(name).take(shown_rows)[:, : ACROSS - 1] for name in ("ids", "similarity"))
        for i, near, alike in zip(shown_rows, state.candidates[ids].tolist(), similarity):
            rows.append([of(images, int(images.good[i])), None, *(of_pool(state, j) for j in near)])
            captions.append(["", "", *(f"{each:.3f}" for each in alike)])
    return sheet(rows, captions) if rows else None


def by_class(state: Any) -> list[tuple[str, int, str, str]]:
    """Where all sets have the same classes: how often an image that was retrieved has the class of the one that asked."""
    rows, classes = [], state.uncurated[0].source.classes
    if not classes or any(tuple(each.source.classes) != tuple(classes) for each in (*state.uncurated, *state.curated)):
        return []
    if not (retrieved := state.why.get("retrieved", ())):
        return []
    pool = np.concatenate([labels_of(each) for each in state.uncurated])[state.origin[state.candidates]]
    for images, result in retrieved:
        own = labels_of(images)[images.good]
        right = (pool[result.array("ids")] == own[:, None]).mean(axis=1)
        for label in np.unique(own[own >= 0]):
            found, share = right[own == label], (pool == label).mean()
            rows.append((classes[label], len(found), f"{found.mean():.3f}", f"{share:.3f}"))
        rows.append(("all", len(own), f"{right.mean():.3f}", ""))
    return rows


def labels_of(images: Any) -> np.ndarray:
    """int32, of all rows; -1 where unknown."""
    return np.fromiter(images.result.column("label"), np.int32)


def of_pool(state: Any, i: int) -> Image.Image:
    at, row = state.places(state.origin[i])
    return of(state.uncurated[at], int(row))


def of(images: Any, row: int) -> Image.Image:
    return enlarge(decode(images.source[row].image, CANVAS, (0, 65535)))


def balance(state: Any) -> str:
    """Sizes of the clusters before and after."""
    if "sizes" not in state.why:
        return ""
    before = state.why["sizes"]
    rows = [spread("before", before)]
    if "after" in state.why:
        rows.append(spread("after", state.why["after"]))
    for images, hits in zip(state.curated, state.why.get("hits", ())):
        rows.append(spread(f"curated images: {shown(images.source.description)}", hits))
    columns = ("", "clusters", "empty", "median", "largest", "entropy")
    return table("Clusters", columns, rows, "Images of a cluster. Entropy: as a share of that of equal sizes.")


def spread(name: str, each: np.ndarray) -> tuple[Any, ...]:
    return name, len(each), int((each == 0).sum()), f"{np.median(each):g}", int(each.max()), f"{clusters.entropy(each):.4f}"


def table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    if not rows:
        return ""
    lines = [[f"<th>{escape(text)}</th>" for text in columns]]
    lines += [[f"<td>{escape(f'{cell:,}' if isinstance(cell, int) else str(cell))}</td>" for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<h2>{escape(heading)}</h2><figure class="table"><table>{body}</table>{told(caption)}</figure>'


def picture(heading: str, made: Image.Image | None, caption: str) -> str:
    if made is None:
        return ""
    file = io.BytesIO()
    made.save(file, "PNG")
    img = embedded(file.getvalue(), heading)
    return f'<h2>{escape(heading)}</h2><figure class="picture"><div>{img}</div>{told(caption)}</figure>'


def told(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>"


BODY = """<header><h1>Curation</h1></header>
{sections}
<h2>The run</h2>
<dl>{facts}</dl>
<details><summary>Config</summary><pre>{config}</pre></details>
"""
