"""ZIP with its deviations corrected: marginal ratios, within windows, under a budget of tokens."""

import itertools
from collections import deque
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from jaxquant.selection.compression import Stream, new_stream
from jaxquant.selection.rounds import Items, Stages, smallest

SLACK = 1.1  # how much a score may exceed the best of those that the second stage rejected
Pieces = dict[int, list[bytes]]  # of items, by their index
NOTHING_SEEN = int(np.iinfo(np.int64).max)


class Buffers:
    """The selection, cut into buffers that the window of the codec covers together with a piece.

    A buffer holds whole pieces, up to half a window, and a piece is at most as long; so a piece
    that is compressed after a buffer is compared with all of it. A codec without a window has one
    buffer, which is never full.

    Args:
      codec: a key of `selection.compression.CODECS`.
      history: number of the newest full buffers to keep; None: all.
    """

    def __init__(self, codec: str, history: int | None) -> None:
        self._codec, self._history = codec, history
        self._streams: deque[tuple[Stream, int]] = deque(maxlen=history)
        self.count = 0  # of full buffers, those that were dropped too
        self.open = new_stream(codec)
        self._base = self.open.size_with(b"")
        window = self.open.window
        self.capacity = window and window // 2

    @property
    def oldest(self) -> int:
        """Number of the oldest full buffer that is kept."""
        return self.count - len(self._streams)

    def pieces(self, data: bytes) -> list[bytes]:
        """Return the pieces of an item, in order."""
        size = self.capacity or max(1, len(data))
        return [data[at : at + size] for at in range(0, len(data), size)]

    def append(self, piece: bytes) -> None:
        """Add a piece to the selection."""
        if self.capacity and self.open.raw and self.open.raw + len(piece) > self.capacity:
            self._streams.append((self.open, self._base))
            self.count += 1
            self.open = new_stream(self._codec)
        self.open.append(piece)
        self._base = self.open.size_with(b"")

    def added(self, piece: bytes) -> int:
        """Return the bytes by which a piece lengthens the compressed open buffer."""
        return self.open.size_with(piece) - self._base

    def least(self, piece: bytes, since: int) -> int:
        """Return the fewest bytes by which a piece lengthens a full buffer.

        Args:
          piece: the piece.
          since: number of the first buffer to compare it with.
        """
        streams = itertools.islice(self._streams, max(0, since - self.oldest), None)
        return min((s.size_with(piece) - base for s, base in streams), default=NOTHING_SEEN)


class Corrected:
    """The corrected algorithm; see `selection.zip_selection.zip_select`.

    The score of an item is its marginal ratio, raw bytes over the bytes by which it lengthens the
    compressed selection S,

        r[i] = raw(i) / c(i | S),   c(i | S) = sum over pieces p of i: min over buffers b of S:
                                               size(b + p) - size(b)

    c only falls as S grows, up to the few bytes of Huffman tables that a buffer shares, so a score
    computed for a smaller S is a lower bound, and only the k1 smallest have to be computed anew
    (accelerated greedy, Minoux 1978).

    Args:
      items: the pool.
      budget: in the unit of `sizes`.
      stages: k1, k2 and k3.
      raw: bytes of each item.
      sizes: how much of the budget each item takes.
      codec: a key of `selection.compression.CODECS`.
      history: number of the newest full buffers that an item is compared with; None: all.
    """

    def __init__(
        self,
        items: Items,
        budget: int,
        stages: Stages,
        raw: Int[np.ndarray, "n"],
        sizes: Int[np.ndarray, "n"],
        codec: str,
        history: int | None,
    ) -> None:
        self._items, self._budget, self._stages = items, budget, stages
        self._sizes, self._buffers = sizes, Buffers(codec, history)
        self._raw = raw + len(items.between)
        counts = -(-self._raw // self._buffers.capacity) if self._buffers.capacity else 1
        self._first = np.concatenate([[0], np.cumsum(counts * np.ones_like(raw))])
        self.picks: list[int] = []
        self.spent = 0
        self._left = raw > 0  # what can still be selected: an item without bytes adds nothing
        self._ratio = np.full(len(raw), np.nan)
        self._least = np.full(self._first[-1], NOTHING_SEEN)  # bytes of each piece, full buffers
        self._seen = np.zeros(len(raw), np.int64)  # number of full buffers it was compared with

    def score(self, index: int) -> None:
        """Set the score of an item to its ratio by itself, without the bytes of an empty stream."""
        if self._left[index]:
            self._compare(index, self._pieces(index))

    def round(self) -> bool:
        """Run the three stages once."""
        k1, k2, k3 = self._stages
        self._left &= self._sizes <= self._budget - self.spent
        left = np.flatnonzero(self._left)
        first = left[smallest(self._ratio[left], k1)]
        pieces = {int(i): self._pieces(i) for i in first}
        for i, parts in pieces.items():
            self._compare(i, parts)
        first = first[smallest(self._ratio[first], k1)]
        best_rejected = self._ratio[first[k2]] if len(first) > k2 else np.inf
        self._third({int(i): pieces[int(i)] for i in first[:k2]}, k3, SLACK * best_rejected)
        return bool(len(left))

    def _third(self, pieces: Pieces, count: int, limit: float) -> None:
        """Choose among the items of the second stage, greedily, each after all of S.

        The stage ends early when all that is left has become more redundant than what the second
        stage rejected, such as copies of items just selected.
        """
        for _ in range(count):
            room = self._budget - self.spent
            pieces = {i: parts for i, parts in pieces.items() if self._sizes[i] <= room}
            if not pieces:
                return
            best = self._best(pieces)
            if self._ratio[best] > limit:
                return
            self._append(best, pieces.pop(best))

    def _best(self, pieces: Pieces) -> int:
        """Return the item with the smallest score, the first of equal ones.

        Scores are lower bounds, so the smallest of them is computed anew until it is up to date.
        """
        known: set[int] = set()
        while (best := min(pieces, key=lambda i: self._ratio[i])) not in known:
            self._compare(best, pieces[best])
            known.add(best)
        return best

    def _compare(self, index: int, pieces: Iterable[bytes]) -> None:
        """Score an item anew: after the full buffers that are new to it, and the open one."""
        since, added = self._seen[index], 0
        for place, piece in enumerate(pieces, self._first[index]):
            if since < self._buffers.count:
                self._least[place] = min(self._least[place], self._buffers.least(piece, since))
            added += min(self._least[place], self._buffers.added(piece))
        self._seen[index] = self._buffers.count
        self._ratio[index] = self._raw[index] / max(1, added)

    def _pieces(self, index: int) -> list[bytes]:
        return self._buffers.pieces(self._items[index] + self._items.between)

    def _append(self, index: int, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self._buffers.append(piece)
        self.picks.append(int(index))
        self._left[index] = False
        self.spent += int(self._sizes[index])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the scores, what they were computed from, and the picks."""
        kept = {"ratio": self._ratio, "least": self._least, "seen": self._seen}
        picks = np.array(self.picks, np.int64)
        return {name: a.copy() for name, a in kept.items()} | {"picks": picks}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` returned."""
        self._ratio, self._least, self._seen = (
            arrays[name].copy() for name in ("ratio", "least", "seen")
        )
        for i in arrays["picks"]:
            self._append(int(i), self._pieces(i))
