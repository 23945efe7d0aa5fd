"""Every example runs."""

import re
import runpy
from pathlib import Path

import pytest

import jaxquant as jq

ROOT = Path(__file__).parents[1]
# What makes an example of minutes one of seconds; the path through the code is the same.
SMALLER = {
    "01_quantize_smollm2.py": {
        "CALIBRATION_TOKENS": 512, "CHUNKS": 1, "METHODS": {"gptq 4 bits": jq.gptq()},
    }
}  # fmt: skip


@pytest.mark.model
@pytest.mark.slow
def test_the_demo(capsys):
    name = "01_quantize_smollm2.py"
    main = runpy.run_path(str(ROOT / "examples" / name))["main"]
    main.__globals__.update(SMALLER[name])
    main()
    out = capsys.readouterr().out
    assert out.count("gptq 4 bits") == 1
    assert "best 4-bit model: The capital of France is" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_qat_optax.py", "03_qat_nnx.py"])
def test_a_loop_that_trains(name, capsys):
    runpy.run_path(str(ROOT / "examples" / name))
    out = capsys.readouterr().out
    losses = [float(n) for n in re.findall(r"step \d+: ([\d.]+) nats", out)]
    assert losses[-1] < 0.5 * losses[0]
    latent, packed = re.findall(r"(?:latent|packed): ([\d.]+)", out)
    assert latent == packed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["05_qlora_optax.py", "06_qalora_nnx.py"])
def test_a_loop_that_trains_adapters(name, capsys):
    file = ROOT / "examples" / name
    assert len(file.read_text().splitlines()) < 60
    runpy.run_path(str(file))
    out = capsys.readouterr().out
    before, adapted, merged = (
        float(re.search(rf"{word}: ([\d.]+)", out)[1]) for word in ("before", "adapted", "merged")
    )
    assert adapted < before - 0.5
    exact = name == "06_qalora_nnx.py"
    assert merged == adapted if exact else 0 < abs(merged - adapted) < 0.05


def test_parts_of_ones_own(capsys):
    runpy.run_path(str(ROOT / "examples" / "04_custom_parts.py"))
    rows = re.findall(r"(.+), (\w+): ([\d.]+) bits, error ([\d.]+)", capsys.readouterr().out)
    error = {(rounder, form): float(lost) for rounder, form, _, lost in rows}
    assert {bits for _, _, bits, _ in rows} == {"4.0625"}
    assert error["my rounder", "Integer"] < 1.1 * error["gptq", "Integer"]
    assert error["my rounder", "Logarithmic"] < error["gptq", "Logarithmic"]
    assert error["gptq", "Logarithmic"] < 0.5 * error["gptq", "Integer"]
