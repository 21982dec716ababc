"""Every error ends as a sentence: a user's mistake, the machine's failures, what should not happen; outputs are checked first."""

import errno
import os
import re
import sys
import tempfile
import types

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from reflow import cli, outputs
from reflow.errors import UserError


class Left(Exception):
    pass


@pytest.fixture
def ends(monkeypatch, capsys):
    """ends(error, *words): (exit code, standard error) of a command that raises it."""
    monkeypatch.setattr(cli, "leave", lambda code: (_ for _ in ()).throw(Left(code)))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def call(error, *words):
        def run(args):
            raise error

        module = types.SimpleNamespace(arguments=lambda parser: None, run=run, INTERRUPTED="the same command goes on")
        monkeypatch.setitem(sys.modules, "broken_command", module)
        monkeypatch.setitem(cli.COMMANDS, "broken", ("broken_command", "raise an error"))
        with pytest.raises(Left) as left:
            cli.main(["broken", *words])
        return left.value.args[0], capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "a/b: the disk is full; free some space, then give the same command again"),
        (errno.EROFS, "a/b: it lies on a file system that is mounted read-only; choose another place"),
        (errno.EACCES, "a/b: this user may not read or write there"),
        (errno.ENOENT, "a/b: its folder does not exist; check the name, or mount it again where it went away"),
        (errno.ELOOP, "a/b: .*; look at that place"),
    ],
)
def test_a_failure_of_the_file_system_is_a_sentence(ends, number, words):
    code, told = ends(OSError(number, os.strerror(number), "a/b"))
    assert code == 1 and told.startswith("reflow: ") and told.count("\n") == 1 and re.search(words, told)


def test_a_failure_that_a_library_wraps_is_the_same_sentence(ends, tmp_path):
    with pytest.raises(Exception) as caught:
        save_file({"a": torch.zeros(3)}, tmp_path / "no folder" / "a.safetensors")
    assert not isinstance(caught.value, OSError)
    code, told = ends(caught.value)
    assert code == 1 and "no folder" in told and "its folder does not exist; check the name" in told and told.count("\n") == 1


def test_what_should_not_happen_says_where_and_keeps_its_traceback(ends, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, told = ends(ZeroDivisionError("division by zero"))
    kept = list(tmp_path.glob("reflow-error-*.txt"))
    assert code == 1 and told.count("\n") == 1 and "ZeroDivisionError: division by zero" in told
    assert re.search(r"at reflow/cli.py:\d+", told) and str(kept[0]) in told and "report it" in told
    assert "Traceback" in kept[0].read_text() and "ZeroDivisionError" in kept[0].read_text()
    code, told = ends(ZeroDivisionError("division by zero"), "--debug")
    assert code == 1 and "Traceback" in told and len(list(tmp_path.iterdir())) == 1


def test_no_place_for_a_traceback_prints_it(ends, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    code, told = ends(KeyError("x"))
    assert code == 1 and "Traceback" in told and "the traceback above" in told


def test_a_mistake_is_one_sentence_and_its_traceback_is_there_when_asked_for(ends):
    assert ends(UserError("No.")) == (2, "reflow: No.\n")
    code, told = ends(UserError("No."), "--debug")
    assert code == 2 and "Traceback" in told and told.endswith("reflow: No.\n")


def test_a_gpu_without_memory_is_told_what_helps(ends):
    code, told = ends(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"))
    assert code == 1 and "train.micro_batch" in told and "--batch-size" in told and "and more" not in told


def test_an_interruption_says_how_to_go_on(ends):
    code, told = ends(KeyboardInterrupt())
    assert code == 130 and told == "\nreflow: interrupted; the same command goes on.\n"


@pytest.mark.parametrize("error", [UserError("No."), OSError(errno.ENOSPC, "full", "x"), ZeroDivisionError("x")])
def test_an_error_beside_an_open_bar_starts_on_a_line_of_its_own(ends, capsys, error):
    bar = tqdm(total=9, desc="a stage", file=sys.stderr, mininterval=0)
    bar.update(3)
    said = ends(error)[1]
    assert bar.n == 3 and "a stage:" in said and re.search(r"\nreflow: .*\n$", said)
    assert not tqdm._instances  # what close_bars looks at


def test_an_error_of_another_rank_names_it(ends, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ends(OSError(errno.ENOSPC, "full", "x"))[1].startswith("reflow (rank 3): x: the disk is full")


def test_a_mistake_that_one_rank_alone_meets_is_said_by_it_after_the_first_had_its_time(ends, monkeypatch):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ends(UserError("No.")) == (2, "reflow (rank 1): No.\n") and slept == [3]


@pytest.mark.parametrize("text", ["[pair.cc:553] Connection closed by peer [127.0.0.1]:20368. GLHF!", "read: Connection reset by peer",
                                  "NCCL error: remote process exited or there was a network error"])
def test_a_rank_that_others_left_alone_points_to_them_and_keeps_no_traceback(ends, monkeypatch, tmp_path, text):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ends(RuntimeError(text)) == (1, "reflow (rank 0): another rank of this run ended and left this one alone; what it said is the cause.\n")
    assert not list(tmp_path.iterdir())


def test_an_output_is_checked_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert outputs.check_output(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    with pytest.raises(UserError, match="--out .*file/x cannot be made: .*file is a file, not a folder"):
        outputs.check_output(tmp_path / "file" / "x")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match="--run-dir .* cannot be written in .*: it lies on a file system that is mounted read-only"):
        outputs.check_output(tmp_path / "new", "--run-dir")
    assert sorted(tmp_path.rglob("*")) == before


COMMANDS = {
    "prepare": ["--family", "digits", "--data", "data"],
    "prepare pairs": ["--pairs", "8", "--recipe", "digits-quick"],
    "train": ["--recipe", "digits-quick"],
    "sample": ["--model", "builtin", "--prompt", "a"],
    "evaluate": ["--run-dir", "RUN"],
    "export": ["--run-dir", "RUN"],
    "merge": ["--base", "builtin", "--delta", "d.safetensors"],
    "experiment": ["digits"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_checks_its_output_before_it_works(reflow, run_dir, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    words = [str(run_dir) if word == "RUN" else word for word in COMMANDS[name]]
    option = "--run-dir" if name == "train" else "--out"
    for module in ("reflow.models.folder.load_base", "reflow.evaluation.report.make", "reflow.training.run.begin"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("it worked before it looked"))
    with pytest.raises(UserError, match=f"{option} file/out cannot be made: .*file is a file"):
        reflow(name.split()[0], *words, option, "file/out")
