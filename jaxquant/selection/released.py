"""ZIP as its authors released it, choice by choice."""

import numpy as np
from jaxtyping import Int

from jaxquant.selection.compression import Stream, new_stream
from jaxquant.selection.rounds import Items, Stages, smallest

MARKED = 1e6  # ratio of items that were among the k2 of a round


class Released:
    """The released algorithm, with its deviations; see `selection.zip_selection.zip_select`.

    pi[i] is the compression ratio of item i, by itself or after the selection S, when it was last
    computed. In a round

        C1 = the k1 items with the smallest pi;   pi[i] = R(S + {i}) for i in C1
        C2 = the k2 items of C1 with the smallest pi;   then pi[i] = 1e6 for i in C2
        T = {};   k3 times: add the i of C2 with the smallest R(T + {i});   S = S + T

    Args:
      items: the pool.
      budget: number of items.
      stages: k1, k2 and k3.
    """

    def __init__(self, items: Items, budget: int, stages: Stages) -> None:
        self._items, self._budget = items, budget
        self._stages = stages
        self.picks: list[int] = []
        self._ratio = np.full(len(items), np.nan)
        self._selected = self._list()

    @property
    def spent(self) -> int:
        """Number of items selected."""
        return len(self.picks)

    def score(self, index: int) -> None:
        """Set pi to the ratio of the item by itself."""
        self._ratio[index] = self._ratio_with(self._list(), self._items[index], True)

    def round(self) -> bool:
        """Run the three stages once."""
        k1, k2, k3 = self._stages
        candidates = self._candidates()
        first = candidates[smallest(self._ratio[candidates], k1)]
        for i in first:
            self._ratio[i] = self._ratio_with(self._selected, self._items[i], not self.picks)
        second = first[smallest(self._ratio[first], k2)]
        self._ratio[second] = MARKED
        for i in self._third(second, min(k3, len(second))):
            self._append(i)
        return self.spent < self._budget

    def _candidates(self) -> Int[np.ndarray, "k"]:
        """Return what the first stage chooses from: every item, if the pool is as large as k1.

        A smaller pool, on which the released code fails, offers the items without a mark; when
        there are none left, those that were not selected.
        """
        every = np.arange(len(self._items))
        if len(every) >= self._stages.k1:
            return every
        unmarked = every[self._ratio < MARKED]
        return unmarked if len(unmarked) else np.setdiff1d(every, self.picks)

    def _third(self, second: Int[np.ndarray, "k"], count: int) -> list[int]:
        """Choose among the items of the second stage, greedily and without regard to S."""
        data = {int(i): self._items[i] for i in second}
        chosen: list[int] = []
        stream = self._list()
        for _ in range(count):
            ratios = {i: self._ratio_with(stream, data[i], not chosen) for i in data}
            best = min(ratios, key=lambda i: ratios[i])  # the first of equal ones
            stream.append((self._items.between if chosen else b"") + data.pop(best))
            chosen.append(best)
        return chosen

    def _list(self) -> Stream:
        stream = new_stream("zlib")
        stream.append(self._items.start)
        return stream

    def _ratio_with(self, stream: Stream, data: bytes, first: bool) -> float:
        """Return the ratio of the items in a stream, followed by one more."""
        rest = (b"" if first else self._items.between) + data + self._items.end
        return (stream.raw + len(rest)) / stream.size_with(rest)

    def _append(self, index: int) -> None:
        data = self._items[index]
        self._selected.append((self._items.between if self.picks else b"") + data)
        self.picks.append(int(index))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return pi and the picks."""
        return {"ratio": self._ratio.copy(), "picks": np.array(self.picks, np.int64)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` returned."""
        self._ratio = arrays["ratio"].copy()
        for i in arrays["picks"]:
            self._append(i)
