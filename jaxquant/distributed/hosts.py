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

from jaxquant.core import hosts, jax_private
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
def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 60,
    heartbeat_timeout_seconds: int = 20,
) -> Iterator[None]:
    """Connect this process to the other hosts of a program, within a `with` block.

    It wraps `jax.distributed.initialize`, and adds clear errors. Every host runs the same program,
    and must enter the block before its first use of JAX's devices. Inside the block,
    `jax.devices()` lists the devices of all hosts.

    If a host ends before the others have left the block, or leaves the block with an error, the
    others end too. A host that was computing together with the lost one raises `HostLost`; any
    other host writes the same message to stderr and ends with exit status 70. After an error in the
    block, a process cannot use JAX any more and can only end. Its exit status is then 70 for
    `HostLost`, that of a `SystemExit`, and 1 for any other error; `atexit` handlers registered
    earlier do not run.

    Args:
      coordinator_address: "address:port" of host 0. The port must be free on host 0, and the other
        hosts must be able to reach it. Default: None, for which JAX finds this and the next two
        arguments itself, on TPU pods, under Slurm and under Open MPI.
      num_processes: number of hosts, 1 or more. With 1, the block runs in this process alone.
      process_id: number of this host, from 0 to num_processes - 1.
      initialization_timeout: seconds within which all hosts must start, 1 or more. Default: 60.
      heartbeat_timeout_seconds: seconds without an answer after which a host counts as lost, 10 or
        more. Default: 20.
    Yields:
      None.
    Raises:
      ValueError: an argument is out of range, or some of the first three are missing.
      RuntimeError: the process is connected, or has used JAX's devices, already.
      HostLost: not all hosts started in time, or another host was lost.

    >>> with initialize("127.0.0.1:8476", num_processes=1, process_id=0):
    ...     jax.process_count()
    1
    """
    check_arguments(initialize, locals())
    _check_timeouts(initialization_timeout, heartbeat_timeout_seconds)
    me, address = "this host", "the coordinator"
    if coordinator_address is not None or num_processes is not None or process_id is not None:
        address = _checked_address(coordinator_address, num_processes, process_id)
        if num_processes == 1:
            yield
            return
        me = f"host {process_id} of {num_processes}"
        if process_id:
            _reach(address, me, initialization_timeout)
    late = (
        f"{me}: not all hosts arrived at {address} within {initialization_timeout} s; start all of "
        "them within this time, or pass a larger initialization_timeout"
    )
    with _explained(late):
        try:
            jax.distributed.initialize(
                coordinator_address, num_processes, process_id,
                initialization_timeout=initialization_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            )  # fmt: skip
        except ValueError as error:
            if coordinator_address is not None:
                raise
            raise ValueError(
                f"JAX recognizes no cluster on this machine ({error}); pass coordinator_address, "
                "num_processes and process_id"
            ) from error
        except RuntimeError as error:
            if "only be called once" in str(error):
                raise RuntimeError(
                    f"{me} is connected already: enter jaxquant.distributed.initialize once, and "
                    "do not call jax.distributed.initialize before"
                ) from error
            if "before any JAX calls" in str(error):
                raise RuntimeError(
                    f"{me} has used JAX already: enter jaxquant.distributed.initialize before the "
                    "first use of arrays or devices"
                ) from error
            raise HostLost(f"{late} ({str(error).splitlines()[0]})") from error
    lost = (
        f"{me}: another host has ended or cannot be reached; run the same command again on all "
        "hosts"
    )
    with _explained(f"{lost} (unless a message above gives another reason for the abort)"):
        left: SystemExit | None = None
        try:
            try:
                yield
            except SystemExit as error:  # status 0 is no error
                if error.code:
                    raise
                left = error
            hosts.wait("the end")
        except BaseException as error:
            of_jax = isinstance(error, ValueError | jax.errors.JaxRuntimeError)
            gone = of_jax and any(sign in str(error) for sign in GONE)
            status = LOST if gone else _status(error)
            atexit.register(_leave, status, LINGER if jax_private.process_id() == 0 else 0.0)
            if gone:
                raise HostLost(f"{lost} ({str(error).splitlines()[0]})") from error
            raise
        jax.distributed.shutdown()
    if left is not None:
        raise left


class Shared(MutableMapping):
    """A mapping of finished work that host 0 stores for all hosts; see `shared_store`.

    All hosts must make the same calls in the same order.

    Args:
      inner: the mapping that stores the work, on host 0; None on the others.
      replaced: names of the values of `run` that differed in the run stored before; see `Folder`.
    """

    def __init__(
        self,
        inner: MutableMapping[str, Mapping[str, Any]] | None,
        replaced: tuple[str, ...] = (),
    ) -> None:
        self.inner, self.replaced = inner, replaced

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
def shared_store(path: str | Path, run: Mapping[str, Any]) -> Iterator[MutableMapping]:
    """Open a folder of finished work on host 0 as a mapping for all hosts, within a `with` block.

    Pass the mapping as `finished=` to `jaxquant.calibrate`, `quantize`, `heal` or `qat`. A repeated
    run then resumes after the last finished entry. Entries that were stored with other values of
    `run` are deleted, and the mapping's attribute `replaced` names these values. In a program of a
    single process, the mapping is a `jaxquant.durable.store.Folder`. Otherwise, all hosts must call
    `shared_store`, and must use the mapping in the same order; only host 0 reads and writes files.

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
    >>> with tempfile.TemporaryDirectory() as path, shared_store(path, {"bits": 4}) as finished:
    ...     finished["w"] = {"codes": np.arange(3)}
    ...     list(finished)
    ['w']
    """
    check_arguments(shared_store, locals())
    if not hosts.several():
        with Folder(path, run) as store:
            yield store
        return
    with contextlib.ExitStack() as held:
        opened: list[Any] = []

        def start() -> list[str]:
            opened.append(held.enter_context(Folder(path, run)))
            return list(opened[0].replaced)

        hosts.agree(run=dict(run))
        replaced = hosts.first(start)
        yield Shared(opened[0] if opened else None, tuple(replaced))


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


def _status(error: BaseException) -> int:
    """Return the exit status of a process that ends with an error."""
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def _check_timeouts(start: int, heartbeat: int) -> None:
    if start < 1 or heartbeat < 10:
        raise ValueError(
            "initialization_timeout must be at least 1 and heartbeat_timeout_seconds at least 10 "
            f"seconds, got {start} and {heartbeat}"
        )


def _checked_address(address: str | None, count: int | None, index: int | None) -> str:
    """Return the coordinator's address; raise ValueError unless host `index` of `count` exists."""
    if address is None or count is None or index is None:
        raise ValueError(
            "pass coordinator_address, num_processes and process_id together, or none of them on a "
            f"cluster that JAX recognizes; got {address!r}, {count} and {index}"
        )
    _, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            'coordinator_address must be "address:port" of host 0, such as "10.0.0.1:8476", with a '
            f"port from 1 to 65535, got {address!r}"
        )
    if count < 1:
        raise ValueError(f"num_processes must be the number of hosts, at least 1, got {count}")
    if not 0 <= index < count:
        raise ValueError(
            f"process_id must be from 0 to {count - 1}, since num_processes is {count}, got {index}"
        )
    return address


def _reach(coordinator: str, me: str, wait: int) -> None:
    """Wait until host 0 answers; raise HostLost if it does not answer in time."""
    address, _, port = coordinator.rpartition(":")
    until = time.monotonic() + wait
    while True:
        try:
            left = max(0.1, until - time.monotonic())
            with socket.create_connection((address, int(port)), timeout=left):
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
