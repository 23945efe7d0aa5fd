"""The diagonal target: the count of errors recomputed, and predictors that are no functions."""

import numpy as np
import pytest

from jaxquant.theory.limits.diagonal import diagonal_adversary, prefers


def table(answers):
    """Return one predictor for each row, which looks its answers up."""
    return [lambda x, row=row: row[x] for row in answers]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_errors_are_those_of_a_recomputation(count):
    answers = np.random.default_rng(count).random((count, 256)) < 0.5
    found = diagonal_adversary(table(answers), np.arange(256))
    target = 1 - answers[np.arange(256) % count, np.arange(256)]
    assert found.errors == tuple((answers != target).sum(1))
    assert min(found.errors) >= found.least == 256 // count
    assert found.limits()[0].verdict == "holds"
    for v in range(count):  # the identity of the module's docstring
        others = np.arange(256) % count != v
        own = (~others).sum()
        alike = answers[v, others] == answers[np.arange(256) % count, np.arange(256)][others]
        assert found.errors[v] == own + alike.sum()
    assert found.agreement[0][1] == (answers[0] == answers[1]).mean()


def test_one_function_is_wrong_everywhere():
    answers = np.tile(np.random.default_rng(0).random(64) < 0.5, (4, 1))
    assert diagonal_adversary(table(answers), np.arange(64)).errors == (64,) * 4


def test_a_predictor_that_draws_its_answers_is_refused():
    rng = np.random.default_rng(0)
    found = diagonal_adversary([lambda x: rng.random(x.size) < 0.5] * 4, np.arange(256))
    row = found.limits()[0]
    assert row.verdict == "violated" and "not a function" in row.note
    # One that answers the contrary the second time gets below the bound.
    turn = [False]

    def turning(x):
        turn[0] = not turn[0]
        return (x % 2 == 0) == turn[0]

    answers = np.random.default_rng(1).random(256) < 0.5
    found = diagonal_adversary([turning, lambda x: answers[x]], np.arange(256))
    assert min(found.errors) < found.least


def test_preferences_are_of_two_tokens():
    z = np.random.default_rng(0).normal(size=(50, 9))
    order = np.argsort(-z, 1)
    assert prefers(z, order[:, 0], order[:, 1]).all()
    assert not prefers(z, order[:, 1], order[:, 0]).any()
    with pytest.raises(ValueError, match="finite"):
        prefers(np.full((2, 3), np.nan), np.zeros(2, int), np.ones(2, int))
    with pytest.raises(ValueError, match="0 to 8"):
        prefers(z, order[:, 0], order[:, 1] + 9)
    with pytest.raises(ValueError, match="expected logits"):
        prefers(z, order[:3, 0], order[:, 1])


@pytest.mark.parametrize(
    ("predictors", "n", "message"),
    [
        ([lambda x: x > 0], 4, "two predictors or more"),
        ([lambda x: x > 0] * 4, 3, "as many inputs"),
        ([lambda x: x > 0] * 2, 0, "as many inputs"),
        ([lambda x: x * np.nan] * 2, 4, "predictor 0 must return"),
        ([lambda x: x > 0, lambda x: x + 1], 4, "predictor 1 must return"),
        ([lambda x: x > 0, lambda x: x[:2] > 0], 4, "all inputs"),
    ],
)
def test_bad_predictors(predictors, n, message):
    with pytest.raises(ValueError, match=message):
        diagonal_adversary(predictors, np.arange(n))
