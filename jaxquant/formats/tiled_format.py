"""Base of formats without a kernel op, which compute matmuls and look-ups by decoding tiles."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from jaxquant.core.protocols import Format
from jaxquant.formats.scales import check_wide, rescaled
from pallas_kernels import activations as forms
from pallas_kernels import tiled_product


class TiledFormat(Format):
    """Base of a format that defines `spans` and whose `decode` accepts a subset of the columns.

    See `pallas_kernels.tiled_product` for both. Scales are float32 unless a subclass says
    otherwise.
    """

    wide: bool = True

    @property
    def spans(self) -> Mapping[str, int]:
        """The number of columns that one entry along the last axis of each array covers."""
        raise NotImplementedError

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if the format loses precision on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the format.
        """
        return check_wide(w)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """Return the packed arrays of a matrix 2**e times as large.

        The result is exact within the range of the scales.
        """
        return rescaled(data, e, "scale")

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        return tiled_product.matmul(forms.rounded(x, activations), data, self.decode, self.spans)

    def matmul_transposed(
        self, x: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        x = forms.rounded(x, "float")
        return tiled_product.matmul_transposed(x, data, self.decode, self.spans, k)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        return tiled_product.columns(data, ids, self.decode, self.spans, k)

    def outputs(self, data: dict[str, Array]) -> int:
        """Return the number of columns in the packed arrays."""
        return tiled_product.outputs(data, self.spans)
