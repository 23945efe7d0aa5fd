"""Slices of TPU pods: which slices exist, and the memory and bandwidth of their devices.

The name of a slice is the one that libtpu uses, such as "v5p:8x8x8": a generation, and the number
of chips along each axis of the grid. The shapes are those listed for each version under
docs.cloud.google.com/tpu/docs. Larger slices of v5p and tpu7x consist of cubes of 4x4x4 chips in a
grid of any shape, of which the usual ones are listed here.

Source of the bandwidths between chips: the same pages, "bidirectional inter-chip interconnect (ICI)
bandwidth per chip", of which half arrives at a chip. Read in 2026-12.
"""

import math
from typing import NamedTuple

from pallas_kernels.cost.chips import CHIPS


class Generation(NamedTuple):
    """The properties that all slices of a TPU generation share.

    Attributes:
      devices: number of JAX devices per chip.
      ici_bandwidth: bytes per second that a chip receives from the other chips, over all its links.
      shapes: the grids of the usual slices, in order of size.
      cubes: largest number of chips of a slice that consists of cubes of 4x4x4 chips; 0 if the
        generation has no such slices.
    """

    devices: int
    ici_bandwidth: float
    shapes: tuple[str, ...]
    cubes: int = 0


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
    "8x16x16", "16x16x16",
)  # fmt: skip
GENERATIONS = {
    "v5e": Generation(1, 200e9, _FLAT),
    "v5p": Generation(1, 600e9, _CUBES, 6144),
    "v6e": Generation(1, 400e9, _FLAT),
    "tpu7x": Generation(2, 600e9, _CUBES, 9216),
}


class Slice(NamedTuple):
    """A slice of a TPU pod.

    Attributes:
      chip: the generation, a key of `GENERATIONS` and of `chips.CHIPS`.
      shape: number of chips along each axis of the grid.
    """

    chip: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name that libtpu uses, such as "v5e:4x4"."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * GENERATIONS[self.chip].devices

    @property
    def memory(self) -> float:
        """Bytes of memory per device."""
        return CHIPS[self.chip].memory / GENERATIONS[self.chip].devices

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second that a device receives from others; infinite if there are no others."""
        of = GENERATIONS[self.chip]
        return of.ici_bandwidth / of.devices if self.devices > 1 else math.inf


def slice_of(name: str) -> Slice:
    """Return the slice of this name.

    Args:
      name: a generation and a grid, such as "v5e:4x4". Neither the case of the letters nor the
        order of the axes matters.
    Raises:
      ValueError: the generation is unknown, or it has no such slice.

    >>> slice_of("v5p:8x8x8").devices, slice_of("TPU7x:2x2x1").devices
    (512, 8)
    """
    chip, _, grid = name.lower().partition(":")
    if chip not in GENERATIONS:
        raise ValueError(
            f"topology must be a generation and a grid, such as v5e:4x4, with one of the "
            f"generations {', '.join(GENERATIONS)}, got {name!r}"
        )
    of_chip = GENERATIONS[chip]
    known = {shape.shape: shape for shape in slices(chip)}
    parts = tuple(int(n) if n.isdecimal() else 0 for n in grid.split("x"))
    found = next((of for shape, of in known.items() if sorted(shape) == sorted(parts)), None)
    if found is not None:
        return found
    whole = len(parts) == 3 and all(n and n % 4 == 0 for n in parts)
    if whole and math.prod(parts) <= of_chip.cubes:
        return Slice(chip, tuple(sorted(parts)))
    cubes = f", and all grids of whole cubes of 4x4x4 chips with up to {of_chip.cubes:,} chips"
    raise ValueError(
        f"there is no slice {name!r} among those known here; use another: those of {chip} are "
        f"{', '.join(of.name for of in known.values())}{cubes if of_chip.cubes else ''}"
    )


def slices(chip: str) -> list[Slice]:
    """Return the usual slices of a generation, in order of size.

    Args:
      chip: a key of `GENERATIONS`.

    >>> [of.devices for of in slices("v6e")]
    [1, 4, 8, 16, 32, 64, 128, 256]
    """
    return [Slice(chip, tuple(map(int, s.split("x")))) for s in GENERATIONS[chip].shapes]
