"""Stage: what to do, as command lines."""

from collections.abc import Sequence

from jaxquant_models.runs.analysis.frontier import Measured
from jaxquant_models.runs.analysis.knee import uniform_of, with_frontier
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import Advice, Point

CLEARLY = 0.98  # of the present KL: a version that gains less is not advised
ALMOST = 1.1  # times the KL of the knee: a smaller version that loses no more comes first


def advice_of(subjects: Subjects, measured: Measured) -> list[Advice]:
    """Return what would lower the KL divergence most at equal bytes; of a float model, the knee.

    Args:
      subjects: the models and the text.
      measured: the frontier.
    """
    points = measured.frontier.points
    if subjects.against is not None:
        return _at_equal_bytes(points)
    best = measured.best
    if best is None:
        return []
    outer = {mixture.point.name for mixture in measured.mixtures if mixture.outer}
    without = with_frontier([p for p in points if p.name not in outer])
    many = sum(p.on_frontier and p.kl > 0 for p in without) > 2
    place = "is the knee of the frontier" if many else "is the smallest on the frontier"
    reason = (
        f"{best.name} {place}: {_size(best)} with a KL divergence of "
        f"{best.kl:.4f} nats per token and {best.top1:.1%} top-1 agreement. "
        + _neighbors(best, without)
    )
    lighter, mixed = _lighter(best, measured), _mixed(best, measured)
    found = [_advice(best, reason, None), *lighter, *mixed]
    if lighter and lighter[0].kl < ALMOST * best.kl:
        found[:2] = [*lighter, found[0]]
    return found


def _lighter(best: Point, measured: Measured) -> list[Advice]:
    """Return the version of the knee that rounds the outer matrices too, if it is smaller."""
    rounded = [m.point for m in measured.mixtures if m.outer and m.point.bytes < best.bytes]
    reason = lambda p: (
        f"{p.name} takes {_size(p)} instead of the {_size(best)} of {best.name}, with a KL "
        f"divergence of {p.kl:.4f} instead of {best.kl:.4f} nats per token."
    )
    return [_advice(p, reason(p), None) for p in rounded]


def _mixed(best: Point, measured: Measured) -> list[Advice]:
    """Return the mixtures that are better than versions of one width with no fewer bytes."""
    found = []
    for one in (m.point for m in measured.mixtures if not m.outer and m.point.name != best.name):
        equal = uniform_of(one, measured.frontier.points)
        if equal is not None and one.kl < CLEARLY * equal.kl:
            reason = (
                f"{one.name} has a KL divergence of {one.kl:.4f} at {_size(one)}, where "
                f"{equal.name} has {equal.kl:.4f} at {_size(equal)}."
            )
            found.append(_advice(one, reason, None))
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
    unit, name = (1e6, "MB") if point.bytes >= 1e5 else (1e3, "kB")
    return f"{point.bytes / unit:,.1f} {name}"


def _advice(point: Point, reason: str, now: float | None) -> Advice:
    return Advice(
        command=point.command, reason=reason, bytes=point.bytes, kl=point.kl, kl_now=now,
        measured=True,
    )  # fmt: skip
