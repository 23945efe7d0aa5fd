"""The TPU kernels through the real compiler: they compile, they pass nothing but packed bytes, they
do not spill, and their schedules keep up with the memory."""

import re

import pytest

from pallas_kernels.codecs import layout
from pallas_kernels.cost import chips
from pallas_kernels.cost.rates import weights_per_cycle
from tests.aot import cases, compiler, rates, tpu

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
# Slow to compile: of these no rate is asked, and they are compiled at one length.
LOOKUPS = [name for name in cases.CASES if not cases.CASES[name].floor]
RATED = [name for name in cases.CASES if cases.CASES[name].floor]


@pytest.fixture(scope="module")
def rows():
    return {(r["kernel"], r["chip"]): r for r in tpu.rows(RATED)}


@pytest.mark.parametrize("chip", compiler.TOPOLOGIES)
@pytest.mark.parametrize("name", RATED)
def test_rate(rows, name, chip):
    row, case = rows[name, chip], cases.CASES[name]
    assert row["ratio"] >= case.floor[chip]
    assert row["spills"] == 0 or chip in case.spilling


def test_rates_at_real_shapes():
    """What `pallas_kernels.cost.rates` says is the median over them; one shape is far below it."""
    (row,) = rates.rows(["packed_matmul 4 bits A16 g128"], on=("v5e",))
    said = weights_per_cycle("packed_matmul", "v5e", bits=4, group_size=128)
    assert row.median == pytest.approx(said, rel=0.02)
    assert row.worst[0] < 0.5 * row.median and row.worst[1] == (576, 576)


@pytest.mark.parametrize("chip", compiler.TOPOLOGIES)
def test_argument_bytes(rows, chip):
    """x in bfloat16, the words, a float32 scale of every group; nothing unpacked or padded."""
    k = tpu.LENGTHS[1]
    row = rows["packed_matmul 2 bits A8 g128", chip]
    words = 4 * layout.words(k, 2) * cases.N
    assert words == k * cases.N // 4
    assert row["argument_bytes"] == words + 4 * (k // 128) * cases.N + 2 * tpu.M * k


def test_others_compile():
    """On every chip: lookups, 3 bits, transposed products, batches."""
    jobs = tpu.jobs(LOOKUPS, list(compiler.TOPOLOGIES), [512])
    for chip in compiler.TOPOLOGIES:
        statics = {"m": 16, "k": 512, "bits": 4}
        jobs.append(compiler.Job("tests.aot.cases:packed_matmul_transposed", chip, statics))
        for bits in (2, 3, 4):
            statics = {"m": tpu.M, "k": 1024, "bits": bits}
            jobs.append(compiler.Job("tests.aot.cases:codebook_matmul_transposed", chip, statics))
        statics = {"m": 128, "k": 512, "bits": 2, "unit": chips.unit(chip, 2)}
        jobs.append(compiler.Job("tests.aot.cases:packed_matmul", chip, statics))
    done = compiler.compiled(jobs)
    assert [d.error for d in done] == [""] * len(jobs)
    for job, d in zip(jobs, done, strict=True):
        assert "tpu_custom_call" in d.hlo
        if job.arguments["m"] == tpu.M:
            assert compiler.kernel(d).spills == 0, job


@pytest.mark.parametrize("k, n", [(8192, 22016), (11008, 4096), (4544, 576)])
def test_transposed_tables_of_real_models_compile(k, n):
    """For one row and for as many as a training step has; without spills where n is wide."""
    build, rows = "tests.aot.cases:codebook_matmul_transposed", (1, 512)
    jobs = [
        compiler.Job(build, chip, {"m": m, "k": k, "n": n, "bits": 4})
        for chip in compiler.TOPOLOGIES
        for m in rows
    ]
    done = compiler.compiled(jobs)
    assert [d.error for d in done] == [""] * len(jobs)
    assert n < 1024 or [compiler.kernel(d).spills for d in done] == [0] * len(jobs)


def test_experts_of_real_models_compile():
    """Those of Qwen3-30B-A3B, where a token has 8 of 128, for one token and for 64; their words are
    passed as they are stored, and nothing else has the size of the stack."""
    up, down = {"k": 2048, "n": 768}, {"k": 768, "n": 2048, "zero": True}
    asked = [(chip, {**up, "m": 8}) for chip in compiler.TOPOLOGIES]
    asked.append(("v5e", {**down, "m": 8 * 64}))
    build, rest = "tests.aot.cases:grouped_packed_matmul", {"experts": 128, "bits": 4}
    jobs = [compiler.Job(build, c, {**of, **rest, "unit": chips.unit(c, 4)}) for c, of in asked]
    done = compiler.compiled(jobs)
    assert [d.error for d in done] == [""] * len(jobs)
    for d in done:
        assert "tpu_custom_call" in d.hlo
        assert compiler.kernel(d).spills == 0
        assert not re.search(r"(f32|bf16|s8)\[128,(2048|768|256|96),", d.hlo)


def test_planes_of_floats_stay_packed():
    """For one row, and for many: beside arguments and results, less than the compressed weight."""
    k, n = 4096, 4096
    statics = {"k": k, "n": n, "format": "float planes", "activations": "float"}
    build = "tests.aot.real:product"
    jobs = [compiler.Job(build, "v5e", {**statics, "m": m, "kernels": "tpu"}) for m in (1, 256)]
    done = compiler.compiled(jobs, schedules=False)
    assert [d.error for d in done] == [""] * len(jobs)
    for d in done:
        assert "tpu_custom_call" in d.hlo
        assert d.temporary_bytes < k * n * 12 // 8
        assert not re.search(r"(f32|bf16|u16|s32)\[4096,4096\]", d.hlo)


def test_an_error_is_told():
    (done,) = compiler.compiled(
        [compiler.Job("tests.aot.cases:packed_matmul", "v5e", {"m": 8, "k": 512, "bits": 5})]
    )
    assert "bits" in done.error or "5" in done.error
