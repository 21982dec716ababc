"""What lies in a checkpoints folder is verified before it is used: every flipped bit, doctored state, half-removed folders and stray names."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow import outputs
from reflow.errors import UserError
from reflow.training import checkpoint, loop, run, shards, stored
from reflow.training.shards import Piece
from reflow.weights import sums

SMALL = ("log.every=16", "checkpoint.every=16")


def write(folder, ranks=2, samples=16, stage=1, **other):
    """A checkpoint of `ranks` ranks at ZeRO 1 with one parameter of 6 values."""
    path, files = folder / f"stage-{stage}-{samples:09d}", {}
    for rank in range(ranks):
        half = {"0.master": torch.randn(3), "0.exp_avg": torch.randn(3), "0.exp_avg_sq": torch.rand(3), "0.step": torch.tensor([1.0])}
        pieces = other.get("pieces", [[Piece("w", 0, 0, 3 * rank, 3)] for rank in range(ranks)])[rank]
        files[stored.shard_name(rank)] = checkpoint.save_weights({**half, **other.get("tensors", {})}, shards.file_of(path, rank), shards.describe(pieces))
        files[stored.telemetry_name(rank)] = checkpoint.save_weights({"loss": torch.zeros(2)}, path / stored.telemetry_name(rank), {})
    files[stored.AVERAGES] = checkpoint.save_weights({"w": torch.randn(6)}, path / stored.AVERAGES, {})
    state = stored.State(stage=stage - 1, step=1, samples=samples, ranks=ranks, shards=ranks, zero_stage=1)
    (path / stored.STATE).write_text(state.model_copy(update={"files": files}).text())
    return path


def test_every_flipped_bit_in_every_file_of_a_checkpoint_is_found(tmp_path):
    path = write(tmp_path)
    state = stored.read(path)
    stored.verify(path, state)
    tried = 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for at in range(len(good)):
            damaged = bytearray(good)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            try:
                now = stored.read(path)
                stored.verify(path, now)
            except ValueError:
                now = None
            assert now in (None, state), (file.name, at)
            assert now is None or file.name == stored.STATE and json.loads(damaged) == json.loads(good), (file.name, at)
            tried += 1
        file.write_bytes(good)
    stored.verify(path, stored.read(path))
    assert tried == sum(file.stat().st_size for file in path.iterdir()) > 1500


def test_a_file_of_another_checkpoint_is_found_though_it_is_whole(tmp_path):
    path, other = write(tmp_path), write(tmp_path, samples=32)
    shutil.copy(shards.file_of(other, 1), shards.file_of(path, 1))
    with pytest.raises(ValueError, match="shard-00001.safetensors: it is another file than the one that was written here"):
        stored.verify(path, stored.read(path))


@pytest.mark.parametrize("text", [
    b"[]", b"\xff\xfe", b"", b"{", b"[" * 100_000, b'{"stage": 1}', b'"x"', b"null", b"9" * 5000,
    *(json.dumps({"stage": 0, "step": 1, "samples": 16, "ranks": 2, "shards": 2, "zero_stage": 1} | change).encode() for change in (
        {"shards": "2"}, {"shards": -1}, {"shards": 1.0}, {"ranks": 0}, {"ranks": 10**9, "shards": 10**9}, {"ranks": True}, {"step": None},
        {"samples": -16}, {"zero_stage": 9}, {"shards": 3}, {"more": 1}, {"files": {}}, {"files": []}, {"checksum": "00000000"}, {"samples": float("nan")})),
], ids=lambda text: text[:90].decode("latin-1"))
def test_a_doctored_state_is_a_sentence_that_names_another_checkpoint(tmp_path, text):
    write(tmp_path, samples=16)
    path = write(tmp_path, samples=32)
    (path / stored.STATE).write_bytes(text)
    (tmp_path / "latest").write_text(path.name)
    assert not stored.whole(path)
    with pytest.raises(UserError, match="latest names 'stage-1-000000032', which is not whole: .*; write stage-1-000000016, which is whole, into") as said:
        stored.newest(tmp_path)
    assert "\n" not in str(said.value) and len(str(said.value)) < 600 + 3 * len(str(tmp_path))


def test_a_state_of_versions_before_checksums_is_read(tmp_path):
    path = write(tmp_path)
    old = {k: v for k, v in json.loads((path / stored.STATE).read_text()).items() if k not in ("files", "checksum")}
    (path / stored.STATE).write_text(json.dumps(old))
    assert stored.read(path).files is None
    stored.verify(path, stored.read(path))
    shards.file_of(path, 0).unlink()
    assert not stored.whole(path)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"../../x", b"/etc", b".", b"stage-1", b"stage-1-000000016\nstage-1-000000032", b"x" * 10**6,
                                  "stage-١-000000016".encode(), b"stage-1-000000016/../stage-1-000000016", b"\x1b[2J"], ids=lambda t: repr(t[:20]))
def test_a_latest_that_names_no_checkpoint_is_a_sentence_and_never_followed(tmp_path, text):
    write(tmp_path)
    (tmp_path / "latest").write_bytes(text)
    with pytest.raises(UserError, match="latest names no checkpoint but holds '.*'; write stage-1-000000016, which is whole, into ") as said:
        stored.newest(tmp_path)
    assert str(said.value).isprintable() and len(str(said.value)) < 400 + 2 * len(str(tmp_path))


def test_a_latest_that_cannot_be_read_and_one_that_names_what_is_not_there(tmp_path):
    write(tmp_path)
    (tmp_path / "latest").write_text("stage-1-000000099\n")
    with pytest.raises(UserError, match="names 'stage-1-000000099', which is missing; write stage-1-000000016, which"):
        stored.newest(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="latest cannot be read .Is a directory.; write stage-1-000000016"):
        stored.newest(tmp_path)


def test_without_latest_the_newest_whole_one_is_taken_and_no_whole_one_is_an_error(tmp_path):
    assert stored.newest(tmp_path / "none") is None and stored.newest(tmp_path) is None
    first, second = write(tmp_path, samples=16), write(tmp_path, samples=32)
    assert stored.newest(tmp_path) == second
    (second / stored.AVERAGES).unlink()
    assert stored.newest(tmp_path) == first
    shards.file_of(first, 1).unlink()
    with pytest.raises(UserError, match="holds no file latest and no whole checkpoint; there is no other whole one: remove the folder"):
        stored.newest(tmp_path)


def test_a_cure_is_verified_and_not_only_whole(tmp_path):
    good, flipped, bad = (write(tmp_path, samples=s) for s in (16, 32, 48))
    shard = shards.file_of(flipped, 0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert stored.whole(flipped) and good.name in stored.cure(tmp_path, bad) and flipped.name not in stored.cure(tmp_path, bad)


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(tmp_path, left):
    path = write(tmp_path)
    (tmp_path / "latest").write_text(path.name)
    shutil.copytree(path, stored.working(path))
    for name in os.listdir(path)[:2] if left == "half" else os.listdir(path):
        (path / name).unlink()
    if left == "nothing":
        path.rmdir()
    assert stored.newest(tmp_path) == path
    stored.verify(path, stored.read(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", path.name]


def test_a_kill_while_an_old_one_is_removed_leaves_nothing(tmp_path, monkeypatch):
    old, new = write(tmp_path, samples=16), write(tmp_path, samples=32)
    (tmp_path / "latest").write_text(new.name)
    unlink, gone = os.unlink, []

    def kill(*args, **options):
        if gone:
            raise KeyboardInterrupt  # nothing tidies up behind it
        gone.append(args)
        unlink(*args, **options)

    monkeypatch.setattr(os, "unlink", kill)
    with pytest.raises(KeyboardInterrupt):
        stored.prune(tmp_path, new.name, 1)
    monkeypatch.undo()
    assert gone and stored.found(tmp_path) == [new] and len(list(tmp_path.iterdir())) == 3 and not old.exists()
    assert stored.newest(tmp_path) == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", new.name]


def test_old_ones_are_removed_but_never_a_whole_one_for_a_damaged_one_nor_what_is_not_ours(tmp_path):
    paths = [write(tmp_path, stage=s, samples=n) for s, n in ((1, 16), (1, 32), (2, 16), (2, 32), (10, 16))]
    for name in ("stage-old", "stage-1-16.bak", "stage-1-x", "mine"):
        (tmp_path / name).mkdir()
    for damaged in paths[2:4]:
        (damaged / stored.AVERAGES).unlink()
    stored.prune(tmp_path, paths[4].name, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["stage-old", "stage-1-16.bak", "stage-1-x", "mine", *(p.name for p in paths[1:])])
    # A stage that is trained again from its start: what it wrote now stays, what an earlier pass left beyond it goes first.
    again = write(tmp_path, stage=1, samples=48)
    stored.prune(tmp_path, again.name, 2)
    assert [p.name for p in stored.found(tmp_path)] == [paths[1].name, again.name]
    stored.prune(tmp_path, again.name, 1)
    assert stored.found(tmp_path) == [again]


@pytest.mark.parametrize("change, words", [
    ({"tensors": {"0.exp_avg": torch.zeros(2)}}, "shard-00000.safetensors: its tensors 0.master and 0.exp_avg are not of one size"),
    ({"tensors": {"0.master": torch.zeros(3, dtype=torch.float16)}}, "its tensor 0.master is F16 of shape"),
    ({"tensors": {"0.step": torch.zeros(2)}}, "0.step is not one number"),
    ({"pieces": [[Piece("w", 0, 0, 0, 4)], [Piece("w", 0, 0, 3, 3)]]}, "the stretch of w ends beyond the 3 values of its buffer"),
    ({"pieces": [[Piece("w", 0, 0, 0, 3)], [Piece("w", 0, 0, 2, 3)]]}, "shard-00001.safetensors: it holds values of w that another stretch holds too"),
    ({"pieces": [[Piece("w", 7, 0, 0, 3)], [Piece("w", 0, 0, 3, 3)]]}, "it holds no tensor 7.master"),
    ({"pieces": [[Piece("w", 0, -1, 0, 3)], [Piece("w", 0, 0, 3, 3)]]}, "its header holds no usable list of stretches"),
    ({"pieces": [[Piece(3, 0, 0, 0, 3)], [Piece("w", 0, 0, 3, 3)]]}, "its header holds no usable list of stretches"),
])
def test_a_doctored_shard_is_refused_with_its_name(tmp_path, change, words):
    path = write(tmp_path, **change)
    stored.verify(path, stored.read(path))  # whoever doctors a file can write its checksums too
    with pytest.raises(ValueError, match=words):
        shards.Shards(path, 2)


def test_a_shard_without_a_header_of_ours_and_numbers_that_are_not_finite_are_refused(tmp_path):
    path = write(tmp_path)
    bare = {**load_file(shards.file_of(path, 1)), "0.exp_avg_sq": torch.tensor([1.0, float("nan"), 1.0])}
    checkpoint.save_tensors(bare, shards.file_of(path, 1))
    with pytest.raises(ValueError, match="shard-00001.safetensors: its header holds no usable list of stretches"):
        shards.Shards(path, 2)
    with pytest.raises(ValueError, match="its tensor 0.exp_avg_sq holds numbers that are not finite"):
        sums.verify(shards.file_of(path, 1), finite=True)
    with pytest.raises(ValueError, match="its header holds no readable checksums"):
        stored.verify(path, stored.read(path))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that left after two steps of three, with both checkpoints."""
    folder = tmp_path_factory.mktemp("cut")
    with watch.leaving_after(2):
        assert run.train(tiny.short(folder, *SMALL), folder / "run") == loop.LEFT_EARLY
    return folder / "run"


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "ema.safetensors", "telemetry-0.safetensors"])
def test_a_flipped_bit_ends_the_run_with_the_files_name_and_what_it_names_goes_on(cut, tmp_path, file):
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    damaged = folder / "checkpoints" / "stage-1-000000032" / file
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=f"stage-1-000000032 is damaged .{file}: .*; write stage-1-000000016, which is whole, into (.*latest)") as said:
        run.train(tiny.short(tmp_path, *SMALL), folder)
    assert "\n" not in str(said.value)
    (folder / "checkpoints" / "latest").write_text("stage-1-000000016")
    assert run.train(tiny.short(tmp_path, *SMALL), folder) == 0


