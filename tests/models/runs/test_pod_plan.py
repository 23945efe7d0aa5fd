"""Plans of pods by the formula; `tests.aot.test_pods` compares them with the compiler."""

import dataclasses
import math

import jax
import pytest

import jaxquant as jq
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.architectures.named import ARCHITECTURES
from jaxquant_models.readers.weights import param_shapes
from jaxquant_models.runs.pod_bytes import padded_bytes
from jaxquant_models.runs.pod_mesh import mesh_of_text
from jaxquant_models.runs.pod_plan import lines, plan_pod, report_of
from jaxquant_models.runs.pod_programs import _packed, packed_shapes
from jaxquant_models.runs.pod_request import PodRequest
from jaxquant_models.runs.recipes import recipe_of
from pallas_kernels.cost.topologies import slice_of

KEPT = jq.Recipe([("*", jq.KEEP)])
BILLIONS = {
    "llama-3-8b": 8.030, "llama-3-70b": 70.554, "llama-3-405b": 405.853, "qwen3-8b": 8.191,
    "qwen3-32b": 32.762, "qwen3-235b-a22b": 235.094, "deepseek-v3-sized": 670.344,
}  # fmt: skip


def request(bits=2, where="v5e:4x4", name="llama-3-70b", work="decode", batch=64, **more):
    method = None if bits == 16 else jq.rtn(bits, 128, symmetric=True)
    if work == "qlora":
        method = jq.nf4(double_quant=True)
    recipe = KEPT if method is None else recipe_of(method)
    given = {"context": 8192} | more
    return PodRequest(ARCHITECTURES[name], recipe, work, batch, where=slice_of(where), **given)


def test_architectures_have_the_published_numbers_of_weights():
    count = lambda c: sum(math.prod(s) for s in param_shapes(Llama(c)).values()) / 1e9
    found = {name: count(config) for name, config in ARCHITECTURES.items()}
    assert found == pytest.approx(BILLIONS, abs=1e-3)


def test_70b_fits_in_2_bits_and_not_in_16():
    packed, floats = (plan_pod(request(bits), compile_=False) for bits in (2, 16))
    assert packed.fits and not floats.fits
    assert packed.smallest["v5e"] == "v5e:4x4" and floats.smallest["v5e"] == "v5e:4x8"
    # Of 2 bits and float16 scales of 128 weights, and of two tables of bfloat16.
    layers, tables = 68.45e9, 2 * 128256 * 8192
    assert packed.held["weights"] == pytest.approx((layers * 2.125 / 8 + 2 * tables) / 16, rel=0.01)
    cache = 2 * 2 * 80 * 64 * 8192 * 8 * 128
    assert packed.held["cache"] == pytest.approx(cache / 16, rel=1e-6)
    assert packed.time.memory == pytest.approx((packed.held["weights"] + cache / 16) / 819e9, 0.02)
    assert packed.time.bound == "memory" and packed.served == (7, 7)
    assert floats.time.memory - packed.time.memory > 8e-3


def test_words_are_gathered_and_weights_are_not():
    plan = plan_pod(request(2, "v5e:16x16", work="prefill", batch=32, context=2048), False)
    words, scales = plan.moved["all-gather", "s32"], plan.moved["all-gather", "f16"]
    assert words == pytest.approx(68.45e9 * 2 / 8 / 8, rel=0.01)
    assert scales == pytest.approx(words / 16, rel=0.01)
    assert plan.time.bound == "multiplying"


def test_the_shapes_of_all_layers_are_those_of_one():
    small = dataclasses.replace(ARCHITECTURES["llama-3-8b"], n_layers=3)
    for work, method in (("decode", jq.gptq(2)), ("qlora", jq.nf4()), ("qat", jq.lsq(bits=4))):
        of = dataclasses.replace(request(), config=small, recipe=recipe_of(method), work=work)
        ours, traced = packed_shapes(of), _packed(small, of.recipe, work)
        assert jax.tree.structure(ours) == jax.tree.structure(traced)
        assert jax.tree.leaves(ours) == jax.tree.leaves(traced)


def test_experts_are_split_and_read_as_far_as_tokens_reach_them():
    one, many = (
        plan_pod(request(2, "v5e:8x8", "qwen3-235b-a22b", batch=b, context=128), False)
        for b in (1, 64)
    )
    assert dict(one.mesh)["expert"] > 1
    assert 5 * one.time.memory < many.time.memory < 128 / 8 * one.time.memory
    assert one.fits and many.fits


def test_training_keeps_moments_of_the_adapters_only():
    plan = plan_pod(request(where="v5e:16x16", work="qlora", batch=32, context=1024), False)
    assert plan.held["optimizer"] == pytest.approx(2 * plan.held["trained"], rel=1e-3)
    assert plan.held["trained"] < plan.held["weights"] and plan.fits
    with pytest.raises(ValueError, match="do not divide a batch of 8"):
        plan_pod(request(where="v5e:16x16", work="qlora", batch=8), False)


def test_qat_trains_every_weight_in_float32_and_keeps_two_moments():
    plan = plan_pod(request(where="v5e:16x16", work="qat", batch=32, context=512), False)
    assert plan.held["trained"] == pytest.approx(4 * 70.55e9 / 256, rel=0.4)
    assert plan.held["optimizer"] == pytest.approx(2 * plan.held["trained"], rel=1e-3)
    assert plan.held["weights"] < 0.1 * plan.held["trained"]


@pytest.mark.parametrize(
    ("mesh", "error"),
    [("data=1,model=16", "do not divide the 8 kv_heads"), ("model=8", "has 8 devices"),
     ("data=256,model=1", "data=256,model=1 has 256 devices")],
)  # fmt: skip
def test_meshes_that_do_not_suit(mesh, error):
    with pytest.raises(ValueError, match=error):
        plan_pod(request(mesh=mesh_of_text(mesh)), False)


def test_a_mesh_that_breaks_groups():
    with pytest.raises(ValueError, match="layers/attn/k/kernel.*group"):
        plan_pod(request(2, "v5e:16x16", mesh=mesh_of_text("data=256,model=1")), False)


@pytest.mark.parametrize("text", ["data", "data=0", "rows=4", "data=2,data=2", "data=x"])
def test_what_is_no_mesh(text):
    with pytest.raises(ValueError, match="--mesh takes sizes of the axes"):
        mesh_of_text(text)


def test_padding():
    assert padded_bytes((80, 14336, 1), 4) == 4 * 80 * 14336
    assert padded_bytes((80, 2, 128), 2) == 2 * 80 * 2 * 128
    assert padded_bytes((5, 100), 4) == 4 * 8 * 128


def test_the_request_survives_json_and_the_report_says_where_it_comes_from():
    of = request(mesh=(("data", 4), ("model", 4)))
    assert PodRequest.from_json(of.to_json()) == of
    plan = plan_pod(of, False)
    assert report_of(plan)["source"] == "formula" and report_of(plan)["mesh"] == "data=4,model=4"
    assert any("it fits" in line for line in lines(plan))
