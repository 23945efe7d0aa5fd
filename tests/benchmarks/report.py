"""The page of results, tests/benchmarks/README.md, from the JSON files in tests/benchmarks/results.

Run: python -m tests.benchmarks.report, after a benchmark has written a file there with `--json`.
"""

import json
import math
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE = FOLDER / "README.md"
CURVE = "rate_quality"  # its points, which two sections show
BOUND = "layer_bound"  # the lower bound on the losses of the hard layer
# Every file of results by its section; `Record` says what is in a file.
SECTIONS = {
    "Quality of rounded weights": [
        "perplexity", "low_bits", "layer_curve", "layer_task", "layer_bound",
        "awq_minilm", "awq_smollm2", "description_length", "intrinsic_dimension",
    ],
    "Rounded activations and caches": ["activations", "rotations", "kv_cache"],
    "Limits": ["limits"],
    "Lossless storage": ["lossless_bits", "lossless_files", "float_planes"],
    "Training": ["qat", "zeroqat", "bitnet", "intrinsic_dimension_training"],
    "Fine-tuning of packed models": ["adapters", "qlora_memory"],
    "Selection of training data": ["entropy_law"],
    "Speed on CPUs": [
        "decode", "memory_wall", "llama_cpp", "cpu_matmul_avx2", "cpu_matmul_avx512",
        "data_parallel",
    ],
    "Time and memory": ["real_sizes", "quantization_time", "calibration_memory", "training_memory"],
    "Plans of pods": ["pods"],
    "Kernels, compile-only checks": ["kernels_tpu", "kernels_gpu"],
    "Agreement with other implementations": ["outliers"],
}  # fmt: skip
INTRODUCTION = """# Benchmarks and their results

This page is generated: `python -m tests.benchmarks.report` writes it from the JSON files in
[results](results), and a test compares the two. Every table names the command that reproduces it,
the machine as far as it was recorded, and the date and the commit with which it entered the
repository. Commands run from the root of a clone after `make model`, which installs the two models;
TEXT is the file of WikiText-2's test split in plain text, and without TEXT a benchmark uses
CPython's help topics, which every Python has. `make bench` runs all benchmarks but the longest.

Perplexities of SmolLM2-135M are comparable within a table; the protocols of two tables may differ.
The weights of the SmolLM2-135M that the benchmarks load are decoded from Q4_1 (4 bits in groups of
32), **which makes integer formats without a rotation look better than they would on the original
weights**, since their groups line up with those of Q4_1. Bits per weight count every stored byte:
codes, scales, zero points, codebooks, signs.

Tables of a layer's loss show a lower bound from rate-distortion theory, and how many bits above it
every entry is. Perplexities, cosines and scores of models have none: the rate-distortion function
of a model under such a measure is not known, and the losses of its layers were not recorded."""
CLOSING = """## To add a benchmark

A benchmark is a module in this folder with a `main` and a docstring that says what it measures and
how to run it. `add_option(parser)` of [record.py](record.py) gives it the option `--json FILE`;
call `add` of a `Record(args.json, "column", ...)` once for each row. Put the file into
[results](results), write its title and sentences by hand into the fields `title`, `about` and
`note`, and add its name to `SECTIONS` of [report.py](report.py). When a benchmark writes a file
that exists, it replaces the rows and keeps the sentences.

The files of the tables above hold the rows as this page shows them, some of them condensed from
what the benchmark prints; a new run replaces them with the rows that it prints."""


def load(name):
    """The fields of a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(columns, rows):
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(name):
    """The part of the page about one file."""
    found = load(name)
    if "points" in found:
        found |= {"model": model_curve, "layer": layer_curve}[found["points"]](load(CURVE))
    if "bound" in found:
        found |= with_bound(found)
    if wrong := [r for r in found["rows"] if len(r) != len(found["columns"])]:
        raise ValueError(f"{name}: rows of another length than the header: {wrong}")
    at = f", commit {found['commit']}" if "commit" in found else ""
    source = f"`{found['command']}`; {found['machine']}; {found['date']}{at}."
    parts = (
        f"### {found['title']}", found["about"], table(found["columns"], found["rows"]),
        f"Command: {source}", found["note"],
    )  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def model_curve(points):
    """Perplexities of the points of `rate_quality`, healed ones beside those that are not."""
    rows = []
    for name, p in points.items():
        if not name.startswith("model ") or name.endswith("healed") or "rate" not in p:
            continue
        healed = points.get(f"{name} healed")
        row = [p["family"], p["rate"], f"{p['bits']:.3f}, {p['perplexity']:.2f}"]
        rows.append([*row, *(_healing(healed) if healed else ("", ""))])
    columns = ["family", "rate", "bits, perplexity", "bits, perplexity healed", "healing"]
    in_order = sorted(rows, key=lambda row: row[:2])
    return {"columns": columns, "rows": [[r[0], f"{r[1]:g}", *r[2:]] for r in in_order]}


def _healing(p):
    run = p["run"]
    how = f"{run['steps']} steps of {run['batch_size']}, rate {run['learning_rate']:g}"
    on = "" if p.get("device", "cpu") == "cpu" else f", {p['device']}"
    return f"{p['bits']:.3f}, {p['perplexity']:.2f}", how + on


def layer_curve(points):
    """Losses of the points of `rate_quality` by family and rate."""
    found = [p for name, p in points.items() if name.startswith("layer ")]
    rates = sorted({p["rate"] for p in found})
    rows = []
    for family in dict.fromkeys(p["family"] for p in found):
        by_rate = {p["rate"]: f"{p['loss']:.3g} ({p['bits']:.3f}, {gap(p['bits'], p['loss'])})"
                   for p in found if p["family"] == family}  # fmt: skip
        rows.append([family, *(by_rate.get(rate, "") for rate in rates)])
    rows.append(["bound", *(f"{bound(rate):.3g} ({rate:.3f})" for rate in rates)])
    return {"columns": ["family", *(f"{rate:g}" for rate in rates)], "rows": rows}


def with_bound(found):
    """A table of bits and losses of the hard layer, with gaps and with the bound at its rates."""
    columns = [*found["columns"], "gap, bits"]
    bits, loss = map(columns.index, ("bits per weight", "loss"))
    rows = [[*row, gap(float(row[bits]), float(row[loss]))] for row in found["rows"]]
    for rate in found["bound"]:
        shown = {"method": "bound", "bits per weight": f"{rate:.3f}", "loss": f"{bound(rate):.6f}"}
        rows.append([shown.get(column, "") for column in columns])
    return {"columns": columns, "rows": rows}


def bound(bits):
    """The least loss of the hard layer at this rate, between the rates of its file."""
    curve = load(BOUND)["curve"]
    if not curve["bits"][0] <= bits <= curve["bits"][-1]:
        raise ValueError(f"the curve of {BOUND} does not reach {bits:g} bits")
    return math.exp(np.interp(bits, curve["bits"], np.log(curve["loss"])))


def gap(bits, loss):
    """The bits above the rate at which the bound has this loss, with two decimals and a sign."""
    curve = load(BOUND)["curve"]
    if not curve["loss"][-1] <= loss <= curve["loss"][0]:
        raise ValueError(f"the curve of {BOUND} does not reach the loss {loss:g}")
    least = np.interp(-math.log(loss), -np.log(curve["loss"]), curve["bits"])
    return f"{bits - least:+.2f}"


def page():
    """The whole page."""
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts += [f"## {title}", *map(section, names)]
    return "\n\n".join([*parts, CLOSING]) + "\n"


def main():
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
