"""What the compilers make of every kernel: `make kernels` prints it, writes build/kernels.json.

With --keep, rates go to pallas_kernels/cost/rates.json too, of a TPU the medians, where
`pallas_kernels.cost.rates` finds them.
"""

import json
import sys
from pathlib import Path

from tests.aot import compiler, gpu, rates

ROOT = Path(__file__).parents[2]
ISSUED = 128  # instructions of single threads that a multiprocessor issues in a cycle
KEYS = (
    "kernel", "chip", "weights_per_cycle", "needed", "ratio", "worst", "worst_ratio",
    "worst_shape", "instructions_per_weight", "registers", "spills", "error",
)  # fmt: skip


def main() -> None:
    rows = []
    for name, found, missing in (
        ("TPU", rates.main, compiler.missing),
        ("GPU", gpu.main, gpu.missing),
    ):
        if reason := missing():
            print(f"{name}: skipped, {reason}")
            continue
        rows += [{key: row[key] for key in KEYS if key in row} for row in found()]
    write(ROOT / "build" / "kernels.json", rows)
    if "--keep" in sys.argv:
        kept: dict[str, dict[str, float]] = {}
        for row in rows:
            rate = row.get("weights_per_cycle") or ISSUED / row["instructions_per_weight"]
            kept.setdefault(row["kernel"], {})[row["chip"]] = round(rate, 1)
        write(ROOT / "pallas_kernels" / "cost" / "rates.json", kept)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
