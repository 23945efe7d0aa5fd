"""A model quantized one layer at a time has the bits that it has in memory, also after kills."""

import dataclasses
import gc
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.storage.checkpoint import load
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.readers import checkpoint, registry
from jaxquant_models.runs import healing, layerwise, passes, quantization_setup
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.healing import heal_model
from jaxquant_models.runs.module_loss import JUDGED, ModuleLoss
from jaxquant_models.runs.needs import needs_of
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.rotation import random_rotation, rotate_model
from tests.support.reporting import Quiet
from tests.support.tiny_llama import FAMILIES, random_tensors, write_folder

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
REQUESTS = {
    "rtn": {"method": "rtn", "group_size": 8},
    "gptq": {"method": "gptq", "group_size": 8},
    "gptq, uniform": {"method": "gptq", "group_size": 8, "weighting": "uniform"},
    "quip_sharp": {"method": "quip_sharp", "bits": 2},
    "smoothquant": {"method": "smoothquant"},
    "awq": {"method": "awq", "group_size": 8},
    "flatquant": {"method": "flatquant", "group_size": 8},
    "quarot": {"method": "quarot", "rotate_residual": "random"},
    "two-sided": {"method": "gptq", "group_size": 8},
    "prefix": {"method": "gptq", "group_size": 8, "exact_prefix": 3},
    "prefix, uniform": {
        "method": "smoothquant",
        "weighting": "uniform",
        "activations": "int8",
        "exact_prefix": 2,
    },
}
every_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("layerwise")
    (place / "text.txt").write_text(TEXT)
    return write_folder(place / "model", FAMILIES["qwen2"], random_tensors(FAMILIES["qwen2"]))


def request_for(folder, name):
    text = str(folder.parent / "text.txt")
    request = request_of(calibration=text, calibration_tokens=768, **REQUESTS[name])
    if name != "two-sided":
        return request
    method = dataclasses.replace(jq.gptq(group_size="tensor"), rounder=jq.rounding.TwoSided())
    return dataclasses.replace(request, recipe=recipe_of(method))


def run(folder, request, out, finished=None):
    """Quantize layer by layer; return the parameters that are saved."""
    with Folder(out.with_suffix(".partial"), {}) as own:
        job = quantization_setup.set_up(request, str(folder), lambda _: finished or own, Quiet())
        assert isinstance(job, layerwise.LayerwiseJob)
        result = job.run()
        checkpoint.save_model(out, result.model, result.recipe, True, layers=result.layers)
    return load(out)


def in_memory(folder, request):
    """The same with the functions for models in memory."""
    model, needs = registry.load(folder), needs_of(request)
    model = dataclasses.replace(model, prefix=request.exact_prefix)
    if request.rotation:
        model = rotate_model(model, random_rotation(model, request.key))
    cut = quantization_setup._cut(
        request, needs, model, quantization_setup._read_texts(request)
    ).calibration
    stats = inspect = None
    if needs.statistics:
        stats = calibrate_model(
            model, cut, weighting=request.weighting, gram=needs.gram, output=needs.output,
            sample=needs.sample,
        )  # fmt: skip
    if needs.module_loss:
        inspect = ModuleLoss.of(model, cut[:JUDGED])
    made = quantize_model(model, request.recipe, stats, key=request.key, inspect=inspect)
    return checkpoint.as_stored(made.params, lambda w, dtype: w.astype(dtype))


@every_request
def test_the_bits_of_a_run_in_memory(folder, tmp_path, name):
    same_bits(folder, tmp_path, request_for(folder, name))


@pytest.mark.filterwarnings("ignore:.*tokens reached", "ignore:.*no input reached")
@pytest.mark.parametrize(
    "family, name",
    [
        ("qwen3_moe", "gptq"),
        ("mixtral", "quarot"),
        *(
            pytest.param(family, name, marks=pytest.mark.thorough)
            for family in ("qwen3_moe", "mixtral")
            for name in ("rtn", "gptq", "gptq, uniform", "smoothquant", "quarot")
            if (family, name) not in (("qwen3_moe", "gptq"), ("mixtral", "quarot"))
        ),
    ],
)
def test_the_bits_of_experts(family, tmp_path, name):
    (tmp_path / "text.txt").write_text(TEXT)
    tensors = random_tensors(FAMILIES[family])
    folder = write_folder(tmp_path / "model", FAMILIES[family], tensors)
    same_bits(folder, tmp_path, request_for(folder, name))


