"""PEQA and E2E-QP: scales, offsets and codebooks of a matrix are trained, its codes stay."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapters.adapted import cast_through, served_product
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Adapter, Data, Format, Known

SCALE = "scale"


@dataclasses.dataclass(frozen=True)
class PEQA(Adapter):
    """y = x W, where the continuous arrays of W are trained: scales, offsets, codebooks.

    These are the arrays `trained` of its format; codes and zero points are fixed.
    It adds no bytes, and the merged model computes what was trained, bit for bit: training uses the
    arrays as they will be stored.

    Attributes:
      only: name of the only array to train, such as "scale". Default: "", for all that the format
        can train. Offsets are trained together with their scales, by which their steps are
        measured.
    Raises:
      ValueError: `only` is "offset"; or, at `jaxquant.adapt`, the format has no such array.

    Source: PEQA (Kim et al. 2023, arXiv:2305.14152) and the second phase of EfficientQAT, E2E-QP
    (Chen et al. 2024, arXiv:2407.11062), which train the scales.

    >>> import jaxquant as jq
    >>> PEQA().labels(jq.formats.Integer()), sorted(PEQA().labels(jq.formats.Additive(2, 4, 4)))
    ({'scale': 'scale'}, ['codebooks', 'scale'])
    """

    only: str = ""

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.only == "offset":
            raise ValueError(
                'only="offset" would train offsets without the scales that measure their steps: '
                'use PEQA() for both, or only="scale"'
            )

    def labels(self, format: Any) -> Mapping[str, str]:
        return dict.fromkeys(self._names(format), SCALE)

    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices [k, n] in this format can be adapted this way."""
        if not self._names(format):
            wanted = repr(self.only) if self.only else "nothing continuous"
            raise ValueError(
                f"{format} can train {', '.join(format.trained) or 'nothing'}, but PEQA was asked "
                f"for {wanted}; LoRA adapts every format"
            )

    def _names(self, format: Format) -> tuple[str, ...]:
        return tuple(n for n in format.trained if not self.only or n == self.only)

    def start(self, format: Any, data: Data, known: Known) -> Data:
        return {**data, **{n: data[n].astype(jnp.float32) for n in self._names(format)}}

    def product(
        self, format: Any, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        return served_product(format, form, x, self._stored(format, data, x.shape[-1]), of_inputs)

    def value(self, format: Any, data: Data, k: int) -> Float[Array, "k n"]:
        return format.decode(self._stored(format, data, k), k)

    def merged(self, format: Any, data: Data, k: int) -> Data:
        dtypes = self._dtypes(format, data, k)
        stored = self._stored(format, data, k)
        return {name: a.astype(dtypes.get(name, a.dtype)) for name, a in stored.items()}

    def _stored(self, format: Any, data: Data, k: int) -> Data:
        """Return the packed arrays with the trained ones as they will be stored, in float32."""
        dtypes = self._dtypes(format, data, k)
        return {**data, **{n: cast_through(data[n], d) for n, d in dtypes.items()}}

    def _dtypes(self, format: Any, data: Data, k: int) -> dict[str, str]:
        shapes = format.shapes(k, format.outputs(data))
        return {name: shapes[name].dtype.name for name in self._names(format)}
