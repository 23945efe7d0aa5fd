"""The command `jaxquant analyze`."""

import json
import os
import shlex

import click

from jaxquant_models.cli.console import Bars, emit, usage_errors
from jaxquant_models.cli.report_output import DATA, PAGE, ReportOutput
from jaxquant_models.readers.text import BUILTIN
from jaxquant_models.report import page
from jaxquant_models.runs.analysis.analyze import Analyzed, analyze
from jaxquant_models.runs.analysis.request import EFFORTS, AnalysisRequest
from jaxquant_models.runs.analysis.subjects import load_subjects
from jaxquant_models.schemas.report import Report

RECIPE = "--recipe"  # the option whose file lies in the folder of the report


@click.command("analyze")
@click.argument("model")
@click.option(
    "--against",
    default=None,
    metavar="MODEL",
    help="The float model that MODEL was quantized from. The report then says how far MODEL is "
    "from it, and which recipe would be nearer at equal bytes.",
)
@click.option(
    "--text",
    default=BUILTIN,
    show_default=True,
    help="Text on which models are compared: a FILE, or builtin (the half of Python's help topics "
    "that eval scores). Quantized versions are calibrated on the other half.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder to write the report to.")
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    default="default",
    show_default=True,
    help="How many quantized versions are made, and how much text they are compared on.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=AnalysisRequest.context,
    show_default=True,
    help="Number of tokens in the cache that the roofline assumes, at most those of MODEL.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing report in the --out folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one line of JSON.")
def analyze_command(
    model: str,
    against: str | None,
    text: str,
    out: str,
    effort: str,
    context: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Report what MODEL is, how it can be quantized, what bounds it, and what to do.

    MODEL is the name smollm2-135m, a .gguf file, a Hugging Face model folder, or a checkpoint
    written by jaxquant. The folder --out gets report.html, which any browser shows without a
    network, report.json, and the recipes that the advised commands name. A float MODEL is quantized
    in several ways, and a quantized one compared with the float model of --against. To resume an
    interrupted run, repeat the same command; the result is that of an uninterrupted run, apart from
    times and the rounding errors of sums.
    """
    with usage_errors():
        page.check()  # before anything is computed
        output = ReportOutput(out, overwrite)
        request = AnalysisRequest(model, against, text, effort, context)  # type: ignore[arg-type]
    output.hold()
    subjects = load_subjects(request)
    finished = output.begin(subjects.fingerprint())
    found = _placed(analyze(subjects, finished, Bars()), out)
    output.write_files(_files(found))
    _show(found.report, out, as_json)


def _placed(found: Analyzed, out: str) -> Analyzed:
    """Return the result with the folder of the recipes in its commands."""
    folder = shlex.quote(os.path.abspath(out))

    def at(command: str) -> str:
        return command.replace(f"{RECIPE} {{out}}/", f"{RECIPE} {folder}/")

    report = found.report
    frontier = report.frontier
    if frontier is not None:
        points = [p.model_copy(update={"command": at(p.command)}) for p in frontier.points]
        frontier = frontier.model_copy(update={"points": points})
    advice = [a.model_copy(update={"command": at(a.command)}) for a in report.advice]
    update = {"frontier": frontier, "advice": advice}
    return found._replace(report=report.model_copy(update=update))


def _files(found: Analyzed) -> dict[str, str]:
    """Return the contents of the files, the report's checked against its schema."""
    data = json.dumps(found.report.model_dump(mode="json"), allow_nan=False, indent=1)
    Report.model_validate_json(data)
    recipes = {name: json.dumps(recipe) for name, recipe in found.recipes.items()}
    return {PAGE: page.render(found.report), DATA: data, **recipes}


def _show(report: Report, out: str, as_json: bool) -> None:
    """Print the report, or its findings and its advice."""
    if as_json:
        emit(report.model_dump(mode="json"), True)
        return
    click.echo("\n".join(f"- {text}" for text in report.findings))
    for one in report.advice:
        click.echo(f"\n{one.reason}\n  {one.command}")
    for note in report.notes:
        click.echo(f"\nnote: {note}")
    click.echo(f"\nout: {out}")
