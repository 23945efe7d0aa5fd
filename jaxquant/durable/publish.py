"""Atomic publication of a directory: it is built beside its target and then moved in one step.

What the target held before is deleted only once the new directory is in place. Directories left
behind by killed processes are recognized by their lock (`claims`), which no live process holds; the
next start removes them, or restores the target from them.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxquant.durable.claims import Claim, Taken, claim

NEW, OLD = "new", "old"
# Errors of rename if the target is a non-empty directory, or a file.
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# Errors of an exchange that the system or the file system does not support.
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a path beside the target at which to build its successor; it is removed afterwards.

    Directories left beside the target by killed processes are removed first. Move the successor to
    the target with `publish`.

    Args:
      target: the directory to be replaced.
    """
    restore(target)
    for left in _leftovers(target):
        left.clear()
    held = _place(target)
    try:
        yield held.path / NEW
    finally:
        old = held.path / OLD
        if old.exists() and not os.path.lexists(target):  # the only copy
            shutil.rmtree(held.path / NEW, ignore_errors=True)
            held.close()
        else:
            held.clear()


def publish(new: Path, target: Path, *, replace: bool) -> None:
    """Move a directory to its target: the target is the old directory until it is the new one.

    Where the system cannot exchange two directories in one step, a kill may leave no target until
    `restore` puts the old one back.

    Args:
      new: a path from `aside`, where the new directory was built.
      target: where to move it.
      replace: whether the target may be a non-empty directory.

    Raises:
      FileExistsError: the target is a non-empty directory and `replace` is off, or it is a file.
    """
    try:
        os.replace(new, target)
        return
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        if not replace or not target.is_dir():
            raise FileExistsError(errno.EEXIST, "it exists", str(target)) from None
    if _exchanged(new, target):
        return
    old = new.with_name(OLD)  # after a kill between the two moves, `restore` is needed
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise


def restore(target: Path) -> None:
    """Put the target back if a `publish` was killed after moving it away.

    Args:
      target: the directory that `publish` was to replace.
    """
    if os.path.lexists(target):
        return
    for left in _leftovers(target):
        with left:
            old = left.path / OLD
            if old.is_dir() and not os.path.lexists(target):
                os.replace(old, target)


def _place(target: Path) -> Claim:
    while True:
        path = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
        # Before it is locked, another process may take the directory for a leftover.
        with contextlib.suppress(Taken):
            return claim(path, share=False)


def _leftovers(target: Path) -> Iterator[Claim]:
    """Yield directories beside the target that `_place` made and no live process holds."""
    pattern = re.compile(re.escape(f".{target.name}.saving-") + "[0-9a-f]{8}")
    try:
        found = [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:  # it does not exist or is not readable
        return
    for path in found:
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(ValueError, OSError):
                yield claim(path, share=False)


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two paths in one step; return False if that is not supported."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        arguments = (*names, 2)  # RENAME_SWAP
    else:
        swap = getattr(libc, "renameat2", None)
        arguments = (-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None:
        return False
    if swap(*arguments) == 0:
        return True
    if (code := ctypes.get_errno()) in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(b))


def check_parent(path: Path) -> None:
    """Raise ValueError unless a directory can be created at a path.

    Args:
      path: an absolute path.
    """
    parent = next((p for p in path.parents if p.exists()), path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a writable directory")
