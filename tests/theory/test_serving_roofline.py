"""Decode and prefill: the tables of the literature by other arithmetic, packed trees, walls."""

import dataclasses
import itertools
import json
import math
import types
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.tree import tree_bytes
from jaxquant.formats.kv_cache import KVFormat, empty
from jaxquant.theory.compiled_cost import from_compiled
from jaxquant.theory.hardware import HARDWARE, Hardware
from jaxquant.theory.roofline_point import RooflinePoint
from jaxquant.theory.serving_roofline import critical_batch, decode, largest_batch, prefill
from jaxquant.theory.workload import Attention, Operand, Workload, architecture, workload

PARAMETERS, BITS = 8.03e9, (16, 10.94, 8, 4.25, 2, 1.58)
LLAMA = Attention(32, 32, 8, 128)
# Largest numbers of tokens per second at batch 1, as printed elsewhere for 8.03e9 parameters.
TABLE = {
    "a100": (127, 186, 254, 478, 1016, 1286), "h200": (299, 437, 598, 1125, 2391, 3027),
    "b200": (498, 729, 996, 1875, 3985, 5044), "v5e": (51, 75, 102, 192, 408, 516),
    "v5p": (172, 252, 344, 648, 1377, 1743), "v6e": (102, 149, 204, 384, 816, 1033),
    "tpu7x": (460, 672, 919, 1730, 3676, 4653),
}  # fmt: skip
TOY = Hardware("toy", 1e6, 100.0, 1000.0, 2000.0, "int8", None, "made up", "2026-12")


@pytest.mark.parametrize("chip", TABLE)
def test_tokens_per_second_of_one_sequence(chip):
    for bits, printed in zip(BITS, TABLE[chip], strict=True):
        found = decode(architecture(PARAMETERS, bits), HARDWARE[chip])
        by_hand = HARDWARE[chip].bandwidth / (PARAMETERS * bits / 8)
        assert found.tokens_per_second == pytest.approx(by_hand) and found.wall == "memory"
        assert abs(by_hand - printed) <= 0.5 + 1e-3 * printed


def test_the_critical_batch_is_the_ridge_times_the_share_of_bits():
    printed = {"a100": (153, 41), "h200": (206, 55), "v4": (224, 59), "v6e": (560, 149)}
    for chip, batches in printed.items():
        for bits, batch in zip((16, 4.25), batches, strict=True):
            found = critical_batch(architecture(PARAMETERS, bits), HARDWARE[chip])
            assert found == pytest.approx(HARDWARE[chip].ridge * bits / 16, rel=1e-9)
            assert abs(found - batch) < 1


def test_rates_rise_with_fewer_bits_until_the_critical_batch():
    chip, of = HARDWARE["h100"], lambda bits: architecture(PARAMETERS, bits)
    rates = lambda batch: [decode(of(b), chip, batch).tokens_per_second for b in BITS]
    least = critical_batch(of(min(BITS)), chip)
    below, above = rates(int(least)), rates(int(critical_batch(of(16), chip)) + 1)
    assert all(a < b for a, b in itertools.pairwise(below))
    assert len(set(above)) == 1  # all bound by compute
    assert decode(of(16), chip, 300).wall == decode(of(4.25), chip, 80).wall == "compute"
    # Without integers the peak is that of floats, with them it doubles.
    integers = dataclasses.replace(of(2).operands[0], integers=True)
    assert decode(Workload((integers,)), chip, 4096).seconds == pytest.approx(
        decode(of(2), chip, 4096).seconds * 989 / 1979
    )


def test_bandwidth_counts_at_one_sequence_only():
    twice = dataclasses.replace(TOY, bandwidth=200.0)
    w = architecture(1000, 4)
    assert decode(w, TOY).seconds == 2 * decode(w, twice).seconds == 5.0
    assert decode(w, TOY, 100).seconds == decode(w, twice, 100).seconds == 200.0


@lru_cache
def packed():
    params = {"table": jnp.ones((96, 64)), "w": jnp.ones((64, 256)), "norm": jnp.ones(64)}
    fn = lambda p, ids: (p["table"][ids] * p["norm"]) @ p["w"]
    recipe = lambda method: jq.Recipe([("w", method), ("*", jq.KEEP)])
    methods = {
        "2": jq.rtn(2, 32), "3": jq.rtn(3, 32), "4": jq.rtn(4, 64, symmetric=True),
        "ternary": jq.ternary(64), "nf4": jq.normal_float(4, 64), "mxfp4": jq.mxfp4(),
        "float8": jq.float8(), "bitnet": jq.ternary("tensor"),
    }  # fmt: skip
    trees = {name: jax.eval_shape(lambda p, m=m: jq.quantize(p, recipe(m)), params)
             for name, m in methods.items()}  # fmt: skip
    return params, jq.sites(fn, params, jnp.zeros(3, int)), trees


