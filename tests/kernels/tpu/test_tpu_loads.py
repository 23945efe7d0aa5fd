"""What the TPU's compiler asks of tiles, of the last two axes of what lies in vector memory.

It takes no index into one that it does not know, and no block that cuts one. The shape is one at
which such loads were refused: several groups, several steps along k, and a last run of 128 columns
in a block.
"""

import jax
import pytest
from jax.extend.core import Var

from pallas_kernels.tpu import blocks, trellis
from tests.aot import real
from tests.support.lowering import equations

K, N = 7168, 2560
# Format of the weight, activations, whether the derivative by x is meant.
CASES = [
    ("2 bits", "float", False), ("3 bits", "float", False), ("4 bits, zero points", "float", False),
    ("8 bits", "int8", False), ("4 bits", "int8/256", False), ("ternary", "float", False),
    ("NF4", "float", False), ("trellis, a scale a group", "float", False), ("E8P", "float", False),
    ("4 bits", "float", True), ("3 bits", "float", True), ("NF4", "float", True),
]  # fmt: skip


def dynamic(fn, *args):
    """Loads and stores in the kernels of fn whose place in a tile is not known, and all."""
    found, count = [], 0
    for eqn in equations(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name not in ("get", "swap") or "smem" in str(eqn.invars[0].aval):
            continue
        count += 1
        left = eqn.invars[1 if eqn.primitive.name == "get" else 2 :]
        for indexer in jax.tree.unflatten(eqn.params["tree"], left):
            inside = jax.tree.leaves(indexer.indices[-2:])
            found += [eqn] if any(isinstance(i, Var) for i in inside) else []
    return found, count


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("m", [8, 128])
def test_no_index_into_a_tile_is_dynamic(case, m):
    format, activations, backward = case
    fn, args = real.product(
        k=K, n=N, m=m, format=format, activations=activations, backward=backward,
        kernels="auto" if backward else "tpu",
    )  # fmt: skip
    found, count = dynamic(fn, *args)
    assert count > 10 and found == []


@pytest.mark.parametrize("stacked", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96])
def test_blocks_of_rows_are_whole_tiles_or_all(stacked):
    """Three planes are a float8 unit's; 80 rows of them were refused."""
    for m in range(1, 600):
        rows = blocks.choose(m, 4096, 4096, stacked=stacked).m
        assert rows % 8 == 0 and (rows * stacked % 32 == 0 or rows >= m), m
        if stacked < 3:
            rows = trellis.choose(m, 4096, 1, stacked).m
            assert rows % 8 == 0 and (rows * stacked % 32 == 0 or rows >= m), m
