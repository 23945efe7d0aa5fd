"""Llama-3-70B compiled for whole pods through `jq.quantized`: memory, kernels, and what is sent.

The program is that of `jaxquant plan --topology`: the project's own Llama with `jq.quantized`.
"""

import math

import pytest

import jaxquant as jq
from jaxquant_models.architectures.named import ARCHITECTURES
from jaxquant_models.runs import pod_compiler
from jaxquant_models.runs.pod_formula import expected_temporaries
from jaxquant_models.runs.pod_plan import plan_pod
from jaxquant_models.runs.pod_programs import abstract_mesh, packed_shapes, program
from jaxquant_models.runs.pod_request import PodRequest
from jaxquant_models.runs.recipes import recipe_of
from pallas_kernels.cost.topologies import slice_of
from tests.support.pods import BYTES_WITHIN

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(pod_compiler.missing()), reason=pod_compiler.missing() or "-"),
]
CONFIG = ARCHITECTURES["llama-3-70b"]
LAYERS = CONFIG.weights - 2 * CONFIG.vocab_size * CONFIG.d_model
TWO_BITS = recipe_of(jq.rtn(2, 128, symmetric=True))
NF4 = recipe_of(jq.nf4(double_quant=True))
# Products of a step, and those of training again: forward without "down", and transposed.
PRODUCTS, TRAINED = 7, 7 + 6 + 7
FLOATS = ("f32", "bf16", "f16")
both_topologies = pytest.mark.parametrize(
    "topology", ["v5e:16x16", pytest.param("v5p:8x8x8", marks=pytest.mark.thorough)]
)


def planned(workload, topology, recipe, batch, context):
    plan = plan_pod(PodRequest(CONFIG, recipe, workload, batch, context, slice_of(topology)))
    assert plan.compiled.error == "" and plan.fits
    assert plan.compiled.arguments == pytest.approx(plan.arguments, rel=BYTES_WITHIN)
    return plan


def largest_gathered(plan):
    """Numbers in the largest array of floats that is gathered in a layer."""
    gathers = [one for one in plan.collectives if one.kind == "all-gather" and one.dtype in FLOATS]
    return max((math.prod(one.shape) for one in gathers if one.count > 1), default=0)


@both_topologies
def test_in_decoding_no_weight_moves(topology):
    """Of keys and values, each of so many devices has too few words for a kernel to pay."""
    plan = planned("decode", topology, TWO_BITS, 64, 8192)
    assert plan.compiled.kernels == 5 and plan.kernel_coverage == (7, 5)
    moved = {one.dtype for one in plan.collectives if one.count > 1}
    assert moved <= {"f32", "bf16"}  # sums of products and activations
    assert largest_gathered(plan) <= 64 * CONFIG.d_model
    assert plan.temporaries < 0.1e9  # the cache is updated in place


def test_in_a_prefill_packed_words_are_gathered():
    """The formula of temporaries is within a factor of three of the compiler's."""
    plan = planned("prefill", "v5e:16x16", TWO_BITS, 32, 2048)
    model = dict(plan.mesh)["model"]
    assert plan.compiled.kernels == PRODUCTS and plan.kernel_coverage == (7, 7)
    words = sum(one.bytes for one in plan.collectives if one.dtype == "s32" and one.count > 1)
    assert words == LAYERS * 2 // 8 // model
    # Scales are float16, one for 128 weights; the smallest weight is that of the keys.
    assert largest_gathered(plan) <= CONFIG.d_model * CONFIG.d_ff // 128 // model
    request = plan.request
    of = program(request, packed_shapes(request), abstract_mesh(plan.mesh))
    found = plan.compiled.temporaries
    assert 1 / 3 < expected_temporaries(request, of, plan.mesh) / found < 3


@both_topologies
def test_in_qlora_packed_words_and_adapters_are_gathered(topology):
    """Words twice: forward, and once for both passes of the backward one."""
    batch = slice_of(topology).devices // 8
    plan = planned("qlora", topology, NF4, batch, 512)
    model = dict(plan.mesh)["model"]
    assert plan.compiled.kernels >= TRAINED
    words = sum(one.bytes for one in plan.collectives if one.dtype == "s32" and one.count > 1)
    assert LAYERS * 4 // 8 // model <= words / 2 <= 1.5 * LAYERS * 4 // 8 // model
    # Scales of 64 weights, or a factor of the adapters, each far below a weight.
    assert largest_gathered(plan) <= CONFIG.d_model * CONFIG.d_ff // 64 // model


def test_70b_in_16_bits_does_not_fit_where_it_does_in_2():
    kept = jq.Recipe([("*", jq.KEEP)])
    of = lambda recipe: PodRequest(CONFIG, recipe, "decode", 64, 8192, slice_of("v5e:4x4"))
    packed = plan_pod(of(TWO_BITS))
    assert packed.fits and packed.compiled.kernels == PRODUCTS and packed.kernel_coverage == (7, 7)
    plan = plan_pod(of(kept))
    assert plan.compiled.exhausted and not plan.fits
    assert plan.smallest["v5e"].name == "v5e:4x8"
