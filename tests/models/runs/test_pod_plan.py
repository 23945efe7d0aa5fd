"""Plans of pods by the formula; `tests.aot.test_pods` compares them with the compiler."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.architectures.named import ARCHITECTURES
from jaxquant_models.readers.weights import param_shapes
from jaxquant_models.runs.pod_bytes import padded_bytes
from jaxquant_models.runs.pod_formula import xla_name
from jaxquant_models.runs.pod_mesh import mesh_of_text
from jaxquant_models.runs.pod_plan import lines, plan_pod, report_of
from jaxquant_models.runs.pod_programs import _packed, packed_shapes
from jaxquant_models.runs.pod_request import PodRequest
from jaxquant_models.runs.recipes import recipe_of
from pallas_kernels.cost.rates import weights_per_cycle
from pallas_kernels.cost.topologies import slice_of

KEPT = jq.Recipe([("*", jq.KEEP)])
BILLIONS = {
    "llama-3-8b": 8.030, "llama-3-70b": 70.554, "llama-3-405b": 405.853, "qwen3-8b": 8.191,
    "qwen3-32b": 32.762, "qwen3-235b-a22b": 235.094, "deepseek-v3-sized": 670.344,
}  # fmt: skip


def request(bits=2, topology="v5e:4x4", name="llama-3-70b", workload="decode", batch=64, **more):
    method = None if bits == 16 else jq.rtn(bits, 128, symmetric=True)
    if workload == "qlora":
        method = jq.nf4(double_quant=True)
    recipe = KEPT if method is None else recipe_of(method)
    given = {"context": 8192} | more
    return PodRequest(
        ARCHITECTURES[name], recipe, workload, batch, topology=slice_of(topology), **given
    )


def test_architectures_have_the_published_numbers_of_weights():
    count = lambda c: sum(math.prod(s) for s in param_shapes(Llama(c)).values()) / 1e9
    found = {name: count(config) for name, config in ARCHITECTURES.items()}
    assert found == pytest.approx(BILLIONS, abs=1e-3)


def test_70b_fits_in_2_bits_and_not_in_16():
    packed, floats = (plan_pod(request(bits), compile_=False) for bits in (2, 16))
    assert packed.fits and not floats.fits
    assert packed.smallest["v5e"].name == "v5e:4x4"
    assert floats.smallest["v5e"].name == "v5e:4x8"
    # Of 2 bits and float16 scales of 128 weights, and of two tables of bfloat16.
    layers, tables = 68.45e9, 2 * 128256 * 8192
    assert packed.argument_bytes["weights"] == pytest.approx(
        (layers * 2.125 / 8 + 2 * tables) / 16, rel=0.01
    )
    cache = 2 * 2 * 80 * 64 * 8192 * 8 * 128
    assert packed.argument_bytes["cache"] == pytest.approx(cache / 16, rel=1e-6)
    assert packed.time.memory == pytest.approx(
        (packed.argument_bytes["weights"] + cache / 16) / 819e9, 0.02
    )
    assert packed.time.bound == "memory" and packed.kernel_coverage == (7, 7)
    assert floats.time.memory - packed.time.memory > 8e-3


def test_words_are_gathered_and_weights_are_not():
    plan = plan_pod(request(2, "v5e:16x16", workload="prefill", batch=32, context=2048), False)
    words, scales = plan.moved["all-gather", "s32"], plan.moved["all-gather", "f16"]
    assert words == pytest.approx(68.45e9 * 2 / 8 / 8, rel=0.01)
    assert scales == pytest.approx(words / 16, rel=0.01)
    assert plan.time.bound == "compute"


def test_the_shapes_of_all_layers_are_those_of_one():
    small = dataclasses.replace(ARCHITECTURES["llama-3-8b"], n_layers=3)
    for workload, method in (("decode", jq.gptq(2)), ("qlora", jq.nf4()), ("qat", jq.lsq(bits=4))):
        of = dataclasses.replace(
            request(), config=small, recipe=recipe_of(method), workload=workload
        )
        ours, traced = packed_shapes(of), _packed(small, of.recipe, workload)
        assert jax.tree.structure(ours) == jax.tree.structure(traced)
        assert jax.tree.leaves(ours) == jax.tree.leaves(traced)


def test_experts_are_split_and_read_as_far_as_tokens_reach_them():
    """Everything else is whole on all 16 devices of "expert", and a quarter on each of "model"."""
    mesh = mesh_of_text("data=1,expert=16,model=4")
    c, plans = ARCHITECTURES["qwen3-235b-a22b"], {}
    others = 94 * (2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128) + 4096 * 151936
    router, one_expert = 94 * 4096 * 128, 94 * 3 * 4096 * 1536
    for batch in (1, 64):
        of = request(16, "v5e:8x8", "qwen3-235b-a22b", batch=batch, context=128, mesh=mesh)
        plans[batch] = plan = plan_pod(of, False)
        reached = 128 * (1 - (1 - 8 / 128) ** batch)
        assert reached <= batch * c.experts_per_token
        read = 2 * (others / 4 + router + one_expert * reached / 64 + batch * 4096 / 4)
        read += plan.argument_bytes["cache"]
        assert plan.time.memory == pytest.approx(read / 819e9, rel=1e-6) and plan.fits
        products = 2 * batch * (others / 4 + router + one_expert * 8 / 64)
        attention = 4 * batch * 128 * 64 * 128 * 94 / 4
        assert plan.time.compute == pytest.approx((products + attention) / 197e12, rel=1e-6)
        # The rows of all experts are added: over "expert", and those of "down" over "model" too.
        rows = 94 * 4 * batch * 8 * (2 * 1536 / 4 + 4096)
        assert plan.moved["all-reduce", "f32"] == rows
    assert plans[1].time.memory == pytest.approx(5.14e-3, rel=1e-3)


def test_temporaries_of_experts_are_those_of_the_rows_that_are_sent_to_them():
    """Rows enter and leave in bfloat16, and leave the product in float32; logits are both too."""
    of = request(2, "v5e:8x8", "qwen3-235b-a22b", batch=64, context=128)
    of = dataclasses.replace(of, mesh=mesh_of_text("data=1,expert=16,model=4"))
    rows = 64 * 8 * (4096 * (2 + 2 + 4) + 3 * 2 * 1536 // 4)
    logits = 64 * 151936 // 4 * (4 + 2)
    assert plan_pod(of, False).temporaries == max(rows, logits)


SMALL = LlamaConfig(
    vocab_size=1024, d_model=1024, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=128, d_ff=4096,
    max_position=256,
)  # fmt: skip


def received(parts, *numbers):
    """Bytes that a device receives of sums in bfloat16 over so many devices."""
    return 2 * 2 * sum(numbers) * (parts - 1) / parts


@pytest.mark.parametrize(
    ("topology", "data", "bandwidth", "peak", "ici_bandwidth"),
    [("v5e:2x2", 2, 819e9, 197e12, 200e9), ("tpu7x:2x2x1", 4, 7380e9 / 2, 2307e12 / 2, 300e9)],
)
def test_the_roofline_by_hand(topology, data, bandwidth, peak, ici_bandwidth):
    """A chip of tpu7x is two devices, each with half of its bandwidth, peak and links."""
    mesh = mesh_of_text(f"data={data},model=2")
    of = dataclasses.replace(request(16, topology), config=SMALL, batch=4, context=256, mesh=mesh)
    plan, devices = plan_pod(of, False), 2 * data
    matrices = 2 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096) + 1024 * 1024
    cache = 2 * 2 * (2 * 4 * 4 * 256 * 128) / devices + 4  # and the number of tokens in it
    read = 2 * (matrices + 4 * 1024) / devices + cache
    assert plan.time.memory == pytest.approx(read / bandwidth, rel=1e-6)
    operations = 2 * 4 * matrices + 4 * 4 * 256 * 8 * 128 * 2
    assert plan.time.compute == pytest.approx(operations / devices / peak, rel=1e-6)
    into = 4 * (2 * (1024 + 2 * 512 + 2 * 4096) + 1024) / 2  # q, k, v, gate, up and head
    back = 4 * 2 * 2 * 1024 / data  # o and down
    sent = received(data, into) + received(2, back)
    assert plan.time.communication == pytest.approx(sent / ici_bandwidth, rel=1e-6)
    assert plan.time.dequantize == 0


def test_training_by_hand():
    """Of float32 weights that are gathered twice and read in four passes, and of their moments."""
    small = dataclasses.replace(
        request(topology="v5e:2x2"), config=SMALL, workload="qat", batch=4, context=256,
        recipe=recipe_of(jq.lsq(bits=4)), mesh=mesh_of_text("data=2,model=2"),
    )  # fmt: skip
    plan = plan_pod(small, False)
    layers, head = 2 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096), 1024 * 1024
    # Scales of 64 weights are split by columns only, over "model" or, of o and down, over "data".
    still = 2 * (2 * 1024 * 1024 + 2 * 1024 * 4096) / 64
    moving = 2 * (1024 * 1024 + 4096 * 1024) / 64
    scales = 4 * 4 / 2 * still + 4 * (2 / 2 + 2 + 4) * moving
    # Two gathers read a quarter and write a half, which four passes read; no kernel reads latent
    # weights, so that bfloat16 is written and read too.
    gathered = 4 * (2 / 4 + 2 / 2 + 4 / 2) * (layers + head) + 4 * (2 + 2) / 2 * layers
    gathered += scales
    own = (
        2 * (plan.argument_bytes["trained"] + plan.argument_bytes["optimizer"]) + 4 * 4 * head / 4
    )  # and embedding
    inputs = 2 * 2 * 512 * 1024 * 2
    assert plan.time.memory == pytest.approx((gathered + own + inputs) / 819e9, rel=1e-6)
    products = 2 * 512 * (layers + head) / 2 + 4 * 1024 * 128.5 * 8 * 128 * 2 / 4
    assert plan.time.compute == pytest.approx(4 * products / 197e12, rel=1e-6)


def test_weights_without_a_kernel_are_written_and_read_in_bfloat16():
    """Of QTIP no rate is known, so that the time to dequantize is not either."""
    trellis = recipe_of(jq.qtip(2))
    small = dataclasses.replace(request(topology="v5e:1x1"), config=SMALL, context=256, batch=1)
    plan = plan_pod(dataclasses.replace(small, recipe=trellis), False)
    matrices = 2 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096)
    own = (
        plan.argument_bytes["weights"] + plan.argument_bytes["cache"] - 2 * 1024 * 1024
    )  # of the embedding, a row
    assert plan.time.memory == pytest.approx((own + 4 * matrices) / 819e9, rel=1e-3)
    assert plan.time.dequantize is None and report_of(plan)["roofline"]["dequantize"] is None
    assert any(line.split() == ["dequantize", "not", "known"] for line in lines(plan))


def test_dtypes_have_the_names_of_xla():
    names = ("float32", "float8_e4m3fn", "float8_e8m0fnu", "int8", "uint32")
    assert [xla_name(jnp.dtype(n)) for n in names] == ["f32", "f8e4m3fn", "f8e8m0fnu", "s8", "u32"]
    with pytest.raises(ValueError, match="must be one of .*bfloat16.*got complex64"):
        xla_name(jnp.dtype("complex64"))


def test_training_keeps_moments_of_the_adapters_only():
    plan = plan_pod(request(topology="v5e:16x16", workload="qlora", batch=32, context=1024), False)
    assert plan.argument_bytes["optimizer"] == pytest.approx(
        2 * plan.argument_bytes["trained"], rel=1e-3
    )
    assert plan.argument_bytes["trained"] < plan.argument_bytes["weights"] and plan.fits
    assert plan.moved["reduce-scatter", "bf16"] <= plan.argument_bytes["trained"]
    rate = weights_per_cycle("codebook_matmul", "v5e", bits=4)  # of the matrices below adapters
    passes = 3 * 68.45e9 / 8
    assert plan.time.dequantize == pytest.approx(passes / rate / 1.5e9, rel=1e-3)
    with pytest.raises(ValueError, match="do not divide a batch of 8"):
        plan_pod(request(topology="v5e:16x16", workload="qlora", batch=8), False)


def test_qat_trains_every_weight_in_float32_and_keeps_two_moments():
    plan = plan_pod(request(topology="v5e:16x16", workload="qat", batch=32, context=512), False)
    assert plan.argument_bytes["trained"] == pytest.approx(4 * 70.55e9 / 256, rel=0.4)
    assert plan.argument_bytes["optimizer"] == pytest.approx(
        2 * plan.argument_bytes["trained"], rel=1e-3
    )
    assert plan.argument_bytes["weights"] < 0.1 * plan.argument_bytes["trained"]
    # Gradients of what is split over "data" are summed into its parts, of norms as they are.
    sums = plan.moved["reduce-scatter", "f32"] + plan.moved["all-reduce", "f32"]
    assert sums == pytest.approx(plan.argument_bytes["trained"], rel=1e-2)
    assert plan.temporaries > plan.argument_bytes["trained"]


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
