"""Selection from a JSON Lines file: its items as texts, their tokens, ZIP, and what it gained."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import JsonValue

from jaxquant.durable.store import Finished
from jaxquant.selection.baselines import random_draw
from jaxquant.selection.compression import compression_ratio
from jaxquant.selection.json_lines import JsonLines
from jaxquant.selection.zip_selection import Progress, Selection, zip_select
from jaxquant_models.readers.registry import is_kind, open_model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_text

BYTES_PER_TOKEN = 4  # of English text, roughly, if no tokenizer is given
DRAWS = 5  # random draws with which the selection is compared
SIZES = "sizes"  # name under which the tokens of all items are kept


@dataclasses.dataclass(frozen=True)
class SelectionRequest:
    """Everything that determines the result, except the file and the tokenizer.

    Attributes:
      budget: number of tokens; of items with `faithful`.
      field: the field of every object that is the text; None: all strings of a line.
      codec: codec of the ratios, "zlib" or "lzma".
      faithful: whether to do as the code of ZIP's authors does.
      k1, k2, k3: sizes of ZIP's stages.
    """

    budget: int
    field: str | None = None
    codec: str = "zlib"
    faithful: bool = False
    k1: int = 10_000
    k2: int = 200
    k3: int = 100

    def __post_init__(self) -> None:
        if not self.k1 >= self.k2 >= self.k3 >= 1:
            raise ValueError(
                f"the stages must have --k1 >= --k2 >= --k3 >= 1, got {self.k1}, {self.k2} and "
                f"{self.k3}"
            )
        if self.faithful and self.codec != "zlib":
            raise ValueError(f"--faithful needs --codec zlib, got {self.codec}")

    @property
    def serialize(self) -> str:
        """How items are written for the codec: as the authors do, or as plain texts."""
        return "repr" if self.faithful else "text"


class Lines(Sequence[Any]):
    """The items of a file, or one field of each.

    Args:
      file: the file.
      field: the field, or None.
      as_text: whether an item is the text of its line, instead of the JSON value.
    """

    def __init__(self, file: JsonLines, field: str | None, as_text: bool) -> None:
        self.file, self._field, self._as_text = file, field, as_text

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: Any) -> Any:
        value = self.file[index]
        if self._field is not None:
            value = self._of_field(value, index)
        return text_of(value) if self._as_text else value

    def _of_field(self, value: Any, index: int) -> Any:
        where = f"{self.file.path}, line {self.file.number(index)}"
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, of which --field names a field")
        if self._field not in value:
            names = ", ".join(map(repr, value)) or "none"
            raise ValueError(f"{where} has no field {self._field!r}; its fields: {names:.200}")
        return value[self._field]


def text_of(value: JsonValue) -> str:
    """Return all strings in a JSON value, in order, joined by line feeds; keys are left out.

    Args:
      value: the value.

    >>> text_of({"messages": [{"role": "user", "content": "Hi"}], "id": 3})
    'user\\nHi'
    """
    return "\n".join(_strings(value))


def _strings(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class Counter(NamedTuple):
    """How tokens are counted.

    Attributes:
      count: function from a text to its number of tokens.
      name: what distinguishes it from other ways.
    """

    count: Callable[[str], int]
    name: str

    @classmethod
    def of(cls, spec: str | None) -> "Counter":
        """Return the counter of a tokenizer; without one, a token is taken to be 4 bytes.

        Args:
          spec: a model, as `readers.registry.load` takes it, a folder with a tokenizer.json, or
            None.
        Raises:
          ValueError: there is no such model, or it is damaged.
        """
        if spec is None:
            size = lambda text: len(text.encode("utf-8", "surrogatepass"))
            return cls(lambda text: -(-size(text) // BYTES_PER_TOKEN), f"{BYTES_PER_TOKEN} bytes")
        file = Path(spec) / "tokenizer.json"
        found = is_kind(Path.is_file, file)
        tokenizer = Tokenizer.from_file(file) if found else open_model(spec).outline.tokenizer
        return cls(lambda text: len(tokenizer.encode(text)), digest_of_text(tokenizer.to_json()))


def fingerprint(request: SelectionRequest, file: JsonLines, counter: Counter) -> dict[str, Any]:
    """Return the identity of a run: plain values that differ wherever results may differ.

    Args:
      request: the request.
      file: the file.
      counter: how tokens are counted.
    """
    versions = {**VERSIONS, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    settings = dataclasses.asdict(request)
    return {**settings, **versions, "pool": file.digest, "tokens": counter.name}


def sizes_of(
    file: JsonLines,
    request: SelectionRequest,
    counter: Counter,
    progress: Callable[[Progress], None],
    finished: Finished,
) -> Int[np.ndarray, "n"]:
    """Return the number of tokens of every item.

    Args:
      file: the file.
      request: the request.
      counter: how tokens are counted.
      progress: called after each item.
      finished: where the numbers are kept for a resumed run.
    Raises:
      ValueError: a line has no such field, no item has text, or none fits into the budget.
    """
    if SIZES in finished:
        return finished[SIZES][SIZES]
    texts, sizes = Lines(file, request.field, True), np.zeros(len(file), np.int64)
    for i in range(len(file)):
        text = texts[i]
        try:
            sizes[i] = counter.count(text)
        except ValueError as error:
            raise ValueError(f"{file.path}, line {file.number(i)}: {error}") from None
        progress(Progress("counting tokens", i + 1, len(file)))
    some = sizes[sizes > 0]
    if not len(some) and not request.faithful:  # which compresses the lines themselves
        raise ValueError(f"no item of {file.path} holds text")
    if not request.faithful and some.min() > request.budget:
        raise ValueError(
            f"no item of {file.path} fits into the budget of {request.budget} tokens: the smallest "
            f"has {some.min()}; give a larger --budget"
        )
    finished[SIZES] = {SIZES: sizes}
    return sizes


def select(
    file: JsonLines,
    request: SelectionRequest,
    sizes: Int[np.ndarray, "n"],
    progress: Callable[[Progress], None],
    finished: Finished,
) -> Selection:
    """Select items of a file by ZIP.

    Args:
      file: the file.
      request: the request.
      sizes: the result of `sizes_of`.
      progress: called as by `zip_select`.
      finished: where the state is kept for a resumed run.
    """
    return zip_select(
        Lines(file, request.field, not request.faithful),
        request.budget,
        faithful=request.faithful,
        sizes=None if request.faithful else sizes,
        k1=request.k1,
        k2=request.k2,
        k3=request.k3,
        codec=request.codec,
        serialize=request.serialize,
        progress=progress,
        finished=finished,
    )


def report_of(
    file: JsonLines, request: SelectionRequest, sizes: Int[np.ndarray, "n"], found: Selection
) -> dict[str, JsonValue]:
    """Return what a selection gained: ratios of the selection, the pool and random draws.

    Args:
      file: the file.
      request: the request.
      sizes: the result of `sizes_of`.
      found: the selection.
    """
    items = Lines(file, request.field, not request.faithful)
    texts = Lines(file, request.field, True)
    ratio = lambda of: compression_ratio(of, request.codec, request.serialize)
    takes = np.ones_like(sizes) if request.faithful else sizes
    seeds = range(0 if found.whole else DRAWS)  # a draw of the size of the file is the file
    draws = [ratio([items[i] for i in random_draw(takes, found.spent, seed)]) for seed in seeds]
    of_draws: dict[str, JsonValue] = {
        "compression_ratio_of_random_draws": float(np.mean(draws)),
        "lowest_compression_ratio_of_random_draws": min(draws),
    } if draws else {}  # fmt: skip
    return {
        "items": len(found.indices),
        "items_of_pool": len(file),
        "tokens": int(sizes[found.indices].sum()),
        "tokens_of_pool": int(sizes.sum()),
        "items_without_text_of_pool": int(np.sum(sizes == 0)),
        "repeated_items": _repeats(texts, found.indices),
        "repeated_items_of_pool": _repeats(texts, np.arange(len(file))),
        "compression_ratio": ratio([items[i] for i in found.indices]),
        "compression_ratio_of_pool": ratio(items),
        **of_draws,
    }


def _repeats(texts: Sequence[str], indices: Int[np.ndarray, "n"]) -> int:
    """Return how many of some texts, apart from empty ones, are equal to an earlier one."""
    of = lambda text: hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    some = [of(text).digest() for text in (texts[i] for i in indices) if text]
    return len(some) - len(set(some))
