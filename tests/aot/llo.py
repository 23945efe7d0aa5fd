"""What libtpu's dump of a compiled kernel says: VLIW bundles, slots in use, spills.

The dump's format is undocumented: what is not recognised is left out, and a kernel whose files are
missing has no `Schedule`.
"""

import re
from pathlib import Path
from typing import NamedTuple

# Flags of LIBTPU_INIT_ARGS that make libtpu write the dump into a folder.
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
_SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


class Schedule(NamedTuple):
    """The final schedule of one kernel, loops counted once.

    Attributes:
      bundles: VLIW instructions, one issued a cycle.
      spills: vector registers stored to make room, or loaded back.
      slots: share of the issue slots of a kind that are used, by the name of the kind.
    """

    bundles: int
    spills: int
    slots: dict[str, float]


def schedules(folder: Path) -> dict[str, Schedule]:
    """The schedules of the kernels whose dumps lie in a folder, by the kernels' Pallas names."""
    found = {}
    for file in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        # 1795748783976947417-NAME.1-69-final_...: a time, the instruction, the pass.
        name = re.fullmatch(r"\d+-(.+?)(\.\d+)?-\d+-final_hlo.*", file.name)
        used = _slots(file.read_text())
        if name and used and "<" not in name[1] and name[1] != "TLP":
            found[name[1]] = used
    return found


def _slots(text: str) -> Schedule | None:
    """Of the table of slots: a line of names, one of capacities, then one for each bundle."""
    lines = text.splitlines()
    names = next((line for line in lines if "MXU" in line or "VALU" in line), "")
    names = [name.strip() for name in names.split(",")]
    rows = [[int(v) for v in line.split()] for line in lines if re.fullmatch(r"[\d\s]+", line)]
    rows = [row for row in rows if len(row) == len(names)]
    if len(rows) < 2:
        return None
    capacity, *bundles = rows
    total = dict(zip(names, map(sum, zip(*bundles, strict=True)), strict=True))
    share = {
        name: round(total[name] / (most * len(bundles)), 3)
        for name, most in zip(names, capacity, strict=True)
        if name not in _SPILLS and most
    }
    return Schedule(len(bundles), sum(total.get(name, 0) for name in _SPILLS), share)
