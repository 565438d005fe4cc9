"""All methods side by side, at one equal budget: what the features are worth, and what they cost.

  python -m mim_jax.compare --out=runs/compare               pretrains and fine-tunes all of them on CIFAR-10, three seeds
  python -m mim_jax.compare --out=runs/compare --budget=600  with ten times as many images
  python -m mim_jax.compare --out=page --runs='runs/*'       a page of runs that exist, on anybody's data

Writes comparison.md and comparison.html to --out, again after each run. All methods have one network and see equally many
images; their other settings are those of their demos. Each run is one command of `python -m mim_jax.main` in a process of its
own, in a workdir under --out, and the same command goes on after a kill. Scores over the steps are of validation images, a
tenth of the training images. The test images are read once, after the last step.
"""

import dataclasses
import functools
import glob
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from mim_jax import checkpoint, cli, durations, journal, report, sharding
from mim_jax.config import OF_BACKBONE, leaves, load_config, resolve_target
from mim_jax.data import sources
from mim_jax.dry_run import step_flops
from mim_jax.evaluators import Evaluation
from mim_jax.learned import load_run
from mim_jax.state import TrainState

IMAGES_A_MINUTE = 1000  # that each run sees, for a minute of the budget
LABELED = 8  # images of pretraining for one of fine-tuning, as in BEiT's recipe
# Chosen on validation images of seed 0, those of BEGUN for MAE and DINO: docs/results.md
SHORT = {"augment.mixup": 0.0, "crops.global_crops_scale": (0.8, 1.0)}  # in so few steps augmentation does not help
BEGUN = {"optim.lr": 2e-2, "optim.layer_decay": 0.35}  # where the backbone has learned before
BATCH = 64
NETWORK = {"patch_size": 8, "dim": 128, "depth": 3, "heads": 4, "unroll": 3}


