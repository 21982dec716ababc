"""The life of one rank, told in a file: a small process of its own, which lives on where the rank is stopped, hangs or is killed.

`python beat.py FILE PROCESS`: once a second FILE says how often it was written, where PROCESS runs and how it is. It imports nothing of ours
and no torch, so that it costs a few megabytes.
"""

import json
import os
import socket
import sys
import time


def state_of(process: int) -> str:
    """ "runs", "stopped" (by a signal or a debugger) or "gone"."""
    try:
        with open(f"/proc/{process}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return "gone"
        try:  # no Linux: only whether it is there
            os.kill(process, 0)
        except ProcessLookupError:
            return "gone"
        return "runs"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(letter, "runs")


def main(path: str, process: int) -> None:
    count, state = 0, "runs"
    while state != "gone" and os.path.isdir(os.path.dirname(path)):
        state, count = state_of(process), count + 1
        if os.getppid() != process:
            state = "gone"  # another process may have its number by now
        try:
            with open(f"{path}.tmp", "w") as file:
                json.dump({"count": count, "state": state, "host": socket.gethostname(), "process": process}, file)
            os.replace(f"{path}.tmp", path)
        except OSError:
            pass  # a full disk is the rank's to tell
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
