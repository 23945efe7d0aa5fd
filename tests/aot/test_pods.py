"""A decoder layer compiled for whole pods: only packed words and scales are gathered."""

import math

import pytest

from tests.aot import compiler, pods

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
# Widths of 2560 do not fill whole tiles of scales: 3 % of padding.
PADDING = {"70B": 1.01, "Qwen3-4B": 1.03}


@pytest.mark.parametrize(
    ("topology", "data", "model", "name"),
    [("v5e:16x16", 16, 16, "70B"), ("v5p:8x8x8", 32, 16, "70B"), ("v5e:2x2", 2, 2, "Qwen3-4B")],
)
def test_no_unpacked_weight_moves(topology, data, model, name):
    pod, of = pods.compiled(topology, data, model, name), pods.MODELS[name]
    weights = of.weights().values()
    assert pod.devices == data * model
    # Of one device: its share of what is packed, its tokens, and padding.
    tokens = 2 * pods.TOKENS * of.d
    assert pod.packed_bytes / pod.devices + tokens <= pod.argument_bytes
    assert pod.argument_bytes <= PADDING[name] * (pod.packed_bytes / pod.devices + tokens)
    kinds = {kind for kind, _, _ in pod.collectives}
    assert kinds == {"all-gather", "all-reduce"}
    sums = [(dtype, shape) for kind, dtype, shape in pod.collectives if kind == "all-reduce"]
    assert all(math.prod(shape) == pods.TOKENS * of.d for _, shape in sums), sums
    # A gather in pieces, under way while other things run, is written down once a piece.
    gathers = {(d, math.prod(shape)) for kind, d, shape in pod.collectives if kind == "all-gather"}
    words = {("s32", k * n // 16 // model) for k, n, _ in weights}
    scales = {("bf16", k * n // pods.GROUP // model) for k, n, _ in weights}
    assert gathers == words | scales
    moved = sum(4 * k * n // 16 + 2 * k * n // pods.GROUP for k, n, _ in weights)
    assert moved // model == pod.gathered
