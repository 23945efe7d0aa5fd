"""What the table of AWQ and others is made with."""

import pytest

import jaxquant as jq
from jaxquant.rounding import LDLQ, Clipped, Nearest
from tests.benchmarks import awq

SHAPES = {
    "embed/embedding": (50, 192),
    "layers/attn/q/kernel": (2, 192, 192),
    "layers/attn/v/kernel": (2, 192, 192),
    "layers/mlp/down/kernel": (2, 256, 192),
}
SITES = {p: jq.core.Site(p, s, (1,) if p.startswith("layers") else ()) for p, s in SHAPES.items()}


@pytest.mark.parametrize(("k", "group"), [(384, 128), (1536, 128), (576, 64), (192, 64)])
def test_groups_are_of_128_or_64(k, group):
    assert awq.group_size("AWQ", k) == group
    assert awq.group_size("nearest, 96", k) == 96


@pytest.mark.parametrize("row", awq.ROWS)
def test_rows_differ_in_nothing_else(row):
    """The same integers in the same groups; queries and keys are not clipped."""
    rules = dict(awq.recipe_of(row, 3, SITES).rules)
    assert rules.pop("*") == jq.KEEP
    assert list(rules) == [path for path in SHAPES if path.startswith("layers")]
    for path, method in rules.items():
        assert method.format == jq.formats.Integer(
            3, awq.group_size(row, 256 if "down" in path else 192)
        )
        clipped = isinstance(method.rounder, Clipped)
        assert clipped == (row.startswith("AWQ") and "attn/q" not in path)
        rounder = method.rounder.rounder if clipped else method.rounder
        assert rounder == (LDLQ() if "LDLQ" in row else Nearest())
        assert (method.input is None) == row.startswith(("nearest", "LDLQ"))


def test_sentences_of_wikitext():
    text = " = A heading = \n\nOne two three four 5 @.@ 6 km . Seven eight nine .\n"
    assert awq.sentences(text) == ["One two three four 5.6 km ."]
