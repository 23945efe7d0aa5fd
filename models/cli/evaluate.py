"""The command `jaxquant eval`."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.evaluation import check_sizes, evaluate
from jaxquant_models.cli.console import bar, emit, line, usage_errors
from jaxquant_models.cli.model_options import (
    activations_option,
    adapter_option,
    kv_format,
    kv_options,
    load_with,
    with_adapters,
)
from jaxquant_models.cli.sizes import kv_sizes, sizes_of
from jaxquant_models.cli.speed import scoring_speed
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Apply, Model
from jaxquant_models.readers.source import Source
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.measuring import Phase
from jaxquant_models.runs.scoring import Scored, layer_by_layer
from jaxquant_models.runs.sequences import token_sequences
from jaxquant_models.runs.serving import serving_model


@click.command("eval")
@click.argument("model")
@click.option(
    "--text",
    required=True,
    help="Text to score: a FILE, or builtin (half of Python's help topics; calibration uses the "
    "other half, but train-bitnet trains on both by default).",
)
@click.option(
    "--ctx",
    type=int,
    default=512,
    show_default=True,
    help="Number of tokens per chunk. Only the second half of each chunk is scored.",
)
@click.option(
    "--chunks",
    type=int,
    default=None,
    help="Number of chunks to score, from the beginning of the text. The default is all.",
)
@click.option(
    "--against",
    default=None,
    metavar="MODEL",
    help="Reference model. The report then includes the KL divergence between its predictions "
    "and those of MODEL, and the fraction of tokens for which both rank the same token first.",
)
@adapter_option
@activations_option
@kv_options
@click.option(
    "--strict/--no-strict",
    default=None,
    help="With --kv-bits, --strict (the default) quantizes all keys and values except those of "
    "--kv-sinks and --kv-window. With --no-strict, each token is predicted from the cache that "
    "generation would have at that point, in which fewer keys and values may be quantized, because "
    "generation quantizes only whole groups of --kv-group tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def evaluate_command(
    model: str,
    text: str,
    ctx: int,
    chunks: int | None,
    against: str | None,
    adapters: tuple[str, ...],
    activations: str | None,
    strict: bool | None,
    as_json: bool,
    **kv_cache: Any,
) -> None:
    """Print the perplexity of MODEL on a text.

    MODEL is the name smollm2-135m, a .gguf file, a Hugging Face model folder, or a checkpoint
    written by jaxquant. The report also gives the speed in tokens per second, which counts all
    tokens of the chunks, including those that are not scored; with --against, the time measured
    includes running both models. Of several adapters, each has a report of its own.
    """
    with usage_errors():
        check_sizes(ctx, chunks)  # before anything is loaded
        kv = kv_format(kv_cache)
        if kv is None and strict is not None:
            raise ValueError("--strict and --no-strict need --kv-bits; give both")
    content = read_text(text)
    apart = None if kv or activations or adapters else registry.too_large(model)
    students = _students(activations, model, adapters) if apart is None else [_apart(apart)]
    source = students[0].model
    sequences = token_sequences(source, content, ctx, chunks)
    with contextlib.ExitStack() as stack:
        scored = lambda source: _layer_by_layer(source, sequences, stack)
        teacher = None if against is None else _teacher(against, model, source, content, scored)
        logits = jq.quantized(
            source.apply_fn if kv is None else source.apply_kv(kv, strict is not False)
        )
        for about, sizes, student in students:
            phase = Phase(tokens=sequences.size)
            with phase.timed():
                fn, params = (logits, student.params) if apart is None else scored(apart)
                with bar("evaluating", len(sequences)) as step:
                    result = evaluate(fn, params, sequences, against=teacher, progress=step)
            report = {k: v for k, v in dataclasses.asdict(result).items() if v is not None}
            speed = scoring_speed(phase, student.params)
            emit({**about, **report, **sizes, **kv_sizes(kv, source.config), **speed}, as_json)


def _layer_by_layer(source: Source, sequences: np.ndarray, stack: contextlib.ExitStack) -> Scored:
    """Run a model that does not fit in memory on all sequences; files are removed in the end."""
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxquant-"))
    files = stack.enter_context(Folder(Path(place) / "states", {}))
    line(f"{source.outline.name} does not fit in memory, so its layers are read one by one")
    with bar("layers", source.outline.config.n_layers) as step:
        return layer_by_layer(source, sequences, files, step)


class _Student(NamedTuple):
    """A model to score: what the report says of its adapter, its sizes as stored, and itself."""

    about: dict[str, str]
    sizes: dict[str, float]
    model: Model


def _students(activations: str | None, spec: str, adapters: tuple[str, ...]) -> list[_Student]:
    """Return the model, or the model with each of the adapters, ready to serve."""
    found = with_adapters(load_with(activations, spec, widen=False), adapters)
    return [_Student(about, sizes_of(m.params), serving_model(m, line)) for about, m in found]


def _apart(source: Source) -> _Student:
    """Return a model whose layers are read one by one."""
    return _Student({}, sizes_of(source.outline.params), source.outline)


def _teacher(
    against: str, model: str, student: Model, content: str, scored: Callable[[Source], Scored]
) -> tuple[Apply, PyTree]:
    """Return the function and the parameters of the model to compare with."""
    apart = registry.too_large(against)
    teacher = registry.load(against) if apart is None else apart.outline
    some = content[:10_000]
    if teacher.tokenizer.encode(some) != student.tokenizer.encode(some):
        raise ValueError(f"{against} and {model} have different tokenizers; KL is undefined")
    if apart is not None:
        return scored(apart)
    return jq.quantized(teacher.apply_fn), serving_model(teacher, line).params
