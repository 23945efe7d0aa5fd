"""CPU kernels in C++, called through `jax.ffi` on the stored words (see `native`).

Every op also accepts several matrices that share x (`shared`): x is prepared once, and one call
distributes the columns of all matrices over the threads. In its grouped form, an op reads the words
of those experts that have rows from the stack, in place; experts with equally many rows share the
work as the matrices of `shared` do. The instruction set is selected at run time.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from pallas_kernels import activations as forms
from pallas_kernels import row_tiles
from pallas_kernels.codecs import e8p, float_fields, float_planes, trellis
from pallas_kernels.cpu import native
from pallas_kernels.kernel import Kernel

_FLOATS = ("float16", "bfloat16", "float32")
_BEST = -1  # selects the widest instruction set of the machine
_MOST_GROUP = 64  # maximum number of rows of an additive code
_FEW = 8  # maximum number of queries; for more, matrix products are faster

Matrix = tuple[Array | None, ...]  # the arrays of one matrix, in the order of the op


def shared(
    op: str, x: Float[Array, "m k"], matrices: Sequence[Matrix], **static: Any
) -> tuple[Float[Array, "m n"], ...]:
    """Return the products of one x with several matrices of one format, in one call.

    Args:
      op: a key of `KERNELS`.
      x: activations [m, k].
      matrices: for each matrix, the arrays of the op after x.
      **static: the static arguments of the op, and optionally `most`, the index of the widest
        instruction set to use (`native.instruction_sets`); by default all are allowed.
    Returns:
      A tuple of float32 [m, n], one per matrix.
    Raises:
      ValueError: op has no such kernel.
      RuntimeError: there are no native kernels.

    >>> from pallas_kernels.codecs import layout
    >>> codes, scale = layout.pack(jnp.array([[1], [-2]]), 4), jnp.array([[0.5]])
    >>> static = {"bits": 4, "group_size": 2}
    >>> if not native.load():
    ...     two = shared("packed_matmul", jnp.ones((1, 2)), [(codes, scale, None)] * 2, **static)
    ...     assert [y.tolist() for y in two] == [[[-0.5]], [[-0.5]]]
    """
    if op not in _CALLS:
        raise ValueError(f"op must be one of {', '.join(_CALLS)}, got {op!r}")
    return _CALLS[op](x, matrices, **static)


# --- calls ----------------------------------------------------------------------------------


def _call(
    target: str, x: Array, first: tuple, rest: Sequence[Array], widths: Sequence[int],
    groups: Array | None = None, **static: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """Make one foreign call with a result [m, n] for every n of `widths`.

    With `groups`, the number of rows of each expert, every array of `rest` is a stack.
    """
    if reason := native.load():
        raise RuntimeError(f"no native kernels: {reason}")
    form = forms.FORMS.index(static.pop("activations"))
    shapes = tuple(jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32) for n in widths)
    call = jax.ffi.ffi_call(target, shapes, vmap_method="sequential")
    x, groups = x.astype(jnp.float32), _none() if groups is None else groups
    return tuple(call(x, groups, *first, *rest, activations=np.int32(form), **static))


def _none() -> Array:
    """Return the placeholder of an absent array."""
    return jnp.zeros((0,), jnp.int32)


def _packed(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    group_size: int,
    activations: str = "float",
    table: tuple[float, ...] = (),
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    arrays = [_none() if a is None else a for matrix in matrices for a in matrix]
    return _call(
        "jaxquant_packed", x, (), arrays, [codes.shape[-1] for codes, *_ in matrices],
        bits=np.int32(bits), group_size=np.int32(group_size), activations=activations,
        table=np.asarray(table, np.float32), most=np.int32(most), groups=groups,
    )  # fmt: skip


def _ternary(x: Array, matrices: Sequence[Matrix], **static: Any) -> tuple[Array, ...]:
    return _packed(x, [(*matrix, None) for matrix in matrices], bits=2, **static)


def _e8p(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    activations: str = "float",
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    arrays = [_none() if a is None else a for matrix in matrices for a in matrix]
    fine = np.float32(0 if bits == 2 else e8p.FINE[bits])
    return _call(
        "jaxquant_e8p", x, (jnp.asarray(_nibbles()),), arrays,
        [codes.shape[-1] for codes, *_ in matrices],
        bits=np.int32(bits), fine=fine, activations=activations, most=np.int32(most), groups=groups,
    )  # fmt: skip


@functools.cache
def _nibbles() -> np.ndarray:
    """Return int32 [3, 256], each eight 4-bit integers c: for rows, signs, and 3-bit residuals.

    The exclusive or of the words of a row and of signs holds the c of (c + 1/2) / 2; that of a
    residual the c of c / 2. See native/e8p.cc.

    >>> hex(_nibbles()[0, 0] ^ _nibbles()[1, 0])  # all coordinates 1/2, none negative, shifted up
    '0x11111111'
    """
    rows = e8p.table()
    odd = (rows.sum(1) % 2 == 1)[:, None] & (np.arange(8) == 7)
    up = 2 * (rows - 0.5).astype(np.int64)  # the 8 of 8 + 2 t makes c a two's complement number
    by_row = np.where(odd, up ^ 14, up)
    s = np.arange(256)
    down = np.array([int(i).bit_count() % 2 for i in s])
    negative = (s ^ down)[:, None] >> np.argsort(e8p.ORDER) & 1
    by_signs = 14 * negative + (1 - down)[:, None]
    words = [by_row, by_signs, (2 * e8p.e81b_table()).astype(np.int64)]
    packed = [np.sum((nibbles & 15) << 4 * np.arange(8), axis=1) for nibbles in words]
    return np.stack(packed).astype(np.uint32).view(np.int32)


def _trellis(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    activations: str = "float",
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    weights = trellis.CODES[code]
    if weights == 4:
        raise ValueError(
            f"the native kernels do not support the order of weights in {code!r} tiles"
        )
    factor, term, unit = trellis.byte_sum(code, L) or (0, 0, np.float32(0))
    table = np.zeros((0, 1), np.float32) if factor else trellis.values(code, L, weights)
    return _call(
        "jaxquant_trellis", x, (jnp.asarray(table),), [a for matrix in matrices for a in matrix],
        [codes.shape[-1] * trellis.SIDE for codes, *_ in matrices],
        rates=np.asarray(rates, np.int32), L=np.int32(L), weights=np.int32(weights),
        factor=np.uint32(factor).astype(np.int32), term=np.uint32(term).astype(np.int32),
        unit=unit, activations=activations, most=np.int32(most), groups=groups,
    )  # fmt: skip


def _additive(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    group: int,
    activations: str = "float",
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    return _call(
        "jaxquant_additive", x, (), [a for matrix in matrices for a in matrix],
        [codes.shape[-1] for codes, *_ in matrices],
        bits=np.int32(bits), group=np.int32(group), activations=activations, most=np.int32(most),
        groups=groups,
    )  # fmt: skip


def _dual_scale(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    activations: str = "float",
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    return _call(
        "jaxquant_dual_scale", x, (), [a for matrix in matrices for a in matrix],
        [codes.shape[-1] for codes, *_ in matrices],
        bits=np.int32(bits), activations=activations, most=np.int32(most), groups=groups,
    )  # fmt: skip


def _float_planes(
    x: Array,
    matrices: Sequence[Matrix],
    *,
    dtype: str,
    bits: int,
    activations: str = "float",
    most: int = _BEST,
    groups: Array | None = None,
) -> tuple[Array, ...]:
    arrays = [_none() if a is None else a for matrix in matrices for a in matrix]
    return _call(
        "jaxquant_float_planes", x, (), arrays, [codes.shape[-1] for codes, *_ in matrices],
        type=_number(dtype), bits=np.int32(bits), activations=activations, most=np.int32(most),
        groups=groups,
    )  # fmt: skip


def decode_float_planes(
    planes: float_planes.Planes, *, dtype: str, bits: int, k: int, most: int = _BEST
) -> UInt[Array, "k n"]:
    """Return the bits of the floats of a matrix, as `float_planes.decode` does.

    Args:
      planes: the packed arrays.
      dtype: a key of `float_fields.DTYPES`.
      bits: width of a code, 3 or 4.
      k: number of rows.
      most: index of the widest instruction set to use (`native.instruction_sets`); by default all
        are allowed.
    Raises:
      RuntimeError: there are no native kernels.

    >>> u = jnp.array([[0x3F80], [0x0001], [0xFFFF]], jnp.uint16)
    >>> planes = float_planes.encode(u, "bfloat16", 3)
    >>> if not native.load():
    ...     decoded = decode_float_planes(planes, dtype="bfloat16", bits=3, k=3)
    ...     assert decoded.tolist() == u.tolist()
    """
    if reason := native.load():
        raise RuntimeError(f"no native kernels: {reason}")
    shape = jax.ShapeDtypeStruct((k, planes.codes.shape[-1]), float_fields.unsigned(dtype))
    call = jax.ffi.ffi_call("jaxquant_float_planes_decode", shape, vmap_method="sequential")
    arrays = [_none() if a is None else a for a in planes]
    return call(*arrays, type=_number(dtype), bits=np.int32(bits), most=np.int32(most))


def _number(dtype: str) -> np.int32:
    """Return the place of a dtype among those of float planes."""
    return np.int32(list(float_fields.DTYPES).index(dtype))


_CALLS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "packed_matmul": _packed,
    "ternary_matmul": _ternary,
    "codebook_matmul": lambda x, matrices, **static: _packed(
        x, [(*matrix, None) for matrix in matrices], **static
    ),
    "e8p_matmul": _e8p,
    "trellis_matmul": _trellis,
    "additive_matmul": _additive,
    "dual_scale_matmul": _dual_scale,
    "float_planes_matmul": _float_planes,
}


def _alone(op: str, x: Array, *matrix: Array | None, **static: Any) -> Float[Array, "m n"]:
    return shared(op, x, [matrix], **static)[0]


def _grouped(op: str, x: Array, *arrays: Array | None, **static: Any) -> Float[Array, "m n"]:
    *stacks, groups = arrays
    return _CALLS[op](x, [tuple(stacks)], groups=groups, **static)[0]


# --- what is served -------------------------------------------------------------------------


def _serves(op: str, x: jax.ShapeDtypeStruct, *matrix: Any, **static: Any) -> str:
    if reason := native.load():
        return f"no native kernels: {reason}"
    if str(x.dtype) not in _FLOATS:
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    if isinstance(static.get("table"), str):
        return "float8 codes have no native kernel"
    if static.get("group", 0) > _MOST_GROUP:
        return f"additive codes of more than {_MOST_GROUP} rows have no native kernel"
    if trellis.CODES.get(static.get("code", ""), 1) == 4:
        return f"the trellis code {static['code']!r} has no native kernel"
    if op == "dual_scale_matmul" and {str(a.dtype) for a in matrix[1:3]} != {"float32"}:
        return "steps and scales that are not float32 have no native kernel"
    if op == "float_planes_matmul":
        return ""
    stored = [str(a.dtype) for a in matrix if a is not None and a.dtype != jnp.int32]
    odd = [dtype for dtype in stored if dtype not in _FLOATS]
    return f"scales of dtype {odd[0]} have no native kernel" if odd else ""


def _serves_grouped(op: str, x: jax.ShapeDtypeStruct, *arrays: Any, **static: Any) -> str:
    return _serves(op, x, *row_tiles.one(arrays[:-1]), **static)


# --- attention ------------------------------------------------------------------------------


def _attention(q: Array, k: Array, v: Array, positions: Array, most: int = _BEST) -> Array:
    call = jax.ffi.ffi_call(
        "jaxquant_attention",
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        vmap_method="sequential",
    )
    return call(q.astype(jnp.float32), k, v, positions, most=np.int32(most))


def _serves_attention(q: Any, k: Any, v: Any, positions: Any) -> str:
    if reason := native.load():
        return f"no native kernels: {reason}"
    if q.shape[1] > _FEW:
        return f"attention of more than {_FEW} queries is faster as matrix products"
    if q.shape[3] % 16:
        return f"heads of {q.shape[3]} channels, not a multiple of 16, have no native kernel"
    return ""


def _kv_attention(q: Array, *arrays: Array, most: int = _BEST) -> Array:
    call = jax.ffi.ffi_call(
        "jaxquant_kv_attention",
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        vmap_method="sequential",
    )
    return call(q.astype(jnp.float32), *arrays, most=np.int32(most))


def _serves_kv_attention(q: Any, k: Any, v: Any, *arrays: Any) -> str:
    frequencies, channels = arrays[2], q.shape[3] // arrays[-1].shape[3]
    if frequencies.size and q.shape[3] % 32:
        return (
            f"heads of {q.shape[3]} channels with RoPE, not a multiple of 32, have no native kernel"
        )
    if channels % 16:
        return f"scales for {channels} channels, not a multiple of 16, have no native kernel"
    return _serves_attention(q, k, v, None)


KERNELS = {
    op: Kernel(partial(_alone, op), partial(_serves, op), partial(shared, op)) for op in _CALLS
}
KERNELS |= {
    f"grouped_{op}": Kernel(partial(_grouped, op), partial(_serves_grouped, op)) for op in _CALLS
}
KERNELS["attention"] = Kernel(_attention, _serves_attention)
KERNELS["kv_attention"] = Kernel(_kv_attention, _serves_kv_attention)
