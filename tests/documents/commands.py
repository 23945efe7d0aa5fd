"""Documented shell commands, checked without being run.

A command is a line of an "sh" block, or code in a sentence that begins like one. It may begin with
settings of the environment and end with a comment. Words in capitals (TEXT, DIR, MODEL) stand for
what the reader puts there.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

from jaxquant_models.cli.commands import cli

from .pages import ROOT

TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SETTING = re.compile(r"[A-Z_]+=\S*")
BEGINS = re.compile(r"(?:[A-Z_]+=\S* )*(?:jaxquant|make|python|pip) \S")


def lines(block: str) -> Iterator[str]:
    """The commands of a block: continued lines joined, comments and empty lines left out."""
    for line in block.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def check(line: str, *, whole: bool = True) -> None:
    """Check that a command is there and that it has these options.

    Args:
      line: the command.
      whole: whether it must be complete; in a sentence it may lack required options.
    Raises:
      ValueError: it is no command that a reader could type.
    """
    words = shlex.split(line, comments=True)
    while SETTING.fullmatch(words[0]):
        words = words[1:]
    name, *rest = words
    checks = {"jaxquant": _jaxquant, "make": _make, "python": _python, "pip": _pip, "cd": _cd}
    if name not in checks:
        raise ValueError(f"{line!r}: no rule says what {name!r} is; see {__name__}")
    checks[name](rest, whole)


def _jaxquant(words: list[str], whole: bool) -> None:
    """Parse the words as the command does; in a sentence, look the options up."""
    name, *rest = words
    if name.startswith("-"):
        return _known([name], cli)
    if name not in cli.commands:
        raise ValueError(f"jaxquant has no command {name!r}")
    command = cli.commands[name]
    if not whole:
        return _known([w for w in rest if w.startswith("--")], command)
    try:
        command.make_context(name, rest)
    except click.ClickException as error:
        raise ValueError(f"jaxquant {name}: {error.format_message()}") from None
    return None


def _known(options: list[str], command: click.Command) -> None:
    params = command.get_params(click.Context(command))
    known = {name for p in params for name in (*p.opts, *p.secondary_opts)}
    if unknown := {o.partition("=")[0] for o in options} - known:
        raise ValueError(f"{command.name} has no option {sorted(unknown)}")


def _make(words: list[str], whole: bool) -> None:
    if unknown := {w for w in words if not SETTING.fullmatch(w)} - TARGETS:
        raise ValueError(f"the Makefile has no target {sorted(unknown)}")


def _python(words: list[str], whole: bool) -> None:
    """A module or a file of this repository whose text names every option."""
    if words[:2] == ["-m", "pytest"]:
        files = [w.partition("::")[0] for w in words[2:] if not w.startswith("-")]
        if missing := [f for f in files if not (ROOT / f).exists()]:
            raise ValueError(f"there is no {missing}")
        return
    first, *rest = words[1:] if words[0] == "-m" else words
    path = first if words[0] != "-m" else f"{first.replace('.', '/')}.py"
    file = next((f for f in (ROOT / path, ROOT / path[:-3] / "__main__.py") if f.exists()), None)
    if file is None:
        raise ValueError(f"there is no {path}")
    text = file.read_text()
    options = (w.partition("=")[0] for w in rest if w.startswith("--"))
    if unknown := [o for o in options if o not in text and not _shared(o, text)]:
        raise ValueError(f"{path} has no option {unknown}")


def _shared(option: str, text: str) -> bool:
    """Whether an option is the one that `tests.benchmarks.record` adds."""
    return option == "--json" and "record" in text


def _pip(words: list[str], whole: bool) -> None:
    if words[0] != "install":
        raise ValueError(f"pip {words[0]} is not documented here")
    for word in words[1:]:
        asked = re.fullmatch(r"\.\[([\w,]+)\]", word)
        if asked and (unknown := set(asked[1].split(",")) - EXTRAS.keys()):
            raise ValueError(f"pyproject.toml has no extra {sorted(unknown)}")


def _cd(words: list[str], whole: bool) -> None:
    if not Path(ROOT / words[0]).is_dir() and words != ["jaxquant"]:
        raise ValueError(f"no folder {words[0]!r}")
