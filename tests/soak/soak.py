"""Long trials of what a run survives: `python tests/soak/soak.py ROW [--seconds N] [--cases N]`; `scripts/soak.sh` runs every row.

A row is a module of this folder with `TITLE`, `CASES` (how many a full soak tries) and `trial(index, folder) -> dict`: one case, a function of
its index alone that works in an empty folder and returns at least {"kind": str, "failed": str | None}. Cases already in the raw file are not
tried again, so a soak goes on where it stopped. `summary` of the raw lines is what is committed.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = ("kills", "inputs", "recipes", "weights", "mutants", "growth")


def row(name: str):
    """The module of a row; its folder and the test helpers come first on the path."""
    for folder in (HERE, ROOT, ROOT / "tests" / "helpers", ROOT / "tests" / "training"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def tried(raw: pathlib.Path) -> list[dict]:
    """The cases that a raw file holds, by index; half a line, as a kill leaves it, does not count."""
    if not raw.exists():
        return []
    lines = [json.loads(line) for line in raw.read_text().split("\n")[:-1]]
    raw.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sorted(lines, key=lambda line: line["index"])


def one(module, index: int) -> dict:
    """A case in a folder of its own. An exception of the trial itself is a failure with its last line."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak-{index}-"))
    start = time.monotonic()
    try:
        result = module.trial(index, folder)
    except Exception as error:
        result = {"kind": "trial broke", "failed": "".join(traceback.format_exception_only(error)).strip()[-300:]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"index": index, **result, "seconds": round(time.monotonic() - start, 2)}


def summary(name: str, module, lines: list[dict]) -> dict:
    """What the raw lines say: cases by kind, the failed ones in full, machine and versions."""
    from bench import record

    kinds = collections.Counter(line["kind"] for line in lines)
    counts = collections.Counter()
    for line in lines:
        counts.update({k: v for k, v in line.items() if isinstance(v, int) and k != "index"})
    slopes = {"slopes": {line["kind"]: line["bytes_a_step"] for line in lines if "bytes_a_step" in line}}
    reasons = {"survivors": {line["mutant"]: line["reason"] for line in lines if line.get("reason")}}
    more = {**(slopes if slopes["slopes"] else {}), **(reasons if reasons["survivors"] else {})}
    return {"row": name, "title": module.TITLE, "cases": len(lines), "of": module.CASES, "failed": [x for x in lines if x["failed"]], **more,
            "kinds": dict(sorted(kinds.items())), "totals": dict(sorted(counts.items())), "seconds": round(sum(x["seconds"] for x in lines)),
            "command": f"scripts/soak.sh {name}", **record.stamp("cpu")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after the case that passes this time")
    parser.add_argument("--cases", type=int, help="try the first N cases; default: all of the row")
    parser.add_argument("--raw", type=pathlib.Path, default=ROOT / "runs" / "soak", help="where the line of every case is kept")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "soak", help="where the summary goes")
    args = parser.parse_args()
    module, raw = row(args.row), args.raw / f"{args.row}.jsonl"
    raw.parent.mkdir(parents=True, exist_ok=True)
    done, end = tried(raw), time.monotonic() + args.seconds
    have = {line["index"] for line in done}
    for index in (i for i in range(args.cases or module.CASES) if i not in have):
        if time.monotonic() > end:
            break
        line = one(module, index)
        with raw.open("a") as file:
            file.write(json.dumps(line) + "\n")
        done.append(line)
        print(f"{args.row} {index}: {line['kind']}: {line['failed'] or 'ok'} ({line['seconds']} s)", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    result = summary(args.row, module, sorted(done, key=lambda line: line["index"]))
    (args.results / f"{args.row}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.row}: {result['cases']} of {result['of']} cases, {len(result['failed'])} failed, {result['seconds']} s in all.")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
