"""Handling of SIGINT and SIGTERM: the command reports the interrupt in one line and exits with 130.

This module imports nothing heavy, so that a command can handle signals before its other imports.
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
# Seconds that a command has to clean up. A limit is needed because Python handles signals only
# between its own instructions, which native code may delay, and called code may swallow the
# exception.
GRACE = 5.0
AGAIN = 0.05  # seconds after which a signal is sent again if its exception was lost


class Interrupted(BaseException):
    """Raised to stop the command.

    It is not a KeyboardInterrupt, which click and others handle themselves.
    """


_about: Callable[[], str] = lambda: "no output was written"
_grace = 0.0
_watching = False
_again = False  # whether the next signal repeats a lost one
_lost = False  # whether the exception of a signal was lost
_saying = threading.Lock()


def about(text: Callable[[], str]) -> None:
    """Set the function that describes the output in the message.

    It is called when the message is written.

    Args:
      text: function that returns the description.
    """
    global _about
    _about = text


def message() -> str:
    """Return the message of an interrupted command."""
    return f"interrupted; {_about()}"


def leave(*_: object) -> None:
    """Print the message and end the process immediately."""
    if _saying.acquire(blocking=False):
        with contextlib.suppress(Exception):
            # A progress bar may occupy the terminal's line and have hidden the cursor.
            begin = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{begin}error: {' '.join(message().split())}\n".encode())
    else:  # another thread is already doing this
        time.sleep(0.5)
    os._exit(STATUS)


def arm() -> None:
    """Make signals end this process without a traceback, if the process is the command."""
    global _watching
    for number in SIGNALS:  # even if the parent ignores them, since they address this process
        signal.signal(number, leave)
    if not _watching:
        heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(heard,), daemon=True).start()
        _watching = True


@contextlib.contextmanager
def working(own: bool) -> Iterator[None]:
    """Raise `Interrupted` on a signal inside the `with` block.

    Args:
      own: whether the process is the command. If so, a second signal ends it at once, and so does
        the first if the process has not ended after `GRACE` seconds; signals are handled until its
        end.
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
    """Note that an `Interrupted` was lost, for example in a callback of the garbage collector."""
    global _lost
    if isinstance(problem.exc_value, Interrupted):
        _lost = True
    else:
        sys.__unraisablehook__(problem)


def _watch(heard: int) -> None:
    """Watch for signals in a thread, which works while the main thread is in native code."""
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
