"""Quantized kernels: functions of arrays and static values, independent of the rest of jaxquant."""

from pallas_kernels.grouped import grouped_matmul
from pallas_kernels.hadamard import transform as hadamard_transform
from pallas_kernels.ops import (
    additive_matmul,
    codebook_matmul,
    dual_scale_matmul,
    e8p_matmul,
    float_planes_matmul,
    packed_matmul,
    ternary_matmul,
    trellis_matmul,
)

__all__ = [
    "additive_matmul",
    "codebook_matmul",
    "dual_scale_matmul",
    "e8p_matmul",
    "float_planes_matmul",
    "grouped_matmul",
    "hadamard_transform",
    "packed_matmul",
    "ternary_matmul",
    "trellis_matmul",
]
