"""Entropies against closed forms, exact counts and real weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxquant as jq
from jaxquant.core.tensor import QTensor, View
from jaxquant.theory.code_entropy import code_entropy
from jaxquant.theory.entropy import entropy, symbol_entropy
from jaxquant.theory.float_entropy import (
    exponent_entropy,
    field_entropy,
    fields,
    float_entropy,
    source_exponent_entropy,
)
from tests.support.arrays import draw

RANDOM = np.random.default_rng(0)
# One number for each of as many equal parts of the distribution: no noise of sampling.
GAUSSIAN = stats.norm.ppf((RANDOM.permutation(1 << 18) + 0.5) / (1 << 18)).astype(np.float32)
PHASES = 2 ** np.linspace(0, 1, 32, endpoint=False)


def test_entropy_of_counts():
    assert entropy(np.array([1, 1, 1, 1])) == 2 and entropy(jnp.array([7.0, 0.0])) == 0
    rows = entropy(np.array([[1, 3], [2, 2]]))
    np.testing.assert_allclose(rows, [2 - 0.75 * math.log2(3), 1])


def test_conditional_entropy_is_the_mean_over_the_groups():
    symbols, groups = RANDOM.integers(-3, 4, (50, 8)), RANDOM.integers(0, 5, (50, 1))
    parts = [symbols[groups[:, 0] == g] for g in range(5)]
    want = sum(symbol_entropy(part) * part.size for part in parts) / symbols.size
    assert symbol_entropy(symbols, groups) == pytest.approx(want)
    assert symbol_entropy(symbols, groups) <= symbol_entropy(jnp.asarray(symbols))
    # Far apart or negative, symbols and groups are only names.
    far = symbol_entropy(symbols * 10**12, -(groups**3) * 10**9)
    assert far == pytest.approx(want)
    assert symbol_entropy(symbols, np.arange(400).reshape(50, 8)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy(np.array([1, -1])), "counts must be finite and nonnegative"),
        (lambda: entropy(np.array([1, np.nan])), "counts must be finite"),
        (lambda: entropy(np.array([0, 0])), "must have a positive sum"),
        (lambda: entropy(np.zeros((2, 0))), "must be a nonempty array"),
        (lambda: entropy(np.array(3)), r"got shape \[\]"),
        (lambda: entropy([1, 2]), "counts: expected an array"),
        (lambda: symbol_entropy(np.zeros(0, int)), "expected symbols, got an empty array"),
        (lambda: symbol_entropy(np.ones(3)), "symbols must be integers, got float64"),
        (lambda: symbol_entropy(np.ones((3, 2), int), np.arange(3)), r"pass one .* as \[rows, 1\]"),
        (lambda: symbol_entropy(np.ones(3, int), np.ones(3)), "groups must be integers"),
        (lambda: fields(np.ones(3)), "dtype must be one of bfloat16, .* got float64"),
        (lambda: fields(np.array([449.0, 1e9]), "float8_e4m3fn"), "1 finite .* largest .*, 448;"),
        (lambda: fields(np.array([7e4]), "float16"), "1 finite numbers exceed .* 65504"),
        (lambda: exponent_entropy(np.zeros(0, np.float32)), "got an empty array"),
        (lambda: float_entropy(stats.norm(), 0), "precision must be 1 or more"),
        (lambda: float_entropy(stats.poisson(3), 8), "distribution: expected a Distribution"),
        (lambda: source_exponent_entropy(stats.norm(np.nan)), "have a probability of nan"),
        (lambda: source_exponent_entropy(stats.norm(), 0), "scale must be a finite number above 0"),
        (lambda: code_entropy({"w": jnp.ones((4, 4))}), "expected a QTensor or a tree"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"]
)
def test_fields_hold_every_pattern(dtype):
    """Subnormals, -0, infinities and NaNs with their payloads too."""
    info = jnp.finfo(dtype)
    bits = info.bits
    drawn = RANDOM.integers(0, 1 << 32, 1 << 16, np.uint64)
    patterns = (np.arange(1 << bits) if bits < 32 else drawn).astype(f"uint{bits}")
    numbers = patterns.view(jnp.dtype(dtype))
    found = fields(jnp.asarray(numbers))
    whole = found.sign.astype(np.uint64) << (bits - 1) | found.mantissa
    np.testing.assert_array_equal(whole | found.exponent.astype(np.uint64) << info.nmant, patterns)
    np.testing.assert_array_equal(found.value, patterns)
    finite = np.isfinite(numbers)
    size, exponent = np.abs(numbers[finite].astype(float)), found.exponent[finite].astype(int)
    normal, one = size >= float(info.tiny), int(fields(np.ones(1, dtype)).exponent[0])
    np.testing.assert_array_equal(exponent[normal] - one, np.floor(np.log2(size[normal])))
    assert not exponent[~normal].any()


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "differential", "mean_log", "above"),
    [
        (stats.norm(), math.log2(2 * math.pi * math.e) / 2, -(np.euler_gamma / math.log(2) + 1) / 2,
         2.46),
        (stats.laplace(), math.log2(2 * math.e), -np.euler_gamma / math.log(2), 2.78),
        (stats.uniform(-1, 2), 1, -1 / math.log(2), 1.94),
        (stats.uniform(0, 1.3), math.log2(1.3), math.log2(1.3) - 1 / math.log(2), 1.94 - 1),
        (stats.cauchy(), math.log2(4 * math.pi), 0, 3.15),
    ],
    ids=lambda one: getattr(getattr(one, "dist", None), "name", ""),
)  # fmt: skip
def test_closed_forms(distribution, differential, mean_log, above):
    """p - 1/2 + h(X) - E[log2 |X|], with both as tables of integrals give them."""
    found = float_entropy(distribution, 8)
    assert found == pytest.approx(7.5 + differential - mean_log, abs=1e-6)
    assert found == pytest.approx(8 + above, abs=0.006)


def test_closed_forms_do_not_depend_on_the_scale():
    for scale, precision in ((1e-30, 8), (3e20, 24)):
        found = float_entropy(stats.norm(scale=scale), precision)
        assert found == pytest.approx(precision + 2.4634, abs=1e-4)


def test_exponents_of_distributions():
    over = lambda distribution: [source_exponent_entropy(distribution, s) for s in PHASES]
    gaussian = over(stats.norm())
    assert np.mean(gaussian) == pytest.approx(2.5442, abs=5e-5)
    assert (min(gaussian), max(gaussian)) == pytest.approx((2.5422, 2.5463), abs=5e-5)
    assert np.mean(over(stats.laplace())) == pytest.approx(2.832, abs=5e-4)
    assert np.mean(over(stats.cauchy())) == pytest.approx(3.1945, abs=5e-5)
    assert source_exponent_entropy(stats.uniform(-1, 2)) == pytest.approx(2, abs=1e-12)
    assert source_exponent_entropy(stats.norm(), 2.0**-20) == pytest.approx(gaussian[0])


def test_the_bound_of_ecf8_is_none():
    """For alpha-stable numbers it says a / (1 - 2^-a) at most: 2 bits at a = 1, Cauchy's."""
    upper = lambda a: a / (1 - 2**-a)
    assert upper(1) == 2 and source_exponent_entropy(stats.cauchy()) > 3.19
    assert upper(2) > source_exponent_entropy(stats.norm())  # where it happens to hold
    sample = stats.levy_stable(1.5, 0).rvs(200_000, random_state=0)
    found = exponent_entropy(sample, "float32")
    assert found == pytest.approx(2.819, abs=0.01) and found > upper(1.5) + 0.4


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 1.0])
def test_gaussian_floats_have_the_entropies_of_the_closed_forms(sigma):
    found = field_entropy(GAUSSIAN * np.float32(sigma), "bfloat16")
    exact = source_exponent_entropy(stats.norm(), sigma)
    assert exact == pytest.approx(2.544, abs=0.0025)
    assert found.exponent == pytest.approx(exact, abs=0.002)
    assert found.value == pytest.approx(float_entropy(stats.norm(), 8), abs=0.02)
    assert found.value < found.sign + found.exponent + found.mantissa
    assert found.ideal == 8 + found.exponent and found.sign == pytest.approx(1, abs=1e-4)
    scaled = GAUSSIAN * np.float32(448 / np.abs(GAUSSIAN).max())
    assert field_entropy(scaled, "float8_e4m3fn").value == pytest.approx(6.474, abs=0.02)


