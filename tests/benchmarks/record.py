"""What a benchmark found, as a table in a JSON file; `report.py` makes a page of these files.

A file holds one table: `title`, `command`, `machine`, `date`, `columns`, `rows`, and the sentences
around it, `about` and `note`. A benchmark writes all but the title and the sentences, which a
person writes and which stay.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path

import jax


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`, whose value `Record` takes."""
    parser.add_argument("--json", metavar="FILE", help="write the rows to a JSON file too")


class Record:
    """The rows of a table, written to a file after each of them, so that a killed run leaves some.

    Args:
      path: the file, as `--json` names it; None writes nothing.
      *columns: the header of the table.
    """

    def __init__(self, path: str | None, *columns: str):
        self.path, self.columns, self.rows = path and Path(path), columns, []

    def add(self, *row: object) -> None:
        """Add a row; a float is written with five significant digits."""
        if len(row) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} cells, {self.columns}, got {row}")
        self.rows.append([f"{c:.5g}" if isinstance(c, float) else str(c) for c in row])
        if not self.path:
            return
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        kept.pop("commit", None)  # with which the old rows came
        found = {
            "command": command(), "machine": machine(), "date": str(datetime.date.today()),
            "columns": self.columns, "rows": self.rows,
        }  # fmt: skip
        kept = {"title": self.path.stem, "about": "", "note": ""} | kept | found
        self.path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def command() -> str:
    """The command of this process, without `--json FILE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else sys.argv[:1]
    words = list(sys.argv[1:])
    while "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(["python", *program, *words])


def machine() -> str:
    """The processor or the accelerator, its cores or their number, and the version of JAX."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores, JAX {jax.__version__}"
