"""A paged step through the real compiler for TPUs: where its state lies, what it moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.adapters.adam_8bit import adam8bit
from jaxquant.adapters.paging import paged
from tests.aot import compiler

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(compiler.missing()), reason=compiler.missing() or "-"),
]
LAYERS, N = 16, 2048
LAYER = 4 * N * N  # bytes of one float32 matrix
SHAPES = {"stacked": {"w": (LAYERS, N, N)}, "separate": {str(i): (N, N) for i in range(LAYERS)}}
OPTIMIZERS = {"adamw": lambda: optax.adamw(1e-4), "adam8bit": lambda: adam8bit(1e-4)}


@pytest.fixture(scope="module")
def steps():
    """Bytes and moves of every step, compiled in a process of its own: libtpu may abort."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.test_paging"], capture_output=True, text=True,
        env=os.environ | compiler.ENVIRONMENT, cwd=Path(__file__).parents[2], timeout=240,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SHAPES)
def test_state_lies_in_host_memory(steps, name):
    """On the device are parameters and gradients alone; the donated state stays in place."""
    here, there = steps[f"{name} adamw"], steps[f"{name} adamw paged"]
    state = 2 * LAYERS * LAYER
    assert here["argument"] == pytest.approx(2 * LAYERS * LAYER + state, rel=0.01)
    assert here["host_argument"] == 0
    assert there["argument"] == pytest.approx(2 * LAYERS * LAYER, rel=0.01)
    assert there["host_argument"] == there["host_output"] == there["host_alias"] == state
    assert there["host_temp"] == 0


def test_one_layer_is_on_the_device(steps):
    """In and out, with what is in flight: eight matrices, however many layers there are."""
    updates = LAYERS * LAYER  # in one buffer, which XLA leaves out where nothing is paged
    stacked = steps["stacked adamw paged"]
    assert stacked["temp"] <= updates + 8.5 * LAYER
    assert stacked["moves"] == {"dynamic-slice-start": 2, "dynamic-update-slice-start": 2}
    assert steps["separate adamw paged"]["temp"] <= 7 * LAYER


def test_codes_move(steps):
    """Of 8-bit Adam, two bytes per parameter, and the scales."""
    here, there = steps["stacked adam8bit"], steps["stacked adam8bit paged"]
    size = LAYERS * N * N
    assert there["host_argument"] == pytest.approx(2.03 * size, rel=0.01)
    assert here["argument"] - there["argument"] == pytest.approx(2.03 * size, rel=0.02)


@pytest.mark.parametrize("order", ["state only", "state first"])
def test_any_donation(steps, order):
    """JAX pairs donated arguments with results by shape: parameters must not land on the host."""
    there = steps[order]
    assert there["host_output"] == there["host_alias"] == 2 * LAYERS * LAYER
    assert there["output"] >= LAYERS * LAYER


def test_init_takes_one_layer(steps):
    assert steps["init"]["host_output"] == 2 * LAYERS * LAYER
    assert steps["init"]["temp"] <= 3 * LAYER


def _steps():
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))

    def placed(tree):
        host = lambda a: getattr(a, "memory_space", None) is jax.memory.Space.Host
        kind = lambda a: "pinned_host" if host(a) else "device"
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, P(), memory_kind=kind(a))
            ),
            tree,
        )

    def compiled(function, *args, donate=()):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            done = jax.jit(function, donate_argnums=donate).lower(*args).compile()
        memory, text = done.memory_analysis(), done.as_text()
        names = ("argument", "output", "alias", "temp")
        bytes_ = {f"{h}{n}": getattr(memory, f"{h}{n}_size_in_bytes")
                  for h in ("", "host_") for n in names}  # fmt: skip
        moves = ("dynamic-slice-start", "dynamic-update-slice-start")
        return bytes_ | {"moves": {m: text.count(f" {m}(") for m in moves}}

    found = {}
    for shape, name, paging in [
        *(("stacked", n, p) for n in OPTIMIZERS for p in (False, True)),
        *(("separate", "adamw", p) for p in (False, True)),
    ]:
        params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES[shape].items()}
        optimizer = OPTIMIZERS[name]()
        optimizer = paged(optimizer, piece_bytes=1) if paging else optimizer

        def step(params, state, grads, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        arguments = placed([params, _state(optimizer, params), params])
        key = f"{shape} {name}" + " paged" * paging
        found[key] = compiled(step, *arguments, donate=(0, 1))
        if key == "stacked adamw paged":
            found["state only"] = compiled(step, *arguments, donate=1)
            swapped = lambda s, p, g, step=step: step(p, s, g)
            p, s, g = arguments
            found["state first"] = compiled(swapped, s, p, g, donate=(0, 1))
            found["init"] = compiled(lambda p: (optimizer.init(p), p["w"] + 1), p)  # noqa: B023
    return found


def _state(optimizer, params):
    """The types of the state: `jax.eval_shape` keeps no memory spaces."""
    _, out = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    avals = jax.make_jaxpr(optimizer.init)(params).out_avals
    return jax.tree.unflatten(jax.tree.structure(out), avals)


if __name__ == "__main__":
    print(json.dumps(_steps()))
