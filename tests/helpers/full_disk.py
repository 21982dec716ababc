"""A disk that is full for files beyond a size, whatever language their writer is in, and what a command says there."""

import contextlib
import io
import os
import resource

import pytest

from reflow import cli


class Left(BaseException):
    """Stands in for the end of the process."""


@contextlib.contextmanager
def room_for(size):
    """No file grows beyond so many bytes (None: as before). What is printed meanwhile goes into the StringIO that this yields."""
    said, limit = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept, null = [os.dup(number) for number in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    try:
        # The test's own output may be a file as well.
        for number in (1, 2):
            os.dup2(null, number)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            yield said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
        os.close(null)


def full_for(patch, place):
    """What Python writes into paths that hold these words meets a full disk, with the system's own errors."""
    opened = open

    def opening(file, mode="r", *args, **kwargs):
        full = not isinstance(file, int) and place in os.fsdecode(file) and set(mode) & set("wax+")
        return opened("/dev/full" if full else file, mode.replace("x", "w") if full else mode, *args, **kwargs)

    patch.setattr("builtins.open", opening)
    patch.setattr("io.open", opening)


def command(words, size=None, place=None):
    """(exit code, what it said last) of a command as the command line runs it, with room for files of `size` bytes and none at `place`."""
    with pytest.MonkeyPatch.context() as patch, room_for(size) as said:
        if place is not None:
            full_for(patch, place)
        patch.setattr(cli, "leave", lambda code: (_ for _ in ()).throw(Left(code)))
        try:
            cli.main([str(word) for word in words])
        except Left as left:
            code = left.args[0]
    lines = said.getvalue().splitlines()
    return code, "\n".join(lines[next((n for n, line in enumerate(lines) if line.startswith("reflow")), len(lines)):])


def tree(folder):
    """Name and contents of every file below a folder, but what differs between equal runs: clocks, process ids."""
    volatile = (".lock", "log.jsonl", "report.json", "index.html")
    return {str(path.relative_to(folder)): None if path.name in volatile else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and "tensorboard" not in path.parts}
