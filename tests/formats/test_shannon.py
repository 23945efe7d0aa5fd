"""No format beats Shannon: on Gaussian weights, none takes fewer bits than R(D) of its error."""

from functools import lru_cache

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.code_entropy import code_entropy
from jaxquant.theory.rate_distortion import gap_in_bits
from tests.support.arrays import draw
from tests.support.formats import FORMATS

SLACK = 0.01  # bits by which a sample may deviate


@lru_cache
def found(format):
    """Bits of independent Gaussian weights by kind, their error, and their mean square."""
    w = draw(240, 160)
    q = jq.quantize_array(w, jq.Method("test", jq.rtn().rounder, format))
    error, size = (np.mean(np.square(a), dtype=np.float64) for a in (w - q.dequantize(), w))
    return code_entropy(q).total, float(error), float(size)


def beats_shannon(rate, error, size):
    return bool(gap_in_bits(rate, error, size) < -SLACK)


@pytest.mark.parametrize("format", [f for f in FORMATS if not f.exact], ids=str)
def test_no_format_beats_shannon(format):
    """Neither with all its bytes counted, nor with its codes entropy-coded."""
    bits, *of = found(format)
    assert not beats_shannon(bits.stored, *of)
    assert not beats_shannon(bits.coded, *of)
    few = not isinstance(format, jq.formats.E8P | jq.formats.EntropyCoded)
    if few:  # codes of which a table can be known: their entropy is then no underestimate
        assert not beats_shannon(bits.entropy + bits.side, *of)


@pytest.mark.parametrize(
    "format",
    [
        jq.formats.Integer(8, 16),
        jq.formats.Float8("e4m3"),
        jq.formats.NVFP4(),
        jq.formats.E8P(2),
        jq.formats.Trellis((2,), L=8),
    ],
    ids=str,
)
def test_half_of_the_codes_would_beat_it(format):
    """The twin: a format that counts half of its codes passes below the bound."""
    bits, *of = found(format)
    assert beats_shannon(bits.stored - bits.codes / 2, *of)


def test_codes_without_their_scales_would_beat_it():
    """The twin: two bits in groups of four, nearly all of whose information is in the scales."""
    format = jq.formats.Integer(2, 4)
    bits, *of = found(format)
    assert not beats_shannon(bits.stored, *of)
    assert beats_shannon(bits.codes, *of) and beats_shannon(bits.entropy, *of)
