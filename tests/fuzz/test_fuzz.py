"""A few hundred inputs of the fuzzer; and that it sees what it is there to see.

It runs in a process of its own, for this one has computed with JAX and cannot be forked.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz import mutations

ROOT = Path(__file__).parents[2]
FAULTS = """
import json, os, sys, tempfile, time
from pathlib import Path
from tests.fuzz import children
from tests.fuzz.corpus import Case
from tests.fuzz.mutations import flip

def fails(error):
    raise error

place = Path(tempfile.mkdtemp())
(place / "seed").mkdir()
(place / "seed" / "x.bin").write_bytes(bytes(64))
readers = {
    "a": lambda f: None,
    "b": lambda f: fails(ValueError("one line")),
    "c": lambda f: fails(KeyError("raw")),
    "d": lambda f: fails(ValueError("two\\nlines")),
    "e": lambda f: os.abort(),
    "f": lambda f: time.sleep(60),
    "g": lambda f: bytearray(3 << 30),
    "h": lambda f: (f / "x.bin").read_bytes(),
    "i": lambda f: json.loads("{"),
}
same = {"h": bytes(64)}
cases = {n: [Case(place / "seed", {"x.bin": [flip]}, r, same.get(n))] for n, r in readers.items()}
children.SECONDS = 2
found = [f for f in children.run(cases, 0, iter(range(9))) if f]
print(json.dumps({f["reader"]: f["error"] for f in found}))
"""


def run(*args):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_few_hundred_inputs():
    done = run("-m", "tests.fuzz", "--count", "240", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "240 inputs, 0 findings" in done.stdout


def test_it_sees_every_kind_of_fault():
    done = run("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "c": "KeyError",
        "d": "more than a line",
        "e": "crash or hang",
        "f": "crash or hang",
        "g": "MemoryError",
        "h": "silent change",
        "i": "JSONDecodeError",
    }


def test_an_input_is_its_number():
    """Whatever ran before it: nothing of one input is left in the next."""
    data = json.dumps({"a": [1, {"b": {}}], "c": "x"}).encode()
    made = lambda n: mutations.of_json(random.Random(n), data)
    first = [made(n) for n in range(300)]
    assert [made(n) for n in reversed(range(300))] == first[::-1]
    assert len(set(first)) > 100
