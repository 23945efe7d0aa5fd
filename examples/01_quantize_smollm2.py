"""Quantize SmolLM2-135M by four methods; measure them; write a little.

Run: make demo. Prints bits per weight (side information counted), megabytes on disk, perplexity on
CPython's help topics (the half that calibration did not see), and how far each model strays from
the unquantized one; then a continuation by the best 4-bit model.
"""

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant import storage
from jaxquant.evaluation import chunk, evaluate
from jaxquant_models import load
from jaxquant_models.cli.console import bar
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import builtin_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.quantization import plan_model, quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import first_tokens, token_sequences

METHODS = {
    "rtn 4 bits": jq.rtn(bits=4, group_size=64),
    "gptq 4 bits": jq.gptq(bits=4, group_size=64),
    "rtn 3 bits": jq.rtn(bits=3, group_size=64),
    "gptq 3 bits": jq.gptq(bits=3, group_size=64),
}
CALIBRATION_TOKENS, CHUNKS, CONTEXT = 8192, 6, 512
PROMPT = "The capital of France is"


def main() -> None:
    model = load("smollm2-135m")
    calibration, evaluation = builtin_text()
    chunks = chunk(model.tokenizer.encode(evaluation), CONTEXT, CHUNKS)
    start = time.monotonic()
    sequences = first_tokens(token_sequences(model, calibration, CONTEXT), CALIBRATION_TOKENS)
    with bar("calibrating", len(sequences)) as step:
        stats = calibrate_model(model, sequences, progress=step)
    calibrated = time.monotonic() - start

    table = Table(
        "method", "bits/weight", "MB on disk", "perplexity", "KL (nats)", "top-1", "seconds",
        title="SmolLM2-135M, CPython help topics",
    )  # fmt: skip
    with bar("unquantized", CHUNKS) as step:
        base = evaluate(model.apply_fn, model.params, chunks, progress=step)
    table.add_row("unquantized", "32.000", "", f"{base.perplexity:.2f}", "0", "1", "")
    best: tuple[float, Model | None] = (float("inf"), None)
    with tempfile.TemporaryDirectory() as folder:
        for name, method in METHODS.items():
            recipe = recipe_of(method)
            start = time.monotonic()
            with bar(f"{name}, quantizing", plan_model(model, recipe).matrices) as step:
                made = quantize_model(model, recipe, stats, progress=step)
            seconds = time.monotonic() - start
            seconds += calibrated if method.needs_gram else 0.0
            out = Path(folder) / name.replace(" ", "-")
            save_model(out, made, recipe)
            loaded = load(out)
            with bar(f"{name}, evaluating", CHUNKS) as step:
                result = evaluate(
                    jq.quantized(loaded.apply_fn),
                    loaded.params,
                    chunks,
                    against=(model.apply_fn, model.params),
                    progress=step,
                )
            table.add_row(
                name,
                f"{jq.bits_per_weight(loaded.params):.3f}",
                f"{storage.nbytes(out) / 1e6:.1f}",
                f"{result.perplexity:.2f}",
                f"{result.kl:.4f}",
                f"{result.top1_agreement:.3f}",
                f"{seconds:.0f}",
            )
            if method.format.bits == 4 and result.perplexity < best[0]:
                best = (result.perplexity, loaded)
    Console(width=100).print(table)
    print("seconds include the calibration where a method uses it")
    _, loaded = best
    if loaded is not None:
        ids = loaded.tokenizer.encode(PROMPT)
        run = jq.quantized(loaded.apply_cached)
        new = generate(run, loaded.params, loaded.config, ids, 40, cache_dtype=jnp.float32)
        print(f"\nbest 4-bit model: {PROMPT}{loaded.tokenizer.decode(new)}")
    print(f"\n{jax.devices()[0].device_kind}, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
