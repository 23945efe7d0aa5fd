"""Bytes of a QLoRA training step on one device, by parts, as the compiler for TPUs counts them.

Run: python -m tests.benchmarks.qlora_memory [--models 7B,65B], with libtpu installed
A step of LLaMA on 1 x 512 tokens is compiled ahead of time for a TPU that is not there, and never
run; no array is made. The matrices of the layers are NF4 with double quantization in groups of 64
and have LoRA of rank 64 in bfloat16; embedding, head and norms are bfloat16. The optimizer is that
of `Finetuning` in `in_float32`: a clip, then AdamW with float32 moments. Adapters and state are
donated. Layers are scanned, and each is recomputed in the backward pass. The published totals are
those of QLoRA (arXiv:2305.14314) on the same batch.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.training.finetuning import Finetuning, in_float32
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import LAYER_MATRICES, Llama
from jaxquant_models.readers.model import Model
from tests.aot import compiler
from tests.benchmarks.record import Record, add_option

# Width, inner width, layers, heads.
MODELS = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
PUBLISHED = {"7B": "6.9", "13B": "11.3", "33B": "24.7", "65B": "45.0"}
TOKENS, VOCABULARY, RANK = 512, 32000, 64
CHIP = "v5p"  # with 95 GB of memory: the compiler refuses what does not fit
COLUMNS = (
    "model", "optimizer's state", "base, GB", "adapters", "optimizer", "temporaries", "total",
    "on the host", "published",
)  # fmt: skip
SECONDS = 900  # that one step may take to compile


class Step(NamedTuple):
    """Bytes of a compiled step.

    Attributes:
      base: of packed matrices, embedding, head and norms.
      adapters: of the adapters.
      optimizer: of the optimizer's state on the device.
      padding: by which arguments are larger on the device.
      temp: of activations, gradients and workspace.
      output: of results that are not written over an argument.
      host: of the optimizer's state in host memory, and of copies of it there.
      peak: of all that is on the device at once; less than the sum of the parts.
      peak: of all that is on the device at one time; the total counts workspace that was freed too.
      kernels: number of calls of kernels in the program.
      decoded: number of floating-point copies of whole matrices of a layer in the program.
    """

    base: int
    adapters: int
    optimizer: int
    padding: int
    temp: int
    output: int
    host: int
    peak: int
    kernels: int
    decoded: int

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return sum(self[:6])


def shapes(config: LlamaConfig) -> Any:
    """The packed tree with its adapters, never made."""
    dtype = jnp.bfloat16
    params = jax.eval_shape(
        Llama(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )["params"]  # fmt: skip
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
    sites = Model("", config, params, None, dtype).sites()
    base = jq.normal_float(4, 64, double_quant=True)
    recipe = jq.Recipe([(LAYER_MATRICES, base), ("*", jq.KEEP)])
    adapter = jq.adapters.LoRA(RANK, alpha=16, dtype="bfloat16")
    return jax.eval_shape(lambda p: jq.adapt(jq.quantize(p, recipe, sites), adapter), params)


def training_step(config: LlamaConfig, optimizer: optax.GradientTransformation) -> Any:
    """The step as a function of adapters, state, the rest of the tree, and tokens."""
    run = Llama(config, jnp.bfloat16, remat=True)
    loss = jq.quantized(lambda p, t: next_token_loss(run.apply({"params": p}, t), t))

    def step(train, state, rest, tokens):
        whole = lambda train: loss(eqx.combine(train, rest), tokens)
        value, slope = jax.value_and_grad(whole)(train)
        updates, state = optimizer.update(slope, state, train)
        return optax.apply_updates(train, updates), state, value

    return step


def compiled(name: str, paged: bool) -> Step:
    """The step of a model, compiled for one chip in this process."""
    from jax.experimental import topologies

    width, inner, layers, heads = MODELS[name]
    config = LlamaConfig(VOCABULARY, width, inner, layers, heads, heads, width // heads)
    params = shapes(config)
    train, rest = eqx.partition(params, jq.trained(params))
    optimizer = in_float32(Finetuning(paged=paged).optimizer_of(train))
    state = _types(optimizer.init, train)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=compiler.TOPOLOGIES[CHIP])
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))

    def placed(a: Any) -> jax.ShapeDtypeStruct:
        kind = "pinned_host" if _on_host(a) else "device"
        sharding = NamedSharding(mesh, P(), memory_kind=kind)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    arguments = jax.tree.map(placed, (train, state, rest, tokens))
    step = jax.jit(training_step(config, optimizer), donate_argnums=(0, 1))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        done = step.lower(*arguments).compile()
    return _step(done, train, state, rest, [(width, width), (width, inner), (inner, width)])


def _step(done: Any, train: Any, state: Any, rest: Any, matrices: Sequence) -> Step:
    memory, text = done.memory_analysis(), done.as_text()
    held = [_bytes(a for a in jax.tree.leaves(tree) if not _on_host(a))
            for tree in (rest, train, state)]  # fmt: skip
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    floats = "|".join(rf"(?:1,)?{a},{b}" for a, b in matrices)
    return Step(
        *held,
        padding=memory.argument_size_in_bytes - sum(held),
        temp=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        host=host,
        peak=memory.peak_memory_in_bytes - host,  # it counts both memories
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        decoded=len(re.findall(rf" = (?:f32|bf16|f16)\[(?:{floats})\]", text)),
    )


def _types(init: Any, params: Any) -> Any:
    """The types of a state: `jax.eval_shape` keeps no memory spaces."""
    jaxpr, out = jax.make_jaxpr(init, return_shape=True)(params)
    return jax.tree.unflatten(jax.tree.structure(out), jaxpr.out_avals)


def _on_host(a: Any) -> bool:
    return getattr(a, "memory_space", None) is jax.memory.Space.Host


def _bytes(arrays: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


def steps(names: Sequence[str], paged: Sequence[bool] = (False, True)):
    """(model, whether paged, step) of each, compiled in a process of its own: libtpu may abort."""
    for name in names:
        for paging in paged:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.qlora_memory", "--one", name]
                + ["--paged"] * paging,
                env=os.environ | compiler.ENVIRONMENT, cwd=Path(__file__).parents[2],
                capture_output=True, text=True, timeout=SECONDS,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{name} did not compile: {done.stderr[-3000:]}")
            yield name, paging, Step(*json.loads(done.stdout.splitlines()[-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_option(parser)
    parser.add_argument("--models", default=",".join(MODELS), help="of these, separated by commas")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--paged", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if why := compiler.missing():
        print(f"QLoRA's memory: skipped, {why}")
    elif args.one:
        print(json.dumps(compiled(args.one, args.paged)))
    else:
        _print(args)


def _print(args: argparse.Namespace) -> None:
    table, kept = Table(*COLUMNS), Record(args.json, *COLUMNS)
    for name, paged, step in steps(args.models.split(",")):
        row = cells(name, paged, step)
        table.add_row(*row)
        kept.add(*row)
    Console(width=120).print(table)


def cells(name: str, paged: bool, step: Step) -> tuple[str, ...]:
    """A row of the table: bytes in GB."""
    other = step.temp + step.output + step.padding
    parts = (step.base, step.adapters, step.optimizer, other, step.total, step.host)
    place = "in host memory" if paged else "on the device"
    return name, place, *(f"{size / 1e9:.2f}" for size in parts), PUBLISHED[name]


if __name__ == "__main__":
    main()
