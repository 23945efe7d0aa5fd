"""Description lengths: break-even points from both sides, adaptive codes and their redundancy."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.description_length import (
    BreakEven,
    Coding,
    adaptive_bits,
    break_even,
    prequential_bits,
)
from jaxquant.theory.entropy import symbol_entropy

FOUR, TWO = Coding(580_000_123, 2.4375), Coding(270_000_000, 2.8125)


def test_the_lengths_cross_at_the_break_even_point():
    found = break_even(FOUR, TWO)
    assert (found.below, found.above) == ("b", "a")
    fewer, more = math.floor(found.tokens), math.floor(found.tokens) + 1
    assert TWO.length(fewer) < FOUR.length(fewer)
    assert TWO.length(more) > FOUR.length(more)
    assert TWO.length(found.tokens) == pytest.approx(FOUR.length(found.tokens), rel=1e-12)
    assert break_even(TWO, FOUR) == BreakEven(found.tokens, "a", "b")
    # The wrong variant, that takes nats for bits, has both on the same side of it.
    wrong = found.tokens / math.log(2)
    assert TWO.length(wrong) > FOUR.length(wrong) and TWO.length(wrong + 1) > FOUR.length(wrong + 1)


def test_an_example_by_hand():
    """134.5 million weights from 16 to 4.5 bits, for 0.05 nats a token: 2.1e10 tokens."""
    weights = 134.5e6
    found = break_even(Coding(16 * weights, 2.30), Coding(4.5 * weights, 2.35))
    assert found.tokens == pytest.approx(2.14e10, rel=0.003) and found.below == "b"


@pytest.mark.parametrize(
    ("a", "b", "which"),
    [
        (Coding(10, 2.0), Coding(20, 3.0), "a"),
        (Coding(20, 3.0), Coding(10, 2.0), "b"),
        (Coding(10, 2.0), Coding(10, 3.0), "a"),
        (Coding(10, 2.0), Coding(9, 2.0), "b"),
        (Coding(10, 2.0), Coding(10, 2.0), "neither"),
    ],
)
def test_without_a_break_even_point(a, b, which):
    assert break_even(a, b) == BreakEven(math.inf, which, which)
    assert f"{which} is the shorter" in str(break_even(a, b))


def test_every_byte_of_a_tree_counts():
    tree = {"w": jnp.ones((64, 32)), "table": jnp.ones((10, 32), jnp.float16)}
    q = jq.quantize(tree, jq.Recipe([("w", jq.rtn(4)), ("*", jq.KEEP)]))
    coding = Coding.of(q, 3.0)
    assert coding.bits == 8 * (q["w"].nbytes + 2 * 320)
    assert coding.length(0) == coding.bits
    assert coding.length(7) == pytest.approx(coding.bits + 21 / math.log(2))


def sequential(symbols, alphabet, prior):
    """The definition: the logarithm of every probability, in order."""
    counts = np.zeros(alphabet)
    logs = []
    for s in symbols:
        logs.append(math.log((counts[s] + prior) / (counts.sum() + alphabet * prior)))
        counts[s] += 1
    return prequential_bits(np.array(logs))


@pytest.mark.parametrize("prior", [0.5, 1.0, 0.03])
def test_an_adaptive_code_is_the_sum_over_its_predictions(prior):
    symbols = np.random.default_rng(0).integers(0, 4, 300)
    want = sequential(symbols, 5, prior)  # one symbol never occurs
    assert adaptive_bits(symbols, 5, prior=prior) == pytest.approx(want)
    groups = np.arange(300) % 3
    parts = sum(sequential(symbols[groups == g], 5, prior) for g in range(3))
    assert adaptive_bits(jnp.asarray(symbols), 5, groups, prior) == pytest.approx(parts)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_a_bernoulli_sequence_costs_its_entropy_and_half_a_logarithm(n):
    """n 0.469 + 1/2 log2 n + O(1) bits; Laplace's estimate takes about log2 n instead of a half."""
    symbols = (np.arange(n) % 10 == 0).astype(int)
    rate = -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)
    assert rate == pytest.approx(0.469, abs=2e-5) and symbol_entropy(symbols) == pytest.approx(rate)
    beyond = adaptive_bits(symbols, 2) - n * rate
    assert 0 < beyond - math.log2(n) / 2 < 1
    assert adaptive_bits(symbols, 2, prior=1) - n * rate > beyond
    fixed = prequential_bits(np.where(symbols, math.log(0.1), math.log(0.9)))
    assert fixed == pytest.approx(n * rate)


