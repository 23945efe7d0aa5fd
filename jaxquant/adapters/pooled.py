"""QA-LoRA: a low-rank change of the offsets of groups, which stays inside the quantized grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapters.adapted import LORA_A as A
from jaxquant.adapters.adapted import LORA_B as B
from jaxquant.adapters.adapted import cast_through, frozen_product
from jaxquant.adapters.lora import base_of, check_fits, check_rank, random_a, scaling_of
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Adapter, Data, Format, Known, LevelFormat
from jaxquant.formats.offset import Offset, levels


@dataclasses.dataclass(frozen=True)
class QALoRA(Adapter):
    """y = x W + scaling * (pooled x A) B, with A [groups, rank] and B [rank, n] trained.

    The inputs of each group of rows are pooled, so the change of W is constant within a group, and
    a merge adds it to the offsets of the groups: nothing is rounded again. Training already uses
    the offsets as they will be stored, so the merged model computes what was trained: bit for bit,
    or up to the order of sums if inputs are rounded to fewer than 8 bits or with zero points.

    A weight whose format is not an `Offset` is put into one, whose offsets have the dtype of its
    scales. Zero points of integers become offsets, rounded to that dtype; other formats gain
    offsets, which are zero at first.

    Attributes:
      rank: number of columns of A, at least 1 and at most the number of groups.
      alpha: numerator of `scaling`, which is alpha / rank; positive. Default: twice the rank.
      pooling: "mean" (the default) or "sum" of the inputs of a group. With equal learning rates
        "sum" learns faster, by the number of inputs in a group.
      dtype: dtype in which A and B are kept, "bfloat16" or "float32" (the default).
    Raises:
      ValueError: a field is out of its range; or, at `jaxquant.adapt`, the rank exceeds what a
        matrix allows, or its format does not suit.

    Source: Xu et al. 2023, arXiv:2309.14717, and its released code, which pools by the mean. This
    implementation differs: the sum of offset and change is rounded to the storage dtype in training
    too, with a straight-through gradient.

    >>> QALoRA(rank=4, alpha=8).scaling
    2.0
    """

    rank: int
    alpha: float | None = None
    pooling: Literal["mean", "sum"] = "mean"
    dtype: Literal["bfloat16", "float32"] = "float32"

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_rank(self.rank, self.alpha)

    @property
    def scaling(self) -> float:
        """The factor of the low-rank change."""
        return scaling_of(self.rank, self.alpha)

    def labels(self, format: Any) -> Mapping[str, str]:
        return {A: A, B: B}

    def home(self, format: Any) -> Format:
        """Return the format with offsets in which the adapted matrix is stored."""
        return offset_format(format)

    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices [k, n] in this format can be adapted this way."""
        home = self.home(format)
        if not isinstance(home, Offset):
            raise ValueError(
                "QALoRA needs a format with groups of rows, such as Integer or NormalFloat without "
                f"double_quant, got {format}; LoRA adapts every format"
            )
        home.check_shape(k, n)
        groups = -(-k // home.rows_per_group(k))
        if groups < self.rank:
            raise ValueError(
                f"rank {self.rank} exceeds the {groups} groups of the {k} inputs; use a smaller "
                "rank or smaller groups"
            )
        check_fits(self.rank, groups, n)

    def start(self, format: Any, data: Data, known: Known) -> Data:
        home = self.home(format)
        data = data if home == format else with_offsets(format, home, data)
        groups = data["offset"].shape[0]
        a, b = random_a(known.key, groups, self.rank), jnp.zeros((self.rank, known.n))
        return {**data, A: a.astype(self.dtype), B: b.astype(self.dtype)}

    def product(
        self, format: Any, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        rounded = x if form is None else form.straight(x, of_inputs)
        y = frozen_product(format.format, form, x, levels(base_of(data)), of_inputs)
        return y + format.pooled(rounded) @ self._offset(format, data, x.shape[-1])

    def value(self, format: Any, data: Data, k: int) -> Float[Array, "k n"]:
        group = jnp.arange(k) // format.rows_per_group(k)
        fixed = format.format.decode(levels(base_of(data)), k)
        return fixed + self._offset(format, data, k)[group]

    def merged(self, format: Any, data: Data, k: int) -> Data:
        offset = self._offset(format, data, k).astype(format.dtype)
        return {**base_of(data), "offset": offset}

    def _offset(self, format: Offset, data: Data, k: int) -> Float[Array, "g n"]:
        """Return the offsets with their change, as they will be stored."""
        pool = format.rows_per_group(k) if self.pooling == "mean" else 1
        change = data[A].astype(jnp.float32) @ data[B].astype(jnp.float32)
        whole = data["offset"].astype(jnp.float32) + (self.scaling / pool) * change
        return cast_through(whole, format.dtype)


def offset_format(format: Any) -> Format:
    """Return the format with offsets that corresponds to a format; itself if there is none.

    Args:
      format: any format.
    """
    grouped = isinstance(format, LevelFormat) and format.group_size != "tensor"
    if not grouped or not format.learnable:
        return format
    levels = format
    if not format.symmetric:
        levels = dataclasses.replace(format, symmetric=True)
    return Offset(levels, format.scale_dtype)


def with_offsets(format: LevelFormat, home: Any, data: Data) -> Data:
    """Return the packed arrays of a matrix with offsets in the place of zero points.

    Args:
      format: the format of the matrix, with or without zero points.
      home: the format with offsets.
      data: the packed arrays of one matrix.
    """
    grid = format.stored_grid(data)
    zero = jnp.broadcast_to(format.zero_of(grid), grid.scale.shape)
    offset = (-grid.scale * zero).astype(home.dtype)
    return {**{name: a for name, a in data.items() if name != "zero"}, "offset": offset}
