"""Models on several devices and several hosts, built on JAX's own distributed runtime."""

from jaxquant.distributed.hosts import HostLost, initialize, shared_store
from jaxquant.distributed.shardings import sharding

__all__ = ["HostLost", "initialize", "sharding", "shared_store"]
