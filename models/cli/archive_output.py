"""The folder that `compress` and `decompress` write."""

import os
from pathlib import Path

from jaxquant.lossless.archive_format import MAGIC
from jaxquant_models.cli.output_folder import OutputFolder


class ArchiveFolder(OutputFolder):
    """The folder `--out`; one of archives alone may be replaced. See `OutputFolder`."""

    contents = "archives"

    def owns(self, folder: Path) -> bool:
        """Return whether all files below a folder are archives.

        Args:
          folder: the folder.
        """
        for place, _, files in os.walk(folder):
            for name in files:
                if not Path(place, name).is_file():  # a pipe would be waited for
                    return False
                with open(Path(place, name), "rb") as file:
                    if file.read(len(MAGIC)) != MAGIC:
                        return False
        return True
