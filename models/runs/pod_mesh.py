"""The mesh of a plan: given, or the one that splits a model over most devices."""

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

    By default "model" is the largest number of devices that divides the key-value heads and leaves
    whole groups, words and tiles of every weight. "expert" splits the experts of a mixture over
    what the batch leaves; "data" is the rest.

    Args:
      request: the request.
      weights: its packed shapes.
    Raises:
      ValueError: the given axes do not multiply to the devices of the slice, or no mesh suits.
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
    raise ValueError(f"{request.where.name}: no mesh of its devices splits this model: {why}")


def mesh_of_text(text: str) -> Axes:
    """Return the axes that an option such as "data=16,model=16" names.

    Args:
      text: pairs NAME=SIZE, separated by commas.
    Raises:
      ValueError: the text does not have this form, or an axis is unknown or named twice.

    >>> mesh_of_text("data=4,model=8")
    (('data', 4), ('model', 8))
    """
    pairs = [part.strip().partition("=")[::2] for part in text.split(",")]
    names = [name for name, _ in pairs]
    right = all(name in NAMES and size.isdecimal() and int(size) for name, size in pairs)
    if not right or len(set(names)) < len(names):
        raise ValueError(
            f"--mesh takes sizes of the axes {', '.join(NAMES)}, as in data=4,model=8, got {text!r}"
        )
    return tuple((name, int(size)) for name, size in pairs)


def shown(axes: Axes) -> str:
    """Return axes in the form of the option `--mesh`.

    Args:
      axes: name and size of each axis.
    """
    return ",".join(f"{name}={size}" for name, size in axes)


def _check(request: PodRequest) -> None:
    product, devices = math.prod(size for _, size in request.mesh), request.where.devices
    if product != devices:
        raise ValueError(
            f"the mesh {shown(request.mesh)} has {product} devices, but {request.where.name} has "
            f"{devices}"
        )


def _candidates(request: PodRequest) -> Iterator[Axes]:
    """Yield the meshes to try, those with the largest "model" first."""
    devices, config = request.where.devices, request.config
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
