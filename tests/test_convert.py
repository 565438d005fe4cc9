"""Official state dicts to parameters and back: exact, complete, and strict about what does not fit."""

import jax
import numpy as np
import pytest
from arrays import tree_paths

import mim_jax
from mim_jax import convert


def shapes(tree):
    return jax.tree.map(np.shape, tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))


@pytest.fixture
def tiny_config():
    return mim_jax.load_config("tests/tiny.py")


@pytest.fixture(params=[False, True], ids=["plain", "bn"])
def initial(request, tiny_config):
    """(params, batch_stats) of a fresh method, its shapes filled with random values: no two tensors are alike."""
    tiny_config.head.use_bn = request.param
    params, extra = jax.eval_shape(mim_jax.make_method(tiny_config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    fill = lambda s: rng.integers(1, 99, s.shape, s.dtype) if s.dtype == np.int32 else rng.normal(size=s.shape).astype(s.dtype)  # noqa: E731
    return jax.tree.map(fill, params), jax.tree.map(fill, extra["student_stats"])


@pytest.fixture
def official(golden):
    """A state dict that the official code wrote: a backbone of two blocks and a head of three layers."""
    arrays, _ = golden("dino_train_steps")
    prefix = "params_init/"
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def without(arrays, *starts):
    return {key: value for key, value in arrays.items() if not key.startswith(starts)}


def refusal(arrays):
    with pytest.raises(ValueError, match="this is not a dino state dict") as error:
        convert.from_torch(arrays, "dino")
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize("parts", [("backbone",), ("head",), ("backbone", "head")], ids="+".join)
def test_parameters_survive_the_way_out_and_back(initial, parts):
    params, stats = initial
    given = {part: params[part] for part in parts} | ({"batch_stats": stats} if stats and "head" in parts else {})
    arrays = convert.to_torch(given, "dino")
    assert all(key.startswith(("backbone.", "head.")) == (len(parts) == 2) for key in arrays)
    back = convert.from_torch(arrays, "dino")
    assert shapes(back) == shapes(given)
    jax.tree.map(np.testing.assert_array_equal, back, given)
    assert len(arrays) == sum(2 if "/blocks/" in f"/{p}" else 1 for p in jax.tree.leaves(tree_paths(given)))


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("dino_vit", "params/"),
        ("dino_head", "default/params/"),
        ("dino_head", "bn/params/"),
        ("dino_head", "nlayers1/params/"),
        ("dino_train_steps", "params_init/"),
    ],
)
def test_official_arrays_survive_the_way_in_and_out(golden, name, prefix):
    arrays, _ = golden(name)
    arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    back = convert.to_torch(convert.from_torch(arrays, "dino"), "dino")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        assert back[key].dtype == value.dtype, key
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_converted_parameters_are_laid_out_as_fresh_ones(golden, official, tiny_config):
    tiny_config.model.update(dim=16, patch_size=4)
    tiny_config.head.update(out_dim=32, hidden_dim=24, bottleneck_dim=8)
    params, _ = jax.eval_shape(mim_jax.make_method(tiny_config).init, jax.random.key(0))
    assert shapes(convert.from_torch(official, "dino")) == shapes(params)


def test_converted_batch_norm_is_laid_out_as_a_fresh_one(golden, tiny_config):
    arrays, _ = golden("dino_head")
    arrays = {key.removeprefix("bn/params/"): v for key, v in arrays.items() if key.startswith("bn/params/")}
    tiny_config.model.dim = arrays["mlp.0.weight"].shape[1]
    tiny_config.head.update(out_dim=64, hidden_dim=48, bottleneck_dim=16, use_bn=True)
    params, extra = jax.eval_shape(mim_jax.make_method(tiny_config).init, jax.random.key(0))
    converted = convert.from_torch(arrays, "dino")
    assert shapes(converted) == shapes({"head": params["head"], "batch_stats": extra["student_stats"]})


def test_prefix_of_data_parallel_is_dropped(official):
    plain = convert.from_torch(official, "dino")
    wrapped = convert.from_torch({f"module.{key}": value for key, value in official.items()}, "dino")
    jax.tree.map(np.testing.assert_array_equal, wrapped, plain)


