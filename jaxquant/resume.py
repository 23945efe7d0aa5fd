"""Resuming: a folder that keeps what a long run has done, so that a killed one goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

RUN = "run.json"
Arrays = Mapping[str, Any]
Finished = MutableMapping[str, Arrays]  # what a long run has done; on disk, a `Folder`


class Folder(MutableMapping[str, Arrays]):
    """Dicts of arrays by name, one file each; a file is there whole or not at all.

    Arrays come back bit for bit. Of another run (by `run`, plain JSON values that say all that
    decides the results) nothing is kept; or with `refuse` it is an error, and all of it stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     Folder(place, {"seed": 1})["a"] = {"x": np.arange(3)}
    ...     again = Folder(place, {"seed": 1})
    ...     (again["a"]["x"].tolist(), list(again), len(Folder(place, {"seed": 2})))
    ([0, 1, 2], ['a'], 0)
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], *, refuse: bool = False) -> None:
        self.path = Path(path)
        text = json.dumps(run, sort_keys=True)
        mark = self.path / RUN
        if refuse and mark.is_file() and len(self):
            self._check(json.loads(mark.read_text()), json.loads(text))
        if not (mark.is_file() and mark.read_text() == text):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            _write(mark, text.encode(), {})
        for left in self.path.glob("*.aside"):
            left.unlink()

    def _check(self, kept: dict[str, Any], run: dict[str, Any]) -> None:
        names = sorted(n for n in kept.keys() | run if kept.get(n) != run.get(n))
        if names:
            raise ValueError(
                f"{self.path} holds another run, of other {', '.join(names)}. It was not touched: "
                f"go on with the options it began with, remove it, or write elsewhere"
            )

    def __setitem__(self, name: str, arrays: Arrays) -> None:
        flat = {key: np.asarray(a) for key, a in arrays.items()}
        kinds = {key: [a.dtype.name, list(a.shape)] for key, a in flat.items()}
        _write(self._file(name), json.dumps({"name": name, "arrays": kinds}).encode(), flat)

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        try:
            file = self._file(name).open("rb")
        except FileNotFoundError:
            raise KeyError(name) from None
        with file:
            kinds = json.loads(file.readline())["arrays"]
            out = {}
            for key, (dtype, shape) in kinds.items():
                kind = jnp.dtype(dtype)
                count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
                out[key] = np.frombuffer(file.read(count), kind).reshape(shape)
            return out

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.path.glob("*.bin")):
            with path.open("rb") as file:
                yield json.loads(file.readline())["name"]

    def __len__(self) -> int:
        return len(list(self.path.glob("*.bin")))

    def remove(self) -> None:
        """The run is over; nothing of it is needed."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.bin"


def _write(path: Path, head: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    """Aside, to the disk, then renamed: a kill at any moment leaves the old file or the new."""
    aside = path.with_suffix(".aside")
    try:
        with aside.open("wb") as file:
            file.write(head + b"\n" * bool(arrays))
            for a in arrays.values():
                file.write(np.ascontiguousarray(a).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
