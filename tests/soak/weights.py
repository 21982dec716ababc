"""Weights of strangers: a hostile or damaged file in a base's folder, a single file, a run, a delta or a LoRA, through every command that reads it.

Whatever is wrong has to end in one sentence and exit code 2 before anything is written; what is harmless works. No case runs code of a file
(pickles here would leave a mark), writes outside its folder, or takes much memory.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import struct
import tempfile
import unittest.mock

import torch
from command import called, not_a_sentence
from safetensors.torch import load_file, save, save_file

from reflow.models.digits import BUILTIN
from reflow.weights.delta import student_metadata

TITLE = "hostile and damaged weights, through every command that reads them"
CASES = 320
ROOM = 2 * 2**30  # bytes of memory that a case may take on top
UNET = "unet/diffusion_pytorch_model.safetensors"
RECIPE = """name = "small"
[model]
family = "{family}"
base = "{base}"
lora_rank = {rank}
[train]
batch_size = 4
micro_batch = 4
[checkpoint]
minutes = 0
[[stages]]
windows = 2
solver_steps = 1
samples = 4
"""
ODD = [None, True, -1, 0, 7, 0.5, -3.5, 1e308, 10**9, 10**30, "", "x", "../..", "x" * 10**5, [], {}, [1], [None], [[[[1]]]], {"a": {"b": 1}}, [10**9] * 4,
       list(range(10**5)), "nan"]  # fmt: skip


class Mark:
    """A pickle that runs code: it makes a file."""

    def __init__(self, place: pathlib.Path) -> None:
        self.place = place

    def __reduce__(self):
        return pathlib.Path.touch, (self.place,)


@functools.cache
def state() -> dict[str, torch.Tensor]:
    return load_file(BUILTIN / UNET)


def says(**changes: str) -> dict[str, str]:
    from reflow.flow import Windows

    return {"format": "pt", **student_metadata(Windows.uniform(2), "ddim_eps", recipe="x"), **changes}


@functools.cache
def single() -> tuple[pathlib.Path, bytes]:
    """(a folder of the tiny SD1.5, the same as one file)."""
    import tiny_pipelines
    from reflow.export import single_file_state

    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-sd15-"))
    tiny_pipelines.sd15().save_pretrained(folder)
    return folder, save({k: v.clone().contiguous() for k, v in single_file_state(folder, folder, dtype="fp32").items()})


def header(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def packed(head: dict | bytes, body: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def lied(rng: random.Random, content: bytes, mark: pathlib.Path) -> bytes:
    """A file whose header and body do not belong together, or that is no such file at all."""
    head, body = header(content)
    name = rng.choice([key for key in head if key != "__metadata__"])
    kind = rng.randrange(14)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return rng.choice([b"", b"<html>login</html>", b"\x00" * 100, rng.randbytes(5000), b"version https://git-lfs.github.com/spec/v1\n"])
    if kind == 2:
        return struct.pack("<Q", rng.choice([2**63, 2**40, 10**8, 2**25 + 1, len(content), 1])) + content[8:]
    if kind == 3:
        return packed(rng.choice([b"[" * 10**5, b"{}", b"[]", b'{"a":' * 5000, b'{"a": 1}', b"\xff" * 99, b"null"]), body)
    if kind == 4:
        return packed({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}, b"")
    if kind == 5:
        return pickle.dumps(Mark(mark))
    if kind == 6:
        return packed(head | {name: head[name] | {"shape": rng.choice([[2**62, 4], [10**12], [-1], [0], [1.5], "x", [[1]], [1] * 500])}}, body)
    if kind == 7:
        return packed(head | {name: head[name] | {"dtype": rng.choice(["I8", "F64", "F8_E4M3", "X", 1, "BOOL", "U64"])}}, body)
    if kind == 8:
        return packed(head | {name: head[name] | {"data_offsets": rng.choice([[0, 4], [4, 0], [0, 2**63], [-8, 8], [], [0, len(body) * 2]])}}, body)
    if kind == 9:
        return packed({key: value for key, value in head.items() if key != name}, body)
    if kind == 10:
        return packed(head | {name: None}, body)
    if kind == 11:
        return packed(head, body + b"\x00" * 64)
    if kind == 12:
        return packed(head, body[:-4])
    return packed(head | {"__metadata__": rng.choice([[], {"a": 1}, "x", {"a": {"b": "c"}}])}, body)


def changed(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A well-made file of tensors that do not fit, or are no weights."""
    tensors = dict(tensors)
    name = rng.choice(sorted(key for key, value in tensors.items() if value.is_floating_point() and value.ndim))
    value = tensors[name]
    kind = rng.randrange(10)
    if kind == 0:
        tensors[name] = torch.full_like(value, rng.choice([float("nan"), float("inf"), float("-inf")]))
    elif kind == 1:
        tensors[name] = value.clone()
        tensors[name].view(-1)[rng.randrange(value.numel())] = float("nan")
    elif kind == 2:
        tensors[name] = value.to(rng.choice([torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]))
    elif kind == 3:
        tensors = {key: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for key, value in tensors.items()}
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[rng.choice(["more", "", "a" * 10**5, "\x1b[2J", "../x", f"{name}.x"])] = tensors.pop(name)
    elif kind == 6:
        tensors[name] = rng.choice([value[None], value[..., :0], value.reshape(-1)[0], value.new_zeros(3, 5, 7), value.new_zeros(1, 2)]).contiguous()
    elif kind == 7:
        tensors = {"weight": torch.zeros(3)}
    elif kind == 8:
        tensors = {}
    else:
        tensors = {key: torch.zeros(()) for key in tensors}
    return tensors


