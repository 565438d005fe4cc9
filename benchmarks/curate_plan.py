"""What a curation of very many images would take, on paper: bytes, memory, products, hours. Nothing of that size was run.

    python benchmarks/curate_plan.py [--images=1000000000] [--embedder=vitl14] [--chip=h100] [--hosts=32] ...
    python benchmarks/curate_plan.py --check

Prints a Markdown table with a row for each stage. The formulas follow mim_jax/curate; `--check` runs the stages on 2,000
synthetic images and raises ValueError unless bytes and products are those of the formulas.
"""

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from curate_memory import Drawn, synthetic

from mim_jax import load_config
from mim_jax.curate import alignment, clusters, neighbors, stages
from mim_jax.curate.alignment import COARSE, SIDE, STEPS, coarse_crops, coarse_parts
from mim_jax.curate.shards import GROUP
from mim_jax.models import vit
from mim_jax.topology import H100, TPUS

EMBEDDERS = {"vits14": (384, 12, 6), "vitb14": (768, 12, 12), "vitl14": (1024, 24, 16)}  # width, depth, heads
CHIPS = TPUS | {"h100": H100}
HEADER, LIST_HEADER, PAGE = 128, 192, 4096  # bytes of the header of an .npy file, of that of the list, of a page of memory
QUERIES = 8192  # of a product, of each device
SKETCH = SIDE**2


class Plan(NamedTuple):
    """Sizes that the formulas are of."""

    images: int
    pool: int  # different ones
    left: int  # after deduplication
    curated: int
    evaluation: int
    chosen: int
    dim: int
    k: int  # neighbors
    cells: int
    probes: int
    skew: float  # rows in the probed cells, as a multiple of those in cells of equal sizes
    shard: int  # rows
    devices: int  # of a host
    asked: int  # neighbors of a curated image
    tree: tuple[int, ...]  # clusters of the levels
    rounds: int
    iterations: int
    points: tuple[int, ...]


class Stage(NamedTuple):
    name: str
    read: float  # bytes, also those of the digest; from the disk or from the system's cache
    written: int  # bytes of arrays, which stay
    memory: float  # bytes, of the process that needs most
    products: float  # multiply-adds of two vectors are `dim` each
    shards: int  # which hosts can share; 1: in one process
    pairs: int = 0  # of sketches that are aligned
    queries: int = 0  # whose crops are made


def arrays(rows: int, shard: int, *widths: int) -> int:
    """Bytes of .npy files with so many bytes a row."""
    return rows * sum(widths) + HEADER * len(widths) * math.ceil(rows / shard)


def scattered(row: int) -> float:
    """Bytes that the disk reads for a row alone: whole pages."""
    return PAGE * (1 + (row - 1) / PAGE)


def aligning(pairs: int, queries: int, fine: float) -> float:
    """Multiply-adds, see `alignment`; `fine` is the share of pairs that are looked at with large sketches."""
    side, parts, crops = COARSE.side, len(coarse_parts()), len(coarse_crops()[0])
    of_query = 2 * (parts * side**3 + parts**2 * side**3)  # for both blurs rows, then columns
    of_pair = 2 * crops * side**2 + 4 * side**3  # the image and its mirror image; the whole
    tried = 9 * 2 * len(STEPS)  # parts, of columns and of rows
    of_fine = 4 * SIDE**3 + (4 * tried + 2 * 2 * len(STEPS)) * SIDE**3 + tried * SIDE**2  # matrices, the crops made with them
    return queries * of_query + pairs * (of_pair + fine * of_fine)


def kmeans(rows: float, k: int, iterations: int) -> float:
    """Products, at most: fewer if it ends early."""
    return rows * k * (iterations + 1)