def test_a_code_for_all_sequences_keeps_kraft_s_inequality():
    lengths = [adaptive_bits(np.array(s), 3) for s in itertools.product(range(3), repeat=6)]
    assert sum(2.0**-length for length in lengths) == pytest.approx(1)


def test_laplace_is_the_two_part_code_of_the_counts():
    counts = np.array([5, 0, 9, 2])
    n, a = counts.sum(), len(counts)
    arrangements = math.factorial(n) // math.prod(map(math.factorial, counts.tolist()))
    want = math.log2(math.comb(n + a - 1, a - 1)) + math.log2(arrangements)
    assert adaptive_bits(np.repeat(np.arange(a), counts), a, prior=1) == pytest.approx(want)


def test_prequential_lengths():
    assert prequential_bits(np.zeros(0)) == 0 == prequential_bits(np.zeros(3))
    assert prequential_bits(jnp.array([-math.log(2), -jnp.inf])) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Coding(-1, 2.0), "bits must be a finite number of 0 or more, got -1"),
        (lambda: Coding(1, math.nan), "nats_per_token must be a finite number"),
        (lambda: Coding(math.inf, 1.0), "bits must be a finite"),
        (lambda: Coding("1", 1.0), "bits must be a finite number"),
        (lambda: FOUR.length(-1), "tokens must be a finite number of 0 or more, got -1"),
        (lambda: FOUR.length(math.nan), "tokens must be a finite"),
        (lambda: break_even(FOUR, (1, 2)), r"b: expected a Coding, got \(1, 2\)"),
        (lambda: prequential_bits(np.array([0.5])), "so 0 or less, got 0.5; negate losses first"),
        (lambda: prequential_bits(np.array([math.nan])), "got NaN"),
        (
            lambda: adaptive_bits(np.array([0, 1]), 1),
            "alphabet is 1, but 2 different symbols occur",
        ),
        (lambda: adaptive_bits(np.zeros(0, int), 2), "got an empty array"),
        (lambda: adaptive_bits(np.array([0]), 2, prior=0), "prior must be above 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_codings_are_values():
    assert dataclasses.replace(FOUR, bits=1) == Coding(1, 2.4375) and hash(FOUR) != hash(TWO)


def test_numbers_of_other_types_keep_their_value():
    """NumPy's and JAX's numbers would compute in their own precision, or wrap."""
    want = Coding(580_000_000, 5.95)
    for bits, nats in (
        (np.uint64(580_000_000), np.float64(5.95)), (np.int64(580_000_000), jnp.float32(5.95)),
    ):  # fmt: skip
        assert Coding(bits, nats).length(1000) == pytest.approx(want.length(1000), rel=1e-9)
    small, large = Coding(np.uint64(5), 3.0), Coding(np.uint64(9), 2.0)
    assert break_even(small, large) == break_even(Coding(5, 3.0), Coding(9, 2.0))


def test_large_alphabets_and_priors():
    """The first symbol costs log2 of the alphabet, and a strong prior makes all equally likely."""
    assert adaptive_bits(np.array([7]), 2**50) == pytest.approx(50)
    for prior in (1e6, 1e12, 1e16):
        assert adaptive_bits(np.array([0, 1, 0, 0]), 2, prior=prior) == pytest.approx(4, abs=1e-4)
    for alphabet, prior in ((4, 1e308), (2**2000, 0.5)):
        with pytest.raises(ValueError, match="its product with alphabet finite"):
            adaptive_bits(np.array([0, 1]), alphabet, prior=prior)
