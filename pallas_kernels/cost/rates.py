"""Static rates of the kernels: weights that a core processes per cycle, from compiler schedules.

`python -m tests.aot.table --keep` compiles every kernel and writes rates.json. For a TPU the rate
is the median over the shapes of real layers in `tests.aot.rates` with one row of x, counting all
VLIW bundles of all steps. For a GPU it is the 128 instructions that a multiprocessor can issue per
cycle divided by the instructions per weight in the kernel's loop. No kernel was run on such a chip
for these rates.
"""

import functools
import json
from pathlib import Path
from typing import Any

from pallas_kernels.cost.chips import CHIPS

_FORMS = {"float": "A16", "int8": "A8", "int8/256": "A8", "codes": "A8"}


@functools.cache
def _table() -> dict[str, dict[str, float]]:
    return json.loads((Path(__file__).parent / "rates.json").read_text())


def weights_per_cycle(op: str, chip: str, activations: str = "float", **static: Any) -> float:
    """Return the rate of one core of a chip at typical shapes, or 0 if none was determined.

    Args:
      op: a key of `reference.OPS`.
      chip: a key of `chips.CHIPS`.
      activations: how x is rounded.
      **static: the static arguments of the op; groups are assumed to have 128 rows.

    >>> weights_per_cycle("packed_matmul", "v5e", bits=2, group_size=128) > 1000
    True
    >>> weights_per_cycle("trellis_matmul", "v5e", rates=(2,), L=12, code="mul1")
    0.0
    """
    names = _names(op, _FORMS[activations], static)
    found = (_table().get(name, {}).get(CHIPS[chip].target) for name in names)
    return float(next((rate for rate in found if rate), 0.0))


def has_rates(chip: str) -> bool:
    """Return whether the rates of any kernel on a chip were determined.

    Args:
      chip: a key of `chips.CHIPS`.

    >>> has_rates("h200"), has_rates("b200")
    (True, False)
    """
    return any(CHIPS[chip].target in of for of in _table().values())


def _names(op: str, form: str, static: dict[str, Any]) -> list[str]:
    """Return the names of the kernel in the TPU and GPU tables, closest match first."""
    bits, other = static.get("bits", 2), "A16" if form == "A8" else "A8"
    integers = ", int8" if form == "A8" else ""
    if op == "dual_scale_matmul":  # x times the steps, multiplied by packed codes
        return _names("packed_matmul", "A16", static)
    if op == "packed_matmul":
        tpu = [f"packed_matmul {bits} bits {f} g128" for f in (form, other)]
        return [*tpu, f"packed {bits} bits{integers}", f"packed {bits} bits, M 8"]
    if op == "ternary_matmul":
        return ["ternary_matmul A8", f"packed 2 bits{integers}", "packed 2 bits, M 8"]
    if op == "codebook_matmul":
        return [f"codebook_matmul {bits} bits A16 g128", f"codebook {bits} bits, M 8"]
    if op == "e8p_matmul":
        return [f"e8p_matmul {form}", "e8p_matmul A16", "e8p 2 bits, M 8"] if bits == 2 else []
    if op == "float_planes_matmul":
        return [f"float_planes_matmul {bits} bits A16", f"float planes {bits} bits, M 8"]
    if op == "trellis_matmul":
        rate, code = "/".join(map(str, set(static["rates"]))), static["code"]
        if code == "vpu":
            return [f"trellis_matmul vpu {form}"] if rate == "2" else []
        sums = code in ("mul1", "1mad")
        return [f"trellis {rate} bits, L 16, M 8"] if sums else []  # L only sets a shift
    return []