def test_every_problem_is_named_at_once(official):
    arrays = without(official, "backbone.blocks.1.attn.qkv.weight", "head.last_layer.weight_g")
    arrays["backbone.fc.weight"] = np.zeros((2, 2))
    arrays["backbone.blocks.0.ls1.gamma"] = np.zeros(16)
    arrays["backbone.norm.bias"] = np.zeros(17)
    arrays["backbone.patch_embed.proj.weight"] = arrays["backbone.patch_embed.proj.weight"][..., :-1]
    arrays["head.mlp.2.weight"] = arrays["head.mlp.2.weight"][:, :, None]
    problems = refusal(arrays)
    wanted = [
        "missing: backbone.blocks.1.attn.qkv.weight",
        "missing: head.last_layer.weight_g",
        "unexpected: backbone.fc.weight",
        "unexpected: backbone.blocks.0.ls1.gamma",
        "misshapen: backbone.norm.bias is (17,), expected (16,)",
        "misshapen: backbone.patch_embed.proj.weight is (16, 3, 4, 3), expected (16, 3, 4, 4)",
        "misshapen: head.mlp.2.weight is (24, 24, 1), expected (24, 24)",
    ]
    assert sorted(line.strip() for line in problems) == sorted(wanted)


def test_tensors_must_fit_each_other(official):
    arrays = official | {"backbone.blocks.1.attn.qkv.weight": np.zeros((47, 16), np.float32)}
    assert refusal(arrays) == ["  misshapen: backbone.blocks.1.attn.qkv.weight is (47, 16), expected (48, 16)"]


def test_a_missing_block_is_told_tensor_by_tensor(official):
    problems = refusal(without(official, "backbone.blocks.0."))
    gone = [key for key in official if key.startswith("backbone.blocks.0.")]
    assert len(gone) == 12 and sorted(problems) == sorted(f"  missing: {key}" for key in gone)
    none_left = refusal(without(official, "backbone.blocks."))
    assert sorted(none_left) == sorted(problems)


def test_a_head_without_its_last_layer_is_refused(official):
    assert any("head.mlp.2.weight" in line for line in refusal(without(official, "head.mlp.4.")))


def test_batch_norm_without_a_running_figure_is_refused(golden):
    arrays, _ = golden("dino_head")
    arrays = {key.removeprefix("bn/params/"): v for key, v in arrays.items() if key.startswith("bn/params/")}
    assert refusal(without(arrays, "mlp.4.running_var")) == ["  missing: mlp.4.running_var"]


def test_an_empty_state_dict_is_refused():
    assert "  missing: cls_token" in refusal({})


def test_unknown_family(official):
    with pytest.raises(ValueError, match="no converter for family 'dinosaur'"):
        convert.from_torch(official, "dinosaur")
    with pytest.raises(ValueError, match="no converter for family 'dinosaur'"):
        convert.to_torch({}, "dinosaur")


def test_parameters_of_another_family_are_refused(official):
    params = convert.from_torch(official, "dino")
    del params["backbone"]["norm"]["scale"]
    params["decoder"] = {"mask_token": np.zeros((1, 1, 16))}
    with pytest.raises(ValueError, match=r"missing \['backbone/norm/scale'\], unexpected \['decoder/mask_token'\]"):
        convert.to_torch(params, "dino")
    with pytest.raises(ValueError, match=r"not dino parameters.*encoder/kernel"):
        convert.to_torch({"encoder": {"kernel": np.zeros(3)}}, "dino")


def test_the_index_of_an_oblong_table_is_refused():
    """3 x 5 patches have a table of 5 * 9 rows, with CLS 48; 9 rows more would be those of 4 x 4."""
    name = "blocks.0.attn.relative_position_bias_table"
    for rows in (45, 48):
        with pytest.raises(ValueError, match=f"{name} has {rows} rows, which are not those of a square grid"):
            convert.buffers({name: np.zeros((rows, 2))})
    assert convert.buffers({name: np.zeros((52, 2))})[name.replace("bias_table", "index")].shape == (17, 17)
