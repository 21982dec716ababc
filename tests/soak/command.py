"""The command line's own main in this process, and what it has to end with."""

from __future__ import annotations

import contextlib
import io

from reflow import cli
from reflow.errors import LONGEST


class Left(Exception):
    """What `leave` does in a process that goes on."""


def called(words: list[str]) -> tuple[int | None, str, str]:
    """(exit code, standard output, standard error) of `reflow WORDS`."""

    def leave(code: int) -> None:
        raise Left(code)

    kept, cli.leave = cli.leave, leave
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except (Left, SystemExit) as left:
        return left.args[0], out.getvalue(), err.getvalue()
    finally:
        cli.leave = kept
    return None, out.getvalue(), err.getvalue()


def not_a_sentence(err: str) -> str | None:
    """What is wrong with the standard error of a refusal; None if its last line is one sentence and nothing looks like a traceback."""
    line = err.rstrip("\n").rpartition("\n")[2]
    good = err.endswith("\n") and line.startswith("reflow: ") and len(line) <= LONGEST + 200 and line.isprintable() and "Traceback" not in err
    return None if good else f"not one sentence: {err[-300:]!r}"
