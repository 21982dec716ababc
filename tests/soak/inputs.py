"""Hostile pictures, captions, names, tars, tables and parquet files through `reflow prepare`.

Every case is a set of 40 inputs. What is stored, what skipped.jsonl lists and what the manifest counts as left out add up to the inputs; a set
that is refused is refused in one sentence, and without what the sentence is about it is prepared. Nothing is written but the output and
the caches, no file of another kind is waited for, and memory stays below a bound.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import torch

import hostile_inputs as hostile

TITLE = "hostile inputs through `reflow prepare`: each stored, listed or refused in a sentence"
CASES = 260  # of 40 inputs each
INPUTS = 40
MEMORY = 1_500  # MiB above what the process holds before a case
SECONDS = 120  # after which a call hangs

_watched: dict = {"on": False, "written": []}


def _audit(event: str, args: tuple) -> None:
    if _watched["on"] and event == "open" and isinstance(args[0], str | bytes) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _watched["written"].append(os.fsdecode(args[0]))
    elif _watched["on"] and event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "subprocess.Popen"):
        _watched["written"].append(f"{event} {args[1]}" if event in ("os.rename", "os.symlink", "os.link") else f"{event} {args[0]}")


sys.addaudithook(_audit)


def peak(reset: bool = False) -> int:
    """The most memory that this process held since the last reset, MiB."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024


@functools.cache
def base():
    from reflow.models import registry

    return registry.family("digits").load()


@contextlib.contextmanager
def own_caches(folder: pathlib.Path):
    before, hub = os.environ.get("REFLOW_CACHE"), datasets.config.HF_DATASETS_CACHE
    os.environ["REFLOW_CACHE"], datasets.config.HF_DATASETS_CACHE = str(folder / "index"), folder / "hub"
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = hub
        os.environ.pop("REFLOW_CACHE") if before is None else os.environ.update(REFLOW_CACHE=before)


@contextlib.contextmanager
def watched():
    _watched["on"] = True
    try:
        yield
    finally:
        _watched["on"] = False


def command(data: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    return ["prepare", "--family", "digits", "--data", str(data), "--out", str(out), "--caption", "none", "--max-bad-share", "1", "--workers", "1", *more]


def called(words: list[str]) -> tuple[int, str]:
    """Exit code and what was said, of the command's own parser and run in this process."""
    from reflow.cli import build_parser
    from reflow.commands import prepare
    from reflow.errors import UserError

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), watched():
        try:
            return prepare.run(build_parser("prepare").parse_args(words)), said.getvalue()
        except UserError as error:
            return 2, str(error)