class Published(NamedTuple):
    """Top-1 accuracy on ImageNet-1k, fine-tuned and linear, and whose; cost relative to SimMIM's."""

    fine: str = ""
    linear: str = ""
    of: str = ""
    cost: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    `needs` names the entry whose run it learns from, `changes` are values of config keys.
    """

    recipe: str
    title: str
    input: str  # what the student sees of an image
    published: Published = Published()
    needs: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pool: str = "mean"  # of fine-tuning: "cls" where the method has trained this token, as in DINO's and iBOT's own


MASKS = {"mask.count": 6, "mask.smallest": 2}
# The costs and the linear figures of DINO, BEiT and SimMIM are those of SimMIM's table of methods, "S" here.
ENTRIES = {
    "dino": Entry(
        "dino:demo", "DINO", "2 large, 2 small crops", Published("82.8", "78.2", "ViT-B, MAE table 3, S", "2.0"), pool="cls"
    ),
    "mocov3": Entry(
        "mocov3:demo", "MoCo v3", "2 crops", Published("83.2", "76.7", "ViT-B, its repository, S", "1.8"), pool="cls"
    ),
    "masked_patch": Entry(
        "masked_patch:demo", "ViT", "50 % corrupted", Published("79.9", "", "ViT-B, 384 px, on JFT, its B.1.2, S", "4.0")
    ),
    "beit": Entry(
        "beit:demo", "BEiT", "38 % masked", Published("83.2", "56.7", "ViT-B, its table 4, S", "1.5"), "vqvae",
        {"crops.target_size": 16} | MASKS,
    ),
    "simmim": Entry("simmim:demo", "SimMIM", "60 % masked", Published("83.8", "56.7", "ViT-B, its repository, S", "1.0")),
    "mae": Entry("mae:demo", "MAE", "the visible 25 %", Published("83.6", "68.0", "ViT-B, its tables 3 and 12")),
    "ibot": Entry(
        "ibot:demo", "iBOT", "2 large, 2 small crops, masked", Published("84.0", "79.5", "ViT-B, its repository"), pool="cls"
    ),
    "dinov2": Entry(
        "dinov2:demo", "DINOv2", "2 large, 2 small crops, masked",
        Published("88.9", "86.5", "ViT-g, its repository; fine-tuned at 448 px, its section 7.1"), pool="cls",
    ),
    "eva": Entry(
        "eva:demo", "EVA", "38 % masked",
        Published("89.6", "", "ViT-g, 336 px, after training on the labels of IN-21k, its repository"), "dino", MASKS,
    ),
    "beit2": Entry(
        "beit2:demo", "BEiT v2", "38 % masked", Published("85.5", "80.1", "ViT-B, its paper"), "vqkd",
        {"crops.target_size": 16, "model.early_layers": 2} | MASKS,
    ),
}  # fmt: skip

TARGETS = {"vqvae": Entry("vqvae:demo", "", ""), "vqkd": Entry("vqkd:demo", "", "", needs="dino")}  # tokenizers
SCRATCH = "supervised"
PUBLISHED_SCRATCH = Published("82.3", "", "ViT-B, MAE table 3")
PATHS = ("init_from", "target.workdir")  # keys of the runs that a run begins with or learns from
KNN, PROBE, RETRIEVAL, ACCURACY = "eval/knn", "eval/probe", "eval/view_retrieval", "eval/accuracy"


@dataclasses.dataclass(frozen=True)
class Run:
    """One command and its workdir."""

    workdir: Path
    recipe: str
    changes: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        given = [f"--config.{key}={value}" for key, value in self.changes.items()]
        return [sys.executable, "-m", "mim_jax.main", f"--config={self.recipe}", *given, f"--workdir={self.workdir}"]

    @property
    def config(self) -> ml_collections.ConfigDict:
        return ml_collections.ConfigDict(json.loads((self.workdir / "config.json").read_text()))

    @property
    def finished(self) -> bool:
        return "seconds" in self.record and not self.differing and done(self)

    @property
    def differing(self) -> list[str]:
        """The keys that have other values in the config of the workdir, if there is one."""
        if not (self.workdir / "config.json").is_file():
            return []
        values = dict(leaves(self.config))
        asked = {key: json.loads(json.dumps(value, default=lambda path: path.name)) for key, value in self.changes.items()}
        there = {key: Path(values[key] or "").name if key in PATHS else values.get(key) for key in asked}
        return [key for key in asked if json.loads(json.dumps(there[key])) != asked[key]]

    @property
    def needs(self) -> list[Path]:
        """The workdirs that it begins with or learns from."""
        return [self.changes[key] for key in PATHS if key in self.changes]

    @property
    def record(self) -> dict[str, Any]:
        """Seconds and peak memory, over all the starts that it took; what was measured once at the end."""
        file = self.workdir / "compare.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def note(self, **facts: Any) -> None:
        journal.write_whole(self.workdir / "compare.json", json.dumps(self.record | facts, indent=1).encode())

    def go(self) -> None:
        """Runs the command to its end. Raises ChildProcessError, with what it said last, if it fails, and ValueError if the
        workdir is that of another command."""
        if self.differing:
            raise ValueError(f"{self.workdir} was made with another {', '.join(self.differing)}: give another folder")
        self.workdir.mkdir(parents=True, exist_ok=True)
        start, log = time.monotonic(), self.workdir / "log.txt"
        with log.open("ab") as file:
            process, mib = subprocess.Popen(self.command, stdout=file, stderr=file), self.record.get("mib", 0)
            try:
                while process.poll() is None:
                    mib = max(mib, peak_memory(process.pid))
                    time.sleep(0.2)
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):  # at Ctrl-C the terminal has told it
                    process.terminate()
                process.wait()  # it saves
                raise
        self.note(seconds=self.record.get("seconds", 0) + time.monotonic() - start, mib=mib)
        if process.returncode or not done(self):
            lines = log.read_text(errors="replace").splitlines() or [""]
            raise ChildProcessError(f"{self.workdir} ended early: {lines[-1]}; see {log}")


def peak_memory(pid: int) -> float:
    """MiB that a process has held at most, 0 where the system does not say it. (What `wait` reports may be the parent's.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def done(run: Run) -> bool:
    """Whether a run has reached its end."""
    return (run.workdir / "config.json").is_file() and checkpoint.finished(run.workdir, run.config)


def settings(seed: int, images: int) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "total": f"{images} examples",
        "data.batch_size": BATCH,
        "seed": seed,
        "optim.warmup": f"{images // 20} examples",
        "eval.bank": 2000,
        "log_every": f"{max(images // 100 // BATCH, 1)} steps",
    }


