"""Peak rates of accelerators, and the rate a kernel needs to keep the memory busy.

Source of the TPU figures: docs.cloud.google.com/tpu/docs, the page of each version (peaks, HBM
bandwidth, TensorCores), read 2026-11. Clocks are not published; those of v5e, v5p and v6e follow
from the peaks. v5e has four units of 128 x 128 multipliers per core, 2 * 4 * 128 * 128 operations
per cycle; v6e has two of 256 x 256 at two rows per cycle. By the same count TPU7x would run at 2.2
GHz; 1.9 GHz is assumed, which requires more of a kernel in every cycle.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """A whole chip, which a program sees as one device.

    Attributes:
      bandwidth: memory bandwidth, bytes / s.
      clock: clock rate, Hz.
      cores: number of cores that share the memory: TensorCores or streaming multiprocessors.
      flops: peak of bfloat16 products with float32 sums, operations / s.
      ops: peak of the fastest 8-bit products, operations / s.
      unit: dtype of the operands of those 8-bit products.
    """

    bandwidth: float
    clock: float
    cores: int
    flops: float
    ops: float
    unit: str


# GPU figures are from NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM (dense peaks,
# boost clocks); a core is a streaming multiprocessor.
CHIPS = {
    "v5e": Chip(819e9, 1.5e9, 1, 197e12, 394e12, "int8"),
    "v5p": Chip(2765e9, 1.75e9, 2, 459e12, 918e12, "int8"),
    "v6e": Chip(1638e9, 1.75e9, 1, 918e12, 1836e12, "int8"),
    "tpu7x": Chip(7380e9, 1.9e9, 2, 2307e12, 4614e12, "float8_e4m3fn"),
    "sm_80": Chip(2039e9, 1.41e9, 108, 312e12, 624e12, "int8"),
    "sm_90": Chip(3352e9, 1.98e9, 132, 989e12, 1979e12, "int8"),
}


def needed(chip: str, bits: float) -> float:
    """Return how many weights per cycle each core must process to use the whole bandwidth.

    Args:
      chip: a key of `CHIPS`.
      bits: number of bits per weight.

    >>> round(needed("v5e", 2)), round(needed("v6e", 4))
    (2184, 1872)
    """
    c = CHIPS[chip]
    return c.bandwidth * 8 / bits / (c.clock * c.cores)


def unit(chip: str, bits: int) -> str:
    """Return the dtype of the matrix unit's operands for weights of `bits` bits on a TPU.

    Where the unit takes float8, every code of up to 4 bits is a float8, but codes of 8 bits require
    bfloat16.

    Args:
      chip: a key of `CHIPS`.
      bits: number of bits per weight.

    >>> unit("v5e", 8), unit("tpu7x", 4), unit("tpu7x", 8)
    ('int8', 'float8_e4m3fn', 'bfloat16')
    """
    best = CHIPS[chip].unit
    return "bfloat16" if best == "float8_e4m3fn" and bits > 4 else best


def seconds(
    chip: str, *, bytes_moved: float, weights: float, weights_per_cycle: float, operations: float
) -> float:
    """Return a lower bound of the time of a product, in seconds.

    It is the longest of the times of memory traffic, unpacking and multiplication.

    Args:
      chip: a key of `CHIPS`.
      bytes_moved: number of bytes moved to and from the chip's memory.
      weights: number of weights unpacked.
      weights_per_cycle: rate of one core, from a kernel's schedule.
      operations: number of operations, two per multiplication, at the bfloat16 peak.

    >>> round(1e6 * seconds("v5e", bytes_moved=4 << 20, weights=1 << 24, weights_per_cycle=4096,
    ...                     operations=2 << 24), 2)
    5.12
    """
    c = CHIPS[chip]
    unpacking = weights / (weights_per_cycle * c.clock * c.cores)
    return max(bytes_moved / c.bandwidth, unpacking, operations / c.flops)