def same_bits(folder, tmp_path, request):
    got, want = run(folder, request, tmp_path / "o"), in_memory(folder, request)
    paths = dict(jq.core.path_leaves(want))
    for path, leaf in jq.core.path_leaves(got):
        if not isinstance(leaf, jq.QTensor):
            # Rotating a stack at once may round otherwise than rotating its layers.
            np.testing.assert_allclose(leaf, paths[path], atol=1e-6 if request.rotation else 0)
            continue
        assert (leaf.format, leaf.view, leaf.method) == (
            paths[path].format, paths[path].view, paths[path].method,
        )  # fmt: skip
        assert bool(leaf.shared) == bool(paths[path].shared), path
        if request.rotation:
            error = np.linalg.norm(leaf.dequantize() - paths[path].dequantize())
            assert error < 1e-2 * np.linalg.norm(leaf.dequantize())
        else:
            chex.assert_trees_all_equal(leaf.named, paths[path].named)


@pytest.fixture
def few(monkeypatch):
    """All hidden states go to files."""
    monkeypatch.setattr(passes, "IN_MEMORY", 0)


class StoppedError(Exception):
    """What stops a run."""


@pytest.mark.parametrize("name", ["gptq", "gptq, uniform", "rtn"])
@pytest.mark.parametrize("in_files", [True, False])
def test_stopped_after_any_layer_it_goes_on_to_the_same_bits(
    folder, tmp_path, monkeypatch, name, in_files
):
    monkeypatch.setattr(passes, "IN_MEMORY", 0 if in_files else 2**30)
    request, save = request_for(folder, name), layerwise.save_layer
    want = run(folder, request, tmp_path / "whole")
    done = []

    def one(place, layer, *rest):
        """Write a layer, then stop."""
        if done and done[-1] == "now":
            done.append("stop")
            raise StoppedError
        save(place, layer, *rest)
        done.extend([place.name, "now"])

    monkeypatch.setattr(layerwise, "save_layer", one)
    with Folder(tmp_path / "o.partial", {}) as kept:
        for _ in range(2):
            with pytest.raises(StoppedError):
                run(folder, request, tmp_path / "o", kept)
        got = run(folder, request, tmp_path / "o", kept)
    assert sorted(d for d in done if d.isdigit()) == ["0", "1", "2"]
    chex.assert_trees_all_equal(got, want)


