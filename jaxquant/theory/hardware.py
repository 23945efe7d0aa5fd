"""Hardware that a model may run on: memory, bandwidth and peaks, each row with its source.

Accelerators come from `pallas_kernels.cost.chips`, so that there is one table of their figures; the
rows added here are machines that no kernel of this project is compiled for. Every figure is used in
an upper bound on speed. Where sources differ by more than rounding, the larger bandwidth and the
larger peak are therefore chosen (and the smaller memory, so that what is said to fit does fit);
`source` states what differs. The bound is on programs that use the units that `source` names:
neural engines, and the graphics units of laptops, are not counted. Gigabytes are 10^9 bytes.
"""

import dataclasses
import math

from jaxquant.core.fields import shown
from pallas_kernels.cost.chips import CHIPS

READ = "2026-12"  # when the sources were read
UNITS = ("int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One chip or computer.

    Attributes:
      name: the name, a key of `HARDWARE` if it is in that table.
      memory: capacity of its memory, in bytes.
      bandwidth: bytes per second that it reads from that memory.
      flops: peak of products of 16-bit floats, in operations per second, two per multiplication.
      ops: peak of the fastest 8-bit products, in operations per second; `flops` where there are no
        faster units for them.
      unit: dtype of the operands of these 8-bit products, "int8" or "float8_e4m3fn".
      watts: power limit of the chip with its memory, in watts; None if its maker publishes none.
      source: where the figures come from, and what other sources say.
      date: year and month in which the source was read, or in which the machine was measured.
      title: the name in reports, such as "NVIDIA H100". Default: `name`.

    Raises:
      ValueError: a figure is not a positive and finite number, or the unit is another one.

    >>> HARDWARE["h100"].ridge.__round__(), HARDWARE["m4"].watts
    (295, None)
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    ops: float
    unit: str
    watts: float | None
    source: str
    date: str = READ
    title: str = ""

    def __post_init__(self) -> None:
        for field in ("memory", "bandwidth", "flops", "ops", "watts"):
            value = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf) and (field, value) != ("watts", None):
                raise ValueError(f"{field} must be positive and finite, got {shown(value)}")
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}, got {shown(self.unit)}")
        object.__setattr__(self, "title", self.title or self.name)

    @property
    def ridge(self) -> float:
        """Operations per byte at which memory and 16-bit products take equal time."""
        return self.flops / self.bandwidth

    @property
    def energy_per_bit(self) -> float | None:
        """Joules per bit read if the whole power limit served the memory; None without `watts`."""
        return None if self.watts is None else self.watts / (8 * self.bandwidth)

    def peak(self, integers: bool) -> float:
        """Return the peak of products, in operations per second.

        Args:
          integers: whether both operands are integers of at most 8 bits. They have the 8-bit peak
            if the unit takes int8; a unit for float8 does not multiply them.

        >>> chip = HARDWARE["tpu7x"]
        >>> chip.peak(True) == chip.flops, HARDWARE["v5e"].peak(True) / 1e12
        (True, 394.0)
        """
        return self.ops if integers and self.unit == "int8" else self.flops


_TPU = "docs.cloud.google.com/tpu/docs, page of the version"
_NVIDIA = "data sheet of NVIDIA, dense peaks"
_ACCELERATORS: dict[str, tuple[str, float | None, str]] = {
    "v5e": ("TPU v5e", None, f"{_TPU}; its int8 peak is 393 TOPS, JAX's table has 394"),
    "v5p": ("TPU v5p", None, f"{_TPU}; JAX's table has 2,460 GB/s"),
    "v6e": ("TPU v6e", None, f"{_TPU}; JAX's table has 1,640 GB/s"),
    "tpu7x": ("TPU7x", None, f"{_TPU}; JAX's table has 7,400 GB/s; it has no int8 unit"),
    "a100": ("NVIDIA A100", 400.0, f"{_NVIDIA}: A100 80GB SXM"),
    "h100": ("NVIDIA H100", 700.0, f"{_NVIDIA}: H100 SXM; rounded to 3,350 GB/s there"),
    "h200": ("NVIDIA H200", 700.0, f"{_NVIDIA}: H200 SXM"),
    "b200": (
        "NVIDIA B200",
        1000.0,
        f"{_NVIDIA}: HGX B200; the GB200 has 2,500 and 5,000 TFLOP/s, and 1,200 W",
    ),
}


