"""A decoder layer on a whole pod: packed weights split by columns or rows, and in pieces over data.

    python -m tests.aot.pods v5e:16x16 16 16 70B

compiles a model's for a topology, its devices in a mesh (data, model), and prints as JSON the bytes
that a device holds, the packed bytes of its share, and every collective: its kind, dtype and shape.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import shard
from pallas_kernels.attention import attention
from pallas_kernels.codecs import layout
from pallas_kernels.dispatch import product
from tests.aot.compiler import ENVIRONMENT

TOKENS, HEAD = 8, 128
BITS, GROUP = 2, 128
STATIC = {"bits": BITS, "group_size": GROUP}


class Model(NamedTuple):
    """Sizes of a layer."""

    d: int
    ff: int
    heads: int
    kv_heads: int

    def weights(self) -> dict[str, tuple[int, int, str]]:
        """Rows, columns, and which of the two the axis "model" splits; "data" splits the other."""
        inner, keys = self.heads * HEAD, self.kv_heads * HEAD
        return {
            "q": (self.d, inner, "columns"), "k": (self.d, keys, "columns"),
            "v": (self.d, keys, "columns"), "o": (inner, self.d, "rows"),
            "gate": (self.d, self.ff, "columns"), "up": (self.d, self.ff, "columns"),
            "down": (self.ff, self.d, "rows"),
        }  # fmt: skip


MODELS = {
    "70B": Model(8192, 28672, 64, 16),
    "Qwen3-4B": Model(2560, 9728, 32, 8),
}
# name = dtype[shape]{layout} kind(...
_COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\][^=]*? (all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\("
)


def spec(split: str) -> P:
    """How the words of a weight are split, and its scales."""
    return P("data", "model") if split == "columns" else P("model", "data")


def layer(x, weights, specs):
    """One device's part of the layer: x [tokens, d] of its own, the weights gathered packed."""

    def matmul(name, x):
        words, scale = shard.gathered(weights[name], specs[name], "data")
        return product("packed_matmul", x, words, scale, None, **STATIC).astype(jnp.bfloat16)

    heads = lambda y: y.reshape(1, y.shape[0], -1, HEAD)
    add = partial(jax.lax.psum, axis_name="model")
    q, k, v = (heads(matmul(name, x)) for name in "qkv")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    mixed = attention(q, k, v, jnp.arange(x.shape[0]))[0].reshape(x.shape[0], -1)
    x = x + add(matmul("o", mixed))
    hidden = jax.nn.silu(matmul("gate", x)) * matmul("up", x)
    return x + add(matmul("down", hidden))


class Pod(NamedTuple):
    """What came of compiling.

    Attributes:
      argument_bytes: of one device.
      packed_bytes: of all weights, words and scales.
      devices: of the pod.
      gathered: packed bytes of what one device multiplies: its columns or rows.
      collectives: kind, dtype and shape of each.
    """

    argument_bytes: int
    packed_bytes: int
    devices: int
    gathered: int
    collectives: list[tuple[str, str, list[int]]]


def compiled(topology: str, data: int, model: int, name: str, timeout: float = 240) -> Pod:
    """Compile in a process of its own; RuntimeError with what it said if it fails."""
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "tests.aot.pods", topology, str(data), str(model), name]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{topology} did not compile:\n{done.stderr[-3000:]}")
    return Pod(*json.loads(done.stdout.splitlines()[-1]))


def _compile(topology: str, data: int, model: int, of: Model) -> Pod:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(data, model), ("data", "model"))
    there = lambda shape, dtype, split: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, split)
    )
    specs = {name: (spec(split),) * 2 for name, (_, _, split) in of.weights().items()}
    weights = {
        name: (
            there((layout.words(k, BITS), n), jnp.int32, spec(split)),
            there((k // GROUP, n), jnp.bfloat16, spec(split)),
        )
        for name, (k, n, split) in of.weights().items()
    }
    step = jax.shard_map(
        partial(layer, specs=specs), mesh=mesh, in_specs=(P("data"), specs), out_specs=P("data"),
        check_vma=False,
    )  # fmt: skip
    x = there((TOKENS * data, of.d), jnp.bfloat16, P("data"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        done = jax.jit(step).lower(x, weights).compile()
    packed = sum(a.size * a.dtype.itemsize for pair in weights.values() for a in pair)
    found = [
        (kind, dtype, [int(n) for n in shape.split(",") if n])
        for dtype, shape, kind in _COLLECTIVE.findall(done.as_text())
    ]
    arguments = done.memory_analysis().argument_size_in_bytes
    return Pod(arguments, packed, len(devices), packed // model, found)


if __name__ == "__main__":
    sizes = int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(_compile(sys.argv[1], *sizes, MODELS[sys.argv[4]])))
