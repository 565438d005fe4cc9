"""The same step on one device, on many and in two processes; what it sends between them; the rules of placement."""

import collections
import contextlib
import os
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mim_jax
from mim_jax import TrainState, dry_run, sharding
from mim_jax.sharding import path_name
from mim_jax.state import abstract_state

MESHES = {"one device": (1, 1), "8 replicated": (8, 1), "8 fsdp": (1, 8), "4 x 2": (4, 2)}
BATCH = 24  # so that no activation has as many elements as a parameter


class Run(NamedTuple):
    losses: list[float]
    gradient: dict[str, np.ndarray]  # path -> gradient of the first step
    initial: TrainState  # in numpy
    last: TrainState
    compiled: jax.stages.Compiled
    told: str  # what the compiler wrote to standard error
    abstract: TrainState


@contextlib.contextmanager
def standard_error():
    """A file that gets all that is written to standard error, by C++ too."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compile_aloud(jitted, *args) -> tuple[jax.stages.Compiled, str]:
    """(the compiled function, what the compiler said)"""
    with standard_error() as file:
        compiled = jitted.lower(*args).compile()
        file.seek(0)
        return compiled, file.read()


def collectives(compiled: jax.stages.Compiled) -> dict[str, list[int]]:
    """{operation: [elements of each result]} of a compiled program."""
    found = collections.defaultdict(list)
    for name, results in dry_run.collectives(compiled.as_text()):
        found[name] += [elements for _, elements in results]
    return found


def run(config, mesh: tuple[int, int], batches: list[dict[str, np.ndarray]], initial=None) -> Run:
    """Trains on a mesh, from a fresh state or a copy of `initial`."""
    config.mesh.update(data=mesh[0], fsdp=mesh[1])
    with jax.set_mesh(sharding.make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]])):
        method = mim_jax.make_method(config)
        abstract = abstract_state(method, config)
        if initial is None:
            state, _ = mim_jax.init_state(method, config)
            initial = jax.device_get(state)
        else:
            state = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), initial, abstract)
        placed = [sharding.global_batch(batch) for batch in batches]
        compiled, told = compile_aloud(mim_jax.make_train_step(method, config), state, {}, placed[0])
        losses, gradient = [], {}
        for batch in placed:
            state, metrics = compiled(state, {}, batch)
            losses.append(float(metrics["train/loss"]))
            if not gradient:  # Adam's first moment is now (1 - beta1) times it
                moments = jax.tree_util.tree_leaves_with_path(jax.device_get(state.opt_state))
                gradient = {path_name(p): m / (1 - config.optim.beta1) for p, m in moments if "/mu/" in path_name(p)}
        return Run(losses, gradient, initial, state, compiled, told, abstract)


def tiny():
    config = mim_jax.load_config("tests/tiny.py")
    config.data.update(num_examples=96, batch_size=BATCH, canvas=24)
    config.head.norm_last_layer = True
    config.optim.update(warmup="0 steps", freeze_last_layer="0 steps", clip_grad=0.0)
    return config


class EachMesh(dict):
    """Name of a mesh -> its run, made when it is asked for."""

    def __init__(self, config, batch):
        self.config, self.batch = config, batch

    def __missing__(self, name: str) -> Run:
        initial = None if name in ("one device", "8 fsdp") else self["one device"].initial
        self[name] = run(self.config, MESHES[name], [self.batch], initial)
        return self[name]


@pytest.fixture(scope="module")
def single() -> dict[str, Run]:
    """One step on raw images in float32 on each mesh, from the seed on."""
    config = tiny()
    config.crops.local_crops_number = 0
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, 24, 24, 3), np.uint8),
        "size": rng.integers(12, 25, (BATCH, 2), np.int32),
        "label": np.zeros(BATCH, np.int32),
        "index": rng.permutation(96)[:BATCH].astype(np.int32),
    }
    return EachMesh(config, batch)


@pytest.fixture(scope="module")
def double() -> dict[str, Run]:
    """Five steps on views in float64, with stochastic depth, and with batch normalization by the global batch."""
    config = tiny()
    config.head.use_bn = True
    config.model.update(dtype="float64", drop_path_rate=0.3)
    config.optim.eps = 1e-4  # biases before a batch normalization have no gradient but rounding: it must stay small
    rng = np.random.default_rng(0)
    batches = [
        {"global": rng.normal(size=(BATCH, 2, 16, 16, 3)), "local": rng.normal(size=(BATCH, 1, 8, 8, 3))} for _ in range(5)
    ]
    jax.config.update("jax_enable_x64", True)
    try:
        one = run(config, MESHES["one device"], batches)
        return {"one device": one} | {
            mesh: run(config, MESHES[mesh], batches, one.initial) for mesh in ("8 replicated", "8 fsdp")
        }
    finally:
        jax.config.update("jax_enable_x64", False)


# tests/test_methods.py has another mesh of two axes, for methods of all kinds.
TWO_AXES = pytest.param("4 x 2", marks=pytest.mark.slow)


@pytest.mark.parametrize("mesh", ["8 replicated", "8 fsdp", TWO_AXES])
def test_float32_first_step_is_that_of_one_device(single, mesh):
    got, want = single[mesh], single["one device"]
    jax.tree.map(np.testing.assert_array_equal, got.initial, want.initial)  # no news but for FSDP, which starts from the seed
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    assert got.gradient.keys() == want.gradient.keys() and len(want.gradient) > 20
    for name, gradient in want.gradient.items():
        assert np.any(gradient), name
        np.testing.assert_allclose(got.gradient[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8 replicated", "8 fsdp"])
def test_float64_five_steps_are_those_of_one_device(double, mesh):
    got, want = double[mesh], double["one device"]
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-9)
    assert len(set(want.losses)) == 5

    def check(path, a, b):
        assert a.dtype == b.dtype and b.dtype in (np.float64, np.int32), path_name(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1e-4), err_msg=path_name(path))

    jax.tree_util.tree_map_with_path(check, jax.device_get(got.last), jax.device_get(want.last))
    assert np.abs(want.last.extra["student_stats"]["bn_0"]["mean"]).max() > 1e-3


@pytest.mark.parametrize(
    "runs, mesh",
    [
        ("single", "8 fsdp"),
        pytest.param("single", "4 x 2", marks=pytest.mark.slow),
        pytest.param("double", "8 fsdp", marks=pytest.mark.slow),
    ],
)
def test_the_compiled_step_moves_weights_and_nothing_else(request, runs, mesh):
    """No all-to-all, no rematerialization; what is gathered are parameters, one by one."""
    r = request.getfixturevalue(runs)[mesh]
    assert "rematerialization" not in r.told, r.told
    found = collectives(r.compiled)
    assert {"all-gather"} < found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    sizes = {n for leaf in jax.tree.leaves(r.abstract.params) for n in (leaf.size, leaf.size // 2)}  # or one block of two
    assert set(found["all-gather"]) <= sizes


def test_replicated_steps_only_add_up(single):
    assert not collectives(single["one device"].compiled)
    assert collectives(single["8 replicated"].compiled).keys() == {"all-reduce"}


def test_bad_programs_are_noticed():
    """What the tests above look for is found where it is."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def turn(x):
        y = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P(("a", "b"), None, None)))
        return jax.lax.with_sharding_constraint(jnp.sin(y), NamedSharding(mesh, P(None, "a", None)))

    x = jax.device_put(jnp.zeros((8, 8, 16)), NamedSharding(mesh, P("a", "b")))
    compiled, told = compile_aloud(jax.jit(turn), x)
    assert "Involuntary full rematerialization" in told
    found = collectives(compiled)
    assert found["all-to-all"] and found["all-gather"] == [8 * 8 * 16]


