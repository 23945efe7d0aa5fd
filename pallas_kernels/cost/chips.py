"""What an accelerator can do, and what a kernel would have to do to keep its memory busy.

Sources of the TPUs' figures: docs.cloud.google.com/tpu/docs, the page of each version (peaks, HBM
bandwidth, TensorCores), read 2026-11. Clocks are not published. Those of v5e, v5p and v6e follow
from the peaks: v5e has four units of 128 x 128 multipliers a core, 2 * 4 * 128 * 128 operations a
cycle; v6e, two of 256 x 256 at two rows a cycle. TPU7x by the same count would run at 2.2 GHz;
1.9 GHz is assumed, which asks more of a kernel in every cycle.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device as a program sees it, a whole chip.

    Attributes:
      bandwidth: of its memory, bytes / s.
      clock: Hz.
      cores: that share the memory: TensorCores, or streaming multiprocessors.
      flops: peak of bfloat16 products with float32 sums, operations / s.
      ops: peak of the fastest 8-bit products, operations / s.
      unit: type of the operands of those 8-bit products.
    """

    bandwidth: float
    clock: float
    cores: int
    flops: float
    ops: float
    unit: str


# GPUs: NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM (dense peaks, boost clocks); a
# core is a streaming multiprocessor.
CHIPS = {
    "v5e": Chip(819e9, 1.5e9, 1, 197e12, 394e12, "int8"),
    "v5p": Chip(2765e9, 1.75e9, 2, 459e12, 918e12, "int8"),
    "v6e": Chip(1638e9, 1.75e9, 1, 918e12, 1836e12, "int8"),
    "tpu7x": Chip(7380e9, 1.9e9, 2, 2307e12, 4614e12, "float8_e4m3fn"),
    "sm_80": Chip(2039e9, 1.41e9, 108, 312e12, 624e12, "int8"),
    "sm_90": Chip(3352e9, 1.98e9, 132, 989e12, 1979e12, "int8"),
}


def needed(chip: str, bits: float) -> float:
    """Weights of `bits` bits that every core must take in a cycle to use the whole bandwidth.

    >>> round(needed("v5e", 2)), round(needed("v6e", 4))
    (2184, 1872)
    """
    c = CHIPS[chip]
    return c.bandwidth * 8 / bits / (c.clock * c.cores)


def unit(chip: str, bits: int) -> str:
    """The matrix unit's operands that suit weights of so many bits on a TPU.

    Every code of up to 4 bits is a float8; of 8 bits, only a bfloat16.

    >>> unit("v5e", 8), unit("tpu7x", 4), unit("tpu7x", 8)
    ('int8', 'float8_e4m3fn', 'bfloat16')
    """
    best = CHIPS[chip].unit
    return "bfloat16" if best == "float8_e4m3fn" and bits > 4 else best


def seconds(
    chip: str, *, bytes_moved: float, weights: float, weights_per_cycle: float, operations: float
) -> float:
    """Least time of a product, whichever of memory, unpacking and multiplying takes longest.

    Args:
      bytes_moved: to and from the chip's memory.
      weights: unpacked.
      weights_per_cycle: of one core, from a kernel's schedule.
      operations: two for each multiplication; at the peak of bfloat16.

    >>> round(1e6 * seconds("v5e", bytes_moved=4 << 20, weights=1 << 24, weights_per_cycle=4096,
    ...                     operations=2 << 24), 2)
    5.12
    """
    c = CHIPS[chip]
    unpacking = weights / (weights_per_cycle * c.clock * c.cores)
    return max(bytes_moved / c.bandwidth, unpacking, operations / c.flops)
