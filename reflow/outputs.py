"""What a command will write, checked before it works for minutes; and errors of the file system as sentences."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reflow.errors import UserError

CURES = {
    errno.ENOSPC: "the disk is full; free some space, then give the same command again",
    errno.EDQUOT: "your quota is used up; free some space, then give the same command again",
    errno.EFBIG: "no file of that size is allowed there, by the file system or 'ulimit -f'; choose another place or raise the limit",
    errno.EROFS: "it lies on a file system that is mounted read-only; choose another place",
    errno.EACCES: "this user may not read or write there; change its permissions or choose another place",
    errno.EPERM: "this user may not do that there; change its permissions or choose another place",
    errno.ENOENT: "it does not exist; check the name",
    errno.ENOTDIR: "a part of that path is a file, not a folder; choose another place",
    errno.EISDIR: "it is a folder where a file is expected; choose another name",
    errno.EMFILE: "too many files are open; raise the limit with 'ulimit -n 4096'",
    errno.EIO: "the disk reports an error; look at the machine's log, then give the same command again",
    errno.ESTALE: "the network folder went away; mount it again, then give the same command again",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
# How writers that are not Python's name the number of a failure of the system.
NUMBER = re.compile(r"\bcode: (\d+)|\bos error (\d+)|\[errno (\d+)\]", re.IGNORECASE)
PLACE = re.compile(r'at path "([^"]+)"')
OWN = re.compile(r"\.lock|\.ranks|\..+\.tmp(\.npy)?")
THEIRS = ("safetensors", "pyarrow")


def check_output(path: str | Path, what: str = "--out") -> Path:
    """The path, if a file or folder of that name can be made or written in; nothing is left behind.

    Raises UserError with `what`, the option that named it, where a parent is a file or the place cannot be written.
    """
    path = Path(path)
    if any("\ud800" <= c <= "\udfff" for c in str(path.absolute())):
        raise UserError(f"{what} {path.absolute()} is no UTF-8 name, and the libraries that write there need one; choose another name.")
    place = path if path.is_dir() else path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{what} {path} cannot be made: {place} is a file, not a folder. Choose another name.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        why = CURES.get(error.errno or 0, f"{error.strerror or error}; choose another place")
        raise UserError(f"{what} {path} cannot be written in {place}: {why}.") from error
    return path


@contextlib.contextmanager
def written(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A place to write a file at, which becomes `path` when the block ends: a reader sees the old file or the whole new
    one. shared: other processes may write the same file at the same time.

    Where anything fails nothing is left behind, and what the system refused is raised as an OSError that names `path`,
    in whichever language the writer was made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        with about(path, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # network file systems say only now that they are full
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` when the block ends, a new or empty one. With `last`, the name of the
    file that tells that the others are there, its files are moved into one that may hold an earlier state of them.

    Where anything fails nothing of it is left, and what the system refused is raised as an OSError that names `folder`.
    """
    temporary = folder.parent / f".{folder.name}.tmp"
    try:
        with about(folder, temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
            temporary.mkdir(parents=True)
            yield temporary
            if last is None:
                os.rename(temporary, folder)
                return
            folder.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def undone(*paths: Path) -> Iterator[None]:
    """Files and folders that this block makes one after the other. Where the system refuses one they all go, so that the
    same command, which does not write over what is there, may be given again."""
    try:
        yield
    except Exception as error:
        if of_the_system(error) is not None:
            for path in paths:
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def about(path: Path, *working: Path) -> Iterator[None]:
    """What the system refuses in this block is raised as an OSError that names `path`, unless it names another place
    than `working`, which stands for it."""
    try:
        yield
    except Exception as error:
        system = of_the_system(error)
        if system is None:
            raise
        named = [Path(os.fsdecode(name)) for name in (system.filename, system.filename2) if isinstance(name, str | bytes | os.PathLike)]
        ours = any(name == place or place in name.parents for name in named for place in (*working, path))
        if named and not ours:
            raise
        number = system.errno or errno.EIO  # numpy and Pillow count bytes and tell no number
        raise OSError(number, system.strerror or str(system), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """A small UTF-8 file that appears whole or not at all. Raises OSError that names it."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def others(folder: Path, *own: str) -> list[Path]:
    """What lies in a folder beside the leftovers of a command of ours that was killed: its lock, files that were being written, and the
    files named `own`."""
    return [path for path in folder.iterdir() if path.name not in own and not OWN.fullmatch(path.name)]


def of_the_system(error: BaseException) -> OSError | None:
    """The failure of the file system behind an error: itself, or what a library's own exception tells in its text."""
    if isinstance(error, OSError):
        return error
    found = NUMBER.search(str(error)) if type(error).__module__.split(".")[0] in THEIRS else None
    if found is None:
        return None
    number, place = int(next(group for group in found.groups() if group)), PLACE.search(str(error))
    return OSError(number, os.strerror(number), place[1]) if place else OSError(number, os.strerror(number))


def sentence(error: OSError) -> str:
    """What failed, where, and what to do."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " -> ".join(names)
    cure = CURES.get(error.errno or 0)
    if error.errno == errno.ENOENT and names and not Path(names[-1]).absolute().parent.exists():
        cure = "its folder does not exist; check the name, or mount it again where it went away"
    reason = error.strerror or str(error) or type(error).__name__
    if cure:
        return f"{where or 'A file or folder'}: {cure} ({reason})."
    return f"{where + ': ' if where else ''}{reason}; look at that place, then give the same command again."
