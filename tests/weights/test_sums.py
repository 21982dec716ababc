"""Equal tensors make equal files, and a file with checksums is read only where they fit."""

import ast
import pathlib

import pytest
import torch
from safetensors import safe_open

from reflow.errors import UserError
from reflow.training.checkpoint import save_weights
from reflow.weights import sums
from reflow.weights.files import read_state, save_tensors, write_state

ROOT = pathlib.Path(__file__).resolve().parents[2]
STATE = {"a": torch.arange(3, dtype=torch.bfloat16), "zero": torch.zeros(()), "none": torch.zeros(0, 3), "yes": torch.tensor([True]),
         "bytes": torch.zeros(4).to(torch.float8_e4m3fn), "numbers": torch.arange(5)}
# Whatever text a name, a prompt or a path may hold.
METADATA = {f"key {n}": "quote \" slash \\ / tab \t \x01 \x7f line \u2028 é 😀" * n for n in range(8)}


def test_equal_tensors_and_metadata_make_equal_files(tmp_path):
    files = [write_state(STATE, tmp_path / f"{n}.safetensors", metadata=METADATA) for n in range(8)]
    for n, order in enumerate((list, reversed)):
        files.append(tmp_path / f"saved-{n}.safetensors")
        save_tensors(dict(order(list(STATE.items()))), files[-1], dict(order(list({"format": "pt", **METADATA}.items()))))
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt", **METADATA}
        assert all(torch.equal(opened.get_tensor(k).view(torch.uint8), v.view(torch.uint8)) for k, v in STATE.items() if v.ndim)


def test_only_one_place_writes_safetensors():
    writers = {}
    for path in sorted((ROOT / "reflow").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else \
                node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if name in ("save_file", "save_model", "serialize_file"):
                writers.setdefault(path.relative_to(ROOT).as_posix(), []).append(name)
    assert writers == {"reflow/weights/files.py": ["save_file"]}


def test_weights_with_checksums_are_refused_where_a_bit_flipped(tmp_path):
    plain = {k: v for k, v in STATE.items() if k in ("a", "zero", "none")}  # what weights are stored in
    path = tmp_path / "stage-1" / "unet_ema.safetensors"
    assert save_weights(plain, path, METADATA) == save_weights(plain, tmp_path / "again.safetensors", METADATA)
    good = path.read_bytes()
    assert good == (tmp_path / "again.safetensors").read_bytes() and read_state(path).keys() == plain.keys()
    for at in (len(good) - 1, good.index(b"tab"), good.index(b'a\\": ') + 8):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        with pytest.raises(UserError, match=r"unet_ema.safetensors is damaged or cut short \(.*(checksum|header)"):
            read_state(path)


def test_a_file_without_checksums_is_read_unless_they_are_needed(tmp_path):
    save_tensors(STATE, tmp_path / "a.safetensors", METADATA)
    sums.verify(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no readable checksums"):
        sums.verify(tmp_path / "a.safetensors", needed="00000000")
    for told in ("[]", "{", "{}", "[" * 10_000):
        save_tensors(STATE, tmp_path / "b.safetensors", {sums.KEY: told})
        with pytest.raises(ValueError, match="no readable checksums|header's checksum"):
            sums.verify(tmp_path / "b.safetensors")
