"""The output of `analyze`: a folder with a report."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from jaxquant.durable.publish import check_parent, publish
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.output_file import OutputFile

PAGE, DATA = "report.html", "report.json"


class ReportOutput(OutputFile):
    """The folder `--out` of a report, and the folder beside it that holds unfinished work.

    Only a folder that holds a report, and no folders, is replaced.

    Args:
      out: the folder.
      overwrite: whether an existing report may be replaced.
    Raises:
      ValueError: the folder may not be written.
    """

    def write_files(self, files: Mapping[str, str]) -> None:
        """Write the files, and remove the folder of unfinished work, which is no longer needed.

        The folder appears in one step, with all of its files.

        Args:
          files: contents by name.
        """
        new = self.place()
        new.mkdir(exist_ok=True)
        for left in new.iterdir():  # of a run that was killed here
            left.unlink()
        for name, text in files.items():
            with (new / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self.put(new)

    def put(self, new: Path) -> None:
        """Move the folder to its place in one step, and remove the folder of unfinished work.

        Args:
          new: the folder.
        """
        self._check()
        replace = self.overwrite or self._is_result()
        self.mark(new)
        target = Path(self.out).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        publish(new, target, replace=replace)
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def _check(self) -> None:
        path = Path(self.out).resolve()
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {self.out} is a file; give the name of a folder")
        if path.is_dir() and os.listdir(path) and not self._is_result():
            if not _is_report(path):
                raise ValueError(
                    f"{self.out} holds files that are not a report, and is not touched; give "
                    "another --out"
                )
            if not self.overwrite:
                raise ValueError(
                    f"{self.out} exists; give --overwrite to replace it, or another --out"
                )
        check_parent(path)


def _is_report(folder: Path) -> bool:
    """Return whether a folder holds a report, and nothing that the command does not write."""
    names = os.listdir(folder)
    if DATA not in names or not all((folder / name).is_file() for name in names):
        return False
    try:
        text = (folder / DATA).read_text("utf-8")
        report = json.loads(text)
    except (ValueError, RecursionError):
        return False
    own = all(name in (PAGE, DATA) or f"/{name} " in text for name in names)  # those of commands
    return isinstance(report, dict) and "version" in report and own
