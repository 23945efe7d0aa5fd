"""Base of formats with a kernel op of their own, which computes matmuls, look-ups and decoding."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from jaxquant.formats.tiled_format import TiledFormat
from pallas_kernels import dispatch, reference

# Metadata of a field that holds a whole number of bits; `check_fields` adds it to its message.
WHOLE_BITS = {float: "the methods trellis and entropy_coded take fractions of a bit"}


class OpFormat(TiledFormat):
    """Base of a format that names its op by `storage` and maps packed arrays to its `arguments`.

    The storage is one of `pallas_kernels.reference.STORAGES`; matmuls call `{storage}_matmul`.
    """

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        arrays, static = self.arguments(data, x.shape[-1])
        return dispatch.product(
            f"{self.storage}_matmul", x, *arrays, **static, activations=activations
        )

    def matmuls(
        self, x: Float[Array, "m k"], several: Sequence[dict[str, Array]], activations: str
    ) -> tuple[Float[Array, "m n"], ...]:
        """Return x @ w for several matrices, in one call where the platform supports it."""
        of_each = [self.arguments(data, x.shape[-1]) for data in several]
        (static,) = {tuple(sorted(static.items())) for _, static in of_each}
        return dispatch.products(
            f"{self.storage}_matmul", x, [arrays for arrays, _ in of_each], **dict(static),
            activations=activations,
        )  # fmt: skip

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        arrays, static = self.arguments(data, k)
        return dispatch.product(f"{self.storage}_matmul_transposed", g, *arrays, **static, k=k)

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        arrays, static = self.arguments(data, k)
        return reference.weights(self.storage, *arrays, **static, k=k)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        arrays, static = self.arguments(data, k)
        return reference.columns(self.storage, ids, *arrays, **static, k=k)

    def outputs(self, data: dict[str, Array]) -> int:
        """Return the number of columns in the packed arrays."""
        return data["codes"].shape[-1]
