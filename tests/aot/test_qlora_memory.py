"""A QLoRA step of a LLaMA of 65B fits in 48 GB, as the real compiler for TPUs counts its bytes."""

import pytest

from tests.aot import compiler
from tests.benchmarks import qlora_memory

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
NAME = "65B"
COUNTS = 1000  # bytes at most of step counts and the like


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, marks=pytest.mark.thorough), True],
    ids=["on the device", "paged"],
)
def found(request):
    """Whether the optimizer's state is paged, and the step."""
    _, paged, step = next(qlora_memory.steps([NAME], [request.param]))
    return paged, step


def test_fits_in_48_gb(found):
    """With all workspace, although not all of it is needed at one time."""
    _, step = found
    assert step.peak <= step.total <= 48e9


def test_parts(found):
    """The base has 4.127 bits a weight; two moments of 4 bytes beside every 2 of an adapter."""
    paged, step = found
    width, inner, layers, _ = qlora_memory.MODELS[NAME]
    weights = layers * (4 * width**2 + 3 * width * inner)
    tables = 2 * 2 * qlora_memory.VOCABULARY * width
    assert step.base == pytest.approx(weights * 4.127 / 8 + tables, rel=0.001)
    assert step.adapters == 2 * layers * qlora_memory.RANK * (8 * width + 3 * (width + inner))
    here, there = (step.host, step.optimizer) if paged else (step.optimizer, step.host)
    assert 4 * step.adapters <= here <= 4 * step.adapters + COUNTS
    assert there <= COUNTS
    assert abs(step.padding) <= 0.002 * step.base
    assert step.output <= COUNTS


def test_matrices_stay_packed(found):
    """Kernels multiply seven times, and six times more where the last product is not kept."""
    _, step = found
    assert step.kernels >= 13
    assert step.decoded == 0