def test_a_table_for_tensors_of_different_scales_costs_more():
    """Exponents have 2.54 bits at any scale; those of both tensors together have 1 more."""
    w = np.stack([GAUSSIAN[:100_000], GAUSSIAN[100_000:200_000] * np.float32(2**20)])
    apart = exponent_entropy(w, groups=np.array([[0], [1]]))
    assert apart == pytest.approx(2.544, abs=0.01)
    assert exponent_entropy(w) == pytest.approx(apart + 1, abs=0.01)


# --- codes of weights (of every format: tests/formats/test_formats.py) ------------------------


def test_codes_of_gaussian_weights_take_what_theory_says():
    """One step for all weights: H = h - log2(step), once the step is fine."""
    w = draw(256, 256)
    q = jq.quantize_array(w, jq.rtn(bits=8, group_size="tensor", symmetric=True))
    found, step = code_entropy(q).total, float(q.data["scale"][0, 0])
    want = math.log2(2 * math.pi * math.e) / 2 - math.log2(step * 1.0)
    assert found.entropy == pytest.approx(want, abs=0.01)
    assert found.codes == 8 and found.stored == q.bits_per_weight
    assert found.entropy < found.adaptive < found.entropy + 0.03
    assert found.coded == pytest.approx(found.adaptive + 16 / w.size)
    # The twin: a step for every row, whose spread is no part of the formula, misses.
    rows = code_entropy(
        jq.quantize_array(w, jq.rtn(bits=8, group_size="channel", symmetric=True))
    ).total
    assert abs(rows.entropy - want) > 0.1


