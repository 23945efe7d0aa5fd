"""Stage: what to do, as command lines."""

from collections.abc import Sequence

import numpy as np

from jaxquant_models.runs.analysis.frontier import Measured
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import Advice, Point

CLEARLY = 0.98  # of the present KL: a version that gains less is not advised


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


def advice_of(subjects: Subjects, measured: Measured) -> list[Advice]:
    """Return what would lower the KL divergence most at equal bytes; of a float model, the knee.

    Args:
      subjects: the models and the text.
      measured: the frontier.
    """
    points = measured.frontier.points
    if subjects.against is not None:
        return _at_equal_bytes(points)
    best = knee(points)
    if best is None:
        return []
    reason = (
        f"{best.name} is the knee of the frontier: {_size(best)} with a KL divergence of "
        f"{best.kl:.4f} nats per token and {best.top1:.1%} top-1 agreement. "
        + _neighbors(best, points)
    )
    found = [_advice(best, reason, None)]
    for mixture in measured.mixtures:
        equal = [p for p in points if p.command and p.name == _uniform(mixture.point, points)]
        for p in equal:
            if mixture.point.kl < CLEARLY * p.kl and mixture.point.name != best.name:
                reason = (
                    f"{mixture.point.name} has a KL divergence of {mixture.point.kl:.4f} at "
                    f"{_size(mixture.point)}, where {p.name} has {p.kl:.4f} at {_size(p)}."
                )
                found.append(_advice(mixture.point, reason, None))
    return found


def _at_equal_bytes(points: Sequence[Point]) -> list[Advice]:
    own = next(p for p in points if not p.command)
    rivals = [p for p in points if p.command and p.bytes <= own.bytes]
    best = min(rivals, key=lambda p: p.kl, default=None)
    if best is None or best.kl >= CLEARLY * own.kl:
        return []
    reason = (
        f"{best.name} has a KL divergence of {best.kl:.4f} nats per token at {_size(best)}; the "
        f"model as it is has {own.kl:.4f} at {_size(own)}."
    )
    return [_advice(best, reason, own.kl)]


def _uniform(mixture: Point, points: Sequence[Point]) -> str:
    """Return the name of the version of one width that takes about as many bytes as a mixture."""
    method = mixture.name.split()[0]
    alike = [p for p in points if p.name.startswith(method) and "mixed" not in p.name]
    enough = [p for p in alike if p.bytes >= mixture.bytes]
    return min(enough, key=lambda p: p.bytes).name if enough else ""


def _neighbors(best: Point, points: Sequence[Point]) -> str:
    """Return a sentence about the next smaller point of the frontier."""
    smaller = [p for p in points if p.on_frontier and p.bytes < best.bytes]
    if not smaller:
        return "No smaller version was measured."
    near = max(smaller, key=lambda p: p.bytes)
    return (
        f"The next smaller one, {near.name}, saves {1 - near.bytes / best.bytes:.0%} of the bytes "
        f"and multiplies the KL divergence by {near.kl / best.kl:.1f}."
    )


def _size(point: Point) -> str:
    return f"{point.bytes / 1e6:,.1f} MB"


def _advice(point: Point, reason: str, now: float | None) -> Advice:
    return Advice(
        command=point.command, reason=reason, bytes=point.bytes, kl=point.kl, kl_now=now,
        measured=True,
    )  # fmt: skip
