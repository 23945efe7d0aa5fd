"""A request for a plan of a model on a slice of a TPU pod: everything that determines the plan."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jaxquant as jq
from jaxquant_models.architectures.config import LlamaConfig
from pallas_kernels.cost.topologies import Slice, slice_of

WORKLOADS = ("decode", "prefill", "qlora", "qat")
TRAINING = ("qlora", "qat")


@dataclasses.dataclass(frozen=True)
class PodRequest:
    """A model, how it is quantized, what a step does, and the slice that does it.

    Attributes:
      config: the architecture.
      recipe: the recipe that assigns a method to every weight.
      workload: one of `WORKLOADS`: "decode" is a step that adds one token to every sequence,
        "prefill" the step that reads prompts of `context` tokens; "qlora" and "qat" are training
        steps.
      batch: number of sequences, 1 or more.
      context: number of tokens per sequence, from 1 to the number of positions of the model. In
        decoding, it is the number of tokens for which the cache has room.
      topology: the slice.
      mesh: name and size of each mesh axis. Default: (), which selects the mesh of `mesh_of`.

    Raises:
      ValueError: a value is out of its range.
    """

    config: LlamaConfig
    recipe: jq.Recipe
    workload: str
    batch: int
    context: int
    topology: Slice
    mesh: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ValueError(
                f"workload must be one of {', '.join(WORKLOADS)}, got {self.workload!r}"
            )
        if min(self.batch, self.context) < 1:
            raise ValueError(
                f"batch and context must be at least 1, got {self.batch} and {self.context}"
            )
        if self.context > self.config.max_position:
            raise ValueError(
                f"a context of {self.context} tokens exceeds the {self.config.max_position} "
                f"positions of the model; give a context of at most {self.config.max_position}"
            )

    @property
    def trains(self) -> bool:
        """Whether the workload is a training step."""
        return self.workload in TRAINING

    @property
    def tokens(self) -> int:
        """Number of tokens of each sequence that one step reads."""
        return 1 if self.workload == "decode" else self.context

    def on(self, topology: Slice) -> "PodRequest":
        """Return the same request for another slice, with the default mesh.

        Args:
          topology: the other slice.
        """
        return dataclasses.replace(self, topology=topology, mesh=())

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON values; `from_json` is the inverse."""
        return {
            "config": self.config.to_json(),
            "recipe": self.recipe.to_json(),
            "workload": self.workload,
            "batch": self.batch,
            "context": self.context,
            "topology": self.topology.name,
            "mesh": [list(axis) for axis in self.mesh],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PodRequest":
        """Return the request that `to_json` serialized.

        Args:
          data: the dict that `to_json` returned.
        """
        return cls(
            LlamaConfig.from_json(data["config"]),
            jq.Recipe.from_json(data["recipe"]),
            data["workload"],
            data["batch"],
            data["context"],
            slice_of(data["topology"]),
            tuple((name, size) for name, size in data["mesh"]),
        )
