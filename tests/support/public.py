"""Every public name: those of `jq`, and those of its rooms."""

import jaxquant as jq

ROOMS = (
    "adapters", "calibration", "core", "distributed", "estimators", "formats", "lossless",
    "methods", "ptq", "recipes", "rounding", "selection", "storage", "theory", "training",
    "transforms", "tuning",
)  # fmt: skip
NAMES = {name: getattr(jq, name) for name in jq.__all__}
NAMES |= {f"{r}.{n}": getattr(getattr(jq, r), n) for r in ROOMS for n in getattr(jq, r).__all__}
