"""Counts of the fields of floating-point numbers, from arrays of any size in bounded memory."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt

from jaxquant.core.arguments import check_arguments
from jaxquant.lossless import byte_planes
from jaxquant.lossless.arrays import record_of
from jaxquant.theory.entropy import entropy
from jaxquant.theory.float_entropy import FieldEntropy, patterns

CHUNK = 1 << 20  # number of weights that are counted at a time
TABLES = 1 << 12  # number of groups that are counted at a time
OCTAVE = 8  # number of magnitudes that are told apart in an octave
LN2 = math.log(2)


@dataclasses.dataclass(frozen=True, eq=False)
class FieldCounts:
    """How often every value of the fields of floating-point numbers occurs.

    Counts of tensors of one dtype add up (`+`): the sum belongs to one table for all of them.

    Attributes:
      dtype: name of the dtype of the numbers.
      number: number of them.
      planes: counts of the bytes of each byte plane [planes, 256], as lossless archives code them.
        The bits of a bfloat16 or float32 are first rotated left by one, so that the exponent is
        plane 0 and the sign the last bit of the last plane; those of other dtypes stay in place,
        from the most significant byte on.
      values: counts of whole numbers by their bits [2^bits]; None for float32.
      magnitudes: counts by exponent and first three bits of the mantissa of |w| in float32 [2048];
        the last 8 count infinities and NaN.
      grouped: N H(E | group), bits of all exponents with one table for each group.
      grouped_bias: what the bias of Miller and Madow adds to `grouped`: 1 / (2 ln 2) for every
        exponent but one in every group.
    """

    dtype: str
    number: int
    planes: Int[np.ndarray, "p 256"]
    values: Int[np.ndarray, " v"] | None
    magnitudes: Int[np.ndarray, "2048"]
    grouped: float
    grouped_bias: float

    def __add__(self, other: "FieldCounts") -> "FieldCounts":
        if self.dtype != other.dtype:
            raise ValueError(
                f"expected counts of one dtype, got {self.dtype} and {other.dtype}; keep a sum for "
                "each dtype"
            )
        mine, theirs = vars(self), vars(other)
        names = ("number", "planes", "magnitudes", "grouped", "grouped_bias")
        values = None if self.values is None else self.values + other.values
        return FieldCounts(
            dtype=self.dtype, values=values, **{n: mine[n] + theirs[n] for n in names}
        )

    @property
    def exponents(self) -> Int[np.ndarray, " e"]:
        """Counts of the biased exponents."""
        if self.values is None:
            return self.planes[0]
        mantissa = _mantissa(self.dtype)
        return self.values.reshape(2, -1, 1 << mantissa).sum((0, 2))

    @property
    def entropies(self) -> FieldEntropy:
        """Order-0 entropies of the fields, as `field_entropy` returns them.

        Those of float32 are sums over bytes where a table of all values would be too long: of the
        three parts of the mantissa (8, 8 and 7 bits), and of the four planes in place of `value`.
        Both are upper bounds of the entropy of the frequencies, and what a coder of byte planes
        reaches.
        """
        exponent, raw = float(entropy(self.exponents)), 1 + _mantissa(self.dtype)
        if self.values is not None:
            table = self.values.reshape(2, -1, 1 << (raw - 1))
            sign, mantissa = entropy(table.sum((1, 2))), entropy(table.sum((0, 1)))
            return FieldEntropy(
                float(sign), exponent, float(mantissa), float(entropy(self.values)), raw
            )
        last = self.planes[3].reshape(128, 2)
        mantissa = entropy(self.planes[1:3]).sum() + entropy(last.sum(1))
        whole = float(entropy(self.planes).sum())
        return FieldEntropy(float(entropy(last.sum(0))), exponent, float(mantissa), whole, raw)

    @property
    def exponent_given_group(self) -> float:
        """H(E | group) in bits per number, with one table for each group; tables are free."""
        return self.grouped / self.number

    @property
    def value_bias(self) -> float:
        """Bits that the value's entropy lacks on average as an estimate of the source's.

          (K - 1) / (2 N ln 2)    for K values that occur in N numbers (of float32: for each plane)

        Source: Miller 1955 (the correction of Miller and Madow). A table of K entries costs a
        coder about log2(N) / (2 N) bits per number and entry, which is more.
        """
        tables = self.planes if self.values is None else [self.values]
        return sum(np.count_nonzero(t) - 1 for t in tables) / (2 * self.number * LN2)


def count_fields(
    w: Float[Any, "..."], dtype: DTypeLike | None = None, group_size: int | None = None
) -> FieldCounts:
    """Count the fields of floating-point numbers; memory holds a few million numbers at a time.

    Args:
      w: the numbers, of any shape, at least one, concrete; a memory map is read piece by piece.
        Infinities and NaN are patterns like others.
      dtype: bfloat16, float16, float32, float8_e4m3fn or float8_e5m2, to which the numbers are
        rounded first, to nearest, ties to even. Default: that of `w`.
      group_size: number of consecutive numbers of a group, which divides the number of all.
        Default: the length of the last axis, so that groups are rows.
    Returns:
      The counts.
    Raises:
      ValueError: `w` is empty, the group size does not divide, or as in `float_entropy.fields`.

    >>> found = count_fields(np.array([[1.0, 1.5], [2.0, -3.0]], np.float32), "bfloat16")
    >>> found.entropies.exponent, found.exponent_given_group
    (1.0, 0.0)
    """
    check_arguments(count_fields, locals())
    numbers = np.asarray(w)
    if not numbers.size:
        raise ValueError(
            "expected numbers, got an empty array; the entropy of nothing is undefined"
        )
    size = (numbers.shape or (1,))[-1] if group_size is None else group_size
    if size < 1 or numbers.size % size:
        raise ValueError(
            f"group_size must divide the number of weights, {numbers.size}; got {size}"
        )
    flat, chunk = numbers.reshape(-1), min(CHUNK, TABLES * size)
    kind = patterns(flat[:0], dtype)[1]
    counter, groups = _Counter(kind), _Groups(size)
    for at in range(0, flat.size, chunk):
        bits = patterns(flat[at : at + chunk], dtype)[0]
        counter.add(bits)
        groups.add(counter.exponents(bits))
    planes, values, magnitudes = counter.found()
    return FieldCounts(kind.name, flat.size, planes, values, magnitudes, groups.bits, groups.bias)


class _Counter:
    """Counts of patterns: of all of 8 or 16 bits, and of the bytes of those of 32."""

    def __init__(self, kind: np.dtype) -> None:
        self.kind, self.mantissa = kind, _mantissa(kind.name)
        self.mask = (1 << (8 * kind.itemsize - 1 - self.mantissa)) - 1
        wide = kind.itemsize == 4
        self.values = np.zeros(0 if wide else 1 << (8 * kind.itemsize), np.int64)
        self.planes, self.magnitudes = np.zeros((4, 256), np.int64), np.zeros(2048, np.int64)

    def exponents(self, bits: UInt[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
        return (bits >> self.mantissa) & self.mask

    def add(self, bits: UInt[np.ndarray, " n"]) -> None:
        if len(self.values):
            self.values += np.bincount(bits, minlength=len(self.values))
            return
        for i, plane in enumerate(split_planes(bits, self.kind)):
            self.planes[i] += np.bincount(plane, minlength=256)
        self.magnitudes += np.bincount((bits >> 20) & 2047, minlength=2048)

    def found(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Return planes, values and magnitudes; of 8 or 16 bits, all follow from the values."""
        if not len(self.values):
            return self.planes, None, self.magnitudes
        every = np.arange(len(self.values)).astype(f"uint{8 * self.kind.itemsize}")
        with np.errstate(invalid="ignore"):
            wide = every.view(self.kind).astype(np.float32).view(np.uint32)
        summed = lambda index, length: _summed(index, self.values, length)
        planes = np.stack([summed(plane, 256) for plane in split_planes(every, self.kind)])
        return planes, self.values, summed((wide >> 20) & 2047, 2048)


