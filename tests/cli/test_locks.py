"""One process at a time in a folder, and what a killed command leaves does not keep the same command out."""

import os
import re
import signal
import subprocess
import sys

import pytest

import tiny
from reflow.errors import UserError
from reflow.locks import alone
from reflow.outputs import others
from reflow.training import run

HOLD = """
import sys, time, pathlib
from reflow.locks import alone
with alone(pathlib.Path(sys.argv[1]), "A training"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_by_the_name_of_the_first_and_a_kill_frees_the_folder(tmp_path, holder):
    words = rf"A training works in {tmp_path} already: process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\. Wait for it"
    with pytest.raises(UserError, match=words), alone(tmp_path, "A training"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with alone(tmp_path, "A training"):
        assert re.fullmatch(rf"process {os.getpid()} on .*", (tmp_path / ".lock").read_text())
    with alone(tmp_path, "A training"):  # and again: the lock ends with the block too
        pass


def test_a_second_training_writes_nothing(tmp_path, holder):
    with pytest.raises(UserError, match=f"A training works in {tmp_path} already: process {holder.pid}"):
        run.train(tiny.short(tmp_path.parent), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]


def test_what_a_killed_start_leaves_is_no_foreign_folder(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    for name in (".lock", ".recipe.toml.tmp", ".rules.json.tmp", "rules.json"):
        (place / name).write_text("{}" if name == "rules.json" else "")
    assert others(place) == [place / "rules.json"] and not others(place, "rules.json")
    assert run.train(tiny.short(tmp_path), place) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tmp").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run.train(tiny.short(tmp_path), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tmp"]
