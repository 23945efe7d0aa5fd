"""The least loss within a budget: against every choice there is."""

import itertools

import numpy as np
import pytest

from jaxquant.core.greedy_allocation import cheapest, lower_hull


def best_of_all(costs, losses, budget):
    """The least loss of any choice within the budget."""
    options = [list(zip(c, e, strict=True)) for c, e in zip(costs, losses, strict=True)]
    within = (c for c in itertools.product(*options) if sum(o[0] for o in c) <= budget)
    return min(sum(o[1] for o in c) for c in within)


def chosen(costs, losses, budget):
    """Cost and loss of the greedy choice."""
    found = cheapest(costs, losses, budget)
    return (sum(c[i] for c, i in zip(costs, found, strict=True)),
            sum(e[i] for e, i in zip(losses, found, strict=True)))  # fmt: skip


def test_against_every_choice():
    """What is chosen is near the best there is for no more cost than it takes."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, losses = rng.integers(1, 50, (4, 4)).tolist(), rng.exponential(size=(4, 4)).tolist()
        least = sum(map(min, costs))
        took, loss = chosen(costs, losses, least + 40)
        best = best_of_all(costs, losses, took)
        assert took <= least + 40 and loss <= best + 0.3 * abs(best) + 1e-9
        full = cheapest(costs, losses, 1e9)
        assert [e[i] for e, i in zip(losses, full, strict=True)] == list(map(min, losses))


@pytest.mark.parametrize("seed", range(5))
def test_convex_losses_in_equal_steps_have_the_least_of_all(seed):
    rng = np.random.default_rng(seed)
    losses = (rng.exponential(size=(4, 1)) * 4.0 ** -np.arange(5)).tolist()
    costs = [list(range(5))] * 4
    for budget in range(17):
        took, loss = chosen(costs, losses, budget)
        assert took == budget and loss == pytest.approx(best_of_all(costs, losses, budget))


def test_options_above_the_hull_are_never_chosen():
    costs, losses = [0, 1, 2, 3], [9.0, 8.9, 1.0, 0.0]
    assert lower_hull(costs, losses) == [0, 2, 3]
    assert [cheapest([costs], [losses], b)[0] for b in range(4)] == [0, 0, 2, 3]
    assert lower_hull([2, 2, 2], [3.0, 1.0, 2.0]) == [1]
