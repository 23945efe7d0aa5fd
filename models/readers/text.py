"""Texts for calibration and evaluation: a file, or texts that every CPython includes."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

BUILTIN, DOCSTRINGS = "builtin", "docstrings"
SHORTEST = 40  # minimum number of characters of a docstring


def builtin_text() -> tuple[str, str]:
    """Return (calibration, evaluation), two disjoint halves of CPython's help topics.

    >>> calibration, evaluation = builtin_text()
    >>> len(calibration) > 100_000 and len(evaluation) > 100_000
    True
    """
    names = sorted(topics)
    half, total, seen = 0, sum(len(t) for t in topics.values()), 0
    while seen < total / 2:
        seen += len(topics[names[half]])
        half += 1
    return "\n".join(topics[n] for n in names[:half]), "\n".join(topics[n] for n in names[half:])


def docstrings() -> str:
    """Return the help topics of this Python and the docstrings of its standard library.

    About 2 MB of English; the text differs between versions of Python.

    >>> text = docstrings()
    >>> len(text) > 1_000_000
    True
    """
    root = Path(sysconfig.get_path("stdlib"))
    of_others = ("site-packages", "test", "tests", "idle_test")
    files = sorted(p for p in root.rglob("*.py") if not set(p.parts) & set(of_others))
    found = dict.fromkeys(text for file in files for text in _docstrings(file))  # no duplicates
    return "\n\n".join([*topics.values(), *found])


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some files are invalid on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST:
                yield text


def read_text(spec: str, *, calibration: bool = False) -> str:
    """Return the text that `spec` names.

    Args:
      spec: "builtin" for the built-in text, "docstrings" for the standard library's docstrings, or
        the path of a UTF-8 file.
      calibration: whether "builtin" means its calibration half instead of its evaluation half.
    Raises:
      ValueError: the file does not exist, is not UTF-8, or is empty.
    """
    if spec == BUILTIN:
        return builtin_text()[0 if calibration else 1]
    if spec == DOCSTRINGS:
        return docstrings()
    try:
        # Line ends affect the tokens, so those of every system become "\n", as in text mode.
        text = Path(spec).read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec} is not UTF-8 text: byte {error.start} is invalid") from None
    except OSError as error:
        raise ValueError(f"cannot read {spec}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{spec} holds no text")
    return text
