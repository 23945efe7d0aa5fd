"""ZIP with its deviations corrected: marginal ratios, within windows, under a budget of tokens."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from jaxquant.selection.compression import Stream, new_stream
from jaxquant.selection.rounds import Items, Stages, smallest

SLACK = 1.1  # how much a score may exceed the best of those that the second stage rejected
Pieces = dict[int, list[bytes]]  # of items, by their index
NOTHING_SEEN = np.iinfo(np.int64).max


class Buffers:
    """The selection, cut into buffers that the window of the codec covers together with a piece.

    A buffer holds whole pieces, up to half a window, and a piece is at most as long; so a piece
    that is compressed after a buffer is compared with all of it. A codec without a window has one
    buffer, which is never full. Full buffers are kept as bytes; one at a time is compressed again
    when a batch of candidates is compared with it.

    Args:
      codec: a key of `selection.compression.CODECS`.
    """

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self.open = new_stream(codec)
        self._data: list[bytes] = []  # of the open buffer
        self._full: list[bytes] = []
        self._base = self.open.size_with(b"")
        window = self.open.window
        self.capacity = window and window // 2

    def __len__(self) -> int:
        """Number of full buffers."""
        return len(self._full)

    def pieces(self, data: bytes) -> list[bytes]:
        """Return the pieces of an item, in order."""
        size = self.capacity or max(1, len(data))
        return [data[at : at + size] for at in range(0, len(data), size)]

    def append(self, piece: bytes) -> None:
        """Add a piece to the selection."""
        if self.capacity and self.open.raw and self.open.raw + len(piece) > self.capacity:
            self._full.append(b"".join(self._data))
            self.open, self._data = new_stream(self._codec), []
        self.open.append(piece)
        self._data.append(piece)
        self._base = self.open.size_with(b"")

    def added(self, piece: bytes) -> int:
        """Return the bytes by which a piece lengthens the compressed open buffer."""
        return self.open.size_with(piece) - self._base

    def full(self, number: int) -> tuple[Stream, int]:
        """Return a full buffer, compressed again, and its compressed size."""
        stream = new_stream(self._codec)
        stream.append(self._full[number])
        return stream, stream.size_with(b"")


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
        self._sizes, self._history, self._buffers = sizes, history, Buffers(codec)
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
            self._ratio[index] = self._against_open(index, self._pieces(index))

    def round(self) -> bool:
        """Run the three stages once."""
        k1, k2, k3 = self._stages
        self._left &= self._sizes <= self._budget - self.spent
        left = np.flatnonzero(self._left)
        first = left[smallest(self._ratio[left], k1)]
        pieces = {int(i): self._pieces(i) for i in first}
        self._compare(pieces)
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
            best = min(pieces, key=lambda i: self._ratio[i])  # the first of equal ones
            if self._ratio[best] > limit:
                return
            self._append(best, pieces.pop(best))
            self._compare(pieces)

    def _compare(self, pieces: Pieces) -> None:
        """Score items anew: after the full buffers that are new to them, and the open one."""
        indices = np.array(list(pieces), np.int64)
        total = len(self._buffers)
        oldest = 0 if self._history is None else max(0, total - self._history)
        self._seen[indices] = np.maximum(self._seen[indices], oldest)
        for number in range(self._seen[indices].min(initial=total), total):
            stream, base = self._buffers.full(number)
            for i in indices[self._seen[indices] <= number]:
                self._lower(i, pieces[i], stream, base)
        self._seen[indices] = total
        for i, parts in pieces.items():
            self._ratio[i] = self._against_open(i, parts)

    def _lower(self, index: int, pieces: Iterable[bytes], stream: Stream, base: int) -> None:
        """Compare the pieces of an item with a full buffer."""
        for place, piece in enumerate(pieces, self._first[index]):
            self._least[place] = min(self._least[place], stream.size_with(piece) - base)

    def _against_open(self, index: int, pieces: Iterable[bytes]) -> float:
        """Return the marginal ratio of an item, compared with the open buffer too."""
        added = sum(
            min(self._least[place], self._buffers.added(piece))
            for place, piece in enumerate(pieces, self._first[index])
        )
        return self._raw[index] / max(1, added)

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
