"""The command `jaxquant inspect`."""

import sys
from typing import NamedTuple

import click
import jax
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.core.tree import leaf_bytes
from jaxquant_models.architectures.hidden_states import FIRST_QUERY
from jaxquant_models.cli import entropy_report, outlier_report
from jaxquant_models.cli.console import bar, emit, line, usage_errors
from jaxquant_models.cli.sizes import sizes_of
from jaxquant_models.readers import registry
from jaxquant_models.readers.stored_tensors import stored_tensors
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.outliers import outliers_of
from jaxquant_models.runs.sequences import CONTEXT, token_sequences
from jaxquant_models.runs.serving import serving_model
from jaxquant_models.runs.stored_entropy import stored_entropy


class Row(NamedTuple):
    """The data shown about a tensor."""

    path: str
    shape: list[int]
    method: str
    format: str
    bits_per_weight: float
    bytes: int

    @staticmethod
    def of(path: str, w: jq.QTensor | jax.Array) -> "Row":
        """Return the row of a weight, packed or not.

        Args:
          path: path of the parameter.
          w: the weight.
        """
        if isinstance(w, jq.QTensor):
            method, kind = w.method, repr(w.format)
        else:
            method, kind = "none", str(w.dtype)
        return Row(path, list(w.shape), method, kind, 8 * leaf_bytes(w) / w.size, leaf_bytes(w))


@click.command()
@click.argument("model")
@click.option(
    "--outliers",
    "of_outliers",
    is_flag=True,
    help="Instead of the tensors, show the outliers among the activations of MODEL on --text: the "
    "channels and tokens in which they occur, and the tokens that are attention sinks.",
)
@click.option(
    "--text",
    default=None,
    help="Text for --outliers, which requires it: a FILE, or builtin (the half of Python's help "
    "topics that eval scores).",
)
@click.option(
    "--tokens",
    type=click.IntRange(FIRST_QUERY + 1),
    default=None,
    help="With --outliers, number of tokens of --text to use. The default is 512.",
)
@click.option(
    "--plot",
    default=None,
    metavar="FILE",
    help="With --outliers, save a heat map of them to FILE (.png, .svg or .pdf).",
)
@click.option(
    "--entropy",
    "of_entropy",
    is_flag=True,
    help="Instead of the sizes, show the entropies of each tensor as it is stored (of sign, "
    "exponent and mantissa, or of its codes) and the bits per weight of lossless codes. MODEL may "
    "also be minilm, a .safetensors file or any folder of these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def inspect(
    model: str,
    of_outliers: bool,
    text: str | None,
    tokens: int | None,
    plot: str | None,
    of_entropy: bool,
    as_json: bool,
) -> None:
    """Show tensor sizes of MODEL, outliers in its activations, or the entropy of its weights.

    MODEL is the name smollm2-135m, a .gguf file, a Hugging Face model folder, or a checkpoint
    written by jaxquant. For each tensor the table shows its shape, quantization method, format,
    bits per weight and bytes.
    """
    with usage_errors():
        if of_entropy and of_outliers:
            raise ValueError("--entropy and --outliers are two reports; give one of them")
        if of_outliers and text is None:
            raise ValueError("--outliers needs a text: give --text FILE, or --text builtin")
        if not of_outliers and (text, tokens, plot) != (None, None, None):
            raise ValueError("--text, --tokens and --plot need --outliers; give it too")
        if plot is not None:
            outlier_report.check_plot(plot)
    if text is not None:
        _outliers(model, text, tokens or CONTEXT, plot, as_json)
    elif of_entropy:
        _entropy(model, as_json)
    else:
        _tensors(model, as_json)


def _tensors(model: str, as_json: bool) -> None:
    """Print the bytes and bits of every tensor, as stored."""
    params = registry.outline(model)
    rows = [Row.of(path, w) for path, w in jq.core.path_leaves(params)]
    sizes = sizes_of(params)
    if as_json:
        emit({**sizes, "tensors": [row._asdict() for row in rows]}, True)
        return
    table = Table("path", "shape", "method", "format", "bits/weight", "bytes")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        bits = f"{row.bits_per_weight:.3f}"
        table.add_row(row.path, shape, row.method, row.format, bits, f"{row.bytes:,}")
    _console().print(table)
    over = "quantized matrices" if any(row.method != "none" for row in rows) else "matrices"
    click.echo(
        f"{sizes['bytes']:,} bytes; {sizes['bits_per_weight']:.3f} bits per weight over the {over}"
    )
    click.echo(str(jq.size(params)))


def _outliers(model: str, text: str, tokens: int, plot: str | None, as_json: bool) -> None:
    """Print the activation outliers on the first tokens of a text."""
    content = read_text(text)
    source = serving_model(registry.load(model), line)
    found = outliers_of(source, token_sequences(source, content, tokens, 1)[0])
    if plot is not None:
        outlier_report.plot(found, plot)
    if as_json:
        emit(found.to_json(), True)
        return
    for part in (outlier_report.table(found), outlier_report.heat_map(found)):
        _console().print(part)
    click.echo("\n" + "\n".join(found.findings()))


def _entropy(model: str, as_json: bool) -> None:
    """Print the entropies of the tensors as stored."""
    tensors = stored_tensors(model)
    with bar("tensors", len(tensors)) as advance:
        found = stored_entropy(tensors, advance)
    if as_json:
        emit(found.to_json(), True)
        return
    console = _console()
    console.print(entropy_report.table(found, console.width))
    click.echo("\n".join(entropy_report.findings(found)))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)
