"""BEiT, BEiT v2 and VQ-KD held against numbers of the official PyTorch code (microsoft/unilm at 768a3c8)."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import channels_last, double, follow_four_steps, official, prefixed, relative_error

import mim_jax
from mim_jax import convert, losses
from mim_jax.methods import base
from mim_jax.models.heads import Classifier
from mim_jax.models.positions import relative_position_index
from mim_jax.models.vit import ViT, masked_first


class StoredTokens:
    """A tokenizer whose tokens are the stored ones: its images are the tokens themselves."""

    stride, pictures = 1, ()

    def __init__(self, codes):
        self.codes = codes

    def init_parts(self, key):
        return {}

    def tokens(self, params, images):
        return images[..., 0].astype(jnp.int32).reshape(len(images), -1)


@pytest.fixture
def config_of(monkeypatch):
    """A function: the config of a stored case, whose tokenizer gives the stored tokens."""

    def of(meta, name="beit.py", dtype="float64"):
        c = meta["config"]
        config = mim_jax.load_config(f"configs/{name}:vitb16")
        config.model.update(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["depth"], heads=c["heads"])
        config.model.update(dtype=dtype, drop_path_rate=0.0)
        config.head.vocab_size, config.crops.target_size = c["vocab"], c["img"] // c["patch"]
        config.mask.update(count=10, smallest=2)
        monkeypatch.setattr("mim_jax.methods.beit.make_target", lambda *_: StoredTokens(c["vocab"]))
        return config

    return of


def views_of(images, mask, tokens, dtype=float):
    mask = jnp.asarray(mask, bool).reshape(len(images), 1, -1)
    side = round(mask.shape[-1] ** 0.5)
    tokens = jnp.asarray(tokens, dtype).reshape(len(images), 1, side, side, 1)
    return {"global": channels_last(images)[:, None].astype(dtype), "mask": mask, "target": tokens}


FROZEN = {"params": {}, "extra": {}}


def test_beit(golden, config_of, x64):
    arrays, meta = golden("beit_mim")
    method = mim_jax.make_method(config_of(meta))
    params = double(convert.from_torch(prefixed(arrays, "w/"), "beit"))
    views = views_of(arrays["in/imgs"], arrays["in/mask"], arrays["in/tokens"])
    backbone = jax.jit(method.backbone.apply)
    out = backbone({"params": params["backbone"]}, [views["global"]], masks=[views["mask"]])[0]
    np.testing.assert_allclose(jnp.concatenate([out["cls"], out["patch"][:, 0]], 1), arrays["out/features"], atol=1e-12)

    places, weight = masked_first(views["mask"], method.views.masks.count)
    logits = jax.jit(method.predict)(params, views, places)[0]
    np.testing.assert_allclose(logits[weight], arrays["out/logits_masked"], atol=1e-12)
    everywhere = jnp.broadcast_to(jnp.arange(16), (3, 1, 16))
    np.testing.assert_allclose(method.predict(params, views, everywhere)[0][:, 0], arrays["out/logits_all"], atol=1e-12)

    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, (_, figures)), grads = gradient(params, {}, FROZEN, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-12)
    np.testing.assert_allclose(figures["train/masked_accuracy"], arrays["out/mlm_acc"], rtol=1e-12)
    most = np.bincount(arrays["out/labels_masked"]).max() / len(arrays["out/labels_masked"])
    np.testing.assert_allclose(figures["train/most_frequent_token"], most, rtol=1e-12)
    check_gradients(grads, arrays)


def check_gradients(grads, arrays, family="beit"):
    grads, stored = official(grads, family), prefixed(arrays, "grad/")
    assert stored
    for key, want in stored.items():
        assert relative_error(grads[key], want) < 1e-10, key


def test_an_image_with_more_masked_patches_weighs_more():
    """The mean is over all masked patches of the batch: here one of the first image and three of the second."""
    logits, targets = np.random.default_rng(0).normal(size=(2, 4, 5)), np.array([[1, 0, 0, 0], [2, 3, 4, 0]])
    weight = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.mean([log_probs[0, 0, 1], log_probs[1, 0, 2], log_probs[1, 1, 3], log_probs[1, 2, 4]])
    np.testing.assert_allclose(losses.masked_cross_entropy(jnp.asarray(logits), targets, weight), want, rtol=1e-5)


def test_forward_float32(golden, config_of):
    arrays, meta = golden("beit_mim")
    method = mim_jax.make_method(config_of(meta, dtype="float32"))
    params = convert.from_torch(prefixed(arrays, "w/"), "beit")
    views = views_of(arrays["in/imgs"], arrays["in/mask"], arrays["in/tokens"], np.float32)
    everywhere = jnp.broadcast_to(jnp.arange(16), (3, 1, 16))
    got = jax.jit(method.predict)(params, views, everywhere)[0][:, 0]
    assert relative_error(got, arrays["out/logits_all"]) < 1e-5


def test_beit_v2(golden, config_of, x64):
    arrays, meta = golden("beit2_mim")
    config = config_of(meta, "beit2.py")
    config.model.update(early_layers=meta["config"]["early_layers"], head_layers=meta["config"]["head_layers"])
    method = mim_jax.make_method(config)
    params = double(convert.from_torch(prefixed(arrays, "w/"), "beit"))
    tokens = np.zeros((2, 16))
    tokens[arrays["in/mask"]] = arrays["in/labels_masked"]
    views = views_of(arrays["in/imgs"], arrays["in/mask"], tokens)
    places, weight = masked_first(views["mask"], method.views.masks.count)
    main, second = jax.jit(method.predict)(params, views, places)
    np.testing.assert_allclose(main[weight], arrays["out/logits_main"], atol=1e-12)
    np.testing.assert_allclose(second[weight], arrays["out/logits_cls_pt"], atol=1e-12)
    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, _), grads = gradient(params, {}, FROZEN, {}, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-12)
    np.testing.assert_allclose(arrays["out/loss_1"] + arrays["out/loss_2"], loss, rtol=1e-12)
    check_gradients(grads, arrays)


def test_fine_tuned_classifier(golden, x64):
    """A table for each block, and the mean of the patches normalised."""
    arrays, _ = golden("beit_finetune_vit")
    params = double(convert.from_torch(prefixed(arrays, "w/"), "beit"))
    settings = dict(pos="relative_each", layerscale=0.1, k_bias=False, final_norm=False, dtype=jnp.float64)
    vit = ViT(patch_size=4, img_size=16, dim=32, depth=2, heads=2, **settings)
    out = jax.jit(vit.apply)({"params": params["backbone"]}, [channels_last(arrays["in/imgs"])[:, None].astype(float)])[0]
    features = out["patch"][:, 0].mean(1)
    logits, kept = Classifier(5, norm="layer", dtype=jnp.float64).apply(
        {"params": params["head"]}, features, capture_intermediates=True
    )
    np.testing.assert_allclose(kept["intermediates"]["fc_norm"]["__call__"][0], arrays["out/features"], atol=1e-12)
    np.testing.assert_allclose(logits, arrays["out/logits"], atol=1e-12)


@pytest.mark.parametrize("rows, columns", [(4, 4), (3, 5), (14, 14)])
def test_relative_position_index(golden, rows, columns):
    arrays, _ = golden("beit_relpos_index")
    np.testing.assert_array_equal(relative_position_index(rows, columns, cls=True), arrays[f"index_{rows}x{columns}"])


def test_blocks_with_tables_of_their_own_see_images_of_another_size(x64):
    """Equal tables in all blocks are the shared one, at other sizes too; attention is drawn from the same."""
    shared = ViT(patch_size=4, img_size=16, dim=8, depth=2, heads=2, pos="relative", dtype=jnp.float64)
    each = shared.clone(pos="relative_each")
    image = jax.random.normal(jax.random.key(0), (1, 1, 24, 32, 3), jnp.float64)
    params = dict(double(shared.init(jax.random.key(1), [image])["params"]))
    params["relative_position_bias_table"] = jax.random.normal(jax.random.key(2), (52, 2), jnp.float64)
    want = shared.apply({"params": params}, [image])[0]
    table = params.pop("relative_position_bias_table")
    params["blocks"] = params["blocks"] | {"relative_position_bias_table": jnp.stack([table, table])}
    got = each.apply({"params": params}, [image])[0]
    np.testing.assert_allclose(got["patch"], want["patch"], atol=1e-12)


@pytest.mark.parametrize("name", ["beit_mim", "beit2_mim", "beit_finetune_vit", "beit_train_steps"])
def test_round_trip(golden, name):
    arrays, _ = golden(name)
    weights = prefixed(arrays, "w/")
    back = convert.to_torch(convert.from_torch(weights, "beit"), "beit")
    assert back.keys() == weights.keys()
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)


def test_first_values_of_the_second_prediction():
    """PyTorch's, what the blocks add being divided as in those that they stand for: the ones after the early blocks."""
    config = mim_jax.load_config("tests/tiny.py:beit2")
    config.model.update(dim=64, depth=4, early_layers=3, head_layers=2)
    method = mim_jax.make_method(config)
    blocks = jax.jit(method.init)(jax.random.key(0))[0]["cls_layers"]["blocks"]
    for name, fan_in in (("proj", 64), ("fc2", 256), ("qkv", 64), ("fc1", 64)):
        for i, kernel in enumerate(blocks[name]["kernel"]):
            divided = (2 * (3 + 1 + i)) ** 0.5 if name in ("proj", "fc2") else 1
            bound = fan_in**-0.5 / divided
            assert 0.98 * bound < np.abs(kernel).max() <= 1.0001 * bound, (name, i)


