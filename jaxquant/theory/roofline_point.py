"""A program's point on the roofline of a machine: bytes, operations, and which roof is lower."""

import dataclasses
import math

from jaxquant.core.fields import shown
from jaxquant.theory.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class RooflinePoint:
    """The least time of a program that moves bytes and computes products at the same time.

        seconds = max(bytes / bandwidth, floats / flops + integers / ops)

    Latency, synchronization, unpacking and everything that is not a product come on top, so a
    measured time is never below it unless data stay in on-chip memory between two runs (a model of
    some tens of megabytes may), or units other than those of the machine's peaks are used: floats
    are multiplied at the peak of 16 bits, not at that of float8 or of sparse products.

    Attributes:
      hardware: the machine.
      bytes: bytes moved to and from its memory.
      floats: operations on floats, two per multiplication.
      integers: operations on integers of at most 8 bits.
      tokens: number of tokens that the program processes.
      occupied: bytes that must lie in memory at the same time.

    Raises:
      ValueError: a number is negative or not finite.

    Source: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.

    >>> from jaxquant.theory.hardware import HARDWARE
    >>> point = RooflinePoint(HARDWARE["v5e"], bytes=819e9, floats=197e12)
    >>> point.seconds, point.wall, round(point.intensity), point.fits
    (1.0, 'memory', 241, True)
    """

    hardware: Hardware
    bytes: float
    floats: float
    integers: float = 0.0
    tokens: float = 1.0
    occupied: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.hardware, Hardware):
            raise ValueError(f"hardware must be Hardware, got {shown(self.hardware)}")
        for name in ("bytes", "floats", "integers", "tokens", "occupied"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be 0 or more and finite, got {shown(value)}")

    @property
    def operations(self) -> float:
        """All operations."""
        return self.floats + self.integers

    @property
    def memory_seconds(self) -> float:
        """The least time of the memory traffic."""
        return self.bytes / self.hardware.bandwidth

    @property
    def compute_seconds(self) -> float:
        """The least time of the products."""
        of = self.hardware
        return self.floats / of.peak(False) + self.integers / of.peak(True)

    @property
    def seconds(self) -> float:
        """The least time of the program."""
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def tokens_per_second(self) -> float:
        """The largest number of tokens per second."""
        return self.tokens / self.seconds if self.seconds else float("inf")

    @property
    def intensity(self) -> float:
        """Operations per byte; infinity if no bytes are moved."""
        return self.operations / self.bytes if self.bytes else float("inf")

    @property
    def ridge(self) -> float:
        """Operations per byte at which both roofs meet for this program's mix of operations."""
        if not self.operations:
            return self.hardware.ridge
        return self.operations / self.compute_seconds / self.hardware.bandwidth

    @property
    def wall(self) -> str:
        """What bounds the time: "memory" or "compute"."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"

    @property
    def fits(self) -> bool:
        """Whether what must lie in memory does; activations and programs come on top."""
        return self.occupied <= self.hardware.memory

    def __str__(self) -> str:
        fits, rate = "fits" if self.fits else "does not fit", self.tokens_per_second
        tokens = f"{rate:,.0f}" if 1000 <= rate < math.inf else f"{rate:.3g}"
        return (
            f"{self.hardware.title}: at least {1e3 * self.seconds:.4g} ms, at most "
            f"{tokens} tokens/s, bound by {self.wall}; "
            f"{self.intensity:.3g} operations per byte (ridge {self.ridge:.3g}); "
            f"{self.occupied / 1e9:.3g} GB of {self.hardware.memory / 1e9:.3g} GB, which {fits}"
        )
