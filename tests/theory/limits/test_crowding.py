"""Margins of attention: an exact identity, recomputed; slopes of heads that focus or dilute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.limits.crowding import (
    Margins,
    crowding,
    head_margins,
    largest_probability,
    needed_margin,
)

T = 256
CAUSAL = np.tri(T) > 0
NOISE = np.random.default_rng(0).normal(size=(2, 3, T, T)).astype(np.float32) * 2
margins = jax.jit(jax.vmap(jax.vmap(head_margins)))


def masked(scores):
    return jnp.where(CAUSAL, scores, -jnp.inf)


def test_margins_are_those_of_a_recomputation():
    found = margins(masked(NOISE))
    for t in (1, 64, 255):
        s = NOISE[1, 2, t, : t + 1].astype(np.float64)
        p = np.exp(s) / np.exp(s).sum()
        for k, i in enumerate((int(s.argmax()), 0, t, t - 1)):
            margin = s[i] - np.log(np.mean(np.exp(np.delete(s, i))))
            assert found.margin[1, 2, t, k] == pytest.approx(margin, abs=1e-4)
            assert found.probability[1, 2, t, k] == pytest.approx(p[i], abs=1e-6)
        assert found.largest[1, 2, t] == s.argmax() and found.keys[1, 2, t] == t + 1
    row = crowding(found).limits()[0]
    assert row.verdict == "holds" and row.measured < 1e-5


def test_a_sharp_head_does_not_cancel():
    sharp = crowding(margins(masked(NOISE * 100)))
    assert sharp.limits()[0].verdict == "holds"
    assert np.isfinite(sharp.margin).all()


def test_margins_over_other_keys_than_the_softmax_are_seen():
    assert crowding(margins(jnp.asarray(NOISE))).limits()[0].verdict == "violated"  # no causal mask
    found = margins(masked(NOISE))
    near = CAUSAL & ~(np.tri(T, k=-32) > 0)  # a window of 32 in the attention alone
    window = margins(jnp.where(near, NOISE, -jnp.inf))
    mixed = Margins(found.margin, window.probability, found.largest, found.keys)
    assert crowding(mixed).limits()[0].verdict == "violated"
    unscaled = margins(masked(NOISE / 8))
    mixed = Margins(found.margin, unscaled.probability, found.largest, found.keys)
    assert crowding(mixed).limits()[0].verdict == "violated"


def test_slopes_tell_heads_that_keep_their_focus():
    """Scores 0 but for one target, whose score is c ln(N - 1): the slope is c."""
    logs = np.log(np.maximum(np.arange(T), 1))
    for c, diluting in ((0.5, 1.0), (1.5, 0.0)):
        scores = np.zeros((1, 1, T, T), np.float32)
        scores[..., np.arange(T), np.arange(T)] = c * logs + 1e-3  # its own key
        found = crowding(margins(masked(scores)))
        assert found.slope[0, 0, 2] == pytest.approx(c, abs=1e-3)
        assert abs(found.slope[0, 0, 1]) < 0.5 and found.diluting == diluting
    sink = np.zeros((1, 1, T, T), np.float32)
    sink[..., 0] = 9
    found = crowding(margins(masked(sink)))
    assert found.sink[0, 0] == 1 and found.diluting is None
    assert found.limits()[1].measured is None and found.limits()[1].verdict == "-"


def test_the_needed_margin_gives_the_attention():
    rng = np.random.default_rng(0)
    for n in (128, 1024):
        others = rng.normal(size=n - 1)
        s = np.log(np.mean(np.exp(others))) + needed_margin(n, 0.9)
        assert np.exp(s) / (np.exp(s) + np.exp(others).sum()) == pytest.approx(0.9, abs=1e-12)
    assert needed_margin(1024, 0.5) == pytest.approx(6.930, abs=1e-3)
    # From the mean of Gaussian scores it is sigma^2 / 2 more; adding it here would count it twice.
    s = np.log(np.mean(np.exp(others))) + needed_margin(n, 0.9) + 0.5
    assert np.exp(s) / (np.exp(s) + np.exp(others).sum()) > 0.93


def test_no_bounded_scores_exceed_the_largest_attention():
    rng = np.random.default_rng(1)
    for n, b in ((5, 0.3), (100, 2.0)):
        s = rng.uniform(-b, b, (1000, n))
        p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
        assert p.max() <= largest_probability(n, b)
        s = np.full(n, -b)
        s[0] = b
        assert np.exp(b) / np.exp(s).sum() == pytest.approx(largest_probability(n, b), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: needed_margin(1, 0.5), "2 keys or more"),
        (lambda: needed_margin(8, 1.0), "probability < 1"),
        (lambda: needed_margin(8, np.nan), "probability < 1"),
        (lambda: largest_probability(8, np.nan), "half range"),
        (lambda: crowding(Margins(*margins(masked(NOISE))[:1] * 4)), "expected margins"),
        (lambda: crowding(margins(masked(NOISE)), 0), "first must be 1"),
        (lambda: crowding(margins(masked(NOISE)), 255), "take a longer text"),
        (lambda: crowding(margins(masked(NOISE)), 300), "two keys or more"),
        (lambda: crowding(margins(masked(NOISE * np.nan))), "must not be NaN"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
