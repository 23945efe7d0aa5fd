"""Every pair of widths of public models, compiled for TPUs the way that a user's product is.

    python -m tests.aot.widths [--jobs N] [--out FILE]

takes hours: 13 x 13 shapes at 2 and 4 bits, for 1 and 128 rows, on v5e and tpu7x, 1352 programs.
What came of each is a line of widths.jsonl beside this file, kept in the repository: a later run,
on another machine too, goes on where the file ends. Remove it when the kernels change. Failures are
printed, and make the exit status 1.
"""

import argparse
import itertools
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.aot import compiler, real

OUT = Path(__file__).with_suffix(".jsonl")
BUILD = "tests.aot.real:product"
BATCH = 64  # programs of a process


class Program(NamedTuple):
    """One of those to compile."""

    k: int
    n: int
    bits: int
    m: int
    chip: str

    def job(self) -> compiler.Job:
        """For the compiler."""
        statics = {"k": self.k, "n": self.n, "m": self.m, "format": f"{self.bits} bits"}
        return compiler.Job(BUILD, self.chip, statics)


def programs() -> list[Program]:
    """All, those first whose blocks once failed: of n = 2560 and 5120."""
    every = itertools.product(real.WIDTHS, real.WIDTHS, (2, 4), (1, 128), ("v5e", "tpu7x"))
    return sorted((Program(*p) for p in every), key=lambda p: (p.n not in (2560, 5120), p.m, -p.k))


def fault(done: compiler.Compiled) -> str:
    """Why a product has failed: it did not compile, or no kernel serves it; "" if neither."""
    if done.error:
        return done.error
    return "" if "tpu_custom_call" in done.hlo else "no kernel is in the program"


def finished(out: Path) -> dict[Program, str]:
    """What a file says of the programs; a line that a kill has cut short is none."""
    found = {}
    for line in out.read_text().splitlines() if out.exists() else []:
        try:
            *program, error = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Program(*program)] = error
    return found


def run(left: list[Program], out: Path, jobs: int) -> None:
    """Compile programs in processes of `jobs` at a time; a line for each."""
    lock, begun, count = threading.Lock(), time.monotonic(), itertools.count(1)

    def some(batch: list[Program]) -> None:
        results = compiler.stream([p.job() for p in batch], timeout=3600, schedules=False)
        for program, done in zip(batch, results, strict=True):
            error = fault(done)
            with lock, out.open("a") as file:
                file.write(json.dumps([*program, error]) + "\n")
                i = next(count)
                if error:
                    print(f"FAILED {program}: {error[:300]}", flush=True)
                if error or i % 20 == 0 or i == len(left):
                    minutes = (time.monotonic() - begun) / 60
                    print(f"{i} of {len(left)}, {minutes:.0f} minutes", flush=True)

    batches = [left[i : i + BATCH] for i in range(0, len(left), BATCH)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(some, batches))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--out", type=Path, default=OUT, help="default: beside this file")
    options = parser.parse_args()
    if reason := compiler.missing():
        print(reason)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = finished(options.out)
    # What failed is compiled again: it may have been mended.
    left = [p for p in programs() if done.get(p, "never") != ""]
    print(f"{len(programs()) - len(left)} of {len(programs())} are compiled already")
    run(left, options.out, options.jobs)
    failed = [p for p, error in finished(options.out).items() if error]
    print(f"{len(programs())} programs, {len(failed)} failed: {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
