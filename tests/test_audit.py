"""What the code imports and calls, read and not run: every package is declared and pinned, and nothing runs what a file holds."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = ("kernels", "reflow", "bench", "scripts")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import names that are not the package's own.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
# What a test asks for only where it is installed: a browser without a screen, another make of Inception.
WHERE_INSTALLED = {"PyQt6", "torch_fidelity"}
# Declared and imported by nobody here, and why.
FOR_OTHERS = {
    "tensorboard": "torch.utils.tensorboard writes with it",
    "accelerate": "diffusers loads weights without a second copy in memory where it is there",
    "pytest-xdist": "scripts/test.sh runs the suite on two workers",
    "ruff": "run as a program",
    "mypy": "run as a program",
}
IMPORTERS = ("import_module", "find_spec", "importorskip")


def trees(*folders: str) -> dict[str, ast.Module]:
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for d in folders for p in sorted((ROOT / d).rglob("*.py"))}


def modules(tree: ast.AST) -> set[str]:
    """Full names of all modules that are imported, by a statement or by name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def foreign(*folders: str) -> set[str]:
    """Packages of others that the folders import."""
    inner = {p.stem for p in (ROOT / "tests").rglob("*.py")} | {"reflow", "reflow_kernels", "bench", "tests"}
    tops = {name.split(".")[0] for tree in trees(*folders).values() for name in modules(tree)}
    return {PACKAGES.get(top, top) for top in tops if top not in sys.stdlib_module_names and top not in inner}


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {re.split(r"[><=;\s\[]", line)[0] for line in lines}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name: rest.split(";")[0].strip() for name, _, rest in (line.partition("==") for line in lines) if rest}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]+", text)[0].strip(".").split("."))


def test_what_is_imported_is_declared():
    extras = [name for name in PROJECT["optional-dependencies"] if name != "test"]
    assert foreign("kernels", "reflow") - declared(*extras) == set()
    assert foreign("bench", "scripts", "tests") - declared(*extras, "test") == WHERE_INSTALLED


def test_what_is_declared_is_imported():
    everything = declared(*PROJECT["optional-dependencies"])
    assert everything - foreign(*OURS, "tests") <= FOR_OTHERS.keys() <= everything
    assert declared() - foreign("kernels", "reflow") == FOR_OTHERS.keys() & declared(), "only tests need it: declare it for them"


def test_pins_lie_in_the_declared_ranges():
    pinned = pins()
    ranges = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for line in ranges:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        assert version(pinned[name]) >= version(least), line


def test_installed_versions_lie_in_the_ranges_and_an_environment_of_our_own_has_the_pins():
    """scripts/setup.sh installs the pinned versions and leaves a note; an interpreter of another may have later ones."""
    own = (pathlib.Path(sys.prefix) / ".reflow-installed").exists()
    for line in PROJECT["dependencies"]:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        here = importlib.metadata.version(name)
        assert version(here) >= version(least), f"{name} {here} is older than {line}"
        assert not own or here.split("+")[0] == pins()[name], f"{name} {here} is not the pinned {pins()[name]}"


# Names that are not called, imported or passed: what they do is run, or open a way to run, what a file or a site holds.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "torch.hub", "code", "pty",
           "urllib.request", "http", "requests", "httpx", "aiohttp", "ftplib", "telnetlib", "xmlrpc", "smtplib"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
         "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "yaml.load", "yaml.unsafe_load", "tempfile.mktemp",
         "asyncio.create_subprocess_shell", "runpy.run_path", "runpy.run_module"}  # fmt: skip
METHODS = {"extractall", "unsafe_load", "read_pickle", "to_pickle"}
# Keywords that may only say this, where they are written at all.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True, "use_safetensors": True}
ABSENT = {"custom_pipeline", "custom_revision"}
MUST = {"torch.load": "weights_only"}


def dangers(tree: ast.AST) -> list[str]:
    """Everything of the lists above in one file, as `line: what`. Aliases of imports are followed."""
    names: dict[str, str] = {}
    found = [f"0: imports {name}" for name in sorted(modules(tree)) if any(name == m or name.startswith(m + ".") for m in MODULES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, _, rest = ast.unparse(node).partition(".")
            full = names.get(first, first) + (f".{rest}" if rest else "")
            if full.removeprefix("builtins.") in CALLS or re.match(r"os\.(exec|spawn|posix_spawn)[a-z]*$", full):
                found.append(f"{node.lineno}: {full}")
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        full = names.get(first, first) + (f".{rest}" if rest else "")
        given = {k.arg: k.value for k in node.keywords}
        if full.split(".")[-1] in METHODS:
            found.append(f"{node.lineno}: {full}")
        if full in MUST and MUST[full] not in given:
            found.append(f"{node.lineno}: {full} without {MUST[full]}")
        for key in given.keys() & (KEYWORDS.keys() | ABSENT):
            value = given[key]
            if key in ABSENT or not (isinstance(value, ast.Constant) and value.value is KEYWORDS[key]):
                found.append(f"{node.lineno}: {key}={ast.unparse(value)}")
    # The same keywords as text, on their way into a call through a dict.
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found += [f"{key.lineno}: {key.value!r} in a dict" for key in node.keys
                      if isinstance(key, ast.Constant) and key.value in KEYWORDS.keys() | ABSENT]
    return found


def test_nothing_of_ours_runs_what_a_file_or_a_site_holds():
    assert {path: found for path, tree in trees(*OURS).items() if (found := dangers(tree))} == {}


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import dill as d", "eval(x)", "exec(x)", "f = eval", "__import__(x)", "import os\nos.system(x)",
    "from os import system as run\nrun(x)", "import os as o\no.popen(x)", "import os\nos.execv(x, y)", "import subprocess as s\ns.run(x, shell=True)",
    "import torch\ntorch.load(x)", "import torch\ntorch.load(x, weights_only=False)", "import torch\ntorch.load(x, weights_only=w)",
    "from torch import load\nload(x)", "import numpy as np\nnp.load(x, allow_pickle=True)", "f(x, trust_remote_code=True)",
    "f(**{'trust_remote_code': True})", "tar.extractall(x)", "import urllib.request", "from urllib import request", "import torch.hub",
    "import importlib\nimportlib.import_module('pickle')", "f(x, custom_pipeline=y)", "f(x, use_safetensors=False)", "import builtins\nbuiltins.eval(x)",
])
def test_the_audit_finds(text):
    assert dangers(ast.parse(text))


@pytest.mark.parametrize("text", [
    "import torch\ntorch.load(x, weights_only=True)", "model.eval()", "import re\nre.compile(x)", "import torch\ntorch.compile(x)",
    "import numpy as np\nnp.load(x, allow_pickle=False)", "import subprocess\nsubprocess.run([x])", "import json\njson.load(x)", "platform.system()",
])
def test_the_audit_lets_pass(text):
    assert dangers(ast.parse(text)) == []
