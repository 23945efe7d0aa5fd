"""Claims: directories that one process works in, locked against all others."""

import contextlib
import json
import os
import shutil
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock, so nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
OURS = b"jaxquant works in this directory\n"  # start of the lock file of our directories
ATTEMPTS = 100  # to lock a directory that others keep removing


class Taken(ValueError):
    """Another run is working in the directory."""


class Claim:
    """A directory held by this process, from `claim`.

    The kernel holds the lock, so it is released when the process ends, even by `kill -9`.

    Attributes:
      path: the directory.
      scraps: names of files in it that can be removed if nothing else is left.
      run, runs: what run works in it, and the number of its users; see `durable.store.Folder`.
    """

    def __init__(self, path: Path, descriptor: int, made: list[Path]) -> None:
        self.path = path
        self.scraps = {LOCK}
        self.run = ""
        self.runs = 0
        self._descriptor = descriptor
        self._made = made
        self._users = 1
        self._process = os.getpid()
        info = os.fstat(descriptor)
        self._key = info.st_dev, info.st_ino
        _held[self._key] = self

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory; remove it if it contains only scraps."""
        with _guard:
            self._users -= 1
            if self._users == 0:
                self.end()

    def clear(self) -> None:
        """Remove the directory with its contents, and release it for all parts of this process."""
        with _guard:
            if _held.get(self._key) is self:
                for path in self.path.iterdir():
                    if path.name not in self.scraps:
                        _remove(path)
                self.end()

    def end(self) -> None:
        """Release the directory as `close` does, for all parts of this process."""
        with _guard:
            if _held.get(self._key) is not self:
                return
            del _held[self._key]
            # A forked process inherits the descriptor, but does not own the directory.
            if os.getpid() == self._process:
                with contextlib.suppress(OSError):
                    self._remove_scraps()
            os.close(self._descriptor)

    def _remove_scraps(self) -> None:
        """Remove scraps, the lock last: after a kill the directory is still known to be ours."""
        if not {path.name for path in self.path.iterdir()} <= self.scraps:
            return
        for name in sorted(self.scraps, key=lambda name: name == LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path, *self._made):  # innermost first; rmdir fails on a non-empty one
            folder.rmdir()


_held: dict[tuple[int, int], Claim] = {}  # claims of this process, by device and inode
_guard = threading.RLock()


def claim(path: str | Path, *, share: bool = True) -> Claim:
    """Hold a directory until `close` or the end of the process, creating it if necessary.

    Args:
      path: the directory.
      share: whether another part of this process may hold it too.

    Returns:
      The `Claim`; the same object for all parts of a process that share it.

    Raises:
      Taken: another process works in it; or, without `share`, this process does.
      ValueError: it is not a directory, or contains files that are not ours.
    """
    path = Path(path)
    made = [p for p in path.parents if not p.exists()]
    with _guard:
        for _ in range(ATTEMPTS):
            if (descriptor := _opened(path)) is None:
                continue
            info = os.fstat(descriptor)
            if _locked(path, descriptor):
                if _is(path / LOCK, info):
                    return _signed(Claim(path, descriptor, made), descriptor)
                os.close(descriptor)  # its holder removed it meanwhile
                continue
            holder = _holder(descriptor)
            os.close(descriptor)
            mine = _held.get((info.st_dev, info.st_ino))
            if share and mine is not None and mine._process == os.getpid():
                mine._users += 1
                return mine
            raise Taken(
                f"{path} is in use by {holder}: wait until that run has ended, or write elsewhere"
            )
    raise Taken(
        f"{path} could not be claimed, because another run keeps removing and "
        "creating it: wait until that run has ended, or write elsewhere"
    )


def is_ours(path: Path) -> bool:
    """Return whether a directory was made by `claim` or is empty."""
    names = os.listdir(path)
    if not names:
        return True
    lock = path / LOCK
    try:
        if not stat.S_ISREG(lock.lstat().st_mode):
            return False
        with lock.open("rb") as file:
            begins = file.read(len(OURS))
    except FileNotFoundError:
        return False
    # A kill between creating and writing the lock file leaves it empty, and the only file.
    return begins == OURS or (not begins and names == [LOCK])


def _opened(path: Path) -> int | None:
    """Open the lock file of a directory; return None if it was removed in the meantime."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(
            f"{path} is needed as a working directory, but it is not a directory: "
            "move it, or write elsewhere"
        ) from None
    try:
        if not is_ours(path):
            raise ValueError(
                f"{path} is needed as a working directory, but this version of jaxquant "
                "did not write the files in it; nothing in it was changed: move it, or "
                "write elsewhere"
            )
        return os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None


def _locked(path: Path, descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(descriptor)
        raise OSError(
            f"cannot lock {path}: {error.strerror}; write to a file system that supports locks"
        ) from error
    return True


def _is(path: Path, info: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), info)
    except FileNotFoundError:
        return False


def _signed(held: Claim, descriptor: int) -> Claim:
    """Write the holder to the lock file, in place, so that it starts with `OURS` at all times."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    who = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    data = OURS + json.dumps(who).encode() + b"\n"
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, data)
        os.ftruncate(descriptor, len(data))
    except OSError as error:
        held.end()
        raise OSError(f"could not write {held.path / LOCK}: {error.strerror}") from error
    return held


def _holder(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        who: Any = json.loads(os.read(descriptor, 4096).removeprefix(OURS))
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written right now
        return "another process"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
