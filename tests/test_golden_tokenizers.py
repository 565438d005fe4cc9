"""The quantisers of visual tokenizers, held against numbers of the official PyTorch codes.

microsoft/unilm at 768a3c8 (beit2), CompVis/taming-transformers at 3ba01b2 and lucidrains/vector-quantize-pytorch at 0d7d1aa.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, prefixed, relative_error

from mim_jax import losses, sharding
from mim_jax.models.quantizers import (
    EmaQuantizer,
    GumbelQuantizer,
    NormEmaQuantizer,
    VqGanQuantizer,
    cosine_kmeans,
    gumbel_softmax,
)


def gradient(quantizer, term, train=True):
    """A function `(state, z) -> (value, (quantized, new state)), (gradients of the state, of z)` of loss + term(z_q)."""

    def value(state, z):
        out, new = quantizer(state, z, train)
        return out.loss + term(out.z), (out, new)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def test_norm_ema(golden, x64):
    """Two steps and a pass outside training, which moves the usage alone."""
    arrays, _ = golden("vq")
    quantizer = NormEmaQuantizer(codes=12, dim=6, decay=0.9)
    state = {"codebook": jnp.asarray(arrays["normema/codebook0"]), "cluster_size": jnp.zeros(12)}
    weights = channels_last(np.arange(108).reshape(2, 6, 3, 3) / 100)
    for at in ("step0", "step1", "eval"):
        want = prefixed(arrays, f"normema/{at}/")
        run = gradient(quantizer, lambda z: jnp.sum(z * weights), train=at != "eval")
        (_, (out, state)), (_, grad_z) = run(state, channels_last(want["z"]))
        np.testing.assert_array_equal(out.indices.reshape(-1), want["indices"])
        np.testing.assert_allclose(out.z, channels_last(want["z_q"]), atol=1e-13)
        np.testing.assert_allclose(out.loss, want["loss"], rtol=1e-12)
        np.testing.assert_allclose(state["codebook"], want["codebook_after"], atol=1e-13)
        np.testing.assert_allclose(state["cluster_size"], want["cluster_size_after"], atol=1e-13)
        if at != "eval":
            assert relative_error(grad_z, channels_last(want["grad_z"])) < 1e-11


def test_a_vector_of_zeros_has_a_gradient():
    quantizer = NormEmaQuantizer(codes=3, dim=2)
    state = quantizer.init(jax.random.key(0))
    _, (_, grad) = gradient(quantizer, lambda z: 0)(state, jnp.zeros((4, 2)))
    assert np.all(np.isfinite(grad))


def test_cosine_kmeans(golden, x64):
    arrays, _ = golden("vq")
    samples = jnp.asarray(arrays["kmeans/samples"])
    means, counts = jax.jit(cosine_kmeans)(samples, samples[arrays["kmeans/init_indices"]])
    np.testing.assert_allclose(means, arrays["kmeans/means"], atol=1e-13)
    np.testing.assert_array_equal(counts, arrays["kmeans/bins"])


@pytest.mark.parametrize("kind", ["legacy", "fixed"])
def test_vqgan(golden, kind, x64):
    arrays, _ = golden("vq")
    quantizer = VqGanQuantizer(codes=12, dim=6, legacy=kind == "legacy")
    state, z = {"codebook": jnp.asarray(arrays["vqgan/codebook"])}, channels_last(arrays["vqgan/z"])
    (loss, (out, new)), (grad_state, grad_z) = gradient(quantizer, lambda z: 0)(state, z)
    np.testing.assert_array_equal(out.indices.reshape(-1), arrays["vqgan/indices"])
    np.testing.assert_allclose(out.z, channels_last(arrays["vqgan/z_q"]), atol=1e-13)
    np.testing.assert_allclose(loss, arrays[f"vqgan/{kind}/loss"], rtol=1e-12)
    assert relative_error(grad_z, channels_last(arrays[f"vqgan/{kind}/grad_z"])) < 1e-12
    assert relative_error(grad_state["codebook"], arrays[f"vqgan/{kind}/grad_codebook"]) < 1e-12
    np.testing.assert_array_equal(new["codebook"], state["codebook"])
    _, (_, straight) = gradient(quantizer, lambda z: jnp.sum(z * jnp.cos(out.z)))(state, z)
    np.testing.assert_allclose(straight - grad_z, jnp.cos(out.z), atol=1e-13)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel(golden, hard, x64):
    arrays, _ = golden("vq")
    want = {key: channels_last(arrays[f"gumbel/{key}"]) for key in ("z", "noise", "logits", f"z_q_hard{hard:d}")}
    quantizer = GumbelQuantizer(codes=10, dim=4, dtype=jnp.float64)
    proj = {"kernel": arrays["gumbel/proj_w"].transpose(2, 3, 1, 0), "bias": arrays["gumbel/proj_b"]}
    params = jax.tree.map(jnp.asarray, {"proj": proj, "codebook": arrays["gumbel/embed"]})
    out = jax.jit(quantizer.apply, static_argnames="hard")({"params": params}, want["z"], want["noise"], temp=0.7, hard=hard)
    np.testing.assert_allclose(out.z, want[f"z_q_hard{hard:d}"], atol=1e-12)
    np.testing.assert_array_equal(out.indices, arrays[f"gumbel/indices_hard{hard:d}"])
    np.testing.assert_allclose(out.loss, arrays["gumbel/kl_term"], rtol=1e-9)  # 1e-10 stands in the official logarithm
    np.testing.assert_allclose(5e-4 * losses.kl_to_uniform(want["logits"]).mean(), out.loss, rtol=1e-12)


def test_the_gradient_of_a_hard_sample_is_that_of_the_relaxed_one(x64):
    logits, noise, weights = jax.random.normal(jax.random.key(0), (3, 5, 7))
    gradient = jax.jit(jax.grad(lambda x, hard: jnp.sum(gumbel_softmax(x, noise, 0.5, hard) * weights)), static_argnums=1)
    grads = [gradient(logits, hard) for hard in (False, True)]
    np.testing.assert_allclose(*grads, atol=1e-14)


EMA = EmaQuantizer(codes=10, dim=6, decay=0.8, commitment=0.25, threshold=1.0)


def test_ema(golden):
    """Two steps in float32, the official code's only precision."""
    arrays, _ = golden("vq")
    state = {key.removesuffix("0"): jnp.asarray(a) for key, a in prefixed(arrays, "ema/").items() if key.endswith("0")}
    run = gradient(EMA, lambda z: jnp.sum(z * jax.lax.stop_gradient(jnp.cos(z))))
    for at in ("step0", "step1"):
        want = prefixed(arrays, f"ema/{at}/")
        before = state
        (_, (out, state)), (_, grad_x) = run(state, want["x"])
        np.testing.assert_array_equal(out.indices, want["indices"])
        assert relative_error(out.z, want["z_q"]) < 1e-6
        np.testing.assert_allclose(out.loss, want["commit_loss_weighted"], rtol=1e-6)
        assert relative_error(grad_x, want["grad_x"]) < 1e-6
        for key in ("codebook", "cluster_size", "embed_avg"):
            assert relative_error(state[key], want[f"{key}_after"]) < 1e-6, key
        assert all(np.array_equal(a, before[key]) for key, a in EMA(before, want["x"])[1].items())


