"""Commands of reflow in real processes that start in a moment: each is forked from one that has imported everything, and may be killed.

`run` gives the words of a command and gets back how each of its ranks ended. A kill comes after so many changes of files, which hits what
lies between two writes, or after so many seconds, which hits everything else; both are SIGKILL, which no handler sees.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import signal
import sys
import time
from dataclasses import dataclass

from reflow.ranks import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nursery_ready"])
# What a program asks the system to do to files; safetensors writes by itself and renames by these.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link", "os.symlink")


@functools.cache
def ready() -> None:
    """Start the process that the others are forked from. Of this one's path it is told by the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@dataclass(frozen=True)
class Ended:
    """codes: exit code of each rank, -9 for a kill. changes: of files, by rank 0. seconds: in all. said: what the ranks printed."""

    codes: tuple[int, ...]
    changes: int
    seconds: float
    said: str

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes


def run(words: list[str], folder: pathlib.Path, *, ranks: int = 1, rank: int = 0, changes: int | None = None,
        seconds: float | None = None) -> Ended:
    """`reflow WORDS` on so many ranks; of them `rank` is killed and, as the launcher does it, the others after it.

    folder: for what the ranks print. changes: the kill comes at this change of a file, from 1. seconds: or so long after the start.
    """
    ready()
    port, start = free_port(), time.monotonic()
    places = [folder / f"rank-{r}" for r in range(ranks)]
    children = []
    for r, place in enumerate(places):
        place.unlink(missing_ok=True)
        group = {} if ranks == 1 else {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        job = {"words": [str(w) for w in words], "environment": group, "said": str(place), "changes": changes if r == rank else None}
        children.append(CONTEXT.Process(target=work, args=(json.dumps(job),)))
        children[-1].start()
    end = start + (600 if seconds is None else seconds)
    while any(child.is_alive() for child in children) and not any(child.exitcode for child in children) and time.monotonic() < end:
        children[0].join(0.002 if seconds is not None else 0.02)
    if seconds is not None or any(child.exitcode == -signal.SIGKILL for child in children):
        children[rank].kill()
        children[rank].join()
        for child in children:
            child.kill()
    patience = 10 if any(child.exitcode for child in children) else 60  # a launcher ends the others of a rank that failed
    for child in children:
        child.join(patience)
        child.kill()  # only where it hangs
        child.join()
    said = "".join(place.read_text(errors="replace") for place in places if place.exists())
    counted = places[0].with_suffix(".changes")
    return Ended(tuple(child.exitcode for child in children), int(counted.read_text()) if counted.exists() else 0, time.monotonic() - start, said)


def work(text: str) -> None:
    """In the child: the command itself, by the entry that users have."""
    job = json.loads(text)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(job["environment"])
    handle = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    count, at, counted = [0], job["changes"], pathlib.Path(job["said"]).with_suffix(".changes")

    def seen(event: str, args: tuple) -> None:
        if event in CHANGES or (event == "open" and changes_file(args)):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    from reflow import cli

    leave = cli.leave

    def leaving(code: int) -> None:
        total = count[0]
        counted.write_text(str(total))
        leave(code)

    cli.leave = leaving
    sys.addaudithook(seen)
    cli.main(job["words"])


def changes_file(args: tuple) -> bool:
    path, mode, flags = args
    return isinstance(path, str) and path != os.devnull and bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