def test_bytes_are_those_of_the_packed_arrays():
    params, sites, trees = packed()
    for name, tree in {**trees, "float": params}.items():
        found = workload(tree, sites=sites)
        assert found.weight_bytes == tree_bytes(tree), name
        assert found.read(1) == tree_bytes(tree) - 95 / 96 * 4 * 96 * 64, name
        assert found.read(1000) == found.weight_bytes  # no more rows than there are
        assert workload(tree).read(1) == tree_bytes(tree)  # without sites the table is a matrix
        assert found.operations(integers=False) == 2 * 64 * 256


def test_never_above_the_bound_of_each_weight_by_itself():
    params, sites, trees = packed()
    for tree in (*trees.values(), params):
        for tokens in (1, 64, 4096):
            ours = decode(workload(tree, sites=sites), HARDWARE["v5e"], tokens)
            apart = jq.roofline(tree, "v5e", tokens, sites=sites)
            assert ours.seconds <= apart.seconds * (1 + 1e-9)


def test_integer_inputs_are_counted_apart():
    tree = jq.ptq.with_activations(packed()[2]["4"], "int8")
    found = workload(tree, sites=packed()[1])
    assert found.operations(integers=True) == 2 * 64 * 256 and not found.operations(integers=False)


def test_a_step_by_hand():
    attention = Attention(2, 4, 2, 8)
    w = Workload((Operand("w", 1000, 500), Operand("table", 960, 0, rows=10)), attention)
    cache = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, channels, bytes
    step = decode(w, TOY, 3, 7)
    assert step.bytes == 1000 + 3 * 96 + 3 * 7 * cache
    assert step.operations == 3 * (2 * 500 + 4 * 2 * 4 * 8 * 8)
    assert step.occupied == 1960 + 3 * 7 * cache and step.tokens == 3
    assert step.intensity == step.operations / step.bytes
    assert step.ridge == TOY.ridge == 10 and step.fits
    pass_ = prefill(w, TOY, 7, 3)
    pairs = sum(range(1, 8))
    assert pass_.bytes == 1000 + 960 + 21 * cache  # 21 tokens, 10 rows
    assert pass_.operations == 21 * 1000 + 3 * 4 * 2 * 4 * 8 * pairs
    large, most = prefill(w, TOY, np.int64(1 << 40)), 1 << 40
    assert large.operations == most * 1000 + 4 * 2 * 4 * 8 * (most * (most + 1) / 2)
    head = Workload((dataclasses.replace(w.operands[0], last=True),), attention)
    assert prefill(head, TOY, 7, 3).operations == 3 * 1000 + 3 * 4 * 2 * 4 * 8 * pairs
    assert decode(head, TOY, 3).operations == decode(w, TOY, 3).operations
    assert "tokens/s, bound by memory" in str(step) and str(step).endswith("which fits")


def test_caches():
    """Bytes of a cache are those of its arrays, up to the group that is being filled."""
    assert LLAMA.bytes(1) == 131072
    form = KVFormat(4, window=64, group=32, sinks=1)
    quantized = Attention(2, 3, 3, 64, "float32", form)
    past = empty(form, (2, 1, 3), 64, 1024, jnp.float32)
    exact = 2 * 2 * 3 * 64 * 4
    arrays = sum(a.nbytes for a in past) - form.group * exact  # the ring has room for one more
    tokens = past.slots + form.window + form.sinks
    assert quantized.bytes(tokens) == arrays
    assert quantized.bytes(10) == Attention(2, 3, 3, 64, "float32").bytes(10) == 10 * exact


def test_a_long_context_is_bound_by_memory_at_every_batch():
    w = architecture(PARAMETERS, 4.25, LLAMA)
    assert critical_batch(w, HARDWARE["h100"]) < 80
    assert critical_batch(w, HARDWARE["h100"], 200) > critical_batch(w, HARDWARE["h100"])
    # From c tokens on, a sequence's cache takes longer to read than its products take to compute:
    # c C / bandwidth = (2 P + 4 L H d c) / peak.
    each = 989e12 / 3352e9 * LLAMA.bytes(1) - 4 * 32 * 32 * 128
    few = 2 * PARAMETERS / each
    assert 415 < few < 425
    assert critical_batch(w, HARDWARE["h100"], int(few) + 2) is None
    assert critical_batch(w, HARDWARE["h100"], int(few) - 1) is not None
    assert decode(w, HARDWARE["h100"], 1 << 20, 512).wall == "memory"
    batch = largest_batch(w, HARDWARE["h100"], 8192)
    assert decode(w, HARDWARE["h100"], batch, 8192).fits
    assert not decode(w, HARDWARE["h100"], batch + 1, 8192).fits
    whole = architecture(70.6e9, 16, LLAMA)
    assert (
        not decode(whole, HARDWARE["h100"]).fits and largest_batch(whole, HARDWARE["h100"], 1) == 0
    )
    with pytest.raises(ValueError, match="has no attention"):
        largest_batch(architecture(1, 1), TOY, 1)