def test_dead_codes(golden):
    """The first codebook is not stored: it follows from the last for codes with members, the others' were elsewhere."""
    arrays, _ = golden("vq")
    want = prefixed(arrays, "dead/")
    x, dead = want["x"], want["expired"]
    one_hot = np.eye(10, dtype=x.dtype)[want["indices"].reshape(-1)]
    codebook = (want["embed_avg_after"] - 0.2 * one_hot.T @ x.reshape(-1, 6)) / 0.8
    codebook = np.where(dead[:, None], 1e3, codebook)
    state = {"codebook": codebook, "cluster_size": np.ones(10, np.float32), "embed_avg": codebook}
    out, state = jax.jit(EMA, static_argnames="train")(state, x, train=True)
    np.testing.assert_array_equal(out.indices, want["indices"])
    np.testing.assert_allclose(state["cluster_size"], want["cluster_size_before_expiry"], rtol=1e-6)
    np.testing.assert_array_equal(state["cluster_size"] < EMA.threshold, dead)
    vectors = want["codebook_after"]
    assert dead.any() and all(np.any(np.all(x.reshape(-1, 6) == vector, axis=1)) for vector in vectors[dead])
    state = jax.jit(EMA.replace_dead)(state, np.where(dead[:, None], vectors, np.nan))
    for key, got in state.items():
        assert relative_error(got, want[f"{key}_after"]) < 1e-6, key


@pytest.mark.parametrize("quantizer", [EMA, NormEmaQuantizer(64, 6), VqGanQuantizer(64, 6)], ids=lambda q: type(q).__name__)
def test_first_codebooks(quantizer):
    codebook = np.asarray(quantizer.init(jax.random.key(0))["codebook"])
    assert codebook.shape == (quantizer.codes, quantizer.dim)
    if isinstance(quantizer, NormEmaQuantizer):
        np.testing.assert_allclose(np.linalg.norm(codebook, axis=1), 1, rtol=1e-6)
    else:
        bound = 1 / 64 if isinstance(quantizer, VqGanQuantizer) else (6 / 60) ** 0.5
        assert 0.9 * bound < np.abs(codebook).max() <= bound


@pytest.mark.parametrize("quantizer", [EMA, NormEmaQuantizer(10, 6), VqGanQuantizer(10, 6)], ids=lambda q: type(q).__name__)
def test_the_batch_on_a_mesh_gives_the_same_codebook(quantizer):
    state, z = quantizer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (16, 4, 6))
    run = gradient(quantizer, lambda z: jnp.sum(jnp.sin(z)))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    spread = jax.device_put(z, jax.NamedSharding(mesh, sharding.BATCH))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(state, spread), run(state, z))
