"""Rates of the bodies of TPU kernels, to judge; `tests.aot.rates` has those at real shapes.

A rate is the slope of the VLIW bundles between two lengths of k, of the real pallas_call in one
step of its grid: the body as it runs, scales, sums and all, without the fixed cost of a step (some
200 bundles). Bundles are issue cycles; memory and stalls are not in it. M is 8, what a unit's
registers hold at least: 1 to 8 rows cost the same.
"""

from collections.abc import Sequence

from pallas_kernels.cost import chips
from tests.aot import cases
from tests.aot.compiler import TOPOLOGIES, Compiled, Job, compiled, kernel

M = 8
LENGTHS = (1024, 2048)


def jobs(names: Sequence[str], on: Sequence[str], lengths: Sequence[int]) -> list[Job]:
    """Every case on every chip at every length."""
    found = []
    for name in names:
        case = cases.CASES[name]
        for chip in on:
            for k in lengths:
                statics = {"unit": chips.unit(chip, _bits(case)), **case.statics, "m": M, "k": k}
                if "group" in statics:
                    statics["group"] = min(k, statics["group"])
                found.append(Job(f"tests.aot.cases:{case.build}", chip, statics))
    return found


def _bits(case: cases.Case) -> int:
    """Of the operands: entries of tables have 8."""
    return 8 if case.build == "codebook_matmul" else case.bits


def rows(
    names: Sequence[str] = tuple(cases.CASES), on: Sequence[str] = tuple(TOPOLOGIES),
    timeout: float = 900,
) -> list[dict]:  # fmt: skip
    """Of each case and chip: kernel, chip, weights_per_cycle, needed, ratio, spills, slots.

    Raises:
      RuntimeError: something does not compile.
    """
    done = iter(compiled(jobs(names, on, LENGTHS), timeout))
    return [_row(name, chip, next(done), next(done)) for name in names for chip in on]


def _row(name: str, chip: str, short: Compiled, long: Compiled) -> dict:
    if short.error or long.error:
        raise RuntimeError(f"{name} on {chip}: {short.error or long.error}")
    first, second = kernel(short), kernel(long)
    rate = (LENGTHS[1] - LENGTHS[0]) * cases.CASES[name].columns / (second.bundles - first.bundles)
    needed = chips.needed(chip, cases.CASES[name].bits)
    return {
        "kernel": name,
        "chip": chip,
        "weights_per_cycle": round(rate),
        "needed": round(needed),
        "ratio": round(rate / needed, 3),
        "spills": second.spills,
        "slots": second.slots,
        "argument_bytes": long.argument_bytes,
    }
