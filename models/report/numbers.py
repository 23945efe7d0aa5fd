"""Numbers as a reader wants them: three significant digits, and prefixes of units."""

DASH = "–"
MINUS = "−"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALL = ("", "m", "µ", "n", "p", "f", "a", "z")
_LARGE = ("", "k", "M", "G", "T", "P", "E")


def _finite(value: float) -> float:
    """The value as a float; integers beyond its range become its largest."""
    try:
        return float(value)
    except OverflowError:
        return 1.797e308 if value > 0 else -1.797e308


def number(value: float | None, digits: int = 3) -> str:
    """Return the number with at most `digits` significant digits.

    Args:
      value: the number; None becomes a dash.
      digits: number of significant digits, from 1 on. Default: 3.

    >>> number(0.123456), number(1234567), number(2.5e-9), number(-2.0), number(None)
    ('0.123', '1.23×10⁶', '2.5×10⁻⁹', '−2', '–')
    """
    if value is None:
        return DASH
    value = _finite(value)
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{abs(value):.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -4 <= power < 5:
        text = f"{float(f'{mantissa}e{power}'):,.{max(digits - 1 - power, 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        tidy = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{tidy}×10{str(power).translate(_RAISED)}"
    return (MINUS if value < 0 else "") + text


def whole(value: int | None) -> str:
    """Return the integer with thousands separated.

    >>> whole(134515008), whole(None), whole(10**30)
    ('134,515,008', '–', '1×10³⁰')
    """
    if value is None:
        return DASH
    return f"{value:,}".replace("-", MINUS) if abs(value) < 10**15 else number(value)


def quantity(value: float | None, unit: str) -> str:
    """Return the number with its unit and the prefix that suits it.

    Args:
      value: the number; None becomes a dash.
      unit: the unit without a prefix, such as "B" or "J". Bytes have no prefixes below one.

    >>> quantity(61_234_567, "B"), quantity(0.00312, "J"), quantity(0, "B"), quantity(1e-30, "J")
    ('61.2 MB', '3.12 mJ', '0 B', '1×10⁻³⁰ J')
    """
    if value is None:
        return DASH
    value = _finite(value)
    size = float(f"{abs(value):.2e}")
    if size == 0:
        return f"0 {unit}"
    for power, prefix in enumerate(_LARGE):
        if 1 <= size / 1000.0**power < 1000:
            return f"{number(value / 1000.0**power)} {prefix}{unit}"
    for power, prefix in enumerate(_SMALL):
        if unit != "B" and 1 <= size * 1000.0**power < 1000:
            return f"{number(value * 1000.0**power)} {prefix}{unit}"
    return f"{number(value)} {unit}"


def duration(seconds: float) -> str:
    """Return a time in the units that suit it.

    >>> duration(0.0123), duration(4.2), duration(200)
    ('12.3 ms', '4.2 s', '3 min 20 s')
    """
    if 120 <= seconds < 1e7:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes:,} min {rest} s"
    return quantity(seconds, "s")
