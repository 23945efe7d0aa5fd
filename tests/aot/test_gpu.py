"""GPU kernels as machine code: no spills, few registers, tensor cores, few instructions."""

import pytest

from tests.aot import gpu
from tests.aot.gpu_cases import CASES, WIDTHS

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(gpu.missing()), reason=f"GPU compiler {gpu.missing()}"),
    pytest.mark.xdist_group("gpu compiler"),
]


@pytest.fixture(scope="module", params=gpu.CHIPS)
def rows(request):
    """Reports of all cases on one chip, compiled in one go."""
    return {row["kernel"]: row for row in gpu.report(chips=(request.param,))}


@pytest.mark.parametrize("name", CASES)
def test_machine_code(name, rows):
    row, case = rows[name], CASES[name]
    assert "error" not in row, row["error"]
    assert row["spills"] == 0
    assert row["registers"] <= 128
    integer = "int8" in name
    assert row["multiplies"] <= ({"IMMA", "IGMMA"} if integer else {"HMMA", "HGMMA"})
    assert row["multiplies"]
    assert row["instructions_per_weight"] <= case.ceiling


@pytest.mark.parametrize("chip", gpu.CHIPS)
def test_widths_of_real_models_compile(chip):
    found = gpu.compiled(chip, list(WIDTHS))
    assert {name: ptx for name, ptx in found.items() if ptx.startswith("error: ")} == {}


def test_counts_a_worse_loop():
    """The innermost loop that multiplies is what counts, all of it."""
    body = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LOP3.LUT R1, R2, 0x3, RZ, 0xc0, !PT ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
"""
    lines, loop = gpu.loop(body)
    assert len(lines) == 5 and loop == (1, 3)
