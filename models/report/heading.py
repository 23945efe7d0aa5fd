"""What the model is, and how the report was made: pairs of a term and its value."""

from jaxquant_models.report.numbers import duration, number, quantity, whole
from jaxquant_models.schemas.report import Report

Pairs = list[tuple[str, str]]


def summary(report: Report) -> Pairs:
    """Return the facts that head the page."""
    model = report.identity
    pairs = [
        ("parameters", whole(model.parameters)),
        ("in memory", quantity(model.bytes, "B")),
        ("on disk", quantity(model.bytes_on_disk, "B")),
        ("bits per quantized weight", number(model.bits_per_weight)),
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
    pairs = list(report.made.items())
    pairs += [(f"stage {name}", duration(seconds)) for name, seconds in report.seconds.items()]
    if report.seconds:
        pairs.append(("all stages", duration(sum(report.seconds.values()))))
    return [*pairs, ("version of the report's schema", str(report.version))]
