"""What the sources never do: run code that comes with weights or data, or read a pickle in any way but torch's weights_only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = [p for d in ("kernels", "reflow", "bench", "scripts") for p in sorted((ROOT / d).rglob("*.py"))]
# Modules whose readers run code, and the files that may use one of the names below, with the reason.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# A family's file, which the user names to have it run; experiments and commands are this package's own modules.
BY_NAME = {"reflow/models/registry.py": {"exec_module"}}


def offences(tree: ast.AST, path: str) -> list[str]:
    """'line: what' of everything in a source that could run foreign code."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" or isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"{line}: trust_remote_code")
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and not (isinstance(node.value, ast.Constant) and node.value.value is True):
            found.append(f"{line}: weights_only is not True")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{line}: import {name}" for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
        of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(function, ast.Name) and name in ("eval", "exec", "compile", "__import__"):
            found.append(f"{line}: {name}()")
        if (of, name) == ("torch", "load") and "weights_only" not in given:
            found.append(f"{line}: torch.load without weights_only")
        if (of, name) in (("yaml", "load"), ("os", "system"), ("np", "load")) and "allow_pickle" not in given:
            found += [f"{line}: {of}.{name}"] if of != "np" else []
        if "allow_pickle" in given and not (isinstance(given["allow_pickle"], ast.Constant) and given["allow_pickle"].value is False):
            found.append(f"{line}: allow_pickle")
        if "shell" in given or name == "add_safe_globals":
            found.append(f"{line}: {name}")
        if name == "exec_module" and name not in BY_NAME.get(path, set()):
            found.append(f"{line}: exec_module")
    return found


def test_no_source_runs_what_comes_with_weights_or_data():
    found = {name: offences(ast.parse(path.read_text()), name) for path in SOURCES for name in [path.relative_to(ROOT).as_posix()]}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("text", [
    "load(x, trust_remote_code=True)", "load(x, **{'trust_remote_code': True})", "torch.load(f)", "torch.load(f, weights_only=False)", "import pickle",
    "from joblib import load", "eval(x)", "exec(x)", "yaml.load(f)", "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)",
    "spec.loader.exec_module(m)", "torch.serialization.add_safe_globals([x])",
])  # fmt: skip
def test_each_of_them_would_be_found(text):
    assert offences(ast.parse(text), "reflow/x.py")
