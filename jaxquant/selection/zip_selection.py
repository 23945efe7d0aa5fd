"""ZIP: selection of the part of a dataset that compresses least, in three greedy stages."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxquant.core.arguments import check_arguments
from jaxquant.durable.states import BEGUN, mark
from jaxquant.durable.store import Finished
from jaxquant.selection.compression import CODECS
from jaxquant.selection.corrected import Corrected
from jaxquant.selection.released import Released
from jaxquant.selection.rounds import Items, Selector, Stages

STATE = "selection"  # name of what is kept for a resumed run
SAVE_EVERY = 10.0  # seconds between two saves, at least


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of `zip_select`.

    Attributes:
      indices: the selected items in the order in which they were selected.
      spent: how much of the budget they take: a number of items in faithful mode, else the sum of
        their sizes.
      whole: whether every item was selected because the budget covers the pool.
    """

    indices: Int[np.ndarray, "n"]
    spent: int
    whole: bool = False


class Progress(NamedTuple):
    """How far a selection is.

    Attributes:
      stage: "scoring", in which every item is scored by itself, or "selecting".
      done: number of items scored, or how much of the budget is spent.
      total: number of items, or the budget.
    """

    stage: str
    done: int
    total: int


def zip_select(
    pool: Sequence[Any],
    budget: int,
    *,
    faithful: bool = False,
    sizes: Sequence[Any] | Int[np.ndarray, "n"] | None = None,
    k1: int = 10_000,
    k2: int = 200,
    k3: int = 100,
    codec: str = "zlib",
    serialize: str = "repr",
    history: int | None = 256,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Selection:
    """Select a part of a pool whose compression ratio is low, so that little in it is redundant.

    ZIP selects in rounds. A round computes the scores of the k1 items with the lowest scores anew,
    passes on the k2 lowest of these, and selects k3 of them one by one, each with regard to those
    that it has just selected. Scores of all other items stay as they were. A round takes k1 + k2 k3
    compressions with `faithful` (30,000 by default, two to three seconds for items of 1 kB), and
    fewer without, where the third stage computes only those scores anew that can be the lowest.

    With `faithful`, scores are ratios of whole sets, R(S + {i}), and the picks are those of the
    authors' code, index for index, up to the order of equal ratios (the first comes first here; it
    is unspecified there), with the deviations of that code from what one would expect:

    1. All k2 items of a round are marked by a ratio of 1e6, so those that were rejected do not come
       back, unless fewer than k1 unmarked items are left. Then marked items are scored again, and
       one that was selected before can be selected a second time.
    2. The budget counts items, and is exceeded up to the next multiple of k3.
    3. The code fails on a pool smaller than k1. Here the first stage of such a pool scores all
       items that are not marked, so that none is selected twice; when all are marked, it scores
       those that were rejected.
    4. zlib finds no repeat beyond 32 KiB, so the first stage sees only the end of a larger S, and
       the third stage does not look at S at all.
    5. The header and the Huffman tables of a compressed stream weigh more in a short item, whose
       ratio therefore is too low; and ratios of single items are compared with those of sets.

    Without `faithful`, the default, each of these is corrected:

    1. Rejected items keep their scores and can be selected in later rounds. A round selects fewer
       than k3 items if those left among the k2 have become 10 % more redundant than the best that
       was rejected.
    2. The budget counts bytes, or the `sizes` given (tokens), and is never exceeded. Items that
       would exceed it are passed over, until no item fits.
    3. A stage passes on fewer items when fewer are left.
    4. S is kept in buffers of 16 KiB (for zlib), and an item is compared with each of them, also in
       the third stage. What counts is the buffer that it repeats most. Items are cut into pieces of
       16 KiB for this, so that a long document is recognized too. `history` limits the number of
       buffers. The codec "lzma", whose window covers everything, compresses all of S for every
       candidate, which takes minutes from about 100 kB on.
    5. The score is marginal: raw bytes of the item over the bytes by which it lengthens the
       compressed buffer, whose tables exist already. So items of all lengths are scored alike, by
       the information that a byte of them adds. Only while the first few texts fill the first
       buffer are short items still preferred.

    Memory holds six numbers per item (and one per further 16 KiB of a long one), the bytes of k1
    items and, without `faithful`, 0.3 MB per buffer of S, 70 MB at most by default. The pool may be
    a `selection.json_lines.JsonLines`, which reads items from a file.

    Args:
      pool: the items, any values with "repr", strings or bytes with "text". They are read once to
        measure them, once to score them, and whenever a round needs them.
      budget: how much to select, 1 or more: a number of items with `faithful`, else bytes or the
        unit of `sizes`. If it covers the pool, all items are selected, in the order of the pool.
      faithful: whether to do as the authors' code does. This needs the codec "zlib" and
        serialize="repr".
      sizes: how much of the budget each item takes, integers of 0 or more, such as numbers of
        tokens. None: the bytes of the item as `serialize` writes it. Not with `faithful`.
      k1, k2, k3: sizes of the stages, k1 >= k2 >= k3 >= 1. The defaults are the authors'.
      codec: as in `selection.compression.compression_ratio`.
      serialize: as in `selection.compression.compression_ratio`.
      history: number of the newest full buffers of S that an item is compared with, 1 or more;
        None: all. The default is 4 MiB of text for zlib; an item is still compared with older ones
        if it was scored while they were among the newest. Not used by `faithful`.
      progress: called while items are scored and after every round.
      finished: where the state of the run is kept, at most every ten seconds, so that the same call
        goes on from there; None keeps nothing. States of other pools and other settings are not
        used.

    Returns:
      The selection. The same arguments give the same one, on every machine with the same zlib.

    Raises:
      ValueError: the pool is empty, an argument is out of range, or an item is not a string with
        "text".

    Source: ZIP (arXiv:2407.06645) and the code of its authors, which calls the compression ratio
    the "information redundancy state". The corrected mode is ours; its re-use of old scores is the
    accelerated greedy algorithm (Minoux 1978).

    >>> pool = [f"{word} " * 9 for word in ("red", "red", "red", "green", "blue")]
    >>> zip_select(pool, 140, serialize="text").indices.tolist()
    [4, 3, 0]
    """
    check_arguments(zip_select, locals())
    stages = Stages(int(k1), int(k2), int(k3))
    _check(pool, budget, stages, faithful, sizes, codec, serialize, history)
    items = Items(pool, serialize)
    raw, digest = items.measured()
    takes = np.ones(len(raw), np.int64) if faithful else _sizes(sizes, raw)
    if budget >= takes.sum():
        return Selection(np.arange(len(raw)), int(takes.sum()), whole=True)
    selector: Selector = (
        Released(items, int(budget), stages)
        if faithful
        else Corrected(items, int(budget), stages, raw, takes, codec, history)
    )
    settings = f"{STATE} {faithful} {budget} {stages} {codec} {serialize} {history}"
    run = _Run(selector, len(raw), progress, finished, mark(settings, [takes, _array(digest)]))
    run.complete(int(budget))
    return Selection(np.array(selector.picks, np.int64), selector.spent)


def _check(
    pool: Sequence[Any], budget: int, stages: Stages, faithful: bool, sizes: Any, codec: str,
    serialize: str, history: int | None,
) -> None:  # fmt: skip
    """Raise ValueError if an argument is out of range or contradicts another."""
    if not len(pool):
        raise ValueError("the pool holds no items; give at least one")
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    stages.check()
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    if history is not None and history < 1:
        raise ValueError(f"history must be at least 1, or None for all buffers, got {history}")
    if faithful and (codec, serialize, sizes is None) != ("zlib", "repr", True):
        raise ValueError(
            'faithful mode does what the authors\' code does: it needs codec="zlib", '
            'serialize="repr" and a budget in items, without sizes; leave these arguments out'
        )


def _sizes(
    sizes: Sequence[Any] | Int[np.ndarray, "n"] | None, raw: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """Return how much of the budget each item takes, int64."""
    if sizes is None:
        return raw
    given = np.asarray(sizes)
    integers = given.shape == raw.shape and given.dtype.kind in "iu"
    if not integers or (given < 0).any():
        raise ValueError(
            f"sizes must be {len(raw)} integers of 0 or more, one per item, got {given.dtype} "
            f"of shape {list(given.shape)}" + ", some negative" * integers
        )
    if sum(given.tolist()) > np.iinfo(np.int64).max:
        raise ValueError("sizes must be integers whose sum is below 2^63; give a larger unit")
    return given.astype(np.int64)


def _array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


class _Run:
    """A selector that is run to the end of its budget, with its state kept in a store."""

    def __init__(
        self,
        selector: Selector,
        count: int,
        progress: Callable[[Progress], None] | None,
        finished: Finished | None,
        begun: np.ndarray,
    ) -> None:
        self._selector, self._count = selector, count
        self._tell = progress or (lambda _: None)
        self._finished, self._begun = finished, begun
        self._saved = time.monotonic()

    def complete(self, budget: int) -> None:
        """Score all items, then run rounds until one is the last."""
        scored, more = self._restored()
        for i in range(scored, self._count):
            self._selector.score(i)
            self._save(i + 1, True)
            self._tell(Progress("scoring", i + 1, self._count))
        while more:
            more = self._selector.round()
            self._save(self._count, more)
            self._tell(Progress("selecting", min(self._selector.spent, budget), budget))

    def _restored(self) -> tuple[int, bool]:
        """Return how many items are scored, and whether there may be another round."""
        found = dict((self._finished or {}).get(STATE, {}))
        if not np.array_equal(found.pop(BEGUN, ()), self._begun):
            return 0, True
        scored, more = found.pop("done").tolist()
        self._selector.restore(found)
        return scored, bool(more)

    def _save(self, scored: int, more: bool) -> None:
        """Keep the state, if the last save was long enough ago or the run has ended."""
        now = time.monotonic()
        if self._finished is None or (more and now - self._saved < SAVE_EVERY):
            return
        done = np.array([scored, more])
        self._finished[STATE] = self._selector.arrays() | {"done": done, BEGUN: self._begun}
        self._saved = now