def test_tables_for_small_groups_do_not_pay():
    """Their entropy is the lowest, and what a coder would take is the highest."""
    found = code_entropy(jq.quantize_array(draw(256, 64), jq.rtn(bits=4, group_size=16))).total
    assert found.given_group < found.entropy - 0.5
    assert found.adaptive_given_group > found.adaptive + 0.2 > found.entropy + 0.2


def test_a_stack_has_a_table_for_each_matrix_and_a_tree_the_weighted_means():
    method = jq.rtn(bits=4, group_size="tensor", symmetric=True)
    each = [jq.quantize_array(2.0**i * draw(64, 64, seed=i), method) for i in range(3)]
    stack = each[0].with_arrays(
        jax.tree.map(lambda *a: jnp.stack(a), each[0].arrays, each[1].arrays)
    )
    found = code_entropy({"a": stack, "b": each[2], "norm": jnp.ones(64)})
    assert list(found.weights) == ["a", "b"]
    alone = [code_entropy(one).total.entropy for one in each]
    assert found.weights["a"].entropy == pytest.approx(np.mean(alone[:2]))
    assert found.total.entropy == pytest.approx(np.mean(alone))
    assert found.total.weights == 3 * 64 * 64 and "(all)" in str(found)


def test_what_has_no_codes_is_named():
    data, format = {"codes": jnp.ones((4, 4))}, jq.formats.Dense()
    dense = QTensor(data, format, View((4,), (4,), (0, 1)), "float32")
    with pytest.raises(ValueError, match=r"layer/w: Dense stores no codes that are known here"):
        code_entropy({"layer": {"w": dense}})


def test_densities_much_narrower_than_an_octave():
    """Those of norm's gains, for instance: the formula of h by hand."""
    for mean, std, precision in ((1.0, 1e-4, 24), (1e4, 1.0, 24)):
        h = math.log2(2 * math.pi * math.e * std**2) / 2
        spacing = math.log2(mean) - (precision - 0.5)  # the mean over the phases of the octave
        found = float_entropy(stats.norm(mean, std), precision)
        assert found == pytest.approx(h - spacing, abs=1e-3)


def test_numbers_of_any_size():
    assert entropy(np.array([1e308, 1e308])) == 1
    large = np.array([2**63 + 1, 2**63 + 2], np.uint64)
    assert symbol_entropy(large) == 1
    assert symbol_entropy(np.array([-128, 127], np.int8)) == 1
