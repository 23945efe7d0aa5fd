"""What formats with an op of their own share: products by the kernel table, look-ups, decoding."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from jaxquant.formats.tiled_format import TiledFormat
from pallas_kernels import dispatch, reference


class OpFormat(TiledFormat):
    """Base of a format that names its op's `storage` and says how its data are the `arguments`.

    The storage is one of `pallas_kernels.reference.STORAGES`; products are `{storage}_matmul`.
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
        """x @ w of several matrices, in one call where the platform has one."""
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
        """Columns that the packed arrays hold."""
        return data["codes"].shape[-1]
