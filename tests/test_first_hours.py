"""The first hours of six people, by scripts that use only what README and help say.

Two more are elsewhere: parts of one's own beside GPTQ at equal bits in `tests/test_examples.py`,
and the wheel in a fresh environment, with a compiler and without, in `tests/test_installed.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "first_hours"

pytestmark = pytest.mark.slow


def run(*command, **options):
    """What a command prints, in a process of its own."""
    quiet = {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=True,
        env=os.environ | quiet, **options,
    ).stdout  # fmt: skip


def test_an_nnx_model_packed_saved_and_served_by_another_process(tmp_path):
    made = run(SCRIPTS / "nnx_model.py", "make", tmp_path)
    found = re.findall(r"(\w+): error ([\d.]+), ([\d.]+) bits per weight", made)
    four, eight = ((float(e), float(b)) for _, e, b in found)
    assert four[0] < 0.15 and four[1] < 6.1  # 4.6 bits, but for a convolution of 8.8
    assert eight[0] < 0.02 and eight[1] < 9
    assert "one call for 3" in made and "conv_general_dilated  materialised" in made
    served = run(SCRIPTS / "nnx_model.py", "serve", tmp_path)
    assert "four: served True\neight: served True\n" in served
    assert "wrap the function that uses it" in served


def test_a_linen_train_state_at_two_bits():
    out = run(SCRIPTS / "linen_qat.py")
    losses = [float(n) for n in re.findall(r"step \d+: ([\d.]+) nats", out)]
    assert losses[-1] < 0.1 * losses[0]
    latent, packed = re.findall(r"(?:latent|packed): ([\d.]+)", out)
    assert latent == packed and "2.250 bits per weight" in out


def test_the_shapes_of_llama_3_8b_on_v5e():
    out = run(SCRIPTS / "llama_shapes.py")
    one, eight = (float(n) for n in re.findall(r"at least ([\d.]+) ms", out))
    # 3.77 GB of layers at 4.31 bits, 2.10 GB of head in float32, at 819 GB/s; one row of the table
    assert one == pytest.approx(1e3 * (3.7633e9 + 2.1013e9) / 819e9, rel=2e-3)
    assert eight == pytest.approx(one / 8, rel=1e-3)
    assert "which fits" in out and "does not fit" not in out
    assert out.count("tpu kernel") == 7 and "86.9% quantized" in out


@pytest.mark.model
def test_smollm2_quantized_compared_and_talked_with(tmp_path):
    command = "-m", "jaxquant_models"
    run(
        *command,
        "quantize",
        "smollm2-135m",
        "--method",
        "rtn",
        "--bits",
        8,
        "--out",
        tmp_path / "q",
    )
    compared = json.loads(run(
        *command, "eval", tmp_path / "q", "--text", "builtin", "--chunks", 1,
        "--against", "smollm2-135m", "--json",
    ))  # fmt: skip
    assert compared["kl"] < 0.01 and compared["top1_agreement"] > 0.95
    assert compared["peak_memory_bytes"] > compared["bytes_in_memory"] > 1e8
    answer = run(
        *command, "chat", tmp_path / "q", "--max-tokens", 16,
        input="What is the capital of France?\n",
    )  # fmt: skip
    assert "Paris" in answer
