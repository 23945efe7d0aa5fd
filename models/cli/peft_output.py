"""The PEFT folder that a command writes beside its checkpoint."""

from pathlib import Path

from jaxquant.durable.store import digest
from jaxquant_models.cli.output import Output
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.peft import save_peft
from jaxquant_models.readers.peft_files import RUN, check_peft_target, recorded


class PeftOutput:
    """The directory `--peft` of a command; nothing is written if it is None.

    A run that is killed after it wrote the folder may write it again when it is resumed.

    Args:
      folder: the directory, or None.
      output: the other output of the command, whose `--overwrite` applies here, too.
      method: the method of the command.
    Raises:
      ValueError: the method trains other adapters, or a PEFT folder may not be written there.
    """

    def __init__(self, folder: str | None, output: Output, method: str) -> None:
        self._folder, self._output = folder, output
        if folder is None:
            return
        if method != "qlora":
            raise ValueError(
                f"--peft writes LoRA adapters, which --method {method} does not train: use "
                "--method qlora, or leave it out"
            )
        path, out = check_peft_target(folder, self._replaces()), Path(output.out).resolve()
        if path == out or path in out.parents or out in path.parents:
            raise ValueError(
                f"--peft {folder} and --out {output.out} must be two directories, neither of them "
                "inside the other"
            )

    def write(self, model: Model, base: str) -> dict[str, str]:
        """Write the adapters of a model; must be called before the other output is published.

        Args:
          model: the model, with adapters.
          base: name of the model without.
        Returns:
          What a report says of the folder.
        """
        if self._folder is None:
            return {}
        run = self._output.finished.digest
        save_peft(self._folder, model, base, overwrite=self._replaces(), run=run)
        return {"peft": self._folder}

    def _replaces(self) -> bool:
        """Return whether a folder may be replaced: on request, or because this run wrote it."""
        run = digest(self._output.path)
        mine = bool(run) and recorded(self._folder or "").get(RUN) == run
        return self._output.overwrite or mine
