"""A run: data, method, state, evaluation, and the training loop.

Every batch is a step, also one whose update is skipped: the position in the data stream is the step. What belongs to step s
is written to the metrics before the checkpoint of s begins, so a resumed run logs every step exactly once.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils
from PIL import Image

from mim_jax import checkpoint, dry_run, health, hosts, journal, learned, report, sharding
from mim_jax.bad_images import BadImages
from mim_jax.checkpoint import Checkpoints
from mim_jax.config import begins_with, resolve_encoder, resolve_target
from mim_jax.data import pipeline, sources
from mim_jax.durations import interval, total_steps
from mim_jax.evaluators import Evaluation
from mim_jax.journal import Journal
from mim_jax.lock import locked
from mim_jax.methods.base import BackboneMethod, Method, make_method
from mim_jax.state import TrainState, abstract_state, first_state
from mim_jax.step import make_train_step
from mim_jax.stopping import Stop, Stopped


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def run(config: ml_collections.ConfigDict, workdir: str | Path, stop: Stop | None = None) -> TrainState:
    """Trains to the end, or until SIGTERM or SIGINT, and returns the last state. A run that the workdir holds is continued.

    A run that `config.target` names is trained first if it is not finished; if it is stopped, its state is returned. A signal
    before training begins raises Stopped; there is nothing to save then. `stop` listens to the signals, by default only while
    this runs.

    Raises FileNotFoundError for missing data, ValueError for a bad config or a checkpoint of another one, OSError when
    nothing can be written, NotFinite for a run that has diverged. None of them harms a checkpoint.
    """
    workdir = checkpoint.absolute(workdir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(Stop())
        stack.enter_context(jax.set_mesh(sharding.make_mesh(config.mesh.data, config.mesh.fsdp)))
        resolve_target(config)
        resolve_encoder(config, workdir)
        make_method(config)  # bad values are refused before any data is opened
        data = config.data
        source, held_out = sources.open_splits(data.name, data.dir, data.split, data.eval_split)
        data.num_examples, data.num_classes, data.fingerprint = len(source), source.num_classes, source.fingerprint
        survey = pipeline.survey(source, data.canvas, data.levels, data.max_pixels)
        lines = [*source.notes, *held_out.notes, *survey.lines]
        if held_out.description != source.description:
            survey = pipeline.survey(held_out, data.canvas, survey.levels, data.max_pixels)
            lines += [f"held-out images: {line}" for line in survey.lines]
        data.levels = survey.levels
        hosts.check_same(config)
        held = stack.enter_context(locked(workdir))
        if config.model.get("remat") == "auto" and hosts.first():
            print("compiling the step with one model.remat after the other, until it fits", flush=True)
        lines += filter(None, dry_run.resolve_remat(config)[:1])
        method = make_method(config)  # with the steps per epoch of this source
        if config.get("target", {}).get("workdir") == str(workdir):
            raise ValueError(f"target.workdir is the workdir of this run, {workdir}: it needs one of its own")
        begun = checkpoint.saved_steps(workdir / "checkpoints")
        if not begun and (unfinished := train_target(config, stop)) is not None:
            return unfinished

        total = total_steps(config)
        evaluate_every, save_every = interval(config, "eval.every"), interval(config, "checkpoint.every")
        checkpoints = stack.enter_context(Checkpoints(workdir, config))
        state, target, record = start(method, config, checkpoints)
        log = stack.enter_context(Journal(workdir, total, data.batch_size, resume_step=record.get("step"), held=held))
        log.save("config.json", config.to_json_best_effort(indent=2).encode())
        log.print(f"{config.method} on {source.description}; {checkpoint.devices()}")

        step, bad_images = int(state.step), BadImages(log, before=record.get("bad_images", 0))
        evaluation = Evaluation(config, method, source, held_out, bad_images.name)
        evaluation.check = stop.check
        for line in filter(None, dict.fromkeys([*lines, evaluation.unlabeled, evaluation.warning])):
            log.print(line)
        if record:
            log.print("\n".join([f"resuming after step {step} of {total}", *checkpoint.changes(record, config)]))
            if config.continue_from and evaluate_every and (line := evaluation.open_start(workdir / journal.AT_START)):
                log.print(line)
        else:
            log.picture(0, "crops", evaluation.crop_picture())
            if evaluate_every:
                log.print("measuring the baselines, then compiling the step")
                log.write(0, baselines := evaluation.baselines(state))
                if config.continue_from:
                    log.save(journal.AT_START, evaluation.start_file())
                log.print(scores(baselines).rstrip())

        settings = {key: data[key] for key in ("batch_size", "canvas", "workers", "levels", "max_pixels")}
        masks = method.views.host_masks(config.seed)
        batches = pipeline.train_batches(
            source,
            seed=config.seed,
            start=step,
            masks=masks,
            on_bad=bad_images.count,
            ahead=stop.ahead,
            share=sharding.share(data.batch_size),
            **settings,
        )
        stack.enter_context(contextlib.closing(batches))
        train_step, compiled = make_train_step(method, config), False
        steps = StepLog(config, log, checkpoints, record.get("skipped", 0))
        evaluated, seen, finished, best = last_evaluation(log), bad_images.own, False, False
        stop.training = jax.process_count() == 1  # several processes end at once until all can do a step
        try:
            while not stop.reached():
                if evaluate_every and step > evaluated and (step % evaluate_every == 0 or step == total):
                    steps.flush()
                    with log.paused():
                        figures, pictures, beside = stop.wait(evaluate, evaluation, state, target, step == total)
                        log.write(step, figures)
                        log.show(figures)
                        for name, picture in pictures:
                            log.picture(step, name, picture)
                        for file, found in beside.items():
                            log.save(file, json.dumps(found).encode())
                        write_report(log, config, evaluation, step)
                    best = bool(config.continue_from) and checkpoints.is_best(step, figures)
                if best or (save_every and step and step % save_every == 0):
                    best = False
                    steps.flush()
                    with log.paused():
                        log.flush()
                        checkpoints.save(step, state, bad_images=bad_images.total(seen), skipped=steps.skipped)
                if finished := step == total:
                    break
                batch = sharding.global_batch(next(batches))
                if not compiled:
                    compiled = stop.training = stop.wait(compile_step, train_step, state, target, batch)
                state, metrics = train_step(state, target, batch)
                del batch  # its memory is of use to the next one
                step, seen = step + 1, bad_images.own
                if steps.every and step % steps.every == 0:
                    metrics |= {"data/bad_images": bad_images.share(seen)}
                steps.add(step, metrics)
        except Stopped:  # while it waited; nothing is half done
            pass
        steps.close()
        log.flush()
        checkpoints.save(step, state, bad_images=bad_images.total(seen), skipped=steps.skipped)
        checkpoints.wait()

        if not finished:
            log.print(f"stopped after step {step} of {total}; the same command goes on from there")
        elif verdict := write_report(log, config, evaluation, step):
            use = f"features: python -m mim_jax.embed --run={workdir} --data=FOLDER --out=features.npz\n"
            use *= isinstance(method, BackboneMethod)
            for kind, (at, score) in checkpoints.best.items():
                use += f"best {kind} score: {score:.3f} at step {at}, kept as {checkpoints.folder / str(at)}\n"
            log.print(f"{scores(log.history.latest)}{verdict}\n{use}report: {workdir / report.FILE}")
        return state


def train_target(config: ml_collections.ConfigDict, stop: Stop) -> TrainState | None:
    """Trains the run that `config.target` names, on the images of this run, unless it is finished. Returns its state if it
    was stopped before its end, else None."""
    target = config.get("target")
    if target is None or target.weights or not target.workdir or "method" not in target.network:
        return None
    network = target.network.copy_and_resolve_references().unlock()
    if checkpoint.finished(checkpoint.absolute(target.workdir), network):
        return None
    of_images = ("name", "dir", "split", "eval_split", "canvas", "workers", "levels", "max_pixels")
    network.data.update({key: config.data[key] for key in of_images})
    if jax.process_index() == 0:
        print(f"{config.method} needs the {network.method} run in {target.workdir}: training it first", file=sys.stderr)
    state = run(network, target.workdir, stop)
    stop.training = False
    return state if int(state.step) < total_steps(network) else None


def start(
    method: Method, config: ml_collections.ConfigDict, checkpoints: Checkpoints
) -> tuple[TrainState, Any, dict[str, Any]]:
    """(state, target, record), the record being {} for a new run. The first of these that exists:

    1. the run's own checkpoint; 2. that of the workdir `config.resume`, continued here; 3. a new run, which begins with
    what the run in `config.init_from` or `config.continue_from` has learned if one is named.
    """
    target = learned.load_target(method, config)
    if target:
        with config.target.unlocked():
            config.target.fingerprint = checkpoint.fingerprint(target)
    if checkpoint.saved_steps(checkpoints.folder):
        state, record = checkpoints.restore(abstract_state(method, config))
    elif config.resume:
        state, record = checkpoint.restore(config.resume, abstract_state(method, config), config)
        journal.inherit(checkpoint.absolute(config.resume), checkpoints.workdir)
    else:
        state, record = first_state(method, config), {}
        if begins_with(config):
            state = learned.begin_with(method, config, state)
    return state, target, record


def compile_step(train_step: jax.stages.Wrapped, *args: Any) -> bool:
    """Afterwards, the first call only computes."""
    train_step.lower(*args).compile()
    return True


def last_evaluation(log: Journal) -> int:
    """The last step whose scores are in the figures: an evaluation that was stopped half-way is made up for."""
    return int(multihost_utils.broadcast_one_to_all(log.history.steps.get("eval/view_retrieval", 0)))


def evaluate(
    evaluation: Evaluation, state: TrainState, target: Any, last: bool
) -> tuple[dict[str, float], list[tuple[str, Image.Image]], dict[str, Any]]:
    """(scores, pictures, what else the report shows, by file); in the last evaluation of a run also the scores of a probe with
    few labels, and the similarity of patches."""
    figures = evaluation.scores(state) | (evaluation.few_labels(state) if last else {})
    beside = {report.MISTAKES: evaluation.mistakes(state), report.SIMILARITY: evaluation.similarity(state) if last else {}}
    return figures, list(evaluation.pictures(state, target)), {file: found for file, found in beside.items() if found}


class StepLog:
    """Logs each step while the next one runs, so that no device waits for it. Counts the steps skipped in a row."""

    def __init__(self, config: ml_collections.ConfigDict, log: Journal, checkpoints: Checkpoints, skipped: int):
        self.every, self.max_skipped = interval(config, "log_every"), config.max_skipped
        self.log, self.checkpoints, self.skipped = log, checkpoints, skipped
        self.last: tuple[int, Mapping[str, Any]] | None = None

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the step before this one."""
        self.flush()
        self.last = step, metrics

    def flush(self) -> None:
        """Logs the last step, after waiting for it. Raises NotFinite after `config.max_skipped` skipped steps in a row."""
        if self.last is None:
            return
        (step, metrics), self.last = self.last, None
        skipped = bool(metrics["train/skipped"])  # waits
        self.log.advance(step)
        if not skipped:
            self._end_of_row(step - 1)
        self.skipped = self.skipped + 1 if skipped else 0
        if skipped:
            figures = {tag: float(metrics[tag]) for tag in ("train/loss", "train/grad_norm", "train/skipped")}
            self.log.write(step, figures)
            if self.skipped == 1:
                self.log.print(f"step {step} skipped: loss {figures['train/loss']}, gradient {figures['train/grad_norm']}")
        elif self.every and step % self.every == 0:
            figures = {tag: float(value) for tag, value in metrics.items() if "/" in tag}
            if (speed := self.log.images_per_s()) is not None:
                figures["perf/images_per_s"] = speed
            self.log.write(step, figures)
            self.log.show(figures)
        if self.skipped >= self.max_skipped:
            raise NotFinite(
                f"the loss, the gradient or the new state was not finite for {self.skipped} steps in a row, up to step {step}. "
                "The state is as it was before them. Look at the data, or start another run with a lower optim.lr. "
                f"{self.checkpoints.kept()}"
            )

    def close(self) -> None:
        """Logs the last step, and the skipped ones that it ends or is one of."""
        self.flush()
        self._end_of_row(self.log.step)

    def _end_of_row(self, step: int) -> None:
        """Only the first skipped step of a row is told when it comes."""
        if self.skipped > 1:
            self.log.print(f"{self.skipped} steps in a row skipped, up to step {step}")


