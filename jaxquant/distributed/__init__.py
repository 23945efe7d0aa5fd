"""Models over several devices and several hosts, on JAX's own distributed engine."""

from jaxquant.distributed.hosts import HostLost, folder, joined
from jaxquant.distributed.shardings import sharding

__all__ = ["HostLost", "folder", "joined", "sharding"]
