"""Small changes to the code that the tests must notice: one operator, constant, condition or statement at a time.

A mutant is a place in one of TARGETS and a change there, drawn by its index. Its tests run in a fork of this process, which has
the libraries imported and nothing of the project, so that the fork imports the changed file in place of the one on disk; no file
is written. The tests of a target come fastest first and stop at the first that fails.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.abc
import importlib.util
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

TITLE = "Mutants of the ops' reference, the flow, the sampler, the average and the checkpoints that the tests kill"
CASES = 300
SECONDS = 300  # a mutant that runs longer hangs, which the tests notice
ROOT = pathlib.Path(__file__).resolve().parents[2]
SURVIVORS = pathlib.Path(__file__).with_name("survivors.json")
FLOW = ["tests/flow"]
# Target: its tests, what knows it best and fastest first. Tests of Triton's interpreter are left out: it runs none of these files.
TARGETS = {
    "kernels/reflow_kernels/reference.py": [
        "tests/ops/test_ops_reference.py", "tests/ops/test_ops_arguments.py", "tests/ops/test_ops_algebra.py", "tests/ops/test_ops_aligned_v.py"],
    "reflow/flow/__init__.py": FLOW,
    "reflow/flow/schedule.py": ["tests/flow/test_flow_schedule.py", "tests/flow/test_flow_prediction.py", *FLOW],
    "reflow/flow/prediction.py": ["tests/flow/test_flow_prediction.py", *FLOW],
    "reflow/flow/windows.py": ["tests/flow/test_flow_windows.py", *FLOW],
    "reflow/flow/solver.py": ["tests/flow/test_flow_solver.py", *FLOW],
    "reflow/flow/objective.py": ["tests/flow/test_flow_objective.py", *FLOW],
    "reflow/flow/chord.py": ["tests/flow/test_flow_chord.py", *FLOW],
    "reflow/flow/exact.py": ["tests/flow/test_flow_exact.py", *FLOW],
    "reflow/data/sampler.py": ["tests/training/test_sampler.py", "tests/data/test_buckets.py"],
    "reflow/training/ema.py": ["tests/training/test_ema.py"],
    "reflow/training/checkpoint.py": ["tests/training/test_checkpoints.py", "tests/training/test_run.py"],
}  # captured.py records CUDA graphs: its tests need a GPU
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
          ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any", "zeros_like": "ones_like",
         "new_zeros": "new_ones", "new_ones": "new_zeros", "sin": "cos", "cos": "sin", "ceil": "floor", "floor": "ceil"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: `was` and `now` are the source of the changed expression or statement."""

    path: str
    line: int
    was: str
    now: str
    place: int
    change: int

    @property
    def source(self) -> str:
        """The file with the change."""
        tree = ast.parse((ROOT / self.path).read_text())
        return ast.unparse(ast.fix_missing_locations(_Replace(self.place, self.change).visit(tree)))

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}: {self.was} -> {self.now}"

    @property
    def key(self) -> str:
        """As `name`, without the line, which other changes move."""
        return f"{self.path}: {self.was} -> {self.now}"


def _skipped(tree: ast.Module) -> set[ast.AST]:
    """What no test is asked about: annotations, docstrings and messages, decorators, imports, what is raised and why, notes of values' types."""
    out: set[ast.AST] = set()

    def all_of(node: ast.AST | None) -> None:
        if node is not None:
            out.update(ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                all_of(decorator)
        if isinstance(node, ast.FunctionDef):
            all_of(node.returns)
        if isinstance(node, ast.arg | ast.AnnAssign):
            all_of(node.annotation)
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            all_of(node)
        if isinstance(node, ast.Raise):
            all_of(node.exc)
            all_of(node.cause)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            all_of(node)
        if isinstance(node, ast.keyword) and node.arg == "strict" and isinstance(node.value, ast.Constant):
            all_of(node)  # of zip: a check of lengths that are equal
        if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            all_of(node)
    return out


def _changes(node: ast.AST) -> list[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        return [ast.Compare(node.left, [COMPARE[type(node.ops[0])](), *node.ops[1:]], node.comparators)]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return [ast.BinOp(node.left, BINARY[type(node.op)](), node.right)]
    if isinstance(node, ast.BoolOp):
        return [ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            return [ast.Constant(not node.value)]
        if isinstance(node.value, int | float):
            return [ast.Constant(node.value + 1), ast.Constant(0 if node.value == 1 else 1)]
        if isinstance(node.value, str) and node.value:
            return [ast.Constant(node.value + "_")]
        return []
    if isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        return [ast.Name(NAMES[node.id], node.ctx)]
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        return [ast.Attribute(node.value, NAMES[node.attr], node.ctx)]
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return [ast.Return(ast.Constant(None))]
    if isinstance(node, ast.If | ast.While):
        return [type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)]
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        return [ast.Pass()]
    return []


def _said(node: ast.AST) -> str:
    """One line of a node's source."""
    if isinstance(node, ast.If | ast.While):
        return f"{type(node).__name__.lower()} {ast.unparse(node.test)}"
    return ast.unparse(node).splitlines()[0][:160]


class _Replace(ast.NodeTransformer):
    def __init__(self, place: int, change: int) -> None:
        self.place, self.change, self.at = place, change, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self.at += 1
        if self.at == self.place:
            return ast.copy_location(_changes(node)[self.change], node)
        return self.generic_visit(node)


def _order(node: ast.AST) -> list[ast.AST]:
    """Nodes in the order in which _Replace meets them."""
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in _order(child))]


