"""One process at a time in a folder: a lock that ends with its process and says who holds it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from reflow.errors import UserError
from reflow.outputs import about

LOCK = ".lock"


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock. what: who works there, for the sentence. The file stays, the lock ends with the process.

    Raises UserError that names the holder where another process has it, on this machine or, where the file system shares
    locks (NFS does), on another. A file system without locks is said and worked on all the same.
    """
    import fcntl

    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{what} works in {folder} already: {_holder(file)}. Wait for it, stop it, or choose another folder.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
            print(f"reflow: the file system of {folder} has no locks; see to it that nothing else writes there.", file=sys.stderr)
        now = datetime.datetime.now().isoformat(" ", "seconds")
        with about(folder / LOCK):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read(200).strip() or "a process that has not written its name yet"
