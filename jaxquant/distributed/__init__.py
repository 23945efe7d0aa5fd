"""Models on several devices and several hosts, built on JAX's own distributed runtime."""

from jaxquant.distributed.hosts import HostLost, folder, joined
from jaxquant.distributed.shardings import sharding

__all__ = ["HostLost", "folder", "joined", "sharding"]
