"""A quantized model lowered for each platform calls that platform's kernels, and no other's."""

import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply
from pallas_kernels.cpu import native
from tests.device.decode import random_params
from tests.support.lowering import lowered_text

CONFIG = LlamaConfig(
    vocab_size=64, d_model=256, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=128, d_ff=512
)
# The custom calls that kernels become.
CALLS = {"cpu": "jaxquant_packed", "tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
MATRICES = 7


def lowered(platform, kernels="auto"):
    params = random_params(CONFIG, jq.formats.Integer(4, 128, symmetric=True))
    run = jq.quantized(lambda p, t: apply(Llama(CONFIG), p, t), kernels=kernels)
    tokens = jnp.zeros((1, 3), jnp.int32)
    text = lowered_text(run, params, tokens, platform=platform)
    return {name: text.count(call) for name, call in CALLS.items()}


@pytest.mark.parametrize("platform", CALLS)
def test_the_platforms_own_kernels_serve(platform):
    if platform == "cpu" and native.load():
        assert lowered(platform) == dict.fromkeys(CALLS, 0)
        return
    assert lowered(platform) == dict.fromkeys(CALLS, 0) | {platform: MATRICES}


def test_an_override_is_obeyed():
    assert lowered("cpu", "reference") == dict.fromkeys(CALLS, 0)
    assert lowered("tpu", "tpu") == dict.fromkeys(CALLS, 0) | {"tpu": MATRICES}


def test_what_is_not_served_is_an_error_where_it_was_asked_for():
    fn, x = lambda p, x: x @ p["w"], jnp.ones((1, 600))
    params = {"w": jq.quantize_array(jnp.ones((600, 64)), jq.rtn(4, 20))}
    served = str(jq.explain(fn, params, x, platform="tpu"))
    assert "packed_matmul, 4-bit words; reference (XLA): groups of 20 rows" in served
    assert jq.quantized(fn)(params, x).shape == (1, 64)
    with pytest.raises(
        ValueError, match="the tpu kernels do not support this packed_matmul: groups"
    ):
        jq.quantized(fn, kernels="tpu")(params, x)