def test_rings_of_products_are_told_from_other_permutes():
    """As a TPU's compiler writes them: a kernel that goes round, one that is moved, a gather, and sums of gradients, of which
    one is cut into other parts than the devices have."""
    pair = "(bf16[8,16]{0,1:T(8,128)}, bf16[8,16]{0,1:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)})"
    product = 'metadata={op_name="jit(train_step)/jvp(ViT)/qkv/dot_general" stack_frame_id=1}'
    round, on = (f"source_target_pairs={{{{{pairs}}}}}" for pairs in ("0,3},{1,0},{2,1},{3,2", "0,1},{1,2},{2,3"))
    program = f"""
  %collective-permute-start.1 = {pair} collective-permute-start(%a), {round}, {product}
  %collective-permute-done.1 = bf16[8,16]{{0,1}} collective-permute-done(%collective-permute-start.1), {product}
  %collective-permute-start.2 = {pair} collective-permute-start(%a), {on}, {product}
  %all-gather-start.3 = ((bf16[4]{{0}}, f32[2]{{0}}), (bf16[16]{{0}}, f32[8]{{0}})) all-gather-start(%a, %b), dimensions={{0}}
  %all-reduce.4 = (f32[4]{{0}}, bf16[6]{{0}}) all-reduce(%a, %b), to_apply=%add
  %fusion.5 = f32[8,24]{{1,0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.5.clone
  %slice.6 = f32[8,4]{{1,0}} slice(%fusion.5), slice={{[0:8], [20:24]}}
  %collective-permute.7 = f32[8,4]{{1,0}} collective-permute(%slice.6), {on}
"""
    assert dry_run.communication(program) == {
        ("ring", "bf16"): (1, 256),
        ("collective-permute", "bf16"): (1, 256),
        ("halo", "f32"): (1, 128),
        ("all-gather", "bf16"): (1, 32),
        ("all-gather", "f32"): (1, 32),
        ("all-reduce", "f32"): (1, 16),
        ("all-reduce", "bf16"): (1, 12),
    }


