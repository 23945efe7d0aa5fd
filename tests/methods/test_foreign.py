"""Parts from outside the package: a format, a transform and a rounder, through the whole library.

They are what a user would write by the docstring of `jaxquant.core.protocols`, and no more. The
format is in the contract suite of formats too, by its line in FORMATS of test_formats.py.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.transforms import Rotation
from tests.support.foreign import Coarse, Reversal, SignLog

K, N = 64, 32


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (K, N)), "down": jax.random.normal(keys[1], (N, K))}
    x = jax.random.normal(keys[2], (128, K)) * jnp.exp(jnp.linspace(0, 2, K))
    return params, x, jq.calibrate(fn, params, [x])


def methods():
    ldlq = jq.gptq().rounder
    return {
        "format": jq.Method("sign_log", jq.rtn().rounder, SignLog()),
        "format, feedback": jq.Method("sign_log", ldlq, SignLog()),
        "transform": jq.Method("reversed", ldlq, jq.formats.Integer(4, 16), input=Reversal()),
        "rounder": jq.Method("coarse", Coarse(), jq.formats.Integer(4, 16)),
        "all": jq.Method("mine", Coarse(), SignLog(), Reversal(), Reversal(0.5)),
    }


@pytest.mark.parametrize("name", methods())
def test_a_method_of_foreign_parts_quantizes_serves_and_is_kept(model, name, tmp_path):
    params, x, stats = model
    q = jq.quantize(params, methods()[name], stats)
    want = fn(jq.dequantize(q), x)
    chex.assert_trees_all_close(jax.jit(jq.quantized(fn))(q, x), want, rtol=1e-4, atol=1e-4)
    error = jnp.linalg.norm(q["up"].dequantize() - params["up"]) / jnp.linalg.norm(params["up"])
    assert 0.01 < error < 0.35
    assert "packed matmul" in str(jq.explain(fn, q, x))
    recipe = jq.Recipe([("*", methods()[name])])
    jq.save(tmp_path / "c", q, recipe=recipe)
    assert storage.stored_recipe(tmp_path / "c") == recipe
    chex.assert_trees_all_equal(jq.load(tmp_path / "c"), q)


def test_feedback_serves_a_foreign_format(model):
    """Less of the output is lost than by rounding to nearest; the twin, no correlation, ties."""
    params, x, stats = model
    lost = {}
    for name in ("format", "format, feedback"):
        w = jq.quantize(params, methods()[name], stats)["up"].dequantize()
        lost[name] = float(jnp.sum((x @ (w - params["up"])) ** 2))
    assert lost["format, feedback"] < 0.9 * lost["format"]
    nearest, fed = (
        jq.quantize_array(params["up"], methods()[name], jnp.eye(K)).dequantize()
        for name in ("format", "format, feedback")
    )
    np.testing.assert_array_equal(nearest, fed)


def test_a_foreign_format_trains_and_freezes(model):
    params, x, _ = model
    p = jq.latent(params, methods()["format"])
    np.testing.assert_array_equal(
        p["up"].dequantize(), jq.quantize(params, methods()["format"])["up"].dequantize()
    )
    slope = jax.grad(jq.quantized(lambda p, x: jnp.sum(fn(p, x) ** 2)))(p, x)
    assert bool(jnp.any(slope["up"].data["codes"] != 0))
    frozen = jq.freeze(p)
    assert frozen["up"].format == SignLog()
    chex.assert_trees_all_equal(jq.quantized(fn)(frozen, x), jq.quantized(fn)(p, x))


def test_healing_moves_the_scales_that_a_foreign_format_names(model):
    params, x, _ = model
    q = jq.quantize(params, methods()["format"])
    healed = jq.heal(fn, q, params, np.asarray(x).reshape(16, 8, K), jq.tuning.Healing(steps=3))
    np.testing.assert_array_equal(healed["up"].data["codes"], q["up"].data["codes"])
    assert not np.array_equal(healed["up"].data["scale"], q["up"].data["scale"])


class Mine:
    """What a user writes first: neither a base class nor all methods."""

    def encode(self, w):
        return {}

    def check(self, format):
        return None


@dataclasses.dataclass(frozen=True)
class Whole(jq.formats.Format):
    """All that a format needs, with room for what goes wrong."""

    def encode(self, w):
        return {"codes": jnp.round(w)}

    def decode(self, data, k):
        return data["codes"]


class Loose(Whole):
    __hash__ = None  # as a dataclass without frozen=True has it


class Partial(jq.formats.Format):
    def encode(self, w):
        return {}


NEAREST, INTEGER = jq.rtn().rounder, jq.formats.Integer(4, 16)
Wide = type("Wide", (Whole,), {"wide": True})
Ranged = type("Ranged", (jq.rounding.Nearest,), {"takes_ranges": True})
Searched = type("Searched", (Reversal,), {"searched": True})
Learned = type("Learned", (Reversal,), {"learns": True})
LACKS = {
    "no base": ({"format": Mine()}, "is not a Format: derive it from Format and define decode"),
    "no base, a class": ({"format": Mine}, r"Mine is not a Format: .* define decode"),
    "no methods": ({"format": Partial}, "class Partial lacks decode, and an instance of it is"),
    "a class": ({"format": type(INTEGER)}, r"Integer is a class: pass an instance, Integer\(...\)"),
    "a foreign class": ({"format": SignLog}, r"SignLog is a class: pass an instance, SignLog\(..."),
    "a text": ({"format": "int4"}, r"format must be a Format \(Integer\(\), ...\): 'int4' is not"),
    "unfrozen": ({"format": Loose()}, r"Loose cannot be hashed .*: make it a dataclass"),
    "wide": ({"format": Wide()}, r"Wide lacks scaled \(required by wide = True\)"),
    "rounder": ({"rounder": Mine()}, "Mine is not a Rounder: derive it .* and define __call__"),
    "function": ({"rounder": lambda *a: a}, "rounder must be a Rounder .* is not a Rounder"),
    "swapped": ({"rounder": INTEGER}, r"Integer\(bits=4, .*\) is not a Rounder"),
    "ranges": ({"rounder": Ranged()}, r"Ranged lacks within \(required by takes_ranges = True\)"),
    "estimator": (
        {"estimator": Mine()},
        r"estimator must be an Estimator \(StraightThrough\(\), ...\) or None: Mine is not an "
        r"Estimator: derive it from Estimator and define packed, start, value",
    ),
    "range": ({"input_estimator": Mine}, "Mine is not a RangeEstimator: .* served, start, value"),
    "transform": ({"input": Mine()}, "Mine is not a Transform: .* apply, fit, inverse, transposed"),
    "number": ({"input": 3}, r"input must be a Transform \(Rotation\(\), ...\) or None: 3 is not"),
    "transform, a class": ({"output": Rotation}, "Rotation is a class: pass an instance"),
    "searched": ({"input": Searched()}, "Searched lacks candidates"),
    "learns": ({"input": Learned()}, r"lacks latent \(.*\), learned \(required by learns = True"),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKS)
def test_what_is_no_part_is_told_what_it_lacks(case):
    change, message = LACKS[case]
    with pytest.raises(ValueError, match=message) as caught:
        jq.Method(**{"name": "mine", "rounder": NEAREST, "format": INTEGER} | change)
    text = str(caught.value)
    assert text.startswith(f"{next(iter(change))} must be a") and "\n" not in text


def test_parts_within_parts_are_told_too():
    with pytest.raises(ValueError, match="rounder must be a Rounder .*: Mine is not a Rounder"):
        jq.rounding.Clipped(Mine())
    with pytest.raises(
        ValueError, match="parts must be a tuple of transforms: Rotation is a class"
    ):
        jq.transforms.Chain((jq.transforms.Rotation(), jq.transforms.Rotation))
    with pytest.raises(ValueError, match="one or more"):
        jq.transforms.Chain(())
    with pytest.raises(TypeError, match="abstract class Partial .*decode"):
        Partial()


def test_a_part_that_lacks_nothing_is_a_part():
    q = jq.quantize_array(3 * jnp.eye(16), jq.Method("whole", NEAREST, Whole()))
    np.testing.assert_array_equal(q.dequantize(), 3 * np.eye(16))


class Bare(jq.rounding.Rounder):
    """A rounder whose result is given."""

    def __init__(self, result):
        self.result = result

    def __call__(self, w, format, moments, key=None):
        return self.result(format.encode(w))


@pytest.mark.parametrize(
    ("result", "returned"),
    [
        (lambda data: (data, {}), r"\['codes', 'scale', 'zero'\] and \[\]"),
        (lambda data: ({"scale": data["scale"]}, {}), r"\['scale'\] and \[\]"),
        (lambda data: data, "dict"),
        (lambda data: (data["codes"], data), r"Tracer and \['codes', 'scale', 'zero'\]"),
    ],
)
def test_what_a_rounder_returns(result, returned):
    """The loss of a key would surface as a KeyError deep inside."""
    message = rf"'damping' and 'dead'; Bare with Integer returned .*{returned}"
    with pytest.raises(ValueError, match=message):
        jq.quantize_array(jnp.eye(16), jq.Method("bare", Bare(result), INTEGER))


def test_a_grid_that_cannot_be_rescaled():
    class Fixed(SignLog):
        rescaled = jq.formats.GridFormat.rescaled

    ldlq = jq.rounding.LDLQ(scales=(0.9, 1.0))
    with pytest.raises(
        ValueError, match="Fixed does not define rescaled, which this rounder needs"
    ):
        jq.quantize_array(jnp.eye(16), jq.Method("m", ldlq, Fixed()), jnp.eye(16))


def test_names_are_taken_once():
    @dataclasses.dataclass(frozen=True)
    class Integer(jq.rounding.Rounder):
        def __call__(self, w, format, moments, key=None):
            return format.encode(w), {}

    with pytest.raises(ValueError, match="the name 'Integer' is taken by jaxquant.formats"):
        jq.recipes.register(Integer)
    with pytest.raises(ValueError, match="frozen=True"):
        jq.recipes.register(type("Loose", (jq.rounding.Rounder,), {}))
    assert jq.recipes.register(SignLog) is SignLog