def write_report(log: Journal, config: ml_collections.ConfigDict, evaluation: Evaluation, step: int) -> health.Verdict | None:
    """Writes report.html from what has been logged so far, and returns the verdict; the first process only."""
    if jax.process_index() != 0:
        return None
    figures, total = log.history.latest, total_steps(config)
    judged = {tag: value for tag, value in figures.items() if tag.split("/")[0] in ("health", "train", "eval")}
    prototypes = config.get("head", {}).get("out_dim")
    bank, test = evaluation.sizes
    verdict = health.verdict(judged, prototypes, step / total, getattr(evaluation.method, "codes", None), evaluation.good)
    evaluated_on = f"bank of {bank:,}, {test:,} held-out images, of which {evaluation.good:,} could be read"
    facts = {
        "data": evaluation.source.description,
        "evaluated on": "; ".join(filter(None, [evaluated_on, evaluation.warning])),
        "steps": f"{step:,} of {total:,}, batch {config.data.batch_size}",
        "unreadable images": f"{figures.get('data/bad_images') or 0:,.0f}",
        "device": checkpoint.devices(),
        "throughput": f"{figures.get('perf/images_per_s') or 0:,.0f} images/s",
        "versions": ", ".join(f"{name} {version}" for name, version in checkpoint.versions().items()),
    }
    title = f"{config.method} on {config.data.name}"
    report.write_report(log.workdir, log.history, title=title, config=str(config), verdict=verdict, facts=facts)
    return verdict


def scores(figures: Mapping[str, Any]) -> str:
    """A line for each score: its value with its standard error, if it was measured, and its baselines."""
    lines = []
    names = {"accuracy": "accuracy", "knn": "k-NN", "probe": "linear probe"}
    names |= {"view_retrieval": "view retrieval", "patch_retrieval": "patch retrieval"}
    for tag, name in names.items():
        prefix, value, error = (f"eval/{tag}_baseline_", *(figures.get(f"eval/{tag}{more}") for more in ("", "_error")))
        beside = ", ".join(f"{key.removeprefix(prefix)} {figures[key]:.3f}" for key in figures if key.startswith(prefix))
        if beside:
            written = "" if value is None else f"{value:.3f}" + ("" if error is None else f" ({error:.3f})")
            lines.append(f"{name:<15} {written:<14} baselines: {beside}\n")
    return "".join(lines)