@pytest.mark.parametrize("mesh", ["8 fsdp", TWO_AXES])
def test_the_state_is_cut_and_donated(single, mesh):
    """All weight matrices of parameters, teacher and both moments (but those of weight_g, which is fixed)."""
    r, fsdp = single[mesh], MESHES[mesh][1]
    rules = re.compile("|".join(pattern for pattern, _ in tiny().mesh.rules))
    cut = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(r.last):
        ruled = bool(rules.search(path_name(path)))
        shards = {shard.data.size for shard in leaf.addressable_shards}
        assert shards == {leaf.size // fsdp if ruled else leaf.size}, path_name(path)
        cut[path_name(path[:1])] += ruled
    matrices = 1 + 4 + 3 + 2  # patches; qkv, proj, fc1, fc2; the head's MLP; weight_g and weight_v
    assert cut == {"params": matrices, "teacher": matrices, "opt_state": 2 * (matrices - 1), "extra": 0, "step": 0}
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(r.last))
    assert r.compiled.memory_analysis().alias_size_in_bytes == on_one_device
    assert dry_run.donated(r.compiled.as_text()) == len(jax.tree.leaves(r.last))


def test_what_each_device_has_whole_gets_its_gradient_in_its_own_dtype():
    def run(x: jax.Array, bias: jax.Array) -> jax.Array:
        parts.append(len(x))
        return x * bias.astype(x.dtype)

    def loss(bias: jax.Array, x: jax.Array) -> jax.Array:
        return sharding.of_each_device(run, x, whole=(bias,)).astype(jnp.float32).sum()

    parts: list[int] = []
    x, bias, mesh = jnp.arange(24, dtype=jnp.bfloat16).reshape(8, 3), jnp.ones(3), sharding.make_mesh(2, 4)
    places = tuple(NamedSharding(mesh, spec) for spec in (P(), sharding.BATCH))
    whole, rest = (jax.grad(loss)(bias, x[:count]) for count in (8, 6))  # 6: the devices do not divide it
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), in_shardings=places).lower(bias, x).compile()
        np.testing.assert_array_equal(compiled(*jax.device_put((bias, x), places)), whole)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(bias, x[:6]), rest)
    assert parts == [8, 6, 1, 6] and set(dry_run.communication(compiled.as_text())) == {("all-reduce", "f32")}


# Two processes


# Rules and meshes


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in sizes.items()}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4)


def test_the_first_rule_that_matches_counts(mesh):
    rules = [("kernel$", (None, "fsdp")), ("a_", ("data",)), ("bias", ())]
    placed = sharding.shardings(shapes(a_kernel=(8, 8), a_bias=(8,), bias=(8,), other=(8,)), rules, mesh)
    specs = {name: tuple(s.spec) for name, s in placed.items()}
    assert specs == {"a_kernel": (None, "fsdp"), "a_bias": ("data",), "bias": (), "other": ()}


def test_a_rule_that_matches_nothing_is_an_error(mesh):
    rules = [("kernel", ("fsdp",)), ("kernal", ("fsdp",))]
    with pytest.raises(ValueError, match=r"match no array: \['kernal'\]"):
        sharding.shardings(shapes(kernel=(8, 8)), rules, mesh)
    config = tiny()
    config.mesh.rules = (*config.mesh.rules, ("blokcs", ("fsdp",)))
    method = mim_jax.make_method(config)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="blokcs"):
        mim_jax.init_state(method, config)


