"""iBOT held against numbers that the official PyTorch code produced (bytedance/ibot at da316d8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import double, prefixed, relative_error

from mim_jax import convert
from mim_jax.models.heads import DinoHead


@pytest.mark.parametrize("variant", ["shared", "separate", "separate_unfrozen"])
def test_head(golden, variant, x64):
    arrays, meta = golden("ibot_head")
    case = prefixed(arrays, f"{variant}/")
    params = double(convert.from_torch(prefixed(case, "params/"), "ibot"))["head"]
    separate = variant != "shared"
    assert ("last_layer2" in params) == separate
    head = DinoHead(
        out_dim=64,
        hidden_dim=48,
        bottleneck_dim=16,
        norm_last_layer=variant != "separate_unfrozen",
        patch_out_dim=40 if separate else 0,
        dtype=jnp.float64,
    )

    def forward(params, x):  # CLS [B, 1, D] and patches [B, N, D]
        return head.apply({"params": params}, x[:, :1], x[:, 1:])

    (cls, patch), vjp = jax.vjp(forward, params, jnp.asarray(case["x"], jnp.float64))
    np.testing.assert_allclose(cls[:, 0], case["y_cls"], atol=1e-12)
    np.testing.assert_allclose(patch, case["y_patch"], atol=1e-12)
    np.testing.assert_allclose(head.apply({"params": params}, case["x"][:, 0].astype(float)), case["y_2d"], atol=1e-12)
    grads, grad_x = vjp((jnp.asarray(case["grad_y_cls"], jnp.float64)[:, None], jnp.asarray(case["grad_y_patch"], jnp.float64)))
    assert relative_error(grad_x, case["grad_x"]) < 1e-11
    got = convert.to_torch({"head": jax.device_get(grads)}, "ibot")
    for key, want in prefixed(case, "grads/").items():
        np.testing.assert_allclose(got[key], want, rtol=1e-10, atol=1e-14, err_msg=key)
    if variant != "separate_unfrozen":
        assert not np.any(got["last_layer.weight_g"]) and not np.any(got["last_layer2.weight_g"])


@pytest.mark.parametrize("parts", [("backbone",), ("head",), ("backbone", "head")], ids="+".join)
def test_official_arrays_survive_the_way_in_and_out(golden, parts):
    stored, _ = golden("ibot_train_steps")
    arrays = prefixed(stored, "params_init/")
    if len(parts) == 1:
        arrays = prefixed(arrays, f"{parts[0]}.")
    params = convert.from_torch(arrays, "ibot")
    assert tuple(params) == parts
    back = convert.to_torch(params, "ibot")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name, variant", [("ibot_head", "shared"), ("ibot_head", "separate"), ("ibot_vit", "layerscale")])
def test_official_variants_survive_the_way_in_and_out(golden, name, variant):
    arrays = prefixed(golden(name)[0], f"{variant}/params/")
    back = convert.to_torch(convert.from_torch(arrays, "ibot"), "ibot")
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_a_head_without_its_last_layer_for_patches_is_refused(golden):
    arrays = prefixed(golden("ibot_head")[0], "separate/params/")
    del arrays["last_layer2.weight_v"]
    with pytest.raises(ValueError, match="missing: last_layer2.weight_v"):
        convert.from_torch(arrays, "ibot")
