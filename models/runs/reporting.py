"""How a run tells of its work, whoever shows it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Step = Callable[[object], None]  # called after each step of a stage, with the report of it


class Reporter(Protocol):
    """What a run calls while it works."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Step]:
        """A stage of so many steps."""
        ...

    def tell(self, text: str) -> None:
        """A text between stages."""
        ...
