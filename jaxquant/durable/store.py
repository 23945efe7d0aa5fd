"""Storage for resuming: a folder that keeps what a long run has done, in case it is killed."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.durable.claims import Claim, Taken, claim

RUN = "run.json"
LAYOUT = "layout of what is kept"  # name of a number to increment when the stored arrays change
FILE = re.compile(r"[0-9a-f]{24}\.bin|(run|[0-9a-f]{24})\.aside")  # our files, temporary ones too
DIRECTORY = ".parts"  # ending of the names of directories
HEX = 64  # length of a SHA-256 in hexadecimal
Arrays = Mapping[str, Any]
Finished = MutableMapping[str, Arrays]  # results of a long run; on disk, a `Folder`


class Folder(MutableMapping[str, Arrays]):
    """A mapping on disk, from names to dicts of arrays; each entry is a file, written atomically.

    Arrays are restored bit for bit. Each file contains its SHA-256; a damaged file causes a warning
    and counts as missing. Entries of another run are deleted, or with `refuse` kept and reported as
    an error.

    The folder is held until `close`, `remove` or the end of the process; no other process can work
    in it. Files in it that are not its own are never touched.

    Args:
      path: the folder, created if necessary.
      run: JSON values that determine the results; another run is one with other values.
      refuse: whether entries of another run are an error.

    Attributes:
      replaced: names of the values in `run` that differed in the run stored here before; () if
        there was none.

    Raises:
      ValueError: another process, or another run of this process, works in the folder; its files
        were not made by jaxquant; or, with `refuse`, it contains another run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with Folder(place, {"seed": 1}) as kept:
    ...         kept["a"] = {"x": np.arange(3)}
    ...     with Folder(place, {"seed": 1}) as again:
    ...         found = again["a"]["x"].tolist(), list(again)
    ...     with Folder(place, {"seed": 2}) as other:
    ...         (*found, len(other), other.replaced)
    ([0, 1, 2], ['a'], 0, ('seed',))
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], *, refuse: bool = False) -> None:
        self.path = Path(path)
        self.replaced: tuple[str, ...] = ()
        text = json.dumps({**run, LAYOUT: 3}, sort_keys=True)
        held = _held(self.path, text)
        self.close = weakref.finalize(self, _leave, held)
        self._claim = held
        try:
            self._begin(text, refuse)
        except BaseException:
            self.close()
            raise

    def _begin(self, text: str, refuse: bool) -> None:
        mark = self.path / RUN
        kept = mark.read_bytes() if mark.is_file() else None
        if kept != text.encode():
            if kept is not None and self.started:
                self.replaced = _differences(kept, json.loads(text))
            if refuse and self.replaced:
                raise ValueError(
                    f"{self.path} holds another run, which differs in "
                    f"{', '.join(self.replaced)}. It was not changed: continue with the "
                    "options it began with, remove it, or write elsewhere"
                )
            self._forget()
            with _aside(mark) as file:
                file.write(text.encode())
        for left in self.path.glob("*.aside"):
            if FILE.fullmatch(left.name):
                left.unlink()

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __setitem__(self, name: str, arrays: Arrays) -> None:
        self.put(name, arrays)

    def put(self, name: str, arrays: Arrays, *, sync: bool = True) -> None:
        """Store an entry.

        Args:
          name: its name.
          arrays: its arrays.
          sync: whether to wait until the disk has it. If False, an entry may be damaged if the
            machine loses its power, but not if only the process is killed.
        """
        flat = {key: np.asarray(a) for key, a in arrays.items()}
        kinds = {key: [a.dtype.name, list(a.shape)] for key, a in flat.items()}
        head = json.dumps({"name": name, "arrays": kinds}).encode()
        _write(self._file(name), head + b"\n", flat, sync)

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        with self._sound(self._file(name), name) as found:
            if found is None:
                raise KeyError(name)
            return found.read()

    def __contains__(self, name: object) -> bool:
        with self._sound(self._file(str(name)), name) as found:
            return found is not None

    def __delitem__(self, name: str) -> None:
        try:
            self._file(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        for path in self._files():
            with self._sound(path) as found:
                if found is not None:
                    yield found.name

    def __len__(self) -> int:
        return len(self._files())

    @property
    def digest(self) -> str:
        """SHA-256 of the description of the run."""
        return digest(self.path)

    def remove(self) -> None:
        """Delete the entries of a finished run, and release the folder.

        The folder itself remains if it contains files that are not its own.
        """
        self._forget()
        with contextlib.suppress(FileNotFoundError):
            (self.path / RUN).unlink()
        self._claim.end()
        self.close()

    def directory(self, name: str) -> Path:
        """Return a directory in the folder for files of the run; it need not exist yet.

        It is deleted with the entries of the run. What is in it must be written atomically, and
        verified when it is read.

        Args:
          name: its name, of letters, digits and "-".
        """
        return self.path / f"{name}{DIRECTORY}"

    @property
    def started(self) -> bool:
        """Whether anything of the run is stored."""
        return is_started(self.path)

    def _files(self) -> list[Path]:
        return sorted(p for p in self.path.glob("*.bin") if FILE.fullmatch(p.name))

    def _forget(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)
        for path in self.path.glob(f"*{DIRECTORY}"):
            shutil.rmtree(path)

    def _file(self, name: str) -> Path:
        return self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.bin"

    @contextlib.contextmanager
    def _sound(self, path: Path, name: object = None) -> Iterator["_File | None"]:
        """Yield the file if it exists and is intact, else None; delete a damaged one."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            try:
                found = _opened(file, name)
            except _Damaged as error:
                warnings.warn(
                    f"{path} is damaged ({error}); {name or 'its content'} is computed again",
                    stacklevel=4,
                )
                path.unlink()
                found = None
            yield found


class _Damaged(Exception):
    """A file does not contain what was written."""


class _File(NamedTuple):
    """An open file of a folder, positioned at the first byte of its arrays."""

    file: BufferedReader
    name: str
    arrays: dict[str, tuple[np.dtype, list[int]]]

    def read(self) -> dict[str, np.ndarray]:
        out = {}
        for key, (kind, shape) in self.arrays.items():
            data = self.file.read(math.prod(shape) * kind.itemsize)
            out[key] = np.frombuffer(data, kind).reshape(shape)
        return out


def _opened(file: BufferedReader, name: object) -> _File:
    """Verify a file, and read its head, before memory of its size is allocated."""
    said = file.readline(HEX + 1)
    if hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n" != said:
        raise _Damaged("its checksum does not match its content")
    size = file.tell()
    file.seek(HEX + 1)
    try:
        head = json.loads(file.readline())
        arrays = {key: _kind(*kind) for key, kind in head["arrays"].items()}
        held = head["name"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"its header cannot be read, {type(error).__name__}: {error}") from None
    if not isinstance(held, str) or name not in (None, held):
        raise _Damaged(f"it holds {held!r} instead")
    needed = sum(math.prod(shape) * kind.itemsize for kind, shape in arrays.values())
    if needed != size - file.tell():
        raise _Damaged(f"its arrays take {needed} bytes, but {size - file.tell()} are left")
    return _File(file, held, arrays)


def _kind(dtype: DTypeLike, shape: Any) -> tuple[np.dtype, list[int]]:
    kind = jnp.dtype(dtype)
    if not isinstance(dtype, str) or kind.hasobject or not kind.itemsize:
        raise ValueError(f"{dtype!r} is not a dtype of numbers")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    return kind, shape


def digest(folder: Path) -> str:
    """Return the SHA-256 of the description of the run in a folder; "" if there is none."""
    mark = folder / RUN
    return hashlib.sha256(mark.read_bytes()).hexdigest() if mark.is_file() else ""


def is_started(folder: Path) -> bool:
    """Return whether anything of a run is stored in a folder."""
    parts = (any(path.iterdir()) for path in folder.glob(f"*{DIRECTORY}"))
    return any(folder.glob("*.bin")) or any(parts)


def _held(path: Path, run: str) -> Claim:
    held = claim(path)
    if held.runs and held.run != run:
        held.close()
        raise Taken(
            f"{path} is in use by another run of this process: close the Folder of that run first"
        )
    held.run = run
    held.runs += 1
    held.scraps.add(RUN)
    return held


def _leave(held: Claim) -> None:
    held.runs -= 1
    held.close()


def _differences(kept: bytes, run: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the values in which a stored run differs."""
    try:
        other = json.loads(kept)
        names = tuple(sorted(n for n in other.keys() | run if other.get(n) != run.get(n)))
    except (ValueError, AttributeError, RecursionError):
        names = ()
    return names or (f"{RUN}, which is damaged",)


def _write(path: Path, head: bytes, arrays: Mapping[str, np.ndarray], sync: bool) -> None:
    """Write a line with the digest of the rest, then the rest."""
    with _aside(path, sync) as file:
        total = hashlib.sha256(head)
        file.write(b"0" * HEX + b"\n" + head)
        for a in arrays.values():
            data = np.ascontiguousarray(a).reshape(-1).view(np.uint8).data
            total.update(data)
            file.write(data)
        file.seek(0)
        file.write(total.hexdigest().encode())


@contextlib.contextmanager
def _aside(path: Path, sync: bool = True) -> Iterator[BufferedWriter]:
    """Write to a temporary file, sync and rename it: a kill leaves the old file or the new one."""
    aside = path.with_suffix(".aside")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
