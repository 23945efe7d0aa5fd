"""A program over several hosts, on `jax.distributed`."""

import atexit
import contextlib
import ctypes
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.core import hosts
from jaxquant.core.arguments import check_arguments
from jaxquant.durable.store import Folder

LOST = 70  # exit status of a host that ends because another one did
SIGABRT = 6
LINGER = 2.0  # seconds
# What messages of collectives have in common that failed because of another host.
GONE = ("Gloo", "Connection closed", "Connection reset", "coordination service", "UNAVAILABLE")


class HostLost(RuntimeError):
    """Another host of the program has ended or cannot be reached."""


@contextlib.contextmanager
def joined(
    coordinator: str, count: int, index: int, *, wait: int = 60, patience: int = 20
) -> Iterator[None]:
    """Make this process one of several hosts of a program, within a `with` block.

    The other processes run the same program with their own `index`. Inside the block,
    `jax.devices()` are those of all of them. If a host ends before the others have left the block,
    or leaves it with an error, they end too: with `HostLost` where they were computing together,
    and otherwise with exit status 70 and the same message on stderr. After an error in the block a
    process can do nothing more with JAX but end.

    Args:
      coordinator: "address:port" of host 0, which must be free there.
      count: number of hosts, 1 or more. With 1 nothing is joined.
      index: number of this host, from 0.
      wait: seconds in which all hosts must have arrived, 1 or more. Default: 60.
      patience: seconds after which a host that no longer answers counts as lost, 10 or more.
        Default: 20.
    Raises:
      ValueError: an argument is out of range.
      HostLost: host 0 did not answer in time, or a host has ended.
    """
    check_arguments(joined, locals())
    _check(coordinator, count, index, wait, patience)
    if count == 1:
        yield
        return
    me = f"host {index} of {count}"
    if index:
        _reach(coordinator, me, wait)
    late = (
        f"{me}: not all hosts arrived at {coordinator} within {wait} s; start all of them, or wait "
        "longer"
    )
    with _explained(late):
        try:
            jax.distributed.initialize(
                coordinator, count, index, initialization_timeout=wait,
                heartbeat_timeout_seconds=patience,
            )  # fmt: skip
        except RuntimeError as error:
            raise HostLost(f"{late} ({str(error).splitlines()[0]})") from error
    lost = f"{me}: another host has ended or cannot be reached; run the same command again on all"
    with _explained(f"{lost} (unless this process was aborted for a reason that is given above)"):
        try:
            yield
            hosts.wait("the end")
        except BaseException as error:
            gone = any(sign in str(error) for sign in GONE)
            atexit.register(_leave, LOST if gone else 1, LINGER if index == 0 else 0.0)
            if gone:
                raise HostLost(f"{lost} ({str(error).splitlines()[0]})") from error
            raise
        jax.distributed.shutdown()


class Shared(MutableMapping):
    """A store of finished work that one host keeps for all; see `jaxquant.quantize`.

    Args:
      inner: the store, on the first host; None on the others.
    """

    def __init__(self, inner: MutableMapping[str, Mapping[str, Any]] | None) -> None:
        self.inner = inner

    def __getitem__(self, name: str) -> Mapping[str, np.ndarray]:
        found = hosts.arrays(lambda: None if self.inner is None else self.inner.get(name))
        if found is None:
            raise KeyError(name)
        return found

    def __setitem__(self, name: str, arrays: Mapping[str, Any]) -> None:
        whole = {key: hosts.on_host(a) for key, a in arrays.items()}

        def keep() -> None:
            if self.inner is not None:
                self.inner[name] = whole

        hosts.first(keep)

    def __delitem__(self, name: str) -> None:
        def drop() -> None:
            if self.inner is not None:
                del self.inner[name]

        hosts.first(drop)

    def __iter__(self) -> Iterator[str]:
        return iter(hosts.first(lambda: [] if self.inner is None else list(self.inner)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextlib.contextmanager
def folder(path: str | Path, run: Mapping[str, Any]) -> Iterator[MutableMapping]:
    """Open a store of finished work, on disk, which all hosts can use.

    Args:
      path: the folder, on the first host.
      run: JSON values that determine the results; see `jaxquant.durable.store.Folder`.
    Raises:
      ValueError: the folder is in use or holds another run.
    """
    if not hosts.several():
        with Folder(path, run) as store:
            yield store
        return
    with contextlib.ExitStack() as held:
        opened: list[Any] = []

        def start() -> None:
            opened.append(held.enter_context(Folder(path, run)))

        hosts.agree(run=dict(run))
        hosts.first(start)
        yield Shared(opened[0] if opened else None)


def _leave(status: int, linger: float) -> None:
    """End this process without waiting for the others, as JAX would.

    Args:
      status: exit status.
      linger: seconds in which the others can report an error of their own, which host 0 gives them:
        they are aborted when it ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(status)


def _check(coordinator: str, count: int, index: int, wait: int, patience: int) -> None:
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f'coordinator must be "address:port", got {coordinator!r}')
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"index must be in [0, {count}), the number of hosts, got {index}")
    if wait < 1 or patience < 10:
        raise ValueError(
            f"wait must be at least 1 and patience at least 10 seconds, got {wait} and {patience}"
        )


def _reach(coordinator: str, me: str, wait: int) -> None:
    """Return once host 0 answers; HostLost if it does not in time."""
    address, _, port = coordinator.rpartition(":")
    until = time.monotonic() + wait
    while True:
        try:
            with socket.create_connection((address, int(port)), timeout=wait):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise HostLost(
                    f"{me}: host 0 did not answer at {coordinator} within {wait} s ({error}); "
                    "start it, or correct the address"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def _explained(message: str) -> Iterator[None]:
    """Within the block, let a process that JAX aborts say why, and end with status `LOST`.

    JAX's coordination service aborts a process, from a thread of its own, when another one is lost.
    No exception of Python can be raised then.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def ended(_: int) -> None:
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
        os._exit(LOST)

    signal: Any = ctypes.CDLL(None).signal
    signal.argtypes, signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = signal(SIGABRT, ctypes.cast(ended, ctypes.c_void_p))
    try:
        yield
    finally:
        signal(SIGABRT, before)