def stages_of(plan: Plan) -> list[Stage]:
    """See `stages.py` and `neighbors.py`; the embedder's work is not in it, nor are images, names and labels."""
    n, p, left, dim = plan.images, plan.pool, plan.left, plan.dim
    vector, shards = 2 * dim, math.ceil(p / plan.shard)
    state = 4 * n + 20 * p  # member; origin, keys, labels
    learned = min(p, stages.A_CELL * plan.cells)
    found: list[Stage] = []

    def add(
        name: str, read: float, written: int, memory: float, products: float = 0, of: int = 1, pairs: int = 0, queries: int = 0
    ) -> None:
        found.append(Stage(name, read + written, written, memory, products, of, pairs, queries))  # the digest reads, too

    queries = QUERIES * plan.devices
    all_files = arrays(n, plan.shard, vector, 32, SKETCH, 1)
    add("embed", 0, all_files, 3 * plan.shard * vector, of=math.ceil(n / plan.shard))
    add("order", 33 * n, arrays(n, n, 4) + arrays(p, p, 8, 8), 45 * n)
    read = p * (scattered(vector) + scattered(SKETCH))
    add("pool", read, arrays(p, plan.shard, vector, SKETCH), plan.shard * (vector + SKETCH), of=shards)
    read = 2 * 11 * learned * scattered(vector)
    add("cells", read, arrays(plan.cells, plan.cells, vector), 40 * p + state, kmeans(learned, plan.cells, 10))
    add("assigned", p * vector, arrays(p, plan.shard, 4), plan.shard * vector, p * plan.cells, shards)
    # Each shard has the rows of some cells, and reads all the cells that these ask for: at most `probes` for each.
    asked = min(1.0, (plan.shard / p + 1 / plan.cells) * plan.probes)
    read = (2 + shards * asked) * p * scattered(vector)
    memory = 16 * p + plan.shard * (vector + 20 * plan.probes + 20 * plan.k)
    products = p * plan.cells + p * plan.probes * p / plan.cells * plan.skew
    add("neighbors", read, arrays(p, plan.shard, 4, 4 * plan.k, 4 * plan.k), memory, products, shards)
    read = p * 4 * plan.k + p * (1 + plan.k) * scattered(SKETCH)
    memory = plan.shard * (12 * plan.k + SKETCH) + alignment.QUERIES * plan.devices * (plan.k + 1) * 2 * SKETCH
    add("aligned", read, arrays(p, plan.shard, 4, 4 * plan.k, 4 * plan.k), memory, of=shards, pairs=p * plan.k, queries=p)
    add("components", 2 * p * (4 + 8 * plan.k), arrays(p, p, 4), state + 24 * p)
    both = p + plan.curated
    read = (both + (math.ceil(p / queries) + math.ceil(plan.curated / queries)) * plan.evaluation) * vector
    read += both * (SKETCH + plan.k * scattered(SKETCH))
    written = arrays(p, plan.shard, 4, 4) + arrays(plan.curated, plan.shard, 4, 4)
    products, pairs = both * plan.evaluation, both * plan.k
    add("leakage", read, written, plan.shard * vector, products, shards, pairs, both)
    read = (2 * plan.evaluation + math.ceil(plan.evaluation / queries) * both) * vector
    read += 2 * plan.evaluation * (SKETCH + plan.k * scattered(SKETCH))
    written, of = 2 * arrays(plan.evaluation, plan.shard, *[4 * plan.k] * 2), math.ceil(plan.evaluation / plan.shard)
    pairs = 2 * plan.evaluation * plan.k
    add("leakage_back", read, written, plan.shard * vector, products, of, pairs, 2 * plan.evaluation)
    read, written = math.ceil(plan.curated / queries) * left * vector, arrays(plan.curated, plan.shard, *[4 * plan.asked] * 2)
    asking = math.ceil(plan.curated / plan.shard)
    add("retrieve", read, written, 8 * left + plan.shard * vector, plan.curated * left, asking)
    products, read, rows, written = 0.0, 0.0, left, 0
    for k, points in zip(plan.tree, plan.points):
        again = min(rows, points * k)
        products += kmeans(rows, k, plan.iterations) + plan.rounds * (kmeans(again, k, plan.iterations) + rows * k)
        read += vector * ((2 * plan.iterations + 1 + plan.rounds) * rows + plan.rounds * (2 * plan.iterations + 1) * again)
        written += (plan.rounds + 1) * (arrays(k, k, vector) + arrays(rows, rows, 4, 4))
        rows = k
    add("balance", read, written, state + 80 * left + 12 * dim * plan.tree[0], products)
    written = LIST_HEADER + 20 * (plan.chosen + plan.curated)
    add("write", 65 * n, written, state + 30 * p + 100 * plan.chosen + 2 * GROUP * 350)
    return found


