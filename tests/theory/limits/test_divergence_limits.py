"""Rows about divergence: simulated models hold them, and what a bound does not allow violates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.limits.divergence import Flips
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


def test_rows_of_independent_and_of_clustered_flips():
    rng = np.random.default_rng(0)
    failed = np.zeros(64, bool)
    by_name = lambda table: {r.name: r for r in flip_limits(Flips(table), failed, "model")}
    free = by_name(rng.random((64, 100)) < 0.02)
    assert free["clustered flips"].verdict == free["chain survival"].verdict == "holds"
    start = rng.integers(0, 400, 64)
    clustered = by_name(np.arange(100) >= start[:, None])  # once flipped, always flipped
    assert clustered["clustered flips"].verdict == "violated"
    assert clustered["clustered flips"].measured < 0.5
    same = by_name(np.zeros((64, 100), bool))
    assert same["clustered flips"].verdict == "undecided" and same["chain survival"].measured == 1


def test_texts_that_part_less_often_than_chance_allows_are_chained():
    """Flips that avoid each other, one in every prompt, survive less than independent ones."""
    table = np.arange(40)[None] == np.random.default_rng(1).integers(0, 8, 200)[:, None]
    rows = {r.name: r for r in flip_limits(Flips(table), np.zeros(200, bool), "model")}
    assert rows["chain survival"].verdict == "violated"
    assert rows["union bound"].verdict == "holds"


def test_a_failed_prompt_violates_and_a_flip_of_a_certified_choice_too():
    failed = np.array([False, True])
    row = flip_limits(Flips(np.zeros((2, 3), bool)), failed, "model")[0]
    assert (row.measured, row.verdict) == (1, "violated")
    gap, change = np.array([2.0, 1.0]), np.array([1.0, 1.5])
    assert certificate_limit(gap, change, np.array([False, True])).verdict == "holds"
    assert certificate_limit(gap, change, np.array([True, False])).verdict == "violated"
    vacuous = certificate_limit(gap, 9 * change, np.array([True, False]))
    assert (vacuous.bound, vacuous.verdict) == (pytest.approx(1.0), "undecided")
