"""Kernels for TPUs (Mosaic, through Pallas), and the arguments that they support.

Pallas is imported when a kernel is first called.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dual_scale, listed_floats, row_tiles
from pallas_kernels.cost import chips
from pallas_kernels.kernel import Kernel

_FLOATS = ("float32", "bfloat16", "float16")
Aval = jax.ShapeDtypeStruct


def _call(module: str, name: str, bits: int | None = None) -> Callable:
    """Return a function that calls a kernel with the operand dtype that suits the chip.

    `bits` is the number of bits per weight, if no static argument states it.
    """

    def call(*arrays: Any, **statics: Any) -> jax.Array:
        of = bits or statics.get("bits")
        if module in ("packed", "table", "lattice") and chip() == "tpu7x":
            statics = {"unit": chips.unit("tpu7x", of)} | statics
        return getattr(importlib.import_module(f"pallas_kernels.tpu.{module}"), name)(
            *arrays, **statics
        )

    return call


def chip() -> str:
    """Return the chip to lower for: "tpu7x", whose matrix unit takes no integers, or "" for others.

    It is the device of the mesh, if one is set (`jax.sharding.use_abstract_mesh`), otherwise the
    machine's own.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return "tpu7x" if device is not None and "7" in device.device_kind else ""


def _grouped(x: Aval, codes: Aval, scale: Aval, group_size: int, slice_: int = 128) -> str:
    """Return why dtypes or groups are not supported.

    A slice of the matrix unit must consist of whole groups, or divide them.
    """
    if x.dtype not in _FLOATS:
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    if scale.shape[0] > 1 and group_size % slice_ and slice_ % group_size:
        return f"groups of {group_size} rows neither divide {slice_} nor are multiples of it"
    if scale.shape[0] > 1 and group_size < 8:
        return f"groups of {group_size} rows are too small"
    return ""


def _packed(x: Aval, codes: Aval, scale: Aval, zero: Aval | None, *, bits: int, group_size: int,
            **_: Any) -> str:  # fmt: skip
    if bits not in (2, 3, 4, 8):
        return f"codes of {bits} bits have no TPU kernel"
    return _grouped(x, codes, scale, group_size, 256 if bits == 3 else 128)


def _ternary(x: Aval, codes: Aval, scale: Aval, *, group_size: int, **_: Any) -> str:
    return _grouped(x, codes, scale, group_size)


def _codebook(x: Aval, codes: Aval, scale: Aval, *, table: Any, bits: int, group_size: int,
              **_: Any) -> str:  # fmt: skip
    if isinstance(table, str) or bits not in (2, 3, 4) or len(table) != 1 << bits:
        return (
            f"only tables of 4, 8 or 16 values have a TPU kernel, not {bits} bits of "
            f"{str(table)[:20]}"
        )
    return _grouped(x, codes, scale, group_size, 256 if bits == 3 else 128)


def _codebook_transposed(g: Aval, codes: Aval, scale: Aval, *, table: Any, bits: int,
                         group_size: int, **_: Any) -> str:  # fmt: skip
    why = _codebook(g, codes, scale, table=table, bits=bits, group_size=128)
    if not why and scale.shape[0] > 1 and group_size % 16:
        return f"groups of {group_size} rows are not multiples of 16"
    return why


def _e8p(x: Aval, codes: Aval, residual: Aval | None, scale: Aval, *, bits: int, **_: Any) -> str:
    if bits != 2 or residual is not None:
        return "E8P codes have a TPU kernel only at 2 bits, without a residual"
    return _grouped(x, codes, scale, 0) if x.dtype not in _FLOATS else ""


def _trellis(x: Aval, codes: Aval, scale: Aval, *, rates: tuple[int, ...], L: int, code: str,
             activations: str = "float") -> str:  # fmt: skip
    if code != "vpu":
        return f"only the trellis code 'vpu' has a TPU kernel, not {code!r}"
    if L != 16 or set(rates) != {2}:
        return (
            f"a trellis has a TPU kernel only at L = 16 and 2 bits, not L = {L} and "
            f"{sorted(set(rates))} bits"
        )
    if activations == "int8/256":
        return (
            "a trellis has a TPU kernel only for activations 'float', 'int8' and "
            "'codes', not 'int8/256'"
        )
    rows = x.shape[1] // len(rates)
    if len(rates) > 1 and rows % 128:
        return f"blocks of {rows} rows, each with a scale, are not multiples of 128"
    return "" if x.dtype in _FLOATS else f"x must be float32, bfloat16 or float16, got {x.dtype}"


def _float_planes(x: Aval, *_: Aval | None, dtype: str, bits: int, **__: Any) -> str:
    if x.dtype not in _FLOATS:
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    return listed_floats.unfit(dtype, bits, "TPU")


def _additive(*_: Any, **__: Any) -> str:
    return (
        "additive codes have no TPU kernel: gathering learned vectors of 8 "
        "float16 values is slower on a TPU than reading bfloat16 weights"
    )


def _hadamard(*_: Any, **__: Any) -> str:
    return "Hadamard transforms are products with small matrices, which XLA computes well on a TPU"


def _none(*_: Any, **__: Any) -> jax.Array:
    raise NotImplementedError("there is no such kernel for TPUs; ask `serves` first")


def _transposed(g: Aval, codes: Aval, scale: Aval, zero: Aval | None, **statics: Any) -> str:
    return _packed(g, codes, scale, zero, **statics)


def _grouped_packed(x: Aval, *arrays: Aval | None, **statics: Any) -> str:
    return _packed(x, *row_tiles.one(arrays[:-1]), **statics)


KERNELS = {
    "packed_matmul": Kernel(_call("packed", "packed_matmul"), _packed),
    "packed_matmul_transposed": Kernel(
        _call("transposed", "packed_matmul_transposed"), _transposed
    ),
    "grouped_packed_matmul": Kernel(_call("packed", "grouped_packed_matmul"), _grouped_packed),
    "ternary_matmul": Kernel(_call("packed", "ternary_matmul", 2), _ternary),
    "codebook_matmul": Kernel(_call("table", "codebook_matmul", 8), _codebook),
    "codebook_matmul_transposed": Kernel(
        _call("table_transposed", "codebook_matmul_transposed"), _codebook_transposed
    ),
    "e8p_matmul": Kernel(_call("lattice", "e8p_matmul", 4), _e8p),
    "trellis_matmul": Kernel(_call("trellis", "trellis_matmul"), _trellis),
    "float_planes_matmul": Kernel(_call("float_planes", "float_planes_matmul"), _float_planes),
    "additive_matmul": Kernel(_none, _additive),
    "hadamard": Kernel(_none, _hadamard),
}
KERNELS["dual_scale_matmul"] = dual_scale.over(KERNELS["packed_matmul"])
