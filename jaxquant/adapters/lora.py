"""LoRA and its relatives: a low-rank product beside that of the frozen matrix."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapters.adapted import LORA_A as A
from jaxquant.adapters.adapted import LORA_B as B
from jaxquant.adapters.adapted import MAGNITUDE, dropped, frozen_product
from jaxquant.adapters.initial import STARTS
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Adapter, Data, Format, Known

NORM, IDS = "norm", "ids"  # |W|^2 of every column; the adapter that every row of a batch uses


@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """y = x W + scaling * (x A) B, with W frozen, A [k, rank] and B [rank, n] trained.

    A starts at random, uniform within 1 / sqrt(k) of zero, and B at zero, unless `init` says
    otherwise. A merge adds the product to W and rounds the sum again, which loses part of what was
    learned; see `jaxquant.merge`.

    Attributes:
      rank: number of columns of A, at least 1 and at most min(k, n).
      alpha: numerator of `scaling`, which is alpha / rank, or alpha / sqrt(rank) with `rslora`;
        positive. Default: twice the rank.
      dropout: fraction of the inputs of A that is dropped, in [0, 1). Inputs are dropped only
        inside `jaxquant.estimators.randomness(key)`. Default: 0.
      init: "zero" (the default) keeps the function as it is. The others need the argument `floats`
        of `jaxquant.adapt`, have scaling 1, and exclude `alpha` and `rslora`. "pissa" moves the
        principal part of the floats into A B and rounds the rest to nearest. "loftq" finds five
        pairs of W and the best A B, the first with the given codes and each later one by rounding
        to nearest, and keeps the pair with the least error. "cloq" keeps the codes and chooses A B
        in closed form for the least error of the outputs; it also needs the result of `calibrate`
        as the argument `stats`.
      rslora: divide alpha by sqrt(rank) instead of rank. Default: False.
      dora: train the norms of the columns of W + scaling A B separately (array "magnitude"). The
        norms are computed from products with the packed W, and no gradient passes through them.
        Default: False.
      dtype: dtype in which A and B are kept, "bfloat16" or "float32" (the default).
    Raises:
      ValueError: a field is out of its range; or, at `jaxquant.adapt`, the rank exceeds what a
        matrix allows, or its format does not suit.

    Source: LoRA (Hu et al. 2021, arXiv:2106.09685), QLoRA (Dettmers et al. 2023, arXiv:2305.14314),
    rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024, arXiv:2402.09353). For
    LoRA+ (Hayou et al. 2024, arXiv:2402.12354), give the labels "lora_a" and "lora_b" two learning
    rates in the optimizer.

    >>> LoRA(rank=16).scaling, LoRA(rank=16, alpha=16, rslora=True).scaling
    (2.0, 4.0)
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    init: Literal["zero", "pissa", "loftq", "cloq"] = "zero"
    rslora: bool = False
    dora: bool = False
    dtype: Literal["bfloat16", "float32"] = "float32"

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_rank(self.rank, self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.init != "zero" and (self.alpha is not None or self.rslora):
            raise ValueError(
                f'init="{self.init}" finds A and B for a scaling of 1; leave out alpha and rslora'
            )

    @property
    def scaling(self) -> float:
        """The factor of the low-rank product."""
        if self.init != "zero":
            return 1.0
        return scaling_of(self.rank, self.alpha, self.rslora)

    @property
    def needs_floats(self) -> bool:  # type: ignore[override]
        """Whether the start reads the matrix before it was quantized."""
        return self.init != "zero"

    @property
    def needs_gram(self) -> bool:  # type: ignore[override]
        """Whether the start reads the second moment of the inputs."""
        return self.init == "cloq"

    def labels(self, format: Any) -> Mapping[str, str]:
        return {A: A, B: B, **({MAGNITUDE: MAGNITUDE} if self.dora else {})}

    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices [k, n] in this format can be adapted this way."""
        check_fits(self.rank, k, n)
        if format.latent and (self.dora or self.init in ("pissa", "loftq")):
            what = "dora=True needs" if self.dora else f'init="{self.init}" quantizes'
            raise ValueError(f"{what} a matrix that stays as it is, but this one is in training")

    def start(self, format: Any, data: Data, known: Known) -> Data:
        if self.init == "zero":
            a, b = random_a(known.key, known.k, self.rank), jnp.zeros((self.rank, known.n))
        else:
            if known.floats is None:
                raise ValueError(
                    f'init="{self.init}" needs the float tree that was quantized: pass floats='
                )
            start = STARTS[self.init]
            data, a, b = start(format, data, known.floats, known.gram, self.rank)
        data = {**data, A: a.astype(self.dtype), B: b.astype(self.dtype)}
        if not self.dora:
            return data
        w = format.decode(data, known.k)
        whole = w + self.scaling * (a @ b)
        norms = {MAGNITUDE: jnp.linalg.norm(whole, axis=0), NORM: jnp.sum(w**2, axis=0)}
        return data | norms

    def product(
        self, format: Any, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        y = frozen_product(format, form, x, base_of(data), of_inputs)
        y = y + self.scaling * self._path(x, data)
        return y * self._factors(format, data, x.shape[-1]) if self.dora else y

    def product_transposed(
        self, format: Any, g: Float[Array, "m n"], data: Data, k: int
    ) -> Float[Array, "m k"]:
        if self.dora or IDS in data:
            return super().product_transposed(format, g, data, k)
        y = format.matmul_transposed(g, base_of(data), k)
        a, b = data[A].astype(g.dtype), data[B].astype(g.dtype)
        return y + self.scaling * jnp.dot((g @ b.T), a.T, preferred_element_type=jnp.float32)

    def _path(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m n"]:
        """Return (x A) B, with the adapter that the rows ask for if there are several."""
        a, b = data[A].astype(x.dtype), data[B].astype(x.dtype)
        _check_selected(data)
        x = dropped(x, self.dropout, data[A])
        if IDS not in data:
            inner = jnp.dot(x, a, preferred_element_type=jnp.float32).astype(x.dtype)
            return jnp.dot(inner, b, preferred_element_type=jnp.float32)
        ids = data[IDS]
        if len(x) % len(ids):
            raise ValueError(
                f"adapters were selected for a batch of {len(ids)}, but the inputs have {len(x)} "
                "rows, which is not a multiple: the batch must be the first axis of the inputs"
            )
        of_each = x.reshape(len(ids), len(x) // len(ids), -1)
        product = lambda x, w: jnp.einsum("btk,bkn->btn", x, w, preferred_element_type=jnp.float32)
        of = lambda w: jnp.take(w, ids, axis=0, mode="fill", fill_value=jnp.nan)
        y = product(product(of_each, of(a)).astype(x.dtype), of(b))
        return y.reshape(len(x), -1)

    def _factors(self, format: Format, data: Data, k: int) -> Float[Array, " n"]:
        """Return magnitude / norm for every column of W + scaling A B, without decoding W.

        |W + sAB|^2 = |W|^2 + 2 s <A^T W, B> + s^2 <A^T A B, B>, column by column.
        """
        a, b = (jax.lax.stop_gradient(data[name]).astype(jnp.float32) for name in (A, B))
        across = format.matmul(a.T, jax.lax.stop_gradient(base_of(data)))
        own = (a.T @ a) @ b
        s = self.scaling
        norm2 = data[NORM] + jnp.sum((2 * s * across + s * s * own) * b, axis=0)
        norm2 = jax.lax.stop_gradient(norm2)
        norm = jnp.sqrt(jnp.where(norm2 > 0, norm2, 1.0))
        return jnp.where(norm2 > 0, data[MAGNITUDE] / norm, 0.0)  # a column of zeros stays zero

    def value(self, format: Any, data: Data, k: int) -> Float[Array, "k n"]:
        if IDS in data:
            raise ValueError("several adapters are selected by row: no one matrix has them all")
        _check_selected(data)
        a, b = data[A].astype(jnp.float32), data[B].astype(jnp.float32)
        w = format.decode(base_of(data), k) + self.scaling * (a @ b)
        return w * self._factors(format, data, k) if self.dora else w


OWN = (A, B, MAGNITUDE, NORM, IDS)


def _check_selected(data: Data) -> None:
    """Raise ValueError for a weight with several adapters of which none is selected."""
    if data[A].ndim == 3 and IDS not in data:
        raise ValueError(
            f"the weight has {len(data[A])} adapters: say which one every row of a batch uses, "
            "with jaxquant.training.selected(params, ids)"
        )


def base_of(data: Data) -> Data:
    """Return the arrays of the frozen matrix, without those of the adapter.

    Args:
      data: all arrays of an adapted matrix.
    """
    return {name: a for name, a in data.items() if name not in OWN}


def random_a(key: Array, k: int, rank: int) -> Float[Array, "k r"]:
    """Return A at the start of training: uniform within 1 / sqrt(k) of zero, as in PEFT.

    Args:
      key: PRNG key.
      k: number of rows.
      rank: number of columns.
    """
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (k, rank), jnp.float32, -bound, bound)


def scaling_of(rank: int, alpha: float | None, rslora: bool = False) -> float:
    """Return the factor of a low-rank product, alpha / rank.

    Args:
      rank: rank of the product.
      alpha: numerator; None for twice the rank.
      rslora: divide by the root of the rank instead.
    """
    return (2 * rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


def check_rank(rank: int, alpha: float | None) -> None:
    """Raise ValueError unless a rank and an alpha are in range.

    Args:
      rank: at least 1.
      alpha: positive, or None.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")


def check_fits(rank: int, k: int, n: int) -> None:
    """Raise ValueError if a rank exceeds that of a matrix.

    Args:
      rank: the rank of an adapter.
      k, n: the shape of the matrix.
    """
    if rank > min(k, n):
        raise ValueError(
            f"rank {rank} exceeds that of a matrix [{k}, {n}]; use at most {min(k, n)}, or leave "
            "this weight out of targets"
        )
