"""Several processes make the same cache as one, and the trouble of one of them ends all with its sentence."""

import collections
import functools
import time
import types

import pytest

from reflow.commands.prepare import load
from reflow.data import workers
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.errors import UserError
from reflow.locks import alone
from reflow.models import registry


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for n in range(12):
        Image.new("L", (20, 20), 20 * n).save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(f"shade {n}")
    (folder / "03.png").write_bytes(b"")
    return open_source(folder)


@pytest.fixture(scope="module")
def base():
    return registry.family("digits").load()


def preparation(base, source, out, **options):
    return Preparation(base, source, out, sizes=[(16, 16)], shard_size=4, batch_size=2, max_bad_share=0.1, **options)


def test_two_processes_make_what_one_makes(base, source, tmp_path, monkeypatch):
    one, two = preparation(base, source, tmp_path / "1"), preparation(base, source, tmp_path / "2")
    one.run()
    claims, mine = workers.claims, []

    def late(tasks, claimed):
        while claimed.value < 2:  # this process waits until the other has begun its second shard
            time.sleep(0.05)
        for task in claims(tasks, claimed):
            mine.append(task.file)
            yield task

    monkeypatch.setattr(workers, "claims", late)
    heard = collections.Counter()
    manifest = two.run(lambda kind, count: heard.update({kind: count}), count=2, loader=functools.partial(load, "digits", "builtin", {}))
    assert heard == two.totals and sum(heard.values()) == 24 and len(mine) <= 4 and manifest["counts"]["skipped"] == 1
    files = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "2").iterdir()) and "skipped.jsonl" in files
    for name in files:
        if name != ".lock":  # it tells since when
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_error_in_one_process_is_raised_in_the_first():
    class Events(list):
        put = list.append

        def get_nowait(self):
            return self.pop(0)

    events = Events()
    loader = functools.partial(load, "digits", "/nowhere/at/all", {})
    workers.other(types.SimpleNamespace(use=print), [], 1, 1, loader, None, events)  # what the process runs
    with pytest.raises(UserError, match="/nowhere/at/all"):
        list(workers.heard([], events))
    workers.other(object(), [], 1, 1, lambda device: device, None, events)
    with pytest.raises(UserError, match="(?s)Worker 2 failed: .*AttributeError"):
        list(workers.heard([], events))


def test_a_dead_process_is_said():
    class Process:
        exitcode = -9

    class Events:
        def get_nowait(self):
            raise workers.queue.Empty

        def empty(self):
            return True

    with pytest.raises(UserError, match=r"Worker 2 ended with exit code -9 .* it goes on"):
        list(workers.heard([Process()], Events()))


def test_two_commands_do_not_write_one_cache(base, source, tmp_path):
    work = preparation(base, source, tmp_path / "new")
    (tmp_path / "new").mkdir()
    with alone(tmp_path / "new", "A `reflow prepare`"), pytest.raises(UserError, match="A `reflow prepare` works in .*new already: process"):
        work.run()
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".lock"]
    # What a killed beginning leaves does not keep the same command out.
    (tmp_path / "new" / ".manifest.json.tmp").write_text("{")
    assert work.run()["complete"]
