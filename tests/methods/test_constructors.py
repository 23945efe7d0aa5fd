"""Constructors of methods: every documented argument is taken, has an effect, and is checked."""

import inspect
import re

import pytest

import jaxquant as jq
from jaxquant.core.activations import Activations

# For every argument a value other than the default; for some methods one of their own.
OTHER = {
    "activations": "int8,asymmetric", "act_order": False, "alpha": 0.3, "axis": "data", "beam": 2,
    "bits": 3, "block": 32, "block_size": 64, "by_row": True, "chain": 64, "clip": 0.9,
    "clipped": True, "code": "3inst", "codebooks": 1, "damping": 0.05, "double_quant": True,
    "duo": True, "feedback": True, "flat": True, "group": 4, "group_size": 32, "init": "range",
    "L": 10, "length": 4, "mse": True, "orthogonal": True, "outliers": 0.1, "pad": True,
    "passes": 2, "permute": False, "released": True, "residual_bits": 4, "rotate": True,
    "scale_dtype": "bfloat16", "scale_gradient": "none", "shared": False, "signed": True,
    "states": 16, "steps": 8, "stochastic": True, "sweeps": 2, "symmetric": True,
    "two_sided": True, "variant": "e5m2",
}  # fmt: skip
OWN = {
    ("pact", "activations"): "int8,asymmetric,static,mse",
    ("lsq", "symmetric"): False,
    ("pact", "symmetric"): False,
    ("smoothquant", "symmetric"): False,
    ("quarot", "symmetric"): False,
    ("quarot", "feedback"): False,
    ("flatquant", "feedback"): False,
    ("awq", "clip"): False,
    ("smoothquant", "bits"): 16,
    ("lsq", "scale_gradient"): "none",
    ("stretched_elastic", "bits"): 1.58,
}
# What an argument depends on to have an effect.
BESIDE = {
    "smoothquant.damping": {"feedback": True},
    "awq.damping": {"feedback": True},
    "duquant.damping": {"feedback": True},
    "stretched_elastic.released": {"bits": 1.58},
}
BAD = {
    "activations": "int3x", "alpha": 2.0, "beam": 0, "bits": 99, "block": 0, "block_size": 0,
    "chain": -1, "code": "no", "codebooks": 0, "damping": -1.0, "group": 0, "group_size": 0,
    "init": "no", "L": 99, "length": 0, "outliers": 1.5, "passes": -1, "residual_bits": -1,
    "scale_dtype": "int8", "scale_gradient": "no", "states": 3, "steps": 0, "sweeps": -1,
    "variant": "e3m4",
}  # fmt: skip
ARGUMENTS = [(name, arg) for name, make in jq.METHODS.items()
             for arg in inspect.signature(make).parameters]  # fmt: skip


def documented(make):
    """The arguments that a docstring's section Args names."""
    section = inspect.getdoc(make).partition("Args:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  (\w+):", section, re.M)


@pytest.mark.parametrize("name", jq.METHODS)
def test_the_docstring_names_every_argument_and_no_other(name):
    make = jq.METHODS[name]
    text = inspect.getdoc(make)
    assert documented(make) == list(inspect.signature(make).parameters)
    assert all(f"\n{part}:" in text for part in ("Args", "Returns", "Raises")) and ">>> " in text
    assert make is getattr(jq, name) and make().name == name
    assert "activations" in documented(make)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_every_argument_changes_the_method(name, argument):
    make = jq.METHODS[name]
    value = OWN.get((name, argument), OTHER[argument])
    beside = BESIDE.get(f"{name}.{argument}", {})
    assert make(**beside, **{argument: value}) != make(**beside)


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, a in ARGUMENTS if a in BAD])
def test_bad_values_are_refused_in_a_line(name, argument):
    beside = BESIDE.get(f"{name}.{argument}", {})
    with pytest.raises(ValueError, match=".") as caught:
        jq.METHODS[name](**beside, **{argument: BAD[argument]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", jq.METHODS)
def test_activations_are_a_form_or_its_text(name):
    form = "int8,static,mse" if name == "pact" else "int8"
    make = jq.METHODS[name]
    assert make(activations=form) == make(activations=Activations.of(form))
    assert str(make(activations=form).activations) == form


def test_nf4_is_normal_float_at_four_bits():
    assert jq.nf4(double_quant=True).format == jq.normal_float(4, double_quant=True).format


def test_static_ranges_are_learned_and_others_computed():
    assert jq.lsq(activations="int8,static,mse").input_estimator is not None
    assert jq.lsq(activations="int8").input_estimator is None
    assert jq.pact(activations="int4,asymmetric,static,mse").input_estimator.unsigned
    with pytest.raises(ValueError, match="pact needs activations with a static scale"):
        jq.pact(activations="int8")
