"""Rows about divergence: simulated models hold them, and what a bound does not allow violates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.limits.divergence import Flips, coupled_disagreement
from jaxquant.theory.limits.divergence_limits import (
    certificate_limit,
    coupling_limit,
    flip_limits,
)


def sampled(keys, logits, steps=20):
    """Texts of a model without memory, [p, steps]."""
    draw = lambda key: jax.random.categorical(key, logits, shape=(steps,))
    return np.asarray(jax.vmap(draw)(keys))


def test_coupled_samples_hold_and_samples_of_other_keys_violate():
    z = jax.random.normal(jax.random.key(0), (8,))
    w = z + 0.05 * jax.random.normal(jax.random.key(1), (8,))
    tv = float(0.5 * jnp.abs(jax.nn.softmax(z) - jax.nn.softmax(w)).sum())
    keys = jax.random.split(jax.random.key(2), 200)
    reference, distance = sampled(keys, z), np.full((200, 20), tv)
    row = coupling_limit(reference, sampled(keys, w), distance)
    assert row.verdict == "holds" and row.measured <= row.bound + 0.1
    assert coupling_limit(reference, sampled(keys[::-1], w), distance).verdict == "violated"
    assert coupling_limit(reference, reference, np.ones((200, 20))).verdict == "undecided"


def test_only_the_mean_of_the_sums_bounds_coupled_samples():
    """A first token a that parts and ends the danger, and a first token b after which all part."""
    draw = lambda keys, p: np.asarray(
        jax.vmap(lambda k: jax.random.categorical(k, jnp.log(p)))(keys)
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    p, q = jnp.array([1 / 3, 2 / 3]), jnp.array([0.0, 1.0])
    first, other = draw(keys, p), draw(keys, q)
    tv = np.stack([np.full(4000, 1 / 3), first == 1], 1).astype(float)
    reference = np.stack([first, np.zeros(4000, int)], 1)
    model = np.stack([other, np.ones(4000, int)], 1)
    sums = coupled_disagreement(tv).sum(1)
    assert (reference != model).any(1).mean() == 1 > np.minimum(sums, 1).mean() + 0.1
    assert sums.mean() > 1
    # More tokens of which every third is drawn keep the bound away from 1.
    some = np.arange(4000) % 2 == 0
    row = coupling_limit(reference, np.where(some[:, None], model, reference), tv * some[:, None])
    assert row.verdict == "holds"


def rows_of(table, free=None, failed=None):
    free = Flips(table if free is None else free)
    failed = np.zeros(len(table), bool) if failed is None else failed
    return {r.name: r for r in flip_limits(Flips(table), free, failed, "model")}


def test_rows_of_independent_and_of_clustered_flips():
    rng = np.random.default_rng(0)
    free = rows_of(rng.random((64, 100)) < 0.02)
    assert free["chain survival"].verdict != "violated"
    assert free["clustered flips"].verdict == "-"  # neither side is a fault
    assert free["clustered flips"].measured == pytest.approx(1, abs=0.5)
    start = rng.integers(0, 400, 64)
    clustered = rows_of(np.arange(100) >= start[:, None])  # once flipped, always flipped
    assert clustered["clustered flips"].measured < 0.5
    early = rows_of(rng.random((64, 100)) < 0.3 * 0.9 ** np.arange(100))
    assert early["clustered flips"].measured > 2
    same = rows_of(np.zeros((64, 100), bool))
    assert same["clustered flips"].measured is None and same["chain survival"].measured == 1


def test_texts_that_part_less_often_than_chance_allows_are_chained():
    """Flips that avoid each other, one in every prompt, survive less than independent ones."""
    table = np.arange(40)[None] == np.random.default_rng(1).integers(0, 8, 200)[:, None]
    rows = rows_of(table)
    assert rows["chain survival"].verdict == "violated"
    assert rows["union bound"].verdict == "holds"


def test_the_chain_is_tested_where_it_can_fail():
    """Many flips, all but one of them at the beginnings: at the last step the bound is 1e-7."""
    table = np.random.default_rng(2).random((64, 80)) < 0.16
    table[:, :2] = True
    row = rows_of(table)["chain survival"]
    assert row.verdict == "violated" and 0.5 <= row.bound < 0.6 and "k = 3" in row.statement


def test_a_verdict_is_what_the_numbers_of_its_row_say():
    for seed in range(20):
        rows = rows_of(np.random.default_rng(seed).random((32, 40)) < 0.1)
        chain = rows["chain survival"]
        assert chain.verdict == ("holds" if chain.measured >= chain.bound else "undecided")
        union = rows["union bound"]
        assert union.verdict == "holds" and union.measured >= union.bound > 0
        assert "k = 1 " not in union.statement  # where both are one number


def test_the_survival_is_that_of_the_free_texts():
    """Flips that are rare, and texts that part at once all the same: a cache that is damaged."""
    table = np.random.default_rng(3).random((32, 50)) < 0.01
    free = np.ones((32, 50), bool)
    rows = rows_of(table, free, np.ones(32, bool))
    assert rows["first divergence"].measured == 0
    assert rows["union bound"].verdict == rows["chain survival"].verdict == "violated"
    excused = rows_of(table, np.arange(50) > 10 * np.ones((32, 1)), np.zeros(32, bool))  # by ties
    assert excused["union bound"].verdict != "violated" != excused["chain survival"].verdict


def test_a_failed_prompt_violates_and_a_flip_of_a_certified_choice_too():
    failed = np.array([False, True])
    row = rows_of(np.zeros((2, 3), bool), failed=failed)["free running"]
    assert (row.measured, row.verdict) == (1, "violated")
    gap, change = np.array([2.0, 1.0]), np.array([1.0, 1.5])
    assert certificate_limit(gap, change, np.array([False, True])).verdict == "holds"
    assert certificate_limit(gap, change, np.array([True, False])).verdict == "violated"
    vacuous = certificate_limit(gap, 9 * change, np.array([True, False]))
    assert (vacuous.bound, vacuous.verdict) == (pytest.approx(1.0), "undecided")
