"""Models, folders and files compressed without loss, and restored: what is read and written."""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxquant.lossless import archive_read, archive_write
from jaxquant.lossless.archive_format import SUFFIX, Section
from jaxquant.lossless.files import check_room
from jaxquant.lossless.plane_coding import Coding
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.readers.registry import NAMED, is_kind
from jaxquant_models.readers.sections import sections_of

Progress = Callable[[int, str], None]  # bytes of all files that are done, what is being worked on


class Tree(NamedTuple):
    """A file, or a folder with all its files.

    Attributes:
      root: the file or the folder.
      files: for a folder, the paths of its files in it, sorted; for a file, itself as `Path()`.
      folders: the paths of its folders in it.
      nbytes: bytes of all files.
    """

    root: Path
    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    nbytes: int


class Row(NamedTuple):
    """What a section of a file takes.

    Attributes:
      file: path of the file in its folder; "" if there is only one.
      name: name of the section: a tensor's, "header", "padding", or "" for a whole file.
      dtype: name of its type, as in the file; "" for bytes without structure.
      bytes: its bytes.
      coded_bytes: its bytes in the archive.
      numbers: how many numbers it holds; 0 if its bytes have no structure.
    """

    file: str
    name: str
    dtype: str
    bytes: int
    coded_bytes: int
    numbers: int

    @property
    def bits_per_number(self) -> float | None:
        """Bits that a number takes in the archive, or None if there are no numbers."""
        return 8 * self.coded_bytes / self.numbers if self.numbers else None


class Compressed(NamedTuple):
    """What became of a file or a folder.

    Attributes:
      rows: all sections.
      bytes: bytes of the files.
      archive_bytes: bytes of the archives.
      kept_bytes: bytes of the files that an earlier run had done.
      sha256: SHA-256 of each file, by its path.
    """

    rows: tuple[Row, ...]
    bytes: int
    archive_bytes: int
    kept_bytes: int
    sha256: dict[str, str]


def resolved(spec: str) -> Path:
    """Return the file or folder of a model.

    Args:
      spec: the name of a model that is shipped as a package, or a path.

    Raises:
      ValueError: there is no such model, file or folder.
    """
    path = packaged_file(NAMED[spec]) if spec in NAMED else Path(spec)
    if not spec or not is_kind(Path.exists, path):
        raise ValueError(
            f"there is no file, folder or model {str(spec)!r:.200}; the models with a name are "
            f"{', '.join(sorted(NAMED))}"
        )
    return path


def tree_of(root: Path) -> Tree:
    """Return a file or a folder with all files in it.

    Symbolic links to files of the folder are followed, so that the file is there twice.

    Args:
      root: the file or folder.

    Raises:
      ValueError: something in it is neither a file nor a folder, or a link out of the folder.
    """
    if root.is_file():
        return Tree(root, (Path(),), (), root.stat().st_size)
    if not root.is_dir():
        raise ValueError(f"{root} is neither a file nor a folder")
    files, folders = [], []
    for path in _below(root):
        (folders if path.is_dir() else files).append(path.relative_to(root))
    size = sum((root / file).stat().st_size for file in files)
    return Tree(root, tuple(sorted(files)), tuple(sorted(folders)), size)


def compress(
    tree: Tree, target: Path, coding: Coding, threads: int | None, progress: Progress
) -> Compressed:
    """Write the archive of a file, or a folder of archives; what is there already is completed.

    Args:
      tree: the file or folder.
      target: the file or folder to write.
      coding: as in `lossless.compress_file`.
      threads: as in `lossless.compress_file`.
      progress: called after each chunk.

    Raises:
      ValueError: a file is an archive already, or changes while it is read.
      OSError: a file cannot be read or written.
    """
    _make_folders(tree, target, [f"{file}{SUFFIX}" for file in tree.files])
    rows, done, archives, kept, digests = [], 0, 0, 0, {}
    for file in tree.files:
        source, name = tree.root / file, "" if file == Path() else str(file)
        written = archive_write.write_archive(
            source,
            target / f"{file}{SUFFIX}" if name else target,
            sections=sections_of(source),
            coding=coding,
            threads=threads,
            progress=_within(progress, done, name),
        )
        rows += _rows(name, written)
        done += written.nbytes
        archives += written.archive
        kept += written.kept
        digests[name] = written.sha256
    return Compressed(tuple(rows), done, archives, kept, digests)


