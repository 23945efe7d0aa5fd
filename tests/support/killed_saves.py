"""Saves that are killed: `python -m tests.support.killed_saves DIR HOW SWAP EVERY`.

HOW is overwrite or fresh, SWAP is exchange or renames.

Before every operation on files, or every EVERY-th, a save is killed; what is there then must be
the old checkpoint or the new one, whole, and the next save must leave that and nothing else.
"""

import json
import sys
from pathlib import Path

import numpy as np

from jaxquant import storage
from jaxquant.durable import publish
from jaxquant.storage import checkpoint
from tests.support.killed import child

OLD, NEW = ({"w": np.full((3, 4), value, np.float32)} for value in (1, 2))


def value_at(path):
    """What the checkpoint holds, asked in a process of its own; None if there is none."""

    def look():
        held = storage.is_checkpoint(path)
        found = np.unique(checkpoint.load(path)["w"]).tolist() if held else None
        path.with_name("said").write_text(json.dumps(found))

    assert child(look) == 0
    said = path.with_name("said")
    found = json.loads(said.read_text())
    said.unlink()
    return found


def main(place, how, swap, every):
    """Prints how many saves were killed, and what was there after them."""
    out, seen, killed = Path(place) / "out", [], 0
    if swap == "renames":
        publish._exchanged = lambda a, b: False
    over = how == "overwrite"
    assert not over or child(lambda: checkpoint.save(out, OLD)) == 0
    for count in range(0, 10_000, int(every)):
        status = child(lambda: checkpoint.save(out, NEW, overwrite=over), before=count)
        assert status in (0, -9), status
        found = value_at(out)
        assert found in ([[1], [2]] if over else [None, [2]]), found
        seen.append(found)
        killed += status == -9
        again = OLD if over else NEW
        assert child(lambda a=again: checkpoint.save(out, a, overwrite=True)) == 0
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert value_at(out) == [again["w"][0, 0]]
        if status == 0:
            break
        if not over:
            assert child(lambda: [p.unlink() for p in out.rglob("*") if p.is_file()]) == 0
            for folder in sorted((p for p in out.rglob("*")), reverse=True):
                folder.rmdir()
            out.rmdir()
    print(json.dumps({"killed": killed, "seen": [s and s[0] for s in seen]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
