"""Kernels for NVIDIA GPUs (sm_80, sm_90) in Pallas-Triton, by op."""

from pallas_kernels.gpu import packed
from pallas_kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = packed.KERNELS
