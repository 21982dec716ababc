"""Tars, parquet files and saved datasets give the same images and captions as a folder; what is cut short is named."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from reflow.data.sources import open_source
from reflow.errors import UserError


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "index"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((6, 4 + shade), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def shown(source):
    return [(np.asarray(source.image(n)).tolist(), source.caption(n)) for n in range(len(source))]


def folder_of(place):
    place.mkdir()
    for n, words in enumerate(("a zero", "", "long " * 2000)):
        (place / f"{n}.png").write_bytes(png(n))
        (place / f"{n}.txt").write_text(words)
    return shown(open_source(place))


def test_tars_hold_what_the_folder_holds_and_are_indexed_once(tmp_path, monkeypatch):
    want = folder_of(tmp_path / "plain")
    tar(
        tmp_path / "t" / "0.tar",
        {"0.png": png(0), "0.txt": b"a zero", "x/1.PNG": png(1), "x/1.json": b'{"caption": "", "w": 3}'},
    )
    tar(
        tmp_path / "t" / "1.tar",
        {"failed.json": b"{}", "2.txt": b"long " * 2000, "2.png": png(2), "2.json": b'{"other": "2"}'},
    )
    source = open_source(tmp_path / "t")
    assert shown(source) == want and [source.key(n) for n in range(3)] == [
        "0.tar/0.png",
        "0.tar/x/1.PNG",
        "1.tar/2.png",
    ]
    assert source.sizes(range(3)).tolist() == [[6, 4], [6, 5], [6, 6]]
    monkeypatch.setattr(tarfile, "open", None)  # the second time nothing reads the tars' members again
    assert shown(open_source(f"{tmp_path}/t/*.tar")) == want
    monkeypatch.undo()
    named = tar(tmp_path / "n.tar", {"2.txt": b"no", "2.png": png(2), "2.json": b'{"other": "two"}'})
    assert open_source(named, caption_column="other").caption(0) == "two"


def test_bad_tars_are_named(tmp_path):
    whole = tar(
        tmp_path / "whole.tar",
        {f"{n}.{kind}": png(n) if kind == "png" else b"x" for n in range(3) for kind in ("png", "txt")},
    )
    content, last = whole.read_bytes(), 5 * 1024  # six members of a header and a block of content
    assert len(content) > last + 1024
    for place in (
        last + 700,
        last + 100,
        last,
        last + 1024,
    ):  # in a member, in a header, between two members, before the end mark
        cut = tmp_path / f"cut{place}.tar"
        cut.write_bytes(content[:place])
        with pytest.raises(UserError, match=rf"cut{place}\.tar is cut short"):
            open_source(cut)
    with pytest.raises(UserError, match=r"1 of 1 images .* no caption, the first is bare\.tar/7\.png"):
        open_source(tar(tmp_path / "bare.tar", {"7.png": png(0)}))
    with pytest.raises(UserError, match=r"two images called 7"):
        open_source(tar(tmp_path / "twice.tar", {"7.png": png(0), "7.jpg": png(0)}))
    odd = open_source(tar(tmp_path / "odd.tar", {"7.png": png(0), "7.json": b'{"caption": 3}', "8.png": png(0), "8.txt": b"x"}))
    assert "7.json cannot be read: the caption in it is no text" in odd.fault(0) and odd.words(0) == odd.fault(1) == ""
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(b"")
    with pytest.raises(UserError, match="compressed tars"):
        open_source(packed)


def test_parquet_and_saved_datasets_hold_what_the_folder_holds(tmp_path):
    want, words = folder_of(tmp_path / "plain"), ["a zero", None, "long " * 2000]
    (tmp_path / "p").mkdir()
    bare = pyarrow.table({"picture": [png(n) for n in range(3)], "words": words})  # bytes, as other tools write them
    pyarrow.parquet.write_table(bare, tmp_path / "p" / "a.parquet")
    with pytest.raises(UserError, match=r"no caption column .* picture, words: name one with --caption-column"):
        open_source(tmp_path / "p")
    with pytest.raises(UserError, match="1 of 3 images .* no caption, the first is row 1"):
        open_source(tmp_path / "p", caption_column="words")
    source = open_source(tmp_path / "p", caption_column="words", caption="")
    assert shown(source) == want and source.sizes(range(3)).tolist() == [[6, 4], [6, 5], [6, 6]]
    kept = datasets.Dataset.from_dict(
        {"text": ["a zero", "", words[2]], "image": [{"bytes": png(n), "path": None} for n in range(3)]},
        datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()}),
    )
    datasets.DatasetDict({"train": kept}).save_to_disk(tmp_path / "saved")
    assert shown(open_source(tmp_path / "saved")) == want
    with pytest.raises(UserError, match="no split 'test'; write --split train"):
        open_source(tmp_path / "saved", split="test")
    with pytest.raises(UserError, match=r"column text of .* holds no images"):
        open_source(tmp_path / "saved", image_column="text")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "p" / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.parquet is cut short"):
        open_source(cut)


def test_what_is_no_source_is_refused(tmp_path):
    for path, words in (
        (tmp_path / "none", "nothing at"),
        (tmp_path / "*.tar", "No file fits"),
        ("nobody/nothing", "cannot load it"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(path)
    tar(tmp_path / "mix" / "a.tar", {"7.png": png(0), "7.txt": b"x"})
    (tmp_path / "mix" / "b.png").write_bytes(png(1))
    with pytest.raises(UserError, match="loose images such as b.png"):
        open_source(tmp_path / "mix")


def test_an_edited_source_has_another_digest(tmp_path):
    first = tar(tmp_path / "a.tar", {"7.png": png(0), "7.txt": b"x"})
    before = open_source(first).digest()
    assert before == open_source(first).digest() != open_source(first, caption_column="caption", caption="").digest()
    tar(first, {"7.png": png(0), "7.txt": b"y"})
    assert open_source(first).digest() != before and open_source(first).caption(0) == "y"


def test_every_kind_of_picture_that_pillow_reads_is_taken_and_the_rest_is_counted(tmp_path, capsys):
    picture = Image.new("RGB", (8, 6), "red")
    for name, kind in (("a.PNG", "PNG"), ("b.avif", "AVIF"), ("c.jfif", "JPEG"), ("d.jpe", "JPEG"), ("e.v1.JP2", None)):
        picture.save(tmp_path / name, format=kind or "JPEG2000")
        (tmp_path / name).with_suffix(".TXT").write_text(name)
    for name in ("f.jxl", "g.heic", "h.h5", "alone.txt", "notes"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_source(tmp_path)
    assert [source.caption(n) for n in range(len(source))] == ["a.PNG", "b.avif", "c.jfif", "d.jpe", "e.v1.JP2"]
    assert source.sizes(range(5)).tolist() == [[6, 8]] * 5 and all(source.image(n).size == (8, 6) for n in range(5))
    assert source.left == {
        "it cannot be read: No such file or directory": (1, "gone.png"),
        "a caption without an image": (1, "alone.txt"),
        ".jxl is no image format that is read": (1, "f.jxl"),
        ".heic is no image format that is read": (1, "g.heic"),
        ".h5 is no image format that is read": (1, "h.h5"),
        "a name without a suffix is no image format that is read": (1, "notes"),
    }
    assert "f.jxl left out (.jxl is no image format that is read)" in capsys.readouterr().err


def test_linked_folders_are_followed_once(tmp_path):
    for place in ("data/real", "other/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(png(1))
        (tmp_path / place / "1.txt").write_text(place)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "data")
    source = open_source(tmp_path / "data")
    assert [(source.key(n), source.caption(n)) for n in range(len(source))] == [
        ("a/deep/1.png", "other/deep"),
        ("real/1.png", "data/real"),
    ]
    assert source.left == {"its folder is read already": (2, "again")}


def test_tars_with_dots_links_and_other_members(tmp_path, capsys):
    members = {"1.png": png(0), "1.txt": b"one", "22.05.png": png(1), "22.05.TXT": b"two", "x.y/22.06.png": png(2)}
    members |= {"x.y/22.06.txt": b"three", "1.seg.png": png(3), "1.cls": b"7", "lost.txt": b"x", "._1.png": b"0"}
    members |= {"5.avif": png(4), "5.txt": b"five", "6.image.png": png(5), "6.json": b'{"caption": "six"}'}
    file = tar(tmp_path / "t" / "a.TAR", members)
    with tarfile.open(file, "a") as out:
        for name, kind, where in (
            ("8.png", tarfile.LNKTYPE, "1.png"),
            ("8.txt", tarfile.LNKTYPE, "22.05.TXT"),
            ("x.y/9.png", tarfile.SYMTYPE, "../5.avif"),
            ("x.y/9.txt", tarfile.SYMTYPE, "22.06.txt"),
            ("10.png", tarfile.LNKTYPE, "none.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, where
            out.addfile(info)
    (tmp_path / "t" / "b.tar.gz").write_bytes(b"")
    for _ in range(2):  # read, and then from the index
        source = open_source(tmp_path / "t")
        found = {source.key(n): (source.caption(n), source.image(n).size[0] - 4) for n in range(len(source))}
        assert found == {
            "a.TAR/1.png": ("one", 0),
            "a.TAR/22.05.png": ("two", 1),
            "a.TAR/x.y/22.06.png": ("three", 2),
            "a.TAR/5.avif": ("five", 4),
            "a.TAR/6.image.png": ("six", 5),
            "a.TAR/8.png": ("two", 0),
            "a.TAR/x.y/9.png": ("three", 4),
        }
        assert source.left == {
            ".cls is no image format that is read": (1, "a.TAR/1.cls"),
            "a link out of the tar": (1, "a.TAR/10.png"),
            "a further image of one key": (1, "a.TAR/1.seg.png"),
            "a caption without an image": (1, "a.TAR/lost.txt"),
            "no .tar or .parquet file": (1, "b.tar.gz"),
            "its name begins with a dot": (1, "a.TAR/._1.png"),
        }
        assert "a.TAR/1.seg.png left out (a further image of one key)" in capsys.readouterr().err


def test_pngs_with_long_texts_or_profiles_are_read(tmp_path):
    picture, long = Image.new("RGB", (8, 6), "red"), "x" * 3_000_000
    zipped, international = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    zipped.add_text("workflow", long, zip=True)
    international.add_itxt("workflow", long, zip=True)
    picture.save(tmp_path / "a.png", pnginfo=zipped)
    picture.save(tmp_path / "b.png", pnginfo=international)
    picture.save(tmp_path / "c.png", icc_profile=b"\0" * 3_000_000)
    source = open_source(tmp_path, caption="")
    assert source.sizes(range(3)).tolist() == [[6, 8]] * 3
    assert all(source.image(n).getpixel((0, 0)) == (255, 0, 0) for n in range(3))


ODD = "set [1] of*? b"


def test_a_folder_with_brackets_and_stars_in_its_name_is_a_folder(tmp_path):
    place = tmp_path / ODD
    want = folder_of(place)
    for other in ("set 1 of b", "set [1] of_x b"):  # what the name would fit as a pattern
        (tmp_path / other).mkdir()
        (tmp_path / other / "9.png").write_bytes(png(9))
        (tmp_path / other / "9.txt").write_text("another")
    assert shown(open_source(place)) == want
    tars = [tar(place / "t" / f"{n}[a].tar", {f"{n}.png": png(n), f"{n}.txt": b"x"}) for n in range(2)]
    assert len(open_source(place / "t")) == 2 == len(open_source(f"{place}/t/*.tar")) == len(open_source(f"{place}/*/*.tar"))
    assert len(open_source(tars[0])) == 1
    table = pyarrow.table({"image": [png(0)], "text": ["one"]})
    (place / "p").mkdir()
    pyarrow.parquet.write_table(table, place / "p" / "a.parquet")
    assert open_source(place / "p").caption(0) == "one" == open_source(f"{place}/p/*.parquet").caption(0)


def test_a_table_ends_its_lines_where_jsonl_does(tmp_path):
    words = ["a\u2028b", "c\x85d\x0ce", "f"]
    rows = [json.dumps({"file_name": f"{n}.png", "text": text}, ensure_ascii=False) for n, text in enumerate(words)]
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" + "\r\n".join(rows[:2]) + "\n" + rows[2]).encode())
    source = open_source(tmp_path)
    assert [source.caption(n) for n in range(3)] == words


def test_a_null_caption_in_a_table_is_a_missing_one(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "1.txt").write_text("beside")
    rows = [{"text": None}, {"text": None}, {"text": None, "caption": "other"}, {"text": "", "caption": "unread"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{n}.png", **row}) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(UserError, match="1 of 4 images .* no caption, the first is 0.png"):
        open_source(tmp_path)
    source = open_source(tmp_path, caption="given")
    assert [source.caption(n) for n in range(4)] == ["given", "beside", "other", ""]
    for row in ({"file_name": "0.png"}, {"file_name": "", "text": "x"}, {"file_name": "0.png", "text": 3}):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match="metadata.jsonl, line 1 is not like"):
            open_source(tmp_path)


def test_hidden_pictures_are_counted_and_other_hidden_files_are_not(tmp_path, capsys):
    (tmp_path / "d" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.png", ".b.PNG", ".ipynb_checkpoints/a-checkpoint.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "d" / name)
    for name in (".DS_Store", ".gitignore"):
        (tmp_path / "d" / name).write_text("")
    assert len(open_source(tmp_path / "d", caption="")) == 1
    told = capsys.readouterr().err
    assert "2 left out (its name begins with a dot), the first is .b.PNG" in told and "DS_Store" not in told
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "d" / "a.png", "a.png")
        tar.add(tmp_path / "d" / "a.png", "._a.png")
        tar.add(tmp_path / "d" / ".DS_Store", ".DS_Store")
    assert len(open_source(tmp_path / "a.tar", caption="")) == 1
    told = capsys.readouterr().err
    assert "._a.png left out (its name begins with a dot)" in told and "DS_Store" not in told


@pytest.mark.parametrize("place", ["", "  "])
def test_an_empty_place_is_not_this_folder(place):
    with pytest.raises(UserError, match="place of the images is empty"):
        open_source(place)


def test_a_picture_by_name_never_starts_another_program(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    source = open_source(tmp_path)
    assert source.sizes(range(1)).tolist() == [[-1, -1]]
    with pytest.raises(OSError, match="cannot identify"):
        source.image(0)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    with pytest.raises(OSError, match="cannot identify"):
        open_source(tmp_path / "a.tar", caption="").image(0)
