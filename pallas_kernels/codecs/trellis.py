"""Bit-shift trellis codes: the weights of each state, and 256 weights as a stream of bits.

A sequence is a circular stream of 256 K bits, most significant first, in 8 K int32 words (for
V = 4, in the order of `wide_trellis`). A step emits V weights and advances K V bits; its state is
the L-bit window that starts at its bit. Every state can therefore be read from the stream alone,
and all of them in parallel.

Every code yields integers, multiplied by one constant that makes their rms 1 over all states, so
that a code needs no scale of its own. (3INST as published has rms 1.24; ignoring this costs 0.4
dB.)

Source: QTIP (Tseng et al. 2024, arXiv:2406.11235) for the trellis, "1mad", "3inst" and "hyb";
exllamav3 for "mcg" and "mul1". This implementation differs from these sources: "3inst" and "mcg"
add their two float16 exactly; the 512 points of "hyb" are a spiral, not k-means (Gaussian error
0.0690, not 0.0702, at 2 bits).

"vpu" is ours, designed for vector units: five operations on 32-bit lanes give four int8 weights.
The two bytes of a state, signed, are each multiplied by a constant. A mask keeps two fields of
three bits in each byte of the exclusive or of the products. Multiplied by 15, a byte is 16 times
the difference of its fields, apart from a small carry from the byte below.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.codecs import wide_trellis

SIDE = 16  # rows and columns of a tile
WEIGHTS = SIDE * SIDE  # weights of a sequence, which is a tile
_BYTE_SUMS = {"1mad": (34038481, 76625530), "mul1": (0x83DCD12D, 0)}  # (factor, term) of the hash
CODES = {"1mad": 1, "3inst": 1, "mul1": 1, "mcg": 1, "hyb": 2, "vpu": 4}  # code -> weights per step
# "vpu": SPREAD multiplies a byte, MASK keeps bits of two such products, FOLD is 16 - 1.
SPREAD, MASK, FOLD = 4001079887, 0x77777777, 15


def check(L: int, K: int, V: int) -> None:
    """Raise ValueError unless L, K and V define a trellis.

    Args:
      L: number of bits of a state.
      K: number of bits per weight.
      V: number of weights per step.

    >>> check(16, 2, 1)
    """
    if V not in (1, 2, 4) or not 1 <= K <= 8 or not K * V <= L <= 16:
        raise ValueError(
            "a trellis needs V = 1, 2 or 4 weights per step, K = 1 to 8 bits per "
            f"weight and states of K V <= L <= 16 bits, got L = {L}, K = {K}, V = {V}"
        )


# --- codes: state -> weights ----------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def values(code: str, L: int, V: int) -> Float32[np.ndarray, "states V"]:
    """Return the table of a code: the V weights of every state, with rms 1 over all states.

    Args:
      code: a key of `CODES`.
      L: number of bits of a state.
      V: number of weights per step; it must be `CODES[code]`.
    Returns:
      float32 [2**L, V], read-only.
    Raises:
      ValueError: there is no such code, or V is not the code's.

    >>> table = values("1mad", 12, 1)
    >>> table.shape, round(float(np.mean(table**2)), 6)
    ((4096, 1), 1.0)
    """
    one = unit(code, L, V)
    table = _integers(np.arange(1 << L, dtype=np.uint32), code).astype(np.float32) * one
    table.setflags(write=False)
    return table


def decode_states(states: Int[Array, "..."], code: str, L: int, V: int) -> Float32[Array, "... V"]:
    """Return the weights of states by integer arithmetic, equal to `values(code, L, V)[states]`.

    Only "hyb" reads a table, of 512 points.

    Args:
      states: integers in [0, 2**L).
      code, L, V: as in `values`.
    Returns:
      float32 [..., V].

    >>> import jax.numpy as jnp
    >>> bool((decode_states(jnp.arange(4096), "mul1", 12, 1) == values("mul1", 12, 1)).all())
    True
    """
    one = unit(code, L, V)
    return _integers(states.astype(jnp.uint32), code).astype(jnp.float32) * one


def hybrid(points: Float[Array, "512 2"], L: int) -> Float[Array, "states 2"]:
    """Return the table [2**L, 2] of a "hyb" code with other points, such as trained ones.

    The table is linear in the points.

    Args:
      points: [512, 2].
      L: number of bits of a state.

    >>> import jax.numpy as jnp
    >>> hybrid(jnp.ones((512, 2)), 12).shape
    (4096, 2)
    """
    row, signs = _hybrid(np.arange(1 << L, dtype=np.uint32))
    return points[row] * signs


@functools.lru_cache(maxsize=32)
def unit(code: str, L: int, V: int) -> np.float32:
    """Return the weight that the integer 1 stands for.

    Args:
      code, L, V: as in `values`.
    """
    if CODES.get(code) != V:
        raise ValueError(f"code and V must be a pair of {CODES}, got {code!r} with V = {V}")
    check(L, 1, V)
    integers = _integers(np.arange(1 << L, dtype=np.uint32), code).astype(float)
    return np.float32(1 / math.sqrt(np.mean(integers**2)))  # the sum is exact on any machine


def byte_sum(code: str, L: int) -> tuple[int, int, np.float32] | None:
    """Return (factor, term, unit) of a code whose weights are sums of bytes, else None.

    A weight is unit * (the sum of the four bytes of state * factor + term, minus 510).

    Args:
      code: a key of `CODES`.
      L: number of bits of a state.

    >>> byte_sum("mul1", 16)[:2], byte_sum("mcg", 16)
    ((2212286765, 0), None)
    """
    return (*_BYTE_SUMS[code], unit(code, L, 1)) if code in _BYTE_SUMS else None


def _integers(states: Any, code: str) -> Any:
    """Return the weights of uint32 states [...] as integers [..., V], in NumPy or JAX."""
    u = np.uint32
    if code in _BYTE_SUMS:
        factor, term = _BYTE_SUMS[code]
        x = states * u(factor) + u(term)
        x = (x & u(0x00FF00FF)) + ((x >> u(8)) & u(0x00FF00FF))
        return ((x + (x >> u(16))) & u(0xFFFF)).astype(np.int32)[..., None] - 510
    if code in ("3inst", "mcg"):  # the sum of two float16
        x = states * u(89226354) + u(64248484) if code == "3inst" else states * u(0xCBAC1FED)
        x = (x & u(0x8FFF8FFF)) ^ u(0x3B603B60)
        return (_half(x >> u(16)) + _half(x & u(0xFFFF)))[..., None]
    if code == "vpu":
        spread = lambda byte: ((byte ^ u(128)) - u(128)) * u(SPREAD)  # the byte is signed
        x = ((spread(states >> u(8)) ^ spread(states & u(255))) & u(MASK)) * u(FOLD)
        x = (x[..., None] >> np.arange(0, 32, 8, dtype=u)) & u(255)
        return (x.astype(np.int32) ^ 128) - 128
    row, signs = _hybrid(states)
    points = _spiral() if isinstance(states, np.ndarray) else jnp.asarray(_spiral())
    return points[row] * signs


def _half(h: Any) -> Any:
    """Return 2^13 times the float16 with the bits h, whose exponent field must be 12 to 15."""
    u = np.uint32
    magnitude = ((h & u(0x3FF)) | u(0x400)) << ((h >> u(10)) & u(3))
    return magnitude.astype(np.int32) * (1 - 2 * (h >> u(15)).astype(np.int32))


def _hybrid(states: Any) -> tuple[Any, Any]:
    """Return the row of uint32 states in the table of 512, and the signs [..., 2] of it."""
    u = np.uint32
    x = states * (states + u(1))
    # Bit 15 negates the first entry; the second is masked and stays positive.
    signs = 1 - 2 * ((x[..., None] >> u(15)) & np.array([1, 0], u)).astype(np.int32)
    return (x >> u(6)) & u(511), signs


@functools.cache
def _spiral() -> Int[np.ndarray, "512 2"]:
    """Return 512 points along a golden spiral, in units of 2^-10.

    They are distributed as N(0, 1) x N(0, 1).
    """
    i = np.arange(512) + 0.5
    radius, angle = np.sqrt(-2 * np.log(1 - i / 512)), np.pi * (3 - math.sqrt(5)) * i
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.round(1024 * points).astype(np.int32)


# --- streams: states <-> words --------------------------------------------------------------


def pack(states: Int[Array, "s steps"], L: int, K: int, V: int) -> Int32[Array, "s words"]:
    """Return the streams of tail-biting paths: the top K V bits of every state, in order.

    Args:
      states: [s, 256 / V]; the low L - K V bits of each state are the top bits of the next,
        circularly.
      L: number of bits of a state.
      K: number of bits per weight.
      V: number of weights per step.
    Returns:
      int32 words [s, 8 K].

    >>> import jax.numpy as jnp
    >>> words = jnp.arange(16).reshape(1, 16)
    >>> bool((pack(states(words, 12, 2, 1), 12, 2, 1) == words).all())
    True
    """
    check(L, K, V)
    bits = K * V
    run, per = _run(bits)
    if wide_trellis.fits(K, V):
        return wide_trellis.pack(states >> (L - bits), bits)
    top = (states >> (L - bits)).astype(jnp.uint32).reshape(-1, run)
    word, low = np.divmod(np.arange(run, dtype=np.uint32) * bits, 32)
    left = 32 - bits - low.astype(np.int32)  # if negative, -left bits go to the next word
    here = jnp.where(left >= 0, top << np.maximum(left, 0), top >> np.maximum(-left, 0))
    there = jnp.where(left >= 0, 0, top << (left % 32))
    # Bits are disjoint, so that a sum is their union.
    total = lambda part, mask: jnp.sum(part[:, mask], axis=-1, dtype=jnp.uint32)
    columns = [total(here, word == i) + total(there, word == i - 1) for i in range(per)]
    packed = jnp.stack(columns, axis=-1).reshape(len(states), 8 * K)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def states(words: Int32[Array, "... words"], L: int, K: int, V: int) -> Int32[Array, "... steps"]:
    """Return the state of every step of a stream: the L-bit window at its bit.

    Args:
      words: int32 [..., 8 K].
      L: number of bits of a state.
      K: number of bits per weight.
      V: number of weights per step.
    Returns:
      int32 [..., 256 / V].
    Raises:
      ValueError: L, K and V define no trellis, or the number of words does not match.

    >>> import jax.numpy as jnp
    >>> states(jnp.zeros((1, 16), jnp.int32).at[0, 0].set(1 << 30), 12, 2, 1)[0, -3:].tolist()
    [16, 64, 256]
    """
    check(L, K, V)
    bits = K * V
    run, per = _run(bits)
    if words.shape[-1] != 8 * K:
        raise ValueError(f"256 weights of {K} bits take {8 * K} words, got {words.shape[-1]}")
    if wide_trellis.fits(K, V):
        return wide_trellis.states(words, L, bits)
    here = jax.lax.bitcast_convert_type(words, jnp.uint32)
    after = jnp.roll(here, -1, axis=-1)
    here, after = (a.reshape(*words.shape[:-1], -1, per) for a in (here, after))
    first = np.arange(run, dtype=np.uint32) * bits
    parts = []
    for i in range(per):  # the steps whose first bit is in word i of the run
        at = first[first // 32 == i] % 32
        window = (here[..., i, None] << at) | ((after[..., i, None] >> 1) >> (31 - at))
        parts.append(window >> (32 - L))
    found = parts[0] if per == 1 else jnp.concatenate(parts, axis=-1)
    return found.reshape(*words.shape[:-1], WEIGHTS // V).astype(jnp.int32)


def decode(
    words: Int32[Array, "... words"], L: int, K: int, V: int, code: str | Float[Array, "states V"]
) -> Float32[Array, "... 256"]:
    """Return the 256 weights of every stream, float32 [..., 256].

    Args:
      words: int32 [..., 8 K].
      L: number of bits of a state.
      K: number of bits per weight.
      V: number of weights per step.
      code: a key of `CODES`, or a table [2**L, V].

    >>> import jax.numpy as jnp
    >>> w = decode(jnp.arange(16).reshape(1, 16), 12, 2, 1, "mul1")
    >>> w.shape, bool((w == decode(jnp.arange(16)[None], 12, 2, 1, values("mul1", 12, 1))).all())
    ((1, 256), True)
    """
    s = states(words, L, K, V)
    found = decode_states(s, code, L, V) if isinstance(code, str) else jnp.asarray(code)[s]
    return found.astype(jnp.float32).reshape(*words.shape[:-1], WEIGHTS)


def dequantize(
    words: Int32[Array, "... w t"],
    scale: Float[Array, "... b 1"],
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    k: int,
) -> Float32[Array, "... k n"]:
    """Return the matrix of 16 x 16 tiles, in equal blocks of rows with a rate and a scale each.

    Args:
      words: int32 [..., w, n / 16], the words of every tile stacked down its column of tiles, 8 K
        for each, in the order of the blocks.
      scale: [..., blocks, 1], the scale of each block.
      rates: K of each block, 0 to 8; its length is the number of blocks.
      L: number of bits of a state.
      code: a key of `CODES`.
      k: number of rows, a multiple of 16 * len(rates).
    Returns:
      float32 [..., k, n].

    >>> import jax.numpy as jnp
    >>> words, scale = jnp.zeros((16, 2), jnp.int32), jnp.array([[2.0]])
    >>> dequantize(words, scale, rates=(2,), L=12, code="mul1", k=16).shape
    (16, 32)
    """
    *batch, _, t = words.shape
    V = CODES[code]
    per = k // SIDE // len(rates)
    parts, word = [], 0
    for rate, run in itertools.groupby(rates):
        blocks = per * len(list(run))
        here = words[..., word : word + 8 * rate * blocks, :]
        word += 8 * rate * blocks
        if rate == 0:
            parts.append(jnp.zeros((*batch, blocks, SIDE, t * SIDE)))
            continue
        streams = jnp.swapaxes(here.reshape(*batch, blocks, 8 * rate, t), -1, -2)
        parts.append(untiled(decode(streams, L, rate, V, code), V))
    w = jnp.concatenate(parts, axis=-3).reshape(*batch, len(rates), -1, t * SIDE)
    return (w * scale[..., None]).reshape(*batch, k, t * SIDE)


def tiles(w: Float[Array, "16 n"], V: int) -> Float[Array, "t 256"]:
    """Return a block of 16 rows as tiles [n / 16, 256], each in the order of its stream.

    The order is row-major; for V = 4, it takes four rows at a time, column by column.

    Args:
      w: [16, n].
      V: number of weights per step.
    """
    if V == 4:
        return wide_trellis.tiles(w)
    return jnp.swapaxes(w.reshape(SIDE, -1, SIDE), 0, 1).reshape(-1, SIDE * SIDE)


def untiled(weights: Float[Array, "... t 256"], V: int) -> Float[Array, "... 16 n"]:
    """Return tiles [..., t, 256] as rows [..., 16, 16 t]; the inverse of `tiles`.

    Args:
      weights: [..., t, 256].
      V: number of weights per step.
    """
    if V == 4:
        return wide_trellis.untiled(weights)
    *batch, t, _ = weights.shape
    w = jnp.swapaxes(weights.reshape(*batch, t, SIDE, SIDE), -3, -2)
    return w.reshape(*batch, SIDE, t * SIDE)


def _run(bits: int) -> tuple[int, int]:
    """Return (steps, words) of the shortest piece of stream in whole words."""
    steps = math.lcm(bits, 32) // bits
    return steps, steps * bits // 32
