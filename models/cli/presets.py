"""Presets of `jaxquant quantize --effort`: how much work to spend on a quantization."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """Values of options that the user leaves out.

    Attributes:
      method: name of the method.
      tokens: number of calibration tokens.
      heal_steps: number of training steps after rounding.
      options: method name -> options of the method.
    """

    method: str
    tokens: int
    heal_steps: int
    options: dict[str, dict[str, Any]]


PRESETS = {
    "fast": Preset(
        method="gptq",
        tokens=4096,
        heal_steps=0,
        options={
            "quip_sharp": {"passes": 0},
            "trellis": {"passes": 0},
            "entropy_coded": {"states": 8},
            "aqlm": {"beam": 2, "sweeps": 1},
            "vptq": {"beam": 2, "sweeps": 1},
        },
    ),
    "default": Preset(method="trellis", tokens=8192, heal_steps=0, options={}),
    "best": Preset(
        method="entropy_coded",
        tokens=65536,
        heal_steps=200,
        options={
            "quip_sharp": {"passes": 8},
            "qtip": {"two_sided": True},
            "trellis": {"passes": 2},
            "entropy_coded": {"states": 256, "two_sided": True},
            "aqlm": {"beam": 16, "sweeps": 12},
            "vptq": {"beam": 16, "sweeps": 12},
        },
    ),
}
