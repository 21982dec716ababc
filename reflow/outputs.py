"""What a command will write, checked before it works for minutes; and errors of the file system as sentences."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from reflow.errors import UserError

CURES = {
    errno.ENOSPC: "the disk is full; free some space, then give the same command again",
    errno.EDQUOT: "your quota is used up; free some space, then give the same command again",
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
OWN = re.compile(r"\.lock|\..+\.tmp(\.npy)?")
THEIRS = ("safetensors", "pyarrow")


def check_output(path: str | Path, what: str = "--out") -> Path:
    """The path, if a file or folder of that name can be made or written in; nothing is left behind.

    Raises UserError with `what`, the option that named it, where a parent is a file or the place cannot be written.
    """
    path = Path(path)
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
    reason = error.strerror or str(error) or type(error).__name__
    if cure:
        return f"{where or 'A file or folder'}: {cure} ({reason})."
    return f"{where + ': ' if where else ''}{reason}; look at that place, then give the same command again."
