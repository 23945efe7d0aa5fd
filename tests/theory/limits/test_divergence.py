"""Flips: against loops over prompts, simulations, and the two bounds that always hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.limits.divergence import (
    Flips,
    certified,
    coupled_disagreement,
    flips_of,
    unexplained,
)


def test_curves_are_counted():
    table = np.random.default_rng(0).random((40, 30)) < 0.05
    found = Flips(table)
    for k in range(31):
        agree = sum(not row[:k].any() for row in table) / 40
        assert found.survival[k] == pytest.approx(agree)
        assert found.boole[k] == pytest.approx(max(0, 1 - sum(table[:, :k].mean(0))))
    assert (found.boole <= found.survival + 1e-12).all()
    assert (found.survival <= found.ceiling + 1e-12).all()
    at_risk = sum(min(t + 1, 30) for t in found.first)
    assert found.hazard == pytest.approx((found.first < 30).sum() / at_risk)


def test_the_chain_is_a_lower_bound_if_prompts_differ_and_an_estimate_if_they_do_not():
    rng = np.random.default_rng(1)
    rates = rng.beta(0.5, 24.5, (4000, 1))  # mean .02
    mixed = Flips(rng.random((4000, 64)) < rates)
    alike = Flips(rng.random((4000, 64)) < 0.02)
    assert mixed.survival[64] > mixed.chain[64] + 0.2
    assert abs(alike.survival[64] - alike.chain[64]) < 0.03
    assert mixed.hazard < 0.6 * mixed.rate and alike.hazard == pytest.approx(0.02, rel=0.1)


def test_flips_say_where_free_texts_part_unless_the_cache_is_damaged():
    rng = np.random.default_rng(2)
    text = rng.integers(0, 9, (20, 12))
    choices = np.where(rng.random(text.shape) < 0.1, 9, text)
    flips = flips_of(text, choices)
    free = text.copy()
    for p, t in enumerate(flips.first):
        free[p, t:] = choices[p, t] if t < 12 else 0
    free = np.where(np.arange(12) < flips.first[:, None], text, free)
    gap = np.ones(text.shape)
    assert not unexplained(flips, text, free, gap).any()
    damaged = free.copy()
    damaged[:, 3] = 10
    assert unexplained(flips, text, damaged, gap).any()
    assert not unexplained(flips, text, damaged, np.zeros(text.shape)).any()  # ties excuse it


def test_certified_choices_do_not_change():
    rng = np.random.default_rng(3)
    z, e = rng.normal(size=(500, 20)), rng.normal(0, 0.2, (500, 20)) + 5
    top = np.sort(z, -1)
    safe = certified(top[:, -1] - top[:, -2], e.max(-1) - e.min(-1))
    same = z.argmax(-1) == (z + e).argmax(-1)
    assert same[safe].all() and safe.any() and not same.all()
    wrong = certified(top[:, -1] - top[:, -2], 0.1 * (e.max(-1) - e.min(-1)))
    assert not same[wrong].all()  # an understated change is found out


def test_coupled_samples_differ_no_more_than_the_bound_and_others_do():
    logits = jax.random.normal(jax.random.key(0), (2, 8))
    p, q = np.asarray(jax.nn.softmax(logits))
    bound = float(coupled_disagreement(0.5 * np.abs(p - q).sum()))
    draw = jax.vmap(jax.random.categorical, (0, None))
    keys = jax.random.split(jax.random.key(1), 4000)
    differ = lambda other: float(jnp.mean(draw(keys, logits[0]) != draw(other, logits[1])))
    exact = 1 - sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(8))
    assert differ(keys) == pytest.approx(exact, abs=0.03) and exact <= bound
    assert differ(keys[::-1]) > bound


def test_bad_input():
    with pytest.raises(ValueError, match="one or more of both"):
        Flips(np.zeros((0, 4), bool))
    with pytest.raises(ValueError, match="one shape"):
        flips_of(np.zeros((2, 3), int), np.zeros((2, 4), int))
    with pytest.raises(ValueError, match="one shape"):
        certified(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        coupled_disagreement(np.array([np.nan]))
