"""Prefill with the sizes of SmolLM2-135M and a split batch on two CPU devices, compared with one.

    python -m tests.benchmarks.data_parallel

One process has two devices; runs on one and on both alternate, and medians are printed. The weights
are random, and quantized to 4 bits.
"""

import argparse
import statistics
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant_models.architectures import llama
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.shardings import model_sharding
from tests.benchmarks.record import Record, add_option

BATCH, CONTEXT, REPEATS = 4, 256, 7
CONFIG = LlamaConfig(
    vocab_size=49152, d_model=576, d_ff=1536, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
    tie_embeddings=True,
)  # fmt: skip
MODEL = llama.Llama(CONFIG)


def last(params, tokens):
    """Return the logits after the last token of each sequence."""
    return llama.apply(MODEL, params, tokens)[:, -1]


def main():
    """Print the tokens per second on one device and on two, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_option(parser)
    jax.config.update("jax_num_cpu_devices", 2)  # before JAX asks for its devices
    record = Record(parser.parse_args().json, "devices", "tokens/s", "ratio")
    tokens = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT), 0, CONFIG.vocab_size)
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens[:1])["params"]
    recipe = jq.Recipe([("layers/*kernel", jq.rtn(4, 32)), ("*", jq.KEEP)])
    packed = jq.quantize(params, recipe, jq.sites(last, params, tokens))
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    at = model_sharding(packed, CONFIG, mesh, [("batch", "data")])  # every device has all weights
    one = jax.jit(jq.quantized(last)), packed, tokens
    split = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    two = (
        jax.jit(jq.quantized(last, shardings=at, data_axes=("data",))),
        jax.device_put(packed, at),
        split,
    )
    np.testing.assert_allclose(one[0](*one[1:]), two[0](*two[1:]), rtol=1e-4, atol=1e-4)
    times = {1: [], 2: []}
    for _ in range(REPEATS):
        for devices, (run, *args) in ((1, one), (2, two)):
            start = time.perf_counter()
            run(*args).block_until_ready()
            times[devices].append(time.perf_counter() - start)
    speed = {n: BATCH * CONTEXT / statistics.median(taken) for n, taken in times.items()}
    for devices, rate in speed.items():
        print(devices, f"{rate:.1f} tokens/s", f"{rate / speed[1]:.2f}")
        record.add(devices, rate, rate / speed[1])


if __name__ == "__main__":
    main()