def embedder_flops(name: str) -> float:
    """Of one image of 224 pixels, forward, as XLA counts the unrolled network."""
    dim, depth, heads = EMBEDDERS[name]
    network = vit.ViT(patch_size=14, img_size=224, dim=dim, depth=depth, heads=heads, unroll=depth)
    image = [jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32)]
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    cost: Any = jax.jit(network.apply).lower(variables, image).cost_analysis()
    return cost["flops"]


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB" if count < 1000 else f"{count / 1000:,.3g} EB"


def shown(hours: np.ndarray) -> str:
    low, likely, high = (f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in hours)
    return f"{low} to {high}, likely {likely}" if hours.any() else "-"


def table(plan: Plan, given: Any) -> None:
    chip, flops = CHIPS[given.chip], embedder_flops(given.embedder)
    columns = ("stage", "read", "written", "memory", "hosts", "multiply-adds", "accelerator-hours", "hours of reading")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    together = {select: np.zeros(3) for select in ("retrieve", "balance")}
    for stage in stages_of(plan):
        work, shares = stage.products * plan.dim, given.product_share
        work += aligning(stage.pairs, stage.queries, given.fine)
        read, written, memory = stage.read, stage.written, stage.memory
        if stage.name == "embed":
            records = plan.images * given.record
            work, shares = plan.images * flops / 2, given.embed_share
            read, written = read + plan.images * given.image_bytes + records, written + records
        if stage.name == "write":
            read, written = read + plan.images * given.record, written + plan.images * given.provenance
        hosts = min(given.hosts, stage.shards)
        hours = np.array([2 * work / float(share) / chip.flops / 3600 for share in reversed(shares)])
        for select, each in together.items():
            each += hours * (stage.name == select or stage.name not in together)
        cells = (
            stage.name,
            size(read),
            size(written),
            size(memory),
            f"{hosts:,}",
            f"{work:.2e}" if work else "-",
            shown(hours),
        )
        print(f"| {' | '.join(cells)} | {read / given.disk / hosts / 3600:,.2g} |")
    print()
    for select, each in together.items():
        print(f"{select}: {shown(each)} {given.chip}-hours")
    peak = f"{chip.flops / 1e12:.0f} TFLOP/s a {given.chip}"
    print(f"{given.embedder}: {flops / 1e9:.1f} GFLOP an image, 2 for a multiply-add; peak {peak}")


def planned(given: Any) -> Plan:
    n = given.images
    pool = round(n * given.different)
    return Plan(
        n, pool, round(pool * given.left), given.curated, given.evaluation, given.chosen, given.dim, given.k, given.cells,
        given.probes, given.skew, given.shard_rows, given.devices,
        4 if given.curated >= stages.LARGE else 32, (50_000, 5_000, 500), 10, 50, (10, 5, 3),
    )  # fmt: skip


