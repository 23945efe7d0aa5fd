"""Products of floating-point activations with packed quantized weights.

Every function returns y = x @ w for a weight w [k, n] that stays packed in memory. x is [m, k] in
float32, bfloat16 or float16; y is float32 [m, n]. The `activations` argument selects how x is
rounded before the product (`pallas_kernels.activations`). The product runs in a kernel of the
platform that the program is lowered for, or else in its jnp `reference` (see `dispatch`). It is
differentiable in x and in the floating-point arrays (scales, codebooks). All arguments are checked
(`checks.product`), and a ValueError names the one that is wrong.
"""

from jaxtyping import Array, Float, Int32, UInt8

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
    """Return x @ w for uniformly quantized weights, w = scale * (code - zero).

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n], signed codes packed along k (`layout.pack`).
      scale: [groups, n], or [groups, 1] if all columns share the scales; float16, bfloat16 or
        float32. groups = ceil(k / group_size).
      zero: int32 zero points [groups, words], packed along n; None for symmetric quantization.
      bits: number of bits per code, 2, 3, 4 or 8.
      group_size: number of consecutive rows of w that share a scale.
      activations: how x is quantized: "float" (not at all, the default), "int8" (a scale per row),
        "int8/256" (a scale per 256 channels of a row) or "codes" (x holds integers already).
      pad: whether the last group may be short; by default, group_size must divide k.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for ternary weights, w = scale * code with codes -1, 0 and 1.

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n] of 2-bit codes packed along k (`layout.pack`). For codes stored five
        to a byte, `layout.unpack_base3` returns these words.
      scale: [groups, n], or [groups, 1] if all columns share the scales.
      group_size: number of consecutive rows of w that share a scale.
      activations: how x is quantized, as in `packed_matmul`.
      pad: whether the last group may be short, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for scalar codebook weights, w = scale * table[code].

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n], codes packed along k (`layout.pack`).
      scale: [groups, n], or [groups, 1] if all columns share the scales.
      table: the 2**bits values of the codebook in code order, or the name of a float8 dtype, in
        which case each code is the bit pattern of such a float.
      bits: number of bits per code, 2, 3, 4 or 8.
      group_size: number of consecutive rows of w that share a scale.
      activations: how x is quantized, as in `packed_matmul`.
      pad: whether the last group may be short, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for QuIP#'s E8P lattice codes, w = scale * point (see `e8p`).

    One code covers eight consecutive rows of a column.

    Args:
      x: activations [m, k], float32, bfloat16 or float16; k is a multiple of 8.
      codes: int32 words [w, n] holding the low 16 bits of each code, two codes per word, the first
        in the low half.
      residual: int32 words [r, n] holding the remaining 8 * (bits - 2) bits of each code, packed
        the same way; None if bits is 2.
      scale: [1, 1], the scale of the whole matrix.
      bits: number of bits per weight, 2, 3 or 4.
      activations: how x is quantized, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for trellis-coded weights, in 16 x 16 tiles (see `trellis`).

    Each tile is one tail-biting path of a bit-shift trellis.

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n / 16] of every tile, stacked down each column of tiles, as
        `trellis.dequantize` takes them.
      scale: [b, 1], the scale of each of the b equal blocks of rows.
      rates: bits per weight of each block, 0 to 8; k is a multiple of 16 * b.
      L: number of bits of a trellis state, at most 16.
      code: the function from states to weights, a key of `trellis.CODES`.
      activations: how x is quantized, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for additive codebooks (AQLM), w = scale * sum_i codebooks[i][code_i].

    Args:
      x: activations [m, k], float32, bfloat16 or float16; k is a multiple of group.
      codes: int32 words [w, n], M codes per group of rows, packed down each column (`lookup.pack`).
      codebooks: [M, 2**bits, group], M codebooks of vectors.
      scale: [1, n], the scale of each column.
      bits: number of bits per code, a multiple of 2 or 3 from 2 to 16.
      group: number of consecutive rows that a code covers, the length of a vector.
      activations: how x is quantized, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

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
    """Return x @ w for integers with row and column scales, w = step * scale * (code + escape).

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n], codes packed along k (`layout.pack`).
      scale: [1, n], the scale of each column.
      step: float32 [k], the scale of each row.
      ranges: int32 [2, n], the first escape of each column and the one past its last.
      escapes: int32 [e], in column order: the part of each integer that exceeds the range of its
        code (`pallas_kernels.dual_scale`).
      bits: number of bits per code, 2, 3, 4 or 8.
      activations: how x is quantized, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes, ranges = layout.pack(jnp.array([[1], [-2]]), 4), jnp.zeros((2, 1), jnp.int32)
    >>> parts = jnp.array([[0.5]]), jnp.array([1.0, 4.0]), ranges, jnp.zeros(1, jnp.int32)
    >>> dual_scale_matmul(jnp.ones((1, 2)), codes, *parts, bits=4).tolist()
    [[-3.5]]
    """
    arrays = codes, scale, step, ranges, escapes
    return product("dual_scale_matmul", x, *arrays, bits=bits, activations=activations)


def float_planes_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    rest: Int32[Array, "r n"],
    base: UInt8[Array, "1 n"],
    near: Int32[Array, "b n"] | None,
    where: Int32[Array, " e"],
    exponent: UInt8[Array, " e"],
    *,
    dtype: str,
    bits: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """Return x @ w for floats stored without loss in planes (see `codecs.float_planes`).

    Args:
      x: activations [m, k], float32, bfloat16 or float16.
      codes: int32 words [w, n] of exponents relative to their column's base, packed along k.
      rest: int32 words [r, n] of signs and mantissas, packed along k.
      base: uint8 [1, n], the exponent of code 0 in each column.
      near: int32 [ceil(k / 128), n], what escapes mean; None if bits is 4.
      where: int32 [e], ascending places column * k + row of listed floats.
      exponent: uint8 [e], their exponents.
      dtype: dtype of the floats, a key of `float_fields.DTYPES`.
      bits: number of bits per code, 3 or 4.
      activations: how x is quantized, as in `packed_matmul`.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument has the wrong shape, dtype or value.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import float_fields, float_planes
    >>> w = jax.lax.bitcast_convert_type(jnp.array([[1.5], [-2.0]], jnp.bfloat16), jnp.uint16)
    >>> planes = float_planes.encode(w, "bfloat16", 3)
    >>> float_planes_matmul(jnp.ones((1, 2)), *planes, dtype="bfloat16", bits=3).tolist()
    [[-0.5]]
    """
    arrays = codes, rest, base, near, where, exponent
    static = {"dtype": dtype, "bits": bits, "activations": activations}
    return product("float_planes_matmul", x, *arrays, **static)
