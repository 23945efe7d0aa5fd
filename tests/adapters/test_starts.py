"""Starts of a low-rank adapter: what theory says of them, and the published experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.adapters.initial import best_product

LoRA = jq.adapters.LoRA
K, N, RANK = 64, 48, 8


def drawn(seed=0, shape=(K, N)):
    return jax.random.normal(jax.random.key(seed), shape)


def started(init, w, method, rank=RANK, stats=None):
    q = jq.quantize({"w": w}, method)
    tree = jq.adapt(q, LoRA(rank, init=init), floats={"w": w}, stats=stats)
    return tree["w"]


def relative(error, w):
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(w))


@pytest.mark.parametrize("bits", [4, 2])
def test_loftq_is_closer_than_one_round_and_than_none(bits):
    w, method = drawn(), jq.normal_float(bits, 16)
    q = jq.quantize({"w": w}, method)["w"].dequantize()
    a, b = best_product(w - q, RANK)
    none, one = relative(w - q, w), relative(w - q - a @ b, w)
    found = relative(w - started("loftq", w, method).dequantize(), w)
    assert found <= one + 1e-6 < none
    assert bits == 2 or found < 0.97 * one


@pytest.mark.slow
def test_loftq_on_the_published_experiment():
    """512 x 512 normal numbers, NF4 in groups of 64: training.md, 5.5 (T = 1 and T = 5)."""
    w, method = drawn(3, (512, 512)), jq.nf4(64)
    q = jq.quantize({"w": w}, method)["w"].dequantize()
    assert relative(w - q, w) == pytest.approx(0.0918, abs=3e-4)
    for rank, one, five in ((16, 0.0865, 0.0787), (64, 0.0725, 0.0618)):
        a, b = best_product(w - q, rank)
        assert relative(w - q - a @ b, w) == pytest.approx(one, abs=4e-4)
        found = started("loftq", w, method, rank).dequantize()
        assert relative(w - found, w) == pytest.approx(five, abs=6e-4)


def correlated():
    """Inputs with a strongly unequal spectrum, and their statistics."""
    mix = drawn(5, (K, K)) * jnp.exp(-jnp.arange(K) / 8)[:, None]
    x = drawn(6, (512, K)) @ mix
    return x, jq.calibrate(lambda p, x: x @ p["w"], {"w": drawn()}, [x])


def test_cloq_has_the_least_error_of_the_outputs():
    w, method, (x, stats) = drawn(), jq.rtn(2, 16), correlated()
    tensor = started("cloq", w, method, stats=stats)
    q = jq.quantize({"w": w}, method)["w"].dequantize()
    far = lambda value: relative(x @ (w - value), x @ w)
    a, b = best_product(w - q, RANK)
    found = far(tensor.dequantize())
    assert found < 0.7 * far(q + a @ b) and far(q + a @ b) < far(q)
    # The optimum of Eckart and Young in the metric of the inputs: the singular values left over.
    s = jnp.linalg.svd(x @ (w - q), compute_uv=False)
    assert found == pytest.approx(
        float(jnp.linalg.norm(s[RANK:]) / jnp.linalg.norm(x @ w)), rel=0.05
    )


def test_cloq_gives_both_factors_the_same_size():
    """Whatever the unit of the inputs: one learning rate has to suit A and B."""
    w, method, (x, _) = drawn(), jq.rtn(2, 16), correlated()
    stats = jq.calibrate(lambda p, x: x @ p["w"], {"w": w}, [1e-3 * x])
    data = started("cloq", w, method, stats=stats).data
    sizes = [float(jnp.linalg.norm(data[name])) for name in ("lora_a", "lora_b")]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


def test_cloq_keeps_the_codes_that_the_rounder_chose():
    w, method, (_, stats) = drawn(), jq.rtn(2, 16), correlated()
    q = jq.quantize({"w": w}, method)["w"]
    tensor = started("cloq", w, method, stats=stats)
    for name, a in q.data.items():
        np.testing.assert_array_equal(tensor.data[name], a)


def test_pissa_moves_the_principal_part_into_the_adapter():
    """A matrix of low rank and a little noise is nearly all adapter, which is not rounded."""
    low = drawn(1, (K, RANK)) @ drawn(2, (RANK, N))
    w, method = low + 0.01 * drawn(), jq.rtn(2, 16)
    tensor = started("pissa", w, method)
    plain = jq.quantize({"w": w}, method)["w"].dequantize()
    assert relative(w - tensor.dequantize(), w) < 0.02 * relative(w - plain, w)
    product = tensor.data["lora_a"] @ tensor.data["lora_b"]
    assert relative(product - low, low) < 0.02


def test_starts_say_what_they_need():
    w = drawn()
    q = jq.quantize({"w": w}, jq.rtn(2, 16))
    with pytest.raises(ValueError, match=r"w: init=.loftq. needs the float tree .* pass floats="):
        jq.adapt(q, LoRA(4, init="loftq"))
    with pytest.raises(ValueError, match=r"w: init=.cloq. needs statistics .* stats=calibrate"):
        jq.adapt(q, LoRA(4, init="cloq"), floats={"w": w})
    with pytest.raises(ValueError, match=r"w: the weight has shape \[64, 48\], but floats holds"):
        jq.adapt(q, LoRA(4, init="loftq"), floats={"w": w.T})
    with pytest.raises(ValueError, match="finds A and B for a scaling of 1; leave out alpha"):
        LoRA(4, alpha=8, init="loftq")
    with pytest.raises(ValueError, match=r"init.*must be one of"):
        LoRA(4, init="none")
