"""The command `jaxquant quantize`."""

import time
from typing import Any

import click

import jaxquant as jq
from jaxquant import storage
from jaxquant_models.cli.console import Bars, emit, line, usage_errors
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.quantize_options import quantization_options
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.runs.quantization_setup import set_up


@click.command()
@click.argument("model")
@quantization_options
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint in the --out directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def quantize(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL and write a checkpoint.

    MODEL is the name smollm2-135m, a .gguf file, or a Hugging Face model folder; supported
    architectures are Llama, Mistral, Qwen2 and Qwen3. Unless --recipe is given, only the matrices
    of the layers are quantized, not the embedding, output matrix, norms and biases. To resume an
    interrupted run, repeat the same command; the result is the same as that of an uninterrupted
    run.
    """
    with usage_errors():
        output = Output(out, overwrite, lossless=options["lossless"])
        request = request_of(**options)
    output.hold()
    start = time.monotonic()
    job = set_up(request, model, output.begin, Bars())
    result = job.run()
    output.publish(result.model, result.recipe, result.layers)
    params = storage.outline(out)
    size = jq.size(params)
    line(str(size))
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(params),
        "bits_over_all_weights": size.bits_per_weight,
        "bytes": storage.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)
