"""Description length of text with SmolLM2-135M stored at 16, 5, 4 and 2 bits: break-even points.

Run: python -m tests.benchmarks.description_length [TEXT] [--json FILE]   (else CPython's help
topics). Every model is saved and loaded again. Its nats are the mean over all but the first token
of the first 16 chunks of 512; calibration reads the last 16. Its bits are those of all weights in
memory or of the files on disk, tokenizer included. Of each two codings both lengths are computed at
the last whole number of tokens below the break-even point and at the next one.
"""

import argparse
import itertools
import math
import tempfile
import time
from pathlib import Path

import jaxquant as jq
from jaxquant import storage
from jaxquant.evaluation import chunk, evaluate
from jaxquant.theory.description_length import Coding, break_even
from jaxquant_models import load
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.readers.gguf_file import open_gguf
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.readers.registry import NAMED
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.record import Record, add_option

MODEL, CHUNKS, CONTEXT = "smollm2-135m", 16, 512
# As in the GGUF file: 8 bits in groups of 32. It is also the output matrix.
EMBEDDING = ("embed/embedding", jq.rtn(8, 32, symmetric=True))
METHODS = {"gptq 4 bits": jq.gptq(4, 64), "qtip 2 bits": jq.qtip(2, L=12)}


def measured(folder, source, texts):
    """The codings in memory and on disk, by name."""
    scored, calibration = texts
    nats = lambda fn, params: evaluate(fn, params, scored, first=0).nll
    found = {"Q4_1": original(nats(source.apply_fn, source.params))}
    print("Q4_1", found["Q4_1"], flush=True)
    stats = calibrate_model(source, calibration)
    for name, method in {"float16": None, **METHODS}.items():
        start, out = time.monotonic(), folder / name
        made, recipe = source, None
        if method is not None:
            recipe = jq.Recipe([EMBEDDING, *recipe_of(method).rules])
            made = quantize_model(source, recipe, stats)
        save_model(out, made, recipe)
        loaded = load(out, widen=False)  # float16 stays float16
        cost = nats(jq.quantized(loaded.apply_fn), loaded.params)
        found[name] = (Coding.of(loaded.params, cost), Coding(8 * storage.nbytes(out), cost))
        print(name, found[name], f"{time.monotonic() - start:.0f} s", flush=True)
    return {name: found[name] for name in ("float16", "Q4_1", *METHODS)}


def original(nats):
    """The codings of the GGUF file: the bytes of its tensors, and the file."""
    _, tensors, size = open_gguf(packaged_file(NAMED[MODEL]))
    return Coding(8 * sum(t.data.nbytes for t in tensors.values()), nats), Coding(8 * size, nats)


def check(name, a, b, found):
    """Both lengths at the whole numbers of tokens about the break-even point: they must cross."""
    lengths = {"a": a, "b": b}
    fewer, more = math.ceil(found.tokens) - 1, math.floor(found.tokens) + 1
    difference = [a.length(tokens) - b.length(tokens) for tokens in (fewer, more)]
    shorter = [min(lengths, key=lambda c: lengths[c].length(t)) for t in (fewer, more)]
    if shorter != [found.below, found.above]:
        raise SystemExit(f"{name}: lengths differ by {difference} bits about {found}")
    return [f"{bits:+.3f}" for bits in difference]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    add_option(parser)
    args = parser.parse_args()
    rows = Record(
        args.json, "bytes", "a: MB, nats per token", "b: MB, nats per token", "break-even tokens",
        "shorter below", "shorter above", "a - b just below, bits", "a - b just above, bits",
    )  # fmt: skip
    source = load(MODEL)
    ids = source.tokenizer.encode(read_text(args.text))
    texts = chunk(ids, CONTEXT, CHUNKS), chunk(ids[-CHUNKS * CONTEXT :], CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), source, texts)
    for where, place in enumerate(("in memory", "on disk")):
        for one, other in itertools.combinations(found, 2):
            a, b = found[one][where], found[other][where]
            at, names = break_even(a, b), {"a": one, "b": other, "neither": "neither"}
            finite = math.isfinite(at.tokens)
            crossed = check(f"{one}, {other}", a, b, at) if finite else ["", ""]
            cells = [f"{n}: {c.bits / 8e6:.2f}, {c.nats_per_token:.4f}"
                     for n, c in ((one, a), (other, b))]  # fmt: skip
            tokens = f"{at.tokens:,.1f}" if finite else "none"
            rows.add(place, *cells, tokens, names[at.below], names[at.above], *crossed)
            print(rows.rows[-1], flush=True)


if __name__ == "__main__":
    main()
