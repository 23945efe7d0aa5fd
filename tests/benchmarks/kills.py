"""`kill -9` at random moments of `jaxquant quantize`, fresh and with `--overwrite`.

    python -m tests.benchmarks.kills [--count 20] [--seed 0] [--place build/kills]

After each kill the same command is run again. It must end with the very arrays of a run that was
not killed, and the folder that the output is in must hold nothing else. What is there between the
kill and the rerun must be nothing, or with `--overwrite` what was there before, or the new one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from jaxquant import storage
from jaxquant.storage import checkpoint
from jaxquant_models.cli import commands
from tests.support.killed import child
from tests.support.tiny_llama import BASE, random_tensors, write_folder

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def command(place, out, overwrite):
    """What is killed: statistics, error feedback, one file for each matrix and a checkpoint."""
    options = ["--method", "gptq", "--group-size", "8", "--calibration", place / "text.txt"]
    options += ["--calibration-tokens", "512", "--weighting", "uniform"]
    words = ["quantize", place / "model", *options, "--out", out, *["--overwrite"] * overwrite]
    return [str(word) for word in words]


def digest_of(out):
    """Of a checkpoint's arrays; None where there is none."""
    if not storage.is_checkpoint(out):
        return None
    total = hashlib.sha256()
    for a in jax.tree.leaves(checkpoint.load(out)):
        total.update(np.asarray(a).tobytes())
    return total.hexdigest()


def asked(place, out):
    """`digest_of`, in a process of its own."""
    said = place / "said"
    assert child(lambda: said.write_text(json.dumps(digest_of(out)))) == 0
    return json.loads(said.read_text())


def quiet(arguments):
    """The command, its output thrown away."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    commands.main(arguments)


def main():
    """One line for every kill; any difference is an error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    place = Path(options.place or tempfile.mkdtemp(prefix="kills-")).absolute()
    place.mkdir(parents=True, exist_ok=True)
    write_folder(place / "model", BASE | {"max_position_embeddings": 1024}, random_tensors(BASE))
    (place / "text.txt").write_text(TEXT)
    draw = random.Random(options.seed)
    whole = place / "whole" / "out"
    run = lambda out, over, after=None: child(lambda: quiet(command(place, out, over)), after=after)
    assert run(whole, True) == 0  # compiles
    start = time.monotonic()
    assert run(whole, True) == 0
    took, right = time.monotonic() - start, asked(place, whole)
    print(f"{took:.1f} s uninterrupted", flush=True)
    for over in (False, True):
        for i in range(options.count):
            folder = place / f"{'overwrite' if over else 'fresh'}-{i}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            out, before = folder / "out", None
            if over:
                assert child(lambda o=out: checkpoint.save(o, {"a": np.ones(3)})) == 0
                before = asked(place, out)
            moment = draw.uniform(0, took)
            killed = run(out, over, moment)
            left, between = sorted(os.listdir(folder)), asked(place, out)
            assert between in (before, right), f"kill {i}: {out} is neither the old nor the new"
            status = run(out, over)
            done = left == ["out"] and between == right  # it was over; to do it again is refused
            assert status == (2 if done and not over else 0), f"kill {i}: the rerun: {status}"
            assert asked(place, out) == right, f"kill {i}: other arrays"
            assert os.listdir(folder) == ["out"], os.listdir(folder)
            kind = "--overwrite" if over else "fresh"
            print(f"{kind:11} kill {i:2} at {moment:5.2f} s: {killed:3}, left {left}", flush=True)
            shutil.rmtree(folder)
    if options.place is None:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
