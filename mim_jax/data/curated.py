"""A list of images of other sources, with sampling weights: what `python -m mim_jax.curate` has written.

A folder with list.json, {"sources": [how each is opened, and its fingerprint], "file": the name of the array of rows, "sha256":
of that file, "held_out": how the images to measure on are opened, or null}, and that file, of dtype ROW.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax import storage
from mim_jax.data.sources import Example, fingerprint, mixed_order, open_source

LIST = "list.json"
# An image is row `row` of the source `source`; in an epoch it is drawn `weight` times on average.
ROW = np.dtype([("source", "<i4"), ("row", "<i8"), ("weight", "<f4"), ("draw", "<f4")])


@dataclasses.dataclass(frozen=True, eq=False)
class CuratedSource:
    """Rows of several sources; one with weight 2 is there twice. Labels are those of the sources if all have the same."""

    folder: Path
    sources: Sequence[Any]
    source: np.ndarray  # int32 [N]
    row: np.ndarray  # int64 [N]
    classes: Sequence[str]
    notes: Sequence[str] = ()
    places: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def description(self) -> str:
        images = len(np.unique(np.stack([self.source, self.row]), axis=1).T)
        return f"{self.folder}{self.places} ({images:,} images, {len(self):,} in an epoch)"

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self, hashlib.sha256(self.source.tobytes() + self.row.tobytes()).hexdigest(), ())

    @property
    def far(self) -> bool:
        return any(getattr(source, "far", False) for source in self.sources)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, row: int) -> Example:
        example = self.sources[self.source[row]][int(self.row[row])]
        return example if self.classes else Example(example.image, -1)

    def name(self, row: int) -> str:
        return self.sources[self.source[row]].name(int(self.row[row]))

    def part(self, places: range) -> "CuratedSource":
        """An image that is there several times is wholly in the part that has the first of them, so parts share no image."""
        _, image, times = np.unique(np.stack([self.source, self.row]), axis=1, return_inverse=True, return_counts=True)
        order = mixed_order(np.zeros(len(times), np.int32))
        first = np.cumsum(times[order]) - times[order]  # the place of the first of each image
        kept = order[(first >= places.start) & (first < places.stop)]
        chosen = np.flatnonzero(np.isin(image, kept))
        note = f"[{places.start}:{places.stop}] of {len(self):,} images, cut from a fixed random order, repeated ones together"
        return dataclasses.replace(
            self,
            source=self.source[chosen],
            row=self.row[chosen],
            notes=(*self.notes, note),
            places=f"[{places.start}:{places.stop}]",
        )


def open_any(how: Mapping[str, Any]) -> Any:
    """A source of a list: `name`, `dir` and `split` as of `open_source`, and `plant`, see `mim_jax.curate.plants`, or null."""
    source = open_source(how["name"], how["dir"], how["split"])
    if not how["plant"]:
        return source
    from mim_jax.curate.plants import planted

    settings = how["plant"]
    return planted(source, open_any(settings["held_out"]) if settings["held_out"] else None, settings)


def open_curated(data_dir: str | os.PathLike | None, split: str) -> Any:
    """The list in a folder. "train" are its images, every other split is the evaluation set it was cleaned of; without one, all
    splits are the list, and Evaluation divides it.

    Raises FileNotFoundError if there is no list, and ValueError if it is damaged or a source has changed since.
    """
    folder = storage.absolute(data_dir or "")
    if not data_dir or not (folder / LIST).exists():
        where = f"there is no {LIST} in {folder}" if data_dir else "data.dir is missing"
        raise FileNotFoundError(f"{where}: set --config.data.dir to a folder that python -m mim_jax.curate has written")
    about = json.loads((folder / LIST).read_text())
    if split != "train" and about["held_out"]:
        return open_any(about["held_out"])
    content = (folder / about["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(f"{folder / about['file']} is not what was written: run python -m mim_jax.curate again")
    rows = np.load(io.BytesIO(content))
    sources = []
    for how in about["sources"]:
        try:
            sources.append(source := open_any(how))
        except FileNotFoundError as error:
            where = f"the images of {how['dir'] or how['name']}, which are not there any more"
            raise FileNotFoundError(f"{folder} lists {where}: move them back, or run python -m mim_jax.curate again") from error
        if source.fingerprint != how["fingerprint"]:
            raise ValueError(f"{source.description} has changed since {folder} was written: run python -m mim_jax.curate again")
    times = np.floor(rows["weight"].astype(np.float64) + rows["draw"]).astype(np.int64)
    same = {tuple(source.classes) for source in sources}
    return CuratedSource(
        folder,
        sources,
        np.repeat(rows["source"], times),
        np.repeat(rows["row"], times),
        same.pop() if len(same) == 1 else (),
    )
