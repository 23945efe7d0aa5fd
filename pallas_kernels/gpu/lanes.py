"""Packed codes as numbers for a tensor core, several per register, extracted by masks alone.

A word holds lanes: 2 of 16 bits for float16, 4 of 8 bits for int8. What a mask leaves in a lane is
already a number. As float16 it is subnormal, or in the first binade, where the spacing is the same:
bits b < 2**11 represent b * 2**-24 exactly, and tensor cores support subnormal factors (Fasi et al.
2021, "Numerical behavior of NVIDIA tensor cores"). No bias and no conversion is needed: one LOP3
makes two weights. A field at bit p of its lane is 2**p times too large, which x compensates.

Codes are in two's complement. With their top bit flipped they are code + `offset`, unsigned.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.codecs import layout
from pallas_kernels.gpu import triton

EXACT = 11  # number of low bits of a float16 in which its value is linear


class Lanes(NamedTuple):
    """The arrangement of codes in the lanes of words.

    Attributes:
      bits: number of bits per code.
      lanes: number of lanes per word, 2 for float16 or 4 for int8.
    """

    bits: int
    lanes: int

    @property
    def unit(self) -> int:
        """Number of codes in the smallest run of whole words, which has `words` words."""
        return layout.unit(self.bits)[0]

    @property
    def words(self) -> int:
        """Number of words in a unit."""
        return layout.unit(self.bits)[1]

    @property
    def steps(self) -> int:
        """Number of codes of a unit in one lane; lane l has those from l steps on."""
        return self.unit // self.lanes

    @property
    def offset(self) -> int:
        """What `numbers` adds to codes; 8-bit codes in int8 lanes are used unchanged."""
        return 0 if (self.bits, self.lanes) == (8, 4) else 1 << (self.bits - 1)

    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Return the right shift of every step's stream, and the bit p at which its field remains.

        >>> Lanes(2, 2).shifts()[4:6]
        ((0, 8), (10, 0))
        """
        width, most = 32 // self.lanes, EXACT if self.lanes == 2 else self.bits
        found, down = [], 0
        for at in range(0, self.steps * self.bits, self.bits):
            if at // width != down // width:
                down = at // width * width
            if at - down + self.bits > most:
                down = at
            found.append((down, at - down))
        return tuple(found)

    def numbers(
        self, words: Sequence[Int32[Array, "r n"]], signed: bool = True
    ) -> list[Int32[Array, "r n"]]:
        """Return registers with the lanes of each step: (codes + `offset`) * 2**p.

        Args:
          words: the `words` words of every unit.
          signed: whether codes are signed. If False, no offset is added.
        """
        if self.offset and signed:
            top = sum(1 << i for i in range(self.bits - 1, self.unit * self.bits, self.bits))
            flip = (triton.signed(top >> 32 * i & 0xFFFFFFFF) for i in range(self.words))
            words = [w ^ jnp.int32(f) for w, f in zip(words, flip, strict=True)]
        elif self.steps == 1:
            return list(words)
        width, stream = 32 // self.lanes, self._streams(words)
        fill = sum(1 << width * lane for lane in range(self.lanes))
        found = []
        for down, at in self.shifts():
            i, down = divmod(down, width)
            field = ((1 << self.bits) - 1) << at
            here = _right(stream[i], down)
            inside = field & ((1 << (width - down)) - 1)
            register = triton.bit_and(here, inside * fill)
            if inside != field:  # the code continues in the lane's next word
                register |= triton.bit_and(stream[i + 1] << (width - down), (field ^ inside) * fill)
            found.append(register)
        return found

    def _streams(self, words: Sequence[Array]) -> list[Array]:
        """Return a unit's words rearranged so that each lane continues in the next word."""
        if self.words == 1:
            return list(words)
        # 96 bits are six halves or twelve bytes; word i takes part i of each lane.
        width, per = 32 // self.lanes, 3
        streams = []
        for i in range(per):
            parts = []
            for lane in range(self.lanes):
                word, at = divmod((lane * per + i) * width, 32)
                move = lane * width - at
                moved = words[word] << move if move > 0 else _right(words[word], -move)
                mask = triton.signed(((1 << width) - 1) << lane * width)
                parts.append(moved & jnp.int32(mask))
            streams.append(_union(parts))
        return streams


def _union(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total | part
    return total


def _right(word: Array, by: int) -> Array:
    return jax.lax.shift_right_logical(word, jnp.int32(by)) if by else word


def split(register: Int32[Array, "r n"], lanes: int) -> list[Array]:
    """Return the lanes of registers as arrays [r, n], lowest lane first.

    Two lanes are float16, four are int8.

    Args:
      register: int32 [r, n].
      lanes: number of lanes per word, 2 or 4.
    """
    width = 32 // lanes
    parts = [_right(register, width * lane) for lane in range(lanes)]
    if lanes == 4:
        return [part.astype(jnp.int8) for part in parts]
    return [jax.lax.bitcast_convert_type(part.astype(jnp.int16), jnp.float16) for part in parts]


def weave(registers: Sequence[Array], lanes: int, inner: int = 1) -> Array:
    """Return the lanes of registers [r, n] as one array [n, depth], without moving data.

    A row runs over (d, r, e, lane), where e counts `inner` registers and d the rest; see `woven`.
    Every thread keeps its data, since neighbors along a row are lanes of one register.

    Args:
      registers: int32 arrays [r, n].
      lanes: number of lanes per word, 2 or 4.
      inner: number of registers over which e counts.
    """
    parts = []
    for d in range(0, len(registers), inner):
        parts += [lane for e in range(inner) for lane in split(registers[d + e], lanes)]
    low, bits = (lanes * inner).bit_length() - 1, 0
    while len(parts) > 1:
        parts = [jnp.stack(two, axis=-1) for two in zip(parts[::2], parts[1::2], strict=True)]
        bits += 1
    rows, n = parts[0].shape[:2]
    axes = range(2, 2 + bits)  # the lowest bit first
    order = (1, *reversed(axes[low:]), 0, *reversed(axes[:low]))
    return jnp.transpose(parts[0], order).reshape(n, rows << bits)


def woven(place: Callable, rows: int, count: int, lanes: int, inner: int = 1) -> np.ndarray:
    """Return what `weave` produces: place(row, register, lane) for every entry of its rows.

    Args:
      place: function of (row, register, lane).
      rows: number of rows r of a register array.
      count: number of register arrays.
      lanes, inner: as in `weave`.

    >>> woven(lambda row, register, lane: 10 * row + register + 5 * lane, 2, 2, 2).tolist()
    [0, 5, 10, 15, 1, 6, 11, 16]
    """
    d, r, e, lane = np.meshgrid(
        np.arange(count // inner), np.arange(rows), np.arange(inner), np.arange(lanes),
        indexing="ij",
    )  # fmt: skip
    return place(r, d * inner + e, lane).reshape(-1)
