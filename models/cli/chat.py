"""The command `jaxquant chat`."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from jaxquant_models.cli import interrupts
from jaxquant_models.cli.console import emit, line, usage_errors
from jaxquant_models.cli.model_options import (
    activations_option,
    kv_format,
    kv_options,
    load_with,
    sampling_options,
)
from jaxquant_models.cli.sizes import kv_sizes
from jaxquant_models.cli.speed import speed_line, speed_of
from jaxquant_models.runs.chat import Conversation
from jaxquant_models.runs.measuring import return_freed_memory
from jaxquant_models.runs.serving import serving_model


@click.command()
@click.argument("model")
@click.option(
    "--system",
    default="",
    help="System message. The default is the one in the chat template, if any.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum number of tokens in an answer.",
)
@sampling_options
@activations_option
@kv_options
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each answer.")
def chat(
    model: str,
    system: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    activations: str | None,
    as_json: bool,
    **kv_cache: Any,
) -> None:
    """Chat with MODEL; each answer takes the whole conversation into account.

    MODEL is the name smollm2-135m, a .gguf file, a Hugging Face model folder, or a checkpoint
    written by jaxquant; it must have a chat template. In a terminal, type messages at the ">"
    prompt; Ctrl-D ends the conversation. If standard input is not a terminal, each of its lines is
    a message. Answers are printed on standard output.
    """
    with usage_errors():
        kv = kv_format(kv_cache)
    interrupts.about(lambda: "the conversation is not saved")
    source = serving_model(load_with(activations, model), line)
    talk = Conversation(source, system, max_tokens, temperature, seed, kv)
    for message in _messages():
        answer = ""
        for piece in talk.ask(message):
            answer += piece
            if not as_json:
                click.echo(piece, nl=False)
        speed = speed_of(talk.session, source.params)
        if as_json:
            report = {"prompt": message, "text": answer, "tokens": talk.tokens}
            emit({**report, **kv_sizes(kv, source.config), **speed}, as_json)
        else:
            click.echo()
        return_freed_memory()
    if not as_json and talk.session.prefill.tokens:
        line(speed_line(speed_of(talk.session, source.params)))


def _messages() -> Iterator[str]:
    """Yield the messages of the user; empty lines are skipped."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            text = input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            if terminal:
                click.echo()
            return
        if text.strip():
            yield text.strip()
