"""Bits allocated to a model of which one layer is in memory at a time, against the whole model."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.readers import registry
from jaxquant_models.runs import allocating, passes, quantization_setup
from jaxquant_models.runs.allocating import AllocatingJob
from jaxquant_models.runs.quantization_job import QuantizationJob
from tests.support.reporting import Quiet
from tests.support.tiny_llama import FAMILIES, random_tensors, write_folder

TEXT = "The quick brown fox jumps over the lazy dog. " * 90
REQUESTS = {
    "rtn": {"method": "rtn", "group_size": 8, "symmetric": True, "target_bits": 7},
    "gptq": {"method": "gptq", "group_size": 8, "symmetric": True, "target_bits": 6},
    "two-sided": {"method": "rtn", "group_size": 8, "symmetric": True, "target_bits": 5},
    "entropy_coded": {"method": "entropy_coded", "target_bits": 6.5, "weighting": "uniform"},
    "trellis": {"method": "trellis", "target_bits": 4.5, "effort": "fast"},  # it plans rates
}
FEW = {"entropy_coded": (5, 8), "trellis": (2, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("allocating")
    (place / "text.txt").write_text(TEXT)
    hf = FAMILIES["qwen2"] | {"hidden_size": 32, "intermediate_size": 64}  # tiles of trellises
    return write_folder(place / "model", hf, random_tensors(hf))


def request_for(folder, name):
    text = str(folder.parent / "text.txt")
    request = request_of(calibration=text, calibration_tokens=512, **REQUESTS[name])
    if name in FEW:  # each rate of these methods takes long to compile
        few = tuple(m for m in request.choices if m.format.bits in FEW[name])
        return dataclasses.replace(request, choices=few)
    if name != "two-sided":
        return request
    both = lambda bits: dataclasses.replace(
        jq.gptq(bits=bits, group_size="tensor"), rounder=jq.rounding.TwoSided()
    )
    return dataclasses.replace(request, choices=tuple(map(both, (2, 3, 4, 8))))


class Told(Quiet):
    """Keeps the options that are told."""

    def __init__(self):
        super().__init__()
        self.options = []

    def stage(self, title, total):
        stage = super().stage(title, total)
        return Kept(stage, self.options)


class Kept:
    def __init__(self, stage, options):
        self.entered, self.options = stage, options

    def __enter__(self):
        step = self.entered.__enter__()

        def keep(done):
            if isinstance(done, jq.ptq.Option):
                self.options.append(done)
            return step(done)

        return keep

    def __exit__(self, *about):
        return self.entered.__exit__(*about)


def layer_by_layer(folder, request, place):
    told = Told()
    with Folder(place, {}) as kept:
        job = quantization_setup.set_up(request, str(folder), lambda _: kept, told)
        assert isinstance(job, AllocatingJob)
        result = job.run()
    return told.options, result


def in_memory(folder, request):
    told, source = Told(), registry.load(folder)
    needs = quantization_setup.needs_of(request)
    texts = quantization_setup._read_texts(request)
    sequences = quantization_setup._cut(request, needs, source, texts)
    job = QuantizationJob(request, source, needs, sequences, None, {}, told)
    recipe = job._allocated(job._statistics())
    return told.options, recipe


@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        "two-sided",
        pytest.param("entropy_coded", marks=pytest.mark.thorough),
        pytest.param("trellis", marks=pytest.mark.thorough),
    ],
)
def test_the_losses_are_those_of_the_whole_model(folder, tmp_path, name):
    request = request_for(folder, name)
    got, result = layer_by_layer(folder, request, tmp_path / "p")
    want, recipe = in_memory(folder, request)
    assert [(o.path, o.method, o.bytes) for o in got] == [(o.path, o.method, o.bytes) for o in want]
    losses = lambda options: np.log([o.loss for o in options])
    # Trellises follow a rotation, which is drawn for the name of the weight.
    far = np.log(2) if name == "trellis" else 5e-3
    np.testing.assert_allclose(losses(got), losses(want), atol=far)
    assert name == "trellis" or result.recipe == recipe
    assert len(result.layers) == 3


class StoppedError(Exception):
    """What stops a run."""


@pytest.mark.parametrize("in_files", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_stopped_anywhere_it_goes_on_to_the_same_losses(folder, tmp_path, monkeypatch, in_files):
    monkeypatch.setattr(passes, "IN_MEMORY", 0 if in_files else 2**30)
    request = request_for(folder, "gptq")
    want, whole = layer_by_layer(folder, request, tmp_path / "whole")
    left = [0]
    steps = {
        allocating: ["_energy", "save_layer", "load", "evaluate"],
        allocating.jq: ["quantize"],
    }

    def stopping(function):
        def one(*args, **named):
            left[0] -= 1
            if left[0] == 0:
                raise StoppedError
            return function(*args, **named)

        return one

    for module, names in steps.items():
        for name in names:
            monkeypatch.setattr(module, name, stopping(getattr(module, name)))
    stops = 0
    for _ in range(99):
        left[0] = 13
        try:
            got, result = layer_by_layer(folder, request, tmp_path / "cut")
            break
        except StoppedError:
            stops += 1
    assert stops >= 4
    assert got == want and result.recipe == whole.recipe
    assert not (tmp_path / "cut" / "alone.parts").exists()


def test_the_wrong_layer_would_be_seen(folder, tmp_path, monkeypatch):
    request = request_for(folder, "rtn")
    want, _ = in_memory(folder, request)
    monkeypatch.setattr(allocating, "sampled", lambda count: [0])
    got, _ = layer_by_layer(folder, request, tmp_path / "p")
    worst = max(abs(a.loss / b.loss - 1) for a, b in zip(got, want, strict=True))
    assert worst > 0.02


def test_memory_holds_one_layer_at_a_time(folder, tmp_path, monkeypatch):
    """Of the weights and second moments of a layer, those alive when the next one is read."""
    request = request_for(folder, "trellis")
    request = dataclasses.replace(request, layers_healed=True, target_bits=7)
    read, most = registry.Weights.layer, []
    layers = jax.tree.leaves(registry.open_model(folder).outline.params["layers"])
    shapes = {
        shape for w in layers if len(w.shape) == 3 for shape in (w.shape[1:], (1, *w.shape[1:]))
    }
    shapes |= {shape for k in (32, 64) for shape in ((k, k), (1, k, k))}
    alive = lambda: sum(a.nbytes for a in jax.live_arrays() if a.shape in shapes)

    def counted(self, i, dtype):
        gc.collect()
        most.append(alive())
        return read(self, i, dtype)

    monkeypatch.setattr(registry.Weights, "layer", counted)
    gc.collect()
    before = alive()
    _, result = layer_by_layer(folder, request, tmp_path / "p")
    assert len(most) > 12 and max(most) == before
    assert [place.parent.name for place in result.layers] == ["healed.parts"] * 3


def test_with_a_rotation_a_prefix_and_healing(folder, tmp_path):
    plain = request_for(folder, "gptq")
    request = dataclasses.replace(plain, rotation="random", exact_prefix=2, layers_healed=True)
    options, result = layer_by_layer(folder, request, tmp_path / "p")
    assert len(result.layers) == 3 and result.model.prefix == 2
    others, _ = layer_by_layer(folder, plain, tmp_path / "q")
    assert [o.loss for o in options] != [o.loss for o in others]


def test_two_sided_rounding_needs_gradients():
    with pytest.raises(ValueError, match="use --weighting gradient"):
        request_of(method="qtip", weighting="uniform", settings=("two_sided=true",))


def test_a_prefix_that_leaves_nothing(folder, tmp_path):
    request = dataclasses.replace(request_for(folder, "gptq"), exact_prefix=511)
    with pytest.raises(ValueError, match="--exact-prefix 511 leaves nothing to calibrate on"):
        layer_by_layer(folder, request, tmp_path / "p")
