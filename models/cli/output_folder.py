"""The output of a command that writes a folder: locked during the work, published at the end."""

import os
from pathlib import Path

from jaxquant.durable.publish import check_parent, publish
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.output_file import OutputFile


class OutputFolder(OutputFile):
    """The folder `--out` of a command, and the folder beside it that holds unfinished work.

    Only a folder whose files the command could have written is replaced.

    Args:
      out: the folder.
      overwrite: whether an existing folder of this kind may be replaced.
      replaces: whether the command can replace a folder at all. Default: True.
    Raises:
      ValueError: the folder may not be written.
    """

    contents = ""  # what the files of such a folder are: a plural, or a singular with its article

    def __init__(self, out: str | Path, overwrite: bool, replaces: bool = True) -> None:
        self._replaces = replaces
        super().__init__(out, overwrite)

    def put(self, new: Path) -> None:
        """Move the folder to its place in one step, and remove the folder of unfinished work.

        Args:
          new: the folder.
        """
        self._check()
        replace = self.overwrite or self._is_result()
        self.mark(new)
        publish(new, Path(self.out).resolve(), replace=replace)
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def owns(self, folder: Path) -> bool:
        """Return whether the command could have written a folder.

        Args:
          folder: an existing folder that is not empty.
        """
        raise NotImplementedError

    def _check(self) -> None:
        path = Path(self.out).resolve()
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {self.out} is a file; give the name of a folder")
        if path.is_dir() and os.listdir(path) and not self._is_result():
            if not self.owns(path):
                raise ValueError(
                    f"{self.out} has files that are not {self.contents}, and is not touched; give "
                    "another --out"
                )
            if not self._replaces:
                raise ValueError(
                    f"{self.out} exists, and no folder is replaced; give another --out"
                )
            if not self.overwrite:
                raise ValueError(
                    f"{self.out} exists; give --overwrite to replace it, or another --out"
                )
        check_parent(path)
