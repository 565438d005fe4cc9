"""The quantisers and discrete VAEs of visual tokenizers, held against numbers of the official PyTorch codes.

microsoft/unilm at 768a3c8 (beit, beit2), CompVis/taming-transformers at 3ba01b2, lucidrains/vector-quantize-pytorch at
0d7d1aa and openai/DALL-E at 5be4b23.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, official, prefixed, relative_error

import mim_jax
from mim_jax import convert, losses, sharding
from mim_jax.models import dvae
from mim_jax.models.quantizers import (
    EmaQuantizer,
    NormEmaQuantizer,
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


def test_a_code_without_members_stays_where_it_was():
    samples, codebook = jnp.tile(jnp.array([[0.6, 0.8]]), (5, 1)), jnp.array([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    means, counts = cosine_kmeans(samples, codebook)
    np.testing.assert_allclose(means, [[0.6, 0.8], [1, 0], [-1, 0]], atol=1e-6)
    np.testing.assert_array_equal(counts, [5, 0, 0])
    state = {"codebook": codebook, "cluster_size": jnp.ones(3)}
    _, new = NormEmaQuantizer(codes=3, dim=2, decay=0.5)(state, samples, train=True)
    np.testing.assert_allclose(new["codebook"][1:], codebook[1:], atol=1e-6)
    np.testing.assert_allclose(new["cluster_size"], [3, 0.5, 0.5])


def test_gumbel_softmax(golden, x64):
    """The relaxed samples and the divergence of VQ-GAN's GumbelQuantize."""
    arrays, _ = golden("vq")
    logits, noise, want = (channels_last(arrays[f"gumbel/{key}"]) for key in ("logits", "noise", "z_q_hard0"))
    np.testing.assert_allclose(gumbel_softmax(logits, noise, 0.7) @ jnp.asarray(arrays["gumbel/embed"]), want, atol=1e-12)
    # 1e-10 stands in the official logarithm
    np.testing.assert_allclose(5e-4 * losses.kl_to_uniform(logits).mean(), arrays["gumbel/kl_term"], rtol=1e-9)


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


@pytest.mark.parametrize("quantizer", [EMA, NormEmaQuantizer(64, 6)], ids=lambda q: type(q).__name__)
def test_first_codebooks(quantizer):
    codebook = np.asarray(quantizer.init(jax.random.key(0))["codebook"])
    assert codebook.shape == (quantizer.codes, quantizer.dim)
    if isinstance(quantizer, NormEmaQuantizer):
        np.testing.assert_allclose(np.linalg.norm(codebook, axis=1), 1, rtol=1e-6)
    else:
        bound = (6 / 60) ** 0.5
        assert 0.9 * bound < np.abs(codebook).max() <= bound


@pytest.mark.parametrize("quantizer", [EMA, NormEmaQuantizer(10, 6)], ids=lambda q: type(q).__name__)
def test_the_batch_on_a_mesh_gives_the_same_codebook(quantizer):
    state, z = quantizer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (16, 4, 6))
    run = gradient(quantizer, lambda z: jnp.sum(jnp.sin(z)))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    spread = jax.device_put(z, jax.NamedSharding(mesh, sharding.BATCH))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(state, spread), run(state, z))


def dalle(arrays):
    """(encoder, decoder, parameters) of the stored case."""
    weights = {part: convert.from_torch(prefixed(arrays, f"w_{part[:3]}/"), "dalle")[part] for part in ("encoder", "decoder")}
    return dvae.DalleEncoder(vocab=32, hidden=8), dvae.DalleDecoder(initial=16, hidden=8), weights


def test_dalle(golden):
    arrays, _ = golden("dvae_dalle")
    encoder, decoder, params = dalle(arrays)
    pixels = dvae.map_pixels(channels_last(arrays["in/image01"]))
    np.testing.assert_allclose(pixels, channels_last(arrays["out/mapped"]), atol=1e-7)
    logits = jax.jit(encoder.apply)({"params": params["encoder"]}, pixels)
    assert relative_error(logits, channels_last(arrays["out/logits"])) < 1e-5
    tokens = logits.argmax(-1)
    np.testing.assert_array_equal(tokens, arrays["out/indices"])
    stats = jax.jit(decoder.apply)({"params": params["decoder"]}, jax.nn.one_hot(tokens, 32))
    assert relative_error(stats, channels_last(arrays["out/decoder_stats"])) < 1e-5
    np.testing.assert_allclose(dvae.dalle_pixels(stats), channels_last(arrays["out/reconstruction"]), atol=1e-6)


