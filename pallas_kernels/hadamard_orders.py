"""Hadamard matrices from single constructions: Sylvester, Paley I and II, Goethals-Seidel.

A Hadamard matrix has entries +-1 and H H^T = order * I. The choice of matrix for an order is part
of the storage format of rotated models: once released, the matrix of an order must not change.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int8

# For orders 4 t that Paley's constructions do not give: the first rows of four circulants A, B, C,
# D of order t with A A^T + ... + D D^T = 4 t I. Bit t - 1 is the first entry, and a 1 bit stands
# for -1. All were found by our own search and are checked by the tests. The rows are constant on
# the orbits of a multiplier group of Z_t and were matched in pairs by their autocorrelation; 23 and
# 29 are Williamson's symmetric case; 47, 59 and 107 come from Turyn-type sequences, those of 107
# by Kharaghani and Tayfeh-Rezaie 2005 ("A Hadamard matrix of order 428", J. Combin. Designs 13).
# fmt: off
CIRCULANTS = {
    23: (0x14b34a, 0x33ad73, 0x20edc1, 0x380c07),
    29: (0x22f0f44, 0xd40602b, 0xcf50af3, 0xc659a63),
    39: (0x2923d35a28, 0xdfab4b813, 0x1f30baece1, 0x1a26081dc4),
    43: (0x259852d7996, 0x2e8c5e173a2, 0xaa7bc37360, 0x1bd41ddff3d),
    47: (0x3abdf1a489fb, 0x454271a40f64, 0x45420e5b89fb, 0x454271a4f09b),
    59: (0x5af300f449abbdb, 0x250cf8f449188e8, 0x250cff0bb6abbdb, 0x250cf8f449e7717),
    65: (0x583acb51562cb1e5, 0x28729fe4466d4834, 0x73685db5d847f9f3, 0x2c7aafe667fd1e24),
    67: (0x17afea7925d129df3, 0x31e63276c6d203bca, 0x37cf9a0fe7d32a3a9, 0x3aa8dc2a72074ff7a),
    73: (0xf599634b1ca532c58b, 0xaee5c5e13f231d48b, 0xff5d33fb2f25f74d24, 0xffd573111f8503818b),
    93: (0x2cfa576e9395bc5e638d69b, 0x26bc6fd8965579ea41bc39b,
          0xfd791543219b98052e81e34, 0xac6f8b6dfe0e7b6f377540),
    101: (0xae9d9f1e5612c3799e727a23b, 0x855cb71d588009c5d404df43b,
          0x2776e1996cc17fecd065a55cf, 0xdc3f929af0291401a38b529a3),
    107: (0x20b0898b70be68d4421e57c243d, 0x5f4f767488be68d44241ad98439,
          0x5f4f76748f41972bbd1e57c243d, 0x5f4f767488be68d442be5267bc6),
    113: (0xa8c974f6ecb3f40c01dd157e1c58, 0x5ec0a1630c7e475132cd2889e4a1,
          0xde216035188093173a056ba9f1c9, 0x37c65042e4b35e8532d8bdf59c13),
    119: (0x34e3f835750896ccde4429ab06f1cb, 0x8b2b963b95a4f8b7978ced9aebff,
          0x3f74f669dc7a7b074d6a7712751400, 0x3ff5f66ddc7a7347cd6a751a743440),
    127: (0x34e1faa7d7b190774cfd9c852ea87e74, 0x346af31b5eb4ad9e47d33ceb196f2750,
          0x36f37cb67dc194fa5d6d688f266b5710, 0x3fd5c44760c0c0def881488be82be7db),
}
# fmt: on


def constructible(order: int) -> bool:
    """Return whether a single construction gives a Hadamard matrix of this order.

    Args:
      order: the order of the matrix.

    >>> [n for n in range(4, 100, 4) if not constructible(n)]  # each is twice one that is
    [40, 56, 88, 96]
    """
    return _construction(order) is not None


@functools.cache
def construct(order: int) -> Int8[np.ndarray, "n n"]:
    """Return the int8 Hadamard matrix of this order from a single construction, read-only.

    Args:
      order: the order of the matrix.
    Raises:
      ValueError: no construction here gives one.
    Source: Sylvester 1867; Paley 1933 ("On orthogonal matrices"); Goethals and Seidel 1967.

    >>> construct(2).tolist()
    [[1, 1], [1, -1]]
    """
    make = _construction(order)
    if make is None:
        raise ValueError(f"no single construction gives a Hadamard matrix of order {order}")
    h = make().astype(np.int8)
    h.setflags(write=False)
    return h


def _construction(order: int) -> Callable[[], np.ndarray] | None:
    """Return the first construction that gives this order, or None."""
    if order > 0 and order & (order - 1) == 0:
        return functools.partial(_sylvester, order)
    if order <= 0 or order % 4:
        return None
    if field := _prime_power(order - 1):
        return functools.partial(_paley_skew, *field)
    if order % 8 == 4 and (field := _prime_power(order // 2 - 1)):
        return functools.partial(_paley_symmetric, *field)
    if order // 4 in CIRCULANTS:
        return functools.partial(_goethals_seidel, order // 4)
    return None


def _sylvester(order: int) -> np.ndarray:
    """Return the Kronecker power of [[1, 1], [1, -1]]: entry (i, j) is (-1)^popcount(i & j)."""
    i = np.arange(order)
    return 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.int8)


def _paley_skew(p: int, r: int) -> np.ndarray:
    """Return Paley I, I + C with C skew, of order q + 1 for q = p^r = 3 mod 4."""
    return np.eye(p**r + 1, dtype=int) + _conference(p, r, -1)


def _paley_symmetric(p: int, r: int) -> np.ndarray:
    """Return Paley II, built from a symmetric C, of order 2 (q + 1) for q = p^r = 1 mod 4."""
    c = _conference(p, r, 1)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(c, plus) + np.kron(np.eye(len(c), dtype=int), minus)


def _conference(p: int, r: int, corner: int) -> np.ndarray:
    """Return C of order q + 1 with zero diagonal and C C^T = q I.

    Entry (a, b) is the quadratic character of a - b; a border of +-1 is added.
    """
    q = p**r
    digits = np.arange(q)[:, None] // p ** np.arange(r) % p
    difference = (digits[:, None] - digits) % p @ p ** np.arange(r)
    c = np.zeros((q + 1, q + 1), int)
    c[0, 1:], c[1:, 0] = 1, corner
    c[1:, 1:] = _character(p, r)[difference]
    return c


def _character(p: int, r: int) -> np.ndarray:
    """Return the quadratic character of each element of GF(p^r): 0, 1 (square) or -1.

    An element is indexed by its coefficients read as digits in base p. Each x^r = a_0 + a_1 x + ...
    is tried in turn until x is primitive, that is, its powers run through all nonzero elements; the
    squares are then the even powers.
    """
    q = p**r
    for feedback in itertools.product(range(p), repeat=r):
        power: tuple[int, ...] = (1,) + (0,) * (r - 1)
        log: dict[tuple[int, ...], int] = {}
        while power not in log and any(power):
            log[power] = len(log)
            shifted, top = (0, *power[:-1]), power[-1]
            power = tuple((s + top * a) % p for s, a in zip(shifted, feedback, strict=True))
        if len(log) == q - 1:
            break
    chi = np.zeros(q, int)
    for element, exponent in log.items():
        chi[np.dot(element, p ** np.arange(r))] = (-1) ** exponent
    return chi


def _goethals_seidel(t: int) -> np.ndarray:
    """Return the matrix of order 4 t from four circulants.

    R, which reverses the order of columns, makes the blocks commute as required.
    """
    shift = (np.arange(t) - np.arange(t)[:, None]) % t
    rows = [np.array([1 - 2 * int(bit) for bit in f"{row:0{t}b}"]) for row in CIRCULANTS[t]]
    a, b, c, d = (row[shift] for row in rows)
    r = lambda m: m[:, ::-1]
    return np.block(
        [
            [a, r(b), r(c), r(d)],
            [-r(b), a, r(d.T), -r(c.T)],
            [-r(c), -r(d.T), a, r(b.T)],
            [-r(d), r(c.T), -r(b.T), a],
        ]
    )


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, r) with q = p^r and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    r = 1
    while p**r < q:
        r += 1
    return (p, r) if p**r == q else None
