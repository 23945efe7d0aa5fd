"""What formats without an op of their own share: products and look-ups by decoding tiles."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from jaxquant.core.protocols import Format
from jaxquant.formats.scales import check_wide, rescaled
from pallas_kernels import activations as forms
from pallas_kernels import tiled_product


class TiledFormat(Format):
    """Base of a format that says `spans`, and whose `decode` takes a part of the columns.

    See `pallas_kernels.tiled_product` for both. Its scales are float32 unless it says otherwise.
    """

    wide: bool = True

    @property
    def spans(self) -> Mapping[str, int]:
        """Columns that one entry along the last axis of each array covers."""
        raise NotImplementedError

    def check(self, w: Float[Array, "k n"]) -> str:
        """What these weights lose to the range of the format, in words; "" if nothing.

        Raises:
          ValueError: they are outside the range.
        """
        return check_wide(w)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """The data of a matrix 2**e times as large; exact within the range of its scales."""
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
        """Columns that the packed arrays hold."""
        return tiled_product.outputs(data, self.spans)
