"""Products with bfloat16 weights in planes, beside products with the same weights as they are.

Run: python -m tests.benchmarks.float_planes [--k 4096] [--n 11008] [--m 1 8 128] [--json FILE].

Weights are normal. Every contender has as many copies of its matrix as make 600 MB, and they are
read in turn, one of each contender after another, so that weights come from memory rather than from
a cache. Beside float planes stand: a native product with plain bfloat16 (bfloat16_product.cc; same
threads, of several sizes of its blocks the fastest), reading the bytes of plain bfloat16 without
any product, XLA's dot, and the native product with 8-bit integers. The times are the shortest and
the median; the ratio is the median over rounds of the plain product's time by the contender's.
Last, decoding to bfloat16 in memory, beside `zstd -d` of the same bytes where there is a zstd.
"""

import argparse
import ctypes
import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu
from pallas_kernels.codecs import float_planes, layout
from pallas_kernels.cpu import native
from pallas_kernels.cpu.native import compiling
from tests.benchmarks.record import Record, add_option

BYTES = 600e6  # of the copies of each contender
BLOCKS = tuple(
    itertools.product((16, 32, 64), (1024, 2752))
)  # rows and columns, of the plain product
PLAIN = "plain bfloat16"


def build() -> None:
    """Compile and register the plain product, with the threads of the native kernels."""
    source = Path(__file__).with_name("bfloat16_product.cc")
    folder = Path(tempfile.mkdtemp())
    made, kernels = folder / "bfloat16_product.so", native.shared_object()
    command = [*compiling.compiler(), *compiling.FLAGS, "-w", "-isystem", jax.ffi.include_dir()]
    command += ["-I", compiling.FOLDER, "-shared", source, kernels, "-o", made]
    subprocess.run(list(map(str, command)), check=True)
    library = ctypes.CDLL(str(made))
    for name in ("bfloat16_product", "bfloat16_read"):
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    shutil.rmtree(folder)