def launched(words: list[str]) -> tuple[int, str]:
    """The same in a fresh process, as a user has it."""
    env = {**os.environ, "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
    done = subprocess.run([sys.executable, "-m", "reflow", *words], capture_output=True, timeout=SECONDS, check=False, env=env)
    said = (done.stderr + (b"" if done.returncode else done.stdout)).decode("utf-8", "surrogateescape").strip()
    return done.returncode, said.partition("\nreflow: ")[2] or said.removeprefix("reflow: ") if done.returncode else said  # bars of libraries come before


def hangs(*_) -> None:
    raise TimeoutError(f"it waits for more than {SECONDS} s")


def listing(folder: pathlib.Path) -> list[tuple]:
    found = []
    for place, folders, files in os.walk(folder):
        found += [(place, n, (s := os.lstat(os.path.join(place, n))).st_size if n in files else 0, s.st_mtime_ns if n in files else 0) for n in folders + files]
    return sorted(found)


def trial(index: int, folder: pathlib.Path) -> dict:
    base()
    kind, rng = list(KINDS)[index % len(KINDS)], np.random.default_rng(index)
    place = folder / "a" / "b"  # so that what climbs out of it lands where it is seen
    place.mkdir(parents=True)
    data, things, refused = KINDS[kind](rng, place)
    fresh = index % 37 == 7
    result = {"kind": kind + (", fresh process" if fresh else ""), "inputs": things + len(refused), "refused": 0, "stored": 0, "listed": 0, "left": 0, "failed": None}
    call = launched if fresh else called
    (folder / "out").mkdir()
    more = ["--buckets", "16x16", "32x8", "8x32"] if index % 3 == 0 else ["--resolution", "16"]
    before, held = listing(folder / "a"), peak(reset=True)
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS * (5 if fresh else 1))  # a fresh process starts slowly on a busy machine
    _watched["written"].clear()
    try:
        with own_caches(folder / "out"):
            for content in refused:
                content(True)
                code, said = call(command(data, folder / "out" / "cache", *more))
                if code != 2 or "\n" in said or len(said) > 1500 or not said.endswith((".", ")")) or "Traceback" in said:
                    return result | {"failed": f"not refused in a sentence: {code} {said[:300]!r}"}
                if (folder / "out" / "cache").exists():
                    return result | {"failed": f"a refused set left {os.listdir(folder / 'out' / 'cache')}"}
                result["refused"] += 1
                content(False)
            before = listing(folder / "a")
            code, said = call(command(data, folder / "out" / "cache", *more))
    except Exception as error:
        return result | {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    result["memory_mib"] = float(peak() - held)  # no whole number: it is not summed up
    return result | checked(folder, before, code, said, result)


def checked(folder: pathlib.Path, before: list, code: int, said: str, result: dict) -> dict:
    """What the cache holds against what went in."""
    from reflow.data.cache import CachedDataset

    if code != 0 or "Traceback" in said:
        return {"failed": f"exit code {code}: {said[-300:]!r}"}
    if not all(c.isprintable() or c in "\n\r\xa0" for c in said):
        return {"failed": f"control characters are printed: {said[:300]!r}"}
    strange = [path for path in _watched["written"] if str(folder / "out") not in path and not path.startswith(("/dev/null", "/proc"))]
    if strange or listing(folder / "a") != before:
        return {"failed": f"written outside the output: {strange[:3] or 'beside the inputs'}"}
    if result["memory_mib"] > MEMORY:
        return {"failed": f"{result['memory_mib']:.0f} MiB of memory"}
    out = folder / "out" / "cache"
    manifest = json.loads((out / "manifest.json").read_text())
    lines = (out / "skipped.jsonl").read_text().splitlines() if (out / "skipped.jsonl").exists() else []
    skipped = [json.loads(line) for line in lines]
    if not all(entry["file"] and len(entry["reason"]) > 5 and entry["reason"].isprintable() for entry in skipped):
        return {"failed": f"a skipped input without a reason: {lines[:3]}"}
    left = sum(entry["count"] for entry in manifest["left_out"].values())
    counts = {"stored": manifest["counts"]["images"], "listed": len(skipped), "left": left}
    if sum(counts.values()) + result["refused"] != result["inputs"] or manifest["counts"]["skipped"] != len(skipped):
        return counts | {"failed": f"{counts} and {result['refused']} refused of {result['inputs']} inputs; left out: {manifest['left_out']}"[:600]}
    data = CachedDataset(out, base())
    items = torch.arange(data.counts[0])
    rows = data.conditioning(items), data.latent(items)
    if len(data) != counts["stored"] or not all(torch.isfinite(t).all() for t in (rows[0].encoder_hidden_states, rows[1])):
        return counts | {"failed": "the cache does not hold what it says"}
    return counts


def good(rng: np.random.Generator) -> bytes:
    """A picture that is stored, so that the set is not refused for having none."""
    return hostile.saved(hostile.Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)), "PNG")


def bombs(rng: np.random.Generator) -> bool:
    return rng.random() < 0.02


def folders(rng: np.random.Generator, place: pathlib.Path) -> tuple[pathlib.Path, int, list]:
    """A folder of pictures and .txt files, and what else lies in such folders."""
    data = place / "data"
    (data / "sub").mkdir(parents=True)
    (data / "0000.png").write_bytes(good(rng))
    for number in range(1, INPUTS):
        where, stem = (data, data / "sub")[int(rng.integers(2))], hostile.name(rng, number)
        if rng.random() < 0.15:
            hostile.oddity(rng, where, stem)
            continue
        suffix, content = hostile.bomb(rng) if bombs(rng) else hostile.some_picture(rng)
        (where / f"{stem}{suffix}").write_bytes(content)
        if rng.random() < 0.8:
            (where / f"{stem}.txt").write_bytes(hostile.caption_bytes(rng))
    return data, INPUTS, []


