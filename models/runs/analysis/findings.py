"""Sentences computed from the numbers of a report, the most surprising first."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant_models.runs.analysis.knee import is_mixture, is_uniform, uniform_of
from jaxquant_models.runs.analysis.outer import HEAVY, Heavy
from jaxquant_models.schemas.report import (
    ChipRow,
    Dimensions,
    Frontier,
    LimitRow,
    Point,
    TensorRow,
)

MASSIVE = 4.0  # surprise of a massive activation whose ratio to the median is infinite
NOTABLE = 0.01  # least share of the bits that lossless coding saves, to be told
UNEVEN = 1.05  # least ratio of two temperatures
GAIN = 1.02  # least ratio of KL divergences


class Finding(NamedTuple):
    """A sentence, and how surprising it is: about 0 for what anybody would expect."""

    surprise: float
    text: str


def findings(
    tensors: Sequence[TensorRow],
    frontier: Frontier | None,
    dimensions: Dimensions | None,
    limits: Sequence[LimitRow],
    chips: Sequence[ChipRow],
    outliers: Mapping[str, Any],
    heavy: Heavy | None = None,
) -> list[str]:
    """Return the sentences that head the page.

    Args:
      tensors, frontier, dimensions, limits: sections of the report.
      chips: the roofline.
      outliers: what `activations.outliers` returns.
      heavy: the largest matrix that is not quantized. Default: none.
    """
    found = [
        *_massive(outliers), *_slack(tensors), *_uneven(tensors), *_tails(tensors),
        *_of_limits(limits), *_dimension(dimensions),
        *([] if frontier is None else _cliff(frontier)),
        *([] if frontier is None else _mixing(frontier)), *_wall(chips), *_unquantized(heavy),
    ]  # fmt: skip
    return [f.text for f in sorted(found, key=lambda f: -f.surprise)]


def _massive(outliers: Mapping[str, Any]) -> Iterator[Finding]:
    top = outliers.get("massive")
    if top:
        first, last, ratio = top["layers"][0], top["layers"][-1], top["ratio"]
        times = "where the median is 0" if ratio is None else f"{ratio:.0f} times the median"
        also = "" if first == last else f"; such values occur from layer {first} to layer {last}"
        yield Finding(
            MASSIVE if ratio is None else float(np.log10(max(ratio, 1.0))),
            f"Massive activations: channel {top['channel']} of token {top['text']} reaches "
            f"{top['value']:.0f} after layer {top['layer']}, {times}{also}.",
        )


def _slack(tensors: Sequence[TensorRow]) -> Iterator[Finding]:
    """Find the kind of weight of whose stored bits an ideal lossless code saves most."""
    known = [t for t in tensors if t.ideal is not None]
    if not known:
        return
    share = lambda t: (t.stored - t.ideal) / t.stored if t.stored else 0.0
    most = max(known, key=share)
    if share(most) < NOTABLE:
        return
    total = sum(t.stored * np.prod(t.shape) for t in known)
    saved = sum((t.stored - (t.ideal or 0.0)) * np.prod(t.shape) for t in known) / total
    yield Finding(
        4 * share(most),
        f"{most.kind} holds the most slack for lossless coding: {most.stored:.2f} bits are stored "
        f"per weight, and {most.ideal:.2f} would do ({share(most):.0%} less); all matrices "
        f"together could shrink by {saved:.0%}.",
    )


def _uneven(tensors: Sequence[TensorRow]) -> Iterator[Finding]:
    """Compare the temperatures of stacks: the next bit belongs to the hottest."""
    known = [t for t in tensors if t.temperature is not None and t.temperature > 0]
    if len(known) < 2:
        return
    heat = lambda t: t.temperature
    hot, cold = max(known, key=heat), min(known, key=heat)
    ratio = heat(hot) / heat(cold)
    if ratio < UNEVEN:
        return
    yield Finding(
        float(np.log2(max(ratio, 1.0))) / 2,
        f"The next bit is worth {ratio:.1f} times as much in {hot.kind} as in {cold.kind}; an "
        "optimal allocation would make both equal.",
    )


def _tails(tensors: Sequence[TensorRow]) -> Iterator[Finding]:
    if tensors:
        worst = max(tensors, key=lambda t: t.kurtosis)
        if worst.kurtosis > 1:
            yield Finding(
                float(np.log10(1 + worst.kurtosis)),
                f"The weights of {worst.kind} have the heaviest tails: excess kurtosis "
                f"{worst.kurtosis:.1f}, largest weight {worst.largest:.0f} times the root mean "
                "square.",
            )


def _of_limits(limits: Sequence[LimitRow]) -> Iterator[Finding]:
    """Report every limit that did not come out as it should."""
    for row in limits:
        if row.verdict in ("violated", "collapsed"):
            given = (("measured", row.measured), ("bound", row.bound))
            numbers = ", ".join(f"{name}: {v:.3g}" for name, v in given if v is not None)
            end = f" {numbers[0].upper()}{numbers[1:]}." if numbers else ""
            yield Finding(
                {"survival": 3.5, "theorem": 3.0}.get(row.kind, 1.0),
                f"Limit {row.name!r} {row.verdict}: {row.statement}{end}",
            )


def _dimension(found: Dimensions | None) -> Iterator[Finding]:
    if found is None or len(found.layers) < 2:
        return
    values = np.array([layer[0] for layer in found.layers])
    top, low = int(values.argmax()), int(values.argmin())
    if values[top] == values[low]:
        return
    yield Finding(
        float(values[top] / max(values[low], 1e-9)) / 3,
        f"The hidden states have {values[top]:.1f} dimensions ({found.estimators[0]}) after layer "
        f"{top}, where they have most, and {values[low]:.1f} after layer {low}.",
    )


def _cliff(frontier: Frontier) -> Iterator[Finding]:
    """Find the step of one method at which KL grows most beyond what the saved bits explain."""
    worst: tuple[float, str] = (1.0, "")
    by_method: dict[str, list[Any]] = {}
    for p in frontier.points:
        if p.command and is_uniform(p) and p.kl > 0:
            by_method.setdefault(p.name.split()[0], []).append(p)
    for of in by_method.values():
        of.sort(key=lambda p: -p.bits_per_weight)
        for a, b in itertools.pairwise(of):
            # The quadratic law says that a bit less multiplies the loss by 4.
            excess = b.kl / a.kl / 4 ** (a.bits_per_weight - b.bits_per_weight)
            if excess > worst[0]:
                text = (
                    f"From {a.name} to {b.name} the KL divergence grows by a factor of "
                    f"{b.kl / a.kl:.3g}, {excess:.1f} times what the law of 6 dB a bit predicts "
                    f"(top-1 agreement goes from {a.top1:.0%} to {b.top1:.0%})."
                )
                worst = excess, text
    if worst[1]:
        yield Finding(float(np.log2(worst[0])), worst[1])


def _mixing(frontier: Frontier) -> Iterator[Finding]:
    """Find the mixture that gains most over the next larger version of one width."""
    found: list[tuple[float, Point, Point]] = []
    for mixed in frontier.points:
        other = uniform_of(mixed, frontier.points)
        if is_mixture(mixed) and other is not None and mixed.kl > 0:
            found.append((other.kl / mixed.kl, other, mixed))
    gain, other, mixed = max(found, key=lambda each: each[0], default=(0.0, None, None))
    if other is not None and mixed is not None and gain > GAIN:
        yield Finding(
            2 * (gain - 1),
            "Widths that differ by kind of weight lower the KL divergence from "
            f"{other.kl:.4f} ({other.name}) to {mixed.kl:.4f} ({mixed.name}) at no more bytes.",
        )


def _unquantized(heavy: Heavy | None) -> Iterator[Finding]:
    if heavy is not None and heavy.share > HEAVY:
        yield Finding(
            6 * heavy.share,
            f"{heavy.path} takes {heavy.share:.0%} of the bytes of {heavy.version} and is not "
            "quantized.",
        )


def _wall(chips: Sequence[ChipRow]) -> Iterator[Finding]:
    """Find the chip whose arithmetic decoding uses least, of those that hold the model."""
    bound = [c for c in chips if c.fits and c.wall == "memory" and c.ridge > 0]
    if not bound:
        return
    most = min(bound, key=lambda c: c.intensity / c.ridge)
    if most.critical_batch is None:
        batch = "no number of sequences uses it fully, since each reads a cache of its own"
    else:
        batch = f"it takes {most.critical_batch:.0f} sequences at once to use it fully"
    yield Finding(
        0.5,
        f"Decoding one sequence uses {most.intensity / most.ridge:.2%} of the arithmetic of "
        f"{most.chip}, the least of all chips; {batch}.",
    )
