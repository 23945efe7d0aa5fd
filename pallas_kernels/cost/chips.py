"""Peak rates of accelerators, and the rate a kernel needs to keep the memory busy.

Source of the TPU figures: docs.cloud.google.com/tpu/docs, the page of each version (peaks, HBM
capacity and bandwidth, TensorCores), read 2026-11. Clocks are not published; those of v5e, v5p and
v6e follow from the peaks. v5e has four units of 128 x 128 multipliers per core, 2 * 4 * 128 * 128
operations per cycle; v6e has two of 256 x 256 at two rows per cycle. By the same count TPU7x would
run at 2.2 GHz; 1.9 GHz is assumed, which requires more of a kernel in every cycle.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """A whole chip, which a program sees as one device.

    Attributes:
      platform: the platform whose kernels run on it, "tpu" or "cuda".
      target: what its kernels are compiled for, the name of the chip in `rates.json`.
      memory: capacity of the memory, in bytes; a published GB is taken as 10**9 bytes.
      bandwidth: memory bandwidth, bytes / s.
      clock: clock rate, Hz.
      cores: number of cores that share the memory: TensorCores or streaming multiprocessors.
      flops: peak of bfloat16 products with float32 sums, operations / s.
      ops: peak of the fastest 8-bit products, operations / s.
      unit: dtype of the operands of those 8-bit products.
    """

    platform: str
    target: str
    memory: float
    bandwidth: float
    clock: float
    cores: int
    flops: float
    ops: float
    unit: str


# GPU figures are from NVIDIA's data sheets of the A100 80GB SXM, the H100 SXM, the H200 SXM and the
# HGX B200 (dense peaks); a core is a streaming multiprocessor. Clocks are boost clocks; that of the
# B200 is not in its data sheet and follows from the peak, 8192 operations per cycle and core.
CHIPS = {
    "v5e": Chip("tpu", "v5e", 16e9, 819e9, 1.5e9, 1, 197e12, 394e12, "int8"),
    "v5p": Chip("tpu", "v5p", 95e9, 2765e9, 1.75e9, 2, 459e12, 918e12, "int8"),
    "v6e": Chip("tpu", "v6e", 32e9, 1638e9, 1.75e9, 1, 918e12, 1836e12, "int8"),
    "tpu7x": Chip("tpu", "tpu7x", 192e9, 7380e9, 1.9e9, 2, 2307e12, 4614e12, "float8_e4m3fn"),
    "a100": Chip("cuda", "sm_80", 80e9, 2039e9, 1.41e9, 108, 312e12, 624e12, "int8"),
    "h100": Chip("cuda", "sm_90", 80e9, 3352e9, 1.98e9, 132, 989e12, 1979e12, "int8"),
    "h200": Chip("cuda", "sm_90", 141e9, 4800e9, 1.98e9, 132, 989e12, 1979e12, "int8"),
    "b200": Chip("cuda", "sm_100", 180e9, 8000e9, 1.86e9, 148, 2250e12, 4500e12, "int8"),
}


def known(name: str) -> str:
    """Return the key of `CHIPS` for the name of a chip in small or capital letters.

    Args:
      name: the name, such as "H100".
    Raises:
      ValueError: there is no such chip.

    >>> known("H100")
    'h100'
    """
    if name.lower() not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {name!r}")
    return name.lower()


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


def peak(chip: str, activations: str) -> float:
    """Return the peak of products of packed weights with rows in a form of activations, in 1 / s.

    Args:
      chip: a key of `CHIPS`.
      activations: one of the forms of `pallas_kernels.activations`. Kernels multiply integers at
        the 8-bit peak where the chip has such units, all else at the bfloat16 peak.

    >>> peak("v5e", "int8") / peak("v5e", "float"), peak("tpu7x", "int8") == CHIPS["tpu7x"].flops
    (2.0, True)
    """
    c = CHIPS[chip]
    return c.ops if activations != "float" and c.unit == "int8" else c.flops


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
