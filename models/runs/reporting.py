"""The interface through which a run reports its work; the caller decides how it is displayed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Step = Callable[[object], None]  # called after each step of a stage, with its report


class Reporter(Protocol):
    """Receives reports of a run's work."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Step]:
        """Open a stage of `total` steps.

        Args:
          title: name of the stage.
          total: number of steps.
        Returns:
          A context manager that yields the function to call after each step.
        """
        ...

    def tell(self, text: str) -> None:
        """Receive a text to be shown between stages.

        Args:
          text: the text.
        """
        ...
