"""What the compilers make of every kernel: `make kernels` prints it, writes build/kernels.json."""

import json
from pathlib import Path

from tests.aot import gpu, tpu

RESULT = Path(__file__).parents[2] / "build" / "kernels.json"


def main() -> None:
    rows = []
    for compiler in (tpu, gpu):
        if reason := compiler.missing():
            print(f"{compiler.__name__}: skipped, {reason}")
            continue
        rows += compiler.main()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