def metadata(rng: random.Random) -> dict[str, str]:
    """A student's metadata that cannot be."""
    windows = ["", "x", "[]", "[1]", "[1, 1]", "[0, 1]", "[NaN, 0]", "[1, -1]", '["a", 0]', "{}", "null", "7", "[" * 10**5, "[1e999, 0]", '"10"', "[[1], [0]]",
               json.dumps([1 - i / 5000 for i in range(5001)])]  # fmt: skip
    return says(**rng.choice([{"windows": rng.choice(windows)}, {"prediction_type": rng.choice(["", "x", "epsilon", "a" * 10**5])},
                              {"network_time": rng.choice(["", "x", "\x1b[2J"])}, {"windows": rng.choice(windows), "prediction_type": "x"}]))  # fmt: skip


def spoil_folder(rng: random.Random, folder: pathlib.Path, mark: pathlib.Path) -> tuple[str, bool]:
    """Damage a diffusers folder in one way: (kind, whether it has to be refused)."""
    kind = rng.randrange(8)
    files = sorted(folder.rglob("*.json"))
    configs = [f for f in files if f.name in ("config.json", "scheduler_config.json", "model_index.json")]
    weights = sorted(folder.rglob("*.safetensors"))
    if kind == 0:
        file = rng.choice(weights)
        file.write_bytes(lied(rng, file.read_bytes(), mark))
        return "folder: weights lie", False
    if kind == 1:
        file = rng.choice(weights)
        save_file(changed(rng, load_file(file)), file, {"format": "pt"})
        return "folder: weights do not fit", True
    if kind == 2:
        index = json.loads((folder / "model_index.json").read_text())
        part = rng.choice(["vae", "unet", "text_encoder", "tokenizer", "../../out", "/tmp/x", "a/b"])
        index[part] = rng.choice([["os", "system"], ["evil", "Evil"], ["diffusers", "Evil.x"], ["diffusers_modules.local.x", "X"], ["diffusers"], [1, 2],
                                  ["__main__", "X"], ["reflow.cli", "main"], [["diffusers"], "X"]])  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index))
        return "folder: index names foreign code", True
    if kind == 3:
        file = rng.choice([f for f in configs if f.parent.name in ("unet", "vae", "text_encoder", "text_encoder_2")])
        extra = rng.choice([{"auto_map": {"AutoModel": "evil.Evil"}}, {"quantization_config": {"quant_method": "torchao"}}, {"num_hidden_layers": 10**9,
                            "layers_per_block": 10**9}, {"attn_implementation": "someone/kernel"}, {"block_out_channels": [2**30, 2**30]},
                            {"vocab_size": 10**9, "in_channels": 10**9}])  # fmt: skip
        file.write_text(json.dumps(json.loads(file.read_text()) | extra))
        return "folder: config asks for too much", True
    if kind == 4:
        file = rng.choice(files)
        file.write_bytes(rng.choice([b"", b"[]", b"{", b"\xff\xfe", b"[" * 10**5, b'{"a": NaN}', b"null", b'{"a": ' + b"9" * 5000 + b"}"]))
        return "folder: JSON is none", file in configs
    if kind == 5:
        file = rng.choice(configs)
        config = json.loads(file.read_text())
        config[rng.choice(sorted(config))] = rng.choice(ODD)
        file.write_text(json.dumps(config))
        return "folder: a value of a config", False
    if kind == 6:
        file = rng.choice(weights)
        file.unlink()
        if rng.randrange(2):
            stem = "pytorch_model" if file.name.startswith("model") else "diffusion_pytorch_model"
            torch.save({"a": Mark(mark)}, file.parent / f"{stem}.bin")
        else:
            name = rng.choice(["../../x.safetensors", "/etc/passwd", "x.bin", 3, "none.safetensors"])
            (file.parent / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
        return "folder: pickles and shards in place of weights", True
    file = rng.choice([folder / "scheduler/scheduler_config.json"])
    odd = rng.choice([{"num_train_timesteps": 10**12}, {"trained_betas": [0.1] * 10**6}, {"beta_schedule": "x"}, {"beta_start": "x"}, {"beta_end": [1]},
                      {"num_train_timesteps": "many"}, {"beta_end": 1e308}, {"prediction_type": ["x"]}, {"trained_betas": "abc"}, {"beta_start": None},
                      {"_class_name": "PiecewiseFlowScheduler", "num_time_windows": 10**9},
                      {"_class_name": "PiecewiseFlowScheduler", "window_boundaries": ["x"]}])  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    return "folder: scheduler", False


def run_folder(folder: pathlib.Path, content: bytes, rank: int = 0, base: str = "builtin", family: str = "digits") -> pathlib.Path:
    (folder / "run" / "stage-1").mkdir(parents=True)
    (folder / "run" / "recipe.toml").write_text(RECIPE.format(base=base, rank=rank, family=family))
    (folder / "run" / "stage-1" / f"{'lora' if rank else 'unet'}_ema.safetensors").write_bytes(content)
    return folder / "run"


def lora() -> dict[str, torch.Tensor]:
    layers = [key.removesuffix(".weight") for key in sorted(state()) if key.endswith(("to_q.weight", "to_v.weight"))]
    return {f"unet.{k}.lora_{p}.weight": torch.full((2, state()[f"{k}.weight"].shape[1]) if p == "A" else (state()[f"{k}.weight"].shape[0], 2), 1e-3)
            for k in layers for p in "AB"}  # fmt: skip


def spoilt_file(rng: random.Random, tensors: dict[str, torch.Tensor], mark: pathlib.Path) -> tuple[str, bytes, bool]:
    """(kind, the bytes of a student's file that is wrong in one way, whether it has to be refused)."""
    kind = rng.randrange(3)
    if kind == 0:
        return "lies", lied(rng, save(tensors, says()), mark), False
    if kind == 1:
        return "does not fit", save(changed(rng, tensors), says()), True
    return "metadata", save(tensors, metadata(rng)), True


def case(rng: random.Random, index: int, folder: pathlib.Path) -> tuple[str, list[str], bool]:
    """(kind, the command's words, whether it has to be refused), with everything that it reads made in `folder`."""
    mark, out = folder / "ran", ["--out", str(folder / "out")]
    base = folder / "base"
    prompt = ["--prompt", "a seven", "--steps", "2", "--batch-size", "1"]
    way = index % 8
    if way in (0, 1, 2, 3):
        shutil.copytree(BUILTIN, base)
        kind, must = spoil_folder(rng, base, mark)
        if way == 0:
            return f"sample, {kind}", ["sample", "--model", str(base), *prompt, *out], must
        if way == 1:
            # Merging copies what is no UNet as it lies.
            (folder / "d.safetensors").write_bytes(save({k: v * 1e-3 for k, v in state().items()}, says()))
            strict = must and "index" in kind
            return f"merge, {kind}", ["merge", "--base", str(base), "--delta", str(folder / "d.safetensors"), *out], strict
        if way == 2:
            recipe = run_folder(folder, b"", base=str(base)) / "recipe.toml"
            return f"train, {kind}", ["train", "--recipe", str(recipe), "--run-dir", str(folder / "out")], must
        run = run_folder(folder, save(state(), says()), base=str(base))
        command = rng.choice([["export", "--run-dir", str(run), *out], ["evaluate", "--run-dir", str(run), "--samples", "60", "--seeds", "1", *out]])
        return f"{command[0]}, {kind}", command, must and command[0] == "evaluate"
    if way == 4:
        kind, content, must = spoilt_file(rng, state(), mark)
        run = run_folder(folder, content)
        command = rng.choice(["sample", "export", "delta", "train"])
        words = {"sample": ["sample", "--run-dir", str(run), *prompt, *out], "export": ["export", "--run-dir", str(run), *out],
                 "delta": ["export", "--run-dir", str(run), "--format", "delta", "--out", str(folder / "out.safetensors")],
                 "train": ["train", "--recipe", "digits-quick", "--set", f"model.student_weights={run / 'stage-1' / 'unet_ema.safetensors'}",
                           "--set", "stages.0.pairs=0", "--set", "train.batch_size=4", "--set", "train.micro_batch=4", "--set", "train.warmup=0",
                           "--set", "stages.0.samples=4", "--set", "validate.every=0", "--set", "stages.1.samples=4", "--set", "stages.2.samples=4",
                           "--set", "stages.1.pairs=0", "--set", "stages.2.pairs=0", "--run-dir", str(folder / "out")]}  # fmt: skip
        # Training reads no metadata; a run's own recipe says them.
        return f"{command}, student {kind}", words[command], must and not (kind == "metadata" and command == "train")
    if way == 5:
        kind, content, must = spoilt_file(rng, {k: v * 1e-3 for k, v in state().items()}, mark)
        (folder / "d.safetensors").write_bytes(content)
        return f"merge, delta {kind}", ["merge", "--base", "builtin", "--delta", str(folder / "d.safetensors"), *out], must
    if way == 6:
        kind, content, must = spoilt_file(rng, lora(), mark)
        run = run_folder(folder, content, rank=2)
        command = rng.choice([["sample", "--run-dir", str(run), *prompt, *out], ["export", "--run-dir", str(run), *out],
                              ["export", "--run-dir", str(run), "--format", "lora-kohya", "--out", str(folder / "out.safetensors")]])  # fmt: skip
        return f"{command[0]}, LoRA {kind}", command, must and kind == "metadata"
    configs, content = single()
    name, must = "m.safetensors", False
    if rng.randrange(3) == 0:
        (folder / name).write_bytes(lied(rng, content, mark))
        kind = "lies"
    elif rng.randrange(2):
        tensors = dict(torch_state(content))
        (folder / name).write_bytes(save(changed(rng, tensors), {"format": "pt"}))
        kind = "does not fit"
    else:
        name, kind, must = "m.ckpt", "pickle", True
        tensors = torch_state(content)
        first = sorted(tensors)[0]
        made = rng.choice([Mark(mark), {"state_dict": tensors, "x": Mark(mark)}, {"state_dict": [1]}, [1], {"state_dict": {1: 2}}, tensors | {first: Mark(mark)},
                           {"state_dict": tensors | {first: torch.zeros(1).expand(10**12)}}, tensors | {first: torch.zeros(3, 3).to_sparse()}])  # fmt: skip
        torch.save(made, folder / name)
    words = ["sample", "--model", str(folder / name), "--config", str(configs), "--tokenizer", str(configs), "--prompt", "a", "--steps", "1", *out]
    return f"sample, single file {kind}", words, must


def torch_state(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def trial(index: int, folder: pathlib.Path) -> dict:
    random_state, before = random.Random(f"weights {index}"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, words, must = case(random_state, index, folder)
    there = {path for path in folder.rglob("*") if "cache" not in path.parts}
    with unittest.mock.patch.dict(os.environ, {"REFLOW_CACHE": str(folder / "cache")}):
        code, _, err = called(words)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    new = {path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts} - there
    failed = None
    if (folder / "ran").exists():
        failed = "code of the file was run"
    elif code not in (0, 2) or (must and code != 2):
        failed = f"exit code {code}{' and not 2' if must else ''}: {err[-400:]}"
    elif code == 2 and (failed := not_a_sentence(err)) is None and "weights_only=False" in err:
        failed = "the refusal passes on the advice to run a pickle"
    elif code == 2 and failed is None and [path for path in new if not path.name.startswith((".", "out")) and "out" not in path.parts]:
        failed = f"it left {sorted(map(str, new))[:3]}"
    elif taken > ROOM:
        failed = f"it took {taken >> 20} MiB"
    return {"kind": kind, "failed": failed, "refused": int(code == 2), "worked": int(code == 0)}


