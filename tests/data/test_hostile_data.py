"""What careless or hostile hands put beside pictures is stored, listed or refused in a sentence; it blocks nothing and leads nowhere."""

import importlib
import io
import json
import os
import pathlib
import sys
import tarfile
import threading

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from reflow.data import foreign
from reflow.data.budget import PIXELS, Budget
from reflow.data.cache import CachedDataset
from reflow.data.encode import Encoder
from reflow.data.pictures import eight_bits
from reflow.data.prepare import Preparation
from reflow.data.source import REASONS, Left
from reflow.data.sources import open_source
from reflow.data.stream import StreamDataset
from reflow.errors import UserError
from reflow.models import registry
from reflow.outputs import check_output

SOAK = pathlib.Path(__file__).parents[1] / "soak"


@pytest.fixture(scope="module")
def base():
    return registry.family("digits").load()


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "index"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def picture(path, words="a three", shade=40):
    Image.new("L", (20, 16), shade).save(path, "PNG")
    if words is not None:
        path.with_suffix(".txt").write_bytes(words if isinstance(words, bytes) else words.encode())


def prepared(base, source, out, share=1.0):
    manifest = Preparation(base, source, out, sizes=[(16, 16)], max_bad_share=share).run()
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()] if (out / "skipped.jsonl").exists() else []
    return manifest, {entry["file"]: entry["reason"] for entry in listed}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("index", range(6))
def test_sets_of_hostile_inputs_are_stored_listed_or_refused(index, tmp_path):
    """The soak's first cases, of every kind."""
    for place in (SOAK, SOAK.parent / "helpers"):
        if str(place) not in sys.path:
            sys.path.append(str(place))
    result = importlib.import_module("inputs").trial(index, tmp_path)
    assert result["failed"] is None and result["inputs"] == 40 and result["stored"] and result["listed"], result


