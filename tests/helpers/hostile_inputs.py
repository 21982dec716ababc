"""Pictures, captions, names and the things around them as careless or hostile hands make them; every one a function of a generator."""

from __future__ import annotations

import io
import json
import os
import pathlib
import socket
import struct
import tarfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

DEEP = "[" * 100_000


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, bits: int, colours: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG that says of itself what it is told to."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def turned(rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = int(rng.choice([0, 2, 3, 5, 6, 7, 8, 9, 65535]))
    return exif


def picture(rng: np.random.Generator) -> tuple[str, bytes]:
    """(its right suffix, its bytes): one of the forms in which pictures lie about."""
    w, h = (int(n) for n in rng.integers(1, 40, 2))
    rgb = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (h, w), np.uint16))
    twice = {"save_all": True, "append_images": [Image.new("RGB", (w, h), "green")]}
    makers = [
        lambda: (".png", saved(rgb, "PNG")),
        lambda: (".jpg", saved(rgb, "JPEG", exif=turned(rng))),
        lambda: (".webp", saved(rgb, "WEBP", exif=turned(rng))),
        lambda: (".avif", saved(rgb, "AVIF")),
        lambda: (".tif", saved(rgb, "TIFF", tiffinfo={0x0112: int(rng.integers(0, 10))})),
        lambda: (".tif", saved(rgb, "TIFF", compression=str(rng.choice(["tiff_lzw", "tiff_deflate", "jpeg", "packbits"])))),
        lambda: (".jpg", saved(rgb.convert("CMYK"), "JPEG")),
        lambda: (".tif", saved(rgb.convert(str(rng.choice(["CMYK", "LAB"]))), "TIFF")),
        lambda: (".png", saved(rgb.quantize(8), "PNG", transparency=int(rng.integers(0, 8)))),
        lambda: (".gif", saved(rgb, "GIF", **twice)),
        lambda: (".png", saved(deep, "PNG")),
        lambda: (".tif", saved(deep, "TIFF")),
        lambda: (".tif", saved(Image.fromarray(rng.standard_normal((h, w), np.float32)), "TIFF")),
        lambda: (".png", saved(rgb.convert("RGBA"), "PNG", **twice)),
        lambda: (".webp", saved(rgb, "WEBP", **twice)),
        lambda: (".png", saved(rgb, "EPS")),
        lambda: (".jpg", b"%PDF-1.4\n%!PS\n(/etc/passwd) run"),
        lambda: (".ico", saved(rgb, "ICO")),
        lambda: (".bmp", saved(rgb, "BMP")),
        lambda: (".jp2", saved(rgb, "JPEG2000")),
        lambda: (".png", raw_png(*(int(n) for n in rng.choice([0, 1, 30_000, 2**31 - 1, 2**32 - 1], 2)), 8, 2, b"\0" * 9)),
        lambda: (".png", raw_png(8, 8, 8, int(rng.integers(0, 8)), b"\0" * int(rng.integers(0, 400)))),
        lambda: (".png", raw_png(8, 8, 8, 0, b"\0" * 72, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 70_000_000, 1)) if rng.random() < 0.1 else b"")),
        lambda: (str(rng.choice([".png", ".jpg", ".webp", ".avif", ".tif"])), b""),
        lambda: (str(rng.choice([".png", ".gif", ".psd", ".ico", ".tga", ".pcx"])), rng.bytes(int(rng.integers(1, 300)))),
    ]  # fmt: skip
    return makers[int(rng.integers(len(makers)))]()


