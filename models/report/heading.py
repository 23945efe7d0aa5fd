"""What the model is, and how the report was made: pairs of a term and its value."""

import re

from jaxquant_models.report.numbers import duration, number, quantity, whole
from jaxquant_models.schemas.report import Report

Pairs = list[tuple[str, str]]


def summary(report: Report) -> Pairs:
    """Return the facts that head the page."""
    model = report.identity
    distinct = model.bits_per_weight != model.bits_over_all  # else the first says no more
    pairs = [
        ("parameters", whole(model.parameters)),
        ("in memory", quantity(model.bytes, "B")),
        ("on disk", quantity(model.bytes_on_disk, "B")),
        ("bits per quantized weight", number(model.bits_per_weight) if distinct else ""),
        ("bits over all parameters", number(model.bits_over_all)),
        ("stored as", ", ".join(f"{n:,} × {method}" for method, n in model.methods.items())),
        ("compared with", model.against or "nothing"),
        ("text", f"{model.text}, {model.tokens:,} token{'s' if model.tokens != 1 else ''}"),
    ]
    return [(term, value) for term, value in pairs if value not in ("", "–")]


def architecture(report: Report) -> Pairs:
    """Return the fields of the configuration."""
    return [(name, shown(value)) for name, value in report.identity.architecture.items()]


def shown(value: int | float | bool | str) -> str:
    """Return a value of the configuration as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return whole(value)
    return f"{value:,.6g}" if isinstance(value, float) else value


def made(report: Report) -> Pairs:
    """Return versions, times and the version of the schema."""
    pairs = [(name, moment(value)) for name, value in report.made.items()]
    pairs += [(f"stage {name}", duration(seconds)) for name, seconds in report.seconds.items()]
    if report.seconds:
        pairs.append(("all stages", duration(sum(report.seconds.values()))))
    return [*pairs, ("version of the report's schema", str(report.version))]


def moment(value: str) -> str:
    """Return a date and time as people write it; any other text as it is.

    >>> moment("2026-12-02T14:00:00+00:00"), moment("0.2.0")
    ('2026-12-02 14:00 UTC', '0.2.0')
    """
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d(\+00:00|Z)$", r"\1 \2 UTC", value)
