"""A run, in order: data, method, state, evaluators, the loop.

One rule of order: what belongs to step s is written to the metrics before the checkpoint of s is begun. So a run that is
killed and resumed tells each step once, and loses none.
"""

import dataclasses
import functools
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mim_jax import health, metrics, report, sharding
from mim_jax.checkpoint import Checkpoints
from mim_jax.data import pipeline, sources
from mim_jax.evaluators import Monitor, gallery
from mim_jax.methods.base import make_method
from mim_jax.models import positions
from mim_jax.optim import duration, total_steps
from mim_jax.state import TrainState, abstract_state, init_state
from mim_jax.step import make_train_step
from mim_jax.target import is_learned, load_frozen, target_config


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to the end, or to a SIGTERM, and returns the last state. A workdir that holds a run is continued.

    Raises what its parts raise: FileNotFoundError for data, ValueError for a config or a checkpoint that does not fit,
    OSError for a disk, NotFinite for a run that has blown up. None of them harms a checkpoint.

    Where the method's targets come from a network of `config.target.workdir` that is not learned yet, that run comes first,
    on the same images (and its state is what is returned if it is told to stop).
    """
    if not is_learned(config):
        first, where = target_config(config).unlock(), config.target.workdir
        first.data.update({key: config.data[key] for key in ("name", "dir", "split", "eval_split", "canvas", "workers")})
        if jax.process_index() == 0:
            told = f"{config.method} needs what {first.method} learns, and {where} does not hold it yet: training it first"
            print(told, file=sys.stderr)
        state = run(first, where)
        if int(state.step) < total_steps(first):
            return state
    with jax.set_mesh(sharding.make_mesh(config.mesh.data, config.mesh.fsdp)):
        source, held_out = open_data(config)
        method = make_method(config)
        checkpoints = Checkpoints(workdir, config)
        state, frozen, record = start(method, config, checkpoints)
        loop = Loop(config, Path(workdir), method, source, held_out, checkpoints, record)
        try:
            return loop.run(state, frozen)
        finally:
            loop.close()


def open_data(config: ml_collections.ConfigDict) -> tuple[sources.Source, sources.Source]:
    """(training images, held-out images); puts the number of the first into the config, for its steps per epoch."""
    data = config.data
    source = sources.open_source(data.name, data.dir, data.split)
    data.num_examples = len(source)
    return source, sources.open_source(data.name, data.dir, data.eval_split)


def start(method: Any, config: ml_collections.ConfigDict, checkpoints: Checkpoints) -> tuple[TrainState, Any, dict]:
    """(state, frozen, record), the record being {} for a new run. The first of these that there is:

    1. the run's own checkpoints; 2. those of the workdir `config.resume`, continued here; 3. a new run that begins
    with what the one in `config.init_from` learned; 4. a new run.
    """
    abstract = abstract_state(method, config)
    if checkpoints.latest() is not None:
        state, record = checkpoints.restore(abstract)
        checkpoints.set_aside_after(record["step"])
        return state, load_frozen(method, config), record
    if config.resume:
        state, record = Checkpoints(config.resume, config, own=False).restore(abstract)
        metrics.inherit(config.resume, checkpoints.folder.parent)
        return state, load_frozen(method, config), record
    state, frozen = init_state(method, config)
    return (learned_before(method, config, state) if config.init_from else state), frozen, {}


def learned_before(method: Any, config: ml_collections.ConfigDict, state: TrainState) -> TrainState:
    """`state` with what the run `config.init_from` learned: parameters, teacher and what the method carries along.

    Positions that were learned for images of another size are interpolated; such as are never trained are those of here.
    """
    parts = {name: getattr(state, name) for name in ("params", "teacher", "extra")}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
    learned = Checkpoints(config.init_from, config, own=False).restore_parts(abstract, loose=positions.LEARNED)

    def fit(path: Any, there: jax.Array, here: jax.Array) -> jax.Array:
        name = sharding.path_name(path)
        if there.shape == here.shape:
            return there
        if method.fixed and re.search(method.fixed, name):
            return here
        options = dict(shape=here.shape, antialias=config.model.get("antialias", False))
        fitted = functools.partial(positions.fit_positions, name.rpartition("/")[2], **options)
        return jax.jit(fitted, out_shardings=here.sharding)(there)

    return dataclasses.replace(state, **jax.tree.map_with_path(fit, learned, parts))


def make_monitor(config: ml_collections.ConfigDict, method: Any, source: sources.Source, held_out: sources.Source) -> Monitor:
    """The evaluator. Data that has one split only is divided for it: the images it is measured on do not vote."""
    e, seed, canvas = config.eval, config.seed, config.data.canvas
    if held_out.description == source.description:
        test_share = min(e.test, len(source) // 5)
        both = pipeline.eval_batch(source, e.bank + test_share, canvas, seed)
        test = {name: column[:test_share] for name, column in both.items()}
        bank = {name: column[test_share:] for name, column in both.items()}
    else:
        bank, test = pipeline.eval_batch(source, e.bank, canvas, seed), pipeline.eval_batch(held_out, e.test, canvas, seed)
    return Monitor(
        method_features=method.features,
        bank=bank,
        test=test,
        num_classes=source.num_classes,
        crops=method.crops[0],
        mean=config.data.mean,
        std=config.data.std,
        out=e.img_size or config.model.img_size,
        fraction=e.resize,
        tokens=e.tokens,
        standardize=e.standardize,
        batch_size=e.batch_size,
        seed=seed,
    )


class Loop:
    """The loop and what it carries besides the state: where the data stream stands, and what is still to be told."""

    def __init__(self, config, workdir, method, source, held_out, checkpoints, record):
        self.config, self.workdir, self.method, self.source, self.checkpoints = config, workdir, method, source, checkpoints
        self.total = total_steps(config)
        # Where the data stream stood when the last step was made. What came after it, batches that led to no step, is
        # met again by a run that resumes.
        self.record = {name: record.get(name, 0) for name in ("batches", "bad_images")}
        self.bad_images, self.bad_names = self.record["bad_images"], set[str]()
        self.skipped_in_a_row = 0
        self.terminated = self.compiled = False
        self.resumed_from = record.get("step")
        self.writer = metrics.Writer(workdir, self.resumed_from)
        self.progress = metrics.Progress(self.total, self.resumed_from or 0)
        self.stopwatch = metrics.Stopwatch()
        self.writer.text("config.json", config.to_json_best_effort(indent=2))
        self.monitor = make_monitor(config, method, source, held_out)
        # Of several processes any may be told to stop, and all must: jax's preemption service, which has its own handler.
        self.handler = signal.signal(signal.SIGTERM, self.terminate) if jax.process_count() == 1 else None

    def run(self, state: TrainState, frozen: Any) -> TrainState:
        config, step = self.config, int(state.step)
        every = {name: duration(config, config[name], "every") for name in ("eval", "checkpoint")}
        train_step = make_train_step(self.method, config)
        self.begin(state)
        stream = pipeline.train_batches(
            self.source,
            seed=config.seed,
            batch_size=config.data.batch_size,
            canvas=config.data.canvas,
            start=self.record["batches"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            masks=self.draw_masks(),
            on_bad=self.count_bad,
        )
        batches = self.record["batches"]  # taken from the stream: more than there are steps where some were skipped
        pending = None  # the metrics of the last step: fetched while the next one runs
        while step < self.total and not self.stopping(step):
            state, latest = train_step(state, frozen, sharding.global_batch(next(stream)))
            batches += 1
            step += 1 - self.settle(pending)
            pending = latest | {"batches": batches, "bad_images": self.bad_images}
            due = {name: step % n == 0 or step == self.total for name, n in every.items()}
            if any(due.values()):
                skipped = self.settle(pending)
                step, pending = step - skipped, None
                if due["eval"] and not skipped:
                    self.evaluate(state, frozen, step)
                if due["checkpoint"] and not skipped:
                    self.save(state, step)
        self.settle(pending)
        self.save(state, int(state.step))
        self.checkpoints.wait()
        self.end(int(state.step))
        return state

    def draw_masks(self) -> pipeline.DrawMasks | None:
        """What the pipeline is to draw, for a method whose masks are made on the host."""
        if not self.method.mask or not self.method.mask.on_host:
            return None
        crops = len(self.method.crops[0].policies)
        return functools.partial(self.method.mask.draw, self.config.seed, crops=crops)

    def settle(self, pending: dict[str, Any] | None) -> int:
        """Tells what a step has returned. 1 if the step was skipped, else 0; raises NotFinite after too many of those."""
        if pending is None:
            return 0
        step, skipped = int(pending["step"]), int(pending["train/skipped"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.progress.advance(step)
        if self.compiled:
            self.stopwatch.count(self.config.data.batch_size)
        else:  # the first step of this process was compilation
            self.stopwatch.lap()
            self.compiled = True
        if not skipped:
            self.record = {name: int(pending[name]) for name in self.record}
        if skipped:
            figures = {tag: float(pending[tag]) for tag in ("train/loss", "train/grad_norm", "train/skipped")}
            self.writer.write(step + 1, figures)
            self.progress.say(f"step {step + 1} left out: loss {figures['train/loss']}, gradient {figures['train/grad_norm']}")
        elif step % self.config.log_every_steps == 0:
            figures = {tag: float(value) for tag, value in pending.items() if "/" in tag}
            figures |= {"data/bad_images": int(pending["bad_images"])}
            if (images_per_s := self.stopwatch.lap()) is not None:
                figures["perf/images_per_s"] = images_per_s
            self.writer.write(step, figures)
            self.progress.report(figures)
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise NotFinite(
                f"the loss or the gradient was not finite for {self.skipped_in_a_row} steps in a row after step {step}. "
                f"The state was not touched by them. Lower optim.lr, or look at the data. {self.checkpoints.kept()}"
            )
        return skipped

    def begin(self, state: TrainState) -> None:
        """What is done once a run, before its first step: floors, and the picture of the crops."""
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.progress.say(f"{self.config.method} on {self.source.description}; {devices}")
        if self.resumed_from is not None:
            self.progress.say(f"resuming after step {int(state.step)} of {self.total}")
            return
        self.progress.say("measuring what no learning scores, then compiling the step")
        floors = self.monitor.floors(state.params)
        self.writer.write(0, floors)
        self.progress.say(scores(floors))
        self.writer.picture(0, "crops", gallery.crop_picture(self.monitor.bank, self.method, self.config.data))

    def evaluate(self, state: TrainState, frozen: Any, step: int) -> None:
        with self.stopwatch.paused():
            figures = dict(self.monitor.run(state.teacher or state.params))
            self.writer.write(step, figures)
            self.progress.report(figures)
            shown = gallery.evaluation_pictures(self.monitor, self.method, state, frozen, self.source.classes)
            for name, picture in shown:
                self.writer.picture(step, name, picture)
            if jax.process_index() == 0:
                self.report(step)

    def report(self, step: int) -> health.Verdict:
        """Rewrites report.html from what the run has told so far."""
        figures = metrics.latest(self.workdir)
        judged = {tag: value for tag, value in figures.items() if tag.split("/")[0] in ("health", "train", "eval")}
        prototypes = self.config.get("head", {}).get("out_dim")
        verdict = health.verdict(judged, prototypes, step / self.total, getattr(self.method, "codes", None))
        sizes = f"bank of {len(self.monitor.bank['image']):,}, {len(self.monitor.test['image']):,} held-out images"
        facts = {
            "data": self.source.description,
            "evaluated on": sizes,
            "steps": f"{step:,} of {self.total:,}, batch {self.config.data.batch_size}",
            "images skipped as unreadable": f"{self.bad_images:,}",
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "throughput": f"{figures.get('perf/images_per_s') or 0:,.0f} images/s",
            "versions": ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")),
        }
        title = f"{self.config.method} on {self.config.data.name}"
        report.write_report(self.workdir, title=title, config=str(self.config), verdict=verdict, facts=facts)
        return verdict

    def save(self, state: TrainState, step: int) -> None:
        with self.stopwatch.paused():
            self.checkpoints.save(step, state, **self.record)

    def end(self, step: int) -> None:
        """The last words of a run, finished or told to stop."""
        if step < self.total:
            self.progress.say(f"stopped after step {step} of {self.total}; the same command goes on from there")
            return
        if jax.process_index() == 0:
            verdict = self.report(step)
            self.progress.say(f"{scores(metrics.latest(self.workdir))}\n{verdict}\nreport: {self.workdir / 'report.html'}")

    def stopping(self, step: int) -> bool:
        """Whether SIGTERM has come; with several processes, whether it has come to any of them."""
        return self.checkpoints.reached_preemption(step) if jax.process_count() > 1 else self.terminated

    def terminate(self, *_: Any) -> None:
        self.terminated = True

    def count_bad(self, row: int, name: str) -> None:
        self.bad_images += 1
        if name not in self.bad_names:
            self.bad_names.add(name)
            self.progress.say(f"bad image, replaced by another: {name}")

    def close(self) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
        self.progress.close()
        self.checkpoints.close()
        self.writer.close()


def scores(figures: dict[str, Any]) -> str:
    """A line for each score: its value, if there is one yet, and its floors."""
    lines = []
    for tag, name in (("knn", "k-NN"), ("probe", "linear probe"), ("view_retrieval", "view retrieval")):
        floors = {key.split("_floor_")[1]: value for key, value in figures.items() if key.startswith(f"eval/{tag}_floor_")}
        value = f"{figures[f'eval/{tag}']:.3f}" if f"eval/{tag}" in figures else ""
        if floors:
            lines.append(f"{name:<15} {value:<6} floors: {', '.join(f'{k} {v:.3f}' for k, v in floors.items())}")
    return "\n".join(lines)