def test_pipes_sockets_devices_and_dead_links_are_named_and_never_opened(base, folder, tmp_path, capsys):
    picture(folder / "a.png")
    for name in ("pipe.png", "b.txt", "hung.jpg"):
        os.mkfifo(folder / name)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to("nowhere")
    picture(folder / "b.png", None)
    (folder / "metadata.jsonl").write_text('{"file_name": "hung.jpg", "text": "x"}\n' * 2 + '{"file_name": "none.png", "text": "x"}\n')
    source = open_source(folder, caption="given")
    assert [source.key(n) for n in range(len(source))] == ["a.png", "b.png", "none.png"] and source.faults == {
        1: "its caption b.txt cannot be read: it is a named pipe, no file"
    }
    assert source.left == {
        "it is a named pipe, no file": (3, "b.txt"),
        "it is a device, no file": (1, "zero.png"),
        "it cannot be read: No such file or directory": (1, "gone.png"),
        "a further line of one image: the last one counts": (1, "hung.jpg"),
    }
    manifest, listed = prepared(base, source, tmp_path / "out")
    assert manifest["counts"]["images"] == 1 and "pipe" in listed["b.png"] and "No such file" in listed["none.png"]
    with pytest.raises(UserError, match="hung.jpg holds no images: it is a named pipe"):
        open_source(folder / "hung.jpg")
    cells = [{"bytes": None, "path": str(folder / "hung.jpg")}, {"bytes": None, "path": "/dev/zero"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": ["a", "b"]}), tmp_path / "a.parquet")
    for number, words in enumerate(("a named pipe", "a device")):
        assert words in Encoder(base, open_source(tmp_path / "a.parquet")).picture(number, (16, 16))


def test_names_that_are_no_utf8_or_steer_a_terminal_are_written_out(base, folder, tmp_path, capsys):
    for stem in (b"caf\xe9", b"\x1b[31m", "\u202egnp".encode(), b"new\nline"):
        picture(pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/" + stem + b".png")))
        pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/" + stem + b"-bad.png")).write_bytes(b"")
        pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/" + stem + b".heic\x1b")).write_bytes(b"")
    manifest, listed = prepared(base, open_source(folder, caption=""), tmp_path / "out")
    assert manifest["counts"]["images"] == 4 and set(listed) == {r"caf\udce9-bad.png", r"\x1b[31m-bad.png", r"\u202egnp-bad.png", r"new\nline-bad.png"}
    keys = datasets.Dataset.from_file(str(tmp_path / "out" / "latents-00000.arrow"))["key"]
    assert set(keys) == {r"caf\udce9.png", r"\x1b[31m.png", r"\u202egnp.png", r"new\nline.png"}
    told = capsys.readouterr().err
    assert r"\x1b[31m.heic\x1b" in told and ".heic\\x1b is no image format" in told and "\x1b" not in told and told.count("\n") == 1
    with pytest.raises(UserError, match=r"caf\\udce9 is no UTF-8 name"):
        check_output(tmp_path / os.fsdecode(b"caf\xe9"))


def test_a_caption_that_cannot_be_used_lists_its_image_and_a_stream_takes_another(base, folder, tmp_path, capsys):
    for n, words in enumerate((b"a three", b"caf\xe9", "one\0two", "\u202eeerht", "\x1b[2J")):
        picture(folder / f"{n}.png", words)
    for n in (5, 6):
        picture(folder / f"{n}.png", None)
    (folder / "metadata.jsonl").write_text('{"file_name": "5.png", "text": "x\\ud800"}\n{"file_name": "6.png", "text": "\\ud83d\\ude00\\u0000"}\n')
    source = open_source(folder)
    manifest, listed = prepared(base, source, tmp_path / "out")
    assert listed == {
        "1.png": "its caption 1.txt cannot be read: it is no UTF-8 text (unexpected end of data at byte 3)",
        "5.png": r"its caption is no text: half a character (\ud800) at place 2",
    }
    assert CachedDataset(tmp_path / "out", base).words(torch.arange(5)) == ["a three", "one\0two", "\u202eeerht", "\x1b[2J", "\U0001f600\0"]
    assert manifest["counts"]["empty_captions"] == 0
    with pytest.raises(UserError, match=r"2 of 7 images cannot be used.*the first is 1\.png: its caption"):
        prepared(base, source, tmp_path / "strict", 0.05)
    stream = StreamDataset(source, base, [(16, 16)], max_bad_share=1.0)
    assert stream.words(torch.tensor([1, 5])) == ["one\0two", "\U0001f600\0"] and "1.png of" in capsys.readouterr().err
    lines = open_source(folder, caption_lines=True)
    assert [n for n in range(len(lines)) if lines.fault(n)] == [1, 5]
    with pytest.raises(UserError, match="--caption .* is no UTF-8 text"):
        open_source(folder, caption="caf\udce9")


@pytest.mark.parametrize("line", [b'{"file_name": "0.png", "text": ' + b"[" * 100_000, b'{"file_name": "\\u0000.png", "text": ""}',
                                  b'{"file_name": "\\ud800.png", "text": ""}', b'{"file_name": ' + b"9" * 5000 + b"}"])  # fmt: skip
def test_a_line_that_names_no_file_is_refused_by_its_number(folder, line):
    picture(folder / "0.png")
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": ""}\n' + line)
    with pytest.raises(UserError, match="metadata.jsonl, line 2 is not like") as told:
        open_source(folder)
    assert len(str(told.value)) < 500


def test_endless_texts_are_read_as_far_as_they_count(folder, monkeypatch):
    monkeypatch.setattr(foreign, "TEXT", 9)
    monkeypatch.setattr(foreign, "JSON", 9)
    picture(folder / "0.png", "1234567é9")
    picture(folder / "1.png", "12345678é")
    with tarfile.open(folder.parent / "a.tar", "w") as tar:
        for name, content in (("0.png", b"x"), ("0.txt", b"1234567890"), ("1.png", b"x"), ("1.json", b'{"caption": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [open_source(folder).caption(n) for n in range(2)] == ["1234567é", "12345678"]
    source = open_source(folder.parent / "a.tar")
    assert source.caption(0) == "123456789" and source.fault(1) == "its caption 1.json cannot be read: it has more than 0 MiB"


def member(name, content=b"", **told):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in told.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def test_tars_that_lie_are_refused_and_what_they_hold_is_listed(folder):
    negative = bytearray(member("a.png", b"x"))
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + 8 * 32 + sum(negative[156:512]))
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 4
    chain = (long.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(512, b"\0")) * 3000
    for content, words in ((bytes(negative), "a.png has a negative size"), (chain, "recursion")):
        (folder / "bad.tar").write_bytes(content + bytes(1024))
        with pytest.raises(UserError, match=f"bad.tar is cut short or damaged .*{words}"):
            open_source(folder, caption="")
    deep, good = b"[" * 100_000, b'{"caption": "good"}'
    members = [member("1.png", b"x"), member("1.json", deep), member("2.png", b"x"), member("2.json", b'{"caption": "\\ud800"}')]
    members += [member("3.png", b"x"), member("3.txt", b"\xff"), member("3.txt", b"later"), member("4.png", b"x"), member("4.json", good), member("5.png", b"x")]
    (folder / "bad.tar").write_bytes(b"".join(members) + member(os.fsdecode(b"\xff.png"), b"x") + bytes(1024))
    source = open_source(folder, caption="given")
    faults = {source.key(n).removeprefix("bad.tar/"): source.fault(n) or source.caption(n) for n in range(len(source))}
    assert faults == {
        "1.png": "its caption 1.json cannot be read: its brackets are nested too deep",
        "2.png": "its caption is no text: half a character (\\ud800) at place 1",
        "3.png": "later",
        "4.png": "good",
        "5.png": "given",
        "\\udcff.png": "given",
    }
    assert source.left == {"a further text of one key: the last one counts": (1, "bad.tar/3.txt")}


def test_cells_that_are_no_utf8_list_their_rows(base, tmp_path):
    cell = io.BytesIO()
    Image.new("L", (16, 16)).save(cell, "PNG")
    values = [b"good", b"caf\xe9", None]
    words = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array(values, pyarrow.binary()).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"image": [cell.getvalue()] * 3, "text": words}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", caption="given")
    assert [source.caption(n) for n in range(3)] == ["good", "", "given"]
    manifest, listed = prepared(base, source, tmp_path / "out")
    assert manifest["counts"]["images"] == 2 and list(listed.values()) == ["its caption is no UTF-8 text (unexpected end of data at byte 3)"]


def test_a_thousand_reasons_are_told_in_a_line():
    left = Left()
    for n in range(1000):
        left.note("x" * 5000, f".{n} is no image format that is read")
    assert len(left) == 1000 and left.sentence().endswith(f"; {1000 - REASONS} more for {1000 - REASONS} other reasons") and len(left.sentence()) < 600 * REASONS


def test_no_more_pixels_are_decoded_at_once_than_the_budget_has(base, folder, monkeypatch):
    budget, hold, done = Budget(100), threading.Event(), []

    def work(pixels):
        with budget.take(pixels):
            hold.wait()
            done.append(pixels)

    threads = []
    for count, pixels in enumerate((60, 10**9, 1), 1):
        threads.append(threading.Thread(target=work, args=(pixels,)))
        threads[-1].start()
        while budget.asked < count:
            pass
    # The second is too large beside the first, and the third, for which there is room, does not overtake it.
    assert budget.served == 1 and budget.free == 40
    hold.set()
    for thread in threads:
        thread.join()
    assert sorted(done) == [1, 60, 10**9] and budget.free == 100
    taken, take = [], Budget.take
    monkeypatch.setattr(Budget, "take", lambda self, pixels: taken.append(pixels) or take(self, pixels))
    picture(folder / "a.png")
    Image.new("RGB", (16, 16)).save(folder / "b.ico")  # may hold a PNG of any size
    encoder = Encoder(base, open_source(folder, caption=""))
    assert all(len(encoder.picture(n, (16, 16))) == 2 for n in range(2)) and taken[0] == 320 and taken[1] > PIXELS
    assert encoder.budget.free == encoder.budget.total == PIXELS


def test_deep_pictures_are_scaled_row_by_row_as_at_once():
    for deep in (np.arange(65536, dtype=np.uint16).reshape(256, 256), np.arange(256, dtype=np.int32)[None], np.array([[-5, 300, 2**31 - 1]], np.int32)):
        whole = deep.astype(np.float64) / (257 if deep.max() > 255 else 1)
        assert np.array_equal(eight_bits(deep), whole.clip(0, 255).round().astype(np.uint8))


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak of this process is read from Linux's /proc")
def test_threads_hold_the_memory_of_the_budget_and_give_it_back(base, folder):
    side, count = 8000, 3  # 64 MB decoded and as much again while it is brought to grey, each
    for n in range(count):
        Image.new("1", (side, side)).save(folder / f"{n}.png")
    encoder = Encoder(base, open_source(folder, caption=""), threads=count)
    encoder.budget = Budget(side**2)

    def held(key):
        return next(int(line.split()[1]) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) // 1024

    def peak(numbers):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        assert all(len(found) == 2 for found in next(encoder.pictures([numbers], (16, 16))))
        return held("VmHWM") - before, held("VmRSS") - before

    peak([0])  # imports
    (alone, _), (together, kept) = peak([0]), peak(range(count))
    # glibc keeps a little for each thread, however large the images.
    assert together < alone + 32 * count and kept < 40 * count