def test_damaged_hidden_states_are_computed_again(folder, tmp_path, monkeypatch, few):
    request = request_for(folder, "gptq")
    want = run(folder, request, tmp_path / "whole")
    keep = passes.Passes.backward

    def harmed(self, layer, step=lambda _: None):
        for kind, i in (("state", 1), ("state", 2)):
            file = self._files._file(passes._name(kind, i, 0))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        keep(self, layer, step)

    monkeypatch.setattr(passes.Passes, "backward", harmed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = run(folder, request, tmp_path / "o")
    assert sum("is computed again" in str(w.message) for w in told) == 2
    chex.assert_trees_all_equal(got, want)


def test_a_damaged_layer_is_quantized_again(folder, tmp_path, monkeypatch, few):
    request = request_for(folder, "gptq")
    want = run(folder, request, tmp_path / "whole")
    with Folder(tmp_path / "o.partial", {}) as kept:
        run(folder, request, tmp_path / "o", kept)
        for i, name in enumerate(("jaxquant.json", "arrays/manifest.ocdbt")):
            (kept.directory("layers") / str(i + 1) / name).write_bytes(b"{}")
        shutil.rmtree(tmp_path / "o")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = run(folder, request, tmp_path / "o", kept)
    assert sum("the layer is made again" in str(w.message) for w in told) == 2
    chex.assert_trees_all_equal(got, want)


def test_a_disk_that_fills_keeps_the_layers_that_are_done(folder, tmp_path, monkeypatch):
    request, save = request_for(folder, "gptq"), layerwise.save_layer
    want = run(folder, request, tmp_path / "whole")

    def full(place, layer, *rest):
        if place.name == "1":
            raise OSError("could not write: No space left: 2 bytes are needed, 1 are free")
        save(place, layer, *rest)

    with Folder(tmp_path / "o.partial", {}) as kept:
        with monkeypatch.context() as patch:
            patch.setattr(layerwise, "save_layer", full)
            with pytest.raises(OSError, match="No space left"):
                run(folder, request, tmp_path / "o", kept)
        assert [p.name for p in kept.directory("layers").iterdir()] == ["2"]
        chex.assert_trees_all_equal(run(folder, request, tmp_path / "o", kept), want)


def test_an_output_matrix_with_feedback(folder, tmp_path):
    """A recipe may cover what is outside of the layers; its statistics come from the last one."""
    hf = FAMILIES["llama"]
    model = write_folder(tmp_path / "m", hf, random_tensors(hf))
    gptq = jq.gptq(bits=4, group_size=8)
    two_sided = dataclasses.replace(
        jq.gptq(bits=4, group_size="tensor"), rounder=jq.rounding.TwoSided()
    )
    rules = [("head/kernel", gptq), ("*down/ker*", two_sided), ("embed*", jq.rtn(group_size=8))]
    request = dataclasses.replace(
        request_for(folder, "gptq"), recipe=jq.Recipe([*rules, ("*", jq.KEEP)])
    )
    got, want = run(model, request, tmp_path / "o"), in_memory(model, request)
    for path in ("head/kernel", "layers/mlp/down/kernel", "embed/embedding"):
        a, b = (dict(jq.core.path_leaves(tree))[path] for tree in (got, want))
        chex.assert_trees_all_equal(a.named, b.named)


@pytest.mark.parametrize(("name", "reads"), [("gptq", 6), ("awq", 6), ("rtn", 3)])
def test_memory_holds_one_layer_at_a_time(folder, tmp_path, monkeypatch, name, reads):
    """Of the arrays of the layers, those alive when the next one is read."""
    read, most = registry.Weights.layer, []
    outline = registry.open_model(folder).outline.params["layers"]
    shapes = {(1, *w.shape[1:]) for w in jax.tree.leaves(outline) if len(w.shape) == 3}
    alive = lambda: sum(a.nbytes for a in jax.live_arrays() if a.shape in shapes)

    def counted(self, i, dtype):
        most.append(alive())
        return read(self, i, dtype)

    monkeypatch.setattr(registry.Weights, "layer", counted)
    gc.collect()
    before = alive()
    run(folder, request_for(folder, name), tmp_path / "o")
    assert len(most) == reads and max(most) == before


def test_a_token_without_a_row(folder):
    source = registry.open_model(folder)
    with pytest.raises(ValueError, match="token ids must lie in"):
        passes.Passes(source, np.array([[9999]]), {})


def test_gradients_are_those_of_the_loss(folder):
    """Walked back layer by layer, to the embedding."""
    source = registry.open_model(folder)
    tokens = np.arange(20)[None]
    walk = passes.Passes(source, tokens, {})
    walk.forward(source.outline.config.n_layers)
    walk.backward(-1)
    model = source.load()

    def loss(params):
        return next_token_loss(model.apply_fn(params, jnp.asarray(tokens)), jnp.asarray(tokens))

    layers = jax.grad(loss)(model.params)["layers"]
    h, g = walk.state(0, 0), walk.gradient(1, 0)
    layer = jax.tree.map(lambda a: a[0], model.params["layers"])
    own = jax.vjp(lambda p: walk.block(p, h), layer)[1](g)[0]
    chex.assert_trees_all_close(own, jax.tree.map(lambda a: a[0], layers), rtol=2e-4, atol=1e-6)


def healed_in_memory(folder, request):
    """The layers healed by the functions for models in memory."""
    source = registry.load(folder)
    texts = quantization_setup._read_texts(request)
    cut = quantization_setup._cut(request, needs_of(request), source, texts)
    stats = calibrate_model(source, cut.calibration, weighting=request.weighting)
    made = quantize_model(source, request.recipe, stats, key=request.key)
    return heal_model(
        source, made, cut.training, cut.held_out, None, progress=lambda _: None
    ).params


def healing_request(folder):
    text = folder.parent / "long.txt"
    text.write_text(TEXT * 3)
    return request_of(
        calibration=str(text), calibration_tokens=768, method="gptq", group_size=8, heal_layers=True
    )


def test_layers_healed_one_by_one(folder, tmp_path):
    """They are those that are healed in memory, and differ from those that are not healed."""
    request = healing_request(folder)
    got, want = run(folder, request, tmp_path / "o"), healed_in_memory(folder, request)
    plain = run(folder, dataclasses.replace(request, layers_healed=False), tmp_path / "p")
    far = lambda a, b, p: np.linalg.norm(np.float32(wide(a, p)) - np.float32(wide(b, p)))
    moved = same = 0.0
    for path, _ in jq.core.path_leaves(got):
        if path.startswith("layers/"):
            moved, same = moved + far(got, plain, path), same + far(got, want, path)
    assert same < 0.02 * moved


def wide(tree, path):
    leaf = dict(jq.core.path_leaves(tree))[path]
    return leaf.dequantize() if isinstance(leaf, jq.QTensor) else leaf


def test_healing_stopped_after_a_layer_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    request, save = healing_request(folder), healing.save_layer
    want = run(folder, request, tmp_path / "whole")
    left = []

    def one(place, layer, *rest):
        left.append(place)
        if len(left) == 2:
            raise StoppedError
        save(place, layer, *rest)

    monkeypatch.setattr(healing, "save_layer", one)
    with Folder(tmp_path / "cut.partial", {}) as kept:
        with pytest.raises(StoppedError):
            run(folder, request, tmp_path / "cut", kept)
        got = run(folder, request, tmp_path / "cut", kept)
    chex.assert_trees_all_equal(got, want)
    assert len(left) == 4  # the first layer was not made again