def test_pixels_to_the_middle_of_the_unit_interval_and_back(golden):
    arrays, _ = golden("dvae_dalle")
    np.testing.assert_allclose(dvae.map_pixels(arrays["map/in"]), arrays["map/out"], atol=1e-7)
    np.testing.assert_allclose(dvae.unmap_pixels(arrays["map/in"]), arrays["map/unmap_out"], atol=1e-7)


@pytest.mark.parametrize(
    ("module", "shape", "count"),
    [(dvae.DalleEncoder(), (1, 16, 16, 3), 53_786_240), (dvae.DalleDecoder(), (1, 2, 2, 8192), 43_829_766)],
    ids=["encoder", "decoder"],
)
def test_dalle_has_the_official_number_of_parameters(module, shape, count):
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    assert sum(p.size for p in jax.tree.leaves(params)) == count


def test_logit_laplace(x64):
    """The likelihood integrates to one, and its logarithm is that of equation 2."""
    edges = np.linspace(0, 1, 100_001)
    pixels = jnp.asarray((edges[1:] + edges[:-1]) / 2)[:, None]
    location, scale = 0.7, 0.4
    stats = jnp.broadcast_to(jnp.asarray([location, np.log(scale)]), (len(pixels), 2))
    nll = jax.jit(jax.vmap(losses.logit_laplace_loss))(stats, pixels)
    np.testing.assert_allclose(jnp.exp(-nll).mean(), 1, rtol=1e-6)
    x = pixels[:, 0]
    density = jnp.exp(-jnp.abs(jnp.log(x / (1 - x)) - location) / scale) / (2 * scale * x * (1 - x))
    np.testing.assert_allclose(jnp.exp(-nll), density, rtol=1e-9)
    np.testing.assert_allclose(losses.logit_laplace_loss(stats, pixels), nll.mean(), rtol=1e-12)


def official_kl(logits):
    """The code of BEiT adds 1e-10 to each probability, here and in the factor before the logarithm."""
    probs = jax.nn.softmax(logits) + 1e-10
    return jnp.sum(probs * (jnp.log(probs) + jnp.log(logits.shape[-1])))


@pytest.mark.parametrize(
    ("divergence", "loose"), [(official_kl, 1), (lambda x: losses.kl_to_uniform(x).sum(), 1e4)], ids=["official", "ours"]
)
def test_discrete_vae(golden, divergence, loose, x64):
    """The divergence is summed over images and places, as the official code (which means to divide) does."""
    arrays, meta = golden("dvae_gumbel")
    c = meta["config"]
    sizes = dict(hidden=c["hidden"], layers=c["layers"], dtype=jnp.float64)
    encoder, decoder = dvae.DvaeEncoder(c["tokens"], **sizes), dvae.DvaeDecoder(c["codebook_dim"], **sizes)
    images, noise = channels_last(arrays["in/imgs"]), channels_last(arrays["in/gumbel_noise"])

    def loss_of(params):
        logits = encoder.apply({"params": params["encoder"]}, images)
        recon = decoder.apply({"params": params["decoder"]}, gumbel_softmax(logits, noise, c["temperature"]))
        mse = jnp.mean((recon - images) ** 2)
        return mse + c["kl_weight"] * divergence(logits), (logits, recon, mse)

    params = double(convert.from_torch(prefixed(arrays, "w/"), "dvae"))
    (loss, (logits, recon, mse)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    np.testing.assert_allclose(logits, channels_last(arrays["out/logits"]), atol=1e-12)
    np.testing.assert_array_equal(logits.argmax(-1), arrays["out/codebook_indices"])
    np.testing.assert_allclose(recon, channels_last(arrays["out/recon"]), atol=1e-12)
    np.testing.assert_allclose(mse, arrays["out/mse"], rtol=1e-12)
    np.testing.assert_allclose(divergence(logits), arrays["out/kl_sum_over_batch_and_positions"], rtol=1e-7)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-12 * loose)
    grads = official(grads, "dvae")
    stored = prefixed(arrays, "grad/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-12 * loose, key


@pytest.mark.slow
def test_dead_codes_of_the_method_begin_anew_as_vectors_of_the_batch():
    config = mim_jax.load_config("tests/tiny.py:vqvae")
    config.quantizer.threshold = 0.5
    method = mim_jax.make_method(config)
    params, extra = method.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (8, 1, 16, 16, 3))
    state = extra["quantizer"] | {"cluster_size": jnp.zeros(16).at[3].set(1e6)}  # all but one are dead
    args = (params, {}, {}, {"quantizer": state}, {"global": images}, jax.random.key(2), jnp.int32(0))
    new = jax.jit(method.loss)(*args)[1][0]["quantizer"]
    vectors = np.asarray(method.encode(params, images[:, 0]).reshape(-1, 4))
    distance = np.abs(np.asarray(new["codebook"])[:, None] - vectors).max(-1).min(-1)
    revived = np.asarray(new["cluster_size"]) == 0.5
    assert 10 < revived.sum() < 16 and not revived[3]
    assert distance[revived].max() < 1e-6
    assert len(np.unique(np.asarray(new["codebook"])[revived], axis=0)) > 5


