"""The least loss within a budget: against every choice there is."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

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


def rounded_down(costs, losses, budget):
    """The bound of the relaxation to fractions of options, and its loss without the fraction.

    A vertex of the linear program has at most one group in two options; the cheaper of them fits.
    """
    groups = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    c, e = np.concatenate(costs), np.concatenate(losses)
    one = (groups == np.arange(len(costs))[:, None]).astype(float)
    found = linprog(e, A_ub=c[None], b_ub=[budget], A_eq=one, b_eq=np.ones(len(costs)))
    used = [np.flatnonzero((groups == g) & (found.x > 1e-9)) for g in range(len(costs))]
    assert sum(len(u) > 1 for u in used) <= 1
    return found.fun, sum(e[u[np.argmin(c[u])]] for u in used)


@pytest.mark.parametrize("seed", range(20))
def test_against_every_choice(seed):
    """The loss is at most that of the hull's last point within the budget."""
    rng = np.random.default_rng(seed)
    costs, losses = rng.integers(1, 50, (4, 4)).tolist(), rng.exponential(size=(4, 4)).tolist()
    for more in (0, 10, 40, 80):
        budget = sum(map(min, costs)) + more
        took, loss = chosen(costs, losses, budget)
        bound, corner = rounded_down(costs, losses, budget)
        best = best_of_all(costs, losses, budget)
        assert took <= budget and bound - 1e-9 <= best <= loss + 1e-9
        assert loss <= corner + 1e-9
    full = cheapest(costs, losses, 1e9)
    assert [e[i] for e, i in zip(losses, full, strict=True)] == list(map(min, losses))


@pytest.mark.parametrize("seed", range(5))
def test_points_of_the_hull_have_the_least_of_all(seed):
    """At a budget at which steps in the order of their returns end, the choice is optimal."""
    rng = np.random.default_rng(seed)
    costs, losses = rng.integers(1, 50, (4, 4)).tolist(), rng.exponential(size=(4, 4)).tolist()
    exact = 0
    for budget in range(sum(map(min, costs)), sum(map(max, costs)) + 1, 3):
        _, corner = rounded_down(costs, losses, budget)
        took, loss = chosen(costs, losses, budget)
        if took == budget and loss == pytest.approx(corner):
            exact += 1
            assert loss == pytest.approx(best_of_all(costs, losses, budget))
    assert exact


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
