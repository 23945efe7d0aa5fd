"""Packed codes as numbers that a tensor core multiplies, several to a register, by masks alone.

A word holds lanes: 2 of 16 bits for float16, 4 of 8 bits for int8. What a mask leaves in a lane is
a number already. As float16 it is a subnormal one, or one of the first binade, where the spacing
is the same: bits b < 2**11 stand for b * 2**-24, exactly, and tensor cores take subnormal factors
as they are (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"). No bias, no conversion:
one LOP3 makes two weights. A field at bit p of its lane counts 2**p times; x undoes that.

Codes are two's complement. Their top bit flipped, they are code + `offset`, unsigned.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.codecs import layout
from pallas_kernels.gpu import triton

EXACT = 11  # low bits of a float16 that are linear in the number


class Lanes(NamedTuple):
    """How codes of so many bits lie in the lanes of words.

    Attributes:
      bits: of a code.
      lanes: of a word; 2 for float16, 4 for int8.
    """

    bits: int
    lanes: int

    @property
    def unit(self) -> int:
        """Codes of the smallest run of whole words, `words` of them."""
        return layout.unit(self.bits)[0]

    @property
    def words(self) -> int:
        """Words of a unit."""
        return layout.unit(self.bits)[1]

    @property
    def steps(self) -> int:
        """Codes of a unit in one lane: lane l has the codes l steps ... (l + 1) steps."""
        return self.unit // self.lanes

    @property
    def offset(self) -> int:
        """What `numbers` adds to codes; int8 lanes hold 8-bit codes as they are."""
        return 0 if (self.bits, self.lanes) == (8, 4) else 1 << (self.bits - 1)

    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Of every step: how far its stream is moved down, and the bit p where its field is left.

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
        """Registers of the lanes of each step: codes + `offset`, times 2**p.

        Args:
          words: the `words` words of every unit.
          signed: False if codes are unsigned; nothing is added to them.
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
            if inside != field:  # the code goes on in the lane's next word
                register |= triton.bit_and(stream[i + 1] << (width - down), (field ^ inside) * fill)
            found.append(register)
        return found

    def _streams(self, words: Sequence[Array]) -> list[Array]:
        """A unit's words so that each lane goes on in the same lane of the next."""
        if self.words == 1:
            return list(words)
        # 96 bits are six halves or twelve bytes; word i takes part i of each lane's.
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
    """The lanes of registers as arrays [r, n] of float16 (2) or int8 (4), lowest first."""
    width = 32 // lanes
    parts = [_right(register, width * lane) for lane in range(lanes)]
    if lanes == 4:
        return [part.astype(jnp.int8) for part in parts]
    return [jax.lax.bitcast_convert_type(part.astype(jnp.int16), jnp.float16) for part in parts]


def weave(registers: Sequence[Array], lanes: int, inner: int = 1) -> Array:
    """One array [n, depth] of the lanes of registers [r, n], along its rows without a move.

    Its row runs over (d, r, e, lane): e counts `inner` registers, d the rest; see `woven`. Every
    thread keeps what it has: neighbours along the row are lanes of one register.
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
    """What `weave` puts where: place(row, register, lane) of every entry of its rows.

    >>> woven(lambda row, register, lane: 10 * row + register + 5 * lane, 2, 2, 2).tolist()
    [0, 5, 10, 15, 1, 6, 11, 16]
    """
    d, r, e, lane = np.meshgrid(
        np.arange(count // inner), np.arange(rows), np.arange(inner), np.arange(lanes),
        indexing="ij",
    )  # fmt: skip
    return place(r, d * inner + e, lane).reshape(-1)