def test_discrete_vae_as_a_method(golden, monkeypatch, x64):
    """The method's loss and gradient. It maps images in 0..1 to -1..1, and takes the divergence's mean over places."""
    arrays, meta = golden("dvae_gumbel")
    c, noise = meta["config"], channels_last(arrays["in/gumbel_noise"])
    config = mim_jax.load_config("configs/dvae.py:demo")
    config.model.update(img_size=c["image"], hidden=c["hidden"], layers=c["layers"], codes=c["tokens"], dtype="float64")
    config.model.codebook_dim = c["codebook_dim"]
    method = mim_jax.make_method(config)
    places = noise[..., 0].size
    schedules = {"temperature": lambda _: c["temperature"], "kl_weight": lambda _: c["kl_weight"] * places}
    method = dataclasses.replace(method, schedules=schedules)
    monkeypatch.setattr("jax.random.gumbel", lambda *_: noise)
    params = double(convert.from_torch(prefixed(arrays, "w/"), "dvae"))
    views = {"global": (1 + channels_last(arrays["in/imgs"])[:, None]) / 2}
    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, (_, figures)), grads = gradient(params, {}, {}, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(figures["train/reconstruction"], arrays["out/mse"], rtol=1e-12)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-7)  # 1e-10 stands in the official logarithm
    grads = official(grads, "dvae")
    for key, want in prefixed(arrays, "grad/").items():
        assert relative_error(grads[key], want) < 1e-6, key
    tokens = jax.jit(method.tokens)(params, views["global"][:, 0])
    np.testing.assert_array_equal(tokens, arrays["out/codebook_indices"].reshape(len(tokens), -1))


class Given:
    """In the place of a network: it gives the same output for whatever it sees, and keeps that."""

    def __init__(self, output):
        self.output, self.seen = output, []

    def apply(self, variables, x):
        self.seen.append(x)
        return self.output


def test_vqvae_weighs_the_error_of_values_from_minus_1_to_1():
    """Both networks see and paint such values, and the squared error is theirs: four times that of values in 0..1."""
    rng = np.random.default_rng(0)
    images, painted = rng.uniform(size=(2, 1, 4, 4, 3)), rng.uniform(-1, 1, (2, 4, 4, 3))
    z, codebook = rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(5, 3)).astype(np.float32)
    config = mim_jax.load_config("tests/tiny.py:vqvae")
    quantizer = EmaQuantizer(codes=5, dim=3, commitment=0.25)
    encoder, decoder = Given(z), Given(painted)
    method = dataclasses.replace(mim_jax.make_method(config), encoder=encoder, decoder=decoder, quantizer=quantizer, codes=5)
    extra = {"quantizer": {"codebook": codebook, "cluster_size": np.ones(5, np.float32), "embed_avg": codebook}}
    none = {"encoder": {}, "decoder": {}}
    loss, (_, figures) = method.loss(none, {}, {}, extra, {"global": jnp.asarray(images)}, jax.random.key(0), jnp.int32(0))
    squares = np.square(z[..., None, :] - codebook).sum(-1)
    error, commitment = np.mean((painted - (2 * images[:, 0] - 1)) ** 2), 0.25 * squares.min(-1).mean() / 3
    np.testing.assert_allclose(loss, error + commitment, rtol=1e-5)
    np.testing.assert_allclose([figures["train/mse"], figures["train/commitment"]], [error / 4, commitment], rtol=1e-5)
    np.testing.assert_allclose(encoder.seen[0], 2 * images[:, 0] - 1, atol=1e-6)
    np.testing.assert_allclose(decoder.seen[0], codebook[squares.argmin(-1)], atol=1e-6)


