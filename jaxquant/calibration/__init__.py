"""Calibration: statistics of the inputs of every matmul, collected in a backward pass."""

from jaxquant.calibration.observation import Observation, observe

__all__ = ["Observation", "observe"]
