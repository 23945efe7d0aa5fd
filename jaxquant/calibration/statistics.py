"""Statistics of an input: what is kept, and how the statistics of batches are merged."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.calibration.observed import Seen
from jaxquant.core.magnitude import shifted, unit
from jaxquant.core.sites import Site

Weighting = Literal["uniform", "gradient", "energy"]


class Probe(NamedTuple):
    """Sums that a matmul's backward rule returns; None for those not asked for.

    x is a row of the input, g the gradient at its output, and a the row's weight. Of a matmul that
    a function forms several times, with several inputs or in a loop, `low` and `high` are sums of
    the bounds, hence still bounds.

    Attributes:
      gram: sum of a x x^T.
      rows: number of rows x.
      output: sum of g g^T.
      magnitude: sum of a |x|.
      low, high: the largest -x and the largest x per channel, at least 0.
      extreme, typical: rows x: those with the largest entries, and some at random.
    """

    gram: Float[Array, "*batch k k"] | None
    rows: Float[Array, "*batch"]
    output: Float[Array, "*batch n n"] | None
    magnitude: Float[Array, "*batch k"]
    low: Float[Array, "*batch k"]
    high: Float[Array, "*batch k"]
    extreme: Float[Array, "*batch t k"] | None = None
    typical: Float[Array, "*batch t k"] | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """The summary that calibration makes of a matmul.

    Attributes:
      gram, output: whether to keep second moments of the input, and of the gradient at the output.
      weighting: weights of the rows, see `calibrate`.
      sample: number of rows to keep of each kind.
      alike: whether all matmuls that a function forms with the matrix read one input.
    """

    gram: bool
    output: bool
    weighting: Weighting
    sample: int
    alike: bool = True

    def zeros(self, k: int, n: int) -> Probe:
        """Return the empty summary."""
        rows = (jnp.zeros((self.sample, k)),) * 2 if self.sample else (None, None)
        square = lambda size, kept: jnp.zeros((size, size)) if kept else None
        channels = (jnp.zeros(k),) * 3
        return Probe(square(k, self.gram), jnp.zeros(()), square(n, self.output), *channels, *rows)

    def of(self, seen: Seen) -> Probe:
        """Return the summary of one matmul."""
        x = seen.rows
        left = x * self._weights(seen)[:, None]
        x = x * jnp.sign(seen.weight)[:, None]
        # If a matmul is computed in parts, each part counts by its share of the outputs.
        share = jnp.max(seen.weight, initial=0.0) if self.alike else 1.0
        # A GPU's default precision rounds rows to 10 bits; H would then be no second moment.
        second = partial(jnp.einsum, "tk,tl->kl", precision="highest")
        top = lambda a: jnp.maximum(jnp.max(a, axis=0, initial=0.0), 0.0)
        one = Probe(
            second(left, x) if self.gram else None,
            jnp.sum(seen.counted),
            second(seen.output, seen.output) if self.output else None,
            jnp.sum(jnp.sign(x) * left, axis=0),
            share * top(-x),
            share * top(x),
        )
        if not self.sample:
            return one
        rows = jnp.pad(x, ((0, self.sample), (0, 0)))
        return one._replace(
            **{name: share * best_rows(rows, name, self.sample) for name in SAMPLES}
        )

    def _weights(self, seen: Seen) -> Float[Array, " m"]:
        """Return the weight a of every row."""
        if self.weighting == "gradient":
            return seen.energy
        if self.weighting == "uniform":
            return seen.weight
        return seen.weight / jnp.maximum(jnp.mean(seen.rows**2, axis=1), 1e-30)

    def merged(self, a: Probe, b: Probe) -> Probe:
        """Merge the summaries of two sets of matmuls; leading axes are allowed."""
        added = jax.tree.map(jnp.add, a, b)
        largest = {
            name: jnp.maximum(getattr(a, name), getattr(b, name)) for name in ("low", "high")
        }
        if not self.sample:
            return added._replace(**largest)
        both = {name: jnp.concatenate([getattr(a, name), getattr(b, name)], -2) for name in SAMPLES}
        rows = {name: best_rows(r, name, self.sample) for name, r in both.items()}
        return added._replace(**largest, **rows)


# Scores by which rows are kept: the largest entry; a hash of the content, which is 0 for zeros.
SAMPLES: dict[str, Callable[[Array], Array]] = {
    "extreme": lambda x: jnp.max(jnp.abs(x), axis=-1),
    "typical": lambda x: jnp.abs(jnp.sin(1e4 * jnp.sum(x, axis=-1))),
}


def best_rows(rows: Float[Array, "... m k"], name: str, count: int) -> Float[Array, "... t k"]:
    """Return the rows with the highest scores, in descending order.

    Args:
      rows: the rows.
      name: a field of `Probe` that holds rows, whose score counts.
      count: how many.
    """
    _, index = jax.lax.top_k(SAMPLES[name](rows), count)
    return jnp.take_along_axis(rows, index[..., None], axis=-2)


@dataclasses.dataclass(frozen=True)
class Stats:
    """The result of calibration.

    Attributes:
      sites: how each weight is used, by path.
      sums: the statistics, float32 with leading axes [*batch], by the path of the weight that holds
        them.
      holder: path of a weight -> path of the weight that holds its statistics; weights that share
        an input and a weighting share them.
    """

    sites: dict[str, Site]
    sums: dict[str, Probe]
    holder: dict[str, str]

    def gram(self, path: str) -> Float[Array, "... k k"]:
        """Return the mean of a x x^T for a weight.

        Args:
          path: path of the weight.

        Returns:
          [*batch, k, k], float32.

        Raises:
          ValueError: calibration saw the weight in no matmul, or kept no second moments.
        """
        return self._mean(self.kept(path, "gram"), path)

    def output_gram(self, path: str) -> Float[Array, "... n n"]:
        """Return the mean of g g^T, where g is the gradient at the output of a weight.

        Args:
          path: path of the weight.

        Returns:
          [*batch, n, n], float32.

        Raises:
          ValueError: calibration was not asked for it.
        """
        return self._mean(self.kept(path, "output"), path)

    def _mean(self, sums: Array, path: str) -> Array:
        return sums / jnp.maximum(self.of(path).rows, 1)[..., None, None]

    def kept(self, path: str, name: str) -> Array:
        """Return one of the sums for a weight.

        Args:
          path: path of the weight.
          name: name of the sum, a field of `Probe`.

        Raises:
          ValueError: calibration did not keep it; the message says how to ask for it.
        """
        if name not in Probe._fields:
            raise ValueError(f"expected one of {', '.join(Probe._fields)}, got {name!r}")
        found = getattr(self.of(path), name)
        if found is None:
            what, option = {
                "gram": ("second moment", "calibrate with gram=True"),
                "output": ("output-side statistics", f"pass output=[{path!r}] to calibrate"),
            }.get(name, ("rows of the input", "calibrate with sample=256"))
            raise ValueError(f"no {what} for {path!r}: {option}")
        return found

    def of(self, path: str) -> Probe:
        """Return all sums for a weight.

        Args:
          path: path of the weight.

        Raises:
          ValueError: calibration saw the weight in no matmul.
        """
        if path not in self.holder:
            raise ValueError(f"no statistics for {path!r}: calibration saw it in no matmul")
        return self.sums[self.holder[path]]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all sums."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.sums))

    def __repr__(self) -> str:
        gathered = {name for sums in self.sums.values() for name in _gathered(sums)}
        kinds = ", ".join(name for name in Probe._fields if name in gathered)
        rows = [(p, str(list(self.sites[p].shape)), _tokens(self.of(p))) for p in self.holder]
        widths = [max((len(row[i]) for row in rows[:_SHOWN]), default=0) for i in range(2)]
        lines = [f"  {p:{widths[0]}}  {shape:{widths[1]}}  {of}" for p, shape, of in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            lines.append(f"  ... and {len(rows) - _SHOWN} more")
        others = [p for p in self.sites if p not in self.holder]
        if others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            lines.append(f"in no product: {', '.join(others[:_NAMED])}{more}")
        head = f"Stats(weights in products: {len(self.holder)}, inputs: {len(self.sums)}, "
        return "\n".join([f"{head}kept: {kinds or 'nothing'}, {self.nbytes:,d} bytes)", *lines])


_SHOWN, _NAMED = 6, 4  # weights that printed statistics list, and name outside of all products


def _gathered(sums: Probe) -> list[str]:
    return [name for name, a in sums._asdict().items() if a is not None]


def _tokens(sums: Probe) -> str:
    """Describe how many rows of an input were seen, by each matrix of a stack."""
    if isinstance(sums.rows, jax.core.Tracer) or not isinstance(sums.rows, jax.Array):
        return ""  # shapes only
    least, most = float(jnp.min(sums.rows)), float(jnp.max(sums.rows))
    return f"{most:,.0f} tokens" if least == most else f"{least:,.0f} to {most:,.0f} tokens"


def seen(x: Float[Array, "t k"], n: int) -> Stats:
    """Return the statistics of a matrix "w" [k, n] with these inputs, keeping all rows.

    The second moment is that of the rows divided by a power of two, so that squares stay within the
    range of float32.

    Args:
      x: the input rows, [t, k].
      n: number of outputs.

    >>> seen(jnp.ones((3, 2)), 5).gram("w").tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    count, k = x.shape
    x, e = unit(x)
    kept = Kept(gram=True, output=False, weighting="uniform", sample=count)
    ones = jnp.ones(count)
    probe = kept.of(Seen(x, ones, jnp.zeros((count, n)), ones, ones))
    sized = ("magnitude", "low", "high", "extreme", "typical")
    probe = probe._replace(**{name: shifted(getattr(probe, name), e) for name in sized})
    return Stats({"w": Site("w", (k, n), (0,))}, {"w": probe}, {"w": "w"})