def test_codes_that_begin_anew_count_as_many_members_as_the_threshold():
    quantizer = EmaQuantizer(codes=3, dim=2, threshold=0.5)
    state = {"codebook": np.ones((3, 2)), "cluster_size": np.array([0.4, 0.5, 2.0]), "embed_avg": np.ones((3, 2))}
    state = jax.tree.map(jnp.float32, state)
    new = quantizer.replace_dead(state, jnp.full((3, 2), 7.0))
    np.testing.assert_array_equal(new["codebook"][:, 0], [7, 1, 1])
    np.testing.assert_array_equal(new["cluster_size"], [0.5, 0.5, 2])
    np.testing.assert_array_equal(new["embed_avg"][:, 0], [3.5, 1, 1])  # the mean of its members is the vector


def test_what_follows_the_step_in_the_discrete_vae():
    """A temperature that falls, a divergence that is not there at first, and the average of all weights, of one momentum."""
    config = mim_jax.load_config("dvae:demo")
    config.loss.update(temperature=0.25, temperature_decay="1200 steps", kl_weight=0.02, kl_warmup="500 steps")
    config.optim.momentum_teacher = 0.99
    method = mim_jax.make_method(config)
    steps = (0, 250, 500, 600, 1200, 1499)
    follows = {name: [float(schedule(step)) for step in steps] for name, schedule in method.schedules.items()}
    quarter = 0.25 + 0.375 * (1 + np.cos(np.pi * np.array([0, 250, 500, 600, 1200, 1200]) / 1200))
    np.testing.assert_allclose(follows["temperature"], quarter, rtol=1e-5)
    np.testing.assert_allclose(follows["kl_weight"], [0, 0.01, 0.02, 0.02, 0.02, 0.02], atol=1e-8)
    np.testing.assert_allclose(follows["momentum_teacher"], 0.99, rtol=1e-6)
    assert set(method.teacher_parts) == set(jax.eval_shape(method.init, jax.random.key(0))[0])


