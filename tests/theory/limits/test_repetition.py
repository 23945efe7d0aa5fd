"""Repetition: against a regular expression, definitions written again, and texts made to loop."""

import re
from itertools import pairwise

import numpy as np
import pytest

from jaxquant.theory.limits.repetition import distinct, loop, repeated, until_end


def loops_by_regex(ids, longest=42):
    """The rule again: some suffix is a unit 3 times or more, the last copy cut, of 24 tokens."""
    s = "".join(chr(0xE000 + i) for i in ids)
    for cut in range(longest):
        body = s[: len(s) - cut]
        for m in (re.search(rf"(.{{{p}}})\1+$", body, re.S) for p in range(cut + 1, longest + 1)):
            if m is None or not m.group(1).startswith(s[len(body) :]):
                continue
            whole, p = m.group(0), len(m.group(1))
            unit = m.group(1)
            back = 0  # the loop may begin within a copy, too
            while (
                back < p and m.start() - back > 0 and body[m.start() - back - 1] == unit[-1 - back]
            ):
                back += 1
            if len(whole) + cut + back >= max(3 * p, 24):
                return True
    return False


def test_loops_are_those_of_a_regular_expression():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        p, copies = int(rng.integers(1, 12)), float(rng.uniform(1, 6))
        unit = rng.integers(0, 3, p)
        tail = np.resize(unit, int(p * copies))
        ids = np.concatenate([rng.integers(0, 3, 40), tail])
        found = loop(ids) is not None
        assert found == loops_by_regex(ids)
        seen.add(found)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "period, length, found",
    [
        (1, 24, True),
        (1, 23, False),
        (10, 30, True),
        (10, 29, False),
        (42, 126, True),
        (43, 129, False),
    ],
)
def test_a_loop_needs_three_copies_and_24_tokens(period, length, found):
    ids = np.concatenate([[90, 91], np.resize(np.arange(period), length)])
    assert (loop(ids) is not None) == found
    assert loop(np.append(ids, 99)) is None  # it has recovered


def test_the_shortest_period_is_reported():
    assert loop([7, 8] * 30).period == 2


def test_repeated_and_distinct_are_the_definitions():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 4, 50).tolist() for _ in range(5)]
    x = texts[0]
    assert repeated(x, 4) == 1 - len(set(zip(*[x[i:] for i in range(4)]))) / (len(x) - 3)  # noqa: B905
    pairs = {(a, b) for t in texts for a, b in pairwise(t)}
    assert distinct(texts, 2) == len(pairs) / 250
    assert repeated([1, 2, 3], 4) == 0 and distinct([[]], 1) == 0


def test_a_text_ends_at_its_first_stop_token():
    assert until_end([3, 2, 4, 1], [1, 2]).tolist() == [3]
    assert until_end([3, 4]).tolist() == [3, 4]


def test_bad_numbers():
    for arguments in ({"longest": 0}, {"copies": 1}, {"shortest": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            loop([1, 2], **arguments)
    with pytest.raises(ValueError, match="n must be at least 1"):
        repeated([1, 2], 0)
