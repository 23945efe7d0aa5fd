"""Slices of TPU pods: which exist, and what every device of one has.

A slice has the name that libtpu knows it by, such as "v5p:8x8x8": a generation, and the number of
chips along each axis of its grid. Shapes of up to one host, and of whole hosts, are those of the
page of each version under docs.cloud.google.com/tpu/docs; larger ones of v5p and tpu7x consist of
cubes of 4x4x4 chips, in any grid of them; the usual ones are listed.

Source of the bandwidths between chips: the same pages, "bidirectional inter-chip interconnect (ICI)
bandwidth per chip", of which half arrives at a chip. Read 2026-12.
"""

import math
from typing import NamedTuple

from pallas_kernels.cost.chips import CHIPS


class Generation(NamedTuple):
    """What the slices of a generation have in common.

    Attributes:
      devices: number of devices of a chip, as JAX sees them.
      incoming: bytes / s that arrive at a chip from the others of its slice, on all links together.
      shapes: the grids of its usual slices, in order of their size.
      cubes: largest number of chips of a slice that consists of cubes of 4x4x4; 0 if none does.
    """

    devices: int
    incoming: float
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
    """A slice of a pod.

    Attributes:
      chip: its generation, a key of `GENERATIONS` and of `chips.CHIPS`.
      shape: number of chips along each axis.
    """

    chip: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name that libtpu knows it by."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of devices, as JAX sees them."""
        return self.chips * GENERATIONS[self.chip].devices

    @property
    def memory(self) -> float:
        """Bytes of memory of a device."""
        return CHIPS[self.chip].memory / GENERATIONS[self.chip].devices

    @property
    def incoming(self) -> float:
        """Bytes / s that arrive at a device from others; infinite if there are none."""
        of = GENERATIONS[self.chip]
        return of.incoming / of.devices if self.devices > 1 else math.inf


def slice_of(name: str) -> Slice:
    """Return the slice of a name.

    Args:
      name: a generation and a grid, such as "v5e:4x4", in small or capital letters.
    Raises:
      ValueError: there is no such generation, or no such slice of it.

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
    cubes = f", and grids of whole cubes of 4x4x4, of up to {of_chip.cubes:,} chips"
    raise ValueError(
        f"there is no slice {name!r} among those known here; those of {chip} are "
        f"{', '.join(of.name for of in known.values())}{cubes if of_chip.cubes else ''}"
    )


def slices(chip: str) -> list[Slice]:
    """Return the usual slices of a generation, in order of their size.

    Args:
      chip: a key of `GENERATIONS`.

    >>> [of.devices for of in slices("v6e")]
    [1, 4, 8, 16, 32, 64, 128, 256]
    """
    return [Slice(chip, tuple(map(int, s.split("x")))) for s in GENERATIONS[chip].shapes]
