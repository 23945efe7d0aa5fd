"""Decoding of DFloat11 on the host; with --python, our test encoder beside the package dfloat11.

Run: python -m tests.benchmarks.dfloat11 [--python VENV/bin/python], for a venv into which
     `pip install --no-deps dfloat11 dahuffman==0.4.2` and `pip install numpy tqdm safetensors
     "setuptools<81" torch` have gone.

The package compresses arrays and a whole model on the CPU: what its import needs of a GPU (cupy,
accelerate, huggingface_hub) is replaced by empty modules, and its check of the result, which runs
on a GPU, is left out. Its arrays are compared with those of tests/support/dfloat11.py byte by byte,
and what our reader makes of its files with the weights that went in.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxquant_models.readers import encoder
from jaxquant_models.readers.huggingface import read_hf
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.readers.safetensors import Tensors
from pallas_kernels.codecs import dfloat11_stream
from tests.benchmarks.record import Record, add_option
from tests.support import dfloat11
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

PACKAGE = """
import json, pathlib, sys, types
from unittest import mock
sys.modules |= {name: mock.MagicMock() for name in
                ("cupy", "accelerate", "accelerate.utils", "huggingface_hub")}
import torch
from safetensors.torch import load_file, save_file
from dfloat11 import compress_model, dfloat11, dfloat11_utils as utils
folder = pathlib.Path(sys.argv[1])
errors = {}
for file in sorted(folder.glob("case-*.safetensors")):
    weight = load_file(file)["weight"]
    try:
        _, counter = utils.get_codec(weight)
        counts = json.loads(file.with_suffix(".json").read_text()) or counter
        codec, _, table = utils.get_32bit_codec({int(e): n for e, n in counts.items()})
        names = "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions"
        parts = list(weight.tensor_split([len(weight) // 3]))
        made = dict(zip(names, utils.encode_weights(parts, codec, 8, 512)))
        made["output_positions"] = made["output_positions"].view(torch.uint8)
        made["luts"] = utils.get_luts(table)
        save_file(made, folder / file.name.replace("case", "made"))
    except Exception as error:
        errors[file.stem] = f"{type(error).__name__}: {error}"[:58]
def module(shape):
    made = (torch.nn.Linear(*shape[::-1], bias=False) if len(shape) == 2
            else torch.nn.LayerNorm(shape, bias=False))
    return made.to(torch.bfloat16)
for single in (True, False):
    model = torch.nn.Module()
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        *above, last, _ = name.split(".")
        at = model
        for part in above:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        held = (torch.nn.Embedding(*value.shape, dtype=torch.bfloat16) if "embed" in last
                else module(value.shape))
        held.weight.data.copy_(value)
        at.add_module(last, held)
    target = folder / ("single" if single else "several")
    patterns = json.loads((folder / "patterns.json").read_text())
    compress_model(model, patterns, str(target), save_single_file=single, check_correctness=False)
json.dump({"errors": errors, "version": dfloat11.version}, (folder / "done.json").open("w"))
"""
FIBONACCI = [1, 1]
while len(FIBONACCI) < 40:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def bf16(values):
    """The bits of values rounded to bfloat16."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)


def minilm():
    """A matrix of MiniLM, where its package is installed."""
    try:
        file = packaged_file(encoder.NAMED["minilm"]) / "model.safetensors"
    except ValueError:
        return None
    held = Tensors(file)
    return bf16(held.read("encoder.layer.0.attention.self.query.weight"))


def cases():
    """Name -> (words, counts of exponents where they are not those of the words)."""
    rng = np.random.default_rng(0)
    normal = lambda n: bf16(rng.normal(0, 0.02, n))
    any_of = lambda *bounds: (rng.integers(*bounds, 60_000) << 7).astype(np.uint16)
    rare = normal(70_001)
    rare[rng.integers(0, rare.size, 900)] = 0x8000
    rare[:40] = rng.integers(0, 240 << 7, 40)
    yield "normal", (normal(123_457), None)
    yield "normal, small", (normal(5_001), None)
    yield "rare exponents and -0", (rare, None)
    yield "all exponents below 240", (any_of(0, 240), None)
    for longest in (12, 20, 32, 37):
        counts = {100 + i: FIBONACCI[i] for i in range(longest)}
        yield f"codes up to {longest} bits", (any_of(100, 100 + longest), counts)
    counts = {100 + i: FIBONACCI[i] for i in range(16)}  # codes of 1 bit for 115, 16 for 100
    ends = np.array([115] * (512 * 64 - 8) + [100]) << 7
    yield "a last block without a start", (ends.astype(np.uint16), counts)
    yield "two exponents", (any_of(100, 102), None)
    yield "one exponent", (any_of(100, 101), None)
    if (matrix := minilm()) is not None:
        yield "MiniLM, query of layer 0", (matrix, None)
    yield (
        "infinities",
        (np.where(rng.random(60_000) < 1e-3, 0x7F80, normal(60_000)).astype(np.uint16), None),
    )


def stream(arrays):
    """The arrays of a block as our decoder takes them."""
    return dfloat11_stream.Stream(
        arrays["luts"], arrays["encoded_exponent"], arrays["sign_mantissa"],
        arrays["output_positions"].view(np.uint32), arrays["gaps"], 512,
    )  # fmt: skip


def compressed_by_package(python, folder):
    """Write what the package is to compress, and let it; returns its version and its errors."""
    for i, (words, counts) in enumerate(dict(cases()).values()):
        weight = words.view(ml_dtypes.bfloat16)
        save_file({"weight": weight}, folder / f"case-{i:02}.safetensors")
        (folder / f"case-{i:02}.json").write_text(json.dumps(counts))
    rounded = {n: a.astype(ml_dtypes.bfloat16) for n, a in random_tensors(BASE).items()}
    save_file(rounded, folder / "model.safetensors")
    (folder / "patterns.json").write_text(json.dumps(dfloat11.PATTERNS))
    done = subprocess.run([python, "-c", PACKAGE, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the package dfloat11 could not be run:\n{done.stderr[-2000:]}")
    return json.loads((folder / "done.json").read_text())


def compared(folder, errors):
    """Case -> whether bytes and weights are those of the package, or the error that it had."""
    for i, (name, (words, counts)) in enumerate(dict(cases()).items()):
        if error := errors.get(f"case-{i:02}"):
            yield name, f"not compressed by the package: {error}"
            continue
        theirs = load_file(folder / f"made-{i:02}.safetensors")
        third = len(words) // 3
        ours = dfloat11.encode([words[:third], words[third:]], counts=counts)
        differ = [n for n in ours if not np.array_equal(ours[n], theirs[n])]
        try:
            same = np.array_equal(dfloat11_stream.decode(stream(theirs)), words)
            yield name, f"bytes differ: {differ or 'none'}; same weights: {same}"
        except ValueError as error:
            yield name, f"bytes differ: {differ or 'none'}; refused: {error}"


def models(folder):
    """Kind of folder -> whether the model of the package is read as it went in, and its bytes."""
    tensors = random_tensors(BASE)
    for kind in ("single", "several"):
        here = folder / kind
        config = json.loads((here / "config.json").read_text())
        (here / "config.json").write_text(json.dumps(BASE | config))
        (here / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
        rounded = dfloat11.compressed_folder(folder / f"ours-{kind}", BASE, tensors)
        write_folder(folder / f"plain-{kind}", BASE, rounded)
        read = lambda name: read_hf(folder / name)[1]
        same = read(kind).digest() == read(f"plain-{kind}").digest()
        theirs = {n: v for file in here.glob("*.safetensors") for n, v in load_file(file).items()}
        ours = load_file(folder / f"ours-{kind}" / "model.safetensors")
        alike = theirs.keys() == ours.keys() and all(
            ours[n].tobytes() == theirs[n].tobytes() for n in ours
        )
        yield f"model, {kind}", f"same tensors: {alike}; same weights: {same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="of a venv with the package; without it, only speed")
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "case", "result")
    words = bf16(np.random.default_rng(0).normal(0, 0.02, 2_000_000))
    coded, times = stream(dfloat11.encode([words])), []
    for _ in range(7):
        start = time.perf_counter()
        dfloat11_stream.decode(coded)
        times.append(time.perf_counter() - start)
    found = [("decoding, MB/s of bfloat16", f"{words.nbytes / min(times) / 1e6:.0f}")]
    if args.python:
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            done = compressed_by_package(args.python, folder)
            found += [("version of the package", done["version"])]
            found += [*compared(folder, done["errors"]), *models(folder)]
    for row in found:
        rows.add(*row)
        print("{:<30} {}".format(*row))


if __name__ == "__main__":
    main()
