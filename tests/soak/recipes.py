"""Recipes that nobody would write: a case is a text or bytes and a list of --set words, put through the command `reflow recipe --resolved`.

A case is fine if it resolves to a recipe that reads back equal, or ends with one sentence and exit code 2. Which of the two a case of no
known outcome takes is free; cases that are bad by construction ("must": 2) have to be refused, and the shipped ones to resolve.
"""

from __future__ import annotations

import pathlib
import random

from command import called, not_a_sentence

from reflow.recipes import reading
from reflow.recipes.settings import Recipe

TITLE = "generated recipes, as TOML and --set, through the command line"
CASES = 5000
NAMES = reading.available()
CHARACTERS = "a0._-=[]{}\"'#,: \t\n\\\x00\x01\x1b\x7f\x85\u202e\u2028\ufeffé😀"
SECTIONS = [(alias, [f.alias or n for n, f in field.annotation.model_fields.items()])
            for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields") for alias in [field.alias or name]]  # fmt: skip
STAGE = list(reading.fields_at(("stages",)))


def value(rng: random.Random) -> str:
    """The text of a TOML value, of every type and size, sometimes none."""
    number = rng.choice(["0", "-1", "1", "3", "64", "1e3", "0.5", "-0.0", "1e-320", "1e308", "1e999", "inf", "-inf", "nan", "0x7fffffffffffffff",
                         str(2**63 - 1), str(2**63), str(-(2**63)), "0x" + "f" * rng.choice([20, 5000]), "9" * rng.choice([20, 4000, 5000]),
                         str(rng.randint(-(10**6), 10**6)), repr(rng.uniform(-10, 10)), "1_000", "٣", "1979-05-27", "07:32:00"])  # fmt: skip
    text = "".join(rng.choice(CHARACTERS) for _ in range(rng.choice([0, 1, 3, 30])))
    kind = rng.randrange(18)
    if kind < 5:
        return number
    if kind > 11:
        return rng.choice(["true", "false", "1", "2", "4", "0.25", "0.5", "'adamw'", "'cosine'", "'root'", "'mse'", "['a b', 'c']", "[1, 2]", "'x.json'"])
    if kind == 5:
        return rng.choice(["true", "false", "maybe", "", "null"])
    if kind == 6:
        return reading.toml_value(rng.choice(["", "cpu", "cosine", "digits", "../x", "/", "a" * rng.choice([300, 100_000]), text, "9" * 30, "1e9"]))
    if kind == 7:
        return text
    if kind == 8:
        return "[" + ", ".join(value(rng) for _ in range(rng.choice([0, 1, 2, 5]))) + "]"
    if kind == 9:
        return "{" + ", ".join(f"k{i} = {value(rng)}" for i in range(rng.choice([0, 1, 3]))) + "}"
    if kind == 10:
        deep = rng.choice([5, 9, 100, 5000])
        return rng.choice(["[" * deep + "]" * deep, "{a=" * deep + "1" + "}" * deep, "[" * deep])
    return rng.choice(["[1.0, nan, 0.0]", "[1, .5, 0]", "[1.0, 0.5, 0.5, 0.0]", "[0.0, 1.0]", "[1.0, 0.0]", "[inf, 0]", "[" + "0.5," * 3000 + "]"])


def key(rng: random.Random) -> str:
    """A dotted key: mostly one that exists, sometimes near it, sometimes nothing like it."""
    section, names = rng.choice(SECTIONS)
    name = rng.choice(names)
    known = rng.choice([f"{section}.{name}", f"stages.{rng.choice('00123')}.{rng.choice(STAGE)}", "name", section, "stages"])
    kind = rng.randrange(10)
    if kind < 7:
        return known
    if kind == 7:
        at = rng.randrange(len(known))
        return known[:at] + rng.choice(CHARACTERS) + known[at + 1 :]
    return rng.choice(["", ".", "..", "a." * rng.choice([3, 20, 2000]) + "a", "stages.-1.samples", f"stages.{'9' * 5000}.samples", "stages.x.samples",
                       "k" * rng.choice([200, 100_000]), "train.seed.x", "name.x", "data.sources.0.path", "stages.٠.samples", "__class__.x"])  # fmt: skip


def word(rng: random.Random) -> str:
    """A --set word: half of them give a key the value that some recipe has there."""
    if rng.randrange(2):
        known = reading.flatten(reading.load(rng.choice(NAMES)).resolved())
        name = rng.choice(sorted(known))
        return f"{name}={reading.toml_value(known[name])}"
    return f"{key(rng)}{rng.choice(['=', '=', '=', '=', ''])}{value(rng)}"


def mutated(rng: random.Random, text: str) -> str:
    """A recipe's text with some lines changed, doubled, lost or moved, or characters put in."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind > 6:
            lines[at] += rng.choice([" ", "  # said", "\t", " # \x85\u202e", "\r"])
        elif kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines.insert(at, f"{key(rng).rpartition('.')[2]} = {value(rng)}")
        elif kind == 3 and "=" in lines[at]:
            lines[at] = f"{lines[at].partition('=')[0]}= {value(rng)}"
        elif kind == 4:
            lines.insert(at, rng.choice(["[train]", "[[stages]]", "[stages]", "[x]", "[", "[a." + "a." * 40 + "a]", "[[train]]", "["]))
        else:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(CHARACTERS) + lines[at][cut + rng.randrange(2) :]
        lines = lines or [""]
    return "\n".join(lines)


def spoilt(rng: random.Random, text: str) -> bytes:
    """Bytes of a recipe that is no UTF-8, is cut, or has another encoding."""
    content = bytearray(text.encode())
    for _ in range(rng.choice([1, 3, 50])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return rng.choice([bytes(content), text.encode()[: rng.randrange(len(text))], text.encode("utf-16"), text.encode("utf-8-sig"),
                       text.replace("\n", "\r\n").encode(), text.encode() + b"\xff", b"\x00" * 100, b"", bytes(rng.randbytes(200))])  # fmt: skip


def large(rng: random.Random) -> str:
    """Texts that are too much of something."""
    count = rng.choice([17, 2000, 50_000])
    return rng.choice(["name = 'x'\n" + "x" * 2**20, "a." * count + "a = 1", "'a'." * count + "a = 1", f"[{'a.' * count}a]", "a = " + "[" * count,
                       "\n".join(f"k{i} = 1" for i in range(count)), "\n".join(f"[t{i}]" for i in range(count)), "x = '''" + "q" * 300_000 + "'''",
                       "x = {" + "a." * count + "a = 1}", "seed = " + "9" * count, '"' + "k" * count + '" = 1'])  # fmt: skip


def case(index: int) -> tuple[str, bytes | str, list[str], int | None]:
    """(kind, a file's bytes or a recipe's name, --set words, the exit code that must come)."""
    rng = random.Random(f"recipe {index}")
    name, kind = NAMES[index % len(NAMES)], index // len(NAMES) % 8
    if index < len(NAMES):
        return "shipped", name, [], 0
    text, _ = reading.text_of(name)
    if kind < 3:
        return "text, mutated", mutated(rng, text).encode("utf-8", "surrogateescape"), [], None
    if kind < 6:
        return "--set", name, [word(rng) for _ in range(rng.choice([1, 1, 2, 4]))], None
    if kind == 6:
        return "bytes", spoilt(rng, text), [], None
    return ("too large", large(rng).encode(), [], 2) if rng.randrange(3) else ("--set, no text", name, [f"name={rng.choice('ab')}\udc80"], 2)


def trial(index: int, folder: pathlib.Path) -> dict:
    kind, recipe, words, must = case(index)
    file = folder / "case.toml"
    if isinstance(recipe, bytes):
        file.write_bytes(recipe)
    given = [str(file) if isinstance(recipe, bytes) else recipe, "--resolved", *(f"--set={word}" for word in words)]
    code, out, err = called(["recipe", *given])
    return {"kind": kind, "failed": verdict(code, out, err, must, folder), "resolved": int(code == 0), "refused": int(code == 2)}


def verdict(code: int | None, out: str, err: str, must: int | None, folder: pathlib.Path) -> str | None:
    if code not in (0, 2) or (must is not None and code != must):
        return f"exit code {code} and not {'0 or 2' if must is None else must}: {err[-300:]}"
    if code == 2:
        return f"more than one line: {err[:300]!r}" if err.count("\n") != 1 or out else not_a_sentence(err)
    back = folder / "back.toml"
    back.write_text(out, encoding="utf-8")
    again, told, said = called(["recipe", str(back), "--resolved"])
    return None if again == 0 and told == out and not err else f"does not read back: {(said or err)[:300]!r}"
