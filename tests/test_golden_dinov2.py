"""DINOv2 held against numbers that the official PyTorch code produced (facebookresearch/dinov2 at b8931f7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import double, prefixed, relative_error

from mim_jax import convert
from mim_jax.models.heads import DinoHead


@pytest.mark.parametrize("variant", ["default", "nobias"])
def test_head(golden, variant, x64):
    """DINO's head, whose norms are always trained. (A linear layer without bias is one whose bias is 0.)"""
    arrays, _ = golden("dinov2_head")
    case = prefixed(arrays, f"{variant}/")
    stored = prefixed(case, "params/")
    stored |= {f"mlp.{i}.bias": np.zeros(len(stored[f"mlp.{i}.weight"])) for i in (0, 2, 4) if variant == "nobias"}
    params = double(convert.from_torch(stored, "dino"))["head"]
    head = DinoHead(out_dim=64, hidden_dim=48, bottleneck_dim=16, norm_last_layer=False, dtype=jnp.float64)

    y, vjp = jax.vjp(lambda p, x: head.apply({"params": p}, x), params, jnp.asarray(case["x"], jnp.float64))
    grads, grad_x = vjp(jnp.asarray(case["grad_y"], jnp.float64))
    np.testing.assert_allclose(y, case["y"], atol=1e-12)
    assert relative_error(grad_x, case["grad_x"]) < 1e-11
    got = convert.to_torch({"head": jax.device_get(grads)}, "dino")
    for key, want in prefixed(case, "grads/").items():
        np.testing.assert_allclose(got[key], want, rtol=1e-10, atol=1e-14, err_msg=key)


def state_dict(golden, name):
    """Random numbers under the names and in the shapes of an official model."""
    rng = np.random.default_rng(0)
    _, meta = golden("dinov2_state_dict_keys")
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in meta["keys"][name].items()}


@pytest.mark.parametrize("name", ["unchunked", "reg4_swiglu"])
def test_official_backbones_survive_the_way_in_and_out(golden, name):
    arrays = state_dict(golden, name)
    back = convert.to_torch(convert.from_torch(arrays, "dinov2"), "dinov2")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("heads", [("dino_head",), ("dino_head", "ibot_head")], ids="+".join)
def test_full_models_survive_the_way_in_and_out(golden, heads):
    """Two heads of different widths, as in the recipe of the giant."""
    arrays = {f"backbone.{key}": value for key, value in state_dict(golden, "reg4_swiglu").items()}
    stored, _ = golden("dino_head")
    for head, variant in zip(heads, ("default", "nlayers1")):
        arrays |= {f"{head}.{key}": value for key, value in prefixed(stored, f"{variant}/params/").items()}
    params = convert.from_torch(arrays, "dinov2")
    assert params.keys() == {"backbone", *heads}
    back = convert.to_torch(params, "dinov2")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_chunks_of_blocks_are_read(golden):
    """`blocks.1.3` is block 3, in chunk 1."""
    arrays = state_dict(golden, "chunks2_depth4")
    params = convert.from_torch({f"module.backbone.{key}": value for key, value in arrays.items()}, "dinov2")
    for i, chunk in enumerate((0, 0, 1, 1)):
        key = f"blocks.{chunk}.{i}.attn.qkv.weight"
        np.testing.assert_array_equal(params["backbone"]["blocks"]["qkv"]["kernel"][i], arrays[key].T)


@pytest.mark.parametrize("missing", ["mask_token", "register_tokens", "blocks.1.mlp.w3.bias", "blocks.0.ls1.gamma"])
def test_what_is_missing_is_named(golden, missing):
    arrays = state_dict(golden, "reg4_swiglu")
    del arrays[missing]
    if missing == "register_tokens":  # then it is another model, whose state dict it is
        assert "register_tokens" not in convert.from_torch(arrays, "dinov2")["backbone"]
        return
    with pytest.raises(ValueError, match=f"missing: {missing}"):
        convert.from_torch(arrays, "dinov2")