def test_a_table_that_is_only_looked_up():
    """Llama 3 8B by its own sizes: a head apart, so one row of the table is read for a token."""
    d, kv, hidden, vocabulary = 4096, 1024, 14336, 128256
    matrices = 32 * (2 * d * d + 2 * d * kv + 3 * d * hidden)
    parameters = matrices + 2 * vocabulary * d + 65 * d
    assert parameters == 8_030_261_248
    chip, whole = HARDWARE["h100"], architecture(parameters, 16, LLAMA)
    apart = architecture(parameters, 16, LLAMA, table=(vocabulary, d))
    assert apart.weight_bytes == whole.weight_bytes == 2 * parameters
    for context in (128, 8192):
        read = 2 * (parameters - vocabulary * d + d) + context * 131072
        assert decode(apart, chip, 1, context).bytes == read
        assert decode(apart, chip, 1, context).seconds < decode(whole, chip, 1, context).seconds
        assert decode(apart, chip, 1, context).occupied == 2 * parameters + context * 131072
    products = 2 * (matrices + 65 * d + vocabulary * d)
    assert apart.operations(integers=False) == products
    for wrong in ((3,), (0, 4), (10, 2)):
        with pytest.raises(ValueError, match="table must be rows and columns"):
            architecture(20, 4, table=wrong)


def test_experts_are_counted_by_the_number_active():
    fn = lambda p, x: jax.lax.ragged_dot(x, p["e"], jnp.full(8, 2, jnp.int32))
    params = {"e": jnp.ones((8, 16, 32))}
    sites = jq.sites(fn, params, jnp.ones((16, 16)))
    of = lambda n: workload(params, sites=sites, experts_per_token=n)
    assert of(2).read(1) == of(2).weight_bytes / 4 and of(8).read(1) == of(None).read(1)
    assert of(2).operations(integers=False) == 2 * 2 * 16 * 32
    assert of(2).read(3) == pytest.approx(of(2).weight_bytes * (1 - 0.75**3))
    with pytest.raises(ValueError, match=r"experts_per_token must be 1 to 8, as 'e' has, got 9"):
        of(9)
    with pytest.raises(ValueError, match="experts_per_token needs sites"):
        workload(params, experts_per_token=2)


