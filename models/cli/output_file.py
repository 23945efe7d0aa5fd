"""The output of a command that writes one file: locked during the work, published at the end."""

import os
from collections.abc import Iterable
from pathlib import Path

from jaxquant.durable.publish import check_parent
from jaxquant.durable.store import DIRECTORY
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.output import Output

WRITTEN = "written"  # name of the directory, in the folder, in which the file is written first
IDENTITY = "identity"  # name of the file beside it that tells which file it is


class OutputFile(Output):
    """The file `--out` of a command, and the folder beside it that holds unfinished work.

    Args:
      out: the file.
      overwrite: whether an existing file may be replaced.
    Raises:
      ValueError: the file may not be written.
    """

    def write(self, lines: Iterable[bytes]) -> None:
        """Write the lines, and remove the folder, which is no longer needed.

        The file appears in one step, with all of its lines.

        Args:
          lines: the lines, without line ends.
        """
        new = self.place()
        with new.open("wb") as file:
            for line in lines:
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.put(new)

    def place(self) -> Path:
        """Return the path at which to write the output, in the folder; `put` then moves it."""
        folder = self.finished.directory(WRITTEN)
        folder.mkdir(exist_ok=True)
        return folder / "new"

    def put(self, new: Path) -> None:
        """Move the output to its place in one step, and remove the folder, no longer needed.

        Args:
          new: the output, complete and on the disk.
        """
        self._check()
        self.mark(new)
        os.replace(new, Path(self.out).resolve())
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def mark(self, new: Path) -> None:
        """Note which file or directory is the output, to recognize it in its place after a kill.

        Args:
          new: the output.
        """
        (new.parent / IDENTITY).write_text(_identity(new))

    def _check(self) -> None:
        path = Path(self.out).resolve()
        if path.is_dir():
            raise ValueError(f"--out {self.out} is a directory; give the name of a file")
        if path.exists() and not (self.overwrite or self._is_result()):
            raise ValueError(f"{self.out} exists; give --overwrite to replace it, or another --out")
        check_parent(path)

    def _is_result(self) -> bool:
        """Return whether the folder's run was killed between publishing and cleaning up."""
        mark, out = self.path / f"{WRITTEN}{DIRECTORY}" / IDENTITY, Path(self.out)
        return mark.is_file() and out.exists() and _identity(out) == mark.read_text()


def _identity(path: Path) -> str:
    """Return what stays the same when a file or directory is moved."""
    info = path.stat()
    return f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