def _accelerators() -> list[Hardware]:
    # A chip that is added to CHIPS without a row above still appears, with the source of CHIPS.
    rows = []
    for name, c in CHIPS.items():
        title, watts, source = _ACCELERATORS.get(name, (name, None, "pallas_kernels.cost.chips"))
        figures = c.memory, c.bandwidth, c.flops, c.ops, c.unit
        rows.append(Hardware(name, *figures, watts, source, title=title))
    return rows


_V4 = Hardware(
    "v4", 32e9, 1228.8e9, 275e12, 275e12, "int8", 192.0,
    "docs.cloud.google.com/tpu/docs/v4 (1,200 GB/s there) and arXiv:2304.01433, Table 4; JAX's "
    "table has 1,230 GB/s; watts: largest measured, chip and memory", title="TPU v4",
)  # fmt: skip

_APPLE = (
    "bandwidth: bus width times transfer rate (Apple rounds down); peak: float32 rate of the "
    "largest GPU, which 16-bit floats and 8-bit integers do not exceed on M1 and M2, and are "
    "assumed not to on M3 and M4; the Neural Engine, which may be faster, is not counted; no "
    "power limit is published"
)
# Largest memory in GB, bits of the bus, million transfers per second, TFLOP/s of the largest GPU.
_M_SERIES: dict[str, tuple[float, int, float, float]] = {
    "m1": (16, 128, 4266, 2.6), "m1 pro": (32, 256, 6400, 5.3),
    "m1 max": (64, 512, 6400, 10.6), "m1 ultra": (128, 1024, 6400, 21.2),
    "m2": (24, 128, 6400, 3.6), "m2 pro": (32, 256, 6400, 6.8),
    "m2 max": (96, 512, 6400, 13.6), "m2 ultra": (192, 1024, 6400, 27.2),
    "m3": (24, 128, 6400, 4.1), "m3 pro": (36, 192, 6400, 7.4),
    "m3 max": (128, 512, 6400, 14.2), "m3 ultra": (512, 1024, 6400, 28.4),
    "m4": (32, 128, 7500, 4.6), "m4 pro": (64, 256, 8533, 9.2),
    "m4 max": (128, 512, 8533, 18.4),
}  # fmt: skip


def _apple(name: str, gigabytes: float, bits: int, transfers: float, tera: float) -> Hardware:
    rate = bits / 8 * transfers * 1e6
    peak, title = tera * 1e12, f"Apple {name.title()}"
    return Hardware(name, gigabytes * 1e9, rate, peak, peak, "int8", None, _APPLE, title=title)


_LAPTOP = (
    "two channels of 64 bits, the rate of the memory's name; peak: 8 cores at 4 GHz, each with two "
    "512-bit units for bfloat16 and int8, more than most laptops have; graphics and neural units "
    "are not counted; 32 GB assumed"
)


def _laptop(name: str, transfers: float) -> Hardware:
    cycles, (kind, memory) = 8 * 4e9, name.split()
    return Hardware(
        name, 32e9, 16 * transfers * 1e6, 128 * cycles, 256 * cycles, "int8", None, _LAPTOP,
        title=f"{kind.title()} CPU, {memory.upper()}",
    )  # fmt: skip


HARDWARE: dict[str, Hardware] = {
    one.name: one
    for one in (
        _V4,
        *_accelerators(),
        *(_apple(name, *row) for name, row in _M_SERIES.items()),
        _laptop("laptop ddr5-5600", 5600),
        _laptop("laptop lpddr5x-8533", 8533),
    )
}


def hardware(name: str) -> Hardware:
    """Return the row of `HARDWARE` for a name in small or capital letters.

    Args:
      name: the name, such as "H100" or "M4 Max".
    Returns:
      The row.
    Raises:
      ValueError: there is no such row.

    >>> hardware("M4 Max").bandwidth / 1e9
    546.112
    """
    found = HARDWARE.get(str(name).lower())
    if found is None:
        raise ValueError(f"hardware must be one of {', '.join(HARDWARE)}, got {name!r}")
    return found