def bomb(rng: np.random.Generator) -> tuple[str, bytes]:
    """A small file with a great many pixels: some that Pillow takes, some that it refuses."""
    side = int(rng.choice([6_000, 9_000, 14_000, 20_000]))
    rows = b"\0" * ((side + 7) // 8 + 1) * side
    return ".png", raw_png(side, side, 1, 0, rows)


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """The bytes as they are, cut, flipped, with something in between, or with a piece repeated."""
    place = int(rng.integers(0, len(content) + 1))
    match int(rng.integers(6)):
        case 0:
            return content[:place]
        case 1:
            flipped = bytearray(content)
            for _ in range(min(len(flipped), int(rng.integers(1, 20)))):
                flipped[int(rng.integers(len(flipped)))] = int(rng.integers(256))
            return bytes(flipped)
        case 2:
            return content[:place] + rng.bytes(20) + content[place:]
        case 3:
            return content[:place] + content[place // 2 :]
    return content


def suffixed(rng: np.random.Generator, right: str) -> str:
    return str(rng.choice([".png", ".jpg", ".webp", ".tif", ".gif", ".BMP"])) if rng.random() < 0.2 else right


def some_picture(rng: np.random.Generator) -> tuple[str, bytes]:
    suffix, content = picture(rng)
    return suffixed(rng, suffix), damaged(rng, content)


CAPTIONS = ["a three", "", "a\0b", "\x1b[2J\x1b]0;gone\x07", "right \u202eto left\u202c", "one\r\ntwo\u2028three\x0cfour", "\ufeffmark", "猫 é 👩‍👩‍👧 ∑",
            "<|endoftext|>" * 50, "\ud800", "\udfff\ud800", "x, y, z"]  # fmt: skip


def caption(rng: np.random.Generator) -> str:
    """Text that JSON can carry, half characters too."""
    return "long ☃ " * 150_000 if rng.random() < 0.01 else CAPTIONS[int(rng.integers(len(CAPTIONS)))]


def caption_bytes(rng: np.random.Generator) -> bytes:
    """A caption file's content."""
    text = caption(rng).encode("utf-8", "surrogatepass")
    return [text, text, text, b"\xff\xfea\0", b"caf\xe9", text[:-1]][int(rng.integers(6))]


NAMES = [b"plain", b"\xff\xfe", b"caf\xe9", b"\x1b[31mred", b"new\nline", "\u202egnp".encode(), b"-rf", b"back\\slash", b"a b", b"[set]*?", b"'\"$(x)`",
         b"n" * 200, "猫".encode(), b"%s%n", b"\x7f\x01"]  # fmt: skip


def name(rng: np.random.Generator, number: int) -> str:
    """A stem that no other number has, as the system gives it to Python."""
    return os.fsdecode(b"%04d" % number + NAMES[int(rng.integers(len(NAMES)))])


def oddity(rng: np.random.Generator, place: pathlib.Path, stem: str) -> None:
    """One thing that is no picture, and is left out under its name."""
    match int(rng.integers(7)):
        case 0:
            (place / f"{stem}.png").symlink_to("nowhere")
        case 1:
            os.mkfifo(place / f"{stem}.png")
        case 2:
            os.mkfifo(place / f"{stem}.txt")
        case 3:
            (place / f"{stem}.jpg").symlink_to("/dev/zero")
        case 4:
            (place / f"{stem}.txt").write_bytes(b"alone")
        case 5:
            (place / f"{stem}.heic").write_bytes(b"x")
        case 6:
            here = os.getcwd()
            os.chdir(place)  # the name of a socket may have 107 bytes
            try:
                with socket.socket(socket.AF_UNIX) as end:
                    end.bind(stem[:4] + ".png")
            finally:
                os.chdir(here)


BAD_LINES = [b'{"file_name": "', b"[1, 2]", b"null", b'{"text": "x"}', b'{"file_name": "../../escape.png", "text": "x"}', b'{"file_name": 3, "text": "x"}',
             b'{"file_name": "/etc/passwd.png", "text": "x"}', b'{"file_name": "a\\u0000.png", "text": "x"}', b'{"file_name": "\\ud800.png", "text": "x"}',
             b'{"file_name": "a.png", "text": ' + DEEP.encode(), b'{"file_name": "a.png", "text": ["x"]}', b'{"file_name": "a.png", "n": ' + b"9" * 5000 + b"}",
             b"\xff\xfe", b'{"file_name": "", "text": "x"}', b"\x1b[2J"]  # fmt: skip


def table_line(rng: np.random.Generator, file: str) -> bytes:
    """A good line, with a caption that may be none."""
    words = None if rng.random() < 0.1 else caption(rng)
    return json.dumps({"file_name": file, "text": words, "more": None}, ensure_ascii=True).encode()


def add(tar: tarfile.TarFile, named: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(named)
    info.type, info.linkname, info.size = kind, link, len(content)
    tar.addfile(info, io.BytesIO(content))


def tar_oddity(rng: np.random.Generator, tar: tarfile.TarFile, stem: str) -> None:
    """One member that is no picture, and is left out under its name."""
    match int(rng.integers(6)):
        case 0:
            add(tar, f"{stem}.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        case 1:
            add(tar, f"{stem}.png", kind=tarfile.LNKTYPE, link="../../../etc/passwd")
        case 2:
            add(tar, f"{stem}.png", kind=tarfile.CHRTYPE)
        case 3:
            add(tar, f"{stem}.png", kind=tarfile.FIFOTYPE)
        case 4:
            add(tar, f"{stem}.cls", b"7")
        case 5:
            add(tar, f"{stem}.json", b"{}")


def tar_json(rng: np.random.Generator) -> bytes:
    good = json.dumps({"caption": caption(rng)}).encode()
    return [good, good, b'{"caption": 3}', b'{"caption": null}', b"{", b"[]", DEEP.encode(), b"\xff", b'{"caption": "x"}\0'][int(rng.integers(9))]


def broken_tar(rng: np.random.Generator, whole: bytes) -> bytes:
    """A tar that is refused: cut, or with a header that cannot be."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.png", b"x" * 600)
        add(tar, "a.png" if rng.random() < 0.5 else "a.jpg", b"y")  # two images of one key
    doubled = bytearray(out.getvalue())
    match int(rng.integers(4)):
        case 0:
            return whole[: int(rng.integers(1, max(2, len(whole) - 10_240)))]
        case 1:
            return bytes(doubled)
        case 2:  # a size of -512: where it ends is where it begins
            doubled[124:136] = b"\xff" * 10 + b"\xfe\x00"
            doubled[148:156] = b"%06o\0 " % (sum(doubled[:148]) + 8 * 32 + sum(doubled[156:512]))
            return bytes(doubled)
        case _:  # names of names of names
            header = tarfile.TarInfo("././@LongLink")
            header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4
            return (header.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(512, b"\0")) * 3000 + bytes(1024)


def invalid_strings(values: list[bytes | None]) -> pyarrow.Array:
    """A column of strings whose bytes nobody has looked at."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


def write_parquet(rng: np.random.Generator, path: pathlib.Path, count: int, wrong: bool) -> None:
    """A table of pictures in cells, with nulls, paths, huge cells and captions that are no text; wrong: with a type that is refused."""
    images, words = [{"bytes": saved(Image.new("L", (16, 16), 9), "PNG"), "path": None}], [b"a three"]
    for _ in range(count - 1):
        content = {"bytes": some_picture(rng)[1], "path": "x.png"}
        at = [str(path.parent.parent / "pipe.png"), "/dev/zero", "/nowhere.png", "a\0.png", "http://127.0.0.1:1/a.png", None]
        odd = [None, {"bytes": None, "path": at[int(rng.integers(len(at)))]}, {"bytes": b"", "path": None}, {"bytes": rng.bytes(2_000_000), "path": None}]
        images.append(odd[int(rng.integers(len(odd)))] if rng.random() < 0.2 else content)
        words.append(None if rng.random() < 0.1 else caption_bytes(rng))
    if wrong:
        kinds = [pyarrow.array(range(count)), pyarrow.array([["x"]] * count), pyarrow.array([{"a": 1}] * count), pyarrow.array(words, pyarrow.binary())]
        text, column = kinds[int(rng.integers(len(kinds)))], pyarrow.array(images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
        if rng.random() < 0.3:
            text, column = invalid_strings(words), pyarrow.array(range(count))
    else:
        text, column = invalid_strings(words), pyarrow.array(images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": text}), path)
