"""Kernels for NVIDIA GPUs (sm_80, sm_90) in Pallas-Triton, by op."""

from pallas_kernels import dual_scale
from pallas_kernels.gpu import (
    additive,
    codebook,
    codebook_transposed,
    e8p,
    float_planes,
    packed,
    trellis,
)
from pallas_kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    name: kernel
    for module in (packed, codebook, codebook_transposed, e8p, trellis, additive, float_planes)
    for name, kernel in module.KERNELS.items()
}
KERNELS["dual_scale_matmul"] = dual_scale.over(KERNELS["packed_matmul"])
