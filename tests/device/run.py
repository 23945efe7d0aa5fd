"""The hardware suite: parity, times of every kernel, tokens per second. `make test-device` runs it.

Prints tables and writes them to tests/device/results/DEVICE.json. `--seconds` bounds the whole:
what would come too late is left out, and said so.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from tests.device import decode, timing
from tests.support.arrays import draw
from tests.support.operands import random_operands

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]
ROWS = (1, 16, 256)


def products(deadline: float) -> list[dict]:
    """Times of every op beside `jnp.dot` of bfloat16, and the share of the copy's bandwidth."""
    bandwidth, rows = timing.copy_bandwidth(), []
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    print(f"{'op':34} {'m':>4} {'k x n':>13} {'us':>8} {'GB/s':>6} {'of copy':>8} {'dot / it':>9}")
    for k, n in SHAPES:
        dense = [
            (draw(k, n, seed=i).astype(jnp.bfloat16),) for i in range(timing.copies(2 * k * n))
        ]
        for m in ROWS:
            x = draw(m, k).astype(jnp.bfloat16)
            dot = timing.seconds(lambda x, w: jnp.dot(x, w), x, dense)
            rows.append(_row("jnp.dot bfloat16", "float", m, k, n, dot, dot, 2 * k * n, bandwidth))
            for case, form, op, arrays, static in random_operands(k, n):
                if time.monotonic() > deadline:
                    print("out of time: the rest is left out")
                    return rows
                shapes = (x, *arrays)
                static = {**static, "activations": form}
                if dispatch.choose(op, dispatch.default_platform(), shapes, static)[0] is None:
                    continue
                nbytes = sum(a.nbytes for a in arrays if a is not None)
                fresh = _copies(arrays, timing.copies(nbytes))
                run = lambda x, *a, op=op, s=static: dispatch.product(op, x, *a, **s)
                t = timing.seconds(run, x, fresh)
                rows.append(_row(case, form, m, k, n, t, dot, nbytes, bandwidth))
    return rows


def _copies(arrays: tuple, count: int) -> list[tuple]:
    """As many buffers, of equal content."""
    fresh = lambda a: None if a is None else jnp.array(a, copy=True)
    return [tuple(fresh(a) for a in arrays) for _ in range(count)]


def _row(
    case: str,
    form: str,
    m: int,
    k: int,
    n: int,
    t: float,
    dot: float,
    nbytes: int,
    bandwidth: float,
) -> dict:
    name = case if form == "float" else f"{case}, {form}"
    print(
        f"{name:34} {m:4} {k:6}x{n:<6} {1e6 * t:8.1f} {nbytes / t / 1e9:6.0f} "
        f"{nbytes / t / bandwidth:8.2f} {dot / t:9.2f}",
        flush=True,
    )
    return {
        "op": case, "activations": form, "m": m, "k": k, "n": n, "seconds": t,
        "weight_bytes": nbytes, "of_copy_bandwidth": nbytes / t / bandwidth, "dot_over_it": dot / t,
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=470)
    options.add_argument("--skip-parity", action="store_true")
    given = options.parse_args()
    if jax.default_backend() == "cpu":
        sys.exit("no accelerator: JAX runs on the CPU here")
    start = time.monotonic()
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}")
    result = {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    if not given.skip_parity:
        result["parity"] = parity(given.seconds * 0.3)
    result["products"] = products(start + 0.65 * given.seconds)
    result["decode"] = decode.rates(start + given.seconds)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{re.sub('[^A-Za-z0-9]+', '_', device)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path} after {time.monotonic() - start:.0f} s")


def parity(seconds: float) -> str:
    """The last line that pytest prints of the parity tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/device", "-p", "no:xdist"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        line = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        print(done.stdout[-3000:] if done.returncode else line)
    except subprocess.TimeoutExpired:
        line = f"not finished in {seconds:.0f} s"
        print(f"parity: {line}")
    return line


if __name__ == "__main__":
    main()
