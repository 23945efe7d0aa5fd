"""Entropy coders of the exponents of bf16 weights, side by side with zlib and lzma.

Run: python -m tests.benchmarks.byte_streams [--model minilm|gaussian] [--threads N] [--json FILE]

The exponents of MiniLM's 36 linear layers, rounded to bf16, are coded one layer at a time;
`gaussian` takes one matrix 4096 x 4096 instead. Bits are those of a whole weight: 8 of sign and
mantissa, and the coded exponent with its table, sizes and padding. Speeds are in MB/s of exponents;
in bf16 weights they are twice as high. They are the best of some rounds in which the coders take
turns. zlib and lzma run once, in one thread.
"""

import argparse
import lzma
import time
import zlib
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant_models.readers.encoder import load_encoder
from pallas_kernels import byte_streams
from tests.benchmarks.record import Record, add_option

ROUNDS = 5


def minilm() -> list[np.ndarray]:
    """The matrices of the linear layers."""
    layers = load_encoder("minilm").params["layers"]
    kernels = [w for path, w in jq.core.path_leaves(layers) if path.endswith("kernel")]
    return [np.asarray(matrix) for w in kernels for matrix in w.reshape(-1, *w.shape[-2:])]


def gaussian() -> list[np.ndarray]:
    return [np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32) * 0.02]


MODELS = {"minilm": minilm, "gaussian": gaussian}


def exponents(w: np.ndarray) -> np.ndarray:
    """The exponent fields of a matrix rounded to bf16, uint8."""
    bits = np.asarray(jnp.asarray(w, jnp.bfloat16)).view(np.uint16)
    return (bits.ravel() >> 7 & 0xFF).astype(np.uint8)


def entropy(plane: np.ndarray) -> float:
    share = byte_streams.histogram(plane) / len(plane)
    return float(-(share[share > 0] @ np.log2(share[share > 0])))


def ours(coding: str, threads: int) -> tuple[Callable, Callable]:
    return (
        partial(byte_streams.encode, coding=coding, threads=threads),
        lambda data, count: byte_streams.decode(data, count, coding, threads),
    )


def coders(threads: int) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (plane -> bytes, (bytes, count) -> plane)."""
    return {
        "Huffman": ours("huffman", threads),
        "rANS": ours("rans", threads),
        "zlib -6": (lambda plane: zlib.compress(plane, 6), lambda data, _: zlib.decompress(data)),
        "lzma": (lzma.compress, lambda data, _: lzma.decompress(data)),
    }


def measure(planes: list[np.ndarray], threads: int, rows: Record) -> None:
    total = sum(map(len, planes))
    best: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    for i in range(ROUNDS):
        for name, (encode, decode) in coders(threads).items():
            foreign = name in ("zlib -6", "lzma")
            if foreign and i:
                continue  # one round takes seconds
            start = time.perf_counter()
            data = [encode(plane) for plane in planes]
            middle = time.perf_counter()
            got = [decode(d, len(p)) for d, p in zip(data, planes, strict=True)]
            took = [middle - start, time.perf_counter() - middle]
            for one, plane in zip(got, planes, strict=True):
                if bytes(one) != plane.tobytes():
                    raise RuntimeError(f"{name} does not give the plane back")
            best[name] = [min(pair) for pair in zip(best.get(name, took), took, strict=True)]
            sizes[name] = [len(d) for d in data]
    each = [8 + entropy(plane) for plane in planes]
    print(f"{len(planes)} planes, {total} symbols; ideal {np.mean(each):.4f} bits a weight")
    for name, (coded, decoded) in best.items():
        bits = np.mean([8 + 8 * s / len(p) for s, p in zip(sizes[name], planes, strict=True)])
        pooled = 8 + 8 * sum(sizes[name]) / total
        speeds = [total / seconds / 1e6 for seconds in (coded, decoded)]
        rows.add(name, f"{bits:.4f}", f"{pooled:.4f}", *(f"{speed:.0f}" for speed in speeds))
        print(
            f"  {name:8} {bits:8.4f} bits (pooled {pooled:.4f})  "
            f"encode {speeds[0]:6.0f}  decode {speeds[1]:6.0f} MB/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--threads", type=int, default=2)
    add_option(parser)
    given = parser.parse_args()
    columns = "coder", "bits, mean of planes", "bits, pooled", "encode MB/s", "decode MB/s"
    planes = [exponents(w) for w in MODELS[given.model]()]
    measure(planes, given.threads, Record(given.json, *columns))


if __name__ == "__main__":
    main()
