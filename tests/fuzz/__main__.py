"""Fuzz the readers for so many seconds or inputs; or run one input again, by its number."""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import children, corpus


def main() -> int:
    """Exit status 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--count", type=int, default=None, help="stop after so many inputs")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs")
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--only", type=int, default=None, help="one number, in this process")
    parser.add_argument("--readers", nargs="*", default=None, help="of all, these alone")
    parser.add_argument("--out", type=Path, default=None, help="a line of JSON for each finding")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cases = corpus.cases(Path(place))
        if given.only is not None:
            found = children.judge(cases, given.seed, given.only, Path(tempfile.mkdtemp()))
            print(json.dumps(found or "nothing found", indent=1))
            return int(bool(found))
        return _all(cases, given)


def _all(cases: dict, given: argparse.Namespace) -> int:
    names = sorted(cases)
    wanted = set(names if given.readers is None else given.readers)
    every = itertools.count(given.start)
    numbers = (n for n in every if names[n % len(names)] in wanted)
    numbers = itertools.islice(numbers, given.count)
    counted = itertools.count()
    end, kinds, found = time.monotonic() + given.seconds, Counter(), 0
    watched = (n for n, _ in zip(numbers, counted, strict=False))
    for finding in children.run(cases, given.seed, watched):
        if finding:
            found += 1
            kinds[finding["reader"], finding["error"]] += 1
            line = json.dumps(finding)
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")
        elif given.count is None and time.monotonic() > end:
            break
    done = next(counted)
    for (reader, error), times in sorted(kinds.items()):
        print(f"{reader:12} {error:30} {times}")
    print(f"{done} inputs, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
