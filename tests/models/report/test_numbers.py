"""Numbers as the page shows them."""

import pytest

from jaxquant_models.report.numbers import duration, number, quantity, whole


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"), (-0.0, "0"), (9.996, "10"), (0.9996, "1"), (99_940, "99,900"),
        (99_960, "1×10⁵"), (1e-4, "0.0001"), (9.99e-5, "9.99×10⁻⁵"), (1e300, "1×10³⁰⁰"),
        (10**400, "1.8×10³⁰⁸"), (-1234.5, "−1,230"), (5e-324, "4.94×10⁻³²⁴"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (999_999, "B", "1 MB"), (0.5, "B", "0.5 B"), (1e21, "B", "1×10²¹ B"),
        (2.871e-21, "J", "2.87 zJ"), (-0.002, "J", "−2 mJ"), (None, "J", "–"),
        (999.4, "J", "999 J"), (999.6, "J", "1 kJ"),
    ],
)  # fmt: skip
def test_quantity(value, unit, text):
    assert quantity(value, unit) == text


def test_the_prefix_is_that_of_the_number_within_three_digits():
    for power in range(-20, 18):
        for mantissa in (1.0, 3.21, 9.994):
            text = quantity(mantissa * 10.0**power, "J")
            figure, unit = text.split(" ")
            assert 1 <= float(figure.replace(",", "")) < 1000 and unit.endswith("J"), text


def test_whole_and_duration():
    assert whole(-1234) == "−1,234"
    assert duration(119) == "119 s" and duration(3600) == "60 min 0 s"