def plain(x: jax.Array, words: jax.Array, rows: int, most: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct((len(x), words.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("bfloat16_product", shape)
    return call(x, words, rows=np.int32(rows), most=np.int32(most))


def reading(x: jax.Array, words: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call("bfloat16_read", jax.ShapeDtypeStruct((1,), jnp.int32))(words)


def in_planes(bits: int, x: jax.Array, *planes: jax.Array | None) -> jax.Array:
    kernel = cpu.KERNELS["float_planes_matmul"]
    return kernel.call(x, *planes, dtype="bfloat16", bits=bits)


def integers(x: jax.Array, *arrays: jax.Array | None) -> jax.Array:
    return cpu.KERNELS["packed_matmul"].call(x, *arrays, bits=8, group_size=64)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


class Contender:
    """A product, and copies of its matrix.

    Args:
      call: function of x and the arrays.
      arrays: the arrays of the matrix; None where there is none.
    """

    def __init__(self, call: Callable, *arrays: jax.Array | None):
        self.bytes = sum(a.nbytes for a in arrays if a is not None)
        count = max(1, -int(-BYTES // self.bytes))
        copy = lambda a: None if a is None else jnp.array(a)
        self.copies = [arrays, *(tuple(map(copy, arrays)) for _ in range(count - 1))]
        self.call, self.turn, self.times = jax.jit(call), 0, []

    def run(self, x: jax.Array) -> float:
        """Seconds of a product with the next copy."""
        arrays = self.copies[self.turn % len(self.copies)]
        self.turn += 1
        start = time.perf_counter()
        jax.block_until_ready(self.call(x, *arrays))
        return time.perf_counter() - start


def contenders(u: np.ndarray, rng: np.random.Generator) -> dict[str, Contender]:
    """Name -> contender, with the weights whose bits are given."""
    k, n = u.shape
    words = jnp.asarray((u[1::2].astype(np.uint32) << 16 | u[::2]).view(np.int32))
    codes = jnp.asarray(rng.integers(-(2**31), 2**31, (layout.words(k, 8), n), np.int64), jnp.int32)
    scale = jnp.ones((-(-k // 64), n), jnp.float16)
    found = {}
    for bits in float_planes.BITS:
        planes = float_planes.encode(jnp.asarray(u), "bfloat16", bits)
        found[f"planes, {bits}-bit exponents"] = Contender(partial(in_planes, bits), *planes)
        size = 8 * sum(a.nbytes for a in planes if a is not None) / u.size
        listed = f"{planes.where.size} of {u.size} weights listed"
        print(f"{bits}-bit exponents: {size:.3f} bits per weight, {listed}")
    found[PLAIN] = Contender(fastest(words), words)
    found["reading"] = Contender(reading, words)
    found["XLA's bfloat16 dot"] = Contender(dot, jnp.asarray(u.view(jnp.bfloat16)))
    found["8-bit integers"] = Contender(integers, codes, scale, None)
    return found


def fastest(words: jax.Array) -> Callable:
    """The plain product with the blocks that take the shortest time."""
    x = jnp.ones((1, 2 * len(words)), jnp.float32)
    tried = {
        blocks: Contender(partial(plain, rows=blocks[0], most=blocks[1]), words)
        for blocks in BLOCKS
    }
    copies = next(iter(tried.values())).copies
    for one in tried.values():
        one.copies = copies
        one.run(x)
    least = {blocks: min(one.run(x) for _ in range(12)) for blocks, one in tried.items()}
    rows, most = min(least, key=least.get)
    print(f"plain bfloat16: blocks of {rows} rows and {most} columns are the fastest")
    return partial(plain, rows=rows, most=most)


def measure(all_of: dict[str, Contender], m: int, k: int, rounds: int, rows: Record) -> None:
    x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), jnp.float32)
    times = {name: [] for name in all_of}
    for i in range(rounds + 1):  # the first compiles
        for name in random.sample(list(all_of), len(all_of)):
            took = all_of[name].run(x)
            if i:
                times[name].append(took)
    base = np.array(times[PLAIN])
    print(
        f"\nM = {m}                          best      median   GB/s (best)   plain's time over it"
    )
    for name, one in all_of.items():
        took = np.array(times[name])
        best, median, rate = 1e3 * took.min(), 1e3 * np.median(took), one.bytes / took.min() / 1e9
        ratio, of_best = np.median(base / took), base.min() / took.min()
        print(f"  {name:24} {best:8.3f} {median:8.3f} ms {rate:8.1f} {ratio:8.2f} ({of_best:.2f})")
        rows.add(m, name, f"{best:.3f}", f"{median:.3f}", f"{rate:.1f}", f"{of_best:.2f}")


def decoding(u: np.ndarray, bits: int, rounds: int) -> None:
    """Print the rates of decoding to memory, and of `zstd -d`, two processes on half each."""
    planes = float_planes.encode(jnp.asarray(u), "bfloat16", bits)
    run = jax.jit(partial(cpu.decode_float_planes, dtype="bfloat16", bits=bits, k=len(u)))
    assert (np.asarray(run(planes)) == u).all()
    least = min(_seconds(lambda: jax.block_until_ready(run(planes))) for _ in range(rounds))
    print(f"\ndecoding {bits}-bit exponents: {u.nbytes / least / 1e9:.2f} GB/s of bfloat16")
    if bits == 3 and shutil.which("zstd"):
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, str(i)) for i in range(2)]
            for file, half in zip(files, np.array_split(u, 2), strict=True):
                file.write_bytes(half.tobytes())
                subprocess.run(["zstd", "-q", "-3", file], check=True)
            least = min(_seconds(lambda: _unpack(files)) for _ in range(rounds))
            print(f"zstd -d, two processes: {u.nbytes / least / 1e9:.2f} GB/s")


def _unpack(files: Sequence[Path]) -> None:
    command = ["zstd", "-q", "-d", "-c"]
    out = subprocess.DEVNULL
    runs = [subprocess.Popen([*command, f"{file}.zst"], stdout=out) for file in files]
    for run in runs:
        run.wait()


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--m", type=int, nargs="*", default=[1, 8, 128])
    parser.add_argument("--rounds", type=int, default=40)
    add_option(parser)
    args = parser.parse_args()
    if reason := native.load():
        raise SystemExit(f"no native kernels: {reason}")
    print(f"instruction set: {native.instruction_sets()[-1]}")
    build()
    rng = np.random.default_rng(0)
    w = rng.standard_normal((args.k, args.n), np.float32) / 64
    u = np.asarray(w.astype(jnp.bfloat16)).view(np.uint16)
    rows = Record(
        args.json, "M", "weights", "best, ms", "median, ms", "GB/s", "plain's best over it"
    )
    all_of = contenders(u, rng)
    for m in args.m:
        measure(all_of, m, args.k, args.rounds if m == 1 else max(5, args.rounds // 8), rows)
    for bits in float_planes.BITS:
        decoding(u, bits, max(5, args.rounds // 4))


if __name__ == "__main__":
    main()
