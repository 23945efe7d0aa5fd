"""SIGINT and SIGTERM: a command that is told to stop says so in one line and ends with status 130.

This module imports nothing heavy, so that a command can heed signals before it imports the rest.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

STATUS = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a command has to clean up. Python hears of a signal between two of its own
# instructions only, which native code may put off, and code it calls may swallow the exception.
GRACE = 5.0
AGAIN = 0.05  # seconds until a signal whose exception was lost is sent again


class Interrupted(BaseException):
    """The command is to stop. No KeyboardInterrupt, which click and others take for their own."""


_about: Callable[[], str] = lambda: "no output was written"
_grace = 0.0
_watching = False
_again = False  # the next signal is one that was lost
_lost = False  # whether one was
_saying = threading.Lock()


def about(text: Callable[[], str]) -> None:
    """What the line says of the output, asked for when it is written."""
    global _about
    _about = text


def message() -> str:
    """What a command that was interrupted says."""
    return f"interrupted; {_about()}"


def leave(*_: object) -> None:
    """Say so, and end the process at once."""
    if _saying.acquire(blocking=False):
        with contextlib.suppress(Exception):
            # A progress bar may stand on a terminal's line, and have hidden the cursor.
            begin = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{begin}error: {' '.join(message().split())}\n".encode())
    else:  # another thread just does
        time.sleep(0.5)
    os._exit(STATUS)


def arm() -> None:
    """For a process that is the command: from now on a signal ends it, without any traceback."""
    global _watching
    for number in SIGNALS:  # also where the parent ignored them: it is a request to this process
        signal.signal(number, leave)
    if not _watching:
        heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(heard,), daemon=True).start()
        _watching = True


@contextlib.contextmanager
def working(own: bool) -> Iterator[None]:
    """While it lasts a signal raises `Interrupted`.

    Args:
      own: whether the process is the command. Then a second signal ends it at once, and so does
        the first where it has not ended after `GRACE`; and it heeds signals until its end.
    """
    global _grace
    if own:
        arm()
        sys.unraisablehook = _unraisable
    _grace, before = GRACE, {number: signal.getsignal(number) for number in SIGNALS}
    told = False

    def stop(number: int, frame: object) -> None:
        nonlocal told
        global _again
        if own and told and not _again:
            leave()
        told, _again = True, False
        raise Interrupted

    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _grace = GRACE if told else 0.0


def _unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """What is raised in a callback of the garbage collector, say, is lost; here that is noted."""
    global _lost
    if isinstance(problem.exc_value, Interrupted):
        _lost = True
    else:
        sys.__unraisablehook__(problem)


def _watch(heard: int) -> None:
    """A thread: signals reach it while the main thread is in native code."""
    global _lost, _again
    main, count, end = threading.main_thread().ident, 0, float("inf")
    while time.monotonic() < end:
        if select.select([heard], [], [], AGAIN if count else None)[0]:
            count += os.read(heard, 1)[0] in SIGNALS
            if count > 1 or (count and not _grace):
                break
            end = min(end, time.monotonic() + _grace) if count else end
        elif _lost:
            _lost, _again, count = False, True, 0
            signal.pthread_kill(main, signal.SIGINT)
    leave()
