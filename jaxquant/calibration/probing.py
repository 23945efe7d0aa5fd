"""Probing: which weights of a function have a probe, and what the probes keep."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxtyping import PyTree

from jaxquant.calibration.observation import holders, planted, zeros
from jaxquant.calibration.statistics import Kept, Probe, Weighting
from jaxquant.core.paths import matches
from jaxquant.core.sites import Site


@dataclasses.dataclass(frozen=True)
class Probing:
    """Which weights of a function have a probe, and what each keeps.

    It is hashed by value, so that functions with equal probes share a compiled step.

    Attributes:
      held: paths and sites of the weights that have a probe.
      holder: path of a weight -> path of the weight that holds its statistics.
      weighting, gram, output, sample: as in `calibrate`.
    """

    held: tuple[tuple[str, Site], ...]
    holder: tuple[tuple[str, str], ...]
    weighting: Weighting
    gram: bool
    output: tuple[str, ...]  # globs of paths
    sample: int

    @staticmethod
    def of(
        found: dict[str, Site],
        weighting: Weighting,
        gram: bool,
        output: tuple[str, ...],
        sample: int,
    ) -> "Probing":
        """Place probes at the weights that a function multiplies by.

        Args:
          found: where the function uses its weights.
          weighting, gram, output, sample: as in `calibrate`.
        """
        # Gradient weights depend on a weight's own output, so moments of one input differ.
        holder = holders(found, shared=weighting != "gradient")
        held = tuple((p, found[p]) for p in dict.fromkeys(holder.values()))
        return Probing(held, tuple(holder.items()), weighting, gram, output, sample)

    def kept(self, path: str) -> Kept:
        """Return what to keep at a weight."""
        output = any(matches(path, glob) for glob in self.output)
        alike = dict(self.held)[path].covered is not None
        return Kept(self.gram, output, self.weighting, self.sample, alike)

    def probes(self) -> dict[str, Probe]:
        """Return zeros, by the path of the weight that holds the statistics."""
        return {p: zeros(site, self.kept(p)) for p, site in self.held}

    def planted(self, params: PyTree, probes: Mapping[str, Probe]) -> PyTree:
        """Return the parameters with stand-ins, whose products return statistics as cotangents."""
        return planted(params, self.held, probes, self.kept)

    def merged(self, a: dict[str, Probe], b: dict[str, Probe]) -> dict[str, Probe]:
        """Merge the statistics of two sets of batches."""
        return {p: self.kept(p).merged(a[p], b[p]) for p, _ in self.held}


def check_globs(found: Mapping[str, Site], globs: Sequence[str]) -> None:
    """Raise ValueError if a pattern of weights whose outputs are observed matches none.

    Args:
      found: where a function uses its weights.
      globs: the patterns.
    """
    paths = [path for path, site in found.items() if site.contracted]
    for glob in globs:
        if not any(matches(path, glob) for path in paths):
            raise ValueError(
                f"output: {glob!r} matches no weight that the function multiplies by; these are "
                f"{', '.join(paths[:6]) or 'none'}{', ...' * (len(paths) > 6)}"
            )
