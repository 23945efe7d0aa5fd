"""How long the whole of SmolLM2-135M takes to quantize at 2 bits, and the peak of memory.

Run: python -m tests.benchmarks.quantization_time [NAME ...]. Each method in a process of its own;
seconds of calibration (8,192 tokens) and of quantizing, compilation included.
"""

import resource
import subprocess
import sys
import time

import jax

import jaxquant as jq
from jaxquant_models import load
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import CONTEXT, first_tokens, token_sequences
from pallas_kernels import viterbi

METHODS = {
    "gptq": lambda: jq.gptq(2),
    "quip_sharp": lambda: jq.quip_sharp(2),
    "qtip": lambda: jq.qtip(2, L=12),
    "trellis": lambda: jq.trellis(2, L=12),
    "entropy_coded": lambda: jq.entropy_coded(2.0),
}


def one(name):
    source = load("smollm2-135m")
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    text = read_text(BUILTIN, calibration=True)
    sequences = first_tokens(token_sequences(source, text, CONTEXT), 8192)
    stats = calibrate_model(source, sequences)
    calibrated = time.monotonic()
    recipe = recipe_of(METHODS[name]())
    result = jax.block_until_ready(quantize_model(source, recipe, stats).params)
    done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{name:14} {jq.bits_per_weight(result):6.3f}  {calibrated - start:8.0f} s  "
        f"{done - calibrated:8.0f} s  {loaded / 2**20:8.2f} GiB  {peak / 2**20:8.2f} GiB",
        flush=True,
    )


def main(names):
    print(f"trellis search: {viterbi.backend()}")
    print("method           bits   calibrate   quantize  loaded model          peak", flush=True)
    for name in names or METHODS:
        command = [sys.executable, "-m", "tests.benchmarks.quantization_time", "--one", name]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main(sys.argv[1:])