def test_vqkd_begins_with_the_kmeans_of_its_first_batch(monkeypatch):
    """Of its vectors' directions: their lengths do not count. No later batch is clustered."""
    monkeypatch.setattr("jax.random.randint", lambda key, shape, low, high: jnp.arange(low, high)[: shape[0]])
    config = mim_jax.load_config("tests/tiny.py:vqkd")
    config.quantizer.update(codes=3, dim=3, decay=0.9)
    method = mim_jax.make_method(config)
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(3, 3)))[0][[0, 1, 2] * 8] + 0.1 * rng.normal(size=(24, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    z = jnp.asarray(vectors * rng.uniform(1, 9, (24, 1)), jnp.float32).reshape(2, 1, 12, 3)
    teacher = types.SimpleNamespace(features=lambda parts, images: {"patch": jnp.ones((2, 12, 5))})
    given = {"encode": lambda *_: z, "rebuild": lambda *_: jnp.ones((2, 1, 12, 5)), "target": teacher}
    for name, value in given.items():
        object.__setattr__(method, name, value)
    state = {"codebook": np.eye(3, dtype=np.float32), "cluster_size": np.zeros(3, np.float32)}

    def after(step):
        views = dict.fromkeys(("global", "target"), z)
        _, (extra, figures) = method.loss({}, {}, {}, {"quantizer": state}, views, jax.random.key(0), jnp.int32(step))
        return extra["quantizer"], figures["train/commitment"]

    new, commitment = after(0)
    means = np.stack([vectors[i::3].mean(0) for i in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(new["codebook"], means, atol=1e-5)
    np.testing.assert_allclose(new["cluster_size"], 8)  # the members in the k-means, averaged with those of the batch
    np.testing.assert_allclose(commitment, np.mean((vectors - means[np.arange(24) % 3]) ** 2), rtol=1e-4)
    object.__setattr__(method, "kmeans_init", False)
    without = after(0)
    object.__setattr__(method, "kmeans_init", True)
    for new, commitment in (without, after(1)):
        assert commitment > 0.01 and np.linalg.norm(new["codebook"] - state["codebook"], axis=1).max() < 0.2
        assert new["cluster_size"].sum() == pytest.approx(2.4)


FAMILIES = {"dvae_dalle": "dalle", "dvae_gumbel": "dvae"}


def weights_of(golden, case):
    """(family, state dict); "joint" is DALL-E's encoder and decoder in one."""
    name, _, prefix = case.partition("/")
    arrays, _ = golden(name)
    if prefix != "joint":
        return FAMILIES[name], prefixed(arrays, f"{prefix}/")
    encoder, decoder = (prefixed(arrays, f"w_{part}/") for part in ("enc", "dec"))
    return "dalle", {f"encoder.{key}": a for key, a in encoder.items()} | {f"decoder.{key}": a for key, a in decoder.items()}


@pytest.mark.parametrize("case", ["dvae_dalle/w_enc", "dvae_dalle/w_dec", "dvae_dalle/joint", "dvae_gumbel/w"])
def test_round_trip(golden, case):
    family, weights = weights_of(golden, case)
    assert weights
    params = convert.from_torch(weights, family)
    back = convert.to_torch(params, family)
    assert back.keys() == weights.keys()
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)
    again = convert.from_torch(back, family)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("module", "case", "shape"),
    [
        (dvae.DalleEncoder(vocab=32, hidden=8), "dvae_dalle/w_enc", (1, 16, 16, 3)),
        (dvae.DalleDecoder(initial=16, hidden=8), "dvae_dalle/w_dec", (1, 2, 2, 32)),
        (dvae.DvaeEncoder(codes=12, hidden=6, layers=2), "dvae_gumbel/w", (1, 16, 16, 3)),
        (dvae.DvaeDecoder(codebook_dim=8, hidden=6, layers=2), "dvae_gumbel/w", (1, 4, 4, 12)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parameters_are_laid_out_as_the_converter_does_and_float32_at_half_precision(golden, module, case, shape):
    family, weights = weights_of(golden, case)
    part = "encoder" if "Encoder" in type(module).__name__ else "decoder"
    half = module.clone(dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(half.init_with_output, jax.random.key(0), jnp.zeros(shape))
    assert {p.dtype for p in jax.tree.leaves((out, variables))} == {jnp.dtype("float32")}
    want = variables["params"]
    got = convert.from_torch(weights, family)[part]
    assert jax.tree.map(np.shape, got) == jax.tree.map(lambda p: p.shape, want)


@pytest.mark.parametrize(
    ("case", "lost", "misshapen", "wanted"),
    [
        ("dvae_dalle/w_enc", "blocks.group_2.block_1.id_path.w", "blocks.input.w", (8, 3, 7, 7)),
        ("dvae_dalle/w_dec", "blocks.group_3.block_2.res_path.conv_4.b", "blocks.group_1.block_1.id_path.w", (64, 16, 1, 1)),
        ("dvae_gumbel/w", "codebook.weight", "decoder.2.0.weight", (6, 6, 4, 4)),
    ],
)
def test_conversion_is_strict(golden, case, lost, misshapen, wanted):
    family, weights = weights_of(golden, case)
    del weights[lost]
    weights["blocks.output.conv.g"] = np.zeros(3)
    weights[misshapen] = np.zeros((2, *wanted[1:]))
    with pytest.raises(ValueError, match=f"this is not a {family} state dict") as error:
        convert.from_torch(weights, family)
    told = sorted(line.strip() for line in str(error.value).splitlines()[1:])
    assert told == [
        f"misshapen: {misshapen} is {(2, *wanted[1:])}, expected {wanted}",
        f"missing: {lost}",
        "unexpected: blocks.output.conv.g",
    ]


def test_first_values_of_convolutions():
    """DALL-E's are normal, not truncated, the small VAE's PyTorch's: uniform within 1 / sqrt(fan_in), biases too."""
    params = jax.jit(dvae.conv(64, 7, jnp.float32, None).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 32)))["params"]
    assert abs(params["kernel"].std() * (32 * 49) ** 0.5 - 1) < 0.02
    assert params["kernel"].max() > 3 * params["kernel"].std()
    assert not np.any(params["bias"])
    decoder = dvae.DvaeDecoder(codebook_dim=64, hidden=32, layers=1)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 9)))["params"]
    assert abs(params["codebook"].std() - 1) < 0.1
    for layer, fan_in in ((params["conv_0"], 32 * 16), (params["res_0"]["conv_2"], 32 * 9)):
        for a in layer.values():
            assert 0.7 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5
