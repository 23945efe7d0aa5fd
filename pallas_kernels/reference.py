"""The jnp definition of every op, which also runs where no kernel is available.

Each op computes x @ w for the matrix w that packed arrays decode to; `..._transposed` computes
g @ w.T. Arrays are positional arguments, static values keyword arguments. Weights are multiplied in
x's dtype; sums and results are float32. If `activations` is not "float", x is first rounded
accordingly and everything is float32. A row of x or g that is not finite gives NaN, as
`pallas_kernels.activations` explains.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import activations as forms
from pallas_kernels import dual_scale, row_tiles, tiled_product
from pallas_kernels.codecs import e8p, float_fields, float_planes, layout, lookup, tables, trellis

# --- decoding of packed arrays --------------------------------------------------------------


def dequantize(
    codes: Int32[Array, "... w n"],
    scale: Float[Array, "... g n"],
    zero: Int32[Array, "... g wn"] | None,
    *,
    bits: int,
    group_size: int,
    k: int,
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "... k n"]:
    """Return the weights of uniform codes: scale * (code - zero), in float32, then cast.

    Args:
      codes: int32 words [..., words(k, bits), n], packed along k (`layout.pack`).
      scale: [..., groups, n], or [..., 1, 1] if one scale serves the matrix.
      zero: int32 [..., groups, words(n, bits)], packed along n; None for symmetric quantization.
      bits: number of bits per code, 2, 3, 4 or 8.
      group_size: number of rows that share a scale; groups = ceil(k / group_size).
      k: number of rows, given because the packed axis may be padded.
      dtype: dtype of the result.
    Returns:
      [..., k, n].

    >>> codes = layout.pack(jnp.array([[1], [-2]]), 4)
    >>> dequantize(codes, jnp.array([[0.5]]), None, bits=4, group_size=2, k=2).ravel().tolist()
    [0.5, -1.0]
    """
    zero = None if zero is None else zero_points(zero, bits, scale.shape[-1])
    w = _integers(codes, scale, zero, bits, group_size, k)
    return w.astype(dtype)


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def zero_points(zero: Int32[Array, "... g wn"], bits: int, n: int) -> Int[Array, "... g n"]:
    """Return int8 zero points [..., g, n], unpacked along n.

    Args:
      zero: int32 [..., g, words(n, bits)], packed along n.
      bits: number of bits per zero point.
      n: number of columns.

    >>> zero_points(jnp.array([[0x1E]]), 4, 2).tolist()
    [[-2, 1]]
    """
    z = layout.unpack(jnp.swapaxes(zero, -1, -2), bits, n)
    return jnp.swapaxes(z, -1, -2).astype(jnp.int8)


def _integers(
    codes: Array, scale: Array, zero: Array | None, bits: int, group_size: int, k: int
) -> Float[Array, "... k n"]:
    q = layout.unpack(codes, bits, k)
    *batch, groups, _ = scale.shape
    full = groups * group_size
    q = jnp.pad(q, [*[(0, 0)] * len(batch), (0, full - k), (0, 0)])  # a short last group
    q = q.reshape(*batch, groups, group_size, -1)
    if zero is not None:
        q = q - zero.astype(jnp.int32)[..., None, :]
    w = q.astype(jnp.float32) * scale.astype(jnp.float32)[..., None, :]
    return w.reshape(*batch, full, -1)[..., :k, :]


# --- ops ------------------------------------------------------------------------------------
# Each function below returns, for one storage: the named arrays; a function that decodes them, or a
# slice of their columns; and the number of columns that an entry of each sliceable array covers.


def _packed(codes: Array, scale: Array, zero: Array | None, *, bits: int, group_size: int) -> tuple:
    data = {"codes": codes, "scale": scale}
    if zero is not None:
        data["zero"] = zero_points(zero, bits, scale.shape[-1])
    decode = lambda d, k: _integers(d["codes"], d["scale"], d.get("zero"), bits, group_size, k)
    return data, decode, _by_columns(data, scale)


def _ternary(codes: Array, scale: Array, *, group_size: int) -> tuple:
    return _packed(codes, scale, None, bits=2, group_size=group_size)


def _codebook(codes: Array, scale: Array, *, table: Any, bits: int, group_size: int) -> tuple:
    data = {"codes": codes, "scale": scale}
    static = {"table": table, "bits": bits, "group_size": group_size}
    decode = lambda d, k: tables.dequantize(d["codes"], d["scale"], **static, k=k)
    return data, decode, _by_columns(data, scale)


def _e8p(codes: Array, residual: Array | None, scale: Array, *, bits: int) -> tuple:
    data = {"codes": codes, "scale": scale}
    if residual is not None:
        data["residual"] = residual
    decode = lambda d, k: e8p.dequantize(d["codes"], d.get("residual"), d["scale"], bits=bits, k=k)
    return data, decode, {"codes": 1, "residual": 1}


def _trellis(codes: Array, scale: Array, *, rates: tuple[int, ...], L: int, code: str) -> tuple:
    decode = lambda d, k: trellis.dequantize(
        d["codes"], d["scale"], rates=rates, L=L, code=code, k=k
    )
    return {"codes": codes, "scale": scale}, decode, {"codes": trellis.SIDE}


def _additive(codes: Array, codebooks: Array, scale: Array, *, bits: int, group: int) -> tuple:
    data = {"codes": codes, "codebooks": codebooks, "scale": scale}
    decode = lambda d, k: lookup.dequantize(
        d["codes"], d["codebooks"], d["scale"], bits=bits, group=group, k=k
    )
    return data, decode, {"codes": 1, "scale": 1}


def _dual_scale(
    codes: Array, scale: Array, step: Array, ranges: Array, escapes: Array, *, bits: int
) -> tuple:
    data = {"codes": codes, "scale": scale, "step": step, "ranges": ranges, "escapes": escapes}
    decode = lambda d, k: dual_scale.dequantize(**d, bits=bits, k=k)
    return data, decode, dict.fromkeys(("codes", "scale", "ranges"), 1)


def _float_planes(*arrays: Array | None, dtype: str, bits: int) -> tuple:
    planes = float_planes.Planes(*arrays)
    data = {name: a for name, a in planes._asdict().items() if a is not None}
    data["column"] = jnp.arange(planes.codes.shape[-1], dtype=jnp.int32)[None]

    def decode(d: dict[str, Array], k: int) -> Array:
        planes = float_planes.Planes(*map(d.get, float_planes.Planes._fields))
        first = d["column"][0, 0]
        u = float_planes.decode(planes, dtype=dtype, bits=bits, k=k, first=first)
        return float_fields.floats(u, dtype).astype(jnp.float32)

    return data, decode, dict.fromkeys((*float_planes.BY_COLUMN, "column"), 1)


def _by_columns(data: Mapping[str, Array], scale: Array) -> dict[str, int]:
    """Return spans in which every array is split along columns.

    A scale that serves the whole matrix and its zero point are not split.
    """
    return dict.fromkeys(data, 1) if scale.shape[-1] > 1 else {"codes": 1}


def _matmul(parts: Any, x: Array, *arrays: Any, activations: str = "float", **static: Any) -> Array:
    x, arrays = _tied(forms.rounded(x, activations), arrays)
    return tiled_product.matmul(x, *parts(*arrays, **static))


def _transposed(parts: Any, g: Array, *arrays: Any, k: int, **static: Any) -> Array:
    g, arrays = _tied(forms.rounded(g, "float"), arrays)
    return tiled_product.matmul_transposed(g, *parts(*arrays, **static), k)


def _tied(x: Array, arrays: tuple) -> tuple[Array, tuple]:
    """Return the arguments behind an optimization barrier.

    Without it XLA lifts the decoding, which does not depend on any loop variable, out of a loop
    over tokens, and a floating-point copy of the model appears in memory.
    """
    return jax.lax.optimization_barrier((x, arrays))


# Storage name -> its function above.
STORAGES = {
    "packed": _packed, "ternary": _ternary, "codebook": _codebook, "e8p": _e8p,
    "trellis": _trellis, "additive": _additive, "dual_scale": _dual_scale,
    "float_planes": _float_planes,
}  # fmt: skip
# Op name -> its reference. Storage "packed" has packed_matmul and packed_matmul_transposed.
OPS = {
    f"{name}_matmul{way}": partial(f, parts)
    for name, parts in STORAGES.items()
    for way, f in (("", _matmul), ("_transposed", _transposed))
}
# Op grouped_packed_matmul multiplies rows by the matrices of their experts (`row_tiles.over`).
OPS |= {f"grouped_{name}": partial(row_tiles.over, op) for name, op in OPS.items()}
packed_matmul, ternary_matmul = OPS["packed_matmul"], OPS["ternary_matmul"]
codebook_matmul, e8p_matmul = OPS["codebook_matmul"], OPS["e8p_matmul"]
trellis_matmul, additive_matmul = OPS["trellis_matmul"], OPS["additive_matmul"]


def weights(storage: str, *arrays: Any, k: int, **static: Any) -> Float[Array, "k n"]:
    """Return the float32 matrix that the arrays of a storage decode to.

    Args:
      storage: a key of `STORAGES`.
      *arrays: the arrays of the op after x.
      k: number of rows of the matrix.
      **static: the static arguments of the op.
    """
    data, decode, _ = STORAGES[storage](*arrays, **static)
    return decode(data, k)


def columns(
    storage: str, ids: Int[Array, "i"], *arrays: Any, k: int, **static: Any
) -> Float[Array, "k i"]:
    """Return columns `ids` of that matrix, decoding only the entries that hold them.

    Args:
      storage: a key of `STORAGES`.
      ids: column indices [i].
      *arrays: the arrays of the op after x.
      k: number of rows of the matrix.
      **static: the static arguments of the op.
    Returns:
      float32 [k, i].
    """
    data, decode, spans = STORAGES[storage](*arrays, **static)
    return tiled_product.columns(data, ids, decode, spans, k)
