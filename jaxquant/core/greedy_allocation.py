"""One option per group with the least loss within a budget: greedy marginal analysis."""

from collections.abc import Sequence


def cheapest(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Return the index of one option per group with least total loss within the budget.

    Every group starts with its least cost. Then the step with the greatest return, loss saved per
    cost, is taken again and again. Only options on the lower convex hull of loss over cost are
    considered, so each group's returns fall. Until a step first does not fit, the choice is optimal
    for the cost spent; smaller steps then fill what is left. If all steps cost the same, the choice
    is optimal among the options on the hulls.

    Args:
      costs: cost of each option of each group, finite.
      losses: loss of each option of each group, finite.
      budget: largest total cost, at least the sum of the least costs.
    Returns:
      For each group the index of its option.
    Source:
      Fox 1966, "Discrete optimization via marginal analysis", Management Science 13 (cited from
      memory); Shoham and Gersho 1988 use the convex hull for the allocation of bits.

    >>> cheapest([[1, 2, 3], [1, 2, 3]], [[4.0, 1.0, 0.2], [32.0, 8.0, 2.0]], 4)
    [0, 2]
    """
    hulls = [lower_hull(c, e) for c, e in zip(costs, losses, strict=True)]
    place = [0] * len(hulls)
    left = budget - sum(c[hull[0]] for c, hull in zip(costs, hulls, strict=True))
    steps = [
        (_return(costs[i], losses[i], hull[j], hull[j + 1]), i, j)
        for i, hull in enumerate(hulls)
        for j in range(len(hull) - 1)
    ]
    for _, i, j in sorted(steps, key=lambda step: -step[0]):
        cost = costs[i][hulls[i][j + 1]] - costs[i][hulls[i][j]]
        if place[i] == j and cost <= left:
            place[i], left = j + 1, left - cost
    return [hull[j] for hull, j in zip(hulls, place, strict=True)]


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the options on the lower convex hull, by increasing cost and decreasing loss.

    Args:
      costs: cost of each option.
      losses: loss of each option.
    Returns:
      Indices of the options on the hull. Of options that cost and lose the same, the first.

    >>> lower_hull([3, 1, 2, 4], [1.0, 4.0, 3.0, 2.0])
    [1, 0]
    """
    hull: list[int] = []
    for o in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o])):
        if hull and losses[o] >= losses[hull[-1]]:
            continue
        slope = lambda a, b: _return(costs, losses, a, b)
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], o):
            hull.pop()
        hull.append(o)
    return hull


def _return(costs: Sequence[float], losses: Sequence[float], a: int, b: int) -> float:
    """Return the loss saved per cost by the step from option a to option b."""
    return (losses[a] - losses[b]) / (costs[b] - costs[a])
