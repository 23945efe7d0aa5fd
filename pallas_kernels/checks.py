"""Argument checks of the ops; a ValueError names the argument that is wrong.

`product` checks every product, whether it is called by a user or by the format of a weight.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels import row_tiles
from pallas_kernels.codecs import float_fields, float_planes, layout, lookup, trellis

FLOATS = ("float32", "bfloat16", "float16")


def rows(x: Float[Array, "m k"], activations: str) -> tuple[int, int]:
    """Return (m, k) of activations that an op accepts.

    Args:
      x: activations [m, k], of a dtype in `FLOATS`.
      activations: how x is rounded, one of `activations.FORMS`.
    Raises:
      ValueError: x or activations is not accepted.

    >>> rows(jnp.ones((2, 8)), "float")
    (2, 8)
    """
    forms.check(activations)
    if x.ndim != 2 or x.dtype.name not in FLOATS:
        raise ValueError(
            f"x must be [m, k] of {', '.join(FLOATS)}, got {x.dtype} {list(x.shape)}; "
            "reshape it, or cast it with x.astype"
        )
    return x.shape


def words(codes: Int32[Array, "w n"], expected: int, name: str = "codes") -> int:
    """Return n of packed int32 words [expected, n], or raise ValueError if they are not that.

    Args:
      codes: the words.
      expected: number of words per column.
      name: name of the argument in the message.
    """
    if codes.ndim != 2 or codes.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32 words [w, n], got {codes.dtype} {codes.shape}")
    if codes.shape[0] != expected:
        raise ValueError(f"{name} must have {expected} words per column, got {codes.shape[0]}")
    return codes.shape[1]


def check_bits(value: int) -> None:
    """Raise ValueError unless value is a number of bits that codes can have.

    Args:
      value: number of bits.
    """
    if value not in layout.BITS:
        raise ValueError(f"bits must be one of {layout.BITS}, got {value}")


def whole_groups(x: Float[Array, "m k"], group_size: int, pad: bool) -> None:
    """Raise ValueError if group_size does not divide k, unless pad allows a short last group.

    Args:
      x: activations [m, k].
      group_size: number of rows that share a scale.
      pad: whether the last group may be short.
    """
    _, k = rows(x, "float")
    if k % max(group_size, 1) and not pad:
        raise ValueError(
            f"group_size {group_size} does not divide k = {k}; use one that does, or pad=True "
            "for a short last group"
        )


def scales(scale: Float[Array, "g n"], g: int, n: int) -> None:
    """Raise ValueError unless scale is [g, n], or [g, 1] shared by all columns.

    Args:
      scale: the scales.
      g, n: expected number of groups and of columns.
    """
    if scale.dtype.name not in FLOATS or scale.shape not in ((g, n), (g, 1)):
        raise ValueError(
            f"scale must be [{g}, {n}] or [{g}, 1] of {', '.join(FLOATS)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )


def zeros(zero: Int32[Array, "g wn"] | None, scale: Array, width: int) -> None:
    """Raise ValueError unless zero is None or int32 zero points packed along n.

    There must be one row of words for each row of scale.

    Args:
      zero: the zero points, or None.
      scale: the scales [g, n].
      width: number of bits per zero point.
    """
    if zero is None:
        return
    g, n = scale.shape
    expected = (g, layout.words(n, width))
    if zero.dtype != jnp.int32 or zero.shape != expected:
        raise ValueError(
            f"zero must be int32 {list(expected)}, packed along n, got {zero.dtype} "
            f"{list(zero.shape)}"
        )


def multiple(k: int, of: int, what: str) -> None:
    """Raise ValueError unless k is a multiple of `of`, the number of rows that a code covers.

    Args:
      k: number of rows.
      of: number of rows that a code covers.
      what: what covers them, for the message.
    """
    if k % of:
        raise ValueError(f"x has k = {k} channels, but {what} cover {of} rows each; pad x and w")


def lookup_words(groups: int, m: int, width: int) -> int:
    """Return the number of words per column for `groups` groups of m codes of `width` bits."""
    digit = lookup.digit(width)
    return layout.words(groups * m * width // digit, digit)


def experts(stacks: Sequence[Array | None], group_sizes: Int32[Array, "e"]) -> None:
    """Raise ValueError unless the arrays of a grouped product have an axis of experts.

    Args:
      stacks: the arrays of the op after x, each with a leading axis of experts.
      group_sizes: number of rows of each expert.
    """
    if group_sizes is None or group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes must be int32 [experts], got {_brief(group_sizes)}; give the number of "
            "rows of each expert"
        )
    for i, a in enumerate(stacks):
        if a is not None and (a.ndim < 2 or len(a) != len(group_sizes)):
            raise ValueError(
                f"array {i + 1} after group_sizes must have a leading axis of {len(group_sizes)} "
                f"experts, as group_sizes has, got {_brief(a)}; stack the arrays of the experts"
            )


def _brief(a: Array | None) -> str:
    return "None" if a is None else f"{a.dtype} {list(a.shape)}"


# --- checks of single ops: their arguments are those of the op ------------------------------------


def _grouped(
    x: Array, codes: Array, scale: Array, width: int, group_size: int, activations: str
) -> None:
    _, k = rows(x, activations)
    check_bits(width)
    n = words(codes, layout.words(k, width))
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    scales(scale, -(-k // group_size), n)


def _packed(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    *,
    bits: int,
    group_size: int,
    activations: str,
) -> None:
    _grouped(x, codes, scale, bits, group_size, activations)
    zeros(zero, scale, bits)


def _ternary(x: Array, codes: Array, scale: Array, *, group_size: int, activations: str) -> None:
    _grouped(x, codes, scale, 2, group_size, activations)


def _codebook(
    x: Array,
    codes: Array,
    scale: Array,
    *,
    table: tuple[float, ...] | str,
    bits: int,
    group_size: int,
    activations: str,
) -> None:
    _grouped(x, codes, scale, bits, group_size, activations)
    if not isinstance(table, str) and len(table) != 1 << bits:
        raise ValueError(f"table must have {1 << bits} values for {bits} bits, got {len(table)}")
    if not isinstance(table, str) and not all(map(math.isfinite, table)):
        raise ValueError(f"table must have finite values, got {table}")


def _e8p(
    x: Array, codes: Array, residual: Array | None, scale: Array, *, bits: int, activations: str
) -> None:
    _, k = rows(x, activations)
    if bits not in (2, 3, 4) or (residual is None) != (bits == 2):
        raise ValueError(f"bits must be 2 without a residual, or 3 or 4 with one, got {bits}")
    multiple(k, 8, "E8P codes")
    words(codes, lookup_words(k // 8, 1, 16))
    if residual is not None:
        words(residual, lookup_words(k // 8, 1, 8 * (bits - 2)), "residual")
    scales(scale, 1, 1)


def _trellis(
    x: Array,
    codes: Array,
    scale: Array,
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    activations: str,
) -> None:
    _, k = rows(x, activations)
    if code not in trellis.CODES:
        raise ValueError(f"code must be one of {', '.join(trellis.CODES)}, got {code!r}")
    for rate in set(rates) - {0}:
        trellis.check(L, rate, trellis.CODES[code])
    multiple(k, 16 * len(rates), "blocks of trellis tiles")
    words(codes, sum(8 * rate * (k // 16 // len(rates)) for rate in rates))
    scales(scale, len(rates), 1)


def _additive(
    x: Array,
    codes: Array,
    codebooks: Array,
    scale: Array,
    *,
    bits: int,
    group: int,
    activations: str,
) -> None:
    _, k = rows(x, activations)
    multiple(k, group, "additive codes")
    if codebooks.ndim != 3 or codebooks.shape[1:] != (1 << bits, group):
        raise ValueError(
            f"codebooks must be [M, {1 << bits}, {group}], got {list(codebooks.shape)}"
        )
    n = words(codes, lookup_words(k // group, len(codebooks), bits))
    scales(scale, 1, n)


def _dual_scale(
    x: Array,
    codes: Array,
    scale: Array,
    step: Array,
    ranges: Array,
    escapes: Array,
    *,
    bits: int,
    activations: str,
) -> None:
    _, k = rows(x, activations)
    check_bits(bits)
    n = words(codes, layout.words(k, bits))
    scales(scale, 1, n)
    if step.shape != (k,) or step.dtype.name != "float32" or scale.shape != (1, n):
        raise ValueError(
            f"step must be float32 [{k}] and scale [1, {n}], got {step.dtype} {list(step.shape)} "
            f"and {list(scale.shape)}"
        )
    integers = {ranges.dtype, escapes.dtype} == {codes.dtype}
    if ranges.shape != (2, n) or escapes.ndim != 1 or not integers:
        raise ValueError(
            f"ranges must be int32 [2, {n}] and escapes int32 [e], got {ranges.dtype} "
            f"{list(ranges.shape)} and {escapes.dtype} {list(escapes.shape)}"
        )


def _float_planes(
    x: Array,
    codes: Array,
    rest: Array,
    base: Array,
    near: Array | None,
    where: Array,
    exponent: Array,
    *,
    dtype: str,
    bits: int,
    activations: str,
) -> None:
    _, k = rows(x, activations)
    if dtype not in float_fields.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(float_fields.DTYPES)}, got {dtype!r}")
    if bits not in float_planes.BITS or (near is None) != (bits == 4):
        raise ValueError(f"bits must be 3 with near, or 4 without it, got {bits}")
    n = words(codes, layout.words(k, bits))
    if words(rest, float_fields.rest_words(k, dtype), "rest") != n:
        raise ValueError(f"rest must have {n} columns, as codes, got {rest.shape[1]}")
    if near is not None and words(near, -(-k // float_planes.BLOCK), "near") != n:
        raise ValueError(f"near must have {n} columns, as codes, got {near.shape[1]}")
    if base.shape != (1, n) or base.dtype != jnp.uint8:
        raise ValueError(f"base must be uint8 [1, {n}], got {base.dtype} {list(base.shape)}")
    listed = (where.dtype.name, exponent.dtype.name) == ("int32", "uint8")
    if where.ndim != 1 or exponent.shape != where.shape or not listed or not where.size:
        raise ValueError(
            f"where must be int32 [e] and exponent uint8 [e] for some e > 0, got {_brief(where)} "
            f"and {_brief(exponent)}"
        )


_PRODUCTS: dict[str, Callable[..., None]] = {
    "packed_matmul": _packed, "ternary_matmul": _ternary, "codebook_matmul": _codebook,
    "e8p_matmul": _e8p, "trellis_matmul": _trellis, "additive_matmul": _additive,
    "dual_scale_matmul": _dual_scale, "float_planes_matmul": _float_planes,
}  # fmt: skip


def product(op: str, arrays: tuple, static: dict[str, Any]) -> None:
    """Raise ValueError unless these are valid arguments of a product.

    Args:
      op: a key of `reference.OPS`.
      arrays: x (or g, for a transposed product) and the arrays of the matrix.
      static: the static arguments of the op.
    """
    x, *matrix = arrays
    if op.startswith("grouped_"):
        *stacks, group_sizes = matrix
        experts(stacks, group_sizes)
        op, matrix = op.removeprefix("grouped_"), row_tiles.one(stacks)
    known = {"activations": "float", **static}
    if op not in _PRODUCTS:
        rows(x, "float")
        op, x = op.removesuffix("_transposed"), jax.ShapeDtypeStruct((1, known.pop("k")), "float32")
    _PRODUCTS[op](x, *matrix, **known)


def single(op: str) -> None:
    """Raise ValueError unless op is the name of a product with one matrix, or with its transpose.

    Args:
      op: the name.
    """
    if op.removesuffix("_transposed") not in _PRODUCTS:
        raise ValueError(f"op must be one of {', '.join(_PRODUCTS)}, got {op!r}")
