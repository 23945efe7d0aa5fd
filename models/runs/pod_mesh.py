"""The mesh of a plan: the given one, or by default the one with the largest "model" axis."""

import math
from collections.abc import Iterator

from jaxtyping import PyTree

from jaxquant_models.architectures.shardings import model_sharding
from jaxquant_models.runs.pod_programs import abstract_mesh
from jaxquant_models.runs.pod_request import PodRequest

Axes = tuple[tuple[str, int], ...]
NAMES = ("data", "expert", "model")


def mesh_of(request: PodRequest, weights: PyTree) -> Axes:
    """Return the names and sizes of the mesh axes of a request.

    By default, "model" is the largest divisor of the number of devices and of the key-value heads
    whose shards consist of whole groups, words and tiles of every weight. For a mixture of experts,
    "expert" divides the experts over those devices that the batch does not need. "data" is the
    rest.

    Args:
      request: the request.
      weights: the shapes of its packed weights.
    Raises:
      ValueError: the product of the given sizes is not the number of devices of the slice; "expert"
        is given for a model without experts; or no default mesh splits the model evenly.
    """
    if request.mesh:
        _check(request)
        return request.mesh
    why = ""
    for axes in _candidates(request):
        try:
            model_sharding(weights, request.config, abstract_mesh(axes))
            return axes
        except ValueError as error:
            why = why or str(error)
    raise ValueError(
        f"{request.topology.name}: no default mesh of its devices splits this model evenly "
        f"({why}); give --mesh, or another slice"
    )


def mesh_of_text(text: str) -> Axes:
    """Return the mesh axes that a value of `--mesh` describes.

    Args:
      text: pairs NAME=SIZE, separated by commas, such as "data=16,model=16". The names are among
        "data", "expert" and "model", and the sizes are at least 1.
    Raises:
      ValueError: the text does not have this form, or it names an axis that is unknown, or one
        axis twice.

    >>> mesh_of_text("data=4,model=8")
    (('data', 4), ('model', 8))
    """
    pairs = [part.strip().partition("=")[::2] for part in text.split(",")]
    names = [name for name, _ in pairs]
    right = all(name in NAMES and size.isdecimal() and int(size) for name, size in pairs)
    if not right or len(set(names)) < len(names):
        raise ValueError(
            f"--mesh takes sizes of the axes {', '.join(NAMES)}, each at most once, as in "
            f"data=4,model=8, got {text!r}"
        )
    return tuple((name, int(size)) for name, size in pairs)


def shown(axes: Axes) -> str:
    """Return mesh axes in the form of the option `--mesh`.

    Args:
      axes: name and size of each axis.

    >>> shown((("data", 4), ("model", 8)))
    'data=4,model=8'
    """
    return ",".join(f"{name}={size}" for name, size in axes)


def _check(request: PodRequest) -> None:
    if "expert" in dict(request.mesh) and not request.config.n_experts:
        raise ValueError(
            f"the mesh {shown(request.mesh)} splits experts, but the model has none; give --mesh "
            "sizes of the axes data and model only"
        )
    product, devices = math.prod(size for _, size in request.mesh), request.topology.devices
    if product != devices:
        raise ValueError(
            f"the mesh {shown(request.mesh)} has {product} devices, but {request.topology.name} "
            f"has {devices}; give --mesh sizes whose product is {devices}"
        )


def _candidates(request: PodRequest) -> Iterator[Axes]:
    """Yield the meshes to try, those with the largest "model" first."""
    devices, config = request.topology.devices, request.config
    for model in _divisors(math.gcd(devices, config.n_kv_heads)):
        rest = devices // model
        if not config.n_experts:
            yield (("data", rest), ("model", model))
            continue
        filled = math.gcd(rest, request.batch)
        expert = math.gcd(rest // filled, config.n_experts)
        yield (("data", rest // expert), ("expert", expert), ("model", model))


def _divisors(n: int) -> list[int]:
    """Return the divisors of a number, largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]