def pretraining(out: Path, name: str, seed: int, images: int) -> Run:
    """The run of an entry, without those that it needs."""
    entry = (ENTRIES | TARGETS)[name]
    base, needed = load_config(entry.recipe), f"{entry.needs}_{0 if entry.needs in TARGETS else seed}"
    changes = settings(seed, images) | {"data.split": "train[:90%]", "data.eval_split": "train[90%:]", "eval.test": 1000}
    changes |= {"eval.every": f"{images // 2} examples", "checkpoint.every": f"{images // 2} examples"}
    if name not in TARGETS:
        changes |= {f"model.{key}": value for key, value in NETWORK.items()}
    if "mask" in base and "start" in base.mask:  # iBOT's demo masks nothing in the first 1,500 of its 3,500 steps
        changes["mask.start"] = f"{images * 3 // 7} examples"
    changes |= entry.changes
    if entry.needs:
        changes["target.workdir"] = out / needed
    return Run(out / f"{name}_{seed}", entry.recipe, changes)


def fine_tuning(out: Path, name: str, seed: int, images: int) -> Run:
    """The supervised run that begins with what `pretraining` learned from `images` images, or with nothing."""
    changes = settings(seed, images // LABELED // BATCH * BATCH) | {"eval.test": 10_000}
    changes |= {"eval.every": f"{images} examples", "checkpoint.every": "never"} | SHORT
    if name == SCRATCH:
        changes |= {f"model.{key}": value for key, value in NETWORK.items()}
    else:
        changes |= {"init_from": out / f"{name}_{seed}", "model.pool": ENTRIES[name].pool} | BEGUN
    return Run(out / f"{name}_{seed}_fine", "supervised:demo", changes)


def plan(out: Path, names: Sequence[str], seeds: int, images: int) -> Iterator[tuple[str, int, str, Run]]:
    """(entry, seed, what is done, run) in an order in which each finds what it needs."""

    def needed(name: str, seed: int, given: set[Path]) -> Iterator[tuple[str, int, str, Run]]:
        seed = 0 if name in TARGETS else seed
        run = pretraining(out, name, seed, images)
        if run.workdir in given:
            return
        given.add(run.workdir)
        if needs := (ENTRIES | TARGETS)[name].needs:
            yield from needed(needs, seed, given)
        yield name, seed, "pretraining", run

    given: set[Path] = set()
    for seed in range(seeds):
        for name in names:
            if name != SCRATCH:
                yield from needed(name, seed, given)
            yield name, seed, "fine-tuning", fine_tuning(out, name, seed, images)


def on_test_images(run: Run) -> dict[str, float]:
    """k-NN, linear probe and view retrieval of what a run has learned: bank and probe of 10,000 training images, measured on
    the test images."""
    learned = load_run(run.workdir)
    config = learned.config.copy_and_resolve_references().unlock()
    config.eval.update(bank=10_000, test=10_000)
    with jax.set_mesh(sharding.make_mesh(-1, 1)):
        source, held_out = (sources.open_source(config.data.name, config.data.dir, split) for split in ("train", "test"))
        state = TrainState(jax.numpy.asarray(learned.step), learned.params, {}, None, learned.extra)
        scores = Evaluation(config, learned.method, source, held_out).scores(state)
    return {tag: scores[tag] for tag in (KNN, PROBE, RETRIEVAL)}


def changed(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of a run's config that are not those of its recipe, nor found by the run itself."""
    recipe, now = (dict(leaves(checkpoint.as_dict(each))) for each in (load_config(config.recipe), config))
    found = r"(target\.network|encoder)\..*|data\.(num_\w+|fingerprint|levels)"
    if config.get("encoder"):
        found += rf"|model\.({'|'.join(OF_BACKBONE)})|data\.(mean|std)"
    values = dict(leaves(config))
    return {key: values[key] for key in recipe if now[key] != recipe[key] and not re.fullmatch(found, key)}


def command_of(config: ml_collections.ConfigDict, workdir: Path) -> str:
    """The command of a run: its recipe, and what is different in its config."""
    given = [f"--config.{key}={value}" for key, value in sorted(changed(config).items())]
    return shlex.join(["mim_jax", f"--config={config.recipe}", *given, f"--workdir={workdir}"])


@functools.cache
def flops_per_image(run_workdir: Path) -> float:
    """Of the step of a run. It is traced once, though the page is written again after each run."""
    config = Run(run_workdir, "", {}).config
    resolve_target(config)
    with jax.set_mesh(sharding.make_mesh(-1, 1)):
        return step_flops(config) / config.data.batch_size


def seconds_per_image(workdir: Path) -> float | None:
    """The median over the run, without compilation, evaluation and checkpoints."""
    rates = [row["perf/images_per_s"] for row in journal.rows(workdir) if row.get("perf/images_per_s")]
    return 1 / statistics.median(rates) if rates else None


@dataclasses.dataclass
class Row:
    """A method in the table: the figures of its runs, one number for each seed. Costs are those of pretraining."""

    title: str
    input: str
    published: Published = Published()
    fine: list[float] = dataclasses.field(default_factory=list)
    linear: list[float] = dataclasses.field(default_factory=list)
    knn: list[float] = dataclasses.field(default_factory=list)
    retrieval: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of the steps alone
    mib: list[float] = dataclasses.field(default_factory=list)
    images: int = 0
    flops: float = 0.0  # of an image
    curves: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)  # tag -> of the first seed
    commands: list[str] = dataclasses.field(default_factory=list)
    settings: tuple[str, ...] = ()  # that differ from the recipe
    seen_at: str = ""  # how images are shown to the network for k-NN and linear
    tested: bool = True  # whether scores are of the test images, read by this program


@dataclasses.dataclass
class Table:
    rows: list[Row]
    left_out: list[str]  # runs, and why


def table_of(runs: Sequence[Run]) -> Table:
    """A row for all runs whose settings differ in the seed alone, with the supervised runs that began with one of them.

    Left out is what is no finished run of this version, and supervised runs that began with another run or that have other
    settings than those before them in the same row.
    """
    found: dict[tuple[str, ...], Row] = {}
    keys: dict[str, tuple[str, ...]] = {}  # workdir -> key of its row
    labeled: dict[tuple[str, ...], tuple[str, ...]] = {}  # key of a row -> that of its supervised runs
    table = Table([], [])
    opened = []
    for run in runs:
        try:
            config = run.config
            if not done(run):
                raise ValueError("it is not finished")
            opened.append((run, config, settings_of(config), journal.history(run.workdir)))
        except (OSError, ValueError, AttributeError, KeyError) as error:
            table.left_out.append(f"{run.workdir}: {str(error).splitlines()[0]}")
    order = {name: place for place, name in enumerate([SCRATCH, *ENTRIES])}
    opened.sort(key=lambda each: (order.get(each[1].method, len(order)), each[1].seed))
    for run, config, key, history in opened:
        if config.method == "linear":
            table.left_out.append(f"{run.workdir}: linear probes are made of every run; that of this run is in its report")
        elif config.method != SCRATCH:
            row = found.setdefault(key, titled(config, key))
            keys[os.path.abspath(run.workdir)] = key
            add(row, run, config, history)
        elif not config.init_from:
            row = found.setdefault(key, titled(config, key))
            table.left_out += add_labeled(row, run, config, history)
    for run, config, key, history in opened:
        if config.method == SCRATCH and config.init_from:
            begun = re.sub(r"/checkpoints/\d+/?$", "", os.path.abspath(config.init_from))
            if begun not in keys:
                table.left_out.append(f"{run.workdir}: it began with {config.init_from}, which is not in the table")
            elif labeled.setdefault(keys[begun], key) != key:
                table.left_out.append(f"{run.workdir}: others that began with {begun} and its like have other settings")
            else:
                table.left_out += add_labeled(found[keys[begun]], run, config, history)
    table.rows = list(found.values())
    for title in {row.title for row in table.rows}:
        same = [row for row in table.rows if row.title == title]
        if len(same) > 1:  # what tells them apart
            common = set.intersection(*(set(row.settings) for row in same))
            for row in same:
                row.title = ", ".join([title, *(each for each in row.settings if each not in common)])
    return table


def settings_of(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """What two runs have in common that are the same but for the seed."""
    given = {key: value for key, value in changed(config).items() if key != "seed" and (value or key not in PATHS)}
    return (config.recipe, *(key if key in PATHS else f"{key}={value}" for key, value in sorted(given.items())))


def titled(config: ml_collections.ConfigDict, settings: tuple[str, ...]) -> Row:
    """The row of a run. What its student sees is said where it is that of ENTRIES."""
    entry = ENTRIES.get(config.method)
    if config.method == SCRATCH:
        return Row("supervised, from scratch", "whole, with labels", PUBLISHED_SCRATCH, settings=settings)
    if entry is None:
        return Row(config.recipe, "", settings=settings)
    changed = {f"{key}={value}" for key, value in entry.changes.items()}
    asked, given = ({each for each in found if re.match(r"mask\.(?!start)|crops\.", each)} for found in (changed, settings))
    return Row(entry.title, entry.input if given == asked else "", entry.published, settings=settings)


def add(row: Row, run: Run, config: ml_collections.ConfigDict, history: journal.History) -> None:
    """Adds a run of pretraining."""
    row.tested &= "test" in run.record
    test = run.record.get("test") or history.latest
    for values, tag in ((row.linear, PROBE), (row.knn, KNN), (row.retrieval, RETRIEVAL)):
        values += [test[tag]] if tag in test else []
    row.images = durations.total_steps(config) * config.data.batch_size
    row.seconds += [row.images * each] if (each := seconds_per_image(run.workdir)) else []
    row.mib += [run.record["mib"]] if run.record.get("mib") else []
    if not row.curves:
        row.seen_at = f"{config.eval.img_size or config.model.img_size} px" + " and standardized" * config.eval.standardize
        row.flops = flops_per_image(run.workdir)
        row.curves = {tag: history.curves[tag].points() for tag in (KNN, RETRIEVAL) if tag in history.curves}
    row.commands.append(command_of(config, run.workdir))


def add_labeled(row: Row, run: Run, config: ml_collections.ConfigDict, history: journal.History) -> list[str]:
    """Adds a supervised run; or says why it cannot."""
    if ACCURACY not in history.latest:
        return [f"{run.workdir}: its accuracy was not measured"]
    row.fine.append(history.latest[ACCURACY])
    row.commands.append(command_of(config, run.workdir))
    return []


HEADINGS = (
    *("method", "input", "fine-tuned", "linear", "k-NN", "view retrieval", "images seen", "GFLOP an image"),
    *("cost", "peak memory", "ImageNet-1k: fine-tuned", "ImageNet-1k: linear", "of", "S: cost"),
)


def cells(row: Row, reference: float | None) -> list[str]:
    """The row as text, in the order of HEADINGS; costs relative to `reference` seconds, if it is given."""
    seconds = statistics.mean(row.seconds) if row.seconds else None
    cost = "" if seconds is None else f"{seconds:,.0f} s"
    if seconds and reference:
        cost = f"{seconds / reference:.2f} ({cost})"
    return [
        *(row.title, row.input, *(spread(values) for values in (row.fine, row.linear, row.knn, row.retrieval))),
        *(f"{row.images:,}" if row.images else "", f"{row.flops / 1e9:.3f}" if row.flops else "", cost),
        *(f"{max(row.mib):,.0f} MiB" if row.mib else "", *row.published),
    ]


def spread(values: Sequence[float]) -> str:
    """Mean and standard error over the seeds."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def notes(table: Table) -> list[str]:
    """What the columns are, paragraph by paragraph."""
    rows = [row for row in table.rows if row.seen_at]
    ways = {way: [row.title for row in rows if row.seen_at == way] for way in dict.fromkeys(row.seen_at for row in rows)}
    where = "the images that a run is evaluated on"
    if rows and all(row.tested for row in rows):
        where = "all test images, which this program reads once, after the last step, with a bank of 10,000 training images"
    said = [
        f"Scores are shares, mean ± standard error over the seeds. Linear, k-NN and view retrieval: of {where}. Linear: ridge "
        "regression on frozen features. k-NN: 20 neighbors. View retrieval: how often the nearest of all second crops is of "
        "the same image. Fine-tuned: the accuracy of the supervised run that began with what was learned, on the images that "
        "it is evaluated on, with as many labeled steps as the one from scratch; in the runs that this program makes, on all "
        f"test images and with 1 step for {LABELED} of pretraining.",
    ]
    if len(ways) > 1:
        listed = "; ".join(f"{way}: {', '.join(titles)}" for way, titles in ways.items())
        said.append(f"For k-NN and linear each recipe shows its images in its own way, which moves these scores. {listed}.")
    said += [
        "Cost: time of the pretraining steps, relative to SimMIM, without compilation and evaluation, and without the run that "
        "a method learns from (a tokenizer or a teacher). GFLOP: of a step, forward and backward, as XLA counts them. Peak "
        "memory: of the process that trains. S: SimMIM's comparison of methods, costs on ImageNet, as lectures quote it.",
    ]
    if any(row.title in ("BEiT", "BEiT v2") for row in rows):
        said.append("All seeds of BEiT and BEiT v2 have one tokenizer: its share of the spread is not in theirs.")
    return said + (["Left out: " + "; ".join(table.left_out) + "."] if table.left_out else [])


def write_page(out: Path, table: Table, before: Sequence[str] = ()) -> None:
    """comparison.md and comparison.html. `before`: commands of runs that others learn from."""
    rows, said = table.rows, notes(table)
    simmim = [row for row in rows if row.title == ENTRIES["simmim"].title and row.seconds]
    reference = statistics.mean(simmim[0].seconds) if simmim else None
    lines = [cells(row, reference) for row in rows]
    markdown = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    markdown += ["| " + " | ".join(line) + " |" for line in lines]
    commands = [*before, *(command for row in rows for command in row.commands)]
    text = "\n\n".join(["# Comparison", "\n".join(markdown), *said, "```\n" + "\n".join(commands) + "\n```"])
    journal.write_whole(out / "comparison.md", text.encode() + b"\n")

    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    lines_of_table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    charts = ""
    for tag, title in ((KNN, "k-NN accuracy"), (RETRIEVAL, "View retrieval")):
        drawn = [(row.title, row.curves[tag]) for row in rows if tag in row.curves]
        if drawn:
            legend = "".join(report.legend_item(f"c{i}", name) for i, (name, _) in enumerate(drawn))
            last = max(points[-1][0] for _, points in drawn)
            svg = report.plot(report.Chart(title, "", {}), [points for _, points in drawn], [], last)
            caption = "Over the steps of the first seed, on the images that the run was evaluated on."
            charts += (
                f'<figure class="chart"><h3>{title}</h3><ul class="legend">{legend}</ul>{svg}'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    body = BODY.format(
        head=head,
        rows=lines_of_table,
        notes="".join(f"<p>{escape(note)}</p>" for note in said),
        charts=charts and f'<h2>Curves</h2><section class="charts">{charts}</section>',
        commands=escape("\n".join(commands)),
    )
    journal.write_whole(out / "comparison.html", report.document("Comparison", report.STYLE + STYLE, body).encode())


STYLE = ".wide { overflow-x: auto; } .wide table { font-size: .85rem; white-space: nowrap; }\n"
STYLE += ".wide th, .wide td { padding: .35rem .7rem; } th:nth-child(2), td:nth-child(2) { text-align: left; }\n"
STYLE += report.COLORED

BODY = """<header><h1>Comparison</h1></header>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
{notes}
{charts}
<h2>The runs</h2>
<details><summary>Commands</summary><pre>{commands}</pre></details>
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    out: str = "runs/compare"
    budget: float | None = None  # minutes on 2 CPU cores, roughly; 60
    seeds: int | None = None  # 3
    methods: str | None = None  # all
    runs: str | None = None


def main(argv: list[str]) -> None:
    given, _ = cli.begin(Flags, argv, __doc__ or "")
    with cli.in_one_line("stopped; the same command goes on from there"):
        compare(given, cli.of_this_machine("out", given.out, "folder"))


def compare(given: Flags, out: Path) -> None:
    if given.runs is not None:
        if given.budget or given.seeds or given.methods:
            raise ValueError("--runs makes a page of runs that exist: --budget, --seeds and --methods do not go with it")
        found = [Path(path) for path in sorted(glob.glob(os.path.expanduser(given.runs)))]
        table = table_of([Run(path, "", {}) for path in found if (path / "config.json").is_file()])
        if not table.rows:
            raise ValueError("; ".join([f"--runs={given.runs} matches no finished run", *table.left_out]))
        write_page(out, table)
        for line in table.left_out:
            print(f"left out: {line}", file=sys.stderr)
        print(f"{len(found) - len(table.left_out)} runs: {out}/comparison.md, {out}/comparison.html")
        return
    names = given.methods.split(",") if given.methods else [*ENTRIES, SCRATCH]
    if unknown := [name for name in names if name not in {*ENTRIES, SCRATCH}]:
        raise ValueError(f"--methods has {', '.join(unknown)}, but there are only {', '.join([*ENTRIES, SCRATCH])}")
    budget, seeds = 60 if given.budget is None else given.budget, 3 if given.seeds is None else given.seeds
    if not 100 * BATCH / IMAGES_A_MINUTE <= budget < math.inf:
        raise ValueError(f"--budget is {budget:g}, but must be {100 * BATCH / IMAGES_A_MINUTE:g} minutes or more")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}, but must be 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the run is told, see `Run.go`
    pretrain(out, list(plan(out, names, seeds, round(budget * IMAGES_A_MINUTE) // BATCH * BATCH)))


def pretrain(out: Path, runs: Sequence[tuple[str, int, str, Run]]) -> None:
    """Goes through the plan; says before each run how far it is. What fails is named at the end, with the runs that need it,
    and the rest goes on."""
    failed: dict[Path, str] = {}
    for number, (name, seed, what, run) in enumerate(runs):
        if missing := [path for path in run.needs if path in failed]:
            failed[run.workdir] = f"{run.workdir}: it needs {missing[0]}"
            continue
        if not run.finished:
            print(f"{number + 1}/{len(runs)}  {name}, seed {seed}, {what}; {time_left(runs)}", flush=True)
            try:
                run.go()
            except ChildProcessError as error:
                failed[run.workdir] = str(error)
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
        if what == "pretraining" and name in ENTRIES and "test" not in run.record:
            run.note(test=on_test_images(run))
        finished = [(each, run) for each, *_, run in runs if run.finished]
        targets = [command_of(run.config, run.workdir) for each, run in finished if each in TARGETS]
        write_page(out, table_of([run for each, run in finished if each not in TARGETS]), targets)
    print(f"{out}/comparison.md, {out}/comparison.html")
    if failed:
        sys.exit("\n".join(["error: some runs failed:", *failed.values()]))


def time_left(runs: Sequence[tuple[str, int, str, Run]]) -> str:
    """By the mean time of the finished runs of the same kind, or of all where there is none."""
    spent: dict[str, list[float]] = {}
    for name, _, what, run in runs:
        if run.finished:
            for kind in ("", f"{name} {what}"):
                spent.setdefault(kind, []).append(run.record["seconds"])
    if not spent:
        return "time left unknown"
    ahead = [f"{name} {what}" for name, _, what, run in runs if not run.finished]
    return f"about {sum(statistics.mean(spent.get(kind) or spent['']) for kind in ahead) / 60:.0f} minutes left"


if __name__ == "__main__":
    main(sys.argv)
