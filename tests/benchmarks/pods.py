"""The smallest slices of TPU pods on which large models decode, by the formula of `jaxquant plan`.

Run: python -m tests.benchmarks.pods [--batch 8] [--context 8192] [--json FILE]. No weights and no
TPU are needed. The matrices of the layers are quantized; embedding, output matrix and cache are
bfloat16. The number in parentheses is a lower bound on the time of a step, in milliseconds.
"""

import argparse

import jaxquant as jq
from jaxquant_models.architectures.named import ARCHITECTURES
from jaxquant_models.runs.pod_formula import expected_collectives
from jaxquant_models.runs.pod_mesh import mesh_of
from jaxquant_models.runs.pod_plan import smallest_slice
from jaxquant_models.runs.pod_programs import abstract_mesh, packed_shapes, program
from jaxquant_models.runs.pod_request import PodRequest
from jaxquant_models.runs.pod_roofline import step_time
from jaxquant_models.runs.recipes import recipe_of
from pallas_kernels.cost.topologies import GENERATIONS, slice_of
from tests.benchmarks.record import Record, add_option

MODELS = ("llama-3-70b", "llama-3-405b", "qwen3-235b-a22b", "deepseek-v3-sized")
BITS = (16, 8, 4, 2)


def cell(request, weights, chip):
    """Return the smallest slice, and the lower bound in milliseconds of a step on it."""
    name = smallest_slice(request, weights, chip).name
    if not name:
        return "none"
    there = request.on(slice_of(name))
    mesh = mesh_of(there, weights)
    of = program(there, weights, abstract_mesh(mesh))
    time = step_time(there, of, mesh, expected_collectives(there, of, mesh))
    return f"{name.partition(':')[2]} ({1e3 * time.seconds:.1f})"


def main():
    """Print a row for every model and number of bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    add_option(parser)
    args = parser.parse_args()
    record = Record(args.json, "model", "bits", *GENERATIONS)
    for name in MODELS:
        for bits in BITS:
            packed = recipe_of(jq.rtn(bits, 128, symmetric=True)) if bits < 16 else None
            request = PodRequest(
                ARCHITECTURES[name], packed or jq.Recipe([("*", jq.KEEP)]), "decode", args.batch,
                args.context, slice_of("v5e:1x1"),
            )  # fmt: skip
            weights = packed_shapes(request)
            row = (name, bits, *(cell(request, weights, chip) for chip in GENERATIONS))
            print(*row, sep="\t", flush=True)
            record.add(*row)


if __name__ == "__main__":
    main()
