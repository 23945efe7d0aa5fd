"""The command `jaxquant plan`."""

from typing import Any

import click

from jaxquant_models.cli.console import emit, line, usage_errors
from jaxquant_models.cli.pod_options import check_without_topology, pod_options, pod_request
from jaxquant_models.cli.quantize_options import quantization_options
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.readers.room import float_bytes
from jaxquant_models.runs.needs import needs_of
from jaxquant_models.runs.planning import expected, served_bytes
from jaxquant_models.runs.pod_plan import lines, plan_pod, report_of
from jaxquant_models.runs.quantization_setup import plan_of, source_for
from jaxquant_models.runs.seconds import MACHINE, expected_seconds

POD = ("topology", "mesh", "batch", "context", "train", "prefill")


@click.command()
@click.argument("model")
@quantization_options
@pod_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Show what quantizing MODEL would need and produce.

    The options are those of jaxquant quantize. The report gives the exact bytes and bits of every
    tensor, the expected peak memory and time of the run, and the bytes of memory that the quantized
    model takes when it is served. The time was measured on another machine, which the report names.
    Only the headers of .gguf files and Hugging Face folders are read.

    With --topology, the report is about running or training MODEL on a slice of a TPU pod: the
    bytes per device, whether they fit in its memory, the collectives between the devices, a lower
    bound on the time of a step, and the smallest slices on which the model fits.
    """
    if options["topology"] is not None:
        _of_pod(model, as_json, **options)
        return
    pod = {name: options.pop(name) for name in POD}
    with usage_errors():
        check_without_topology(**pod)
    with usage_errors():
        request = request_of(**options)
    outline = source_for(request, model, line).outline
    found = plan_of(request, outline)
    if request.recipe is None:
        line(
            "--target-bits chooses methods by measuring MODEL; this report assumes the methods "
            "whose bits are nearest to the target"
        )
    if not as_json:
        click.echo(str(found))
    needs = needs_of(request)
    takes = expected(outline, found, needs, request)
    total = sum(entry.bytes for entry in found.entries)
    if request.heals:
        added = sum(e.count * e.method.healing_bytes(*e.matrix[-2:]) for e in found.weights)
        line(f"healing may add up to {added:,} bytes, which this report does not include")
    report: dict[str, Any] = {
        "bits_per_weight": found.bits_per_weight,
        "bytes": total,
        "bytes_served": served_bytes(found),
        "peak_memory": takes.peak,
        "peak_stage": max(takes.stages, key=lambda stage: stage.bytes).name,
        "bound": takes.bound,
        "seconds": expected_seconds(found, needs, request),
        "seconds_on": MACHINE,
        "methods": "given" if request.recipe is not None else "nearest to the target",
        "hidden_states": takes.states,
        "hidden_states_in": "files" if takes.in_files else "memory",
    }
    if request.whole:
        # Training holds, in float32, the weights, the model, its gradients and two moments of Adam.
        floats, copies = float_bytes(outline), 5 if request.training else 1
        report |= {"whole_model": ", ".join(request.whole), "float_bytes": floats}
        report |= {"peak_memory": copies * floats + takes.peak, "peak_stage": "the whole model"}
    emit(report, as_json)


def _of_pod(model: str, as_json: bool, **options: Any) -> None:
    with usage_errors():
        found = plan_pod(pod_request(model, **options))
    if as_json:
        emit(report_of(found), as_json)
    else:
        click.echo("\n".join(lines(found)))