def test_what_a_kill_left_beyond_the_kept_ones_goes_when_the_run_goes_on(cut, tmp_path):
    """A kill between the newest checkpoint's name in `latest` and the removal of the oldest, where no other checkpoint follows."""
    folder, seen = tmp_path / "run", []
    shutil.copytree(cut, folder)
    recipe = tiny.short(tmp_path, *SMALL, "checkpoint.keep=1", "checkpoint.every=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "stop_if_skipped", lambda *_: seen.append([p.name for p in stored.found(folder / "checkpoints")]))
        assert run.train(recipe, folder) == 0
    assert seen[0] == ["stage-1-000000032"]
    # One that was rolled back by hand keeps what lies beyond it until the next checkpoint is written.
    for path in (write(tmp_path, samples=n) for n in (16, 32, 48)):
        assert path.exists()
    stored.prune(tmp_path, "stage-1-000000032", 1, later=False)
    assert [p.name for p in stored.found(tmp_path)] == ["stage-1-000000032", "stage-1-000000048"]


def test_a_checkpoint_of_another_network_windows_or_place_is_refused(cut, tmp_path):
    folder = tmp_path / "run"
    path, recipe = folder / "checkpoints" / "stage-1-000000032", tiny.short(tmp_path, *SMALL)

    def doctored(file, state, metadata=None):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(cut, folder)
        told = stored.read(path)
        digest = checkpoint.save_weights(state, path / file, metadata or {})
        told = told.model_copy(update={"files": {**told.files, file: digest}})
        (path / stored.STATE).write_text(told.text())

    averages = load_file(cut / "checkpoints" / path.name / "ema.safetensors")
    doctored("ema.safetensors", {k: v for k, v in averages.items() if k != "conv_in.bias"})
    with pytest.raises(UserError, match="holds no average of conv_in.bias as this run trains it"):
        run.train(recipe, folder)
    doctored("telemetry-0.safetensors", {"sums": torch.zeros(1, 1), "loss": torch.zeros(2), "bad_step": torch.zeros(1)})
    with pytest.raises(UserError, match="telemetry-0.safetensors: it holds other sums than this run's windows need"):
        run.train(recipe, folder)
    shard = shards.Shards(cut / "checkpoints" / path.name, 1)
    pieces = [Piece(p.name.replace("conv_in.bias", "conv_in.bios"), *list(vars(p).values())[1:]) for p in shard.pieces[0]]
    doctored("shard-00000.safetensors", load_file(shards.file_of(cut / "checkpoints" / path.name, 0)), shards.describe(pieces))
    with pytest.raises(UserError, match="holds 0 of the 32 values of conv_in.bias"):
        run.train(recipe, folder)
    shutil.copytree(path, path.with_name("stage-1-000000048"))
    (folder / "checkpoints" / "latest").write_text("stage-1-000000048")
    with pytest.raises(UserError, match="state.json: it tells of stage 1 after 32 samples"):
        run.train(recipe, folder)


def test_a_run_directory_that_vanishes_between_two_checkpoints_is_said_and_not_made_anew(tmp_path, monkeypatch):
    folder, agree = tmp_path / "run", loop.Signals.agree

    def vanish(self):
        shutil.rmtree(folder, ignore_errors=True)
        return agree(self)

    monkeypatch.setattr(loop.Signals, "agree", vanish)
    with pytest.raises(OSError) as refused:
        run.train(tiny.short(tmp_path, "log.every=16", "checkpoint.every=0"), folder)
    assert outputs.sentence(refused.value).startswith(f"{folder / 'log.jsonl'}: its folder does not exist; ") and not folder.exists()


def test_a_run_directory_that_went_away_is_said_and_not_made_anew(tmp_path, monkeypatch):
    folder, save = tmp_path / "run", loop.Checkpoints.save

    def vanish(self, *args):
        (folder / "recipe.toml").rename(tmp_path / "elsewhere")
        return save(self, *args)

    monkeypatch.setattr(loop.Checkpoints, "save", vanish)
    with pytest.raises(UserError, match="stage-1-000000016 could not be written .*the run directory is gone"):
        run.train(tiny.short(tmp_path, *SMALL), folder)
    assert not list((folder / "checkpoints").glob("*"))


def test_the_last_good_one_in_words_where_the_newest_is_damaged_or_missing(tmp_path):
    named = checkpoint.Checkpoints(tmp_path, 2)
    assert named.last_good() == "none"
    path = write(tmp_path / "checkpoints")
    assert named.last_good() == str(path)
    (tmp_path / "checkpoints" / "latest").write_text("stage-1-000000099")
    assert named.last_good() == f"none that {tmp_path / 'checkpoints' / 'latest'} names"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_telemetry_of_several_ranks_goes_on_whole_on_the_first_of_others(monkeypatch, rank):
    told = [{"sums": torch.tensor([[1.0, 2.0]]), "bad_step": torch.tensor([-1])}, {"sums": torch.tensor([[3.0, 4.0]]), "bad_step": torch.tensor([7])}]
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: rank)
    found = checkpoint.share(told)
    assert found["sums"].tolist() == ([[4.0, 6.0]] if rank == 0 else [[0.0, 0.0]]) and found["bad_step"].tolist() == ([7] if rank == 0 else [-1])


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_one_before_goes_on(tmp_path, monkeypatch):
    from reflow.training import checkpoint as room

    write_text, folder = room.write_text, tmp_path / "run"

    def full(path, text):
        if path.name == stored.STATE and "000000032" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr(room, "write_text", full)
    with pytest.raises(UserError, match=r"The checkpoint .*stage-1-000000032 .*it goes on from stage-1-000000016") as said:
        run.train(tiny.short(tmp_path, *SMALL), folder)
    size = sum(file.stat().st_size for file in (folder / "checkpoints" / "stage-1-000000016").iterdir())
    assert float(re.search(r"takes about ([\d.e-]+) GB", str(said.value))[1]) * 1e9 == pytest.approx(size, rel=0.08)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "stage-1-000000016"]
    monkeypatch.undo()
    assert run.train(tiny.short(tmp_path, *SMALL), folder) == 0
