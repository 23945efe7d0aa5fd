"""The output of a command that writes one file: locked during the work, published at the end."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from jaxquant.durable.publish import check_parent
from jaxquant.durable.store import DIRECTORY
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.output import Output

WRITTEN = "written"  # name of the directory, in the folder, in which the file is written first
SHA = "sha256"  # name of the file beside it that holds its digest


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
        folder = self.finished.directory(WRITTEN)
        folder.mkdir(exist_ok=True)
        new, sha = folder / "new", hashlib.sha256()
        with new.open("wb") as file:
            for line in lines:
                sha.update(line + b"\n")
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        (folder / SHA).write_text(sha.hexdigest())
        self._check()
        os.replace(new, Path(self.out).resolve())
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def _check(self) -> None:
        path = Path(self.out).resolve()
        if path.is_dir():
            raise ValueError(f"--out {self.out} is a directory; give the name of a file")
        if path.exists() and not (self.overwrite or self._is_result()):
            raise ValueError(f"{self.out} exists; give --overwrite to replace it, or another --out")
        check_parent(path)

    def _is_result(self) -> bool:
        """Return whether the folder's run was killed between publishing and cleaning up."""
        mark, out = self.path / f"{WRITTEN}{DIRECTORY}" / SHA, Path(self.out)
        if not mark.is_file() or not out.is_file():
            return False
        with out.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == mark.read_text()
