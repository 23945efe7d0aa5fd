"""Products at widths of real models, as a user asks for them, through the TPU's compiler.

A seeded sample; `python -m tests.aot.widths` compiles every pair of widths.
"""

import itertools
import random

import pytest

from pallas_kernels.tpu import blocks
from tests.aot import compiler, real, widths

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
SEED = 0
CHIPS = tuple(compiler.TOPOLOGIES)
# Of these no product compiled once for several groups and several steps along k where a block ended
# with 128 columns, as blocks of 640 (n = 2560) do, and for many rows of 896 (n = 5120).
ONCE = ("2 bits", "3 bits", "4 bits", "8 bits", "ternary", "NF4", "trellis")
# What takes long to compile, once in 13.
FORMATS = (
    "2 bits", "3 bits", "4 bits", "8 bits", "ternary", "NF4", "trellis", "4 bits, zero points",
    "2 bits, a scale a column", "2 bits", "4 bits", "trellis, a scale a group", "E8P",
)  # fmt: skip
# Beside widths and formats: forms of activations and types, both derivatives, stacks, the longest k
# of public models, and shards of one.
OTHERS = [
    {"k": 7168, "n": 2560, "m": 1, "format": "4 bits", "activations": "int8"},
    {"k": 5376, "n": 2560, "m": 128, "format": "2 bits", "activations": "int8/256", "group": 384},
    {"k": 8192, "n": 2560, "m": 8, "format": "4 bits", "dtype": "float32"},
    {"k": 4544, "n": 4544, "m": 512, "format": "2 bits"},
    {"k": 7168, "n": 2560, "m": 128, "format": "4 bits", "backward": True},
    {"k": 2560, "n": 7168, "m": 8, "format": "3 bits", "backward": True, "dtype": "float32"},
    {"k": 11008, "n": 4096, "m": 512, "format": "NF4", "backward": True},
    {"k": 5120, "n": 5120, "m": 8, "format": "4 bits", "layers": 2},
    {"k": 2880, "n": 2880, "m": 8, "format": "4 bits", "experts": 4},
    {"k": 28672, "n": 8192, "m": 128, "format": "4 bits"},
    {"k": 53248, "n": 16384, "m": 128, "format": "8 bits", "group": 16},
    {"k": 53248, "n": 16384, "m": 512, "format": "8 bits", "activations": "int8/256"},
    {"k": 16384, "n": 128, "m": 512, "format": "4 bits", "activations": "int8/256"},
    {"k": 2432, "n": 2560, "m": 8, "format": "2 bits"},
    {"k": 2560, "n": 640, "m": 128, "format": "2 bits"},
]


# Rows of three planes, and of two in several blocks that do not divide: once no whole tiles.
TILES = {
    "v5p": [{"k": 2880, "n": 576, "m": 72, "format": "trellis"}],
    "tpu7x": [{"k": 2048, "n": 576, "m": 128, "format": format} for format in ("2 bits", "3 bits")],
}


def sample(chip):
    """What is compiled for a chip: arguments of `real.product`."""
    rng, at = random.Random(SEED), CHIPS.index(chip)
    once = list(enumerate(itertools.product(ONCE, (1, 8, 128))))
    found = [
        {"k": rng.choice((7168, 8192)), "n": rng.choice((2560, 5120) if m == 128 else (2560,)),
         "m": m, "format": format}
        for i, (format, m) in rng.sample(once, len(once)) if (i + SEED) % len(CHIPS) == at
    ]  # fmt: skip
    found += OTHERS[at :: len(CHIPS)] + TILES.get(chip, [])
    rng = random.Random(f"{SEED} {chip}")
    columns = rng.sample(real.WIDTHS, len(real.WIDTHS))
    formats = rng.sample(FORMATS, len(FORMATS))
    for k, n, format in zip(real.WIDTHS, columns, formats, strict=True):
        found.append({"k": k, "n": n, "m": rng.choice((1, 8, 128)), "format": format})
    return found


def test_the_sample_holds_every_width_and_what_once_failed():
    of = {chip: sample(chip) for chip in CHIPS}
    every = [s for found in of.values() for s in found]
    assert 80 <= len(every) <= 110
    for found in of.values():
        assert {s["k"] for s in found} >= set(real.WIDTHS) <= {s["n"] for s in found}
    once = {(s["format"], s["m"]) for s in every if s["n"] in (2560, 5120) and s["k"] >= 7168}
    assert once >= set(itertools.product(ONCE, (1, 8, 128)))
    few, many = blocks.choose(1, 7168, 2560, stacked=2), blocks.choose(128, 7168, 5120, stacked=2)
    assert few.n % 512 == many.n % 256 == 128 and max(few.k, many.k) < 7168


# Their matrix units are those of v5e (128 x 128) and of tpu7x (256 x 256).
THOROUGH = ("v5p", "v6e")


@pytest.mark.parametrize(
    "chip",
    [pytest.param(c, marks=pytest.mark.thorough) if c in THOROUGH else c for c in CHIPS],
)
def test_they_compile(chip):
    found = sample(chip)
    done = compiler.compiled(
        [compiler.Job(widths.BUILD, chip, s) for s in found], timeout=1800, schedules=False
    )
    faults = [(s, d.error) for s, d in zip(found, done, strict=True) if d.error]
    assert faults == []
    for s, d in zip(found, done, strict=True):
        # A kernel is there where one was promised: not for a trellis of blocks that are too short.
        statics = {name: value for name, value in s.items() if name != "backward"}
        short = s["format"] == "trellis, a scale a group" and real.group_of(s["k"]) < 128
        assert real.served(**statics) == ("tpu_custom_call" in d.hlo) == (not short), s
