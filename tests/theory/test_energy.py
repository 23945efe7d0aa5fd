"""Energy of a token, Landauer's floor, operations and accumulators of integer products."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.energy import break_even_batch, energy_per_token, landauer
from jaxquant.theory.energy_constants import MEMORIES, NODES
from jaxquant.theory.integer_products import (
    INPUT,
    Arithmetic,
    accumulator_bits,
    accumulator_bits_of,
    dense_operations,
    energy_ratio,
    ternary_operations,
)
from jaxquant.theory.workload import Attention, architecture, workload

SEVEN, OLD = NODES["7 nm"], NODES["45 nm"]


def test_landauer():
    by_hand = 1.380649e-23 * 300 * 0.6931471805599453
    assert landauer(1) == pytest.approx(by_hand, rel=1e-12) == pytest.approx(2.871e-21, rel=1e-4)
    assert landauer(1, 287.4) == pytest.approx(2.75e-21, rel=1e-3)  # which some sources print
    assert landauer(8.03e9 * 16) == pytest.approx(3.69e-10, rel=1e-3)
    assert SEVEN.memory * 1e-12 / landauer(1) == pytest.approx(1.36e9, rel=1e-3)
    for wrong in ((-1.0, 300.0), (1.0, 0.0), (math.nan, 300.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="bits must be 0 or more and kelvin positive"):
            landauer(*wrong)


def test_every_constant_has_a_source():
    for constants in NODES.values():
        assert constants.constants().keys() == constants.sources().keys()
        assert all("doi:" in source for source in constants.sources().values())
    assert all(source and 0 < pj < 41 for pj, source in MEMORIES.values())
    with pytest.raises(ValueError, match="memory must be one of DDR3, .*, got 'HBM9'"):
        SEVEN.with_memory("HBM9")
    with pytest.raises(ValueError, match="int8_add_pj must be 0 or more, got -1"):
        dataclasses.replace(SEVEN, int8_add=-1.0)


def test_a_token_of_eight_billion_parameters():
    """Millijoules of movement at 3.9 pJ a bit, as printed elsewhere; arithmetic at both nodes."""
    at = dataclasses.replace(OLD, memory=3.9)
    for bits, printed in {16: 501, 8: 251, 4.25: 133, 2: 62.6, 1.58: 49.5}.items():
        found = energy_per_token(architecture(8.03e9, bits), at)
        assert 1e3 * found.movement == pytest.approx(printed, rel=5e-3)
        assert found.movement == pytest.approx(8.03e9 * bits * 3.9e-12)
        assert 1e3 * found.arithmetic == pytest.approx(12.0, rel=5e-3)  # 1.5 pJ
        assert found.landauer == pytest.approx(landauer(8.03e9 * bits))
        assert found.total == found.weights + found.arithmetic and found.cache == 0
    assert break_even_batch(architecture(8.03e9, 16), at) == pytest.approx(41.6)
    # At one node for both, the ratio is three times as large.
    assert break_even_batch(architecture(8.03e9, 16), SEVEN) == pytest.approx(16 * 250 / 64 / 0.5)


def test_the_break_even_batch_breaks_even():
    w = architecture(1e9, 5)
    batch = break_even_batch(w, OLD)
    of = lambda n: energy_per_token(w, OLD, n)
    assert of(math.floor(batch)).weights > of(1).arithmetic > of(math.ceil(batch)).weights
    free = dataclasses.replace(SEVEN, float16_multiply=0.0, float16_add=0.0)
    assert break_even_batch(w, free) == math.inf


def test_bytes_are_those_of_the_packed_arrays():
    params = {"a": jnp.ones((128, 64)), "b": jnp.ones((64, 32))}
    for method in (jq.rtn(2, 64), jq.ternary(64), jq.mxfp4()):
        q = jax.eval_shape(lambda p, m=method: jq.quantize(p, m), params)
        arrays = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(q))
        assert energy_per_token(workload(q), SEVEN).bits == 8 * arrays, method.name
        assert energy_per_token(workload(q), SEVEN, 4).weights == pytest.approx(
            8 * arrays * SEVEN.memory * 1e-12 / 4
        )


def test_caches_and_integers():
    attention = Attention(2, 4, 2, 8)
    w = architecture(1000, 2, attention, integers=True)
    found = energy_per_token(w, SEVEN, 2, 10)
    assert found.cache == pytest.approx(8 * attention.bytes(10) * SEVEN.memory * 1e-12)
    products, pairs = 1000 * (0.07 + 0.03), 2 * 2 * 4 * 8 * 11 * (0.34 + 0.16)
    assert found.arithmetic == pytest.approx(1e-12 * (products + pairs))
    assert energy_per_token(w, SEVEN, 2, 10).bits == 1000 * 2 / 2 + 8 * attention.bytes(10)
    for wrong in ((0, 0), (1, -1), (10**400, 0), (1, 10**400)):
        with pytest.raises(ValueError, match="batch must be 1 or more and context 0 or more"):
            energy_per_token(w, SEVEN, *wrong)


# --- integer products -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "weights", "inputs"),
    [(1, (-1, 1), INPUT), (3, (-1, 1), (-2, 1)), (4, (-2, 1), (-3, 3)), (3, (0, 3), (0, 15)),
     (2, (-8, 7), (-8, 7)), (3, (-4, -1), (1, 2))],
)  # fmt: skip
def test_accumulators_hold_every_sum_and_no_narrower_one_does(k, weights, inputs):
    """Against all products: k of the extreme ones, which some codes reach."""
    products = [w * x for w in range(weights[0], weights[1] + 1)
                for x in range(inputs[0], inputs[1] + 1)]  # fmt: skip
    sums = [k * min(products), k * max(products), 0]
    bits = accumulator_bits(k, weights, inputs)
    fits = lambda b: all(-(1 << (b - 1)) <= s < 1 << (b - 1) for s in sums)
    assert fits(bits) and not (bits > 1 and fits(bits - 1))


def test_known_widths():
    assert accumulator_bits(4096) == math.ceil(math.log2(127 * 4096 + 1)) + 1 == 20
    assert [accumulator_bits(4096, (-(1 << (b - 1)), (1 << (b - 1)) - 1)) for b in range(2, 9)] == [
        21, 22, 23, 24, 25, 26, 27
    ]  # fmt: skip
    assert accumulator_bits(1) == 8 and accumulator_bits(2) == 9  # what 8-bit sums cannot hold
    assert (accumulator_bits(132_104), accumulator_bits(132_105)) == (25, 26)  # float32 holds 25
    assert accumulator_bits(1 << 17, (-128, 127), (-128, 127)) == 33


def test_widths_of_given_codes():
    """Against every input vector of a small range."""
    codes = np.random.default_rng(0).integers(-2, 2, (4, 3))
    for inputs in ((-2, 1), (0, 3)):
        vectors = np.array(list(itertools.product(range(inputs[0], inputs[1] + 1), repeat=4)))
        sums = vectors @ codes
        bits = accumulator_bits_of(codes, inputs)
        assert -(1 << (bits - 1)) <= sums.min() and sums.max() < 1 << (bits - 1)
        assert sums.min() < -(1 << (bits - 2)) or sums.max() >= 1 << (bits - 2)
        assert bits <= accumulator_bits(4, (-2, 1), inputs)
    assert accumulator_bits_of(np.zeros((5, 2), int)) == 1
    # Inputs that cannot be 0 cancel in the end only: 4 - 4. Sums beyond 64 bits do not wrap around.
    assert accumulator_bits_of(np.array([[1], [-1]]), (4, 4)) == 4
    assert accumulator_bits_of(np.array([[100]]), (0, 1 << 62)) == 1 + (100 << 62).bit_length()


def test_operations():
    codes = np.random.default_rng(1).integers(-1, 2, (50, 20))
    adds, subtracts, multiplies, scalings = ternary_operations(jnp.asarray(codes), 3)
    assert adds + subtracts == 3 * np.count_nonzero(codes) and multiplies == 0 and scalings == 60
    assert adds - subtracts == 3 * codes.sum()
    dense = dense_operations(50, 20, 3)
    assert dense.multiplies == dense.adds == 3 * 50 * 20 > adds + subtracts
    for wrong in (np.array([[2]]), np.array([1]), np.array([[1.0]])):
        with pytest.raises(ValueError, match=r"must be -1, 0 or 1|codes must be integers \[k, n\]"):
            ternary_operations(wrong)


def test_where_71_comes_from():
    """One int8 addition against a float16 product, and what is left of it with real sums."""
    floats, int8 = Arithmetic("float16"), Arithmetic("int8")
    ratio = lambda constants, sums, other, *of: energy_ratio(
        constants, Arithmetic("ternary", sums), other, *of
    )
    assert (
        ratio(SEVEN, 8, floats)
        == pytest.approx((0.34 + 0.16) / 0.007)
        == pytest.approx(71.4, abs=0.05)
    )
    assert ratio(OLD, 8, floats) == pytest.approx(50)
    assert ratio(SEVEN, 32, floats) == pytest.approx(16.7, abs=0.05)
    assert ratio(SEVEN, 32, int8) == pytest.approx(10 / 3)
    # With the bits that are read, it is the ratio of bits; a large batch restores the arithmetic.
    assert ratio(SEVEN, 32, floats, (1.58, 16), 1) == pytest.approx(16 / 1.58, rel=0.01)
    assert ratio(SEVEN, 32, floats, (1.58, 16), 10**7) == pytest.approx(16.7, abs=0.05)


def test_a_machine_that_costs_nothing():
    free = dataclasses.replace(SEVEN, int32_add=0.0)
    assert energy_ratio(free, Arithmetic("ternary"), Arithmetic("int8")) == math.inf


def test_bad_arguments():
    for call, text in (
        (lambda: accumulator_bits(0), "k must be 1 or more"),
        (lambda: accumulator_bits(4, (1, -1)), "weights must be the smallest and the largest"),
        (lambda: accumulator_bits(4, (-1, 1), (0, 1.5)), "inputs"),
        (lambda: dense_operations(4, 0), "n must be 1 or more"),
        (lambda: Arithmetic("float8"), "kind must be one of"),
        (lambda: Arithmetic("ternary", 16), "sums must be 32, or 8 where the kind is 'ternary'"),
        (lambda: Arithmetic("int8", 8), "sums must be 32, .*got 8 for 'int8'"),
        (lambda: Arithmetic("float16", 8), "sums must be 32, .*got 8 for 'float16'"),
        (lambda: ternary_operations(np.array([[1]]), 1.5), "rows: expected an integer, got 1.5"),
        (lambda: ternary_operations(np.array([[1]]), "2"), "rows: expected an integer, got '2'"),
        (lambda: accumulator_bits_of(None), "codes: expected an array, got None"),
        (lambda: energy_ratio(SEVEN, *[Arithmetic("int8")] * 2, ("1", 2)), "bits must be two"),
        (lambda: energy_ratio(SEVEN, *[Arithmetic("int8")] * 2, batch=0), "batch must be 1"),
        (lambda: energy_ratio(SEVEN, *[Arithmetic("int8")] * 2, bits=(-1, 0)), "bits must be two"),
        (lambda: energy_ratio(SEVEN, *[Arithmetic("int8")] * 2, (0.0, math.nan)), "bits must be"),
        (lambda: energy_ratio(SEVEN, *[Arithmetic("int8")] * 2, (0.0,)), "bits"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
