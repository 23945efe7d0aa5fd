"""The knee of a rate-quality frontier, and what the names of its points say."""

import re
from collections.abc import Sequence

import numpy as np

from jaxquant_models.schemas.report import Point

UNIFORM = re.compile(r"(\w+) \d+ bits")
MIXTURE = re.compile(r"(\w+) mixed [\d.]+ bits")


def knee(points: Sequence[Point]) -> Point | None:
    """Return the point of the frontier where ln(KL) over bytes bends most.

    It is the one farthest below the chord between the ends of the frontier, with both axes scaled
    to 1. Points without a loss are left out; with two or fewer, the one of fewer bytes is taken.

    Args:
      points: the versions.
    """
    front = sorted((p for p in points if p.on_frontier and p.kl > 0), key=lambda p: p.bytes)
    if not front:
        return None
    x = np.array([p.bytes for p in front], np.float64)
    y = np.log([p.kl for p in front])
    if len(front) < 3 or np.ptp(y) == 0:
        return front[0]
    x, y = (x - x[0]) / np.ptp(x), (y - y[-1]) / np.ptp(y)
    return front[int(np.argmin(x + y))]


def with_frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points, each with whether it is on the frontier.

    Args:
      points: the versions.
    """
    at = lambda p: (p.bytes, p.kl)
    no_worse = lambda q, p: q.bytes <= p.bytes and q.kl <= p.kl
    beaten = lambda p: any(no_worse(q, p) and at(q) != at(p) for q in points)
    return [p.model_copy(update={"on_frontier": not beaten(p)}) for p in points]


def is_uniform(point: Point) -> bool:
    """Return whether all matrices of the layers have one width, and nothing else is quantized.

    Args:
      point: a version.
    """
    return bool(point.command and UNIFORM.fullmatch(point.name))


def is_mixture(point: Point) -> bool:
    """Return whether the matrices of the layers have different widths.

    Args:
      point: a version.
    """
    return bool(point.command and MIXTURE.fullmatch(point.name))


def uniform_of(mixture: Point, points: Sequence[Point]) -> Point | None:
    """Return the smallest version of the same method, of one width, with no fewer bytes.

    Args:
      mixture: a version.
      points: all versions.
    """
    method = mixture.name.split()[0]
    alike = [p for p in points if is_uniform(p) and p.name.split()[0] == method]
    return min((p for p in alike if p.bytes >= mixture.bytes), key=lambda p: p.bytes, default=None)
