"""The engine of more than one machine: shards are made by pipelines of Apache Beam.

A stage is a pipeline: the numbers of its shards are spread over the workers, which write the files into the workdir that all of
them see. The driver waits for it, writes the manifest and goes on. What a worker needs, an embedder for example, is pickled
into a file there, so graphs are small.
"""

import contextlib
import functools
import hashlib
import io
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import cloudpickle
import jax
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from mim_jax import sharding
from mim_jax.cli import raised_here
from mim_jax.curate import components
from mim_jax.curate.shards import Made, Make, Result, spans
from mim_jax.journal import named_errors, write_whole

TOLD = "\N{INFORMATION SEPARATOR ONE}"  # around an error that is for the user, in what Beam makes of it
Part = tuple[int, np.ndarray]  # the number of a span of nodes, and edges of them


class Beam:
    """Has shards made by a pipeline.

    Args:
      options: of Beam, such as "--runner=FnApiRunner".
      shared: whether the workers of other machines see the workdir, under the same path.

    Raises ValueError, in one line, for options that Beam refuses or does not know, and for workers that do not see the workdir.
    """

    def __init__(self, options: Sequence[str], shared: bool = False):
        self.options = list(options)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):  # argparse prints and exits
                runner = beam.Pipeline(options=PipelineOptions(self.options)).runner
                known = PipelineOptions([]).get_all_options().keys()
                given = PipelineOptions(self.options).get_all_options(retain_unknown_options=True).keys()
        except (SystemExit, ValueError, ImportError, AttributeError) as error:
            why = told.getvalue().rpartition("error: ")[2] if isinstance(error, SystemExit) else str(error)
            raise ValueError(f"beam.options={tuple(options)}: {' '.join(why.split())}") from error
        if unknown := sorted(given - known):
            raise ValueError(f"beam.options has --{unknown[0]}, which Beam {beam.__version__} does not know")
        name = type(runner).__name__
        if name not in StandardOptions.LOCAL_RUNNERS and not shared:
            raise ValueError(
                f"the workers of {name} are other machines, and the workdir is a folder of this one: put it where all of them "
                "see it under the same path, such as NFS, and say so by --config.beam.shared=True"
            )

    def __call__(self, work: Path, make: Make, missing: Sequence[int]) -> None:
        finished(self.graph(work, make, missing))

    def graph(self, work: Path, make: Make, missing: Sequence[int]) -> beam.Pipeline:
        pipeline = beam.Pipeline(options=PipelineOptions(self.options))
        numbers = pipeline | beam.Create([(i,) for i in missing])  # it spreads them over the workers
        _ = numbers | "make" >> beam.Map(Shipped(work, functools.partial(made, work, make)))
        return pipeline

    def components(
        self,
        stage: Callable[..., Result],
        found: Result,
        read: Callable[[int], np.ndarray],
        settings: Any,
        count: int,
        rows: int,
    ) -> np.ndarray:
        """The label of each of `count` nodes, as of `components.components`: rounds of large-star and small-star, until nothing
        changes. Each round is a stage, so that a kill loses no more than one.

        Args:
          found, read, settings: the first edges are `read` of each shard of `found`, and follow from `settings`.
          rows: nodes of a shard. The edges of a node lie in the shard of the larger one.
        """
        while True:
            engine = functools.partial(self.round, read, found.manifest["shards"], rows)
            after = stage("stars", 1, [found.digest], settings, spans(count, rows), joined, engine=engine)
            if after.digest == found.digest:
                return components.labels(count, after.array("edges"))
            found, read, settings = after, functools.partial(edges_in, after.folder), {}

    def round(self, *args: Any) -> None:
        finished(self.round_graph(*args))

    def round_graph(
        self, read: Callable[[int], np.ndarray], inputs: int, rows: int, work: Path, make: Make, missing: Sequence[int]
    ) -> beam.Pipeline:
        """Edges come together at their nodes three times: with all neighbors, with the smaller ones, and to be written."""
        pipeline = beam.Pipeline(options=PipelineOptions(self.options))

        def at(name: str, edges: Any, star: Callable[[np.ndarray], np.ndarray]) -> Any:
            step = functools.partial(star_of, rows, star)
            return edges | f"{name}: group" >> beam.GroupByKey() | f"{name}: join" >> beam.FlatMap(step)

        numbers = pipeline | "shards" >> beam.Create(range(inputs))
        edges = numbers | "read" >> beam.FlatMap(Shipped(work, functools.partial(read_of, rows, read)))
        edges = at("small", at("large", edges, components.large_star), components.small_star)
        none = pipeline | "empty" >> beam.Create([(i, np.zeros(0, np.int64)) for i in missing])
        parts = (edges, none) | beam.Flatten() | "group" >> beam.GroupByKey()
        _ = parts | "make" >> beam.Map(Shipped(work, functools.partial(made, work, make)))
        return pipeline


def finished(pipeline: beam.Pipeline) -> None:
    """Runs it. Raises ValueError for what a worker told the user; other errors are Beam's."""
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        if match := re.search(f"{TOLD}(.*?){TOLD}", str(error), re.DOTALL):
            raise ValueError(match[1]) from error
        raise


class Shipped:
    """A function for the workers: each of their processes reads it from a file, and has it once."""

    def __init__(self, work: Path, function: Callable[..., Any]):
        content = cloudpickle.dumps(function)
        self.file = work / f"{hashlib.sha256(content).hexdigest()[:16]}.tmp"  # which the stage removes
        with named_errors(self.file):
            write_whole(self.file, content)

    def __call__(self, element: Any) -> Any:
        try:
            with LOADING:
                function = loaded(self.file)
            return function(element)
        except (OSError, ValueError) as error:
            if raised_here(error):
                raise RuntimeError(f"{TOLD}{error}{TOLD}") from error
            raise


LOADING = threading.Lock()


@functools.lru_cache(maxsize=2)
def loaded(file: Path) -> Any:
    if not file.parent.is_dir():
        raise OSError(f"{socket.gethostname()} does not see {file.parent}: all workers must have the workdir under this path")
    return cloudpickle.loads(file.read_bytes())


def made(work: Path, make: Make, element: tuple[Any, ...]) -> None:
    """Makes a shard, in a folder of its own: Beam may have two workers make the same one."""
    i, *given = element
    draft = work / f"{i:06}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices())):
            make(draft, i, *given)
        with named_errors(work):
            for file in sorted(draft.iterdir(), key=lambda file: file.suffix == ".json"):  # last: now it is whole
                file.replace(work / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# Of a round of stars


def joined(span: tuple[int, int], parts: Iterable[np.ndarray]) -> Made:
    return Made({"edges": np.unique(np.concatenate(list(parts)))})


def edges_in(folder: Path, i: int) -> np.ndarray:
    return np.load(folder / f"{i:06}.edges.npy")


def read_of(rows: int, read: Callable[[int], np.ndarray], i: int) -> list[Part]:
    return divided(rows, components.both_ways(read(i)))


def star_of(rows: int, star: Callable[[np.ndarray], np.ndarray], element: tuple[int, Iterable[np.ndarray]]) -> list[Part]:
    return divided(rows, star(np.unique(np.concatenate(list(element[1])))))


def divided(rows: int, edges: np.ndarray) -> list[Part]:
    """Edges by the shard of the node that they begin at."""
    edges = np.unique(edges)
    shard = (edges >> 32) // rows
    return [(int(part[0] >> 32) // rows, part) for part in np.split(edges, np.flatnonzero(np.diff(shard)) + 1) if len(part)]
