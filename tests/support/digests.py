"""Digests of the arrays that fixed calls make: whether a change of structure changed behaviour.

Run it before a change and after it, on one machine with one JAX:

  python -m tests.support.digests > before.txt
  python -m tests.support.digests --against before.txt

Names within a packed weight do not enter a digest, only its arrays: dtype, shape and bytes.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jaxquant as jq

K, N, TOKENS = 256, 128, 512

# Small enough to take seconds, otherwise as a user would call them.
OPTIONS: dict[str, dict[str, Any]] = {
    "qtip": {"L": 8},
    "trellis": {"bits": 2.25, "L": 8},
    "aqlm": {"bits": 4, "sweeps": 2},
    "vptq": {"bits": 4, "residual_bits": 4, "sweeps": 2},
    "entropy_coded": {"states": 4},
}


def function(params: Any, x: Any) -> Any:
    """An MLP; both products of its first layer read one input."""
    h = jnp.tanh(x @ params["gate"]) * (x @ params["up"])
    return h @ params["down"]


def made() -> tuple[Any, list[Any], Any]:
    """(weights, batches, statistics of everything that a method may ask for)."""
    rng = np.random.default_rng(0)
    weights = lambda k, n: jnp.asarray(rng.standard_t(5, (k, n)) / np.sqrt(k), jnp.float32)
    params = {"gate": weights(K, N), "up": weights(K, N), "down": weights(N, K)}
    scale = np.exp(0.5 * rng.normal(size=K))
    batches = [jnp.asarray(rng.normal(size=(TOKENS, K)) * scale, jnp.float32) for _ in range(2)]
    loss = lambda y, x: jnp.mean(jnp.square(y - x))
    stats = jq.calibrate(function, params, batches, loss=loss, output=list(params), sample=64)
    return params, batches, stats


def digest(tree: Any) -> str:
    """SHA-256 over every leaf's path and the sorted digests of its arrays."""
    out = hashlib.sha256()
    for path, leaf in sorted(jq.core.path_leaves(tree), key=lambda pair: pair[0]):
        of_arrays = sorted(map(_of_array, jax.tree.leaves(leaf)))
        out.update(f"{path} {' '.join(of_arrays)}\n".encode())
    return out.hexdigest()[:16]


def _of_array(a: Any) -> str:
    a = np.asarray(a)
    return hashlib.sha256(f"{a.dtype} {a.shape}".encode() + a.tobytes()).hexdigest()


def calls() -> dict[str, Callable[[], Any]]:
    """Every call, by name."""
    params, batches, stats = made()
    method = lambda name: jq.methods.named_method(name, **OPTIONS.get(name, {}))
    quantize = lambda recipe: jq.quantize(params, recipe, stats)
    recipes = {
        "mixed": [("down", jq.KEEP), ("*", jq.gptq(bits=3, group_size=32))],
        "rotated": [("down", jq.rtn(bits=8, group_size=128)), ("*", jq.quarot(bits=4))],
        "searched": [
            ("gate", jq.awq(bits=4)),
            ("up", jq.awq(bits=4)),
            ("*", jq.normal_float(double_quant=True)),
        ],
    }
    latent = lambda: jq.latent(params, jq.lsq(bits=2, group_size=32), stats)
    inputs = np.asarray(batches[0]).reshape(-1, 8, K)[:8]

    def trained() -> Any:
        how = jq.training.QAT(steps=3, learning_rate=1e-3)
        return jq.qat(function, latent(), inputs, how, teacher=params)

    def outputs() -> Any:
        packed = quantize(jq.gptq(bits=4, group_size=32))
        return {"y": jax.jit(jq.quantized(function))(packed, batches[0][:4])}

    return (
        {name: lambda name=name: quantize(method(name)) for name in sorted(jq.METHODS)}
        | {
            f"recipe {name}": lambda rules=rules: quantize(jq.Recipe(rules))
            for name, rules in recipes.items()
        }
        | {"latent": latent, "qat, 3 steps": trained, "frozen": lambda: jq.freeze(trained())}
        | {"product": outputs, "checkpoint": lambda: _stored(quantize(method("quip_sharp")))}
    )


def _stored(tree: Any) -> Any:
    """A checkpoint's arrays as Orbax alone reads them."""
    from jaxquant.storage import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "saved", tree)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            arrays = reader.restore(Path(folder) / "saved" / "arrays")
    return {name.replace("/", "."): np.asarray(a) for name, a in arrays.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Digests of what fixed calls give.")
    parser.add_argument("--against", type=Path, help="what an earlier run printed")
    parser.add_argument("--only", default="", help="names that hold this text")
    arguments = parser.parse_args()
    before = {}
    if arguments.against:
        lines = arguments.against.read_text().splitlines()
        before = dict(line.rsplit(" ", 1) for line in lines)
    changed = 0
    for name, call in calls().items():
        if arguments.only not in name:
            continue
        found = digest(call())
        differs = bool(before) and before.get(name) != found
        changed += differs
        print(name, found + (" CHANGED" if differs else ""), flush=True)
    if before:
        print(f"{changed} changed", file=sys.stderr)
    return changed > 0


if __name__ == "__main__":
    sys.exit(main())
