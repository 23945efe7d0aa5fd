"""Energy of additions, multiplications and memory accesses, each constant with its source.

All constants are in picojoules: of one operation, or of one bit read. They are those of circuits,
without control, clocks, leakage or refresh, so what is computed from them is a lower estimate; the
power limit of a chip divided by its bandwidth or its peak (`Hardware.energy_per_bit`) is the
corresponding upper one, 4 to 7 times as large.
"""

import dataclasses
import math

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import check_fields

_HOROWITZ = "Horowitz, ISSCC 2014, doi:10.1109/ISSCC.2014.6757323, 45 nm at 0.9 V"
_JOUPPI = "Jouppi et al., ISCA 2021, doi:10.1109/ISCA52012.2021.00010, Table 2, 7 nm"


@dataclasses.dataclass(frozen=True)
class EnergyConstants:
    """Energy per operation in one technology, in picojoules.

    Attributes:
      node: name of the technology, such as "7 nm".
      memory: energy of reading one bit from main memory.
      memory_kind: the kind of memory, a key of `MEMORIES`, or any other name.
      int8_add, int32_add, float16_add, float32_add: energy of an addition.
      int8_multiply, int32_multiply, float16_multiply, float32_multiply: of a multiplication.
      arithmetic_source: where the energies of operations come from.
      memory_source: where that of memory comes from.

    Raises:
      ValueError: a number is negative or not finite.

    >>> NODES["7 nm"].float16_multiply, NODES["7 nm"].with_memory("HBM2E").memory
    (0.34, 4.3)
    """

    node: str
    memory: float
    memory_kind: str
    int8_add: float
    int32_add: float
    float16_add: float
    float32_add: float
    int8_multiply: float
    int32_multiply: float
    float16_multiply: float
    float32_multiply: float
    arithmetic_source: str = "given by the caller"
    memory_source: str = "given by the caller"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in self.constants().items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")

    def constants(self) -> dict[str, float]:
        """Return every constant by a name that states its unit.

        >>> NODES["45 nm"].constants()["memory_pj_per_bit"]
        20.3125
        """
        numbers = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type is float
        }
        unit = lambda name: "pj_per_bit" if name == "memory" else "pj"
        return {f"{name}_{unit(name)}": value for name, value in numbers.items()}

    def sources(self) -> dict[str, str]:
        """Return the source of every constant, under the names of `constants`."""
        of = lambda name: (
            self.memory_source if name.startswith("memory") else self.arithmetic_source
        )
        return {name: of(name) for name in self.constants()}

    def with_memory(self, kind: str) -> "EnergyConstants":
        """Return the same technology with another main memory.

        Args:
          kind: a key of `MEMORIES`.
        Raises:
          ValueError: there is no such memory.
        """
        check_arguments(EnergyConstants.with_memory, locals())
        if kind not in MEMORIES:
            raise ValueError(f"memory must be one of {', '.join(MEMORIES)}, got {kind!r}")
        memory, source = MEMORIES[kind]
        return dataclasses.replace(self, memory=memory, memory_kind=kind, memory_source=source)

    @property
    def float_product(self) -> float:
        """Energy of a float16 multiplication and addition."""
        return self.float16_multiply + self.float16_add

    @property
    def integer_product(self) -> float:
        """Energy of an int8 multiplication and an int32 addition, which sums need."""
        return self.int8_multiply + self.int32_add


# Picojoules per bit read, and the source. Device figures leave out the controller of the chip.
MEMORIES: dict[str, tuple[float, str]] = {
    "DDR3": (1300 / 64, f"1.3 nJ for 64 bits, the least of 1.3 to 2.6; {_HOROWITZ}"),
    "DDR5": (11.85, "simulation of DDR5-6400 with DRAMsim3, a project's own; no vendor's figure"),
    "LPDDR5X": (10.0, "round trip, arXiv:2411.17309, Table 1; others say 5 to 10"),
    "GDDR6": (350 / 64, f"350 pJ for 64 bits, the least of 350 to 480; {_JOUPPI}"),
    "HBM2": (250 / 64, f"250 pJ for 64 bits, the least of 250 to 450; {_JOUPPI}; 3.92 pJ/bit in "
             "O'Connor et al., MICRO 2017, doi:10.1145/3123939.3124545"),
    "HBM2E": (4.3, "Moon, Son and Lee, IEDM 2023, 15-6; device"),
    "HBM3E": (3.44, "20 % below HBM2E; Moon, Son and Lee, IEDM 2023, 15-6; device"),
    "HBM with controller": (13.1, "regression of the board power of an A100, Antepara et al., "
                            "SC 2025, doi:10.1145/3712285.3759815, Table 3"),
}  # fmt: skip

# Both columns stand side by side in Table 2 of Jouppi et al.; the papers themselves were not
# readable when this table was made, and several independent copies of it agree.
NODES: dict[str, EnergyConstants] = {
    "45 nm": EnergyConstants(
        "45 nm", MEMORIES["DDR3"][0], "DDR3", 0.03, 0.1, 0.4, 0.9, 0.2, 3.1, 1.1, 3.7,
        _HOROWITZ, MEMORIES["DDR3"][1],
    ),
    "7 nm": EnergyConstants(
        "7 nm", MEMORIES["HBM2"][0], "HBM2", 0.007, 0.03, 0.16, 0.38, 0.07, 1.48, 0.34, 1.31,
        _JOUPPI, MEMORIES["HBM2"][1],
    ),
}  # fmt: skip
