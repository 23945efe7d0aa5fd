"""Decode of SmolLM2-135M beside llama.cpp's Q4_0 of the same model, in turn, on two threads each.

Run: make bench-llama, which builds llama-cpp-python in a venv of its own and calls
     python -m tests.benchmarks.llama_cpp --python VENV/bin/python.

Ours: the layers at some bits in groups of 32 (as Q4_0) or 64, the tied embedding at 8 bits, as
llama.cpp has it, inputs as int8. Both continue a prompt of 8 tokens, greedily; per token, medians.
"""

import argparse
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.record import Record, add_option

SERVER = """
import sys, time, ctypes, numpy, llama_cpp
source, made = sys.argv[1:3]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
options.allow_requantize = True
assert llama_cpp.llama_model_quantize(source.encode(), made.encode(), ctypes.byref(options)) == 0
model = llama_cpp.Llama(made, n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
print("ready", flush=True)
for line in sys.stdin:
    count = int(line)
    model.reset()
    model.eval([1] * 8)
    start = time.perf_counter()
    for _ in range(count):
        logits = model._ctx.get_logits()
        token = int(numpy.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())
        model.eval([token])
    print((time.perf_counter() - start) / count, flush=True)
"""
TOKENS, SHORT = 128, 65


def ours():
    """Name -> (bits per weight, () -> seconds per token)."""
    import jax
    import jax.numpy as jnp

    import jaxquant as jq
    from jaxquant_models.architectures.llama import LAYER_MATRICES
    from jaxquant_models.readers import registry
    from jaxquant_models.runs.generate import generate

    model = registry.load("smollm2-135m")
    config = dataclasses.replace(model.config, eos_ids=())  # all answers are of one length
    sites = jq.sites(model.apply_fn, model.params, jnp.ones((1, 8), jnp.int32))
    cached = jq.quantized(model.apply_cached)

    def variant(method):
        embedding = ("embed/embedding", jq.rtn(bits=8, group_size=64, symmetric=True))
        recipe = jq.Recipe([embedding, (LAYER_MATRICES, method), ("*", jq.KEEP)])
        packed = jq.quantize(model.params, recipe, sites)
        return jq.ptq.with_activations(jq.ptq.unstack(packed, "layers"), "int8")

    def token(params):
        def run(count):
            start = time.perf_counter()
            jax.block_until_ready(generate(cached, params, config, [1] * 8, count))
            return time.perf_counter() - start

        # Both of one bucket of `generate`: prefill and start-up fall out of the difference.
        return lambda: (run(TOKENS) - run(SHORT)) / (TOKENS - SHORT)

    for name, method in {
        "jaxquant 4 bits, groups of 32, symmetric": jq.rtn(bits=4, group_size=32, symmetric=True),
        "jaxquant 4 bits, groups of 64, symmetric": jq.rtn(bits=4, group_size=64, symmetric=True),
        "jaxquant 4 bits, groups of 64": jq.rtn(bits=4, group_size=64),
        "jaxquant 2 bits, groups of 64": jq.rtn(bits=2, group_size=64),
    }.items():
        params = variant(method)
        yield name, jq.bits_per_weight(params), token(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="of a venv with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=9)
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "weights", "tokens a second", "times llama.cpp's")
    from jaxquant_models.readers import registry
    from jaxquant_models.readers.packages import packaged_file

    source = packaged_file(registry.NAMED["smollm2-135m"])
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder) / "q4_0.gguf"
        server = subprocess.Popen(
            [args.python, "-c", SERVER, str(source), str(made)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        while (line := server.stdout.readline().strip()) != "ready":
            if not line and server.poll() is not None:
                raise SystemExit("llama.cpp did not start; --python needs llama-cpp-python")
        size = made.stat().st_size

        def theirs() -> float:
            server.stdin.write(f"{TOKENS}\n")
            server.stdin.flush()
            if not (line := server.stdout.readline()):
                raise SystemExit(f"llama.cpp ended: status {server.wait()}, no answer")
            return float(line)

        runs = {f"llama.cpp Q4_0 ({size / 1e6:.0f} MB)": (None, theirs)}
        runs |= {name: (bits, run) for name, bits, run in ours()}
        times = {name: [] for name in runs}
        for i in range(args.rounds + 1):  # the first compiles
            for name, (_, run) in runs.items():
                seconds = run()
                if i:
                    times[name].append(seconds)
        server.kill()
    base = next(iter(times.values()))
    print(f"{'':44} bits  tokens/s  times llama.cpp's")
    for name, took in times.items():
        bits = runs[name][0]
        ratio = statistics.median(b / t for b, t in zip(base, took, strict=True))
        rows.add(name, f"{1 / statistics.median(took):.0f}", f"{ratio:.2f}")
        width = "" if bits is None else f"{bits:.2f}"
        print(f"{name:42} {width:>6} {1 / statistics.median(took):9.1f} {ratio:8.2f}")


if __name__ == "__main__":
    main()
