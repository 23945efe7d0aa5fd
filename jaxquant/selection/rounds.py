"""What the two modes of ZIP share: the items of a pool, the sizes of the stages, a selector."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from jaxquant.selection.compression import encoded, serialization


class Stages(NamedTuple):
    """How many items each stage of a round of ZIP passes on, k1 >= k2 >= k3 >= 1.

    Attributes:
      k1: items whose scores are computed anew.
      k2: items among which the third stage chooses.
      k3: items that a round selects.
    """

    k1: int
    k2: int
    k3: int

    def check(self) -> None:
        """Raise ValueError unless k1 >= k2 >= k3 >= 1."""
        if not self.k1 >= self.k2 >= self.k3 >= 1:
            raise ValueError(
                f"the stages must have k1 >= k2 >= k3 >= 1, got k1={self.k1}, k2={self.k2}, "
                f"k3={self.k3}"
            )


class Items:
    """The items of a pool as bytes; each is read from the pool whenever it is needed.

    Args:
      pool: the items.
      serialize: as in `selection.compression.compression_ratio`.
    """

    def __init__(self, pool: Sequence[Any], serialize: str) -> None:
        self.start, self.between, self.end = serialization(serialize)
        self._pool, self._serialize = pool, serialize

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, index: int) -> bytes:
        return encoded(self._pool[index], self._serialize, index)

    def measured(self) -> tuple[Int[np.ndarray, "n"], bytes]:
        """Return the bytes of every item, and a digest of all of them that recognizes the pool."""
        sizes, digest = np.zeros(len(self), np.int64), hashlib.blake2b(digest_size=16)
        for i in range(len(self)):
            data = self[i]
            sizes[i] = len(data)
            digest.update(b"%d:" % len(data) + data)
        return sizes, digest.digest()


class Selector(Protocol):
    """One way to select: it scores every item once, and then selects some in every round.

    Attributes:
      picks: the items selected so far, in order.
      spent: how much of the budget they take.
    """

    picks: list[int]

    @property
    def spent(self) -> int:
        """How much of the budget the picks take."""
        ...

    def score(self, index: int) -> None:
        """Score an item by itself."""
        ...

    def round(self) -> bool:
        """Run the three stages once; return whether there may be another round."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything that decides what the next round does, besides the pool."""
        ...

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` returned."""
        ...


def smallest(values: Float[np.ndarray, "n"], count: int) -> Int[np.ndarray, "k"]:
    """Return the places of the smallest values in ascending order; the first of equal ones first.

    Args:
      values: the values.
      count: how many places to return.

    >>> smallest(np.array([3.0, 1.0, 2.0, 1.0]), 3).tolist()
    [1, 3, 2]
    """
    return np.argsort(values, kind="stable")[:count]
