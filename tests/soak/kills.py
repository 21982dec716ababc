"""SIGKILL at random moments of trainings on one and two ranks, of preparations and of exports; then the same command, to the end.

What must hold: it succeeds; weights, averages, checkpoints, stored pairs and the logged curve equal those of a run that nobody killed, to the
bit; right after a kill nothing that a reader would take is half written; at the end nothing is left behind, and no line of the log or of
TensorBoard stands twice. `kills` counts those that found their process alive.
"""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import random
import shutil
import tempfile

import nursery

import tiny

TITLE = "SIGKILLs that a run, a preparation and an export survive"
# Kills of a trial's two or one; 100 in all where each finds its process alive.
KINDS = ("train, 1 rank, at a write", "train, 1 rank, at a time", "train, 2 ranks, at a write", "train, 2 ranks, at a time", "prepare", "export")
ORDER = (0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 0, 3, 5)
CASES = 62
# Both kinds of stages: a solver beside the student, and stored pairs.
SETTINGS = ("stages.0.samples=96", "stages.1.samples=64", "stages.1.pairs=24", "checkpoint.every=32", "validate.every=32", "log.every=16",
            "train.zero_stage=2")
TIMES = {"seconds", "samples_per_second", "peak_memory", "elapsed"}


def trial(index: int, folder: pathlib.Path) -> dict:
    kind = KINDS[ORDER[index % len(ORDER)]]
    result = {"kind": kind, "kills": 0, "failed": None}
    try:
        if kind.startswith("train"):
            result["kills"] = training(index, folder, 2 if "2 ranks" in kind else 1, "write" in kind)
        else:
            result["kills"] = command(index, folder, kind)
    except AssertionError as error:
        result["failed"] = " ".join(str(error).split())[:500]
    return result


def training(index: int, folder: pathlib.Path, ranks: int, by_writes: bool) -> int:
    whole, ended = run_whole(ranks)
    random_, kills, left = random.Random(index), 0, 1.0
    for _ in range(2):
        # Of what is left at least: from a kill at one half of the run the other half is still to come.
        share = left * random_.uniform(0.02, 0.95)
        when = {"changes": max(1, round(share * ended.changes))} if by_writes else {"seconds": share * ended.seconds}
        left -= share
        rank = random_.randrange(ranks) if not by_writes else 0
        got = nursery.run(train(folder), folder, ranks=ranks, rank=rank, **when)
        assert got.killed or set(got.codes) == {0}, got.said[-800:]
        kills += got.killed
        readable(folder / "run")
    got = nursery.run(train(folder), folder, ranks=ranks)
    assert set(got.codes) == {0}, f"{got.codes}: {got.said[-800:]}"
    same_run(whole / "run", folder / "run")
    return kills


def train(folder: pathlib.Path) -> list[str]:
    recipe = folder / "tiny.toml"
    if not recipe.exists():
        recipe.write_text(tiny.TINY)
    return ["train", "--recipe", str(recipe), "--run-dir", str(folder / "run"), *(word for s in SETTINGS for word in ("--set", s))]


@functools.cache
def run_whole(ranks: int) -> tuple[pathlib.Path, nursery.Ended]:
    """A run that nobody killed, once a process, and what it took."""
    folder = place(f"whole-{ranks}-")
    nursery.run(["env"], folder)  # the first child waits for the imports
    ended = nursery.run(train(folder), folder, ranks=ranks)
    assert set(ended.codes) == {0} and ended.changes > 50, ended.said[-800:]
    return folder, ended


def place(name: str) -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=name))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def command(index: int, folder: pathlib.Path, kind: str) -> int:
    words, (whole, ended) = WORDS[kind], done_whole(kind)
    got = nursery.run(words(folder), folder, changes=random.Random(index).randint(1, ended.changes))
    assert got.killed, got.said[-800:]
    readable(folder / "out")
    again = nursery.run(words(folder), folder)
    assert again.codes == (0,), again.said[-800:]
    same_files(whole / "out", folder / "out")
    return 1


@functools.cache
def done_whole(kind: str) -> tuple[pathlib.Path, nursery.Ended]:
    folder = place(f"{kind}-")
    ended = nursery.run(WORDS[kind](folder), folder)
    assert ended.codes == (0,) and ended.changes > 3, ended.said[-800:]
    return folder, ended


@functools.cache
def images() -> pathlib.Path:
    """Twenty scans with their captions."""
    import numpy as np
    from PIL import Image

    from reflow.data import digits

    folder = place("images-")
    pixels, labels = digits.images()
    for i in range(20):
        Image.fromarray(((pixels[i, 0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(digits.caption(int(labels[i])))
    return folder


WORDS = {
    "prepare": lambda folder: ["prepare", "--data", images(), "--out", folder / "out", "--family", "digits", "--base", "builtin", "--resolution", "16", "--shard-size", "8"],
    "export": lambda folder: ["export", "--run-dir", run_whole(1)[0] / "run", "--out", folder / "out"],
}


def readable(folder: pathlib.Path) -> None:
    """Whatever has the name of a finished file is one."""
    import torch
    from safetensors.torch import load_file

    from reflow.training import stored

    for path in sorted(folder.rglob("*.safetensors")) if folder.exists() else ():
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            assert all(torch.is_tensor(t) for t in load_file(path).values()), path
    for path in sorted(folder.rglob("*.json")) if folder.exists() else ():
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text())
    latest = stored.newest(folder / "checkpoints")
    if latest is not None:
        stored.verify(latest, stored.read(latest))


def names(folder: pathlib.Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard"}


def same_files(whole: pathlib.Path, ours: pathlib.Path) -> None:
    """The same names, and in each the same bytes, where a file does not tell its own place or time."""
    assert names(whole) == names(ours), f"only in one: {sorted(names(whole) ^ names(ours))[:8]}"
    for name in sorted(names(whole)):
        if name.endswith((".safetensors", ".arrow", ".npy")):
            assert (whole / name).read_bytes() == (ours / name).read_bytes(), f"{name} differs"


def same_run(whole: pathlib.Path, ours: pathlib.Path) -> None:
    same_files(whole, ours)
    assert records(whole) == records(ours), "log.jsonl differs"
    assert board(whole) == board(ours), "TensorBoard differs"


def records(folder: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def board(folder: pathlib.Path) -> dict[str, list]:
    """Steps and values of each curve that does not tell times and the steps of each picture, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    pictures = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return pictures | {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if not TIMES & set(tag.split("/"))}
