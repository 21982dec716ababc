"""What can be told without running: ruff everywhere, types where the maths, the formats and the recipes are."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "reflow", "bench", "scripts", "tests")
NARROW = ("kernels/reflow_kernels", "reflow/flow")


# scripts/setup.sh leaves this note in an environment of its own, which has the tools; another's interpreter (REFLOW_PYTHON) need not.
OWN = (pathlib.Path(sys.prefix) / ".reflow-installed").exists()


def tool(tmp_path, *argv: str) -> str:
    """What a tool says where it finds something, else nothing; its own settings are in pyproject.toml."""
    if not OWN and importlib.util.find_spec(argv[0]) is None:
        pytest.skip(f"this interpreter is not the project's own and lacks {argv[0]}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MYPY", "RUFF"))} | {"RUFF_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout[-4000:] + done.stderr[-2000:]


def test_ruff_finds_nothing(tmp_path):
    assert tool(tmp_path, "ruff", "check", "-q", "--output-format", "concise", *FOLDERS) == ""


def test_lines_of_the_maths_and_the_formats_stay_narrow(tmp_path):
    assert tool(tmp_path, "ruff", "check", "-q", "--output-format", "concise", "--select", "E501", "--line-length", "120", *NARROW) == ""


def test_mypy_strict_finds_nothing(tmp_path):
    # The cache of an earlier call, where there is one, saves eleven of twelve seconds.
    assert tool(tmp_path, "mypy", "--no-error-summary", "--hide-error-context") == ""


@pytest.mark.parametrize("text, code", [("def f(x):\n    return x\n", "no-untyped-def"), ("def f(x: int) -> str:\n    return x\n", "return-value")])
def test_mypy_is_asked_strictly(tmp_path, text, code):
    """The settings that the rooms are checked with find what they should."""
    (tmp_path / "sample.py").write_text(text)
    said = tool(tmp_path, "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "sample.py"))
    assert f"[{code}]" in said


def test_launchers_beside_kernels_are_annotated():
    """mypy lets these files off, since what a kernel's arguments are the Triton compiler decides; their other functions are typed."""
    bare = []
    for path in sorted((ROOT / "kernels" / "reflow_kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or any("triton" in ast.dump(d) for d in node.decorator_list):
                continue
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if node.returns is None and node.name != "__init__" or any(a.annotation is None for a in arguments):
                bare.append(f"{path.name}:{node.lineno} {node.name}")
    assert bare == []
