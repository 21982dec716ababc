"""What a fresh shell shows: nothing but our own lines, help in a moment, and no need of packages for Linux or a GPU."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "TRITON_INTERPRET")

# Commands of standard input, one a line, words between tabs, in one process; an exit code after each.
SEVERAL = """
import importlib.machinery, importlib.metadata, sys

BLOCKED = set()

class Finder(importlib.machinery.PathFinder):
    # As where these packages are not installed: for import, find_spec and importlib.metadata alike.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=importlib.metadata.DistributionFinder.Context()):
        return () if context.name in BLOCKED else super().find_distributions(context)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

def leave(code):
    raise SystemExit(code)

for line in sys.stdin.read().splitlines():
    words = line.split("\\t")
    if words[0] == "block":
        BLOCKED = set(words[1:])
        continue
    from reflow import cli
    cli.leave = leave
    try:
        cli.main(words)
    except SystemExit as ending:
        print(f"exit code {ending.code}", flush=True)
    for name in BLOCKED & set(sys.modules):
        print(f"{name} was imported", flush=True)
"""


def fresh(*argv, text="", cwd=ROOT):
    env = {key: value for key, value in os.environ.items() if key not in OURS} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=env, cwd=cwd, timeout=600)


def several(cwd, *commands):
    return fresh("-c", SEVERAL, text="\n".join("\t".join(map(str, words)) for words in commands), cwd=cwd)


def test_help_needs_no_torch_and_names_every_command():
    code = "import sys; from reflow import cli\ntry: cli.main(['--help'])\nfinally: print(*sys.modules)"
    done = fresh("-c", code)
    *text, modules = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    heavy = {"torch", "numpy", "pydantic", "diffusers", "transformers"}
    assert "reflow.quiet" in modules.split() and not heavy & set(modules.split())
    for name in ("train", "sample", "evaluate", "compare", "export", "merge", "recipe", "experiment", "env"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in text), name


def test_help_of_a_command_needs_no_torch():
    """All in one process: what one of them imported would still be there at the end."""
    names = ("train", "sample", "evaluate", "compare", "export", "merge", "recipe", "experiment", "env")
    done = fresh("-c", SEVERAL + "print(*sys.modules)", text="\n".join(f"{name}\t--help" for name in names))
    *text, modules = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and text.count("exit code 0") == len(names)
    assert [line.split()[2] for line in text if line.startswith("usage: reflow ")] == list(names)
    assert not {"torch", "diffusers", "transformers"} & set(modules.split())


BAD = [
    (("trian", "--recipe", "digits"), "There is no command 'trian' (did you mean 'train'?)"),
    (("train", "--recipe", "digts"), "There is no recipe called 'digts' (did you mean 'digits'?)"),
    (("sample", "--run-dir", "nowhere", "--prompt", "x"), "There is no folder nowhere"),
]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    done = several(tmp_path, *(argv for argv, _ in BAD))
    assert done.stdout == "exit code 2\n" * len(BAD) and not list(tmp_path.iterdir())
    said = done.stderr.splitlines()
    assert len(said) == len(BAD) and all(line.startswith(f"reflow: {words}") for line, (_, words) in zip(said, BAD)), said
    whole = fresh("-m", "reflow", *BAD[0][0], cwd=tmp_path)  # and as a process, which ends with that code
    assert whole.returncode == 2 and whole.stdout == "" and whole.stderr == f"{said[0]}\n"


def test_training_starts_by_module_as_the_launcher_starts_it(tmp_path):
    # What `deepspeed --module` adds comes first; there is no scripts/ folder beside an installed wheel.
    done = fresh("-m", "reflow.training", "--local_rank=0", "--recipe", "digts", cwd=tmp_path)
    assert done.returncode == 2 and "There is no recipe called 'digts'" in done.stderr and not list(tmp_path.iterdir())


def test_no_arguments_show_the_help():
    done = fresh("-m", "reflow")
    assert done.returncode == 2 and "reflow sample --run-dir runs/first" in done.stderr


def test_commands_print_their_own_lines_and_nothing_else(run_dir, tmp_path):
    # Each in a process of its own would import torch and diffusers four times; the first command is what matters.
    done = several(
        tmp_path,
        ("sample", "--run-dir", run_dir, "--prompt", "a seven"),
        ("export", "--run-dir", run_dir, "--out", "student"),
        ("export", "--run-dir", run_dir, "--out", "delta.safetensors", "--format", "delta"),
        ("merge", "--base", "builtin", "--delta", "delta.safetensors", "--out", "merged"),
    )
    assert done.stderr == ""
    ends = "needs no package of ours. 2 steps with DDIMScheduler are the student"
    wanted = [
        "1 image, 2 steps by tiny, stage 2: samples/00000.png",
        "exit code 0",
        "diffusers folder of tiny (stage 2 of 2, 2 windows): student",
        f"scheduler: DDIMScheduler, so it {ends}",
        "exit code 0",
        "Delta weights of tiny (stage 2 of 2, 2 windows) against builtin: delta.safetensors",
        "exit code 0",
        "210 tensors merged, 0 of another shape kept, 0 in one model only.",
        "The weights changed by ",
        "diffusers folder: merged",
        f"scheduler: DDIMScheduler, so it {ends}",
        "exit code 0",
    ]
    said = done.stdout.splitlines()
    assert len(said) == len(wanted) and all(map(str.startswith, said, wanted)), done.stdout


def test_without_triton_deepspeed_and_bitsandbytes(run_dir, tmp_path):
    """As on Windows and macOS: everything but training works, and training says what it lacks."""
    train = ("train", "--recipe", "digits-quick", "--run-dir", "run")
    done = several(
        tmp_path,
        ("block", "triton", "deepspeed", "bitsandbytes"),
        ("env",),
        ("sample", "--model", "builtin", "--prompt", "a seven", "--steps", "4"),
        ("sample", "--run-dir", run_dir, "--prompt", "a seven"),
        ("export", "--run-dir", run_dir, "--out", "student"),
        ("export", "--run-dir", run_dir, "--out", "delta.safetensors", "--format", "delta"),
        ("merge", "--base", "builtin", "--delta", "delta.safetensors", "--out", "merged"),
        train,
        ("block", "bitsandbytes"),
        (*train, "--set", "train.optimizer=adamw8bit", "--set", "stages.0.pairs=0"),
    )
    codes = [line.removeprefix("exit code ") for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["0"] * 6 + ["2"] * 2, done.stderr
    assert "was imported" not in done.stdout
    for package in ("triton", "deepspeed", "bitsandbytes"):
        assert any(line.split()[:3] == [package, "not", "installed"] for line in done.stdout.splitlines())
    assert (tmp_path / "merged" / "model_index.json").is_file() and (tmp_path / "samples-2" / "00000.png").is_file()
    lacks, optimizer = (line for line in done.stderr.splitlines() if not line.startswith("["))  # training says what it waits for
    assert lacks.startswith("reflow: Training needs DeepSpeed") and "pip install deepspeed" in lacks
    assert optimizer.startswith("reflow: train.optimizer = 'adamw8bit' needs the package bitsandbytes")
    assert "pip install bitsandbytes" in optimizer