@functools.cache
def mutants(path: str) -> tuple[Mutant, ...]:
    """Every mutant of a file."""
    tree, found = ast.parse((ROOT / path).read_text()), []
    skipped = _skipped(tree)
    for place, node in enumerate(_order(tree)):
        if node in skipped:
            continue
        for change, new in enumerate(_changes(node)):
            if ast.dump(new) != ast.dump(node):
                found.append(Mutant(path, node.lineno, _said(node), _said(new), place, change))
    return tuple(found)


@functools.cache
def chosen() -> tuple[Mutant, ...]:
    """The mutants of a full soak, in an order of their own: any first part of it is a fair sample."""
    everything = [mutant for path in TARGETS if (ROOT / path).exists() for mutant in mutants(path)]
    return tuple(random.Random(20261126).sample(everything, CASES))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a given text."""

    def __init__(self, path: str, source: str) -> None:
        self.file, self.source = str(ROOT / path), source
        self.name = ".".join(pathlib.Path(path.removeprefix("kernels/")).with_suffix("").parts).removesuffix(".__init__")
        self.package = path.endswith("__init__.py")

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        spec = importlib.util.spec_from_file_location(fullname, self.file, loader=self)
        if self.package:
            spec.submodule_search_locations = [str(pathlib.Path(self.file).parent)]
        return spec

    def exec_module(self, module) -> None:
        exec(compile(self.source, self.file, "exec"), module.__dict__)


@functools.cache
def warm() -> None:
    """Import the libraries once. Nothing of the project may be imported in this process."""
    os.environ.update({"REFLOW_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    import diffusers  # noqa: F401
    import hypothesis
    import numpy  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers  # noqa: F401

    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.split(".")[0] in ("reflow", "reflow_kernels")]


def _child(path: str, source: str | None, log: pathlib.Path) -> int:
    """Exit code of pytest in a fork: 0 where every test passed."""
    import pytest

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(ROOT)
    if source is not None:
        sys.meta_path.insert(0, _Finder(path, source))
    names = [name for name in TARGETS[path] if (ROOT / name).exists()]
    for n, name in enumerate(names):  # a call for each keeps their order; the fork is thrown away after the first failure
        before = [f"--ignore={ROOT / other}" for other in names[:n]]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not launch", "-k", "not triton", *before,
                            "--basetemp", f"{log}.tmp", name])
        if code not in (0, 5):  # 5: a folder all of whose files came before
            return int(code)
    return 0


def tested(path: str, source: str | None, folder: pathlib.Path, seconds: float = SECONDS) -> tuple[str, str]:
    """("passed" | "failed" | "hung", the first failing test or the log's last line)."""
    warm()
    log = folder / "pytest.log"
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = _child(path, source, log)
        except BaseException:  # whatever the mutant raises while it is imported
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            named = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
            said = named[-1] if named else (lines or [""])[-1]
            return ("passed" if status == 0 else "failed"), said[:200]
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung", f"after {seconds:g} s"


def unchanged(path: str, folder: pathlib.Path) -> str | None:
    """What a target's tests say of the code as it is; None where they pass, without which a failure says nothing of a mutant."""
    names = TARGETS[path]
    key = tuple(sorted(name for name in set(names) if not any(name.startswith(f"{other}/") for other in names)))
    if key not in _BASE:
        outcome, said = tested(path, None, folder, 3 * SECONDS)
        _BASE[key] = None if outcome == "passed" else f"the tests of {path} {outcome} without any change: {said}"
    return _BASE[key]


def reasons() -> dict[str, str]:
    """Why no test can tell a mutant from the code, by its key."""
    return json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}


_BASE: dict[tuple[str, ...], str | None] = {}


def trial(index: int, folder: pathlib.Path) -> dict:
    mutant = chosen()[index]
    if broken := unchanged(mutant.path, folder):
        return {"kind": "no answer", "failed": broken}
    outcome, said = tested(mutant.path, mutant.source, folder)
    if outcome != "passed":
        return {"kind": "killed", "failed": None, "mutant": mutant.name, "by": said, "killed": 1}
    why = reasons().get(mutant.key)
    return {"kind": "survived, explained" if why else "survived", "failed": None if why else f"nothing noticed {mutant.name}", "mutant": mutant.name,
            "reason": why, "survived": 1}
