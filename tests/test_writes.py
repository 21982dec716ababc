"""Every file that a command writes appears whole or not at all, by one mechanism: reflow/outputs.py."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUARDS = {"written", "staged", "about"}
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "save_tensors", "save_pretrained", "save_config", "replace", "rename", "copyfile"}
# Called inside the guard of whoever calls them; folders that their function stages itself, under a name of its own for each process; and what
# only the project's own people run.
ELSEWHERE = {
    "reflow/evaluation/pictures.py": {"quality", "curves", "progress"},
    "reflow/evaluation/page.py": {"write"},
    "reflow/export/folder.py": {"_single_precision", "_copy_parts"},
    "reflow/evaluation/contenders/opening.py": {"_with_our_scheduler"},  # a temporary folder of links
    "reflow/models/single_file.py": {"_write", "_write_tokenizers"},
    "reflow/locks.py": {"alone"},
    "reflow/weights/files.py": {"save_tensors", "_order_header"},
    "reflow/training/stored.py": {"_newest", "prune"},  # folders that get or lose their names
    "reflow/training/checkpoint.py": {"finish"},
    "reflow/recipes/keys.py": {""},
    "reflow/training/beat.py": {"main"},  # a sign of life, told by its time and not by what it holds
    "reflow/evaluation/classifier.py": {"main"},
    "reflow/experiments/digits_training.py": None,
    "reflow/experiments/digits_teacher.py": None,
    "reflow/experiments/digits_flow_teacher.py": None,
    "reflow/experiments/digits_full.py": None,
}


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


def writes(call: ast.Call) -> bool:
    name = name_of(call)
    if name in ("open", "OSFile"):
        modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return any(set(mode) & set("wxa+") for mode in modes if len(mode) <= 3)
    if name in ("replace", "rename"):
        return isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "os"
    if name == "write_text":
        return isinstance(call.func, ast.Attribute)  # the function of that name is the mechanism
    return name in WRITES


def unguarded(node: ast.AST, function: str = "", guarded: bool = False):
    """(line, function) of the writing calls outside of every guard, the guards' own expressions included."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    if isinstance(node, ast.With):
        guarded = guarded or any(isinstance(i.context_expr, ast.Call) and name_of(i.context_expr) in GUARDS for i in node.items)
    if isinstance(node, ast.Call) and writes(node) and not guarded:
        yield node.lineno, function
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child, function, guarded)


def test_nothing_is_written_in_place():
    found = {}
    for path in sorted((ROOT / "reflow").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == "reflow/outputs.py":
            continue
        allowed = ELSEWHERE.get(name, set())
        hits = [(line, function) for line, function in unguarded(ast.parse(path.read_text())) if allowed is not None and function not in allowed]
        if hits:
            found[name] = hits
    assert not found, "written outside of outputs.written, outputs.staged and outputs.about"


def test_the_check_sees_what_it_must():
    seen = [line for line, _ in unguarded(ast.parse("""
open(a, "w")
open(a, "ab")
open(a, "rb")
path.write_text("x")
os.replace(a, b)
text.replace("a", "b")
with written(p) as t:
    t.write_text("x")
with about(p), open(p, "a") as f:
    pass
with other(p):
    figure.savefig(p)
"""))]
    assert seen == [2, 3, 5, 6, 13]
