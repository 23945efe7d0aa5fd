"""Texts to calibrate on and to score: a file, or the one every CPython carries."""

from pathlib import Path
from pydoc_data.topics import topics

BUILTIN = "builtin"


def builtin_text() -> tuple[str, str]:
    """(calibration, evaluation): disjoint halves of CPython's own help topics, split between two.

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


def read_text(spec: str, *, calibration: bool = False) -> str:
    """The text of "builtin" (its calibration or its evaluation half) or of a UTF-8 file.

    Raises:
      ValueError: no such file, not UTF-8, or empty.
    """
    if spec == BUILTIN:
        return builtin_text()[0 if calibration else 1]
    try:
        # Line ends of any system become "\n", as in a file opened as text: they are tokens.
        text = Path(spec).read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec} is not UTF-8 text: byte {error.start} is invalid") from None
    except OSError as error:
        raise ValueError(f"cannot read {spec}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{spec} holds no text")
    return text
