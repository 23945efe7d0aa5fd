"""Products of float rows with packed weights: arrays and static values in, arrays out.

All are y = x @ w for a w [k, n] that stays packed: x [m, k] float32, bfloat16 or float16, y float32
[m, n]. `activations` says in which form x meets the codes (`pallas_kernels.activations`). Each is
served by a kernel of the platform it is lowered for, or by its `reference` (`dispatch`), is
differentiable in x and in its float arrays, and has its arguments checked (`checks.product`): a
ValueError names the one that is wrong.
"""

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import product


def packed_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None = None,
    *,
    bits: int,
    group_size: int,
    activations: str = "float",
    pad: bool = False,
) -> Float[Array, "m n"]:
    """x @ w for uniform codes: w = scale * (code - zero).

    Args:
      x: activations.
      codes: int32, packed along k (`layout.pack`).
      scale: of every group of rows and column, or [1, 1] for all; float16, bfloat16 or float32.
      zero: zero points packed along n; None if symmetric.
      bits: of a code, 2, 3, 4 or 8.
      group_size: rows of k that share a scale.
      activations: "float", "int8" or "int8/256".
      pad: allow a short last group.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes = layout.pack(jnp.array([[1], [-2]]), 4)
    >>> packed_matmul(jnp.ones((1, 2)), codes, jnp.array([[0.5]]), bits=4, group_size=2).tolist()
    [[-0.5]]
    """
    checks.whole_groups(x, group_size, pad)
    static = {"bits": bits, "group_size": group_size, "activations": activations}
    return product("packed_matmul", x, codes, scale, zero, **static)


def ternary_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    group_size: int,
    activations: str = "float",
    pad: bool = False,
) -> Float[Array, "m n"]:
    """x @ w for codes -1, 0 and 1 in 2-bit words: w = scale * code.

    Arguments as for `packed_matmul` at 2 bits. `layout.unpack_base3` makes the words of codes that
    are stored five to a byte.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes = layout.pack(jnp.array([[1], [-1], [0]]), 2)
    >>> x = jnp.array([[3.0, 1.0, 9.0]])
    >>> ternary_matmul(x, codes, jnp.array([[2.0]]), group_size=3).tolist()
    [[4.0]]
    """
    checks.whole_groups(x, group_size, pad)
    static = {"group_size": group_size, "activations": activations}
    return product("ternary_matmul", x, codes, scale, **static)


def codebook_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    table: tuple[float, ...] | str,
    bits: int,
    group_size: int,
    activations: str = "float",
    pad: bool = False,
) -> Float[Array, "m n"]:
    """x @ w for codes that name entries of a table: w = scale * table[code].

    Args:
      table: 2**bits values, in order of their codes; or a float8 dtype, whose bits the codes are.
      The others as for `packed_matmul`.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes = layout.pack(jnp.array([[1], [3]]), 2)
    >>> table = (0.0, 1.0, 2.0, 5.0)
    >>> x = jnp.ones((1, 2))
    >>> codebook_matmul(x, codes, jnp.array([[2.0]]), table=table, bits=2, group_size=2).tolist()
    [[12.0]]
    """
    checks.whole_groups(x, group_size, pad)
    static = {"bits": bits, "group_size": group_size, "activations": activations}
    return product("codebook_matmul", x, codes, scale, table=table, **static)


def e8p_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    residual: Int32[Array, "r n"] | None,
    scale: Float[Array, "1 1"],
    *,
    bits: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """x @ w for QuIP#'s lattice codes, eight rows to a code: w = scale * point (`e8p`).

    Args:
      codes: the low 16 bits of every octet's code, two octets a word, low half first.
      residual: the 8 (bits - 2) bits above them, packed alike; None at 2 bits.
      scale: one for the matrix.
      bits: 2, 3 or 4.

    >>> import jax.numpy as jnp
    >>> x, words = jnp.ones((1, 8)), jnp.zeros((1, 1), jnp.int32)
    >>> e8p_matmul(x, words, None, jnp.array([[2.0]]), bits=2).tolist()
    [[12.0]]
    """
    return product("e8p_matmul", x, codes, residual, scale, bits=bits, activations=activations)


def trellis_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w t"],
    scale: Float[Array, "b 1"],
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """x @ w for tiles of 16 x 16 weights that are paths of a bit-shift trellis (`trellis`).

    Args:
      codes: words of every tile, down its column of tiles, as `trellis.dequantize` takes them.
      scale: of each block of rows.
      rates: bits a weight of each block, 0 to 8.
      L: bits of a state.
      code: what a state stands for, one of `trellis.CODES`.

    >>> import jax.numpy as jnp
    >>> x, words = jnp.ones((1, 16)), jnp.zeros((16, 2), jnp.int32)
    >>> trellis_matmul(x, words, jnp.ones((1, 1)), rates=(2,), L=12, code="mul1").shape
    (1, 32)
    """
    static = {"rates": rates, "L": L, "code": code, "activations": activations}
    return product("trellis_matmul", x, codes, scale, **static)


def additive_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    codebooks: Float[Array, "M K d"],
    scale: Float[Array, "1 n"],
    *,
    bits: int,
    group: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """x @ w for sums of learned vectors (AQLM): w = scale * sum_i codebooks[i][code_i].

    Args:
      codes: M codes a group, packed down each column (`lookup.pack`).
      codebooks: 2**bits vectors of `group` rows each.
      scale: of every column.
      bits: of a code.
      group: rows that a code covers.

    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0], [1.0], [0.0], [0.0]]])
    >>> x, words, scale = jnp.ones((1, 2)), jnp.array([[1]]), jnp.array([[3.0]])
    >>> additive_matmul(x, words, books, scale, bits=2, group=1).tolist()
    [[3.0]]
    """
    static = {"bits": bits, "group": group, "activations": activations}
    return product("additive_matmul", x, codes, codebooks, scale, **static)


def dual_scale_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "1 n"],
    step: Float[Array, " k"],
    ranges: Int32[Array, "2 n"],
    escapes: Int32[Array, " e"],
    *,
    bits: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """x @ w for integers with a scale per row and per column: w = step * scale * (code + escape).

    Args:
      codes: int32, packed along k (`layout.pack`).
      scale: of every column, float32.
      step: of every row, float32.
      ranges: where the escapes of every column begin and end.
      escapes: what codes lack, column by column (`pallas_kernels.dual_scale`).
      bits: of a code, 2, 3, 4 or 8.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes, ranges = layout.pack(jnp.array([[1], [-2]]), 4), jnp.zeros((2, 1), jnp.int32)
    >>> parts = jnp.array([[0.5]]), jnp.array([1.0, 4.0]), ranges, jnp.zeros(1, jnp.int32)
    >>> dual_scale_matmul(jnp.ones((1, 2)), codes, *parts, bits=4).tolist()
    [[-3.5]]
    """
    arrays = codes, scale, step, ranges, escapes
    return product("dual_scale_matmul", x, *arrays, bits=bits, activations=activations)
