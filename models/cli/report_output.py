"""The output of `analyze`: a folder with a report."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from jaxquant_models.cli.output_folder import OutputFolder

PAGE, DATA = "report.html", "report.json"


class ReportOutput(OutputFolder):
    """The folder `--out`; one that holds a report alone may be replaced. See `OutputFolder`."""

    contents = "a report"

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

    def owns(self, folder: Path) -> bool:
        """Return whether a folder holds a report, and nothing that the command does not write.

        Args:
          folder: the folder.
        """
        names = os.listdir(folder)
        if DATA not in names or not all((folder / name).is_file() for name in names):
            return False
        try:
            text = (folder / DATA).read_text("utf-8")
            report = json.loads(text)
        except (ValueError, RecursionError):
            return False
        # The other files are recipes, which commands of the report name.
        own = all(name in (PAGE, DATA) or f"/{name} " in text for name in names)
        return isinstance(report, dict) and "version" in report and own
