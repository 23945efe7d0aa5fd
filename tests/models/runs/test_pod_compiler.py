"""The process that compiles for pods, by what a process of its kind may do."""

import json
import subprocess

import pytest

import jaxquant as jq
from jaxquant.distributed.collectives import Collective
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.runs import pod_compiler, pod_plan
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.cost.topologies import slice_of

CONFIG = LlamaConfig(
    vocab_size=256, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=512
)
REQUEST = PodRequest(CONFIG, jq.Recipe([("*", jq.KEEP)]), "decode", 2, 64, slice_of("v5e:2x2"))
DONE = {
    "error": "", "arguments": 5, "temporaries": 7, "kernels": 2,
    "collectives": [["all-reduce", "f32", [2, 3], 4, 2]],
}  # fmt: skip


@pytest.fixture
def process(monkeypatch):
    """process(stdout, ...): the process then ends in this way."""
    monkeypatch.setattr(pod_compiler, "missing", lambda: "")

    def ends(stdout="", stderr="", status=0, late=False):
        def run(command, *, input, timeout, **rest):
            assert PodRequest.from_json(json.loads(input)) == REQUEST
            if late:
                raise subprocess.TimeoutExpired(command, timeout)
            return subprocess.CompletedProcess(command, status, stdout, stderr)

        monkeypatch.setattr(pod_compiler.subprocess, "run", run)

    return ends


def test_a_result(process):
    process("a warning\ncompiled: " + json.dumps(DONE) + "\n")
    found = pod_compiler.compiled(REQUEST)
    assert found == ("", 5, 7, 2, (Collective("all-reduce", "f32", (2, 3), 4, 2),))
    plan = pod_plan.plan_pod(REQUEST)
    assert (
        plan.source == "compiler"
        and plan.collectives == found.collectives
        and plan.temporaries == 7
    )
    assert pod_plan.report_of(plan)["compiled_arguments"] == 5


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ({"stderr": "Traceback\n  ...\nFatal: no such chip\n\n", "status": -6},
         "the compiler's process ended with status -6: Fatal: no such chip"),
        ({"stdout": "nothing of use\n"}, "the compiler's process ended with status 0: no message"),
        ({"late": True}, "the compiler took more than 900 s and was stopped"),
    ],
)  # fmt: skip
def test_without_a_result_the_formula_is_used(process, ends, error):
    process(**ends)
    plan = pod_plan.plan_pod(REQUEST)
    assert plan.compiled.error == error and not plan.compiled.exhausted
    assert plan.source == "formula" and plan.fits
    assert f"  error of the compiler: {error}" in pod_plan.lines(plan)
    report = pod_plan.report_of(plan)
    assert report["compiled_arguments"] is None and report["compiler_error"] == error


def test_memory_that_does_not_suffice(process):
    """The program does not fit, whatever the formula says."""
    error = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm\nUsed 17G of 15G"
    process("compiled: " + json.dumps(DONE | {"error": error, "arguments": 0, "collectives": []}))
    plan = pod_plan.plan_pod(REQUEST)
    assert plan.compiled.exhausted and not plan.fits and plan.total < REQUEST.topology.memory
    assert f"  error of the compiler: {error.splitlines()[0]}" in pod_plan.lines(plan)
    assert pod_plan.report_of(plan)["compiled_arguments"] is None
