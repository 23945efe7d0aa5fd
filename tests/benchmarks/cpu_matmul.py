"""Native products on this CPU, side by side with XLA's float32 dot: `python -m tests.benchmarks.cpu_matmul`.

Every round times the float32 dot, then each product once; a ratio is the median over rounds of
float32 time by the product's, so that what else the machine does falls on both. Weights are random.
With `--instructions` the user instructions per weight, by `perf stat`: a measure that load does not move.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu, layout, lookup, native

SHAPES = ((4096, 11008), (4096, 4096), (1536, 576), (576, 1536))
NF4 = tuple(float(v) for v in np.linspace(-1, 1, 16) ** 3)  # any sixteen values
# Least ratio at M = 1, 4096 x 11008 that issue 5 asks for, by product.
NEEDED = {
    ("2 bits", "int8"): 8, ("ternary", "int8"): 8, ("4 bits", "int8"): 4, ("E8P 2 bits", "int8"): 3,
    ("trellis 2 bits", "int8"): 1.5, ("2 bits", "float"): 2, ("4 bits", "float"): 2,
}  # fmt: skip


def words(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(-(2**31), 2**31, shape), jnp.int32)


def operands(rng: np.random.Generator, k: int, n: int) -> dict[str, tuple[str, tuple, dict]]:
    """Name -> (op, arrays, static) of every format, random codes."""
    scale = jnp.asarray(rng.uniform(0.5, 2, (-(-k // 64), n)), jnp.float16)
    one = jnp.ones((1, 1), jnp.float32)
    found = {}
    for bits in (2, 3, 4, 8):
        codes = words(rng, layout.words(k, bits), n)
        zero = words(rng, -(-k // 64), layout.words(n, bits))
        found[f"{bits} bits"] = (
            "packed_matmul",
            (codes, scale, None),
            {"bits": bits, "group_size": 64},
        )
        found[f"{bits} bits, zero points"] = (
            "packed_matmul",
            (codes, scale, zero),
            {"bits": bits, "group_size": 64},
        )
    ternary = layout.pack(jnp.asarray(rng.integers(-1, 2, (k, n))), 2)
    found["ternary"] = ("ternary_matmul", (ternary, one), {"group_size": k})
    nf4 = {"table": NF4, "bits": 4, "group_size": 64}
    found["NF4"] = ("codebook_matmul", (words(rng, layout.words(k, 4), n), scale), nf4)
    for bits in (2, 3, 4):
        residual = words(rng, -(-k // 8 * (bits - 2) // 4), n) if bits > 2 else None
        codes = words(rng, -(-k // 16), n)
        found[f"E8P {bits} bits"] = ("e8p_matmul", (codes, residual, one), {"bits": bits})
    for rate in (2, 3, 4):
        codes = words(rng, 8 * rate * (k // 16), n // 16)
        static = {"rates": (rate,), "L": 12, "code": "mul1"}
        found[f"trellis {rate} bits"] = ("trellis_matmul", (codes, one), static)
    codes = words(rng, lookup_words(k // 8 * 2, 8), n)
    books = jnp.asarray(rng.standard_normal((2, 256, 8)), jnp.float16)
    found["additive 2x8"] = ("additive_matmul", (codes, books, scale[:1]), {"bits": 8, "group": 8})
    return found


def lookup_words(codes: int, bits: int) -> int:
    digit = lookup.digit(bits)
    return layout.words(codes * bits // digit, digit)


def products(rng: np.random.Generator, k: int, n: int) -> Iterator[tuple[tuple, Callable]]:
    """((name, activations), x -> y), compiled when called."""
    for name, (op, arrays, static) in operands(rng, k, n).items():
        for form in ("int8", "float"):
            run = jax.jit(
                lambda x, arrays, op=op, static=static, form=form: cpu.shared(
                    op, x, [arrays], activations=form, **static
                )[0]
            )
            yield (name, form), lambda x, run=run, arrays=arrays: run(x, arrays)


def measure(m: int, k: int, n: int, rounds: int, only: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    dot = jax.jit(lambda x: x @ w)
    runs = {key: run for key, run in products(rng, k, n) if only in " ".join(key)}
    times = {key: [] for key in ("dot", *runs)}
    for i in range(rounds + 1):  # the first compiles
        for key, run in (("dot", dot), *runs.items()):
            start = time.perf_counter()
            jax.block_until_ready(run(x))
            if i:
                times[key].append(time.perf_counter() - start)
    base = np.array(times.pop("dot"))
    print(f"\nM = {m}, {k} x {n}: float32 dot {1e3 * np.median(base):.3f} ms")
    for (name, form), took in times.items():
        ratio = np.median(base / np.array(took))
        need = NEEDED.get((name, form)) if (m, k) == (1, 4096) and n == 11008 else None
        verdict = "" if need is None else f"  (needed {need})"
        print(f"  {name:22} {form:6} {1e3 * np.median(took):9.3f} ms {ratio:6.2f}{verdict}")


def instructions(k: int, n: int, only: str) -> None:
    """User instructions per weight at M = 1: those of 22 calls less those of 2."""
    print(f"\ninstructions per weight, M = 1, {k} x {n}")
    for name, form in (key for key, _ in products(np.random.default_rng(0), 64, 64)):
        if only not in f"{name} {form}":
            continue
        few, many = (_count(k, n, f"{name}|{form}", calls) for calls in (2, 22))
        print(f"  {name:22} {form:6} {(many - few) / (20 * k * n):7.3f}")


def _count(k: int, n: int, which: str, calls: int) -> int:
    here = [sys.executable, "-m", "tests.benchmarks.cpu_matmul", "--run", which, "--calls", calls]
    command = ["perf", "stat", "-x", ",", "-e", "instructions:u", *map(str, [*here, k, n])]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(text.strip().splitlines()[-1].split(",")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--m", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    parser.add_argument("shape", type=int, nargs="*", help="k and n; all shapes by default")
    args = parser.parse_args()
    shapes = [tuple(args.shape)] if args.shape else SHAPES
    if args.run:
        k, n = args.shape
        run = dict(products(np.random.default_rng(0), k, n))[tuple(args.run.split("|"))]
        for _ in range(args.calls):
            jax.block_until_ready(run(jnp.ones((1, k))))
        return
    if reason := native.load():
        raise SystemExit(f"no native kernels: {reason}")
    print(f"instruction set: {native.instruction_sets()[-1]}")
    if args.instructions:
        instructions(*shapes[0], args.only)
        return
    for m in args.m:
        for k, n in shapes:
            measure(m, k, n, args.rounds if m == 1 else max(3, args.rounds // 8), args.only)


if __name__ == "__main__":
    main()
