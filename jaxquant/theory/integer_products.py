"""Operations, accumulators and energy of products of integer codes, beside float16 and int8.

y = x @ w with k inputs costs, for each of its outputs, k multiplications and k additions to a sum
that starts at 0 (others count k - 1, since the first may be a copy). If every weight is -1, 0 or 1,
it needs no multiplication: inputs are added, subtracted or left out.

On the claim of a 71.4 times lower energy (BitNet b1.58, arXiv:2402.17764): it is
(0.34 + 0.16) / 0.007, the energy of a float16 multiplication and addition over that of one int8
addition, at 7 nm. An int8 accumulator, however, holds the sum of no more than one int8 input (see
`accumulator_bits`). With int32 sums the ratio is 16.7, and 3.3 if the other side multiplies int8
codes instead of floats; and neither counts reading the weights, which at batch 1 is over 99 % of
the energy of a float model's token, so that a token's energy falls by about the ratio of bits, 10.
All three ratios are `energy_ratio` under constants of the reader's choice.
"""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import check_fields
from jaxquant.theory.energy_constants import EnergyConstants

KINDS = ("ternary", "integer", "int8", "float16")
INPUT = (-127, 127)  # codes of int8 inputs with one scale per token


class Operations(NamedTuple):
    """Numbers of operations of a product.

    Attributes:
      adds: additions of an input, or of a product, to a sum.
      subtracts: subtractions of an input from a sum.
      multiplies: multiplications of an input by a weight.
      scalings: multiplications of a finished sum by scales.
    """

    adds: int
    subtracts: int
    multiplies: int
    scalings: int


def ternary_operations(codes: Int[Array, "k n"], rows: int = 1) -> Operations:
    """Count what a product with these very ternary codes needs, zeros skipped.

    Each sum starts at 0, so its first input is an addition or a subtraction too. Every output is
    scaled once, by the product of the scales of its row and of the matrix.

    Args:
      codes: integers -1, 0 and 1, [k, n].
      rows: number of rows of x, 1 or more (default 1).
    Returns:
      The counts.
    Raises:
      ValueError: a code is not -1, 0 or 1, or `rows` is no integer of 1 or more.

    >>> ternary_operations(np.array([[1, -1], [0, 1], [1, 0]]))
    Operations(adds=3, subtracts=1, multiplies=0, scalings=2)
    """
    check_arguments(ternary_operations, locals())
    held = _matrix(codes)
    if not np.isin(held, (-1, 0, 1)).all():
        raise ValueError("ternary codes must be -1, 0 or 1; count others with dense_operations")
    _at_least_one(rows=rows)
    adds, subtracts = int((held == 1).sum()), int((held == -1).sum())
    return Operations(rows * adds, rows * subtracts, 0, rows * held.shape[1])


def dense_operations(k: int, n: int, rows: int = 1) -> Operations:
    """Count what a product of a dense [k, n] matrix needs, of floats or of integer codes.

    As in `ternary_operations`, each sum starts at 0, and every output is scaled once.

    Args:
      k: number of inputs, 1 or more.
      n: number of outputs, 1 or more.
      rows: number of rows of x, 1 or more (default 1).
    Raises:
      ValueError: a number is below 1.

    >>> dense_operations(3, 2)
    Operations(adds=6, subtracts=0, multiplies=6, scalings=2)
    """
    check_arguments(dense_operations, locals())
    _at_least_one(k=k, n=n, rows=rows)
    return Operations(rows * k * n, 0, rows * k * n, rows * n)


def accumulator_bits(
    k: int, weights: Sequence[int] = (-1, 1), inputs: Sequence[int] = INPUT
) -> int:
    """Return the exact number of bits of a two's complement sum of any k products.

    The smallest b with -2^(b-1) <= k min(w x) and k max(w x) <= 2^(b-1) - 1, over all codes in
    range; sums of fewer products lie in between, since 0 is added to both ends. It is reached, so
    no smaller accumulator is safe for all weights and inputs.

    Args:
      k: number of products, 1 or more.
      weights: smallest and largest code of the weights (default ternary).
      inputs: smallest and largest code of the inputs (default int8 without -128).
    Returns:
      The number of bits, 1 or more.
    Raises:
      ValueError: k is below 1, or a range is not two integers in ascending order.

    >>> accumulator_bits(1), accumulator_bits(4096), accumulator_bits(4096, (-8, 7))
    (8, 20, 23)
    """
    check_arguments(accumulator_bits, locals())
    _at_least_one(k=k)
    corners = [w * x for w in _range("weights", weights) for x in _range("inputs", inputs)]
    return _signed_bits(k * min(corners), k * max(corners))