def tables(rng: np.random.Generator, place: pathlib.Path) -> tuple[pathlib.Path, int, list]:
    """A folder with a metadata.jsonl, with lines that are refused one after another."""
    data, lines = place / "data", []
    data.mkdir()
    (data / "0000.png").write_bytes(good(rng))
    bad = [hostile.BAD_LINES[int(n)] for n in rng.choice(len(hostile.BAD_LINES), 3, replace=False)]
    for number in range(1, INPUTS - len(bad)):
        stem = hostile.name(rng, number)
        suffix, content = hostile.some_picture(rng)
        if rng.random() < 0.1:  # a line about what is not there, or about a pipe
            if rng.random() < 0.5:
                os.mkfifo(data / f"{stem}{suffix}")
        else:
            (data / f"{stem}{suffix}").write_bytes(content)
        lines.append(hostile.table_line(rng, f"{stem}{suffix}"))

    def write(line: bytes, put: bool) -> None:
        (data / "metadata.jsonl").write_bytes(b"\n".join([*lines, *([line] if put else [])]) + b"\r\n\n")

    write(b"", False)
    return data, INPUTS - len(bad), [lambda put, line=line: write(line, put) for line in bad]


def tars(rng: np.random.Generator, place: pathlib.Path) -> tuple[pathlib.Path, int, list]:
    """A tar whose members climb, link and lie; with it others that are refused."""
    data = place / "data"
    data.mkdir()
    broken = int(rng.integers(0, 3))
    with tarfile.open(data / "whole.tar", "w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[int(rng.integers(2))]) as tar:
        hostile.add(tar, "0000.png", good(rng))
        for number in range(1, INPUTS - broken):
            above = str(rng.choice(["", "../../", "/tmp/reflow-escape/", "./", "x.y/"]))
            stem = above + hostile.name(rng, number)
            if rng.random() < 0.15:
                hostile.tar_oddity(rng, tar, stem)
                continue
            suffix, content = hostile.bomb(rng) if bombs(rng) else hostile.some_picture(rng)
            hostile.add(tar, f"{stem}{suffix}", content)
            match int(rng.integers(3)):
                case 0:
                    hostile.add(tar, f"{stem}.txt", hostile.caption_bytes(rng))
                case 1:
                    hostile.add(tar, f"{stem}.json", hostile.tar_json(rng))

    def write(content: bytes, put: bool) -> None:
        (data / "broken.tar").write_bytes(content) if put else (data / "broken.tar").unlink()

    contents = [hostile.broken_tar(rng, (data / "whole.tar").read_bytes()) for _ in range(broken)]
    return data, INPUTS - broken, [lambda put, content=content: write(content, put) for content in contents]


def parquets(rng: np.random.Generator, place: pathlib.Path) -> tuple[pathlib.Path, int, list]:
    """A parquet file with cells of all kinds, and before it one with types that are refused."""
    data = place / "data"
    data.mkdir()
    os.mkfifo(place / "pipe.png")
    (data / "other").mkdir()
    hostile.write_parquet(rng, place / "good.parquet", INPUTS - 1, wrong=False)
    hostile.write_parquet(rng, place / "wrong.parquet", 3, wrong=True)
    if rng.random() < 0.3:
        whole = (place / "good.parquet").read_bytes()
        (place / "wrong.parquet").write_bytes(whole[: int(rng.integers(1, len(whole)))])

    def write(put: bool) -> None:
        shutil.copy(place / ("wrong.parquet" if put else "good.parquet"), data / "rows.parquet")

    return data, INPUTS - 1, [write]


KINDS = {"folder": folders, "folder with a table": tables, "tar": tars, "parquet": parquets}