class _Groups:
    """Sum of the entropies of the exponents of consecutive groups, which chunks may cut."""

    def __init__(self, size: int) -> None:
        self.size, self.at, self.bits, self.bias = size, 0, 0.0, 0.0
        self.rest = np.zeros(256, np.int64)  # counts of a group that has begun

    def add(self, exponents: UInt[np.ndarray, " n"]) -> None:
        begun = self.at % self.size
        group = (begun + np.arange(len(exponents))) // self.size
        table = np.bincount(group * 256 + exponents, minlength=256 * (int(group[-1]) + 1))
        table = table.reshape(-1, 256)
        table[0] += self.rest
        self.at += len(exponents)
        whole = len(table) if self.at % self.size == 0 else len(table) - 1
        self.rest = table[whole] if whole < len(table) else np.zeros(256, np.int64)
        done = table[:whole]
        if whole:
            self.bits += float(entropy(done).sum()) * self.size
            self.bias += float(np.count_nonzero(done) - whole) / (2 * LN2)


def split_planes(bits: UInt[np.ndarray, " n"], dtype: DTypeLike) -> list[UInt[np.ndarray, " n"]]:
    """Return the byte planes of patterns, the most significant first.

    Patterns of bfloat16 and float32 are rotated left by one bit first, so that the eight bits of
    the exponent are one plane.

    Args:
      bits: the patterns, unsigned integers.
      dtype: dtype of the numbers.
    Returns:
      One uint8 array for each byte.

    >>> [plane.tolist() for plane in split_planes(np.array([0xBF80], np.uint16), "bfloat16")]
    [[127], [1]]
    """
    data = np.ascontiguousarray(bits).view(np.uint8)
    return byte_planes.split(data, record_of(jnp.dtype(dtype).name))[:-1]


def _summed(
    index: UInt[np.ndarray, " n"], counts: Int[np.ndarray, " n"], length: int
) -> Int[np.ndarray, " m"]:
    found = np.zeros(length, np.int64)
    np.add.at(found, index, counts)
    return found


def _mantissa(dtype: str) -> int:
    return int(jnp.finfo(dtype).nmant)