def test_a_rule_longer_than_its_array_is_an_error(mesh):
    with pytest.raises(ValueError, match="'bias' has 2 axes, but head/bias has 1"):
        sharding.shardings({"head": shapes(bias=(8,))}, [("bias", (None, "fsdp"))], mesh)


def test_indivisible_axes_are_replicated_and_marked(mesh):
    tree = shapes(a=(8, 6), b=(8, 8), c=(6, 8), d=(5,))
    rules = [("[abc]", ("data", "fsdp"))]
    placed = sharding.shardings(tree, rules, mesh)
    assert [tuple(placed[name].spec) for name in "abcd"] == [("data", None), ("data", "fsdp"), ("data", "fsdp"), ()]
    lines = {line.rsplit(" ", 1)[-1]: line for line in sharding.table(tree, rules, mesh).splitlines()[1:]}
    assert "('data', None) (indivisible: replicated)" in lines["a"]
    assert "('data', 'fsdp') " in lines["b"] and "indivisible" not in lines["b"] and "2 arrays" in lines["b"]
    assert "replicated" in lines["d"] and "indivisible" not in lines["d"]
    assert sharding.table(tree, rules, mesh).splitlines()[0] == "mesh: data=2 x fsdp=4"


@pytest.mark.parametrize("data, fsdp, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (8, 1, (8, 1))])
def test_make_mesh(data, fsdp, shape):
    made = sharding.make_mesh(data, fsdp)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == shape


@pytest.mark.parametrize("data, fsdp", [(3, 3), (-1, 3), (3, -1), (-1, -1), (0, -1), (-1, 0), (-2, -4), (4, 1)])
def test_make_mesh_refuses_what_does_not_fit(data, fsdp):
    with pytest.raises(ValueError, match="cannot be made of the 8 devices"):
        sharding.make_mesh(data, fsdp)


def test_rows_of_a_batch_are_in_order_on_a_mesh_of_any_order():
    devices = np.array(jax.devices())[[3, 0, 2, 1, 7, 6, 5, 4]].reshape(2, 4)
    with jax.set_mesh(jax.sharding.Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        assert sharding.share(16).tolist() == list(range(16))
        np.testing.assert_array_equal(sharding.global_batch({"x": np.arange(32).reshape(16, 2)})["x"].ravel(), np.arange(32))


def test_without_a_mesh_nothing_is_placed():
    x = jnp.ones((3, 2))
    assert sharding.current_mesh() is None and sharding.pin_batch(x) is x
    batch = sharding.global_batch({"x": np.ones((3, 2))})
    assert batch["x"].sharding.is_fully_replicated


@pytest.mark.slow  # tests/test_methods.py compares the gradients of one device and of eight for every method
@pytest.mark.parametrize("name, changes", [
    ("ibot", {}),
    ("dinov2", {"mask.group_size": 2}),
    ("dinov2", {"mask.group_size": 2, "loss.centering": "centering"}),
])  # fmt: skip
def test_targets_of_patches_do_not_depend_on_the_devices(x64, name, changes):
    """Losses, gradients, centres and Sinkhorn-Knopp's targets, in double precision."""
    config = mim_jax.load_config(f"tests/tiny.py:{name}")
    config.update_from_flattened_dict({"model.dtype": "float64", "model.drop_path_rate": 0.0, "model.depth": 1} | changes)
    method = mim_jax.make_method(config)
    rng = np.random.default_rng(0)
    views = {c.name: rng.normal(size=(16, len(c.policies), c.size, c.size, 3)) for c in method.views.crops}
    views |= method.views.example_masks(16)
    params, extra = jax.device_get(jax.jit(method.init)(jax.random.key(0)))
    extra = jax.tree.map(lambda a: rng.normal(size=a.shape), extra)
    results = []
    for count in (1, 4, 8):
        with jax.set_mesh(sharding.make_mesh(count, 1, jax.devices()[:count])):
            gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
            batch = sharding.global_batch(views)
            (loss, (new, _)), grads = gradient(params, params, {}, extra, batch, jax.random.key(0), jnp.int32(0))
            results.append(jax.device_get((loss, new, grads)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), other, results[0])
