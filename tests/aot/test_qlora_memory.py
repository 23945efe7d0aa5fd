"""A QLoRA step of a LLaMA of 65B fits a device of 48 GB, as the real compiler for TPUs counts."""

import pytest

from tests.aot import compiler
from tests.benchmarks import qlora_memory

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
LAYERS = qlora_memory.MODELS["65B"][2]


@pytest.fixture(scope="module", params=[False, True], ids=["device", "paged"])
def step(request):
    return next(qlora_memory.steps(["65B"], [request.param]))


def test_fits_48_gb(step):
    """By the sum of all parts; what is there at one time is less."""
    _, _, held = step
    assert held.peak <= held.total <= 48e9


def test_parts(step):
    """4.127 bits of each weight, bfloat16 embedding and head, two moments of 4 bytes."""
    ...
