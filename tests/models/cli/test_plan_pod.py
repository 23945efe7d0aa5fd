"""`jaxquant plan --topology`."""

import json

import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant_models.runs import pod_compiler
from tests.support.command import fails


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    monkeypatch.setattr(pod_compiler, "missing", lambda: "libtpu is not installed")


def test_bits_16_leave_the_weights(run):
    plan = ("plan", "llama-3-70b", "--topology", "v5e:4x4", "--json", "--bits")
    packed, floats = (json.loads(run(*plan, bits)[1]) for bits in (2, 16))
    assert packed["fits"] and not floats["fits"]
    assert floats["smallest"]["v5e"] == "v5e:4x8" and floats["bits_per_weight"] == 16
    assert packed["roofline"]["bound"] == "memory" and packed["source"] == "formula"


def test_text_and_a_folder(run, tiny):
    for model in (tiny, tiny / "config.json"):
        status, out, err = run("plan", model, "--topology", "v5e:1x1", "--group-size", 8)
        assert status == 0, err
        assert "collectives per step: none, devices send nothing (from the formula)" in out
        assert "it fits" in out and "libtpu is not installed" in out and "smallest slices" in out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--topology", "v5e:3x3"), "those of v5e are"),
        (("--topology", "v5e:4x4", "--mesh", "data=1,model=16"), "do not divide the 8 kv_heads"),
        (("--topology", "v5e:4x4", "--mesh", "model=8"), "has 8 devices, but v5e:4x4 has 16"),
        (("--topology", "v5e:4x4", "--bits", 16, "--method", "rtn"), "leave out --method"),
        (("--topology", "v5e:4x4", "--train", "qlora", "--prefill"), "give only one of them"),
        (("--topology", "v5e:4x4", "--target-bits", 3), "give --method and --bits"),
        (("--topology", "v5e:4x4", "--context", 9000), "exceeds the 8192 positions"),
        (("--method", "rtn", "--batch", 3), "--batch needs --topology"),
        (("--topology", "v5e:4x4", "--bits", 16, "--group-size", 64), "leave out --group-size"),
        (("--topology", "v5e:4x4", "--bits", 16, "--target-bits", 3), "leave out --target-bits"),
        (("--topology", "v5e:4x4", "--bits", 16, "--asymmetric"), "--symmetric and --asymmetric"),
        (("--topology", "v5e:4x4", "--heal", 20), "does not consider --heal:"),
        (("--topology", "v5e:4x4", "--heal-layers"), "does not consider --heal-layers"),
        (("--topology", "v5e:4x4", "--learn", 20), "does not consider --learn"),
        (("--topology", "v5e:4x4", "--rotate-residual", "random"), "consider --rotate-residual"),
        (
            ("--topology", "v5e:4x4", "--seed", 7),
            "a plan with --topology does not consider --seed: leave it out",
        ),
        (("--topology", "v5e:4x4", "--weighting", "energy"), "does not consider --weighting"),
        (("--topology", "v5e:4x4", "--effort", "best"), "does not consider --effort"),
        (("--topology", "v5e:4x4", "--calibration", "a.txt"), "does not consider --calibration:"),
        (("--topology", "v5e:4x4", "--calibration-tokens", 512), "consider --calibration-tokens:"),
        (("--topology", "v5e:4x4", "--heal-batch", 2), "does not consider --heal-batch"),
        (
            ("--topology", "v5e:4x4", "--mesh", "expert=8,model=2"),
            "the mesh expert=8,model=2 splits experts, but the model has none; give --mesh sizes "
            "of the axes data and model only",
        ),
        (("--topology", "v5e:4x4", "--prefill", "--batch", 3), "do not divide a batch of 3"),
    ],
)
def test_bad_input(run, options, error):
    fails(run("plan", "llama-3-70b", *options), 2, error)


@pytest.mark.parametrize("model", ["llama-9", "x" * 300])
def test_an_unknown_model(run, model):
    status, _, err = run("plan", model, "--topology", "v5e:4x4")
    assert status == 2 and "llama-3-70b" in err and "Traceback" not in err


@pytest.mark.parametrize("work", ["qlora", "qat"])
def test_training_of_nothing(run, tmp_path, work):
    (tmp_path / "keep.json").write_text('[{"pattern": "*", "method": "keep"}]')
    options = ("--topology", "v5e:4x4", "--train", work, "--recipe", tmp_path / "keep.json")
    fails(run("plan", "llama-3-8b", *options), 2, f"--train {work} needs a recipe that quantizes")


def test_a_quantized_model_is_no_model_to_quantize(run, tmp_path):
    jq.save(tmp_path / "q", {"w": jnp.ones(3)})
    fails(run("plan", tmp_path / "q", "--topology", "v5e:4x4"), 2, "give the unquantized one")


def test_a_method_that_needs_the_moments_of_outputs(run):
    options = ("--method", "qtip", "--set", "two_sided=true", "--json")
    status, out, err = run("plan", "llama-3-8b", "--topology", "v5e:2x2", *options)
    assert status == 0, err
    assert json.loads(out)["packed_weights"] == 7
    assert json.loads(out)["compiled_arguments"] is None


def test_a_slice_that_is_passed_over_is_named_with_the_reason(run):
    """One sequence cannot be split over the "data" of slices with more than eight devices."""
    options = ("--prefill", "--batch", 1, "--context", 64, "--bits", 16, "--topology", "v5p:2x2x2")
    status, out, err = run("plan", "llama-3-405b", *options)
    assert status == 0, err
    assert "none of v5e" in out and 'v5e:8x8 is passed over: the 8 devices of "data"' in out
    report = json.loads(run("plan", "llama-3-405b", *options, "--json")[1])
    assert report["smallest"]["v5e"] == "" and "batch of 1" in report["passed_over"]["v5e"]
