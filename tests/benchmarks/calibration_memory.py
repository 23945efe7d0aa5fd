"""Peak memory of calibration on SmolLM2-135M: all layers in one gradient, and block by block.

Run: python -m tests.benchmarks.calibration_memory. Each in a process of its own; the float model's
own peak is printed beside.
"""

import argparse
import resource
import subprocess
import sys

from tests.benchmarks.record import Record, add_option


def load():
    import jax.numpy as jnp

    from jaxquant_models.readers import registry

    model = registry.load("smollm2-135m")
    return model, [jnp.ones((1, 512), jnp.int32) * (i + 1) for i in range(2)]


def whole():
    import jaxquant as jq
    from jaxquant_models.architectures.llama import Llama

    model, batches = load()
    llama = Llama(model.config, remat=True)
    jq.calibrate(lambda p, x: llama.apply({"params": p}, x), model.params, batches)


def blocks():
    import jaxquant as jq
    from jaxquant_models.architectures.blocks import blockwise

    model, batches = load()
    parts = blockwise(model.config)
    hidden = [parts.embed(model.params, x) for x in batches]
    recipe = jq.Recipe([("*kernel", jq.gptq()), ("*", jq.KEEP)])
    jq.ptq.quantize_blocks(parts.block, model.params["layers"], hidden, recipe)


TASKS = {"model only": load, "calibrate, all layers": whole, "quantize_blocks": blocks}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="?", choices=TASKS)
    add_option(parser)
    args = parser.parse_args()
    if args.task:
        TASKS[args.task]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    rows = Record(args.json, "task", "peak")
    for name in TASKS:
        command = [sys.executable, "-m", "tests.benchmarks.calibration_memory", name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = f"{float(out.stdout.split()[-1]):.2f} GB"
        rows.add(name, peak)
        print(f"{name:24} peak {peak}")


if __name__ == "__main__":
    main()
