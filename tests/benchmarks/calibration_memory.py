"""Peak memory of calibration on SmolLM2-135M: all layers in one gradient, and block by block.

Run: make bench. Each in a process of its own; the float model's own peak is printed beside.
"""

import resource
import subprocess
import sys


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
    if len(sys.argv) > 1:
        TASKS[sys.argv[1]]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    for name in TASKS:
        out = subprocess.run(
            [sys.executable, __file__, name], capture_output=True, text=True, check=True
        )
        print(f"{name:24} peak {float(out.stdout.split()[-1]):.2f} GB")


if __name__ == "__main__":
    main()
