"""`jaxquant plan --topology`."""

import json

import pytest

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
        assert "it fits" in out and "libtpu is not installed" in out and "smallest slices" in out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--topology", "v5e:3x3"), "those of v5e are"),
        (("--topology", "v5e:4x4", "--mesh", "data=1,model=16"), "do not divide the 8 kv_heads"),
        (("--topology", "v5e:4x4", "--mesh", "model=8"), "has 8 devices, but v5e:4x4 has 16"),
        (("--topology", "v5e:4x4", "--bits", 16, "--method", "rtn"), "leave out --method"),
        (("--topology", "v5e:4x4", "--train", "qlora", "--prefill"), "give one of them"),
        (("--topology", "v5e:4x4", "--target-bits", 3), "give --method and --bits"),
        (("--topology", "v5e:4x4", "--context", 9000), "exceeds the 8192 positions"),
        (("--method", "rtn", "--batch", 3), "--batch needs --topology"),
    ],
)
def test_bad_input(run, options, error):
    fails(run("plan", "llama-3-70b", *options), 2, error)


def test_an_unknown_model(run):
    status, _, err = run("plan", "llama-9", "--topology", "v5e:4x4")
    assert status == 2 and "llama-3-70b" in err
