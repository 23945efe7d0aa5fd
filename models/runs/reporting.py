"""How a run tells of its work; whoever starts the run decides how that is shown."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Step = Callable[[object], None]  # called after each step of a stage, with the report of it


class Reporter(Protocol):
    """The one whom a run tells of its work."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Step]:
        """Open a stage of so many steps."""
        ...

    def tell(self, text: str) -> None:
        """Take a text that belongs between stages."""
        ...
