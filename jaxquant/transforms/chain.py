"""A sequence of transforms, each fitted to the output of those before it."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Transform, lacking


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """The composition x -> x A_0 A_1 ...; the arrays of part i are named "i.name".

    Attributes:
      parts: transforms in the order in which they apply to x; only the first may be `searched`.

    >>> from jaxquant.transforms import Rotation, Scaling
    >>> Chain((Scaling(), Rotation(block=4))).size(6)
    8
    """

    parts: tuple[Transform, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.parts:
            raise ValueError("parts must be a tuple of one or more transforms, got ()")
        if wrong := next(filter(None, (lacking(Transform, part) for part in self.parts)), ""):
            raise ValueError(f"parts must be a tuple of transforms: {wrong}")
        if any(part.searched for part in self.parts[1:]):
            raise ValueError(
                "only the first transform of a chain may be searched for, as Scaling is"
            )

    needs_gram = property(lambda self: any(p.needs_gram for p in self.parts))  # type: ignore[assignment]
    needs_channels = property(lambda self: any(p.needs_channels for p in self.parts))  # type: ignore[assignment]
    needs_sample = property(lambda self: any(p.needs_sample for p in self.parts))  # type: ignore[assignment]
    fitted = property(lambda self: any(p.fitted for p in self.parts))  # type: ignore[assignment]
    joint = property(lambda self: any(p.joint for p in self.parts))  # type: ignore[assignment]
    searched = property(lambda self: self.parts[0].searched)  # type: ignore[assignment]

    def size(self, n: int) -> int:
        """Return the number of channels after all parts."""
        for part in self.parts:
            n = part.size(n)
        return n

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays fitted to these channels."""
        first = self.parts[0].fit(channels, jax.random.fold_in(key, 0))
        return self._fitted(first, channels, key)

    def candidates(self, channels: Channels, key: Array) -> Iterator[dict[str, Array]]:
        """Yield the arrays of the chain for each candidate of the first part."""
        for first in self.parts[0].candidates(channels, jax.random.fold_in(key, 0)):
            yield self._fitted(first, channels, key)

    def _fitted(self, first: dict[str, Array], channels: Channels, key: Array) -> dict[str, Array]:
        arrays, own = {f"0.{name}": a for name, a in first.items()}, first
        for i, (before, part) in enumerate(itertools.pairwise(self.parts), start=1):
            channels = channels.through(before, own)
            own = part.fit(channels, jax.random.fold_in(key, i))
            arrays |= {f"{i}.{name}": a for name, a in own.items()}
        return arrays

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes."""
        found: dict[str, jax.ShapeDtypeStruct] = {}
        for i, part in enumerate(self.parts):
            found |= {f"{i}.{name}": a for name, a in part.shapes(n).items()}
            n = part.size(n)
        return found

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A for row vectors x."""
        for i, part in enumerate(self.parts):
            x = part.apply(x, of_part(arrays, i))
        return x

    def transposed(
        self, y: Float[Array, "... s"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y."""
        sizes = [n]
        for part in self.parts:
            sizes.append(part.size(sizes[-1]))
        for i, part in reversed(list(enumerate(self.parts))):
            y = part.transposed(y, of_part(arrays, i), sizes[i])
        return y

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A^-T for row vectors x."""
        for i, part in enumerate(self.parts):
            x = part.inverse(x, of_part(arrays, i))
        return x


def of_part(arrays: dict[str, Array], i: int) -> dict[str, Array]:
    """Return the arrays of part i under their own names.

    Args:
      arrays: arrays of the chain.
      i: index of the part.

    >>> of_part({"0.signs": 1, "1.factors": 2}, 1)
    {'factors': 2}
    """
    prefix = f"{i}."
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