def test_bad_numbers():
    w = architecture(10, 4)
    for call, text in (
        (lambda: decode(w, TOY, 0), "batch must be 1 or more, got 0"),
        (lambda: decode(w, TOY, 1, -1), "context must be 0 or more, got -1"),
        (lambda: prefill(w, TOY, 0), "tokens must be 1 or more, got 0"),
        (lambda: critical_batch(w, TOY, -1), "context must be 0 or more"),
        (lambda: architecture(0, 4), "must be positive"),
        (lambda: architecture(10, float("nan")), "must be positive"),
        (lambda: Attention(0, 1, 1, 1), "must be 1 or more"),
        (
            lambda: decode(w, TOY, 10**400),
            "batch must be at most 2\\^40, got an integer of 1329 bits",
        ),
        (lambda: prefill(w, TOY, 1 << 41), "tokens must be at most 2\\^40"),
        (lambda: architecture(1e308, 1e308), "must be positive"),
        (lambda: Attention(1, 3, 2, 1), "kv_heads must divide heads, got 2 and 3"),
        (lambda: Attention(1, 1, 1, 1, "float3"), "name of a dtype of numbers, got 'float3'"),
        (lambda: Attention(1, 1, 1, 1, "str"), "name of a dtype of numbers, got 'str'"),
        (lambda: Operand("w", -1, 1), "bytes must be 0 or more and finite, got -1"),
        (lambda: Operand("w", 1, "1"), "multiplied must be 0 or more and finite, got '1'"),
        (lambda: Operand("w", 1, 1, active=2.0), "active must be above 0 and at most 1, got 2"),
        (lambda: workload({"n": 3}), "holds no floating or quantized arrays"),
        (lambda: workload({"w": jnp.ones((2, 2))}, last=["head"]), "'head' matches no path"),
        (lambda: decode(w, "h100"), "hardware"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# --- compiled functions ---------------------------------------------------------------------------


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def test_a_compiled_product():
    x, w = jnp.ones((8, 64)), jnp.ones((64, 32))
    point, notes = from_compiled(compiled(jnp.dot, x, w), TOY)
    assert point.floats == 2 * 8 * 64 * 32 and notes == ()
    assert point.bytes == x.nbytes + w.nbytes + 4 * 8 * 32
    assert isinstance(point, RooflinePoint) and point.wall == "memory"


def test_products_of_integers_are_noted():
    x, w = jnp.ones((8, 64), jnp.int8), jnp.ones((64, 32), jnp.int8)
    times = lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.int32)
    note = from_compiled(compiled(times, x, w), TOY).notes
    assert len(note) == 1 and "does not hold for units that multiply integers faster" in note[0]
    # On GPUs the product is a call of a library.
    gpu = '%y = (s32[8,32]{1,0}, s8[9]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"'
    given = types.SimpleNamespace(
        cost_analysis=lambda: {"flops": 1.0, "bytes accessed": 1.0}, as_text=lambda: gpu
    )
    assert from_compiled(given, TOY).notes == note


def test_a_loop_is_noted():
    body = lambda c, a: (c @ a, None)
    fn = lambda x, w: jax.lax.scan(body, x, w)[0]
    found = from_compiled(compiled(fn, jnp.ones((8, 16)), jnp.ones((5, 16, 16))), TOY)
    assert "only one pass" in found.notes[0] and found.point.floats < 3 * 2 * 8 * 16 * 16


def test_every_form_of_the_counts():
    counts = {"flops": 10.0, "bytes accessed": 20.0}
    of = lambda found: from_compiled(types.SimpleNamespace(cost_analysis=lambda: found), TOY)
    for found in (counts, [counts], (counts, counts)):
        assert of(found).point == RooflinePoint(TOY, 20.0, 10.0)
    assert of({"bytes accessed": 4.0}).point.floats == 0.0
    for wrong in (None, [], "text", [None]):
        with pytest.raises(ValueError, match="no cost analysis"):
            of(wrong)
    for wrong in ({}, {"flops": 1.0}, {**counts, "flops": -1.0}, {**counts, "flops": np.nan}):
        with pytest.raises(ValueError, match="does not know"):
            of(wrong)


def test_what_cannot_be_counted():
    q = jq.quantize({"w": jnp.ones((64, 64))}, jq.rtn(4, 64))
    call = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))
    beside = jax.jit(jq.quantized(lambda p, x: jnp.sin(x @ p["w"]) @ jnp.ones((64, 64))))
    for done in (one.lower(q, jnp.ones((1, 64))).compile() for one in (call, beside)):
        if "custom-call" in done.as_text():
            with pytest.raises(ValueError, match=r"calls a kernel \(.*\), into which XLA cannot"):
                from_compiled(done, TOY)
    for wrong in (call, call.lower(q, jnp.ones((1, 64))), 3):
        with pytest.raises(ValueError, match="must be a compiled function"):
            from_compiled(wrong, TOY)


def test_calls_whose_counts_xla_knows():
    text = 'custom-call(a, b), custom_call_target="__cublas$gemm"'
    counts = {"flops": 10.0, "bytes accessed": 20.0}
    of = lambda text: types.SimpleNamespace(cost_analysis=lambda: counts, as_text=lambda: text)
    assert from_compiled(of(text), TOY).point.floats == 10
    with pytest.raises(ValueError, match=r"calls a kernel \(my_kernel\)"):
        from_compiled(of(text + ' custom_call_target="my_kernel"'), TOY)


def test_a_point_is_plain_numbers():
    point = decode(architecture(1000, 4), TOY)
    assert json.loads(json.dumps(dataclasses.asdict(point)))["bytes"] == 500
    nothing = RooflinePoint(TOY, 0, 0)
    assert nothing.intensity == nothing.tokens_per_second == float("inf") and nothing.ridge == 10
    fast = prefill(architecture(8.03e9, 16), HARDWARE["h100"], 2048)
    assert "NVIDIA H100: at least " in str(fast) and "at most 61,582 tokens/s" in str(fast)
    for field in ("bytes", "floats", "integers", "tokens", "occupied"):
        for wrong in (-1.0, math.nan, math.inf, "1", None):
            with pytest.raises(ValueError, match=f"{field} must be 0 or more and finite"):
                dataclasses.replace(point, **{field: wrong})
    with pytest.raises(ValueError, match="hardware must be Hardware, got 'h100'"):
        RooflinePoint("h100", 1, 1)
