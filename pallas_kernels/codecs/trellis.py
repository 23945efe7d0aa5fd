"""Bit-shift trellis codes: what a state stands for, and 256 weights as a stream of bits.

A sequence is a circular stream of 256 K bits, most significant first, in 8 K int32 words (where
V = 4, in the order of `woven`). A step emits V weights and moves K V bits on; its state is the
L-bit window that starts at its bit. So every state can be read off the stream alone, and all of
them at once.

Every code gives integers, times one constant that makes their rms 1 over all states: a code in
use has no scale of its own. (3INST as published has rms 1.24; forgetting that costs 0.4 dB.)

Source: QTIP (Tseng et al. 2024, arXiv:2406.11235) for the trellis, "1mad", "3inst" and "hyb";
exllamav3 for "mcg" and "mul1". We differ: "3inst" and "mcg" add their two float16 exactly; the
512 points of "hyb" are a spiral, not k-means (Gaussian error 0.0690, not 0.0702, at 2 bits).

"vpu" is ours, for vector units: five operations on 32-bit lanes give four int8 weights. A state's
two bytes, signed, are multiplied; in each byte of the products' exclusive or a mask leaves two
fields of three bits, and times 15 it is 16 times their difference, but for a little of the byte
below.
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

SIDE = 16  # of a tile
WEIGHTS = SIDE * SIDE  # of one sequence: a tile
_BYTE_SUMS = {"1mad": (34038481, 76625530), "mul1": (0x83DCD12D, 0)}  # factor and term of a state
CODES = {"1mad": 1, "3inst": 1, "mul1": 1, "mcg": 1, "hyb": 2, "vpu": 4}  # weights of a step
# "vpu": a byte times SPREAD, bits of two such products that MASK keeps, times FOLD: 16 - 1.
SPREAD, MASK, FOLD = 4001079887, 0x77777777, 15


def check(L: int, K: int, V: int) -> None:
    """Raise ValueError unless L, K and V make a trellis.

    >>> check(16, 2, 1)
    """
    if V not in (1, 2, 4) or not 1 <= K <= 8 or not K * V <= L <= 16:
        raise ValueError(
            f"a trellis has V = 1, 2 or 4 weights a step, K = 1 to 8 bits a weight and states of "
            f"K V <= L <= 16 bits, got L = {L}, K = {K}, V = {V}"
        )


# --- codes: state -> weights ----------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def values(code: str, L: int, V: int) -> Float32[np.ndarray, "states V"]:
    """The table of a code: the V weights of every state, of rms 1 over all states.

    Args:
      code: one of `CODES`.
      L: bits of a state.
      V: weights of a step; each code has its own, `CODES[code]`.
    Returns:
      float32 [2**L, V], read-only.
    Raises:
      ValueError: no such code, or V is not the code's.

    >>> table = values("1mad", 12, 1)
    >>> table.shape, round(float(np.mean(table**2)), 6)
    ((4096, 1), 1.0)
    """
    one = unit(code, L, V)
    table = _integers(np.arange(1 << L, dtype=np.uint32), code).astype(np.float32) * one
    table.setflags(write=False)
    return table


def decode_states(states: Int[Array, "..."], code: str, L: int, V: int) -> Float32[Array, "... V"]:
    """The weights of states by integer arithmetic: equal to `values(code, L, V)[states]`.

    Only "hyb" reads a table, of 512 points.

    >>> import jax.numpy as jnp
    >>> bool((decode_states(jnp.arange(4096), "mul1", 12, 1) == values("mul1", 12, 1)).all())
    True
    """
    one = unit(code, L, V)
    return _integers(states.astype(jnp.uint32), code).astype(jnp.float32) * one


def hybrid(points: Float[Array, "512 2"], L: int) -> Float[Array, "states 2"]:
    """The table of a "hyb" code with other points, such as trained ones: linear in them.

    >>> import jax.numpy as jnp
    >>> hybrid(jnp.ones((512, 2)), 12).shape
    (4096, 2)
    """
    row, signs = _hybrid(np.arange(1 << L, dtype=np.uint32))
    return points[row] * signs


@functools.lru_cache(maxsize=32)
def unit(code: str, L: int, V: int) -> np.float32:
    """The weight that the integer 1 stands for."""
    if CODES.get(code) != V:
        raise ValueError(f"codes and their V are {CODES}, got {code!r} with V = {V}")
    check(L, 1, V)
    integers = _integers(np.arange(1 << L, dtype=np.uint32), code).astype(float)
    return np.float32(1 / math.sqrt(np.mean(integers**2)))  # the sum is exact on any machine


def byte_sum(code: str, L: int) -> tuple[int, int, np.float32] | None:
    """Factor, term and unit of a code whose weights are sums of bytes; None of another code.

    A weight is unit * (the sum of the four bytes of state * factor + term, less 510).

    >>> byte_sum("mul1", 16)[:2], byte_sum("mcg", 16)
    ((2212286765, 0), None)
    """
    return (*_BYTE_SUMS[code], unit(code, L, 1)) if code in _BYTE_SUMS else None


def _integers(states: Any, code: str) -> Any:
    """The weights of uint32 states [...] as integers [..., V], in NumPy or in JAX alike."""
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
        spread = lambda byte: ((byte ^ u(128)) - u(128)) * u(SPREAD)  # of a signed byte
        x = ((spread(states >> u(8)) ^ spread(states & u(255))) & u(MASK)) * u(FOLD)
        x = (x[..., None] >> np.arange(0, 32, 8, dtype=u)) & u(255)
        return (x.astype(np.int32) ^ 128) - 128
    row, signs = _hybrid(states)
    points = _spiral() if isinstance(states, np.ndarray) else jnp.asarray(_spiral())
    return points[row] * signs


def _half(h: Any) -> Any:
    """2^13 times the float16 whose bits are h; its exponent field must be 12 to 15."""
    u = np.uint32
    magnitude = ((h & u(0x3FF)) | u(0x400)) << ((h >> u(10)) & u(3))
    return magnitude.astype(np.int32) * (1 - 2 * (h >> u(15)).astype(np.int32))


def _hybrid(states: Any) -> tuple[Any, Any]:
    """Of uint32 states: the row of the table of 512, and the signs [..., 2] of its entries."""
    u = np.uint32
    x = states * (states + u(1))
    # Bit 15 negates the first entry; a bit that is never set leaves the second.
    signs = 1 - 2 * ((x[..., None] >> u(15)) & np.array([1, 0], u)).astype(np.int32)
    return (x >> u(6)) & u(511), signs


@functools.cache
def _spiral() -> Int[np.ndarray, "512 2"]:
    """512 points spread as N(0, 1) x N(0, 1) along a golden spiral, in units of 2^-10."""
    i = np.arange(512) + 0.5
    radius, angle = np.sqrt(-2 * np.log(1 - i / 512)), np.pi * (3 - math.sqrt(5)) * i
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.round(1024 * points).astype(np.int32)


# --- streams: states <-> words --------------------------------------------------------------


def pack(states: Int[Array, "s steps"], L: int, K: int, V: int) -> Int32[Array, "s words"]:
    """The streams of tail-biting paths: the top K V bits of every state, in order.

    Args:
      states: [s, 256 / V], each state's low L - K V bits the top ones of the next, circularly.
      L, K, V: bits of a state, bits of a weight, weights of a step.
    Returns:
      int32 [s, 8 K].

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
    left = 32 - bits - low.astype(np.int32)  # negative: the last -left bits are the next word's
    here = jnp.where(left >= 0, top << np.maximum(left, 0), top >> np.maximum(-left, 0))
    there = jnp.where(left >= 0, 0, top << (left % 32))
    # Bits are disjoint: a sum is their union.
    total = lambda part, mask: jnp.sum(part[:, mask], axis=-1, dtype=jnp.uint32)
    columns = [total(here, word == i) + total(there, word == i - 1) for i in range(per)]
    packed = jnp.stack(columns, axis=-1).reshape(len(states), 8 * K)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def states(words: Int32[Array, "... words"], L: int, K: int, V: int) -> Int32[Array, "... steps"]:
    """The state of every step of a stream: the L-bit window at its bit.

    Args:
      words: [..., 8 K].
      L, K, V: bits of a state, bits of a weight, weights of a step.
    Returns:
      int32 [..., 256 / V].

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
    for i in range(per):  # the steps whose first bit lies in word i of the run
        at = first[first // 32 == i] % 32
        window = (here[..., i, None] << at) | ((after[..., i, None] >> 1) >> (31 - at))
        parts.append(window >> (32 - L))
    found = parts[0] if per == 1 else jnp.concatenate(parts, axis=-1)
    return found.reshape(*words.shape[:-1], WEIGHTS // V).astype(jnp.int32)


def decode(
    words: Int32[Array, "... words"], L: int, K: int, V: int, code: str | Float[Array, "states V"]
) -> Float32[Array, "... 256"]:
    """The 256 weights of every stream.

    Args:
      words: [..., 8 K].
      L, K, V: bits of a state, bits of a weight, weights of a step.
      code: one of `CODES`, or a table [2**L, V].

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
    """The matrix of tiles of 16 x 16 weights, in equal blocks of rows with a rate and a scale each.

    Args:
      words: of every tile, down its column of tiles: 8 K of each, in the order of the blocks.
      scale: of each block.
      rates: K of each block, 0 to 8; one serves all.
      L, code: see `decode`.
      k: rows, a multiple of 16 len(rates).

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
    """A block of 16 rows as tiles, the weights of each in the order of its stream.

    Row-major; with V = 4, four rows of a column at a time, columns first.
    """
    if V == 4:
        return wide_trellis.tiles(w)
    return jnp.swapaxes(w.reshape(SIDE, -1, SIDE), 0, 1).reshape(-1, SIDE * SIDE)


def untiled(weights: Float[Array, "... t 256"], V: int) -> Float[Array, "... 16 n"]:
    """Inverse of `tiles`."""
    if V == 4:
        return wide_trellis.untiled(weights)
    *batch, t, _ = weights.shape
    w = jnp.swapaxes(weights.reshape(*batch, t, SIDE, SIDE), -3, -2)
    return w.reshape(*batch, SIDE, t * SIDE)


def _run(bits: int) -> tuple[int, int]:
    """(steps, words) of the shortest piece of stream in whole words."""
    steps = math.lcm(bits, 32) // bits
    return steps, steps * bits // 32