def accumulator_bits_of(codes: Int[Array, "k n"], inputs: Sequence[int] = INPUT) -> int:
    """Return the exact number of bits that sums over the columns of these very codes need.

    The inputs may be any codes in their range, and may be added in any order: partial sums fit too.
    It is at most `accumulator_bits` of the range of the codes, and less where weights are zero or
    small.

    Args:
      codes: integers [k, n].
      inputs: smallest and largest code of the inputs (default int8 without -128).
    Raises:
      ValueError: `codes` is not a matrix of integers, or the range is invalid.

    >>> accumulator_bits_of(np.array([[1], [0], [-1]]))
    9
    """
    check_arguments(accumulator_bits_of, locals())
    held = _matrix(codes).astype(np.int64)
    low, high = _range("inputs", inputs)
    # Of a partial sum of one sign, the largest holds just the products that can have this sign.
    low, high = min(low, 0), max(high, 0)
    positive, negative = (a.sum(0).astype(object) for a in (held.clip(min=0), held.clip(max=0)))
    least, most = positive * low + negative * high, positive * high + negative * low
    return _signed_bits(min(least, default=0), max(most, default=0))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a machine computes one product of a weight and an input, and adds it to a sum.

    Attributes:
      kind: "ternary" (an addition), "integer" or "int8" (an int8 multiplication and an addition;
        no energy of narrower multipliers is sourced, so theirs is bounded by that of int8), or
        "float16" (a multiplication and an addition of floats).
      sums: bits of integer sums, 8 or 32; only "ternary" may have 8, which overflow.

    Raises:
      ValueError: a field has an invalid value.
    """

    kind: str
    sums: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.sums not in ((8, 32) if self.kind == "ternary" else (32,)):
            raise ValueError(
                f"sums must be 32, or 8 where the kind is 'ternary', got {self.sums} for "
                f"{self.kind!r}"
            )

    def energy(self, constants: EnergyConstants) -> float:
        """Return the energy of one weight and one input, in picojoules.

        Args:
          constants: the constants of a technology.

        >>> from jaxquant.theory.energy_constants import NODES
        >>> Arithmetic("ternary").energy(NODES["7 nm"]), Arithmetic("float16").energy(NODES["7 nm"])
        (0.03, 0.5)
        """
        if self.kind == "float16":
            return constants.float_product
        add = constants.int8_add if self.sums == 8 else constants.int32_add
        return add if self.kind == "ternary" else constants.int8_multiply + add


def energy_ratio(
    constants: EnergyConstants,
    ours: Arithmetic,
    theirs: Arithmetic,
    bits: tuple[float, float] = (0.0, 0.0),
    batch: int = 1,
) -> float:
    """Return how many times the energy of one machine's product that of another is.

        ratio = (e_theirs + e_bit b_theirs / B) / (e_ours + e_bit b_ours / B)

    Args:
      constants: the constants of a technology.
      ours: the arithmetic in the denominator.
      theirs: the arithmetic in the numerator.
      bits: stored bits per weight of ours and of theirs, read once for a batch of tokens; the
        default, zeros, compares arithmetic alone.
      batch: number of tokens that share a reading, 1 or more (default 1).
    Returns:
      The ratio; infinity if ours costs nothing.
    Raises:
      ValueError: a number is out of range.

    >>> from jaxquant.theory.energy_constants import NODES
    >>> seven, floats = NODES["7 nm"], Arithmetic("float16")
    >>> [round(energy_ratio(seven, Arithmetic("ternary", sums), floats), 1) for sums in (8, 32)]
    [71.4, 16.7]
    >>> round(energy_ratio(seven, Arithmetic("ternary"), floats, bits=(1.58, 16)), 1)
    10.2
    """
    check_arguments(energy_ratio, locals())
    _at_least_one(batch=batch)
    if len(bits) != 2 or not all(isinstance(b, Real) and 0 <= b < math.inf for b in bits):
        raise ValueError(f"bits must be two numbers, 0 or more and finite, got {bits}")
    one, other = (
        a.energy(constants) + constants.memory * b / batch
        for a, b in zip((ours, theirs), bits, strict=True)
    )
    return other / one if one else math.inf


def _signed_bits(low: int, high: int) -> int:
    """Return the bits of the smallest two's complement integer that holds both."""
    return 1 + max((-low - 1).bit_length() if low < 0 else 0, max(high, 0).bit_length())


def _range(name: str, limits: Sequence[int]) -> tuple[int, int]:
    found = tuple(limits)
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in found)
    if len(found) != 2 or not whole or found[0] > found[1]:
        raise ValueError(f"{name} must be the smallest and the largest code, got {limits!r}")
    return int(found[0]), int(found[1])


def _matrix(codes: Array) -> np.ndarray:
    found = np.asarray(codes)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"codes must be integers [k, n], got {found.dtype}{list(found.shape)}")
    return found


def _at_least_one(**given: int) -> None:
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
