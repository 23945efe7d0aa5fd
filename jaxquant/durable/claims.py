"""Claims: a directory of ours that one process works in, locked against all others."""

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
except ImportError:  # Windows has no flock; nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
OURS = b"jaxquant works in this directory\n"  # what the lock file of such a directory begins with
ATTEMPTS = 100  # at a directory that others remove just then


class Taken(ValueError):
    """Another run works in the directory."""


class Claim:
    """A directory that this process holds; `claim` makes one.

    The kernel holds the lock, so it is free as soon as the process has ended, by `kill -9` too.

    Attributes:
      path: the directory.
      scraps: names of files in it that need not stay when nothing else does.
      run, runs: what works in it, and how many of these; see `durable.store.Folder`.
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
        """Let go of the directory; one that holds nothing but scraps is removed."""
        with _guard:
            self._users -= 1
            if self._users == 0:
                self.end()

    def clear(self) -> None:
        """Remove the directory with everything in it, and let go of it, whoever else shares it."""
        with _guard:
            if _held.get(self._key) is self:
                for path in self.path.iterdir():
                    if path.name not in self.scraps:
                        _remove(path)
                self.end()

    def end(self) -> None:
        """As `close`, whoever else shares it."""
        with _guard:
            if _held.get(self._key) is not self:
                return
            del _held[self._key]
            # A forked process has the descriptor too, but the directory is not its own.
            if os.getpid() == self._process:
                with contextlib.suppress(OSError):
                    self._remove_scraps()
            os.close(self._descriptor)

    def _remove_scraps(self) -> None:
        """The lock is the last to go: what a kill leaves of this is still known as ours."""
        if not {path.name for path in self.path.iterdir()} <= self.scraps:
            return
        for name in sorted(self.scraps, key=lambda name: name == LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path, *self._made):  # innermost first; those that hold something stay
            folder.rmdir()


_held: dict[tuple[int, int], Claim] = {}  # by this process
_guard = threading.RLock()


def claim(path: str | Path, *, share: bool = True) -> Claim:
    """Hold a directory, made by this call if there is none, until `close` or the process ends.

    Args:
      share: whether another part of this process may hold it too.
    Raises:
      Taken: another process works in it; or, without `share`, this one does.
      ValueError: it is not a directory, or it holds files that are not ours.
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
                os.close(descriptor)  # removed by the one who held it
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
    raise Taken(f"{path} is removed and made again all the time; another run works there")


def is_ours(path: Path) -> bool:
    """Whether the directory was made by `claim`, or is empty."""
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
    # A kill between making the file and writing to it leaves it empty, and alone.
    return begins == OURS or (not begins and names == [LOCK])


def _opened(path: Path) -> int | None:
    """A descriptor of the directory's lock file; None if it was removed meanwhile."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(
            f"{path} is needed to work in, but it is not a directory: move it, or write elsewhere"
        ) from None
    try:
        if not is_ours(path):
            raise ValueError(
                f"{path} is needed to work in, but this version of jaxquant did not make its "
                f"files; nothing in it was touched: move it, or write elsewhere"
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
            f"cannot lock {path}: {error.strerror}; write to a file system that has locks"
        ) from error
    return True


def _is(path: Path, info: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), info)
    except FileNotFoundError:
        return False


def _signed(held: Claim, descriptor: int) -> Claim:
    """Who holds it; in place, so that at every moment the file begins as ours do."""
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
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another process"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
