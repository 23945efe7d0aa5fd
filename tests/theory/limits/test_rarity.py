"""The loss of rare tokens: groups counted by a loop, and a model that loses rare tokens only."""

import numpy as np
import pytest

from jaxquant.theory.limits.rarity import excess_by_count, rarity_limit


def test_groups_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    text = rng.zipf(1.5, 600).clip(max=200)
    tokens, excess = text[:300].reshape(2, 150), rng.normal(size=(2, 150))
    numbers, means = excess_by_count(text, tokens, excess)
    counts = {t: int((text == t).sum()) for t in text}
    for i, (low, high) in enumerate(((1, 1), (2, 3), (4, 15), (16, 10**9))):
        of = [
            e
            for t, e in zip(tokens.ravel(), excess.ravel(), strict=True)
            if low <= counts[t] <= high
        ]
        assert numbers[i] == len(of) and means[i] == pytest.approx(np.mean(of))


def test_a_model_that_forgets_rare_tokens_shows():
    text = np.concatenate([np.arange(50), np.full(100, 60)])
    row = rarity_limit(text, text, np.where(text < 50, 2.0, 0.1))
    assert (row.measured, row.bound, row.verdict) == (2.0, pytest.approx(0.1), "-")


def test_bad_input():
    with pytest.raises(ValueError, match="an excess for each token"):
        excess_by_count(np.arange(3), np.arange(3), np.zeros(2))