def decompress(tree: Tree, target: Path, threads: int | None, progress: Progress) -> dict[str, str]:
    """Restore a file, or a folder of files; what is there already is verified and completed.

    Args:
      tree: the archive, or the folder of archives.
      target: the file or folder to write.
      threads: as in `lossless.decompress_file`.
      progress: called after each chunk.

    Returns:
      SHA-256 of each file, by its path.

    Raises:
      ValueError: an archive is truncated or damaged, or the disk has too little room.
      OSError: a file cannot be read or written.
    """
    _make_folders(tree, target, [str(file).removesuffix(SUFFIX) for file in tree.files])
    done, digests = 0, {}
    for file in tree.files:
        name = "" if file == Path() else str(file).removesuffix(SUFFIX)
        new = target / name if name else target
        source = tree.root / file
        check_room(new, archive_read.read_head(source).nbytes)
        tell = _within(progress, done, name)
        head = archive_read.extract(source, new, threads=threads, progress=tell)
        done += head.nbytes
        digests[name] = head.sha256.hex()
    return digests


def archived_bytes(tree: Tree) -> int:
    """Return the bytes of all files that are in archives.

    Args:
      tree: the archive, or the folder of archives.

    Raises:
      ValueError: a file is not an archive, or is not named as one in a folder.
    """
    for file in tree.files:
        if file == Path():
            continue
        if file.name.removesuffix(SUFFIX) in (".", ".."):
            raise ValueError(f"{tree.root / file} has no name without {SUFFIX}: rename it")
        if file.suffix != SUFFIX:
            raise ValueError(
                f"{tree.root / file} is not an archive: every file of a folder that "
                f"`jaxquant compress` wrote ends in {SUFFIX}"
            )
    return sum(archive_read.read_head(tree.root / file).nbytes for file in tree.files)


def _below(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder, links resolved or refused."""
    root = folder.resolve()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                _check_link(path, root)
            if not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is neither a file nor a folder: remove it first")
            yield path


def _check_link(path: Path, root: Path) -> None:
    """Raise ValueError if a link is not one to a file below `root`."""
    if path.is_dir():
        raise ValueError(f"{path} is a symbolic link to a folder: put the folder in its place")
    if not path.exists():
        raise ValueError(f"{path} is a symbolic link to nothing: remove it first")
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{path} is a symbolic link to a file outside of the folder: put the file in its "
            "place (cp -rL copies a folder so), or compress the file by itself"
        )


def _make_folders(tree: Tree, target: Path, names: Collection[str]) -> None:
    """Make the folders to write to, without what an earlier run has left of files now gone."""
    if tree.root.is_dir():
        target.mkdir(exist_ok=True)
        wanted = {target / name for name in names}
        for path in [p for p in target.rglob("*") if p.is_file() and p not in wanted]:
            path.unlink()
    for folder in tree.folders:
        (target / folder).mkdir(exist_ok=True)


def _within(progress: Progress, before: int, name: str) -> archive_read.Progress:
    """Return the progress of one file as a progress of all."""
    return lambda done, total, section: progress(before + done, section or name)


def _rows(file: str, written: archive_write.Written) -> Iterator[Row]:
    for section, coded in zip(written.sections, written.coded, strict=True):
        yield _row(file, section, coded)


def _row(file: str, section: Section, coded: int) -> Row:
    return Row(file, section.name, section.dtype, section.nbytes, coded, section.numbers)