def check() -> None:
    """Raises ValueError if a run of the stages writes or multiplies something else than `stages_of` says."""
    rows, asked, dim, cells, shard, flawed = 2000, 40, 24, 16, 512, list[str]()
    made, pairs, now, nearest, aligned = Counter[str](), Counter[str](), ["embed"], neighbors.nearest, stages.aligned

    def began(line: str) -> None:
        now[0] = line.partition(":")[0]

    def counted(queries: np.ndarray, base: Any, *args: Any, **kwargs: Any) -> Any:
        made[now[0]] += len(queries) * base.shape[0]
        return nearest(queries, base, *args, **kwargs)

    def aligned_and_counted(sketches: np.ndarray, base: Any, ids: np.ndarray) -> np.ndarray:
        pairs[now[0]] += ids.size
        return aligned(sketches, base, ids)

    for select in ("retrieve", "balance"):
        config = load_config("curate").unlock()
        config.update(uncurated="heap", curated="good", evaluation="test", select=select, shard_rows=shard)
        config.neighbors.update(exact=1, cells=cells, probes=cells, k=8, sample=10)
        config.dedup.threshold = 0.95
        config.balance.update(clusters=(30, 6), points=(5, 3), rounds=2, iterations=1, images=100)
        with (
            tempfile.TemporaryDirectory() as folder,
            synthetic(dim, rows, asked, began),
            mock.patch.object(Drawn, "batch_size", 64),
        ):
            with mock.patch.multiple(neighbors, nearest=counted), mock.patch.multiple(clusters, nearest=counted):
                with mock.patch.multiple(stages, nearest=counted, aligned=aligned_and_counted):
                    state = stages.run(config, Path(folder))
            plan = Plan(
                rows, len(state.labels), len(state.candidates), asked, asked, len(state.chosen), dim, 8, cells, cells, 1.0,
                shard, 1, 32, (30, 6), 2, 1, (5, 3),
            )  # fmt: skip
            sets = Counter[str]()
            for file in Path(folder).glob("*/*.npy"):
                sets[file.parent.name.partition("-")[0]] += file.stat().st_size
            sets["embed"] -= 2 * arrays(asked, shard, 2 * dim, 32, SKETCH, 1)
            sets["write"] = next(Path(folder).glob("rows-*")).stat().st_size
            record = sum(file.stat().st_size for file in Path(folder).glob("embed-*/*.parquet")) / (rows + 2 * asked)
            provenance = (Path(folder) / "provenance.parquet").stat().st_size / rows
        for stage in stages_of(plan):
            if stage.name in ("retrieve", "balance") and stage.name != select:
                continue
            early = stage.name in ("cells", "balance")  # k-means may end early, and needs no more rounds than it has rows
            right = made[stage.name] == stage.products or (early and 0 < made[stage.name] <= stage.products)
            right = right and pairs[stage.name] == stage.pairs
            told = f"{made[stage.name]:,} products, {pairs[stage.name]:,} aligned pairs"
            print(f"{select}: {stage.name}: {sets[stage.name]:,} bytes, {told}")
            if sets[stage.name] != stage.written or not right:
                wanted = f"{stage.products:,.0f} products, {stage.pairs:,} pairs"
                flawed.append(f"{stage.name}: the formulas say {stage.written:,} bytes, {wanted}")
        made.clear()
        pairs.clear()
    print(f"Parquet, which is compressed: {record:.0f} bytes an image of records, {provenance:.0f} of provenance")
    if flawed:
        raise ValueError("; ".join(flawed))


def main(_: list[str]) -> None:
    given = flags.FLAGS
    check() if given.check else table(planned(given), given)


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "Compare the formulas with a run of 2,000 images.")
    flags.DEFINE_integer("images", 10**9, "Of the uncurated sets.")
    flags.DEFINE_float("different", 0.9, "Share of images that are no exact copies: an assumption.")
    flags.DEFINE_float("left", 0.62, "Share of these that deduplication leaves: DINOv2 had 744 M of 1.2 B.")
    flags.DEFINE_integer("curated", 1_281_167, "Curated images: those of ImageNet-1k.")
    flags.DEFINE_integer("evaluation", 50_000, "Evaluation images.")
    flags.DEFINE_integer("chosen", 10**8, "Images that are chosen.")
    flags.DEFINE_integer("image_bytes", 100_000, "Of a file: an assumption.")
    flags.DEFINE_integer("record", 16, "Bytes of an image in the Parquet files of embed, see --check.")
    flags.DEFINE_integer("provenance", 180, "Bytes of an image in provenance.parquet, see --check.")
    flags.DEFINE_integer("dim", 1024, "Of a vector.")
    flags.DEFINE_enum("embedder", "vitl14", list(EMBEDDERS), "At 224 pixels.")
    flags.DEFINE_enum("chip", "h100", list(CHIPS), "Accelerator.")
    low_likely_high = "Share of the chip's peak in bfloat16: low, likely, high."
    flags.DEFINE_list("embed_share", ["0.1", "0.25", "0.45"], low_likely_high)
    flags.DEFINE_list("product_share", ["0.004", "0.02", "0.067"], low_likely_high)
    flags.DEFINE_integer("k", 64, "Neighbors of an image.")
    flags.DEFINE_float("fine", 0.041, "Share of aligned pairs that are looked at with large sketches: that of curate:demo.")
    flags.DEFINE_integer("cells", 65_536, "Cells.")
    flags.DEFINE_integer("probes", 256, "Cells that are probed.")
    flags.DEFINE_float(
        "skew", 1.07, "Rows in probed cells over those in cells of equal sizes; from the figure in docs/curation.md."
    )
    flags.DEFINE_integer("shard_rows", 2**20, "Rows of a shard.")
    flags.DEFINE_integer("hosts", 32, "That share the work which is spread.")
    flags.DEFINE_integer("devices", 8, "Accelerators of a host.")
    flags.DEFINE_float("disk", 2e9, "Bytes a second that a host reads: an assumption.")
    app.run(main)