def test_four_training_steps(golden, config_of, x64):
    arrays, meta = golden("beit_train_steps")
    config, o, s = config_of(meta), meta["optimizer"], meta["schedule"]
    config.data.update(batch_size=meta["config"]["batch"], num_examples=meta["config"]["batch"] * s["iters_per_epoch"])
    config.total = f"{s['epochs']} epochs"
    config.optim.update(clip_grad=o["clip_grad_norm"], warmup=f"{s['warmup_epochs']} epochs")

    def views(method, step):
        return views_of(*(arrays[f"in/{name}_step{step}"] for name in ("imgs", "mask", "tokens")))

    follow_four_steps(config, "beit", arrays, views, FROZEN)


def test_vqkd(golden, monkeypatch, x64):
    arrays, meta = golden("vqkd")
    c = meta["config"]
    config = mim_jax.load_config("configs/vqkd.py:vitb16")
    config.model.update(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["depth"], heads=c["heads"])
    config.model.update(decoder_depth=c["decoder_depth"], dtype="float64")
    config.quantizer.update(codes=c["codes"], dim=c["code_dim"], decay=c["decay"], kmeans_init=False)
    features = jnp.asarray(arrays["in/teacher_features"])
    teacher = types.SimpleNamespace(stride=4, dim=c["teacher_dim"], features=lambda params, images: {"patch": features})
    monkeypatch.setattr("mim_jax.methods.vqkd.make_target", lambda *_: teacher)
    method = base.make_method(config)

    parts = double(convert.from_torch(prefixed(arrays, "w/"), "vqkd"))
    extra = {"quantizer": parts.pop("quantizer")}
    images = channels_last(arrays["in/image01"])[:, None]
    views = {"global": images, "target": images}
    z = jax.jit(method.encode)(parts, images)
    np.testing.assert_allclose(z[:, 0], arrays["out/to_quantizer"], atol=1e-12)
    np.testing.assert_array_equal(method.tokens(parts | extra, images[:, 0]).reshape(-1), arrays["out/indices"])
    codes = channels_last(arrays["out/quantized"]).reshape(2, 1, 16, 8)
    np.testing.assert_allclose(jax.jit(method.rebuild)(parts, codes)[:, 0], arrays["out/rec"], atol=1e-12)

    gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (loss, (new, figures)), grads = gradient(parts, {}, {"params": {}}, extra, views, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(figures["train/commitment"], arrays["out/emb_loss"], rtol=1e-12)
    np.testing.assert_allclose(loss, arrays["out/loss"], rtol=1e-12)
    np.testing.assert_allclose(new["quantizer"]["codebook"], arrays["out/codebook_after"], atol=1e-12)
    check_gradients(grads | extra, arrays, "vqkd")
    np.testing.assert_array_equal(method.tokens(parts | new, images[:, 0]), arrays["out/tokens_eval_after_one_update"])

    weights, unused = prefixed(arrays, "w/"), "quantize.embedding."
    back = convert.to_torch(parts | extra, "vqkd")
    assert back.keys() == {key for key in weights if not key.startswith(unused) or key == f"{unused}weight"}
    for key, got in back.items():
        np.testing.assert_array_equal(got, weights[key], err_msg=key)
