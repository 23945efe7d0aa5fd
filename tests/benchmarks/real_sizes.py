"""Time and peak memory of quantizing models of real sizes, layer by layer, under a hard limit.

Run: python -m tests.benchmarks.real_sizes DIR [--sizes 135m 1.1b 7b] [--methods rtn gptq]
[--tokens 2048] [--kills 2] [--json FILE]. Models with random weights are written to DIR first
(synthetic_model.py; 7b takes 13.5 GB). Each run is a process whose resident set, files that are
mapped included, is read 50 times a second; beyond the limit of its size it is killed and counts as
failed. With --kills N it is killed N times (`kill -9`) on the way, and resumed by the same command.
Then the checkpoint generates 8 tokens and is scored on one chunk, under limits too. The plan's peak
memory and bytes stand beside those measured, and a line is fitted to seconds over weights.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxquant import storage
from jaxquant.core.tree import tree_bytes
from tests.benchmarks.record import Record, add_option
from tests.benchmarks.synthetic_model import SIZES, write

# Limits of resident memory in bytes: of quantize, and of generate and eval.
LIMITS = {"135m": (2e9, 3e9), "1.1b": (2.5e9, 3e9), "7b": (5e9, 6e9)}


class LimitError(RuntimeError):
    """A process took more memory than it may."""


def resident(process: int) -> tuple[int, int]:
    """The resident bytes of a process: all, and without the pages of mapped files."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    size = lambda name: 1024 * int(found.get(name, "0").split()[0])
    return size("VmRSS"), size("RssAnon")


def watched(arguments, limit, until=None):
    """Run the command; its output, seconds and peaks of memory. It is killed when `until()`."""
    command = [sys.executable, "-m", "jaxquant_models", *map(str, arguments)]
    start, peak, anonymous = time.monotonic(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            all_pages, own = resident(running.pid)
            peak, anonymous = max(peak, all_pages), max(anonymous, own)
            if all_pages > limit:
                running.kill()
                raise LimitError(f"{' '.join(command)} took {all_pages:,} bytes")
            if until is not None and until():
                running.kill()
            time.sleep(0.02)
        out = running.stdout.read()
    if running.returncode not in (0, -9):
        raise RuntimeError(f"{' '.join(command)} failed")
    return out, time.monotonic() - start, peak, anonymous


def quantized(model, out, method, tokens, kills, limit):
    """Quantize, killed so many times; seconds and peaks of all runs together."""
    options = ["--method", method, "--bits", 4, "--calibration-tokens", tokens, "--json"]
    layers = len(list(model.glob("model-*.safetensors"))) - 1
    done = out.with_name(f"{out.name}.partial") / "layers.parts"
    seconds, peaks, anonymous = 0.0, [], []
    for n in range(kills + 1):
        enough = (n + 1) * layers // (kills + 1)
        at = (lambda count=enough: _count(done) >= count) if n < kills else None
        _, took, peak, own = watched(["quantize", model, *options, "--out", out], limit, at)
        seconds, peaks, anonymous = seconds + took, [*peaks, peak], [*anonymous, own]
    plan, _, _, _ = watched(["plan", model, *options], limit)
    return seconds, max(peaks), max(anonymous), json.loads(plan)


def _count(folder):
    """The number of layers that are finished."""
    return sum(not p.name.startswith(".") for p in folder.iterdir()) if folder.exists() else 0


def one(size, method, folder, tokens, kills, record):
    """Measure one size with one method, and add a row."""
    model, out = folder / size, folder / f"{size}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    limit, serving = LIMITS[size]
    seconds, peak, own, plan = quantized(model, out, method, tokens, kills, limit)
    outline = storage.outline(out)
    held = tree_bytes(outline)
    generate = ["generate", out, "--prompt", "The capital", "--max-tokens", 8, "--json"]
    _, _, generating, _ = watched(generate, serving)
    score = ["eval", out, "--text", "builtin", "--chunks", 1, "--json"]
    _, _, scoring, _ = watched(score, serving)
    gigabytes = lambda size: f"{size / 1e9:.2f}"
    record.add(
        size, method, f"{seconds:.0f}", f"{plan['seconds'] or np.nan:.0f}", gigabytes(peak),
        gigabytes(own), gigabytes(plan["peak_memory"]), gigabytes(plan["bound"]),
        "exact" if held == plan["bytes"] else f"{held - plan['bytes']:+,d} bytes",
        gigabytes(generating), gigabytes(scoring),
    )  # fmt: skip
    print(record.rows[-1], flush=True)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kills", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    record = Record(
        args.json, "size", "method", "seconds", "planned s", "peak GB", "without mapped files",
        "planned GB", "bound GB", "planned bytes", "generate GB", "eval GB",
    )  # fmt: skip
    for size in args.sizes:
        write(size, args.folder / size)
    for method in args.methods:
        found = [
            one(size, method, args.folder, args.tokens, args.kills, record) for size in args.sizes
        ]
        weights = [SIZES[size].weights for size in args.sizes]
        if len(found) > 1:
            slope, start = np.polyfit(weights, found, 1)
            print(f"{method}: {start:.0f} s + {slope * 1e9:.1f} s per billion weights", flush=True)


if __name__ == "__main__":
    main()
