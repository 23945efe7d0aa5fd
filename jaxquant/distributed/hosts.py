"""Programs that run on several hosts, built on `jax.distributed`."""

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

LOST = 70  # exit status of a host that ends because another host was lost
SIGABRT = 6
LINGER = 2.0  # seconds
# Texts by which to recognize the error of a collective that failed because of another host.
GONE = ("Gloo", "Connection closed", "Connection reset", "coordination service", "UNAVAILABLE")


class HostLost(RuntimeError):
    """Another host of the program has ended or cannot be reached."""


@contextlib.contextmanager
def joined(
    coordinator: str, count: int, index: int, *, wait: int = 60, patience: int = 20
) -> Iterator[None]:
    """Connect this process to the other hosts of a program, within a `with` block.

    Every host runs the same program with its own `index`, and must enter the block before its first
    use of JAX's devices. Inside the block, `jax.devices()` lists the devices of all hosts.

    If a host ends before the others have left the block, or leaves the block with an error, the
    others end too. A host that was computing together with the lost one raises `HostLost`; any
    other host writes the same message to stderr and ends with exit status 70. After an error in the
    block, a process cannot use JAX any more and can only end. Its exit status is then 70 for
    `HostLost` and 1 for any other error, and `atexit` handlers registered earlier do not run.

    Args:
      coordinator: "address:port" of host 0. The port must be free on host 0, and the other hosts
        must be able to reach it.
      count: number of hosts, 1 or more. With 1, the block runs in this process alone.
      index: number of this host, from 0 to count - 1.
      wait: seconds within which all hosts must start, 1 or more. Default: 60.
      patience: seconds without an answer after which a host counts as lost, 10 or more. Default:
        20.
    Yields:
      None.
    Raises:
      ValueError: an argument is out of range.
      HostLost: not all hosts started in time, or another host was lost.

    >>> with joined("127.0.0.1:8476", count=1, index=0):
    ...     jax.process_count()
    1
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
        f"{me}: not all hosts arrived at {coordinator} within {wait} s; start all of them within "
        "this time, or pass a larger wait"
    )
    with _explained(late):
        try:
            jax.distributed.initialize(
                coordinator, count, index, initialization_timeout=wait,
                heartbeat_timeout_seconds=patience,
            )  # fmt: skip
        except RuntimeError as error:
            raise HostLost(f"{late} ({str(error).splitlines()[0]})") from error
    lost = (
        f"{me}: another host has ended or cannot be reached; run the same command again on all "
        "hosts"
    )
    with _explained(f"{lost} (unless a message above gives another reason for the abort)"):
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
    """A mapping of finished work that host 0 stores for all hosts; see `folder`.

    All hosts must make the same calls in the same order.

    Args:
      inner: the mapping that stores the work, on host 0; None on the others.
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
    """Open a folder of finished work on host 0 as a mapping for all hosts, within a `with` block.

    Pass the mapping as `finished=` to `jaxquant.calibrate`, `quantize`, `heal` or `qat`. A repeated
    run then resumes after the last finished entry. Entries that were stored with other values of
    `run` are deleted. In a program of a single process, the mapping is a
    `jaxquant.durable.store.Folder`. Otherwise, all hosts must call `folder`, and must use the
    mapping in the same order; only host 0 reads and writes files.

    Args:
      path: the folder on host 0, which is created if it is missing.
      run: JSON values that determine the results, such as the bits per weight; they must be equal
        on all hosts.
    Yields:
      A mutable mapping from names to dicts of arrays.
    Raises:
      ValueError: another process uses the folder; its files were not made by jaxquant; `run`
        differs between hosts; or an argument has the wrong type.
      OSError: the folder cannot be created or read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path, folder(path, {"bits": 4}) as finished:
    ...     finished["w"] = {"codes": np.arange(3)}
    ...     list(finished)
    ['w']
    """
    check_arguments(folder, locals())
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
    """End this process without waiting for the other hosts, for which JAX would wait.

    Args:
      status: exit status.
      linger: seconds to wait before the end. The other hosts are aborted when host 0 ends, so host
        0 gives them this time to report errors of their own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(status)


def _check(coordinator: str, count: int, index: int, wait: int, patience: int) -> None:
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            'coordinator must be "address:port" of host 0, such as "10.0.0.1:8476", with a port '
            f"from 1 to 65535, got {coordinator!r}"
        )
    if count < 1:
        raise ValueError(f"count must be the number of hosts, at least 1, got {count}")
    if not 0 <= index < count:
        raise ValueError(
            f"index must be from 0 to {count - 1}, since count is {count}, got {index}"
        )
    if wait < 1 or patience < 10:
        raise ValueError(
            f"wait must be at least 1 and patience at least 10 seconds, got {wait} and {patience}"
        )


def _reach(coordinator: str, me: str, wait: int) -> None:
    """Wait until host 0 answers; raise HostLost if it does not answer in time."""
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
                    "start host 0, or correct the address"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def _explained(message: str) -> Iterator[None]:
    """Within the block, print `message` if JAX aborts this process, and end with status `LOST`.

    JAX's coordination service aborts a process from one of its own threads when another process is
    lost. No Python exception can be raised at that point.
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
