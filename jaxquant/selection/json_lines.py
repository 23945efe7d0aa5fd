"""A JSON Lines file as a sequence whose items are read when they are asked for."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

BOM = b"\xef\xbb\xbf"  # which some editors write at the beginning of a UTF-8 file


class JsonLines(Sequence[Any]):
    """The values of a JSON Lines file, one per line; memory holds 16 bytes per line.

    Opening the file reads it once, line by line, and checks every line. Blank lines are skipped,
    and so is a byte order mark. The file must not change while it is in use.

    Args:
      path: the file.

    Attributes:
      path: the file.
      digest: SHA-256 of its bytes, in hexadecimal.

    Raises:
      ValueError: the file cannot be read, is empty, or a line is not UTF-8 or not JSON; the message
        gives the number of the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "pool.jsonl"
    ...     _ = file.write_text('{"text": "a"}\\n\\n{"text": "b"}\\n')
    ...     with JsonLines(file) as lines:
    ...         len(lines), lines[1], lines.line(0), lines.number(1)
    (2, {'text': 'b'}, b'{"text": "a"}', 3)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._index()
        except BaseException:
            self._file.close()
            raise

    def _index(self) -> None:
        """Check every line, and note where it begins."""
        starts, numbers, start, sha = array("q"), array("q"), 0, hashlib.sha256()
        for number, line in enumerate(self._lines(), 1):
            sha.update(line)
            if line.strip() and line.strip() != BOM:
                self._parsed(line, number)
                starts.append(start)
                numbers.append(number)
            start += len(line)
        if not starts:
            raise ValueError(f"{self.path} holds no items: expected one JSON value per line")
        self._starts, self._numbers = np.array(starts), np.array(numbers)
        self.digest = sha.hexdigest()

    def _lines(self) -> Iterator[bytes]:
        try:
            yield from self._file
        except OSError as error:  # a directory, for example
            raise ValueError(f"cannot read {self.path}: {error.strerror}") from None

    def _parsed(self, line: bytes, number: int) -> Any:
        where = f"{self.path}, line {number}"
        try:
            return json.loads(line.removeprefix(BOM).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: byte {error.start} is invalid") from None
        except RecursionError:
            raise ValueError(f"{where} cannot be read: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._parsed(self.line(index), self.number(index))

    def line(self, index: int) -> bytes:
        """Return the bytes of an item's line, without the line end.

        Args:
          index: the item.
        """
        self._file.seek(self._starts[index])
        return self._file.readline().removeprefix(BOM).rstrip(b"\r\n")

    def number(self, index: int) -> int:
        """Return the number of an item's line in the file, counted from 1.

        Args:
          index: the item.
        """
        return int(self._numbers[index])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
