"""Presets: how much work a quantization is worth."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is taken where the user does not say.

    Attributes:
      method: its name.
      tokens: to calibrate on.
      steps: of healing; 0: none.
      options: of methods, by their names.
    """

    method: str
    tokens: int
    steps: int
    options: dict[str, dict[str, Any]]


EFFORTS = {
    "fast": Effort(
        "gptq",
        4096,
        0,
        {
            "quip_sharp": {"passes": 0},
            "trellis": {"passes": 0},
            "entropy_coded": {"states": 8},
            "aqlm": {"beam": 2, "sweeps": 1},
            "vptq": {"beam": 2, "sweeps": 1},
        },
    ),
    "default": Effort("trellis", 8192, 0, {}),
    "best": Effort(
        "entropy_coded",
        65536,
        200,
        {
            "quip_sharp": {"passes": 8},
            "qtip": {"two_sided": True},
            "trellis": {"passes": 2},
            "entropy_coded": {"states": 256, "two_sided": True},
            "aqlm": {"beam": 16, "sweeps": 12},
            "vptq": {"beam": 16, "sweeps": 12},
        },
    ),
}
